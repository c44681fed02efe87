"""Cross-entropy and Dice that ignore pixels of unknown class."""

from __future__ import annotations

import torch
from monai.losses import MaskedDiceLoss
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss

from segbundles.data.frames import VOID
from segbundles.errors import fail

__all__ = ["VoidDiceCELoss"]


class VoidDiceCELoss(_Loss):
    """Cross-entropy plus Dice over the pixels whose label is not ``ignore_index``.

    The cross-entropy is the mean over those pixels. Dice is computed over the whole batch, for the foreground classes,
    and smoothed by 1. MONAI's ``DiceCELoss`` cannot ignore a label. ``terms`` contains both parts, unweighted, for
    logging.

    Args:
        lambda_dice: weight of Dice; with 0 it is not computed.
        lambda_ce: weight of the cross-entropy.
        ignore_index: label of the pixels to ignore.

    Raises:
        ValueError: when a weight is negative or both are 0.
    """

    def __init__(self, lambda_dice: float = 0.0, lambda_ce: float = 1.0, ignore_index: int = VOID) -> None:
        super().__init__()
        if lambda_dice < 0 or lambda_ce < 0 or lambda_dice + lambda_ce == 0:
            fail(
                "lambda_dice and lambda_ce (dice_weight and ce_weight) must be 0 or more and not both 0, got "
                f"{lambda_dice} and {lambda_ce}."
            )
        self.lambda_dice, self.lambda_ce, self.ignore_index = lambda_dice, lambda_ce, ignore_index
        self.dice = MaskedDiceLoss(
            include_background=False, to_onehot_y=True, softmax=True, batch=True, smooth_nr=1.0, smooth_dr=1.0
        )
        self._terms: dict[str, torch.Tensor] = {}

    @property
    def terms(self) -> dict[str, torch.Tensor]:
        """Return the last call's ``ce`` and ``dice`` (if it was computed), detached."""
        return dict(self._terms)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the weighted sum.

        Args:
            input: logits (B, C, spatial) of two or more classes.
            target: class indices (B, 1, spatial).

        Raises:
            ValueError: when the shapes do not fit each other.
        """
        if target.shape != (input.shape[0], 1, *input.shape[2:]) or input.shape[1] < 2:
            fail(
                f"target must have shape (B, 1, spatial) and input (B, 2 or more, spatial), got {tuple(target.shape)} "
                f"and {tuple(input.shape)}."
            )
        known = target != self.ignore_index
        classes = target[:, 0].long()
        # not torch's mean, which is NaN if no pixel is known
        ce = F.cross_entropy(input, classes, ignore_index=self.ignore_index, reduction="sum") / known.sum().clamp(min=1)
        self._terms = {"ce": ce.detach()}
        total = self.lambda_ce * ce
        if self.lambda_dice:
            dice = self.dice(input, torch.where(known, target, 0), known.to(input.dtype))
            self._terms["dice"] = dice.detach()
            total = total + self.lambda_dice * dice
        return total
