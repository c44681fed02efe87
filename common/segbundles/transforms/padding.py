"""Values that fill a volume outside its field of view, which would dominate the mean and the deviation."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np
import torch
from monai.transforms import MapTransform
from scipy import ndimage

from segbundles.meta import add_note

__all__ = ["FillPaddingd"]

_BINS = 200
_SAMPLES = 2_000_000  # voxels that are looked at
_END = 40  # bins at an end of the histogram in which padding is searched; a spline goes beyond it
_SHARE = 1e-3  # of the voxels are padding, at least
_SPARSE = 0.1  # most values in a bin beside padding, as a share of those in its own
_CONSTANT = 1e-3  # of the range: so much do most padded voxels differ
_LEVELS = 16  # that the others have; an image of few values may be a drawing
_EDGE = 4  # voxels around padding that resampling may have blurred
# the distance of padding from the other values, as a share of the range of all values: padding below 0, other padding
# that is darker than the rest, and padding that is brighter
_BELOW_ZERO, _DARK, _BRIGHT = 0.2, 0.7, 0.4


class FillPaddingd(MapTransform):
    """Replace far-off padding, such as -1024 or -32768 outside the field of view, by the darkest level of the rest.

    In each channel, padding is a frequent value at an end of the histogram (at least 0.1 % of the voxels) that is far
    from the others: by 0.2 of the range of all values if it is negative, by 0.7 if it is dark but not negative (an
    image is often 0 outside the head), and by 0.4 if it is brighter than the rest. Resampling blurs its edge: up to
    four voxels from it, values beyond those of the rest are cut off. Any other image stays unchanged. A note on the
    image names the values.

    Args:
        keys: volumes, (C, spatial).
        allow_missing_keys: as in MONAI.
    """

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data without padding."""
        d = dict(data)
        for key in self.key_iterator(d):
            image, found = d[key], []
            for channel in range(image.shape[0]):
                values, removed = image[channel].numpy(force=True), []
                while len(removed) < 3 and (padding := _padding(values)) is not None:
                    values, value = padding
                    removed.append(f"{value:g}")
                if removed:
                    image = image.clone() if image is d[key] else image
                    image[channel] = torch.as_tensor(values)
                    found += removed
            if found:
                names = " and ".join(dict.fromkeys(found))
                add_note(image, f"padding of {names} outside the field of view: taken as background")
            d[key] = image
        return d


def _padding(values: np.ndarray) -> tuple[np.ndarray, float] | None:
    """Return the values without the padding at one end of their histogram, and the padding; None if there is none."""
    sample = values.reshape(-1)[:: max(1, values.size // _SAMPLES)].astype(np.float64)
    for sign in (1, -1):  # dark and bright padding
        low, bright = float((sign * values).min()), float(np.quantile(sign * sample, 0.999))
        if not bright > low:
            continue
        step = (bright - low) / _BINS
        counts, _ = np.histogram(sign * sample, _BINS, (low, bright))
        peak = int(np.argmax(counts[:_END]))
        end = low + (peak + 2) * step
        here, rest = sign * sample < end, sample[sign * sample >= end]
        if here.mean() < _SHARE or not rest.size:
            continue
        value = float(np.median(sample[here]))
        constant = (np.abs(sample[here] - value) <= _CONSTANT * (bright - low)).mean()
        needed = _BRIGHT if sign < 0 else _BELOW_ZERO if value < 0 else _DARK
        far = needed * (bright - low)
        bins = int(needed * _BINS)
        gap = counts[peak + 2 + bins // 2 : peak + 2 + bins]  # nearer to padding, a spline may swing
        if gap.max() > _SPARSE * counts[peak]:
            continue
        if constant < 0.5 or sign * (float(np.median(rest)) - value) < far:
            continue
        near = ndimage.binary_dilation(sign * values < end, iterations=_EDGE)
        rest = values[~near]
        if not rest.size or len(np.unique(rest[:: max(1, rest.size // _SAMPLES)])) < _LEVELS:
            continue
        dark, light = (float(level) for level in np.quantile(rest, [0.02, 0.995]))
        if sign * ((dark if sign > 0 else light) - value) >= far:
            cut = np.where(near, np.clip(values, dark, light), values)
            limit = end if sign < 0 else dark - 0.05 * (bright - low)  # a thin blurred edge may have lost its padding
            return np.where(sign * values < limit, dark, cut).astype(values.dtype), value
    return None
