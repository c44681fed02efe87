"""Transforms that check or correct images and labels after reading, and name the file in errors."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.transforms import MapTransform
from monai.utils import ensure_tuple

from segbundles.data.frames import value_tolerance
from segbundles.errors import fail
from segbundles.meta import add_note, file_name, has_spacing, set_has_spacing, spacing_of, without_meta

__all__ = ["CheckImaged", "LabelToClassd", "SetSpacingd"]

GRID_TOLERANCE = 1e-3  # of a voxel


class CheckImaged(MapTransform):
    """Refuse images that cannot be used for training or segmentation, before any time is spent on them.

    The first image gets a note if it has only two grey levels, because it may be a label that was taken for an image.

    Args:
        keys: images to check, channel first; the others are compared with the first.
        spatial_dims: number of spatial axes that an image must have.
        channels: number of channels that the first image must have; None accepts any.
        allow_constant: whether an image with a single grey level is accepted.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when the number of axes or channels is wrong, values are not finite, the first image is constant, or
            another image differs from it in size or position (by more than 1e-3 of a voxel at any corner).
    """

    def __init__(
        self,
        keys: KeysCollection,
        spatial_dims: int = 3,
        channels: int | None = 1,
        allow_constant: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.spatial_dims = spatial_dims
        self.channels = channels
        self.allow_constant = allow_constant

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Check the images and return the data, unchanged but for a note."""
        first: torch.Tensor | None = None
        for key in self.key_iterator(dict(data)):
            image = data[key]
            name, shape = file_name(image), tuple(image.shape[1:])
            if image.ndim != self.spatial_dims + 1:
                repair = "give a volume, not one slice" if len(shape) < self.spatial_dims else "give one image per file"
                fail(f"{name} has {len(shape)} axes {shape} but must have {self.spatial_dims}: {repair}.")
            if 0 in shape:
                fail(f"{name} is empty: its size is {shape}.")
            if image.is_floating_point() and not bool(torch.isfinite(image).all()):
                fail(f"{name} contains NaN or infinite values: correct it, or leave it out.")
            if first is None:
                first = image
                self._check_first(name, image)
            else:
                _same_grid(first, image)
        return dict(data)

    def _check_first(self, name: str, image: torch.Tensor) -> None:
        if self.channels is not None and image.shape[0] != self.channels:
            one = "convert colour to grey, or save each channel (of a 4D image: each time) as a file of its own"
            repair = one if self.channels == 1 else f"give an image with {self.channels}"
            fail(f"{name} has {image.shape[0]} channel(s) but must have {self.channels}: {repair}.")
        low, high = image.min(), image.max()
        if low == high:
            if not self.allow_constant:
                fail(f"{name} is constant (every value is {low.item() + 0:g}): leave it out.")
        elif bool(((image == low) | (image == high)).all()):
            add_note(image, "only two grey levels: is this a label?")


def _same_grid(image: torch.Tensor, label: torch.Tensor) -> None:
    a, b = tuple(image.shape[1:]), tuple(label.shape[1:])
    if a != b:
        fail(f"{file_name(label)} has size {b} but its image {file_name(image)} has {a}: they must be equal.")
    if not (isinstance(image, MetaTensor) and isinstance(label, MetaTensor)):
        return
    rank = len(a)
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in a], indexing="ij"), -1).reshape(-1, rank)
    corners = np.c_[corners, np.ones(len(corners))]
    to_world = [to_affine_nd(rank, t.affine.numpy(force=True)) for t in (image, label)]
    apart = np.linalg.norm((corners @ to_world[0].T - corners @ to_world[1].T)[:, :rank], axis=1).max()
    if apart > GRID_TOLERANCE * max(spacing_of(image)):
        fail(
            f"{file_name(label)} is up to {apart:.3g} mm away from its image {file_name(image)}: their spacing, origin "
            "or direction differ; resample or correct one of them."
        )


