"""Fully convolutional networks (FCN-8s, 16s and 32s) on the convolutions of VGG-16."""

from __future__ import annotations

import torch
from monai.networks.blocks.convolutions import Convolution
from monai.networks.layers.factories import split_args
from torch import nn
from torch.nn import functional as F

__all__ = ["FCN"]

# convolutions a block and their width as a multiple of base_channels
_BLOCKS = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))
_PUBLISHED_PAD = 100
_PADDINGS = ("published", "same")
_VARIANTS = (8, 16, 32)
_NORMS = ("batch", "syncbatch")


class FCN(nn.Module):
    """FCN-8s, FCN-16s or FCN-32s: VGG-16 made convolutional, its coarse scores upsampled by learned steps.

    Five blocks of 3x3 convolutions with ReLU, each ended by 2x2 max pooling; ``fc6`` and ``fc7`` as convolutions; a 1x1
    convolution gives scores, which transposed convolutions enlarge. FCN-16 doubles them once and adds the scores of
    pool4, FCN-8 doubles twice and adds those of pool4 and pool3; one last transposed convolution of stride ``variant``
    leads back to the input's grid. With the defaults it has 134,271,436 parameters. Convolutions start Glorot uniform
    with zero bias.

    Any input size goes, and logits come out at that size: the input is first padded at its far ends to a multiple of
    32, by repeating the edge pixels, and the output cropped back. Every crop takes the cells that lie at the same place
    in the image, so score maps are added, and logits returned, without a shift. With the published padding at 224x224
    that is 13x13 at pool5, 7x7 at fc7, 16x16 and 34x34 after the doublings, 280x280, of which rows and columns 31 to
    254 are kept. (A crop about the centre, as some implementations have it, would be off by 3 pixels there.)

    Args:
        spatial_dims: number of spatial dimensions: 2.
        in_channels: number of input channels.
        out_channels: number of output channels (logits).
        variant: 8, 16 or 32, the stride of the finest scores.
        base_channels: channels of the first block; VGG-16 has 64.
        fc_channels: channels of fc6 and fc7.
        fc_kernel_size: kernel size of fc6.
        fc_dilation: dilation of fc6.
        padding: ``"published"``: 100 pixels of zeros at the first convolution, none at fc6; or ``"same"``: every
            convolution keeps its size, so at 224x224 the first block works on 50,176 pixels instead of 178,084.
        norm: normalisation between convolution and ReLU, also of fc6 and fc7, as MONAI writes it, a name or a pair of
            name and arguments, or None for none: ``"batch"`` (in training it needs two values a channel: two images, or
            one above 32 pixels) or ``"syncbatch"`` (CUDA, several processes). Those convolutions then have no bias.
        dropout: probability to drop an element of fc6 and fc7.
        bilinear_init: start the transposed convolutions as bilinear interpolation of each class by itself.

    Raises:
        ValueError: When ``spatial_dims``, ``variant``, ``padding`` or ``norm`` is not one of the above, a number is out
            of range, or fc6 does not fit the padding.

    Example:
        >>> import torch
        >>> net = FCN(spatial_dims=2, fc_channels=512, padding="same", norm="batch", bilinear_init=True).eval()
        >>> net(torch.rand(1, 3, 288, 384)).shape
        torch.Size([1, 2, 288, 384])

    References: Long et al., Fully Convolutional Networks for Semantic Segmentation, CVPR 2015,
    https://arxiv.org/abs/1411.4038. Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image
    Recognition, ICLR 2015, https://arxiv.org/abs/1409.1556. On polyps: Vazquez et al., A Benchmark for Endoluminal
    Scene Segmentation of Colonoscopy Images, J Healthc Eng 2017, https://arxiv.org/abs/1612.00799.
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 2,
        variant: int = 8,
        base_channels: int = 64,
        fc_channels: int = 4096,
        fc_kernel_size: int = 7,
        fc_dilation: int = 1,
        padding: str = "published",
        norm: str | tuple | None = None,
        dropout: float = 0.5,
        bilinear_init: bool = False,
    ) -> None:
        super().__init__()
        if spatial_dims != 2:
            raise ValueError(f"spatial_dims must be 2 (VGG-16 is two-dimensional), got {spatial_dims}.")
        for name, value in (
            ("in_channels", in_channels),
            ("out_channels", out_channels),
            ("base_channels", base_channels),
            ("fc_channels", fc_channels),
            ("fc_kernel_size", fc_kernel_size),
            ("fc_dilation", fc_dilation),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if variant not in _VARIANTS:
            raise ValueError(
                f"variant must be {', '.join(map(str, _VARIANTS[:-1]))} or {_VARIANTS[-1]}, got {variant}."
            )
        if padding not in _PADDINGS:
            raise ValueError(f"padding must be {' or '.join(map(repr, _PADDINGS))}, got {padding!r}.")
        if norm is not None and str(split_args(norm)[0]).lower() not in _NORMS:
            raise ValueError(f"norm must be None or one of {', '.join(map(repr, _NORMS))}, got {norm!r}.")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
        reach = fc_dilation * (fc_kernel_size - 1)  # how many cells fc6 takes off a map that is not padded
        published = padding == "published"
        if published and not 2 <= reach <= 6:
            raise ValueError(
                "the published padding fits an fc6 of 3 to 7 cells, fc_dilation * (fc_kernel_size - 1) + 1, "
                f"got {reach + 1}. Choose padding='same' for another."
            )
        if not published and fc_kernel_size % 2 == 0:
            raise ValueError(f"fc_kernel_size must be odd for padding='same', got {fc_kernel_size}.")

        self.norm = None if norm is None else str(split_args(norm)[0]).lower()
        self.stride = 2 ** len(_BLOCKS)
        self.fc_padding = 0 if published else reach // 2
        widths = [base_channels * factor for _, factor in _BLOCKS]
        self.blocks = nn.ModuleList()
        above = in_channels
        for (num_convs, _), width in zip(_BLOCKS, widths, strict=True):
            block = nn.Sequential()
            for i in range(num_convs):
                first = published and not self.blocks and i == 0
                block.append(_unit(above, width, 3, _PUBLISHED_PAD if first else 1, norm))
                above = width
            self.blocks.append(block)
        self.pool = nn.MaxPool2d(2)
        self.fc6 = _unit(above, fc_channels, fc_kernel_size, self.fc_padding, norm, fc_dilation, dropout)
        self.fc7 = _unit(fc_channels, fc_channels, 1, 0, norm, dropout=dropout)
        self.score = nn.Conv2d(fc_channels, out_channels, 1)

        # `at` is where in the image, in pixels, the first cell of a score map lies, and `place` that of a pool's: a
        # crop by their distance lays one upon the other
        def place(stride: int) -> float:
            return (stride - 1) / 2 - (_PUBLISHED_PAD - 1 if published else 0)

        stride = self.stride
        at = place(stride) + (reach / 2 * stride if published else 0)
        self.fuses = nn.ModuleList()
        while stride > variant:
            stride //= 2
            at -= (1.5 if published else 0.5) * stride
            width = widths[stride.bit_length() - 2]
            self.fuses.append(_Fuse(width, out_channels, published, round((at - place(stride)) / stride)))
        at -= (variant if published else variant / 2) - 0.5
        self.up = _upsample(out_channels, variant, published)
        self.offset = round(-at)

        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if bilinear_init and isinstance(module, nn.ConvTranspose2d):
                _init_bilinear(module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits.

        Args:
            x: in shape (batch, in_channels, spatial_1, spatial_2), of any spatial size.

        Returns:
            Logits in shape (batch, out_channels, spatial_1, spatial_2).

        Raises:
            ValueError: When the input has not 2 spatial dimensions.
        """
        if x.dim() != 4:
            raise ValueError(f"FCN expects (batch, channel) and 2 spatial dimensions, got {x.shape}.")
        size = x.shape[2:]
        x = self._pad(x)
        pools: list[torch.Tensor] = []
        for block in self.blocks:
            x = self.pool(block(x))
            pools.append(x)
        x = self.score(self.fc7(self._run_fc6(x)))
        for i, fuse in enumerate(self.fuses):
            x = fuse(x, pools[3 - i])
        return _crop(self.up(x), self.offset, size[0], size[1])

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        bottom = (self.stride - x.shape[2] % self.stride) % self.stride
        right = (self.stride - x.shape[3] % self.stride) % self.stride
        # a traced graph has to pad at sizes other than the example's
        if torch.jit.is_tracing() or bottom > 0 or right > 0:
            return F.pad(x, [0, right, 0, bottom], mode="replicate")
        return x

    def _run_fc6(self, x: torch.Tensor) -> torch.Tensor:
        # torch 2.13 (oneDNN) reads uninitialised memory in the bf16 weight gradient of a convolution on a CPU when some
        # of the kernel meets nothing but padding: maps that small are computed in fp32
        if not torch.jit.is_scripting():  # noqa: SIM102 (scripting skips the block only when the test stands alone)
            if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and min(x.shape[2:]) <= self.fc_padding:
                with torch.autocast("cpu", enabled=False):
                    return self.fc6(x.float())
        return self.fc6(x)


