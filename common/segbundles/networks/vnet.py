"""V-Net without the fixed widths and the fixed dropout of MONAI's, with optional attention and normalisation."""

from __future__ import annotations

from math import gcd

import torch
from monai.networks.blocks.convolutions import Convolution
from monai.networks.layers.factories import Dropout, split_args
from torch import nn
from torch.nn import functional as F

from .bam import BAM

__all__ = ["VNet"]

_KERNEL_SIZE = 5
_NUM_DOWN_CONVS = (1, 1, 2, 2)
_NUM_UP_CONVS = (2, 2, 1, 1)
_ATTENTION = ("sequential", "parallel")
_NORMS = ("instance", "batch", "syncbatch", "group")


class VNet(nn.Module):
    """V-Net with residual levels, learned down- and upsampling, and optional bottleneck attention.

    Five levels of ``base_channels * (1, 2, 4, 8, 16)`` channels: 5x5x5 convolutions, then the level's input is added.
    Strided 2x2x2 convolutions lead down and transposed ones up; going up, the convolutions run at the width of the
    concatenation with the skip. A per-channel PReLU follows every convolution, also the 1x1x1 head. With the defaults
    it has 10,759,066 parameters, with ``num_layers=2`` 16,200,026. Convolutions start Xavier normal with zero bias.

    Unlike :py:class:`monai.networks.nets.VNet`, widths, normalisation and dropout are free, and any input size goes:
    the input is padded at its far ends to a multiple of 16 and the output cropped back. The padding repeats the edge
    voxels, which works at any size (reflection does not) and puts no step at the border, as zeros do where the
    background is not zero.

    Args:
        spatial_dims: number of spatial dimensions, 2 or 3.
        in_channels: number of input channels. The first level adds the input to its output, repeated over its channels.
        out_channels: number of output channels (logits).
        base_channels: channels of the first level.
        num_layers: 1 for 1, 1, 1, 2, 2 convolutions a level down and 2, 2, 1, 1 up; each further one adds a convolution
            to every level but the first.
        norm: normalisation between convolution and PReLU as MONAI writes it, a name or a pair of name and arguments,
            or None for none: ``"instance"`` (in training the input has to be longer than 16 along an axis),
            ``"batch"`` (wants larger batches), ``"syncbatch"`` (CUDA, several processes), or ``"group"`` (by name
            alone: the largest number of groups that divides both 8 and the channels). Convolutions then have no bias,
            since the norm takes it out.
        dropout: probability to drop a whole channel of a level's convolutions, ahead of the residual add.
        attention: None, ``"sequential"`` or ``"parallel"``: the form of :py:class:`BAM` in the five levels down, ahead
            of the residual add.
        attention_reduction: reduction of the channels in BAM.
        attention_dilation: dilation in BAM.
        dilation: dilation of the 5x5x5 convolutions on the way down.
        out_act: activation of the logits: ``"prelu"`` as published, or None. A PReLU starts with slope 0.25 below 0,
            where the background's logits lie, which slows early training.

    Raises:
        ValueError: When ``spatial_dims``, ``norm`` or ``attention`` is not one of the above, a number is out of range,
            or the number of groups asked for does not divide every level's channels.

    Example:
        >>> import torch
        >>> VNet(spatial_dims=3, norm="instance", attention="sequential")(torch.rand(1, 1, 40, 37, 30)).shape
        torch.Size([1, 1, 40, 37, 30])

    Reference: Milletari et al., V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image Segmentation,
    3DV 2016, https://arxiv.org/abs/1606.04797. Attention: see :py:class:`BAM`.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 1,
        base_channels: int = 8,
        num_layers: int = 1,
        norm: str | tuple | None = None,
        dropout: float = 0.0,
        attention: str | None = None,
        attention_reduction: int = 4,
        attention_dilation: int = 4,
        dilation: int = 1,
        out_act: str | None = "prelu",
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        for name, value in (
            ("in_channels", in_channels),
            ("out_channels", out_channels),
            ("base_channels", base_channels),
            ("num_layers", num_layers),
            ("dilation", dilation),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
        if out_act not in (None, "prelu"):
            raise ValueError(f"out_act must be None or 'prelu', got {out_act!r}.")
        if attention is not None and attention not in _ATTENTION:
            raise ValueError(f"attention must be None, {' or '.join(map(repr, _ATTENTION))}, got {attention!r}.")

        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.base_channels = base_channels
        self.repeats = -(-base_channels // in_channels)
        self.stride = 2 ** len(_NUM_DOWN_CONVS)
        # the deepest level must not be a single voxel there: its deviation would be 0
        self.norm_needs_two = norm is not None and str(split_args(norm)[0]).lower() == "instance"

        def down_level(channels_in: int, channels: int, num_convs: int) -> _Level:
            gate = (
                BAM(spatial_dims, channels, attention_reduction, attention_dilation, attention)
                if attention is not None
                else nn.Identity()
            )
            return _Level(spatial_dims, channels_in, channels, num_convs, dilation, norm, dropout, gate)

        extra = num_layers - 1
        widths = [base_channels * 2**i for i in range(5)]
        self.input_level = down_level(in_channels, base_channels, 1)
        self.downs = nn.ModuleList(
            _Down(_unit(spatial_dims, above, width, 2, norm, stride=2), down_level(width, width, num_convs + extra))
            for above, width, num_convs in zip(widths[:-1], widths[1:], _NUM_DOWN_CONVS, strict=True)
        )
        self.ups = nn.ModuleList()
        below = widths[-1]
        for skip, num_convs in zip(reversed(widths[:-1]), _NUM_UP_CONVS, strict=True):
            level = _Level(spatial_dims, 2 * skip, 2 * skip, num_convs + extra, 1, norm, dropout, nn.Identity())
            self.ups.append(_Up(_unit(spatial_dims, below, skip, 2, norm, stride=2, is_transposed=True), level))
            below = 2 * skip
        self.head = _unit(spatial_dims, below, out_channels, 1, None, act=out_act)

        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits.

        Args:
            x: in shape (batch, in_channels, spatial_1, spatial_2[, spatial_3]), of any spatial size.

        Returns:
            Logits in shape (batch, out_channels, spatial_1, spatial_2[, spatial_3]).

        Raises:
            ValueError: When the input has not ``spatial_dims`` spatial dimensions.
        """
        if x.dim() != self.spatial_dims + 2:
            raise ValueError(
                f"VNet expects (batch, channel) and {self.spatial_dims} spatial dimensions, got {x.shape}."
            )
        size = x.shape[2:]
        x = self._pad(x)
        residual = x
        if self.in_channels > 1:  # a single channel broadcasts without a copy
            residual = torch.cat([x] * self.repeats, dim=1)[:, : self.base_channels]

        x = self.input_level(x, residual)
        skips = [x]
        for down in self.downs:
            x = down(x)
            skips.append(x)
        for i, up in enumerate(self.ups):
            x = up(x, skips[3 - i])
        x = self.head(x)

        for i in range(self.spatial_dims):
            x = x.narrow(2 + i, 0, size[i])
        return x

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        pads: list[int] = []
        needed = torch.jit.is_tracing()  # a traced graph has to pad at sizes other than the example's
        single = not needed
        for i in range(self.spatial_dims, 0, -1):
            pad = (self.stride - x.shape[1 + i] % self.stride) % self.stride
            pads += [0, pad]
            needed = needed or pad > 0
            single = single and x.shape[1 + i] <= self.stride
        if single and self.norm_needs_two:
            pads[1] += self.stride
            needed = True
        return F.pad(x, pads, mode="replicate") if needed else x


