"""Transforms that refuse or repair what a file brought, naming the file."""

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

from segbundles.errors import fail

__all__ = ["CheckImaged", "LabelToClassd", "SetSpacingd", "file_name", "spacing_of"]


def file_name(image: torch.Tensor) -> str:
    """Path an image was read from, or ``image`` when it is not known."""
    return str(getattr(image, "meta", {}).get("filename_or_obj", "image"))


def spacing_of(image: torch.Tensor) -> tuple[float, ...]:
    """Spacing in mm of a (C, spatial) tensor; 1 without metadata."""
    rank = image.ndim - 1
    if not isinstance(image, MetaTensor):
        return (1.0,) * rank
    affine = image.affine.numpy(force=True)
    return tuple(float(v) for v in np.linalg.norm(affine[:rank, :rank], axis=0))


class CheckImaged(MapTransform):
    """Refuse images that cannot be segmented or learnt from, before any work is spent on them.

    Args:
        keys: images to check, channel first; the first is the one the others are compared with.
        spatial_dims: number of spatial axes due.
        channels: number of channels due in the first key; None takes any.
        allow_constant: whether an image of one grey level is accepted.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when axes or channels do not fit, values are not finite, the first image is constant, or another
            differs from it in size or position (by more than 1e-3 of a voxel at any corner).
    """

    def __init__(
        self,
        keys: KeysCollection,
        spatial_dims: int = 3,
        channels: int | None = 1,
        allow_constant: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        """See the class."""
        super().__init__(keys, allow_missing_keys)
        self.spatial_dims = spatial_dims
        self.channels = channels
        self.allow_constant = allow_constant

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data as it is."""
        first: torch.Tensor | None = None
        for key in self.key_iterator(dict(data)):
            image = data[key]
            name, shape = file_name(image), tuple(image.shape[1:])
            if image.ndim != self.spatial_dims + 1:
                fail(f"{name} has {len(shape)} axes {shape}, {self.spatial_dims} are due: give one image a file.")
            if 0 in shape:
                fail(f"{name} is empty: its size is {shape}.")
            if image.is_floating_point() and not bool(torch.isfinite(image).all()):
                fail(f"{name} holds NaN or infinite values: repair it, or leave it out.")
            if first is None:
                first = image
                self._check_first(name, image)
            else:
                _same_grid(first, image)
        return dict(data)

    def _check_first(self, name: str, image: torch.Tensor) -> None:
        if self.channels is not None and image.shape[0] != self.channels:
            colour = ": an image in colour is to be converted to grey" if self.channels == 1 else ""
            fail(
                f"{name} has {image.shape[0]} channels, {self.channels} are due: give one with {self.channels}{colour}."
            )
        if not self.allow_constant and bool(image.min() == image.max()):
            fail(f"{name} is constant (every value is {image.flatten()[0].item():g}): leave it out.")


def _same_grid(image: torch.Tensor, label: torch.Tensor) -> None:
    a, b = tuple(image.shape[1:]), tuple(label.shape[1:])
    if a != b:
        fail(f"{file_name(label)} has size {b}, its image {file_name(image)} has {a}: they must be equal.")
    if not (isinstance(image, MetaTensor) and isinstance(label, MetaTensor)):
        return
    rank = len(a)
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in a], indexing="ij"), -1).reshape(-1, rank)
    corners = np.c_[corners, np.ones(len(corners))]
    to_world = [to_affine_nd(rank, t.affine.numpy(force=True)) for t in (image, label)]
    apart = np.linalg.norm((corners @ to_world[0].T - corners @ to_world[1].T)[:, :rank], axis=1).max()
    if apart > 1e-3 * max(spacing_of(image)):
        fail(
            f"{file_name(label)} lies up to {apart:.3g} mm from its image {file_name(image)}: "
            "their spacing, origin or direction differ; resample or correct one of them."
        )


class SetSpacingd(MapTransform):
    """Give images the spacing that their header should have had, for computation only.

    Direction and origin stay, and so does ``meta["original_affine"]``, by which outputs are written.
    ``meta["has_spacing"]`` becomes True: of images whose format knows no spacing, distances can be measured now.

    Args:
        keys: images, channel first.
        spacing_mm: spacing an axis; None takes ``record_key`` of the case if it is there, else the header's.
        record_key: entry of the datalist that holds the true spacing of a case.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when the number of values is not the number of axes, or one is not positive.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spacing_mm: Sequence[float] | float | None = None,
        record_key: str = "spacing_mm",
        allow_missing_keys: bool = False,
    ) -> None:
        """See the class."""
        super().__init__(keys, allow_missing_keys)
        self.spacing_mm = spacing_mm
        self.record_key = record_key

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with corrected affines."""
        d = dict(data)
        spacing = self.spacing_mm if self.spacing_mm is not None else d.get(self.record_key)
        if spacing is None:
            return d
        for key in self.key_iterator(d):
            rank = d[key].ndim - 1
            try:
                values = [float(v) for v in ensure_tuple(spacing)]
            except (TypeError, ValueError):
                values = []
            values = values * rank if len(values) == 1 else values
            if len(values) != rank or not all(0 < v < math.inf for v in values):
                fail(f"spacing_mm must be {rank} positive numbers (mm an axis), got {spacing!r}.")
            image = MetaTensor(d[key]) if not isinstance(d[key], MetaTensor) else d[key]
            affine = image.affine.clone()
            factors = [value / old for value, old in zip(values, spacing_of(image), strict=True)]
            affine[:rank, :rank] *= torch.tensor(factors, dtype=affine.dtype, device=affine.device)
            image.affine = affine
            image.meta["has_spacing"] = True
            d[key] = image
        return d


class LabelToClassd(MapTransform):
    """Turn the values stored in a label file into class indices 0 .. num_classes - 1 (uint8).

    Args:
        keys: labels.
        num_classes: number of classes, background included.
        values: stored values in the order of the classes, such as ``[0, 255]``. None takes class indices, and 0 and 255
            for two classes.
        record_key: entry of the datalist that holds a case's own ``values``, which come before those given here.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when a file holds any other value, or several channels.
    """

    def __init__(
        self,
        keys: KeysCollection,
        num_classes: int = 2,
        values: Sequence[float] | None = None,
        record_key: str = "label_values",
        allow_missing_keys: bool = False,
    ) -> None:
        """See the class."""
        super().__init__(keys, allow_missing_keys)
        self.num_classes = num_classes
        self.values = self._checked("values", values)
        self.record_key = record_key

    def _checked(self, name: str, values: Sequence[float] | None) -> list[float] | None:
        if values is None:
            return None
        if not isinstance(values, list | tuple) or len(values) != self.num_classes:
            fail(f"{name} must name {self.num_classes} stored values, one a class, got {values!r}.")
        return list(values)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with class indices."""
        d = dict(data)
        values = self._checked(self.record_key, d.get(self.record_key)) or self.values
        for key in self.key_iterator(d):
            d[key] = self._convert(d[key], values)
        return d

    def _convert(self, label: torch.Tensor, values: list[float] | None) -> torch.Tensor:
        if label.shape[0] != 1:
            fail(f"{file_name(label)} has {label.shape[0]} channels, a label has one: give class indices.")
        stored = list(range(self.num_classes)) if values is None else values
        if values is None and self.num_classes == 2 and bool((label == 255).any()):
            stored = [0, 255]
        out = torch.zeros_like(label, dtype=torch.uint8)
        known = torch.zeros(label.shape, dtype=torch.bool, device=label.device)
        for index, value in enumerate(stored):
            here = label.as_tensor() == value if isinstance(label, MetaTensor) else label == value
            out[here] = index
            known |= here
        if not bool(known.all()):
            strange = torch.unique(label[~known]).tolist()
            fail(
                f"{file_name(label)} holds the label values {', '.join(f'{v:g}' for v in strange[:5])}: allowed are "
                f"{', '.join(f'{v:g}' for v in stored)}. Correct the file, or set num_classes or label_values."
            )
        return out
