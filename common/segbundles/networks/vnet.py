"""A V-Net with free widths and dropout, and optional attention and normalisation."""

from __future__ import annotations

from math import gcd

import torch
from monai.networks.blocks.convolutions import Convolution
from monai.networks.layers.factories import Dropout
from torch import nn
from torch.nn import functional as F

from segbundles.errors import fail

from .arguments import check_at_least_one, check_choice, refuse, split_norm
from .bam import BAM

__all__ = ["AttentionVNet"]

_KERNEL_SIZE = 5
_NUM_DOWN_CONVS = (1, 1, 2, 2)
_NUM_UP_CONVS = (2, 2, 1, 1)
_NORMS = ("instance", "batch", "syncbatch", "group")


class AttentionVNet(nn.Module):
    """V-Net with residual levels, learned down- and upsampling, and optional bottleneck attention.

    The network has five levels of ``base_channels * (1, 2, 4, 8, 16)`` channels. Each applies 5x5x5 convolutions and
    adds the level's input. Strided 2x2x2 convolutions connect the levels on the way down, and transposed ones on the
    way up, where the convolutions are as wide as the concatenation with the skip. A per-channel PReLU follows every
    convolution, including the 1x1x1 head. The defaults give 10,759,066 parameters, ``num_layers=2`` gives 16,200,026.
    Convolutions are initialised Xavier normal with zero bias.

    Unlike in :py:class:`monai.networks.nets.VNet`, widths, normalisation and dropout are free, and the input may have
    any size: it is padded at its far ends to a multiple of 16, and the output is cropped. The padding repeats the edge
    voxels. This works at any size (reflection does not) and creates no step at the border (zeros do if the background
    is not zero).

    Args:
        spatial_dims: number of spatial dimensions, 2 or 3.
        in_channels: number of input channels. The first level adds the input to its output, repeated over its channels.
        out_channels: number of output channels (logits).
        base_channels: channels of the first level.
        num_layers: 1 means 1, 1, 1, 2, 2 convolutions per level on the way down and 2, 2, 1, 1 on the way up; each
            further layer adds a convolution to every level except the first.
        norm: normalisation between convolution and PReLU as MONAI writes it, a name or a pair of a name and arguments;
            None means no normalisation. ``"instance"`` (in training, at least one axis must be longer than 16),
            ``"batch"`` (works best with larger batches), ``"syncbatch"`` (CUDA, several processes) or ``"group"`` (the
            name alone means the largest number of groups that divides both 8 and the channels). Normalised convolutions
            have no bias, because the norm would remove it.
        dropout: probability of dropping a whole channel of a level's convolutions, before the residual is added.
        attention: None, ``"sequential"`` or ``"parallel"``: the form of :py:class:`BAM` in the five levels on the way
            down, before the residual is added.
        attention_reduction: reduction of the channels in BAM.
        attention_dilation: dilation in BAM.
        dilation: dilation of the 5x5x5 convolutions on the way down.
        out_act: activation of the logits: ``"prelu"`` as published, or None. A PReLU starts with slope 0.25 below 0,
            in the range of the background's logits, which slows early training.

    Raises:
        ValueError: when ``spatial_dims``, ``norm`` or ``attention`` is not one of the above, a number is out of range,
            or the number of groups does not divide every level's channels.

    Example:
        >>> import torch
        >>> AttentionVNet(spatial_dims=3, norm="instance", attention="sequential")(torch.rand(1, 1, 40, 37, 30)).shape
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
        check_choice("spatial_dims", spatial_dims, (2, 3))
        check_at_least_one(
            in_channels=in_channels,
            out_channels=out_channels,
            base_channels=base_channels,
            num_layers=num_layers,
            dilation=dilation,
        )
        if not 0.0 <= dropout < 1.0:
            fail(f"dropout must be in [0, 1), got {dropout}.")
        check_choice("out_act", out_act, (None, "prelu"))
        check_choice("attention", attention, (None, "sequential", "parallel"))
        split = split_norm(norm, _NORMS)

        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.base_channels = base_channels
        self.repeats = -(-base_channels // in_channels)
        self.stride = 2 ** len(_NUM_DOWN_CONVS)
        # instance norm of a deepest level of one voxel would divide by a deviation of 0
        self.norm_needs_two = split is not None and split[0] == "instance"

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
            x: shape (batch, in_channels, spatial_1, spatial_2[, spatial_3]), any spatial size.

        Returns:
            Logits, shape (batch, out_channels, spatial_1, spatial_2[, spatial_3]).

        Raises:
            ValueError: when the input does not have ``spatial_dims`` spatial dimensions.
        """
        if x.dim() != self.spatial_dims + 2:
            refuse(
                f"AttentionVNet needs an input of shape (batch, channels, {self.spatial_dims} spatial dimensions), "
                f"got {x.shape}."
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
        needed = torch.jit.is_tracing()  # a traced or exported graph must pad other sizes than the example's too
        if not torch.jit.is_scripting():
            needed = needed or torch.compiler.is_exporting()
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
    """Apply convolutions of one width, attention and dropout, then add the residual."""

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
        # torch 2.13 (oneDNN) reads uninitialised memory in the bf16 weight gradient of a convolution on a CPU if an
        # axis is shorter than the kernel, so the few voxels of such a level are computed in fp32
        if not torch.jit.is_scripting():  # noqa: SIM102 (scripting skips the block only when the test stands alone)
            if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and min(x.shape[2:]) < _KERNEL_SIZE:
                with torch.autocast("cpu", enabled=False):
                    return self._run(x.float(), residual.float())
        return self._run(x, residual)

    def _run(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        # in place: this saves a copy, and under autocast keeps the lower precision if the residual is the fp32 input
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
    """Return a convolution, then norm (if any) and, unless ``act`` is None, a PReLU with one slope per channel."""
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
    """Check a norm and return it as MONAI's layers take it for ``channels`` channels."""
    split = split_norm(norm, _NORMS)
    if split is not None and split[0] == "group":
        groups = split[1].setdefault("num_groups", gcd(8, channels))
        if groups < 1 or channels % groups:
            fail(
                f"group norm with {groups} groups does not divide a level of {channels} channels: "
                "choose a num_groups that divides base_channels, or write 'group' alone."
            )
    return split
