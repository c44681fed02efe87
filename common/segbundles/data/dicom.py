"""Reading a DICOM series as one volume: a folder of slices, one series of several in a folder, or an enhanced file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import PathLike
from monai.data.utils import orientation_ras_lps
from monai.utils import ensure_tuple

from segbundles.data.base import FileReader
from segbundles.data.dicom_files import (
    COSINE_TOLERANCE,
    REPEATS,
    Frame,
    NotPlacedError,
    SeriesTags,
    format_numbers,
    is_dicom_slice,
    read_frames,
    read_pixels,
    read_series_tags,
)
from segbundles.errors import InputError
from segbundles.files import shown
from segbundles.meta import add_note, image_meta

__all__ = [
    "DicomReader",
    "Series",
    "channel_series",
    "chosen_series",
    "format_numbers",
    "is_dicom",
    "is_dicom_slice",
    "list_series",
    "may_be_volume",
    "slice_files",
    "sorted_frames",
]

SAME_PLACE_MM = 0.01
GRID_TOLERANCE = 0.1  # of a voxel, because positions are written with few decimals
NEAR = 0.05  # of the range of the grey levels: padding that near to the background is left as it is


@dataclass(frozen=True)
class Series:
    """A series in a folder.

    Args:
        folder: the folder.
        name: text that stands for the series, without dots, such as ``4_t1_fl3d``; no other in the folder has it.
        tags: tags of its first file.
        files: its files.
        frames: number of slices.
        alone: whether the folder contains no other series.
    """

    folder: Path
    name: str
    tags: SeriesTags
    files: tuple[Path, ...]
    frames: int
    alone: bool

    @property
    def path(self) -> Path:
        """Path that :class:`DicomReader` reads: the folder, or the name in it where the folder has several series."""
        return self.folder if self.alone else self.folder / self.name

    def __str__(self) -> str:
        number = "" if self.tags.number is None else f" (number {self.tags.number})"
        return f"{self.tags.description!r}{number} of {self.frames} slice{'s'[: self.frames > 1]}"


def slice_files(folder: Path) -> list[Path]:
    """Return the DICOM images in a folder, without its sub-folders.

    Raises:
        ValueError: when a file like them is empty.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    paths = [path for path in files if is_dicom_slice(path)]
    suffixes = {path.suffix for path in paths}
    empty = next((path.name for path in files if path.suffix in suffixes and not path.stat().st_size), None)
    if empty:
        raise InputError(f"{shown(empty)} is empty: copy it again.")
    return paths


def list_series(folder: Path) -> list[Series]:
    """Return the series in a folder, sorted by their numbers.

    Raises:
        ValueError: when there is none, or a file is damaged.
    """
    by_uid: dict[str, list[tuple[Path, SeriesTags]]] = {}
    for path in slice_files(folder):
        tags = read_series_tags(path)
        by_uid.setdefault(tags.uid, []).append((path, tags))
    if not by_uid:
        raise InputError("it contains no DICOM image: give the folder that contains the slices.")
    found: list[Series] = []
    for files in sorted(by_uid.values(), key=lambda files: (files[0][1].number or 0, files[0][1].uid)):
        paths, tags = zip(*files, strict=True)
        frames = sum(one.frames for one in tags)
        name = _series_name(tags[0], folder, {one.name for one in found})
        found.append(Series(folder, name, tags[0], paths, frames, len(by_uid) == 1))
    return found


def _series_name(tags: SeriesTags, folder: Path, taken: set[str]) -> str:
    number = "" if tags.number is None else str(tags.number)
    description = re.sub(r"[^\w+-]+", "_", tags.description).strip("_")
    name = "_".join(part for part in (number, description) if part) or "series"
    copies = (name if k == 1 else f"{name}_{k}" for k in range(1, len(taken) + 1000))
    return next(copy for copy in copies if copy not in taken and not (folder / copy).exists())


def chosen_series(series: Sequence[Series], selector: int | str | None) -> list[Series]:
    """Return the series that a selector stands for.

    Args:
        series: series to choose from.
        selector: a series number, or a text: the whole description of a series, or else a part of it, in upper or lower
            case. None chooses all.
    """
    if selector is None:
        return list(series)
    text = str(selector).strip()
    if re.fullmatch(r"\d+", text):
        return [one for one in series if one.tags.number == int(text)]
    descriptions = [one.tags.description.casefold() for one in series]
    text = text.casefold()
    whole = [one for one, description in zip(series, descriptions, strict=True) if description == text]
    return whole or [one for one, description in zip(series, descriptions, strict=True) if text in description]


