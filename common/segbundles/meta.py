"""What travels with an image from the reader to the report, in the metadata of MONAI's ``MetaTensor``.

This module alone knows the names under which it travels. Each function takes a tensor, or the metadata itself.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple

__all__ = [
    "DEFAULTS",
    "add_note",
    "batch_notes",
    "box_of",
    "file_name",
    "files_of",
    "has_spacing",
    "image_meta",
    "join_notes",
    "levels_of",
    "notes_of",
    "pixel_nm",
    "pixel_sizes_nm",
    "set_box",
    "set_has_spacing",
    "set_levels",
    "set_notes",
    "set_pixel_sizes_nm",
    "set_slice_files",
    "slice_files",
    "spacing_of",
    "without_meta",
]

FILE = "filename_or_obj"
NOTES = "notes"
SLICE_FILES = "slices"
HAS_SPACING = "has_spacing"
PIXEL_SIZES = "pixel_sizes_nm"
LEVEL_MEAN, LEVEL_SPREAD = "level_mean", "level_spread"
BOX_START, BOX_END = "box_start", "box_end"

#: what only some images have, and what its absence means; MONAI's collation drops what is not in all of a batch
DEFAULTS: dict[str, Any] = {NOTES: "", SLICE_FILES: "", HAS_SPACING: True, PIXEL_SIZES: np.zeros(3)}
_SQUARE = 0.01  # by which width and height of a pixel may differ


def _meta(image: Any) -> Any:
    return image if isinstance(image, Mapping) else getattr(image, "meta", {})


def without_meta(image: torch.Tensor) -> torch.Tensor:
    """Return a tensor without metadata, of the same memory."""
    return image.as_tensor() if isinstance(image, MetaTensor) else image


def image_meta(affine: np.ndarray, size: Sequence[int], channels_last: bool = False) -> dict[str, Any]:
    """Return the metadata that a reader gives MONAI's ``LoadImage``.

    Args:
        affine: RAS affine in mm.
        size: number of voxels along each spatial axis.
        channels_last: whether the array has a last axis of channels; otherwise it has no channel axis.
    """
    return {
        MetaKeys.ORIGINAL_AFFINE: affine.copy(),
        MetaKeys.AFFINE: affine,
        MetaKeys.SPACE: SpaceKeys.RAS,
        MetaKeys.SPATIAL_SHAPE: np.asarray(size),
        MetaKeys.ORIGINAL_CHANNEL_DIM: -1 if channels_last else float("nan"),
    }


def file_name(image: Any, default: str = "image") -> str:
    """Return the path an image was read from, or ``default`` when it is not known."""
    return str(_meta(image).get(FILE, default))


def slice_files(image: Any) -> list[str]:
    """Return the files of a stack of 2D images in the order of its last axis; none for an image of one file."""
    return [file for file in str(_meta(image).get(SLICE_FILES) or "").split("\n") if file]


def set_slice_files(meta: MutableMapping, files: Sequence[Any]) -> None:
    """Keep the files of a stack of 2D images; strings alone survive MONAI's collation, so they are kept as one."""
    meta[SLICE_FILES] = "\n".join(map(str, files))


def files_of(image: Any) -> list[str]:
    """Return the files of an image: those of its slices, or its only one."""
    return slice_files(image) or [file_name(image)]


def join_notes(*notes: Any) -> str:
    """Join notes on one image, each once; None and empty ones are left out."""
    return "; ".join(dict.fromkeys(part for note in notes if note for part in str(note).split("; ")))


def notes_of(*images: Any) -> str:
    """Return the notes on one image, from all of its tensors."""
    return join_notes(*(_meta(image).get(NOTES) for image in images))


def add_note(image: Any, *notes: str) -> None:
    """Add notes to those that an image has."""
    if text := join_notes(_meta(image).get(NOTES), *notes):
        _meta(image)[NOTES] = text


def set_notes(batch: Any, notes: Sequence[str]) -> None:
    """Give each item of a batch its note."""
    _meta(batch)[NOTES] = list(notes)


def batch_notes(batch: Any, size: int) -> list[str]:
    """Return the notes on each item of a batch of ``size`` images."""
    notes = _meta(batch).get(NOTES) or ""
    return [notes] * size if isinstance(notes, str) else [note or "" for note in ensure_tuple(notes)]


def spacing_of(image: torch.Tensor) -> tuple[float, ...]:
    """Return the spacing in mm of a (C, spatial) tensor; 1 without metadata."""
    rank = image.ndim - 1
    if not isinstance(image, MetaTensor):
        return (1.0,) * rank
    affine = image.affine.numpy(force=True)
    return tuple(float(v) for v in np.linalg.norm(affine[:rank, :rank], axis=0))


def has_spacing(image: Any) -> bool:
    """Return whether the affine of an image is in mm; otherwise it counts pixels."""
    return bool(_meta(image).get(HAS_SPACING, True))


def set_has_spacing(image: Any, known: bool) -> None:
    """Say whether the affine of an image is in mm."""
    _meta(image)[HAS_SPACING] = known


def pixel_sizes_nm(image: Any) -> tuple[float, float, float] | None:
    """Return width, height and distance of slices of a 2D image or stack in nm, as its file says; None if unknown.

    The distance is 0 where only it is unknown.
    """
    width, height, distance = (float(size) for size in _meta(image).get(PIXEL_SIZES, DEFAULTS[PIXEL_SIZES]))
    return (width, height, distance) if width and height else None


def pixel_nm(image: Any) -> float | None:
    """Return the size of the pixels of a 2D image or stack in nm; None if it is unknown or they are not square."""
    sizes = pixel_sizes_nm(image)
    if sizes is None or abs(sizes[0] - sizes[1]) > _SQUARE * max(sizes[:2]):
        return None
    return (sizes[0] + sizes[1]) / 2


def set_pixel_sizes_nm(image: Any, sizes: Sequence[float] | None) -> None:
    """Keep what the file of a 2D image or stack says about its pixels; a note says if they are not square."""
    if sizes is None:
        return
    _meta(image)[PIXEL_SIZES] = np.array(sizes, dtype=np.float64)
    if pixel_nm(image) is None:
        add_note(image, f"pixels of {sizes[0]:.4g} x {sizes[1]:.4g} nm are not square: their size is not used")


def box_of(image: Any) -> tuple[list[int], list[int]] | None:
    """Return the box that a locator found: first voxel, and the one after the last; None where there is none."""
    meta = _meta(image)
    if BOX_START not in meta:
        return None
    return [int(n) for n in meta[BOX_START]], [int(n) for n in meta[BOX_END]]


def set_box(image: Any, start: Any, end: Any) -> None:
    """Keep the box that a locator found, or one per item of a batch, as integer tensors."""
    meta = _meta(image)
    meta[BOX_START], meta[BOX_END] = torch.as_tensor(start), torch.as_tensor(end)


def levels_of(image: Any) -> tuple[float, float] | None:
    """Return mean and standard deviation of the section that an image is a block of; None for a whole section."""
    meta = _meta(image)
    return (float(meta[LEVEL_MEAN]), float(meta[LEVEL_SPREAD])) if LEVEL_MEAN in meta else None


def set_levels(image: Any, mean: float, spread: float) -> None:
    """Keep mean and standard deviation of the section that an image is a block of."""
    _meta(image).update({LEVEL_MEAN: mean, LEVEL_SPREAD: spread})
