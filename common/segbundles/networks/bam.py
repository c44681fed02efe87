"""Bottleneck attention module (BAM), as published and in sequential form."""

from __future__ import annotations

import torch
from monai.networks.layers.factories import Conv
from monai.networks.layers.utils import get_act_layer, get_norm_layer
from torch import nn

from segbundles.errors import fail

from .arguments import check_at_least_one, check_choice, split_norm

__all__ = ["BAM"]

_FORMS = ("parallel", "sequential")
_NORMS = ("batch", "syncbatch", "group")
# normalising a smaller group leaves little more than signs
_MIN_GROUP = 4


class BAM(nn.Module):
    """Bottleneck attention module: a channel gate and a spatial gate on one feature map.

    The channel gate pools the map globally and passes it through a 1x1 bottleneck. The spatial gate reduces the
    channels with a 1x1 convolution, applies dilated 3x3 (3x3x3) convolutions and ends in one channel. Let ``c`` and
    ``s`` be the two gates before the sigmoid. The forms are:

    - ``"parallel"``, the paper's form: ``x * (1 + sigmoid(c(x) * s(x)))``;
    - ``"sequential"``: ``y = x + x * sigmoid(c(x))``, ``z = y + y * sigmoid(s(y))``, and ``x + z`` is returned.

    Normalisation follows each convolution except the last of a gate. The paper uses batch norm. In the channel gate,
    batch norm sees one value per channel and case, so training fails at batch size 1. The default is therefore group
    norm with one group (layer norm over the channels), which works at any batch size. A channel gate with fewer than
    four hidden channels has no norm: normalising so few values would erase the pooled information.

    Args:
        spatial_dims: number of spatial dimensions, 2 or 3.
        in_channels: number of input and output channels.
        reduction: the bottlenecks have ``in_channels // reduction`` channels, at least one.
        dilation: dilation of the spatial gate's 3x3 convolutions.
        form: ``"parallel"`` or ``"sequential"``.
        num_dilated_convs: number of dilated convolutions in the spatial gate.
        norm: normalisation as MONAI writes it, a name or a pair of a name and arguments; None means no normalisation.
            ``"group"`` (the name alone means one group), ``"batch"`` (training needs at least 2 cases per batch) or
            ``"syncbatch"`` (CUDA; at least 2 cases over all processes). Instance norm is refused, because it turns one
            pooled value per channel into zero.
        act: activation as MONAI writes it.

    Raises:
        ValueError: when ``spatial_dims`` is not 2 or 3, ``form`` or ``norm`` is not one of the above, a number is below
            1, or the group norm does not fit the hidden channels.

    Example:
        >>> import torch
        >>> BAM(spatial_dims=3, in_channels=32, reduction=4, form="sequential")(torch.rand(1, 32, 8, 8, 8)).shape
        torch.Size([1, 32, 8, 8, 8])

    Reference: Park et al., BAM: Bottleneck Attention Module, BMVC 2018, https://arxiv.org/abs/1807.06514.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        reduction: int = 16,
        dilation: int = 4,
        form: str = "parallel",
        num_dilated_convs: int = 2,
        norm: str | tuple | None = ("group", {"num_groups": 1}),
        act: str | tuple = ("relu", {"inplace": True}),
    ) -> None:
        super().__init__()
        check_choice("spatial_dims", spatial_dims, (2, 3))
        check_choice("form", form, _FORMS)
        check_at_least_one(
            in_channels=in_channels, reduction=reduction, dilation=dilation, num_dilated_convs=num_dilated_convs
        )

        self.sequential = form == "sequential"
        hidden = max(in_channels // reduction, 1)
        norm = _resolve_norm(norm, hidden)
        pooled_norm = "" if norm and norm[0] == "group" and hidden < _MIN_GROUP else norm
        conv = Conv[Conv.CONV, spatial_dims]

        self.channel_gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1) if spatial_dims == 2 else nn.AdaptiveAvgPool3d(1),
            conv(in_channels, hidden, kernel_size=1),
            get_norm_layer(pooled_norm, spatial_dims, hidden),
            get_act_layer(act),
            conv(hidden, in_channels, kernel_size=1),
        )
        layers = [conv(in_channels, hidden, kernel_size=1)]
        layers += [
            conv(hidden, hidden, kernel_size=3, padding=dilation, dilation=dilation) for _ in range(num_dilated_convs)
        ]
        self.spatial_gate = nn.Sequential()
        for layer in layers:
            self.spatial_gate.extend([layer, get_norm_layer(norm, spatial_dims, hidden), get_act_layer(act)])
        self.spatial_gate.append(conv(hidden, 1, kernel_size=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Weight the feature map by the two gates.

        Args:
            x: shape (batch, in_channels, spatial_1, spatial_2[, spatial_3]).

        Returns:
            A tensor of the same shape.
        """
        if self.sequential:
            gated = x * (1.0 + torch.sigmoid(self.channel_gate(x)))
            return torch.addcmul(x, gated, 1.0 + torch.sigmoid(self.spatial_gate(gated)))
        return x * (1.0 + torch.sigmoid(self.channel_gate(x) * self.spatial_gate(x)))


def _resolve_norm(norm: str | tuple | None, hidden: int) -> str | tuple:
    """Check a norm and return it as MONAI's layers take it for ``hidden`` channels; "" means no norm."""
    name, args = split_norm(norm or None, _NORMS) or ("", {})
    if name == "group":
        groups = args.setdefault("num_groups", 1)
        if groups != 1 and (groups < 1 or hidden % groups or hidden // groups < _MIN_GROUP):
            fail(
                f"group norm with {groups} groups does not fit BAM's {hidden} hidden channels: each group needs the "
                f"same number of channels, at least {_MIN_GROUP}. Use num_groups=1 or a smaller reduction."
            )
    return (name, args) if name else ""
