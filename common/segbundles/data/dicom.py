"""Reading a folder of DICOM slices as one volume, and recognising slices among other files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
from monai.config import PathLike
from monai.data import ImageReader
from monai.data.utils import orientation_ras_lps
from monai.utils import ensure_tuple

from segbundles.errors import InputError
from segbundles.itk import quiet_itk
from segbundles.meta import image_meta

__all__ = ["DicomReader", "format_numbers", "is_dicom_slice"]

STORAGE = "1.2.840.10008.5.1.4.1.1."
# waveforms, presentation states, registrations and segmentations, reports, documents, radiotherapy, spectra
NOT_SCANS = ("9.", "11.", "66", "88.", "104.", "481.", "4.2")
SAME_PLACE_MM = 0.01
GRID_TOLERANCE = 0.1  # of a voxel, because positions are written with few decimals
COSINE_TOLERANCE = 1e-3
# tags that may differ between slices at the same place
REPEATS = {
    "EchoTime": "0018|0081",
    "InversionTime": "0018|0082",
    "TriggerTime": "0018|1060",
    "DiffusionBValue": "0018|9087",
    "TemporalPositionIdentifier": "0020|0100",
    "ImageType": "0008|0008",
    "AcquisitionNumber": "0020|0012",
}


def is_dicom_slice(path: PathLike) -> bool:
    """Return whether a file is a DICOM image, whatever its name; a damaged file that ends in ``.dcm`` counts as one.

    DICOMDIR, reports, presentation states and other objects that are not scans do not count.
    """
    with Path(path).open("rb") as file:
        head = file.read(1024)
    if head[128:132] != b"DICM":
        return Path(path).suffix.lower() == ".dcm"
    kind = _uid(head, 2)
    return not kind or (kind.startswith(STORAGE) and not kind.removeprefix(STORAGE).startswith(NOT_SCANS))


def _uid(head: bytes, element: int) -> str:
    """Return an identifier of group 2, which is always in explicit little endian."""
    found = re.search(rb"\x02\x00" + bytes([element]) + rb"\x00UI..([\d.]+)", head[132:], re.DOTALL)
    return found[1].decode() if found else ""


@dataclass(frozen=True)
class _Slice:
    """The parts of a slice's header that are needed; nothing that identifies the patient."""

    name: str
    series: str
    description: str
    columns_rows: tuple[int, ...]
    grey: bool
    position: np.ndarray
    axes: np.ndarray
    spacing: np.ndarray
    repeat: dict[str, str]


