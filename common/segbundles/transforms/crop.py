"""Cropping to an object with a margin in mm."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, SpatialCrop
from monai.transforms.utils import generate_spatial_bounding_box
from monai.utils import ensure_tuple_rep

from segbundles.meta import file_name, spacing_of

if TYPE_CHECKING:
    from segbundles.inferers import LocatorCropInferer

__all__ = ["CropBoxd"]

logger = logging.getLogger("segbundles")


class CropBoxd(MapTransform):
    """Crop images to the box around an object plus a margin in mm.

    The box is the bounding box of the label's foreground. With a locator, it is the box that the locator finds in the
    image, so that a segmenter is trained on the crops it will get in use; if the locator finds nothing plausible, the
    label's box is used, with a warning. Without any foreground the whole image is kept.

    Args:
        keys: images to crop, channel first, all on one grid.
        source_key: label whose foreground (> 0) gives the box.
        margin_mm: added on each side, one value or one per axis.
        locator: finds the box in the image instead of ``source_key``.
        image_key: image that the locator searches.
        allow_missing_keys: as in MONAI.
    """

    def __init__(
        self,
        keys: KeysCollection,
        source_key: str = "label",
        margin_mm: Sequence[float] | float = 0.0,
        locator: LocatorCropInferer | None = None,
        image_key: str = "image",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.source_key = source_key
        self.margin_mm = margin_mm
        self.locator = locator
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data cropped."""
        d = dict(data)
        start, end = self.box(d)
        crop = SpatialCrop(roi_start=start, roi_end=end)
        for key in self.key_iterator(d):
            d[key] = crop(d[key])
        return d

    def box(self, data: Mapping[Hashable, torch.Tensor]) -> tuple[list[int], list[int]]:
        """Return the first voxel of the crop and the one after its last, per axis."""
        image, note = data[self.source_key if self.locator is None else self.image_key], ""
        size = image.shape[1:]
        if self.locator is not None:
            start, end, note = self.locator.locate(image, spacing_of(image))
        if note:
            logger.warning(f"{file_name(image)}: {note.split(':')[0]}: the label's box is used for the crop.")
        if note or self.locator is None:
            start, end = generate_spatial_bounding_box(data[self.source_key])
        if any(b <= a for a, b in zip(start, end, strict=True)):
            return [0] * len(size), list(size)
        margins = [
            math.ceil(mm / spacing - 1e-6)
            for mm, spacing in zip(ensure_tuple_rep(self.margin_mm, len(size)), spacing_of(image), strict=True)
        ]
        start = [max(0, a - m) for a, m in zip(start, margins, strict=True)]
        end = [min(n, b + m) for b, m, n in zip(end, margins, size, strict=True)]
        return start, end
