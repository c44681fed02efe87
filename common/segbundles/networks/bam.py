"""Bottleneck attention module (BAM), as published and in sequential form."""

from __future__ import annotations

import torch
from monai.networks.layers.factories import Conv, split_args
from monai.networks.layers.utils import get_act_layer, get_norm_layer
from torch import nn

__all__ = ["BAM"]

_FORMS = ("parallel", "sequential")
_NORMS = ("batch", "syncbatch", "group")
# a group of fewer values, normalised by itself, keeps hardly more than a sign
_MIN_GROUP = 4


class BAM(nn.Module):
    """Bottleneck attention module: a channel gate and a spatial gate on one feature map.

    The channel gate pools the map globally and passes it through a 1x1 bottleneck. The spatial gate reduces the
    channels by a 1x1 convolution, looks around with dilated 3x3 (3x3x3) convolutions and ends in one channel. With
    ``c`` and ``s`` the two gates before the sigmoid:

    - ``"parallel"``, the paper's form: ``x * (1 + sigmoid(c(x) * s(x)))``;
    - ``"sequential"``: ``y = x + x * sigmoid(c(x))``, ``z = y + y * sigmoid(s(y))``, and ``x + z`` is returned.

    Normalisation follows each convolution but the last of a gate. The paper takes batch norm; in the channel gate that
    sees one value a channel and case, so in training it fails at batch 1. The default is therefore group norm with one
    group (layer norm over the channels), which works at any batch size. Where a channel gate has fewer than four
    hidden channels, that norm is left out of it: over so few values it would erase what was pooled.

    Args:
        spatial_dims: number of spatial dimensions, 2 or 3.
        in_channels: number of input and output channels.
        reduction: the bottlenecks have ``in_channels // reduction`` channels, at least one.
        dilation: dilation of the spatial gate's 3x3 convolutions.
        form: ``"parallel"`` or ``"sequential"``.
        num_dilated_convs: number of dilated convolutions in the spatial gate.
        norm: normalisation as MONAI writes it, a name or a pair of name and arguments, or None for none: ``"group"``
            (by name alone: one group), ``"batch"`` (needs 2 cases a batch in training) or ``"syncbatch"`` (CUDA, 2
            cases over all processes). Instance norm is refused: of one pooled value a channel it leaves nothing.
        act: activation as MONAI writes it.

    Raises:
        ValueError: When ``spatial_dims`` is not 2 or 3, ``form`` or ``norm`` is not one of the above, a number is below
            1, or the group norm asked for does not fit the hidden channels.

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
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        if form not in _FORMS:
            raise ValueError(f"form must be one of {', '.join(map(repr, _FORMS))}, got {form!r}.")
        for name, value in (
            ("in_channels", in_channels),
            ("reduction", reduction),
            ("dilation", dilation),
            ("num_dilated_convs", num_dilated_convs),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")

        self.sequential = form == "sequential"
        hidden = max(in_channels // reduction, 1)
        norm = _resolve_norm(norm, hidden)
        pooled_norm = _pooled_norm(norm, hidden)
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
        """Weigh the feature map.

        Args:
            x: in shape (batch, in_channels, spatial_1, spatial_2[, spatial_3]).

        Returns:
            A tensor of the same shape.
        """
        if self.sequential:
            gated = x * (1.0 + torch.sigmoid(self.channel_gate(x)))
            return torch.addcmul(x, gated, 1.0 + torch.sigmoid(self.spatial_gate(gated)))
        return x * (1.0 + torch.sigmoid(self.channel_gate(x) * self.spatial_gate(x)))


def _resolve_norm(norm: str | tuple | None, hidden: int) -> str | tuple:
    """The MONAI norm spec for ``hidden`` channels ("" for none), checked."""
    if norm is None or norm == "":
        return ""
    name, args = split_args(norm)
    name = str(name).lower()
    if name == "instance":
        raise ValueError(
            "norm 'instance' cannot work in BAM's channel gate, where it sees one value a channel and leaves zero: "
            f"use None or one of {', '.join(map(repr, _NORMS))}."
        )
    if name not in _NORMS:
        raise ValueError(f"norm must be None or one of {', '.join(map(repr, _NORMS))}, got {norm!r}.")
    args = dict(args)
    if name == "group":
        groups = args.setdefault("num_groups", 1)
        if groups != 1 and (groups < 1 or hidden % groups or hidden // groups < _MIN_GROUP):
            raise ValueError(
                f"group norm with {groups} groups does not fit BAM's {hidden} hidden channels: each group needs the "
                f"same number of channels, at least {_MIN_GROUP}. Use num_groups=1 or a smaller reduction."
            )
    return name, args


def _pooled_norm(norm: str | tuple, hidden: int) -> str | tuple:
    """The spec for the channel gate: none where a group would be too small to normalise."""
    return "" if norm and norm[0] == "group" and hidden < _MIN_GROUP else norm