class DicomReader(ImageReader):
    """Read a folder with one DICOM series, one file per slice, with SimpleITK.

    The array has axes (x, y, z): columns, rows, and slices sorted by their positions along the normal x cross y,
    whatever the file names. Values are float32, rescaled as each header says, with low values dark. The affine is RAS,
    in mm. Sub-folders and files that are not DICOM images are ignored. The metadata only contains the grid, nothing
    about the patient or the study.
    """

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Return whether every path is a folder."""
        return all(Path(name).is_dir() for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike) -> tuple[np.ndarray, np.ndarray]:
        """Return the array and affine of one folder.

        Args:
            data: path of the folder.

        Raises:
            ValueError: when the folder does not contain exactly one series, when slices are missing, are at the same
                place, differ in size, spacing or orientation, or cannot be decoded.
        """
        (folder,) = map(Path, ensure_tuple(data))
        try:
            return _read_series(folder)
        except InputError as error:
            raise InputError(f"cannot read {folder} as a DICOM series: {error}") from None

    def get_data(self, img: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, dict]:
        """Return array and metadata of what ``read`` returned."""
        array, affine = img
        return array, image_meta(affine, array.shape)


def _read_series(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    paths = [path for path in files if is_dicom_slice(path)]
    if not paths:
        raise InputError("it contains no DICOM image: give the folder that contains the slices.")
    suffixes = {path.suffix for path in paths}
    empty = next((path.name for path in files if path.suffix in suffixes and not path.stat().st_size), None)
    if empty:
        raise InputError(f"{empty} is empty: copy it again.")
    with quiet_itk():
        slices = [_read_header(path) for path in paths]
        _check_one_series(slices)
        _check_alike(slices)
        axes, spacing = slices[0].axes, slices[0].spacing
        normal = np.cross(*axes)
        slices.sort(key=lambda one: one.position @ normal)
        step = _check_positions(slices, normal)
        array = np.stack([_read_pixels(folder / one.name) for one in slices], axis=2)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([axes[0] * spacing[0], axes[1] * spacing[1], normal * step], axis=1)
    affine[:3, 3] = slices[0].position
    return array, orientation_ras_lps(affine)


def _open(path: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        raise InputError(_why_not(path)) from None
    return reader


def _why_not(path: Path) -> str:
    """Describe why a slice cannot be decoded, judging by the beginning of its file."""
    with path.open("rb") as file:
        syntax = _uid(file.read(1024), 16)
    if syntax.startswith("1.2.840.10008.1.2.") and syntax.removeprefix("1.2.840.10008.1.2.") not in ("1", "2"):
        return (
            f"{path.name} has an unsupported compression (transfer syntax {syntax}), or is damaged: "
            "export it uncompressed, or convert it with `gdcmconv --raw`."
        )
    return f"{path.name} is truncated or damaged: copy it again."


def _tag(reader: sitk.ImageFileReader, tag: str) -> str:
    return reader.GetMetaData(tag).strip(" \0") if reader.HasMetaDataKey(tag) else ""


def _read_header(path: Path) -> _Slice:
    reader = _open(path)
    if reader.GetSize()[2:] > (1,):
        raise InputError(
            f"{path.name} has {reader.GetSize()[2]} frames, but multi-frame (enhanced) DICOM is not supported: convert "
            "it to NIfTI with dcm2niix, or export it as single slices."
        )

    def numbers(name: str, tag: str, count: int) -> np.ndarray:
        text = _tag(reader, tag)
        try:
            values = np.array([float(part) for part in text.split("\\")])
        except ValueError:
            values = np.empty(0)
        if len(values) != count or not np.isfinite(values).all():
            raise InputError(
                f"the {name} of {path.name} is {text or 'missing'} but must have {count} numbers: the file is not a "
                "slice of a volume, or its anonymisation removed too much; leave it out, or export it again."
            )
        return values

    axes = numbers("ImageOrientationPatient", "0020|0037", 6).reshape(2, 3)
    if np.abs(axes @ axes.T - np.eye(2)).max() > COSINE_TOLERANCE:
        raise InputError(
            f"{path.name} has axes {format_numbers(axes.ravel())}, which are not perpendicular and of length 1: export "
            "it again."
        )
    spacing = numbers("PixelSpacing", "0028|0030", 2)[::-1]  # rows come first
    if not (spacing > 0).all():
        raise InputError(
            f"the PixelSpacing of {path.name} is {format_numbers(spacing[::-1])} but must be two positive numbers "
            "(mm): export it again."
        )
    number = _tag(reader, "0020|0011")
    description = _tag(reader, "0008|103e")
    return _Slice(
        name=path.name,
        series=_tag(reader, "0020|000e"),
        description=f"{description!r}" + (f" (number {number})" if number else ""),
        columns_rows=reader.GetSize()[:2],
        grey=_tag(reader, "0028|0004") in ("", "MONOCHROME1", "MONOCHROME2"),
        position=numbers("ImagePositionPatient", "0020|0032", 3),
        axes=axes / np.linalg.norm(axes, axis=1, keepdims=True),
        spacing=spacing,
        repeat={name: _tag(reader, tag) for name, tag in REPEATS.items()},
    )


def _check_one_series(slices: Sequence[_Slice]) -> None:
    by_series: dict[str, list[_Slice]] = {}
    for one in slices:
        by_series.setdefault(one.series, []).append(one)
    if len(by_series) > 1:
        held = [f"{series[0].description} of {_count(series)}" for series in by_series.values()]
        more = f" and {len(held) - 5} more" if len(held) > 5 else ""
        raise InputError(
            f"it contains {len(held)} series, {', '.join(held[:5])}{more}: put each into its own folder, and leave out "
            "those that you do not want to segment."
        )
    if len(slices) == 1:
        raise InputError(f"it contains only one slice, {slices[0].name}: give the whole series.")


def _count(slices: Sequence[_Slice]) -> str:
    return f"{len(slices)} slice{'s'[: len(slices) > 1]}"


def _check_alike(slices: Sequence[_Slice]) -> None:
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


def _check_positions(slices: Sequence[_Slice], normal: np.ndarray) -> float:
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


def _check_repeats(slices: Sequence[_Slice], gaps: np.ndarray) -> None:
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


def _read_pixels(path: Path) -> np.ndarray:
    """Return the grey levels (columns, rows) of a slice; ITK rescales them, and inverts them if 0 is white."""
    reader = _open(path)
    reader.SetOutputPixelType(sitk.sitkFloat32)
    try:
        return sitk.GetArrayFromImage(reader.Execute())[0].T
    except RuntimeError:
        raise InputError(_why_not(path)) from None


def format_numbers(values: Iterable[float]) -> str:
    """Write numbers with up to six digits, such as ``(0.5, 0.5, 2)``."""
    return f"({', '.join(f'{value:.6g}' for value in values)})"
