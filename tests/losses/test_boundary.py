from __future__ import annotations

import math
from inspect import signature

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.losses import BoundaryLoss as MonaiBoundaryLoss

from segbundles.losses import BoundaryLoss
from segbundles.transforms.signed_distance import signed_distance_map

SHAPES = [(19, 23), (11, 14, 9)]


def logits_and_indices(shape: tuple[int, ...], channels: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(shape) + channels)
    logits = torch.randn(2, channels, *shape, generator=generator)
    return logits, torch.randint(0, classes, (2, 1, *shape), generator=generator)


def with_map(label: torch.Tensor, spacing_mm: float | tuple[float, ...] = 1.0, masks=None) -> torch.Tensor:
    masks = label if masks is None else masks
    return torch.cat([label, torch.stack([signed_distance_map(item, spacing_mm) for item in masks])], dim=1)


def one_hot(indices: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.cat([indices == c for c in range(classes)], dim=1).float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("precomputed", [False, True])
def test_agrees_with_monai_binary(shape, reduction, precomputed):
    logits, label = logits_and_indices(shape, 1, 2)
    expected = MonaiBoundaryLoss(sigmoid=True, reduction=reduction)(logits, label)
    target = with_map(label) if precomputed else label
    output = BoundaryLoss(sigmoid=True, reduction=reduction)(logits, target)
    torch.testing.assert_close(output, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("to_onehot_y", [False, True])
@pytest.mark.parametrize(
    ("include_background", "maps"),
    [(True, "none"), (True, "every class"), (False, "none"), (False, "every class"), (False, "foreground")],
)
def test_agrees_with_monai_multi_class(shape, to_onehot_y, include_background, maps):
    logits, indices = logits_and_indices(shape, 3, 3)
    flags = {"include_background": include_background, "to_onehot_y": to_onehot_y, "softmax": True}
    masks = one_hot(indices, 3)
    label = indices if to_onehot_y else masks
    expected = MonaiBoundaryLoss(**flags)(logits, label)
    if maps != "none":
        label = with_map(label, masks=masks[:, 1:] if maps == "foreground" else masks)
    torch.testing.assert_close(BoundaryLoss(**flags)(logits, label), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("maps", [False, True])
def test_indices_without_a_channel_axis(maps):
    logits, indices = logits_and_indices((19, 23), 3, 3)
    loss = BoundaryLoss(to_onehot_y=True, softmax=True)
    expected = MonaiBoundaryLoss(to_onehot_y=True, softmax=True)(logits, indices[:, 0])
    target = with_map(indices, masks=one_hot(indices, 3)) if maps else indices[:, 0]
    torch.testing.assert_close(loss(logits, target), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("reduction", "shape"), [("none", (3,)), ("sum", ()), ("mean", ())])
def test_batch_averages_over_the_cases_first(reduction, shape):
    logits, indices = logits_and_indices((19, 23), 3, 3)
    flags = {"to_onehot_y": True, "softmax": True, "reduction": reduction, "batch": True}
    output = BoundaryLoss(**flags)(logits, indices)
    assert output.shape == shape
    torch.testing.assert_close(output, MonaiBoundaryLoss(**flags)(logits, indices), rtol=2e-6, atol=1e-6)


def test_arguments_are_those_of_monai_and_the_spacing():
    ours, monais = (list(signature(one.__init__).parameters.values()) for one in (BoundaryLoss, MonaiBoundaryLoss))
    assert ours[:-1] == monais
    assert ours[-1].name == "spacing_mm"


def test_gradient_agrees_with_monai():
    logits, label = logits_and_indices((19, 23), 1, 2)
    gradients = []
    for loss in (MonaiBoundaryLoss(sigmoid=True), BoundaryLoss(sigmoid=True)):
        leaf = logits.clone().requires_grad_()
        loss(leaf, label).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("spacing_mm", "distances"),
    [
        (None, [2, 1, 0, -1, 0, 1]),
        (0.5, [1, 0.5, 0, -0.5, 0, 0.5]),
        ((0.5, 2.0), [4, 2, -1.5, -3.5, -1.5, 2]),
    ],
)
def test_hand_computed_in_mm(spacing_mm, distances):
    label = torch.tensor([[[[0.0, 0, 1, 1, 1, 0]]]])
    loss = BoundaryLoss(spacing_mm=spacing_mm)
    assert loss(torch.ones_like(label), label).item() == pytest.approx(sum(distances) / 6)
    assert loss(label, label).item() == pytest.approx(sum(distances[2:5]) / 6)


def test_precomputed_map_is_used_as_it_is():
    label = torch.zeros(1, 1, 4, 4)
    distance = torch.full((1, 1, 4, 4), 7.0)
    output = BoundaryLoss(sigmoid=True, spacing_mm=100.0)(torch.zeros(1, 1, 4, 4), torch.cat([label, distance], 1))
    assert output.item() == 3.5


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_zero_on_empty_and_full_masks(value, shape):
    logits = torch.randn(2, 1, *shape, requires_grad=True)
    output = BoundaryLoss(sigmoid=True)(logits, torch.full((2, 1, *shape), value))
    output.backward()
    assert output.item() == 0
    assert not logits.grad.any()


def test_descent_raises_the_inside_and_lowers_the_outside():
    label = torch.zeros(1, 1, 16, 16)
    label[..., 4:12, 4:12] = 1
    logits = torch.zeros(1, 1, 16, 16, requires_grad=True)
    loss = BoundaryLoss(sigmoid=True)
    loss(logits, label).backward()
    distance = signed_distance_map(label[0])[None]
    assert (logits.grad[distance > 0] > 0).all()
    assert (logits.grad[distance < 0] < 0).all()
    # pushed harder the farther from the border
    assert logits.grad[0, 0, 0, 0] > logits.grad[0, 0, 3, 6] > 0
    assert loss(logits - 10 * logits.grad, label) < loss(logits, label)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precomputed", [False, True])
def test_half_precision_input_is_computed_in_float32(dtype, precomputed):
    logits, label = logits_and_indices((64, 64), 1, 2)
    logits = logits.to(dtype)
    target = with_map(label) if precomputed else label
    expected = BoundaryLoss(sigmoid=True)(logits.float(), target)
    leaf = logits.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = BoundaryLoss(sigmoid=True)(leaf, target)
    output.backward()
    assert output.dtype == torch.float32
    assert output == expected
    assert leaf.grad.dtype == dtype
    assert leaf.grad.isfinite().all()


def test_meta_tensors_give_a_plain_scalar():
    logits, label = logits_and_indices((19, 23), 1, 2)
    output = BoundaryLoss(sigmoid=True)(MetaTensor(logits), MetaTensor(with_map(label)))
    assert type(output) is torch.Tensor
    torch.testing.assert_close(output, BoundaryLoss(sigmoid=True)(logits, label))


def test_other_act():
    logits, label = logits_and_indices((19, 23), 1, 2)
    torch.testing.assert_close(
        BoundaryLoss(other_act=torch.sigmoid)(logits, label), BoundaryLoss(sigmoid=True)(logits, label)
    )


@pytest.mark.parametrize("name", ["softmax", "to_onehot_y", "include_background"])
def test_flags_without_meaning_for_one_channel_warn(name):
    logits, label = logits_and_indices((19, 23), 1, 2)
    loss = BoundaryLoss(other_act=None if name == "softmax" else torch.sigmoid, **{name: name != "include_background"})
    with pytest.warns(UserWarning, match=f"single channel prediction, `{name}=.*` ignored"):
        output = loss(logits, with_map(label))
    torch.testing.assert_close(output, BoundaryLoss(sigmoid=name != "softmax")(logits, label))


@pytest.mark.parametrize(
    ("flags", "input_shape", "target_shape", "message"),
    [
        (
            {},
            (2, 1, 8, 8),
            (2, 3, 8, 8),
            r"1 channel\(s\) of the label.*followed by 1 .*\(2, 1, 8, 8\).*\(2, 3, 8, 8\)",
        ),
        ({}, (2, 3, 8, 8), (2, 1, 8, 8), r"3 channel\(s\).*\(2, 3, 8, 8\) and target of shape \(2, 1, 8, 8\)"),
        ({}, (2, 3, 8, 8), (2, 5, 8, 8), r"\(2, 5, 8, 8\)"),
        ({"to_onehot_y": True}, (2, 3, 8, 8), (2, 3, 8, 8), r"1 channel\(s\) .* followed by 3 .*\(2, 3, 8, 8\)"),
        ({"include_background": False}, (2, 3, 8, 8), (2, 4, 8, 8), r"followed by 2 of .*\(3 with the background\)"),
        ({}, (2, 1, 8, 8), (1, 1, 8, 8), r"agree in batch size.*\(2, 1, 8, 8\) and target of shape \(1, 1, 8, 8\)"),
        ({}, (2, 1, 8, 8), (2, 1, 8, 9), r"spatial size.*\(2, 1, 8, 9\)"),
        ({}, (2, 1, 8, 8), (2, 8, 8), r"\(2, 1, 8, 8\) and target of shape \(2, 8, 8\)"),
        ({}, (2, 1, 8), (2, 1, 8), r"Only 2D .* and 3D .* got input of shape \(2, 1, 8\)"),
        ({"spacing_mm": (1, 2, 3)}, (2, 1, 8, 8), (2, 1, 8, 8), r"2 spatial axes, got \(1, 2, 3\)"),
    ],
)
def test_wrong_shapes(flags, input_shape, target_shape, message):
    with pytest.raises(ValueError, match=message):
        BoundaryLoss(**flags)(torch.zeros(input_shape), torch.zeros(target_shape))


def test_integer_maps_are_refused():
    with pytest.raises(ValueError, match=r"must be floating point, got a target of torch\.int16"):
        BoundaryLoss()(torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 4, dtype=torch.int16))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="more than 1 of"):
        BoundaryLoss(sigmoid=True, softmax=True)
    with pytest.raises(TypeError, match="other_act must be None or callable but is str"):
        BoundaryLoss(other_act="sigmoid")
    with pytest.raises(ValueError, match="median"):
        BoundaryLoss(reduction="median")


def test_far_prediction_costs_its_distance_in_mm():
    label = np.zeros((1, 1, 32, 32), np.float32)
    label[..., 0, 0] = 1
    prediction = torch.zeros(1, 1, 32, 32)
    prediction[..., 3, 4] = 1  # 3 rows of 2 mm and 4 columns of 1 mm away
    output = BoundaryLoss(spacing_mm=(2.0, 1.0), reduction="sum")(prediction, torch.from_numpy(label))
    assert output.item() == pytest.approx(math.hypot(6, 4) / 32**2)
