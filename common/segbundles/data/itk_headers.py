"""Checks on the headers of NRRD and MetaImage, because ITK ignores units and replaces NaN spacings by 1."""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from segbundles.errors import InputError
from segbundles.files import shown

__all__ = ["axes_fault", "check_metaimage", "check_nrrd"]

HEADER_BYTES = 2**22
UNIT_LENGTH_TOLERANCE = 1e-3
FLAT = 1e-3  # volume of a box with edges of length 1
MM = ("", "mm", "millimeter", "millimeters", "millimetre", "millimetres", "?", "???")
NO_SPACING = "no spacing in the header: 1 mm assumed"
# fields that may also be written without blanks
NRRD_FIELDS = {
    name.replace(" ", ""): name
    for name in ("axis mins", "axis maxs", "data file", "space units", "space origin", "space directions")
} | {"spacedimension": "space dimension"}
# kinds of axes that ITK takes as axes of space; it makes channels of one axis of another kind
NRRD_DOMAIN = ("domain", "space", "???", "none")
NRRD_ANATOMICAL = {
    *("left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las"),
}
NRRD_SPACES = {*NRRD_ANATOMICAL, "scanner-xyz", "3d-right-handed", "3d-left-handed"}
# fields with a meaning, each with its other names; ITK ignores them in other letters
META_SPACING = ("ElementSpacing", "ElementSize")
META_ORIGIN = ("Offset", "Position", "Origin")
META_DIRECTION = ("TransformMatrix", "Rotation", "Orientation")
META_FIELDS = (
    *(META_SPACING, META_ORIGIN, META_DIRECTION, ("DistanceUnits",), ("HeaderSize",), ("ElementNumberOfChannels",)),
    *(("BinaryData",), ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"), ("CompressedData",), ("CompressedDataSize",)),
)
META_BYTES = {
    **{"CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 4, "LONG_LONG": 8},
    **{"UCHAR": 1, "USHORT": 2, "UINT": 4, "ULONG": 4, "ULONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8},
}
CHUNK = 2**16  # bytes; they may become 1000 times as many


def axes_fault(axes: np.ndarray) -> str | None:
    """Return why a grid cannot have these axes; None if it can.

    Args:
        axes: step along each axis in mm, one column per axis.
    """
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(axes, axis=0)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        return "the step along each axis must be a finite length above 0 (mm)"
    unit = axes / lengths
    if np.linalg.det(unit.T @ unit) < FLAT**2:
        return "its axes must not be in one plane"
    return None


@dataclass(frozen=True)
class _Header:
    fields: dict[str, str]
    listed: list[str]  # data files, one per line at the end
    equals: str

    def refuse(self, name: str, why: str) -> NoReturn:
        value = self.fields[name].replace('"', "")
        raise InputError(f"its header says '{name}{self.equals}{value}', but {why}.")

    def words(self, name: str, count: int | None = None) -> list[str]:
        """Return the words of a field; quotes and parentheses keep words together."""
        if name not in self.fields:
            raise InputError(f"it is truncated or damaged (its header has no {name}).")
        parts = re.findall(r'"[^"]*"|\([^)]*\)|\S+', self.fields[name])
        if count is not None and len(parts) != count:
            self.refuse(name, f"it must have {count} values")
        return [part.strip('"').strip() for part in parts]

    def numbers(self, name: str, count: int | None = None) -> np.ndarray:
        """Return the numbers of a field; those that are not finite stay."""
        return np.array([self.number(name, word) for word in self.words(name, count)])

    def number(self, name: str, word: str) -> float:
        try:
            return float(word)
        except ValueError:
            self.refuse(name, f"{word!r} is not a number")

    def vector(self, name: str, text: str, count: int) -> np.ndarray:
        """Return the numbers of a vector such as ``(1,0,0)``."""
        parts = text.strip("() ").split(",")
        if len(parts) != count:
            self.refuse(name, f"each of the {count} axes of space needs {count} numbers, in mm")
        return np.array([self.number(name, part) for part in parts])

    def check_finite(self, name: str, numbers: np.ndarray) -> None:
        if not np.isfinite(numbers).all():
            self.refuse(name, "each value must be a finite number")

    def check_axes(self, name: str, axes: np.ndarray) -> None:
        if why := axes_fault(axes):
            self.refuse(name, why)

    def check_spacing(self, name: str, spacing: np.ndarray) -> None:
        if not (np.isfinite(spacing) & (spacing > 0)).all():
            self.refuse(name, "each must be a finite number above 0 (mm)")

    def check_unit(self, name: str, units: list[str]) -> None:
        if any(unit.lower() not in MM for unit in units):
            self.refuse(name, "lengths must be in mm: rescale them, and set the unit to mm")

    def data_files(self, name: str, folder: Path) -> list[Path]:
        """Return the files with the voxels, after a check that they exist."""
        value = self.fields[name]
        files = [value]
        if value.upper().startswith("LIST"):
            files = self.listed
        elif found := re.fullmatch(r"([^%]*%0?\d?d[^%]*) (\d{1,6}) (\d{1,6}) (\d{1,6})(?: \d+)?", value):
            first, last, step = map(int, found.groups()[1:])
            files = [found[1] % number for number in range(first, last + 1, max(step, 1))]
        for file in files:
            if not (folder / file).is_file():
                self.refuse(name, f"there is no such file {folder / file}")
        return [folder / file for file in files]


def check_nrrd(path: Path) -> str:
    """Check the header of a NRRD file, and return a note if it has no spacing, or no relation to the patient.

    Raises:
        ValueError: when spacings, directions or origin are not finite numbers of mm that make a grid, when there are
            more than three axes of space, when a data file does not exist, or when the encoding is not supported.
    """
    header = _read_nrrd_header(path)
    fields = header.fields
    if fields.get("encoding", "").lower() in ("bzip2", "bz2"):
        header.refuse("encoding", "bzip2 is not supported: save the file with gzip or raw encoding")
    rank = len(header.numbers("sizes"))
    kinds = [kind.lower() for kind in header.words("kinds", rank)] if "kinds" in fields else ["???"] * rank
    if any("complex" in kind for kind in kinds):
        header.refuse("kinds", "complex numbers cannot be segmented, so save the magnitude")
    if any(word in kind for kind in kinds for word in ("matrix", "tensor")):
        header.refuse("kinds", "only grey levels and channels can be read")
    if "time" in kinds:
        header.refuse("kinds", "a file must contain one volume, so save each time point as its own file")
    axes = [axis for axis, kind in enumerate(kinds) if kind in NRRD_DOMAIN]
    if len(axes) > 3 or rank - len(axes) > 1:
        header.refuse(
            "sizes",
            'a file must contain one volume: save each as its own file, or give an axis of channels the kind "list"',
        )
    for name in {"units", "space units"} & fields.keys():
        if not re.fullmatch(r'("[^"]*"\s*)+', fields[name]):
            header.refuse(name, "each unit must be in quotes")
    if "units" in fields:
        units = header.words("units", rank)
        header.check_unit("units", [units[axis] for axis in axes])
    if "space units" in fields:
        header.check_unit("space units", header.words("space units"))
    space = fields.get("space", "").lower()
    if space and space not in NRRD_SPACES:
        header.refuse("space", "it must be a space of three dimensions that NRRD defines, as left-posterior-superior")
    if "space dimension" in fields and header.words("space dimension") != [str(len(axes))]:
        header.refuse("space dimension", f"the file has {len(axes)} axes of space")
    if "space directions" in fields:
        words = header.words("space directions", rank)
        steps = [header.vector("space directions", words[axis], len(axes)) for axis in axes]
        header.check_axes("space directions", np.array(steps).T)
    elif "spacings" in fields:
        header.check_spacing("spacings", header.numbers("spacings", rank)[axes])
    elif "axis maxs" in fields:
        header.refuse("axis maxs", "the spacings are missing (mm)")
    if "space origin" in fields:
        origin = header.vector("space origin", fields["space origin"], len(axes))
        header.check_finite("space origin", origin)
    if "data file" in fields:
        header.data_files("data file", path.parent)
    if not {"space directions", "spacings"} & fields.keys():
        return NO_SPACING
    if len(axes) < 3 or "space directions" not in fields or space in NRRD_ANATOMICAL:
        return ""
    return f"the header does not relate its axes to the patient (space: {fields.get('space', 'none')}): read as LPS"


def _read_nrrd_header(path: Path) -> _Header:
    with path.open("rb") as file:
        first, *lines = file.read(HEADER_BYTES).splitlines() or [b""]
    if not first.startswith(b"NRRD"):
        raise InputError("it is truncated or damaged (it does not start with NRRD).")
    fields: dict[str, str] = {}
    listed: list[str] = []
    for line in lines:
        text = line.decode("utf-8", "replace").strip()
        name, colon, value = text.partition(":")
        name = name.strip().lower()
        if not text:
            break
        if fields.get("data file", "").upper().startswith("LIST"):
            listed.append(text)
        elif colon and text[0] != "#" and value[:1] != "=":
            fields[NRRD_FIELDS.get("".join(name.split()), name)] = value.strip()
    return _Header(fields, listed, ": ")


def check_metaimage(path: Path) -> str:
    """Check the header of a MetaImage and the size of its data, and return a note if it has no spacing.

    Raises:
        ValueError: when spacings, directions or origin are not finite numbers of mm that make a grid, when there are
            several volumes, when a data file does not exist, or when voxels are missing.
    """
    header, start = _read_metaimage_header(path)
    fields = header.fields
    for names in META_FIELDS:
        spellings = {name.lower(): name for name in names}
        for name in fields if fields.keys().isdisjoint(names) else ():
            if known := spellings.get("".join(name.split()).lower()):
                header.refuse(name, f"the name of this field must be written {known}")
    sizes = header.numbers("DimSize")
    rank = len(sizes)
    if header.words("NDims") != [str(rank)]:  # ITK crashes if it is large
        header.refuse("NDims", f"DimSize has {rank} values")
    if rank > 4 or (sizes[3:] != 1).any():
        header.refuse("DimSize", "a file must contain one volume, so save each as its own file")
    if "DistanceUnits" in fields:
        header.check_unit("DistanceUnits", header.words("DistanceUnits"))
    spacing = next((name for name in META_SPACING if name in fields), None)
    if spacing:
        header.check_spacing(spacing, header.numbers(spacing, rank))
    for name in fields.keys() & META_DIRECTION:
        axes = header.numbers(name, rank**2).reshape(rank, rank).T
        header.check_axes(name, axes)
        if np.abs(np.linalg.norm(axes, axis=0) - 1).max() > UNIT_LENGTH_TOLERANCE:
            header.refuse(name, "each direction must have length 1, because ElementSpacing gives the spacing")
    for name in fields.keys() & META_ORIGIN:
        header.check_finite(name, header.numbers(name, rank))
    header.words("ElementDataFile")
    local = fields["ElementDataFile"].upper() == "LOCAL"
    files = [path] if local else header.data_files("ElementDataFile", path.parent)
    _check_metaimage_data(header, files, start if local else 0)
    return "" if spacing else NO_SPACING


def _check_metaimage_data(header: _Header, files: list[Path], start: int) -> None:
    """Refuse missing voxels: ITK prints lines about them on the screen, and takes damaged compressed data as voxels."""
    fields = header.fields
    width = META_BYTES.get(header.words("ElementType", 1)[0].removeprefix("MET_").removesuffix("_ARRAY"))
    channels, skipped, compressed_size = (
        int(header.numbers(name, 1)[0]) if name in fields else default
        for name, default in (("ElementNumberOfChannels", 1), ("HeaderSize", 0), ("CompressedDataSize", 0))
    )
    if start and skipped > 0 and skipped != start:
        header.refuse("HeaderSize", f"the header has {start} bytes, so leave this field out")
    if width is None or not files:
        return
    binary, packed = (
        fields.get(name, default)[:1] in ("T", "t", "1")
        for name, default in (("BinaryData", "T"), ("CompressedData", ""))
    )
    count = math.prod(map(int, header.numbers("DimSize"))) * channels // len(files)
    needed, unit = (count * width, "bytes") if binary else (count, "numbers")
    for path in files:
        with path.open("rb") as file:
            from_end = skipped < 0 and compressed_size
            file.seek(path.stat().st_size - compressed_size if from_end else max(skipped, start))
            if not binary:
                held = len(file.read().split())
            elif packed:
                held = _inflated_size(file, compressed_size if len(files) == 1 else 0)
            else:
                held = path.stat().st_size - file.tell()
        if held < needed:
            where = "it" if len(files) == 1 else shown(path.name)
            raise InputError(
                f"it is truncated or damaged (its header describes {needed} {unit} of voxels, but {where} contains "
                f"{held})."
            )


def _inflated_size(file: BinaryIO, size: int) -> int:
    """Return how many bytes the next ``size`` bytes of a file contain when decompressed; 0 takes all of them."""
    inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)  # zlib or gzip
    left, held = size or math.inf, 0
    while not inflate.eof and (chunk := file.read(int(min(CHUNK, left)))):
        left -= len(chunk)
        try:
            held += len(inflate.decompress(chunk))
        except zlib.error:
            raise InputError("it is truncated or damaged (its compressed data cannot be decompressed).") from None
    if not inflate.eof:
        raise InputError("it is truncated or damaged (its compressed data ends too early).")
    return held


def _read_metaimage_header(path: Path) -> tuple[_Header, int]:
    """Return the header, and where it ends."""
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    lines = iter(head.splitlines())
    end = re.search(rb"^[ \t]*ElementDataFile[^\n]*\n", head, re.MULTILINE)
    fields: dict[str, str] = {}
    for line in lines:
        name, *value = re.split("[=:]", line.decode("utf-8", "replace"), maxsplit=1)
        fields[name.strip()] = "".join(value).strip()
        if name.strip() == "ElementDataFile":
            break
    listed = fields.get("ElementDataFile", "").upper().startswith("LIST")
    files = [line.decode("utf-8", "replace").strip() for line in lines] if listed else []
    return _Header(fields, [name for name in files if name], " = "), end.end() if end else len(head)