class _Fuse(nn.Module):
    """Double the resolution of scores and add those of a pool, from row and column ``offset`` on."""

    def __init__(self, in_channels: int, out_channels: int, published: bool, offset: int) -> None:
        super().__init__()
        self.up = _upsample(out_channels, 2, published)
        self.score = nn.Conv2d(in_channels, out_channels, 1)
        self.offset = offset

    def forward(self, x: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        return x + _crop(self.score(pool), self.offset, x.shape[2], x.shape[3])


def _crop(x: torch.Tensor, offset: int, height: int, width: int) -> torch.Tensor:
    return x.narrow(2, offset, height).narrow(3, offset, width)


def _unit(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    padding: int,
    norm: str | tuple | None,
    dilation: int = 1,
    dropout: float | None = None,
) -> Convolution:
    """Convolution, norm if any, ReLU, and dropout if any."""
    return Convolution(
        2,
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        adn_ordering="NAD",
        act=("relu", {"inplace": True}),
        norm=norm,
        dropout=dropout,
        dilation=dilation,
        bias=norm is None,
        padding=padding,
    )


def _upsample(channels: int, factor: int, published: bool) -> nn.ConvTranspose2d:
    padding = 0 if published else factor // 2
    return nn.ConvTranspose2d(channels, channels, 2 * factor, stride=factor, padding=padding)


def _init_bilinear(up: nn.ConvTranspose2d) -> None:
    size, factor = up.kernel_size[0], up.stride[0]
    tent = 1 - (torch.arange(size) - (size - 1) / 2).abs() / factor
    with torch.no_grad():
        up.weight.zero_()
        up.weight[range(up.in_channels), range(up.in_channels)] = torch.outer(tent, tent).to(up.weight)
