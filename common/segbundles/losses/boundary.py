"""Boundary loss with distances in mm, and optionally with a precomputed distance map."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from monai.networks import one_hot
from monai.utils import LossReduction, convert_to_tensor
from torch.nn.modules.loss import _Loss

from segbundles.errors import fail
from segbundles.transforms.signed_distance import signed_distance_map

__all__ = ["BoundaryLoss"]


class BoundaryLoss(_Loss):
    """Boundary loss: the mean over voxels of probability times signed distance to the true border.

    The signature is that of :class:`monai.losses.BoundaryLoss` plus ``spacing_mm``, and at spacing 1 so is the value.
    The differences:

    - distances may be in mm;
    - the target may bring its distance map, computed once on the whole volume by
      :class:`segbundles.transforms.SignedDistanceMapd`, then moved and cropped with the image;
    - the loss is computed in float32, whatever the precision of the input;
    - a target that does not fit raises ``ValueError``, not ``AssertionError``.

    The number of target channels decides: the label's channels alone mean that the map is computed at every call, on
    the CPU, from the given crop; **the label's channels followed by the map's**, joined by
    :class:`monai.transforms.ConcatItemsd`, mean that the given map is used. The loss is negative if most of the
    probability is inside the object.

    The original paper:
        Kervadec, H. et al. (2019) Boundary loss for highly unbalanced segmentation. MIDL 2019.
        https://arxiv.org/abs/1812.07032

    Args:
        include_background: if False, channel index 0 (background category) is excluded from the calculation. Ignored
            for a single channel, with a warning.
        to_onehot_y: whether the label contains class indices, with or without a channel axis, to be converted into the
            one-hot format. Ignored for a prediction of a single channel, with a warning.
        sigmoid: if True, apply a sigmoid function to the prediction.
        softmax: if True, apply a softmax function to the prediction. Ignored for a single channel, with a warning.
        other_act: callable function to execute other activation layers. Defaults to ``None``.
        reduction: {``"none"``, ``"mean"``, ``"sum"``}
            Specifies the reduction to apply to the output. Defaults to ``"mean"``.

            - ``"none"``: no reduction, shape (B, C), or (C) with ``batch``.
            - ``"mean"``: the mean over batch and classes.
            - ``"sum"``: the sum over batch and classes.
        batch: whether to average over the batch before the ``reduction``.
        spacing_mm: distance in mm between neighbouring voxels, one number or one per spatial axis, for maps that the
            loss computes. None means 1. A map that comes with the target has its own unit.

    Raises:
        TypeError: when ``other_act`` is not an ``Optional[Callable]``.
        ValueError: when more than 1 of [``sigmoid=True``, ``softmax=True``, ``other_act is not None``].
            Incompatible values.

    Example:
        >>> loss = BoundaryLoss(sigmoid=True)
        >>> label = (torch.rand(2, 1, 32, 32) > 0.5).float()
        >>> distance = loss.compute_distance_map(label)
        >>> loss(torch.randn(2, 1, 32, 32), torch.cat([label, distance], dim=1))
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        reduction: LossReduction | str = LossReduction.MEAN,
        batch: bool = False,
        spacing_mm: Sequence[float] | float | None = None,
    ) -> None:
        super().__init__(reduction=LossReduction(reduction).value)
        if other_act is not None and not callable(other_act):
            raise TypeError(f"other_act must be None or callable but is {type(other_act).__name__}.")
        if int(sigmoid) + int(softmax) + int(other_act is not None) > 1:
            fail("Incompatible values: more than 1 of [sigmoid=True, softmax=True, other_act is not None].")
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.sigmoid = sigmoid
        self.softmax = softmax
        self.other_act = other_act
        self.batch = batch
        self.spacing_mm = spacing_mm

    @torch.no_grad()
    def compute_distance_map(self, target: torch.Tensor) -> torch.Tensor:
        """Return the signed distance map of each channel, see :func:`~segbundles.transforms.signed_distance_map`.

        Args:
            target: binary masks, shape (B, C, H, W[, D]).

        Returns:
            The map, float32, of the same shape.
        """
        spacing_mm = 1.0 if self.spacing_mm is None else self.spacing_mm
        return torch.stack([signed_distance_map(item, spacing_mm) for item in target])

    def split_target(self, input: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Separate the label from the distance map that may follow it.

        Args:
            input: the prediction, shape (B, C, H, W[, D]), where C is the number of classes.
            target: the label's channels (1 with ``to_onehot_y``, where the channel axis may be omitted, otherwise C),
                followed by no map, or by a map of C channels, or of C - 1 if the background is excluded.

        Returns:
            The label's channels, and the map's channels of the classes that count, or None if there is no map.

        Raises:
            ValueError: when ``input`` is not 2D or 3D, or when ``target`` has the wrong number of channels, another
                batch size or spatial size, or a map of integers.
        """
        if self.to_onehot_y and target.ndim == input.ndim - 1:
            target = target.unsqueeze(1)
        shapes = f"got input of shape {tuple(input.shape)} and target of shape {tuple(target.shape)}"
        if input.ndim not in (4, 5):
            fail(f"Only 2D (B, C, H, W) and 3D (B, C, H, W, D) are supported, {shapes}.")
        if input.ndim != target.ndim or input.shape[0] != target.shape[0] or input.shape[2:] != target.shape[2:]:
            fail(f"input and target must agree in batch size and spatial size, {shapes}.")
        classes = input.shape[1]
        first = self._first_class(classes)
        num_label = 1 if self.to_onehot_y else classes
        num_map = target.shape[1] - num_label
        if num_map == 0:
            return target, None
        if num_map not in (classes, classes - first):
            fail(
                f"target must have {num_label} channel(s) of the label, alone or followed by {classes - first} of the "
                f"distance map ({classes} with the background), {shapes}."
            )
        if not target.is_floating_point():
            fail(f"a distance map must be floating point, got a target of {target.dtype}.")
        return target[:, :num_label], target[:, -(classes - first) :]

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the loss.

        Args:
            input: the prediction, shape (B, C, H, W[, D]), where C is the number of classes.
            target: the label, alone or followed by its distance map along the channels, see :meth:`split_target`.

        Returns:
            The loss, float32: a scalar, or with ``reduction="none"`` of shape (B, C), or (C) with ``batch``.

        Raises:
            ValueError: when ``target`` does not fit ``input``.
        """
        input = convert_to_tensor(input, track_meta=False)
        target = convert_to_tensor(target, track_meta=False)
        label, distance = self.split_target(input, target)
        classes = input.shape[1]
        flags = {"softmax": self.softmax, "to_onehot_y": self.to_onehot_y}
        flags["include_background"] = self.include_background
        for name, value in flags.items():
            if classes == 1 and value is (name != "include_background"):
                warnings.warn(f"single channel prediction, `{name}={value}` ignored.", stacklevel=2)

        probability = input.float()
        if self.sigmoid:
            probability = torch.sigmoid(probability)
        if self.softmax and classes > 1:
            probability = torch.softmax(probability, dim=1)
        if self.other_act is not None:
            probability = self.other_act(probability)
        first = self._first_class(classes)
        probability = probability[:, first:]
        if distance is None:
            if self.to_onehot_y and classes > 1:
                label = one_hot(label, num_classes=classes)
            distance = self.compute_distance_map(label[:, first:])

        loss = (probability * distance.float()).mean(dim=tuple(range(2, input.ndim)))
        if self.batch:
            loss = loss.mean(dim=0)
        if self.reduction == LossReduction.MEAN.value:
            return loss.mean()
        if self.reduction == LossReduction.SUM.value:
            return loss.sum()
        return loss

    def _first_class(self, classes: int) -> int:
        return 0 if self.include_background or classes == 1 else 1
