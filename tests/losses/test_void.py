from __future__ import annotations

import math

import pytest
import torch
from monai.losses import DiceLoss

from segbundles.losses import VoidDiceCELoss


def case(classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, 6, 5, generator=generator).requires_grad_()
    return logits, torch.randint(0, classes, (2, 1, 6, 5), generator=generator).float()


def test_by_hand() -> None:
    """Two pixels known, one void: p of polyp .8 (polyp) and .5 (background)."""
    logits = torch.tensor([[[[0.0, 0.0, 9.0]], [[math.log(4), 0.0, 0.0]]]])
    label = torch.tensor([[[[1, 0, 255]]]])
    ce = -(math.log(0.8) + math.log(0.5)) / 2
    dice = 1 - (2 * 0.8 + 1) / (0.8 + 0.5 + 1 + 1)
    loss = VoidDiceCELoss(lambda_dice=0.5, lambda_ce=2.0)
    assert loss(logits, label).item() == pytest.approx(2 * ce + 0.5 * dice, abs=1e-6)
    assert {k: v.item() for k, v in loss.terms.items()} == pytest.approx({"ce": ce, "dice": dice}, abs=1e-6)


@pytest.mark.parametrize("classes", [2, 4])
def test_without_void_it_is_monais(classes: int) -> None:
    logits, label = case(classes)
    dice = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)(
        logits, label
    )
    ce = torch.nn.functional.cross_entropy(logits, label[:, 0].long())
    assert VoidDiceCELoss(0.7, 1.5)(logits, label).item() == pytest.approx((0.7 * dice + 1.5 * ce).item(), abs=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_void_pixels_have_no_gradient_and_no_say(weights: tuple) -> None:
    logits, label = case()
    label[:, :, :3] = 255
    loss = VoidDiceCELoss(*weights)
    value = loss(logits, label)
    value.backward()
    assert logits.grad[:, :, :3].abs().max() == 0
    assert logits.grad[:, :, 3:].abs().min() > 0
    other = logits.detach().clone()
    other[:, :, :3] = 7
    assert loss(other, label).item() == pytest.approx(value.item(), abs=1e-7)


def test_nothing_known_gives_no_gradient_and_no_nan() -> None:
    logits, label = case()
    loss = VoidDiceCELoss(1.0, 1.0)(logits, torch.full_like(label, 255))
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad.abs().max() == 0


def test_dice_is_not_computed_without_weight() -> None:
    loss = VoidDiceCELoss()
    loss(*case())
    assert set(loss.terms) == {"ce"}


@pytest.mark.parametrize("weights", [(0.0, 0.0), (-1.0, 1.0), (1.0, -0.1)])
def test_weights_that_cannot_be(weights: tuple) -> None:
    with pytest.raises(
        ValueError, match=r"lambda_dice and lambda_ce \(dice_weight and ce_weight\) must be 0 or more and not both 0"
    ):
        VoidDiceCELoss(*weights)


@pytest.mark.parametrize(("logits", "label"), [((2, 3, 4, 4), (2, 4, 4)), ((2, 1, 4, 4), (2, 1, 4, 4))])
def test_shapes_that_do_not_fit(logits: tuple, label: tuple) -> None:
    with pytest.raises(
        ValueError, match=r"target must have shape \(B, 1, spatial\) and input \(B, 2 or more, spatial\)"
    ):
        VoidDiceCELoss()(torch.zeros(logits), torch.zeros(label))