class _Level(nn.Module):
    """Convolutions at one width, attention and dropout on what they give, then the residual add."""

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        channels: int,
        num_convs: int,
        dilation: int,
        norm: str | tuple | None,
        dropout: float,
        attention: nn.Module,
    ) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *(
                _unit(
                    spatial_dims, in_channels if i == 0 else channels, channels, _KERNEL_SIZE, norm, dilation=dilation
                )
                for i in range(num_convs)
            )
        )
        self.attention = attention
        self.dropout = Dropout[Dropout.DROPOUT, spatial_dims](dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        # torch 2.13 (oneDNN) reads uninitialised memory in the bf16 weight gradient of a convolution on a CPU when an
        # axis is shorter than the kernel: the few voxels of such a level are computed in fp32
        if not torch.jit.is_scripting():  # noqa: SIM102 (scripting skips the block only when the test stands alone)
            if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and min(x.shape[2:]) < _KERNEL_SIZE:
                with torch.autocast("cpu", enabled=False):
                    return self._run(x.float(), residual.float())
        return self._run(x, residual)

    def _run(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        # in place: saves a copy, and under autocast keeps the lower precision where the residual is the fp32 input
        return self.dropout(self.attention(self.convs(x))).add_(residual)


class _Down(nn.Module):
    def __init__(self, down: nn.Module, level: _Level) -> None:
        super().__init__()
        self.down = down
        self.level = level

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x)
        return self.level(x, x)


class _Up(nn.Module):
    def __init__(self, up: nn.Module, level: _Level) -> None:
        super().__init__()
        self.up = up
        self.level = level

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.up(x), skip], dim=1)
        return self.level(x, x)


def _unit(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    norm: str | tuple | None,
    stride: int = 1,
    dilation: int = 1,
    is_transposed: bool = False,
    act: str | None = "prelu",
) -> Convolution:
    """Convolution, norm if any, and a PReLU with a slope a channel unless ``act`` is None."""
    norm = _resolve_norm(norm, out_channels)
    return Convolution(
        spatial_dims,
        in_channels,
        out_channels,
        strides=stride,
        kernel_size=kernel_size,
        adn_ordering="NA",
        act=None if act is None else (act, {"num_parameters": out_channels}),
        norm=norm,
        dilation=dilation,
        bias=norm is None,
        is_transposed=is_transposed,
        padding=0 if stride > 1 else None,
        output_padding=0,
    )


def _resolve_norm(norm: str | tuple | None, channels: int) -> tuple | None:
    """The MONAI norm spec for ``channels`` channels, checked."""
    if norm is None:
        return None
    name, args = split_args(norm)
    name = str(name).lower()
    if name not in _NORMS:
        raise ValueError(f"norm must be None or one of {', '.join(map(repr, _NORMS))}, got {norm!r}.")
    args = dict(args)
    if name == "group":
        groups = args.setdefault("num_groups", gcd(8, channels))
        if groups < 1 or channels % groups:
            raise ValueError(
                f"group norm with {groups} groups does not divide a level of {channels} channels: "
                "choose num_groups that divides base_channels, or give 'group' alone."
            )
    return name, args
