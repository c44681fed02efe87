"""The U-Net with max pooling: as published, whose convolutions have no padding, and with padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.layers.factories import Dropout
from monai.networks.layers.utils import get_norm_layer
from torch import nn

from segbundles.errors import fail

from .arguments import check_choice, refuse

__all__ = ["ValidUNet"]


class ValidUNet(nn.Module):
    """2D U-Net with max pooling; without padding its output is smaller than its input: 572 pixels give 388.

    Ronneberger et al., U-Net: Convolutional Networks for Biomedical Image Segmentation, MICCAI 2015,
    https://arxiv.org/abs/1505.04597. The output is smaller by ``margin`` pixels on each side, 92 with five levels. The
    input must therefore include its surroundings, mirrored at the borders of an image; the ``context`` of
    :class:`segbundles.inferers.TileInferer` adds them. With ``padding="same"`` the output has the size of the input;
    with ``norm="batch"`` too, and 32 channels at the top, it is the network of Buda et al., Computers in Biology and
    Medicine 109 (2019) 218.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, logits.
        channels: channels of each level, from the top.
        norm: normalisation after each convolution as MONAI writes it, such as ``"batch"``; None, as published, for no
            normalisation.
        dropout: probability of dropping a channel after the two lowest levels of the contracting path.
        padding: ``"valid"`` for convolutions without padding, as published, or ``"same"`` for zeros around the image.

    Raises:
        ValueError: when there are fewer than two levels, or ``padding`` is neither of the two.

    Example:
        >>> import torch
        >>> net = ValidUNet(channels=(8, 16, 32, 64, 128))
        >>> net(torch.rand(1, 1, 188, 188)).shape
        torch.Size([1, 2, 4, 4])
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 2,
        channels: Sequence[int] = (64, 128, 256, 512, 1024),
        norm: str | tuple | None = None,
        dropout: float = 0.0,
        padding: str = "valid",
    ) -> None:
        super().__init__()
        check_choice("padding", padding, ("valid", "same"))
        if len(channels) < 2:
            fail(f"channels must have two values or more, one per level, got {list(channels)}.")
        self.factor = 2 ** (len(channels) - 1)
        # each level takes 2 of its own pixels off each side on the way down, and again on the way up
        self.margin = 6 * self.factor - 4 if padding == "valid" else 0
        border = int(padding == "same")
        self.downs = nn.ModuleList()
        for level, width in enumerate(channels):
            lowest = level >= len(channels) - 2
            self.downs.append(
                _two_convolutions(
                    in_channels if level == 0 else channels[level - 1], width, norm, dropout * lowest, border
                )
            )
        self.pool = nn.MaxPool2d(2)
        self.ups = nn.ModuleList(
            _Up(below, width, norm, border) for below, width in zip(channels[:0:-1], channels[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(channels[0], out_channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the network.

        Args:
            x: (B, in_channels, W, H), with sizes that every level can halve, such as 572.

        Returns:
            Logits (B, out_channels, W - 2 * margin, H - 2 * margin).

        Raises:
            ValueError: when the size does not fit.
        """
        if not torch.jit.is_tracing():
            self._check(x.shape[2])
            self._check(x.shape[3])
        skips: list[torch.Tensor] = []
        for level, down in enumerate(self.downs):
            if level > 0:
                x = self.pool(x)
            x = down(x)
            skips.append(x)
        for number, up in enumerate(self.ups):
            x = up(x, skips[len(skips) - 2 - number])
        return self.head(x)

    def _check(self, size: int) -> None:
        least = 2 * self.margin + 4 if self.margin else self.factor
        if size < least or (size - least) % self.factor:
            refuse(f"a size of {size} cannot be halved at every level: use {least} plus a multiple of {self.factor}.")


class _Up(nn.Module):
    """Double the size, concatenate the centre of the skip, and convolve."""

    def __init__(self, in_channels: int, out_channels: int, norm: str | tuple | None, border: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        self.convolutions = _two_convolutions(2 * out_channels, out_channels, norm, 0.0, border)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        left, top = (skip.shape[2] - x.shape[2]) // 2, (skip.shape[3] - x.shape[3]) // 2
        middle = skip[:, :, left : left + x.shape[2], top : top + x.shape[3]]
        return self.convolutions(torch.cat([middle, x], dim=1))


def _two_convolutions(
    in_channels: int, out_channels: int, norm: str | tuple | None, dropout: float, border: int
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers.append(nn.Conv2d(channels, out_channels, 3, padding=border))
        if norm is not None:
            layers.append(get_norm_layer(norm, spatial_dims=2, channels=out_channels))
        layers.append(nn.ReLU())
    if dropout > 0:
        layers.append(Dropout[Dropout.DROPOUT, 2](dropout))
    return nn.Sequential(*layers)
