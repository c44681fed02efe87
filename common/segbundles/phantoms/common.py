"""What all phantoms share: their data set, checks before anything is written, TIFF files, and the split."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from segbundles.datasets import SPLITS, DataSet, Prepared, prepare
from segbundles.datasets.datalist import check_out
from segbundles.errors import fail
from segbundles.files import atomic_path

_MIN_PIXELS = 32


def twin_of(data_set: DataSet, name: str, description: str, **changes: Any) -> DataSet:
    """Return the data set of a phantom in the layout of a real one.

    Args:
        data_set: the real data set.
        name: name of the phantom; the datalist says ``<name>_phantom``.
        description: one line for the datalist.
        changes: fields of `DataSet` that differ.
    """
    reference = {"description": description, "reference": f"segbundles phantom {name}", "licence": "Apache-2.0"}
    metadata = {**data_set.metadata, **reference}
    return replace(data_set, name=f"{name}_phantom", metadata=metadata, options=None, **changes)


def start(data_set: DataSet, out: str | os.PathLike, seed: int, units: str, number: int, least: int = 3) -> Path:
    """Check what all phantoms are asked for, and return the absolute path of ``out``.

    Args:
        data_set: data set of the phantom.
        out: its folder.
        seed: seed of the phantom.
        units: what is counted, in the plural.
        number: how many of them are to be made.
        least: how many are needed for training, validation and testing.

    Raises:
        ValueError: when ``seed`` or ``number`` is too small, or ``out`` contains another data set's datalist.
    """
    if number < least:
        fail(f"{units} must be {least} or more, for training, validation and testing, got {number}")
    if seed < 0:
        fail(f"seed must be 0 or more, got {seed}")
    out = Path(out).expanduser().resolve()
    check_out(out, data_set.name)
    return out


def check_size(size: Sequence[int]) -> None:
    """Fail unless a size is two numbers of pixels that are large enough."""
    if len(size) != 2 or min(size) < _MIN_PIXELS:
        fail(f"size must be two numbers of {_MIN_PIXELS} pixels or more, got {tuple(size)}")


def own(paths: Iterable[Path], ours: Callable[[Path], bool]) -> list[Path]:
    """Return the paths that exist, which an earlier phantom wrote.

    Args:
        paths: where the phantom is to be written.
        ours: whether a phantom wrote what is at a path.

    Raises:
        ValueError: when a path is a link, or was not written by a phantom.
    """
    found = [path for path in paths if os.path.lexists(path)]
    for path in found:
        if path.is_symlink() or not ours(path):
            fail(f"{path} was not written by a phantom, nothing was changed: choose another --out")
    return found


def contents(folder: Path) -> list[Path]:
    """Return what is in a folder, except hidden files; the path itself if it is not a folder."""
    if folder.is_symlink() or not folder.is_dir():
        return [folder]
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]


def write_tiff(path: Path, pixels: np.ndarray, mark: str | None = None) -> None:
    """Write a TIFF.

    Args:
        path: file to write.
        pixels: grey (H, W) or (pages, H, W), or RGB (H, W, 3).
        mark: description by which :func:`is_marked` knows the file.
    """
    colour = "rgb" if pixels.shape[-1] == 3 else "minisblack"
    with atomic_path(path) as part:
        tifffile.imwrite(part, np.ascontiguousarray(pixels), photometric=colour, description=mark, metadata=None)


def is_marked(path: Path, mark: str) -> bool:
    """Return whether a file is a TIFF with a phantom's mark as its description."""
    try:
        with tifffile.TiffFile(path) as file:
            return file.pages[0].description == mark
    except Exception:  # tifffile raises anything from struct.error to ValueError on other files
        return False


def finish(data_set: DataSet, out: Path, names: Sequence[str], share: int) -> Prepared:
    """Prepare a phantom.

    Args:
        data_set: data set of the phantom.
        out: its folder.
        names: cases or groups in their order; the last are testing, those before them validation.
        share: validation and testing get one in ``share`` each, one at least.

    Returns:
        What was written. Cases that an earlier, larger phantom left there are not in the list.
    """
    held_out = max(1, round(len(names) / share))
    bounds = (0, len(names) - 2 * held_out, len(names) - held_out, len(names))
    split = {name: names[a:b] for name, (a, b) in zip(SPLITS, pairwise(bounds), strict=True)}
    prepared = prepare(data_set, out, out, split=split)
    return replace(prepared, notes=[note for note in prepared.notes if "left out" not in note])