def channel_series(series: Sequence[Series], selectors: Sequence[int | str]) -> list[Series]:
    """Return one series per selector; where a selector fits several, those that another one needs do not count.

    Args:
        series: series of one study.
        selectors: see :func:`chosen_series`.

    Raises:
        ValueError: when a selector fits no series or several, or the series are of different patients.
    """
    fitting = {selector: chosen_series(series, selector) for selector in selectors}
    for _ in selectors:
        sure = {id(found[0]) for found in fitting.values() if len(found) == 1}
        for selector, found in fitting.items():
            if len(found) > 1:
                fitting[selector] = [one for one in found if id(one) not in sure] or found
    for selector, found in fitting.items():
        if len(found) != 1:
            raise InputError(
                f"{selector!r} of series fits {len(found) or 'no'} series of this study, which has {_listed(series)}: "
                "give the number or the description of one series per channel."
            )
    chosen = [fitting[selector][0] for selector in selectors]
    if len({one.tags.patient for one in chosen}) > 1:
        raise InputError(f"its series {_listed(chosen)} are of different patients: sort them into folders.")
    return chosen


def _listed(series: Sequence[Series]) -> str:
    more = f" and {len(series) - 10} more" if len(series) > 10 else ""
    return ", ".join(map(str, series[:10])) + more


def may_be_volume(series: Series) -> bool:
    """Return whether a series is of the kind that a person wants to segment.

    One slice, slices in several orientations (a localiser), colours, and images without a position are not. A damaged
    series counts as a volume, so that reading it says what is wrong.
    """
    frames: list[Frame] = []
    for path in series.files:
        try:
            frames += read_frames(path)
        except NotPlacedError:
            continue
        except InputError:
            return True
    apart = (np.abs(frame.axes - frames[0].axes).max() > COSINE_TOLERANCE for frame in frames)
    return len(frames) > 1 and all(frame.grey for frame in frames) and not any(apart)


def is_dicom(path: PathLike) -> bool:
    """Return whether :class:`DicomReader` is to read a path: a folder, a DICOM image, or a series by its name."""
    path = Path(path)
    if path.is_dir():
        return True
    if path.exists():
        return path.is_file() and is_dicom_slice(path)
    with suppress(InputError, OSError):
        return not path.suffix and path.parent.is_dir() and bool(slice_files(path.parent))
    return False


