"""Intensity transforms per slice, for volumes that a 2D network segments slice by slice."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from scipy import ndimage

from segbundles.data.stacks import neighbours
from segbundles.errors import fail
from segbundles.meta import add_note, file_name, levels_of

__all__ = ["NeighbourSlicesd", "NormalizeSlicesd", "ScaleSlicesd", "flat_border"]

_WINDOW = 15  # pixels
_FLAT = 0.04  # of the range of grey levels that windows of this size usually have
_LEAST = 0.01  # of the pixels of the slice


class NeighbourSlicesd(MapTransform):
    """Give each slice of a volume the slices before and after it as further channels.

    (C, W, H, D) becomes ((2 * context_slices + 1) * C, W, H, D): first the channels of the slice that is the furthest
    before, then of the next one, and so on. At the ends of the volume the first and last slice stand in for missing
    ones.

    Args:
        keys: volumes, (C, W, H, D).
        context_slices: number of neighbours on each side; 0 changes nothing.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when ``context_slices`` is negative, or an image does not have three spatial axes.
    """

    def __init__(self, keys: KeysCollection, context_slices: int = 1, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if context_slices < 0:
            fail(f"context_slices must be 0 or more, got {context_slices}.")
        self.context_slices = context_slices

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with neighbouring slices as channels."""
        d = dict(data)
        for key in self.key_iterator(d):
            if not self.context_slices:
                continue
            image = _slices(d[key])
            count = image.shape[3]
            rows = [neighbours(k, count, self.context_slices) for k in range(count)]
            d[key] = torch.cat([image[..., list(column)] for column in zip(*rows, strict=True)])
        return d


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

    A border is left out of both and becomes ``mean``: flat regions at the edge of a slice, as stitching, rotation and
    registration leave them. Flat means that the grey levels of 15 x 15 pixels have at most 4 % of the range that such
    windows usually have (third quartile); a border has at least 1 % of the pixels. A note on the image says so. A
    constant slice becomes ``mean``. The result is float32.

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
            if (levels := levels_of(image)) is not None:
                mean, spread = levels
                d[key] = (image - mean) / (spread or 1) * self.std + self.mean
                continue
            normal = self._normalized(image)
            for channel, number in np.ndindex(image.shape[0], image.shape[3]):
                piece = image[channel, ..., number]
                if (border := flat_border(piece.numpy(force=True))) is None:
                    continue
                known = ~torch.as_tensor(border, device=image.device)
                normal[channel, ..., number] = self.mean
                normal[channel, ..., number][known] = self._normalized(piece[known][None, :, None, None]).flatten()
                add_note(normal, "flat border: left out of the normalisation")
            d[key] = normal
        return d

    @staticmethod
    def levels(section: torch.Tensor) -> tuple[float, float, np.ndarray | None]:
        """Return mean and standard deviation of a section (W, H) without its border, and the border (W, H) or None.

        :func:`segbundles.meta.set_levels` gives them to a block of the section, which is then normalised with them.
        """
        border = flat_border(section.numpy(force=True))
        known = section if border is None else section[~torch.as_tensor(border)]
        return float(known.mean()), float(known.std(correction=0)), border

    def _normalized(self, image: torch.Tensor) -> torch.Tensor:
        shifted = image - image.mean((1, 2), keepdim=True)
        spread = shifted.square().mean((1, 2), keepdim=True).sqrt()
        return shifted / torch.where(spread > 0, spread, 1) * self.std + self.mean


def flat_border(values: np.ndarray) -> np.ndarray | None:
    """Find the flat regions at the edge of a slice, see :class:`NormalizeSlicesd`.

    Args:
        values: (W, H).

    Returns:
        Boolean array (W, H), or None if there is no border, or nothing else.
    """
    values = values.astype(np.float64)
    spread = ndimage.maximum_filter(values, _WINDOW) - ndimage.minimum_filter(values, _WINDOW)
    if not spread.any():
        return None
    # not the range of the slice, which a border of -32768 would make useless
    tolerance = _FLAT * float(np.quantile(spread[spread > 0], 0.75))
    flat = ndimage.maximum_filter(spread <= tolerance, _WINDOW)
    parts, count = ndimage.label(flat)
    at_edge = np.unique(np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]]))
    border = np.isin(parts, at_edge[at_edge > 0]) if count else flat
    return border if _LEAST * border.size <= border.sum() < border.size else None


def _slices(image: torch.Tensor) -> torch.Tensor:
    if image.ndim != 4:
        fail(
            f"{file_name(image)} has shape {tuple(image.shape)} but must have (channels, W, H, slices): read it with "
            "segbundles.data.StackReader."
        )
    return image.to(torch.float32)
