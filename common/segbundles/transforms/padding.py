"""Values that fill a volume outside its field of view, which would dominate the mean and the deviation."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np
import torch
from monai.transforms import MapTransform

from segbundles.meta import add_note

__all__ = ["FillPaddingd"]

_SHARE = 1e-3  # of the voxels have the value, at least
_BETWEEN = 0.2  # voxels between it and the others, as a share of those that have it: resampling blurs the edge
_NEAR = 0.25  # as a share of it: the others are nearer to 0
_LEVELS = 16  # that the others have; an image of few values may be a drawing
_SAMPLES = 1_000_000  # voxels from which quantiles are estimated


class FillPaddingd(MapTransform):
    """Replace far-off padding, such as -1024 or -32768 outside the field of view, by the darkest level of the rest.

    In each channel, the lowest value is padding if it is negative and the highest if it is positive, and if at least
    0.1 % of the voxels have it, almost none lie between it and the others, and its distance to them is large: 0.3 of
    their range (1st to 99th percentile) for the lowest, their whole range for the highest. Any other image stays
    unchanged. A note on the image names the values.

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
                for high in (False, True):
                    padding = _padding(image[channel].numpy(force=True), high)
                    if padding is None:
                        continue
                    outside, dark, value = padding
                    image = image.clone() if image is d[key] else image
                    image[channel][torch.as_tensor(outside)] = dark
                    found.append(f"{value:g}")
            if found:
                values = " and ".join(dict.fromkeys(found))
                add_note(image, f"padding of {values} outside the field of view: taken as background")
            d[key] = image
        return d


def _padding(values: np.ndarray, high: bool) -> tuple[np.ndarray, float, float] | None:
    """Return where the padding is, the level that replaces it, and its value; None without padding."""
    sign = -1 if high else 1
    end = sign * float(values.max() if high else values.min())
    if end >= 0:
        return None
    count = int((values == sign * end).sum())
    if count < _SHARE * values.size:
        return None
    outside = values > -end * _NEAR if high else values < end * _NEAR
    rest = values[~outside]
    if not rest.size or int(outside.sum()) > (1 + _BETWEEN) * count:
        return None
    sample = rest[:: max(1, rest.size // _SAMPLES)].astype(np.float64)
    if len(np.unique(sample)) < _LEVELS:
        return None
    dark, low, top, bright = np.quantile(sample, [0.005, 0.01, 0.99, 0.995])
    gap = -end - bright if high else dark - end
    if not gap > (1.0 if high else 0.3) * (top - low):
        return None
    return outside, dark, sign * end
