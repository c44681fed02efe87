"""The largest connected components of a mask, joined by faces."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage

from segbundles.errors import fail
from segbundles.meta import without_meta

__all__ = ["KeepLargestConnectedComponentd", "largest_component"]


def largest_component(mask: torch.Tensor, num_components: int = 1, connectivity: int = 1) -> torch.Tensor:
    """Return the largest connected components of a mask; of equally large ones, the first in memory order.

    MONAI's function of this purpose joins voxels by corners too unless told otherwise, and of equally large components
    it may keep any. Only the bounding box of the mask is searched.

    Args:
        mask: (spatial), foreground is not 0.
        num_components: number of components to keep.
        connectivity: 1 joins voxels by faces, 2 by edges too, 3 by corners too.

    Returns:
        Boolean mask, (spatial).
    """
    found = torch.as_tensor(mask != 0).as_subclass(torch.Tensor)
    everywhere = found.numpy(force=True)
    box = next(iter(ndimage.find_objects(everywhere.view(np.uint8))), (slice(0, 0),) * found.ndim)
    inside = everywhere[box]
    parts, count = ndimage.label(inside, ndimage.generate_binary_structure(inside.ndim, connectivity))
    if count <= num_components:
        return found
    sizes = np.bincount(parts.ravel())[1:]
    largest = np.argsort(-sizes, kind="stable")[:num_components] + 1
    kept = torch.zeros_like(found)
    kept[box] = torch.as_tensor(np.isin(parts, largest), device=found.device)
    return kept


def _values(classes: torch.Tensor) -> list[float]:
    if classes.is_floating_point():
        return torch.unique(classes).tolist()
    return torch.bincount(classes.flatten().int()).nonzero().flatten().tolist()  # much faster


class KeepLargestConnectedComponentd(MapTransform):
    """Keep the largest connected component of each class with :func:`largest_component`; the rest becomes background.

    Args:
        keys: class maps (1, spatial), or one mask per channel (C, spatial).
        num_components: number of components to keep per class.
        connectivity: 1 joins voxels by faces, 2 by edges too, 3 by corners too.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when ``num_components`` is less than 1.
    """

    def __init__(
        self, keys: KeysCollection, num_components: int = 1, connectivity: int = 1, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if num_components < 1:
            fail(f"num_components must be 1 or more, got {num_components}.")
        self.num_components = num_components
        self.connectivity = connectivity

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with the largest components."""
        d = dict(data)
        for key in self.key_iterator(d):
            classes = without_meta(d[key])
            kept = classes.clone()
            for channel in range(classes.shape[0]):
                for value in _values(classes[channel]):
                    if value != 0:
                        here = classes[channel] == value
                        kept[channel][here & ~largest_component(here, self.num_components, self.connectivity)] = 0
            d[key] = MetaTensor(kept).copy_meta_from(d[key]) if isinstance(d[key], MetaTensor) else kept
        return d
