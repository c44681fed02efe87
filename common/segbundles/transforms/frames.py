"""Converting masks of frames to class indices, and scaling frames to the height that a network was trained with."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandCropByLabelClassesd
from monai.utils import ensure_tuple_rep
from torch.nn import functional as F

from segbundles.data.frames import mask_classes
from segbundles.errors import fail
from segbundles.meta import file_name

__all__ = ["FrameHeightd", "MaskToClassd", "RandCropByKnownClassesd", "frame_box", "frame_size"]

_BLACK = 28  # highest grey level (of 255) in a border; the borders of CVC-ClinicDB reach 24
_STEPS = 48  # borders are whole steps of 1/48 of a side, so that they stay the same from frame to frame
_SMALLEST = 4  # a picture takes at least a quarter of a frame's side


class MaskToClassd(MapTransform):
    """Convert the values stored in a mask to class indices with :func:`segbundles.data.mask_classes`.

    Args:
        keys: masks, (1, spatial).
        num_classes: number of classes, background included.
        void_class: class index of the pixels to ignore, inside or outside the range of the classes; they become
            :data:`segbundles.data.VOID`, 255. None ignores no pixels.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when a file contains other values.
    """

    def __init__(
        self,
        keys: KeysCollection,
        num_classes: int = 2,
        void_class: int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.num_classes = num_classes
        self.void_class = void_class

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with class indices."""
        d = dict(data)
        for key in self.key_iterator(d):
            mask = d[key]
            values = np.asarray(mask.cpu()).astype(np.uint8)
            try:
                classes = mask_classes(values, self.num_classes, self.void_class)
            except ValueError as error:
                fail(f"{file_name(mask)} {error}.")
            classes = torch.from_numpy(classes)
            d[key] = MetaTensor(classes).copy_meta_from(mask) if isinstance(mask, MetaTensor) else classes
        return d


def frame_size(size: tuple[int, int], height: int | None, max_pixels: int | None = None) -> tuple[int, int]:
    """Return the size (W, H) that a frame is scaled to.

    Args:
        size: pixels (W, H) of the frame.
        height: target height; None keeps the frame's.
        max_pixels: maximum of W * H; a larger frame is scaled down. None means no limit.
    """
    scale = 1.0 if height is None else height / size[1]
    if max_pixels is not None:
        scale = min(scale, (max_pixels / (size[0] * size[1])) ** 0.5)
    if scale == 1:
        return size
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def frame_box(frame: torch.Tensor) -> tuple[int, int, int, int]:
    """Find the picture inside the black borders of a frame.

    Rows or columns at an edge are a border if no channel is brighter than 28 of 255. The width of a border is rounded
    down to whole steps of 1/48 of the frame's side. If the picture would be less than a quarter as wide or as high as
    the frame, as in a black frame, the whole frame is returned.

    Args:
        frame: (C, W, H), 0 .. 255.

    Returns:
        The first column and the one after the last, the first row and the one after the last.
    """
    bright = torch.as_tensor(frame).amax(0) > _BLACK
    box: list[int] = []
    for axis, size in enumerate(bright.shape):
        lit = bright.any(1 - axis).nonzero().flatten().tolist()
        step = max(1, size // _STEPS)
        first, last = (lit[0], lit[-1]) if lit else (size, -1)
        box += [first // step * step, size - (size - 1 - last) // step * step]
        if (box[-1] - box[-2]) * _SMALLEST < size:
            return 0, bright.shape[0], 0, bright.shape[1]
    return box[0], box[1], box[2], box[3]


class RandCropByKnownClassesd(RandCropByLabelClassesd):
    """Crop as MONAI's transform does, but at a random place if the label has none of the classes, only void pixels."""

    def randomize(self, label: torch.Tensor, indices: Any = None, image: torch.Tensor | None = None) -> None:
        """Draw the crops."""
        known = bool((label < self.cropper.num_classes).any())
        super().randomize(label if known else torch.zeros_like(label), indices, image)


class FrameHeightd(MapTransform):
    """Scale frames to one height and keep their aspect ratio; images linearly, labels by the nearest pixel.

    Args:
        keys: frames (C, W, H).
        height: pixels; None keeps the size.
        label: whether a key is a label, one value for all keys or one per key.
        crop_borders: whether to cut the black borders of the first key (see :func:`frame_box`) off all keys first.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when the height is not positive.
    """

    def __init__(
        self,
        keys: KeysCollection,
        height: int | None,
        label: bool | tuple[bool, ...] = False,
        crop_borders: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if height is not None and height < 1:
            fail(f"height must be 1 pixel or more, or None, got {height}.")
        self.height = height
        self.label = ensure_tuple_rep(label, len(self.keys))
        self.crop_borders = crop_borders

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with scaled frames."""
        d = dict(data)
        box = None
        for key, label in self.key_iterator(d, self.label):
            if self.crop_borders:
                box = box or frame_box(d[key])
                d[key] = d[key][:, box[0] : box[1], box[2] : box[3]]
            frame = d[key]
            size = frame_size(tuple(frame.shape[1:]), self.height)
            if size == tuple(frame.shape[1:]):
                continue
            pixels = torch.as_tensor(np.asarray(frame.cpu()), dtype=torch.float32)[None]
            if label:
                scaled = F.interpolate(pixels, size, mode="nearest-exact")
            else:
                scaled = F.interpolate(pixels, size, mode="bilinear", antialias=True)
            if not frame.is_floating_point():
                scaled = scaled.round()
            scaled = scaled[0].to(frame.dtype)
            d[key] = MetaTensor(scaled).copy_meta_from(frame) if isinstance(frame, MetaTensor) else scaled
        return d
