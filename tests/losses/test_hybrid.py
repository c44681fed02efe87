from __future__ import annotations

import math

import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.losses import DiceCELoss, DiceLoss, FocalLoss, GeneralizedDiceLoss, TverskyLoss

from segbundles.losses import BoundaryLoss, HybridLoss
from segbundles.transforms.signed_distance import signed_distance_map


def binary(shape: tuple[int, ...] = (12, 14)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits that need a gradient, the label, and the label with its map."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, *shape, generator=generator).requires_grad_()
    label = (torch.rand(2, 1, *shape, generator=generator) > 0.7).float()
    distance = torch.stack([signed_distance_map(item) for item in label])
    return logits, label, torch.cat([label, distance], dim=1)


class SpyLoss(DiceLoss):
    """Dice that keeps the label it was given."""

    def forward(self, input, target):
        self.seen = target
        return super().forward(input, target)


@pytest.mark.parametrize("region_weight", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("shape", [(12, 14), (8, 9, 10)])
def test_weighted_sum(region_weight, precomputed, shape):
    logits, label, target = binary(shape)
    dice, boundary = DiceLoss(sigmoid=True), BoundaryLoss(sigmoid=True)
    loss = HybridLoss(dice, boundary, region_weight=region_weight)
    output = loss(logits, target if precomputed else label)
    expected = region_weight * dice(logits, label) + (1 - region_weight) * boundary(logits, label)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("region_loss", [DiceLoss(sigmoid=True), DiceCELoss(sigmoid=True), FocalLoss()])
def test_any_region_loss_sees_the_label_alone(region_loss):
    logits, label, target = binary()
    loss = HybridLoss(region_loss, BoundaryLoss(sigmoid=True), region_weight=0.5)
    loss(logits, target)
    torch.testing.assert_close(loss.terms["region"], region_loss(logits, label).detach())


@pytest.mark.parametrize("to_onehot_y", [False, True])
def test_multi_class(to_onehot_y):
    logits = torch.randn(2, 3, 12, 14)
    indices = torch.randint(0, 3, (2, 1, 12, 14))
    masks = torch.cat([indices == c for c in range(3)], dim=1).float()
    label = indices if to_onehot_y else masks
    target = torch.cat([label, torch.stack([signed_distance_map(item) for item in masks])], dim=1)
    flags = {"include_background": False, "to_onehot_y": to_onehot_y, "softmax": True}
    spy = SpyLoss(**flags)
    output = HybridLoss(spy, region_weight=0.25)(logits, target)
    torch.testing.assert_close(spy.seen, label.float())
    torch.testing.assert_close(
        output, 0.25 * DiceLoss(**flags)(logits, label) + 0.75 * BoundaryLoss(**flags)(logits, label)
    )


def test_boundary_loss_takes_the_flags_of_the_region_loss():
    region_loss = TverskyLoss(include_background=False, to_onehot_y=True, softmax=True)
    boundary_loss = HybridLoss(region_loss).boundary_loss
    assert (boundary_loss.include_background, boundary_loss.to_onehot_y) == (False, True)
    assert (boundary_loss.sigmoid, boundary_loss.softmax, boundary_loss.other_act) == (False, True, None)
    assert HybridLoss(GeneralizedDiceLoss(other_act=torch.tanh)).boundary_loss.other_act is torch.tanh


def test_gradient_is_the_weighted_sum_of_gradients():
    logits, label, target = binary()
    (output,) = torch.autograd.grad(HybridLoss(DiceLoss(sigmoid=True), region_weight=0.4)(logits, target), logits)
    (dice,) = torch.autograd.grad(DiceLoss(sigmoid=True)(logits, label), logits)
    (boundary,) = torch.autograd.grad(BoundaryLoss(sigmoid=True)(logits, label), logits)
    torch.testing.assert_close(output, 0.4 * dice + 0.6 * boundary)


def test_terms_are_detached_and_unweighted():
    logits, label, target = binary()
    loss = HybridLoss(DiceLoss(sigmoid=True), region_weight=0.4)
    assert loss.terms == {}
    loss(logits, target)
    assert set(loss.terms) == {"region", "boundary", "region_weight"}
    assert not loss.terms["region"].requires_grad
    assert not loss.terms["boundary"].requires_grad
    torch.testing.assert_close(loss.terms["region"], DiceLoss(sigmoid=True)(logits, label).detach())
    torch.testing.assert_close(loss.terms["boundary"], BoundaryLoss(sigmoid=True)(logits, label).detach())
    assert loss.terms["region_weight"] == 0.4


def test_at_weight_one_a_given_map_is_logged_without_gradient():
    logits, label, target = binary()
    loss = HybridLoss(DiceLoss(sigmoid=True))
    output = loss(logits, target)
    torch.testing.assert_close(loss.terms["boundary"], BoundaryLoss(sigmoid=True)(logits, label).detach())
    (gradient,) = torch.autograd.grad(output, logits)
    (dice,) = torch.autograd.grad(DiceLoss(sigmoid=True)(logits, label), logits)
    torch.testing.assert_close(gradient, dice, rtol=0, atol=0)


def test_at_weight_one_no_map_is_computed(monkeypatch):
    def fail(*args):
        raise AssertionError("a map was computed")

    monkeypatch.setattr("segbundles.losses.boundary.signed_distance_map", fail)
    logits, label, _ = binary()
    loss = HybridLoss(DiceLoss(sigmoid=True))
    torch.testing.assert_close(loss(logits, label), DiceLoss(sigmoid=True)(logits, label))
    assert math.isnan(loss.terms["boundary"])


@pytest.mark.parametrize("boundary_weight", [0.0, 0.02])
def test_own_boundary_weight(boundary_weight):
    logits, label, target = binary()
    loss = HybridLoss(DiceLoss(sigmoid=True), region_weight=0.9, boundary_weight=boundary_weight)
    expected = 0.9 * DiceLoss(sigmoid=True)(logits, label) + boundary_weight * BoundaryLoss(sigmoid=True)(logits, label)
    torch.testing.assert_close(loss(logits, target), expected)


def test_bf16_autocast_is_computed_in_float32():
    logits, _, target = binary((64, 64))
    half = logits.detach().bfloat16()
    loss = HybridLoss(DiceLoss(sigmoid=True), region_weight=0.5)
    expected = loss(half.float(), target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = loss(half, target)
    assert output.dtype == torch.float32
    assert output == expected


def test_meta_tensors_give_plain_tensors():
    logits, label, target = binary()
    loss = HybridLoss(DiceLoss(sigmoid=True), region_weight=0.5)
    output = loss(MetaTensor(logits), MetaTensor(target))
    assert {type(output), type(loss.terms["region"]), type(loss.terms["boundary"])} == {torch.Tensor}
    torch.testing.assert_close(output, loss(logits, label))


SCHEDULE = {
    "loss": {
        "_target_": "segbundles.losses.HybridLoss",
        "region_loss": {"_target_": "DiceLoss", "sigmoid": True},
        "boundary_loss": {"_target_": "segbundles.losses.BoundaryLoss", "sigmoid": True, "spacing_mm": 0.625},
    },
    "handler": {
        "_target_": "ParamSchedulerHandler",
        "parameter_setter": "$@loss.set_region_weight",
        "value_calculator": "linear",
        "vc_kwargs": {"initial_value": 1.0, "step_constant": 1, "step_max_value": 100, "max_value": 0.01},
        "epoch_level": True,
        "event": "$ignite.engine.Events.EPOCH_STARTED",
    },
    "imports": ["$import ignite"],
}


def test_schedule_written_in_json():
    parser = ConfigParser(SCHEDULE)
    loss, handler = parser.get_parsed_content("loss"), parser.get_parsed_content("handler")
    weights = []
    engine = Engine(lambda engine, batch: weights.append(loss.region_weight))
    handler.attach(engine)
    engine.run([0], max_epochs=120)
    assert weights[:3] == [1.0, pytest.approx(0.99), pytest.approx(0.98)]
    assert weights[98:] == pytest.approx([0.02] + [0.01] * 21)
    assert weights == pytest.approx([max(1.0 - 0.01 * epoch, 0.01) for epoch in range(120)])


@pytest.mark.parametrize("value", [-0.01, 1.5, float("nan")])
def test_region_weight_out_of_range(value):
    loss = HybridLoss(DiceLoss(sigmoid=True))
    with pytest.raises(ValueError, match=f"region_weight must be from 0 to 1, got {value}"):
        loss.set_region_weight(value)
    with pytest.raises(ValueError, match=f"got {value}"):
        HybridLoss(DiceLoss(sigmoid=True), region_weight=value)
    assert loss.region_weight == 1.0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"region_loss": "dice"}, "region_loss must be a loss such as DiceLoss, got 'dice'"),
        ({"region_loss": DiceCELoss()}, "boundary_loss must be given: DiceCELoss does not have .*sigmoid"),
        ({"region_loss": DiceLoss(), "boundary_loss": DiceLoss()}, r"must be a segbundles.losses.BoundaryLoss, got"),
        ({"region_loss": DiceLoss(reduction="none")}, 'region_loss must give a scalar, got reduction="none"'),
        (
            {"region_loss": DiceLoss(), "boundary_loss": BoundaryLoss(reduction="none")},
            'boundary_loss must give a scalar, got reduction="none"',
        ),
        ({"region_loss": DiceLoss(), "boundary_weight": -1.0}, "boundary_weight must be 0 or more.*got -1.0"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        HybridLoss(**kwargs)


def test_wrong_target_names_both_shapes():
    loss = HybridLoss(DiceLoss(sigmoid=True))
    with pytest.raises(ValueError, match=r"\(2, 1, 8, 8\) and target of shape \(2, 3, 8, 8\)"):
        loss(torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 8, 8))
