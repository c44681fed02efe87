"""Boundary loss with spacing and with distance maps computed ahead."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from monai.networks import one_hot
from monai.utils import LossReduction, convert_to_tensor
from torch.nn.modules.loss import _Loss

from segbundles.transforms.signed_distance import signed_distance_map

__all__ = ["BoundaryLoss"]


class BoundaryLoss(_Loss):
    """Boundary loss: the mean over voxels of probability times signed distance to the true border.

    It differs from :class:`monai.losses.BoundaryLoss`, whose value it has at spacing 1, in that distances may be in mm,
    and that the distance map may come with the target: computed once on the whole volume by
    :class:`segbundles.transforms.SignedDistanceMapd`, then moved and cropped with the image. The loss is negative when
    most of the probability lies inside. It is computed in float32 whatever the input's precision.

    The target's channels tell which form it has: those of the label alone (the map is then computed at every call, on
    the CPU, from the crop as it is), or **those of the label followed by those of the map**, joined by
    :class:`monai.transforms.ConcatItemsd`.

    The original paper:
        Kervadec, H. et al. (2019) Boundary loss for highly unbalanced segmentation. MIDL 2019.
        https://arxiv.org/abs/1812.07032

    Example:
        >>> loss = BoundaryLoss(sigmoid=True)
        >>> label = (torch.rand(2, 1, 32, 32) > 0.5).float()
        >>> distance = torch.stack([signed_distance_map(item) for item in label])
        >>> loss(torch.randn(2, 1, 32, 32), torch.cat([label, distance], dim=1))
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        spacing_mm: Sequence[float] | float | None = None,
        reduction: LossReduction | str = LossReduction.MEAN,
    ) -> None:
        """Set up the loss.

        Args:
            include_background: if False, channel index 0 (background category) is excluded from the calculation.
                Ignored for a single channel, with a warning.
            to_onehot_y: whether the label has one channel that holds class indices, to be converted into the one-hot
                format. Ignored for a prediction of a single channel, with a warning.
            sigmoid: if True, apply a sigmoid function to the prediction.
            softmax: if True, apply a softmax function to the prediction.
            other_act: callable function to execute other activation layers, Defaults to ``None``.
            spacing_mm: distance in mm between neighbouring voxels, one number or one a spatial axis, for maps computed
                by the loss. None means 1. A map that comes with the target brings its own unit.
            reduction: {``"none"``, ``"mean"``, ``"sum"``}
                Specifies the reduction to apply to the output. Defaults to ``"mean"``.

                - ``"none"``: no reduction over batch and classes, shape (B, C).
                - ``"mean"``: the mean over batch and classes.
                - ``"sum"``: the sum over batch and classes.

        Raises:
            TypeError: When ``other_act`` is not an ``Optional[Callable]``.
            ValueError: When more than 1 of [``sigmoid=True``, ``softmax=True``, ``other_act is not None``].
                Incompatible values.
        """
        super().__init__(reduction=LossReduction(reduction).value)
        if other_act is not None and not callable(other_act):
            raise TypeError(f"other_act must be None or callable but is {type(other_act).__name__}.")
        if int(sigmoid) + int(softmax) + int(other_act is not None) > 1:
            raise ValueError("Incompatible values: more than 1 of [sigmoid=True, softmax=True, other_act is not None].")
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.sigmoid = sigmoid
        self.softmax = softmax
        self.other_act = other_act
        self.spacing_mm = spacing_mm

    def split_target(self, input: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Separate the label from the distance map that may follow it.

        Args:
            input: the prediction, shape (B, C, H, W[, D]), where C is the number of classes.
            target: label channels (1 with ``to_onehot_y``, else C), then none or C map channels, or C - 1 when the
                background is left out.

        Returns:
            The label's channels, and the map's channels for the classes that count, or None where there are none.

        Raises:
            ValueError: When ``input`` is not 2D or 3D, or ``target`` has another number of channels, batch size or
                spatial size, or holds a map of integers.
        """
        shapes = f"got input of shape {tuple(input.shape)} and target of shape {tuple(target.shape)}"
        if input.ndim not in (4, 5):
            raise ValueError(f"Only 2D (B, C, H, W) and 3D (B, C, H, W, D) are supported, {shapes}.")
        if input.ndim != target.ndim or input.shape[0] != target.shape[0] or input.shape[2:] != target.shape[2:]:
            raise ValueError(f"input and target must agree in batch size and spatial size, {shapes}.")
        classes = input.shape[1]
        first = self._first_class(classes)
        num_label = 1 if self.to_onehot_y else classes
        num_map = target.shape[1] - num_label
        if num_map == 0:
            return target, None
        if num_map not in (classes, classes - first):
            raise ValueError(
                f"target must have {num_label} channel(s) of the label, alone or followed by {classes - first} of the "
                f"distance map ({classes} with the background), {shapes}."
            )
        if not target.is_floating_point():
            raise ValueError(f"a distance map must be floating point, got a target of {target.dtype}.")
        return target[:, :num_label], target[:, -(classes - first) :]

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the loss.

        Args:
            input: the prediction, shape (B, C, H, W[, D]), where C is the number of classes.
            target: the label, alone or followed by its distance map along the channels, see :meth:`split_target`.

        Returns:
            The loss, float32: a scalar, or of shape (B, C) with ``reduction="none"``.

        Raises:
            ValueError: When ``target`` does not fit ``input``, or ``softmax`` is asked of a single channel.
        """
        input = convert_to_tensor(input, track_meta=False)
        target = convert_to_tensor(target, track_meta=False)
        label, distance = self.split_target(input, target)
        classes = input.shape[1]
        if self.softmax and classes == 1:
            raise ValueError(f"softmax=True needs 2 or more channels, got {tuple(input.shape)}: use sigmoid=True.")
        if self.to_onehot_y and classes == 1:
            warnings.warn("single channel prediction, `to_onehot_y=True` ignored.", stacklevel=2)
        if not self.include_background and classes == 1:
            warnings.warn("single channel prediction, `include_background=False` ignored.", stacklevel=2)

        probability = input.float()
        if self.sigmoid:
            probability = torch.sigmoid(probability)
        if self.softmax:
            probability = torch.softmax(probability, dim=1)
        if self.other_act is not None:
            probability = self.other_act(probability)
        first = self._first_class(classes)
        probability = probability[:, first:]
        if distance is None:
            if self.to_onehot_y and classes > 1:
                label = one_hot(label, num_classes=classes)
            spacing_mm = 1.0 if self.spacing_mm is None else self.spacing_mm
            distance = torch.stack([signed_distance_map(item, spacing_mm) for item in label[:, first:]])

        loss = (probability * distance.float()).mean(dim=tuple(range(2, input.ndim)))
        if self.reduction == LossReduction.MEAN.value:
            return loss.mean()
        if self.reduction == LossReduction.SUM.value:
            return loss.sum()
        return loss

    def _first_class(self, classes: int) -> int:
        return 0 if self.include_background or classes == 1 else 1
