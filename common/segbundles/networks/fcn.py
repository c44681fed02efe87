"""Fully convolutional networks (FCN-8s, FCN-16s and FCN-32s) built on the convolutions of VGG-16."""

from __future__ import annotations

import torch
from monai.networks.blocks.convolutions import Convolution
from torch import nn
from torch.nn import functional as F

from segbundles.errors import fail

from .arguments import check_at_least_one, check_choice, refuse, split_norm

__all__ = ["VGG16FCN"]

# convolutions per block and their width as a multiple of base_channels
_BLOCKS = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))
_PUBLISHED_PAD = 100


class VGG16FCN(nn.Module):
    """FCN-8s, FCN-16s or FCN-32s: a convolutional VGG-16 whose coarse scores are upsampled in learned steps.

    The network has five blocks of 3x3 convolutions with ReLU, each followed by 2x2 max pooling, then ``fc6`` and
    ``fc7`` as convolutions. A 1x1 convolution gives scores, which transposed convolutions enlarge. FCN-16 doubles them
    once and adds the scores of pool4. FCN-8 doubles them twice and adds the scores of pool4 and pool3. A last
    transposed convolution of stride ``variant`` returns to the input's grid. With the defaults the network has
    134,271,436 parameters. Convolutions are initialised Glorot uniform with zero bias.

    The input may have any size, and the logits have the same size: the input is padded at its far ends to a multiple
    of 32 by repeating the edge pixels, and the output is cropped. Every crop keeps the cells at the same position in
    the image, so score maps are added without a shift. With the published padding, a 224x224 input gives 13x13 at
    pool5, 7x7 at fc7, 16x16 and 34x34 after the doublings, and 280x280 at the end, of which rows and columns 31 to 254
    are kept. (A centre crop, as in some implementations, would be off by 3 pixels.)

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
            convolution keeps the size, so at 224x224 the first block works on 50,176 pixels instead of 178,084.
        norm: normalisation between convolution and ReLU, also in fc6 and fc7, as MONAI writes it, a name or a pair of a
            name and arguments; None means no normalisation. ``"batch"`` (training needs two values per channel: two
            images, or one larger than 32 pixels) or ``"syncbatch"`` (CUDA, several processes). Normalised convolutions
            have no bias.
        dropout: probability of dropping an element of fc6 and fc7.
        bilinear_init: initialise the transposed convolutions as bilinear interpolation of each class on its own.
        score_relu: put a ReLU after each 1x1 convolution that computes scores, as the Theano system for polyps did;
            the published FCN has none.

    Raises:
        ValueError: when ``spatial_dims``, ``variant``, ``padding`` or ``norm`` is not one of the above, a number is out
            of range, or fc6 does not fit the padding.

    Example:
        >>> import torch
        >>> net = VGG16FCN(spatial_dims=2, fc_channels=512, padding="same", norm="batch", bilinear_init=True).eval()
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
        score_relu: bool = False,
    ) -> None:
        super().__init__()
        if spatial_dims != 2:
            fail(f"spatial_dims must be 2 (VGG-16 is two-dimensional), got {spatial_dims}.")
        check_at_least_one(
            in_channels=in_channels,
            out_channels=out_channels,
            base_channels=base_channels,
            fc_channels=fc_channels,
            fc_kernel_size=fc_kernel_size,
            fc_dilation=fc_dilation,
        )
        check_choice("variant", variant, (8, 16, 32))
        check_choice("padding", padding, ("published", "same"))
        if not 0.0 <= dropout < 1.0:
            fail(f"dropout must be in [0, 1), got {dropout}.")
        reach = fc_dilation * (fc_kernel_size - 1)  # cells by which an unpadded fc6 shrinks a map
        published = padding == "published"
        if published and not 2 <= reach <= 6:
            fail(
                "padding='published' needs an fc6 of 3 to 7 cells (fc_dilation * (fc_kernel_size - 1) + 1), got "
                f"{reach + 1}: change it, or set padding='same'."
            )
        if not published and fc_kernel_size % 2 == 0:
            fail(f"fc_kernel_size must be odd for padding='same', got {fc_kernel_size}.")

        split = split_norm(norm, ("batch", "syncbatch"))
        self.norm = None if split is None else split[0]
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
        self.score_relu = score_relu

        # `at` is the position in the image, in pixels, of the first cell of a score map, and `place` that of a pool:
        # cropping by their distance aligns the two
        def place(stride: int) -> float:
            return (stride - 1) / 2 - (_PUBLISHED_PAD - 1 if published else 0)

        stride = self.stride
        at = place(stride) + (reach / 2 * stride if published else 0)
        self.fuses = nn.ModuleList()
        while stride > variant:
            stride //= 2
            at -= (1.5 if published else 0.5) * stride
            width = widths[stride.bit_length() - 2]
            self.fuses.append(_Fuse(width, out_channels, published, round((at - place(stride)) / stride), score_relu))
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
            x: shape (batch, in_channels, spatial_1, spatial_2), any spatial size.

        Returns:
            Logits, shape (batch, out_channels, spatial_1, spatial_2).

        Raises:
            ValueError: when the input does not have 2 spatial dimensions.
        """
        if x.dim() != 4:
            refuse(f"VGG16FCN needs an input of shape (batch, channels, 2 spatial dimensions), got {x.shape}.")
        size = x.shape[2:]
        x = self._pad(x)
        pools: list[torch.Tensor] = []
        for block in self.blocks:
            x = self.pool(block(x))
            pools.append(x)
        x = self.score(self.fc7(self._run_fc6(x)))
        if self.score_relu:
            x = F.relu(x)
        for i, fuse in enumerate(self.fuses):
            x = fuse(x, pools[3 - i])
        return _crop(self.up(x), self.offset, size[0], size[1])

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        bottom = (self.stride - x.shape[2] % self.stride) % self.stride
        right = (self.stride - x.shape[3] % self.stride) % self.stride
        needed = torch.jit.is_tracing()  # a traced or exported graph must pad other sizes than the example's too
        if not torch.jit.is_scripting():
            needed = needed or torch.compiler.is_exporting()
        return F.pad(x, [0, right, 0, bottom], mode="replicate") if needed or bottom > 0 or right > 0 else x

    def _run_fc6(self, x: torch.Tensor) -> torch.Tensor:
        # torch 2.13 (oneDNN) reads uninitialised memory in the bf16 weight gradient of a convolution on a CPU if part
        # of the kernel only meets padding, so maps that small are computed in fp32
        if not torch.jit.is_scripting():  # noqa: SIM102 (scripting skips the block only when the test stands alone)
            if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and min(x.shape[2:]) <= self.fc_padding:
                with torch.autocast("cpu", enabled=False):
                    return self.fc6(x.float())
        return self.fc6(x)


class _Fuse(nn.Module):
    """Double the resolution of scores and add the scores of a pool, cropped from row and column ``offset``."""

    def __init__(self, in_channels: int, out_channels: int, published: bool, offset: int, score_relu: bool) -> None:
        super().__init__()
        self.up = _upsample(out_channels, 2, published)
        self.score = nn.Conv2d(in_channels, out_channels, 1)
        self.offset = offset
        self.score_relu = score_relu

    def forward(self, x: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        scores = self.score(pool)
        if self.score_relu:
            scores = F.relu(scores)
        return x + _crop(scores, self.offset, x.shape[2], x.shape[3])


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
    """Return a convolution, then norm (if any), ReLU and dropout (if any)."""
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
