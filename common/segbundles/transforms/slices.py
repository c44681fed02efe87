"""Intensity transforms per slice, for volumes that a 2D network segments slice by slice."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from segbundles.errors import fail
from segbundles.meta import file_name

__all__ = ["NormalizeSlicesd", "ScaleSlicesd"]


class ScaleSlicesd(MapTransform):
    """Scale each slice (W, H) of a volume (C, W, H, D) from its minimum and maximum to 0 .. 1.

    A constant slice becomes 0. The result is float32.

    Args:
        keys: volumes, (C, W, H, D).
        channel_wise: whether to scale each channel of a slice separately; otherwise all channels share one scale.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when an image does not have three spatial axes.
    """

    def __init__(self, keys: KeysCollection, channel_wise: bool = False, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.axes = (1, 2) if channel_wise else (0, 1, 2)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with scaled slices."""
        d = dict(data)
        for key in self.key_iterator(d):
            image = _slices(d[key])
            low = image.amin(self.axes, keepdim=True)
            height = image.amax(self.axes, keepdim=True) - low
            d[key] = (image - low) / torch.where(height > 0, height, 1)
        return d


class NormalizeSlicesd(MapTransform):
    """Normalise each slice (W, H) of each channel of a volume (C, W, H, D) to one mean and standard deviation.

    A constant slice becomes ``mean``. The result is float32.

    Args:
        keys: volumes, (C, W, H, D).
        mean: mean of a slice.
        std: standard deviation of a slice (population formula).
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when ``std`` is not positive, or an image does not have three spatial axes.
    """

    def __init__(
        self, keys: KeysCollection, mean: float = 0.0, std: float = 1.0, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if not std > 0:
            fail(f"std must be positive, got {std}.")
        self.mean = mean
        self.std = std

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with normalised slices."""
        d = dict(data)
        for key in self.key_iterator(d):
            image = _slices(d[key])
            shifted = image - image.mean((1, 2), keepdim=True)
            spread = shifted.square().mean((1, 2), keepdim=True).sqrt()
            d[key] = shifted / torch.where(spread > 0, spread, 1) * self.std + self.mean
        return d


def _slices(image: torch.Tensor) -> torch.Tensor:
    if image.ndim != 4:
        fail(
            f"{file_name(image)} has shape {tuple(image.shape)} but must have (channels, W, H, slices): read it with "
            "segbundles.data.StackReader."
        )
    return image.to(torch.float32)
