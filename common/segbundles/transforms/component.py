"""A faster search for the largest connected component."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from monai import transforms
from monai.transforms.utils import generate_spatial_bounding_box

__all__ = ["KeepLargestConnectedComponentd"]


class KeepLargestConnectedComponentd(transforms.KeepLargestConnectedComponentd):
    """Keep the largest connected component, as MONAI's transform does, but only search the foreground's bounding box.

    Result and arguments are those of :py:class:`monai.transforms.KeepLargestConnectedComponentd`. A box of a tenth of
    the volume takes a tenth of the time and memory.
    """

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with the largest component of each class (of each channel, if there are several)."""
        d = dict(data)
        for key in self.key_iterator(d):
            start, end = generate_spatial_bounding_box(d[key])
            box = (slice(None), *map(slice, start, end))
            d[key] = d[key].clone()
            d[key][box] = self.converter(d[key][box])
        return d
