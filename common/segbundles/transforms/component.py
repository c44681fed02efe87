"""The largest connected component, without labelling the background around it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from monai import transforms
from monai.transforms.utils import generate_spatial_bounding_box

__all__ = ["KeepLargestConnectedComponentd"]


class KeepLargestConnectedComponentd(transforms.KeepLargestConnectedComponentd):
    """:py:class:`monai.transforms.KeepLargestConnectedComponentd` on the bounding box of what is not 0.

    The result is the same. A box that is a tenth of the volume takes a tenth of the time and of the memory. The
    arguments are MONAI's.
    """

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with the largest component of each class (of each channel, where there are several)."""
        d = dict(data)
        for key in self.key_iterator(d):
            start, end = generate_spatial_bounding_box(d[key])
            box = (slice(None), *map(slice, start, end))
            d[key] = d[key].clone()
            d[key][box] = self.converter(d[key][box])
        return d
