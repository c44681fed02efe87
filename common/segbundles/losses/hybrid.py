"""A weighted sum of a region loss and the boundary loss, whose weight follows a schedule."""

from __future__ import annotations

import torch
from monai.utils import LossReduction, convert_to_tensor
from torch.nn.modules.loss import _Loss

from segbundles.errors import fail

from .boundary import BoundaryLoss

__all__ = ["HybridLoss"]

_SHARED_FLAGS = ("include_background", "to_onehot_y", "sigmoid", "softmax", "other_act")


class HybridLoss(_Loss):
    """Weighted sum of a region loss and the boundary loss: ``a * region + (1 - a) * boundary``.

    Training starts at ``a = 1`` and moves weight to the boundary epoch by epoch, because training on the boundary loss
    alone can end in an empty prediction. :class:`monai.handlers.ParamSchedulerHandler` calls :meth:`set_region_weight`.
    This configuration starts at 1.0 and takes off 0.01 per epoch, down to 0.01::

        {"_target_": "ParamSchedulerHandler", "parameter_setter": "$@loss.set_region_weight",
         "value_calculator": "linear", "epoch_level": true, "event": "$ignite.engine.Events.EPOCH_STARTED",
         "vc_kwargs": {"initial_value": 1.0, "step_constant": 1, "step_max_value": 100, "max_value": 0.01}}

    The sum may be negative, like the boundary loss. ``terms`` contains each part, for logging. The weight is not part
    of the state dict: the handler sets it again from the epoch when training resumes.

    The original paper:
        Kervadec, H. et al. (2019) Boundary loss for highly unbalanced segmentation. MIDL 2019.
        https://arxiv.org/abs/1812.07032

    Args:
        region_loss: any loss of (prediction, label) that gives a scalar, such as :class:`monai.losses.DiceLoss`.
        boundary_loss: the boundary loss; it also separates the label's channels from the map's. None builds one with
            the ``include_background``, ``to_onehot_y``, ``sigmoid``, ``softmax`` and ``other_act`` of the region loss,
            which must then have all of them.
        region_weight: weight ``a`` of the region loss, 0 to 1.
        boundary_weight: weight of the boundary loss, 0 or more. None means ``1 - a``, and follows ``a``.

    Raises:
        ValueError: when a loss has the wrong type or does not reduce to a scalar, a weight is out of range, or the
            region loss does not have a flag that is needed to build the boundary loss.

    Example:
        >>> loss = HybridLoss(DiceLoss(sigmoid=True), BoundaryLoss(sigmoid=True), region_weight=0.9)
        >>> total = loss(logits, torch.cat([label, distance], dim=1))
        >>> loss.terms["boundary"]
    """

    def __init__(
        self,
        region_loss: _Loss,
        boundary_loss: BoundaryLoss | None = None,
        region_weight: float = 1.0,
        boundary_weight: float | None = None,
    ) -> None:
        super().__init__()
        if not callable(region_loss):
            fail(f"region_loss must be a loss such as DiceLoss, got {region_loss!r}.")
        if boundary_loss is None:
            missing = [name for name in _SHARED_FLAGS if not hasattr(region_loss, name)]
            if missing:
                fail(f"boundary_loss must be given: {type(region_loss).__name__} does not have {', '.join(missing)}.")
            boundary_loss = BoundaryLoss(**{name: getattr(region_loss, name) for name in _SHARED_FLAGS})
        if not isinstance(boundary_loss, BoundaryLoss):
            fail(f"boundary_loss must be a segbundles.losses.BoundaryLoss, got {boundary_loss!r}.")
        for name, loss in (("region_loss", region_loss), ("boundary_loss", boundary_loss)):
            if getattr(loss, "reduction", None) == LossReduction.NONE.value:
                fail(f'{name} must give a scalar, got reduction="none": use "mean" or "sum".')
        if boundary_weight is not None and not boundary_weight >= 0:
            fail(f"boundary_weight must be 0 or more, or None for 1 - region_weight, got {boundary_weight}.")
        self.region_loss = region_loss
        self.boundary_loss = boundary_loss
        self.boundary_weight = boundary_weight
        self.set_region_weight(region_weight)
        self._terms: dict[str, torch.Tensor | float] = {}

    def set_region_weight(self, value: float) -> None:
        """Set the weight ``a`` of the region loss.

        Args:
            value: the new weight, 0 to 1.

        Raises:
            ValueError: when ``value`` is out of range.
        """
        if not 0 <= value <= 1:
            fail(f"region_weight must be from 0 to 1, got {value}.")
        self.region_weight = float(value)

    @property
    def terms(self) -> dict[str, torch.Tensor | float]:
        """Return the last call's ``region`` and ``boundary``, unweighted and detached, and its ``region_weight``.

        The tensors stay on their device, so only reading their value waits for it. ``boundary`` is NaN if it was not
        computed. Empty before the first call.
        """
        return dict(self._terms)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the weighted sum.

        At boundary weight 0 the boundary term is only computed for ``terms``, without gradient, if the target brings
        its distance map, and is omitted otherwise.

        Args:
            input: the prediction, shape (B, C, H, W[, D]), where C is the number of classes.
            target: the label, alone or followed by its distance map along the channels, see
                :meth:`BoundaryLoss.split_target`. The region loss sees the label only.

        Returns:
            The sum, a float32 scalar.

        Raises:
            ValueError: when ``target`` does not fit ``input``.
        """
        input = convert_to_tensor(input, track_meta=False).float()
        target = convert_to_tensor(target, track_meta=False)
        label, distance = self.boundary_loss.split_target(input, target)
        region = self.region_loss(input, label)
        total = self.region_weight * region
        boundary_weight = 1 - self.region_weight if self.boundary_weight is None else self.boundary_weight
        if boundary_weight > 0:
            boundary = self.boundary_loss(input, target)
            total = total + boundary_weight * boundary
        elif distance is not None:
            with torch.no_grad():
                boundary = self.boundary_loss(input, target)
        else:
            boundary = torch.full_like(region, torch.nan)
        self._terms = {
            "region": region.detach(),
            "boundary": boundary.detach(),
            "region_weight": self.region_weight,
        }
        return total