class DicomReader(FileReader):
    """Read a DICOM series, one slice per file or many (enhanced, multi-frame).

    A path is one of these:

    - a folder with one series. Sub-folders and files that are not DICOM images are ignored;
    - a folder with several series, if ``series`` says which to read;
    - a folder with several series, followed by the name of one, as in ``study/4_t1_fl3d``, which is its number and its
      description; see :class:`Series`;
    - an enhanced file.

    The array has axes (x, y, z): columns, rows, and slices sorted by their positions along the normal x cross y,
    whatever the file names. Values are float32, rescaled as each header says, with low values dark. Padding outside the
    field of view (PixelPaddingValue) gets the lowest other value, with a note. The affine is RAS, in mm. The metadata
    only contains the grid, nothing about the patient or the study.

    Args:
        series: number or description of the series to read (:func:`chosen_series`). A list reads one series per channel
            from a folder, or from the folders in it; the array then has a last axis of channels. None reads the only
            series.
    """

    def __init__(self, series: int | str | Sequence[int | str] | None = None) -> None:
        super().__init__()
        self.series = series

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Return whether every path is a folder, a DICOM image, or a series in a folder."""
        return all(map(is_dicom, ensure_tuple(filename)))

    def exists(self, path: Path) -> bool:
        """Return whether there is such a file, folder or series."""
        return path.exists() or is_dicom(path)

    def decode(self, path: Path, **kwargs: Any) -> tuple[np.ndarray, dict]:
        """Return array and metadata of one series, or of the series that are the channels of one image.

        Raises:
            ValueError: when the path does not give exactly one series, when slices are missing, are at the same place,
                differ in size, spacing or orientation, or cannot be decoded, and when channels differ in size or
                position.
        """
        if path.is_file():
            frames = read_frames(path)
            if len(frames) == 1:
                raise InputError("it is one slice of a DICOM series; give the folder with the whole series.")
            return _volume(frames)
        found = _series_of(path, self.series)
        if path.is_dir() and isinstance(self.series, list | tuple):
            return _read_channels(found)
        return _read_series(found[0])


def sorted_frames(path: Path, series: int | str | Sequence[int | str] | None = None) -> list[Frame]:
    """Return the frames of what :class:`DicomReader` reads, in the order of its last axis; pixels are not read.

    Args:
        path: as for the reader.
        series: as for the reader; of several channels, the frames of the first are returned.

    Raises:
        ValueError: as for the reader.
    """
    if path.is_file():
        return _sorted(read_frames(path))
    return _sorted([frame for file in _series_of(path, series)[0].files for frame in read_frames(file)])


def _series_of(path: Path, series: int | str | Sequence[int | str] | None) -> list[Series]:
    """Return the series that a folder, or the name of a series in one, stands for: one, or one per channel."""
    if not path.is_dir():
        return [_only([one for one in list_series(path.parent) if one.name == path.name], path.parent)]
    if isinstance(series, list | tuple):
        return channel_series(_study_series(path), series)
    return [_only(chosen_series(list_series(path), series), path, series)]


def _only(found: Sequence[Series], folder: Path, selector: int | str | None = None) -> Series:
    if not found:
        sought = "such series" if selector is None else f"series {selector!r}"
        raise InputError(f"there is no {sought}: the folder contains {_listed(list_series(folder))}.")
    if len(found) > 1:
        raise InputError(
            f"it contains {len(found)} series, {_listed(found)}: choose one with --series, or give its path, for "
            f"example {shown(found[0].path)}."
        )
    return found[0]


def _study_series(folder: Path) -> list[Series]:
    """Return the series in a folder; if there is none, those in the folders in it."""
    if slice_files(folder):
        return list_series(folder)
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    found = [one for inner in folders if slice_files(inner) for one in list_series(inner)]
    return found or list_series(folder)


def _read_series(series: Series) -> tuple[np.ndarray, dict]:
    return _volume([frame for path in series.files for frame in read_frames(path)])


def _read_channels(series: Sequence[Series]) -> tuple[np.ndarray, dict]:
    arrays, metas = zip(*map(_read_series, series), strict=True)
    affine, size = metas[0]["affine"], arrays[0].shape
    tolerance = GRID_TOLERANCE * np.linalg.norm(affine[:3, :3], axis=0).min()
    for one, array, meta in zip(series, arrays, metas, strict=True):
        apart = np.abs(meta["affine"] - affine)[:3] @ [*size, 1]
        if array.shape != size or apart.max() > tolerance:
            raise InputError(
                f"its series {series[0]} and {one} are channels of one image but differ in size or position: resample "
                "them to one grid beforehand."
            )
    meta = image_meta(affine, size, channels_last=True)
    add_note(meta, *(other.get("notes", "") for other in metas))
    return np.stack(arrays, axis=-1), meta


def _sorted(frames: Sequence[Frame]) -> list[Frame]:
    """Return the frames of one volume by their positions along the normal."""
    if len(frames) == 1:
        raise InputError(f"it contains only one slice, {frames[0].name}: give the whole series.")
    _check_alike(frames)
    normal = np.cross(*frames[0].axes)
    return sorted(frames, key=lambda one: one.position @ normal)


def _volume(frames: Sequence[Frame]) -> tuple[np.ndarray, dict]:
    first = frames[0]  # whose axes count for all, in the file's order
    frames = _sorted(frames)
    axes, spacing = first.axes, first.spacing
    normal = np.cross(*axes)
    step = _check_positions(frames, normal)
    planes, padded = zip(*read_pixels(frames), strict=True)
    array = np.stack(planes, axis=2)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([axes[0] * spacing[0], axes[1] * spacing[1], normal * step], axis=1)
    affine[:3, 3] = frames[0].position
    meta = image_meta(orientation_ras_lps(affine), array.shape)
    if any(plane is not None and plane.any() for plane in padded):
        nowhere = np.zeros(array.shape[:2], bool)
        here = np.stack([nowhere if plane is None else plane for plane in padded], axis=2)
        add_note(meta, *_without_padding(array, here, frames))
    return array, meta


def _without_padding(array: np.ndarray, padded: np.ndarray, frames: Sequence[Frame]) -> list[str]:
    """Give padding the lowest other value, in place, and return the note on it."""
    others = array[~padded]
    if not others.size:
        return []
    low, high = float(others.min()), float(others.max())
    there = array[padded]
    if low - NEAR * (high - low) <= there.min() and there.max() <= low:
        return []
    array[padded] = low
    first, last = next(frame.padding for frame in frames if frame.padding is not None)
    values = f"{first}" if first == last else f"{first} to {last}"
    return [f"padding (PixelPaddingValue {values}) taken as background"]


def _check_alike(slices: Sequence[Frame]) -> None:
    first = slices[0]
    for one in slices:
        if not one.grey:
            raise InputError(f"{one.name} is in colour but must be grey: leave it out.")
        pair = f"{first.name} and {one.name}"
        if one.columns_rows != first.columns_rows:
            sizes = " and ".join("{} x {}".format(*size) for size in (first.columns_rows, one.columns_rows))
            raise InputError(f"{pair} differ in size, {sizes} pixels: sort them into folders.")
        if np.abs(one.axes - first.axes).max() > COSINE_TOLERANCE:
            raise InputError(f"{pair} differ in orientation (is one a localiser?): sort them into folders.")
        if np.abs(one.spacing - first.spacing).max() > COSINE_TOLERANCE * first.spacing.min():
            spacings = " and ".join(map(format_numbers, (first.spacing, one.spacing)))
            raise InputError(f"{pair} differ in spacing, {spacings} mm: sort them into folders.")


def _check_positions(slices: Sequence[Frame], normal: np.ndarray) -> float:
    """Return the distance in mm between slices, which are sorted along the normal."""
    positions = np.stack([one.position for one in slices])
    along = (positions - positions[0]) @ normal
    gaps = np.diff(along)
    _check_repeats(slices, gaps)
    usual = float(np.sort(gaps)[(len(gaps) - 1) // 2])
    step = float(along[-1]) / len(gaps)
    wide = np.flatnonzero(gaps > 1.5 * usual)
    if wide.size:
        before, after = slices[wide[0]].name, slices[wide[0] + 1].name
        more = f", and at {wide.size - 1} more places" if wide.size > 1 else ""
        raise InputError(
            f"a slice is missing between {before} and {after}, which are {gaps[wide[0]]:.4g} mm apart instead of "
            f"{usual:.4g}{more}: copy the whole series again."
        )
    if np.abs(along - step * np.arange(len(along))).max() > GRID_TOLERANCE * step:
        raise InputError(
            f"its slices are {gaps.min():.4g} to {gaps.max():.4g} mm apart but must be evenly spaced: resample them "
            "beforehand."
        )
    aside = np.linalg.norm(positions - positions[0] - along[:, None] * normal, axis=1)
    if aside.max() > GRID_TOLERANCE * slices[0].spacing.min():
        raise InputError(
            f"its slices are shifted sideways by up to {aside.max():.4g} mm (a tilted gantry?): straighten them, for "
            "example with dcm2niix."
        )
    return step


def _check_repeats(slices: Sequence[Frame], gaps: np.ndarray) -> None:
    if gaps.min() > SAME_PLACE_MM:
        return
    start = int(np.argmin(gaps > SAME_PLACE_MM))
    end = start + 1
    while end < len(gaps) and gaps[end] <= SAME_PLACE_MM:
        end += 1
    here = slices[start : end + 1]
    values = {name: list(dict.fromkeys(one.repeat[name] for one in here)) for name in REPEATS}
    apart = next(
        (
            f"{name} ({', '.join(value or 'none' for value in seen[:4])})"
            for name, seen in values.items()
            if len(seen) > 1
        ),
        "",
    )
    kind = f"they differ in {apart}; put each phase, echo or repeat into its own folder" if apart else "remove copies"
    places = 1 + int((gaps > SAME_PLACE_MM).sum())
    raise InputError(
        f"its {len(slices)} slices are at {places} position{'s'[: places > 1]}, for example "
        f"{', '.join(one.name for one in here[:4])} at the same one: {kind}."
    )