class SetSpacingd(MapTransform):
    """Correct the spacing of images whose header is wrong or has none, for computation only.

    Without a spacing, a volume of 1 x 1 x 1 mm gets a note, because many programs write this where they do not know it.

    Direction and origin stay the same, and so does ``meta["original_affine"]``, which outputs are written with. The
    spacing then counts as known (:func:`segbundles.meta.has_spacing`), so that distances can be measured.

    Args:
        keys: images, channel first.
        spacing_mm: spacing per axis; None means ``record_key`` of the case if it is given, else the header's.
        record_key: entry of the datalist with the true spacing of a case.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when there is not one value per axis, or a value is not positive.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spacing_mm: Sequence[float] | float | None = None,
        record_key: str = "spacing_mm",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.spacing_mm = spacing_mm
        self.record_key = record_key

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with corrected affines."""
        d = dict(data)
        spacing = self.spacing_mm if self.spacing_mm is not None else d.get(self.record_key)
        if spacing is None:
            for key in self.key_iterator(d):
                _note_default_spacing(d[key])
            return d
        for key in self.key_iterator(d):
            rank = d[key].ndim - 1
            try:
                values = [float(v) for v in ensure_tuple(spacing)]
            except (TypeError, ValueError):
                values = []
            values = values * rank if len(values) == 1 else values
            if len(values) != rank or not all(0 < v < math.inf for v in values):
                fail(f"spacing_mm must be {rank} positive numbers (mm per axis), got {spacing!r}.")
            image = MetaTensor(d[key]) if not isinstance(d[key], MetaTensor) else d[key]
            affine = image.affine.clone()
            factors = [value / old for value, old in zip(values, spacing_of(image), strict=True)]
            affine[:rank, :rank] *= torch.tensor(factors, dtype=affine.dtype, device=affine.device)
            image.affine = affine
            set_has_spacing(image, True)
            d[key] = image
        return d


def _note_default_spacing(image: torch.Tensor) -> None:
    """Note a volume whose header may say nothing about its voxels: 1 x 1 x 1 mm is what programs write then."""
    if image.ndim == 4 and isinstance(image, MetaTensor) and has_spacing(image) and np.allclose(spacing_of(image), 1):
        add_note(image, "voxel size 1 x 1 x 1 mm, as headers without one say: give spacing_mm if it is wrong")


class LabelToClassd(MapTransform):
    """Convert the values stored in a label file into class indices 0 .. num_classes - 1 (uint8).

    A stored value may differ a little from a class's, see :func:`segbundles.data.frames.value_tolerance`. With two
    classes, a picture of three channels may be a label too, if it has black and one other colour: black is the class of
    the smaller value.

    Args:
        keys: labels.
        num_classes: number of classes, background included.
        values: stored values in the order of the classes, such as ``[0, 255]``. None accepts class indices, and for two
            classes also 0 and 255.
        record_key: entry of the datalist with a case's own ``values``, which take precedence.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when a file contains any other value, or several channels that are not black and one other colour.
    """

    def __init__(
        self,
        keys: KeysCollection,
        num_classes: int = 2,
        values: Sequence[float] | None = None,
        record_key: str = "label_values",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.num_classes = num_classes
        self.values = self._checked("values", values)
        self.record_key = record_key

    def _checked(self, name: str, values: Sequence[float] | None) -> list[float] | None:
        if values is None:
            return None
        if not isinstance(values, list | tuple) or len(values) != self.num_classes:
            fail(f"{name} must be {self.num_classes} stored values, one per class, got {values!r}.")
        return list(values)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with class indices."""
        d = dict(data)
        values = self._checked(self.record_key, d.get(self.record_key)) or self.values
        for key in self.key_iterator(d):
            d[key] = self._convert(d[key], values)
        return d

    def _convert(self, label: torch.Tensor, values: list[float] | None) -> torch.Tensor:
        stored = list(range(self.num_classes)) if values is None else values
        label = self._one_channel(label, stored)
        found = without_meta(label)
        found = found if found.is_floating_point() else found.to(torch.int64)
        if values is None and self.num_classes == 2 and bool(((found - 255).abs() <= value_tolerance(255)).any()):
            stored = [0, 255]
        out = torch.zeros_like(label, dtype=torch.uint8)
        known = torch.zeros(label.shape, dtype=torch.bool, device=label.device)
        for index, value in enumerate(stored):
            here = (found - value).abs() <= value_tolerance(value)
            out[here] = index
            known |= here
        if not bool(known.all()):
            strange = torch.unique(label[~known]).tolist()
            fail(
                f"{file_name(label)} contains the label values {', '.join(f'{v:.7g}' for v in strange[:5])}; allowed "
                f"are {', '.join(f'{v:g}' for v in stored)}: correct the file, or change the classes in the settings."
            )
        return out

    def _one_channel(self, label: torch.Tensor, stored: list[float]) -> torch.Tensor:
        channels = label.shape[0]
        if channels == 1:
            return label
        lit = (label != 0).any(0, keepdim=True)
        colour = label.amax(tuple(range(1, label.ndim)), keepdim=True)
        if self.num_classes == 2 and channels == 3 and bool(((label == colour) | ~lit).all()):
            return torch.where(lit, max(stored), min(stored))
        allowed = ", or three with black and one other colour" if self.num_classes == 2 else ""
        fail(
            f"{file_name(label)} has {channels} channels but a label must have one{allowed}: save it as class indices "
            "without a palette."
        )
