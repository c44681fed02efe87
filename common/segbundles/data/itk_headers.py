"""Checks on the headers of NRRD and MetaImage, because ITK ignores units and replaces NaN spacings by 1."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from segbundles.errors import InputError

__all__ = ["axes_fault", "check_metaimage", "check_nrrd"]

HEADER_BYTES = 2**22
UNIT_LENGTH_TOLERANCE = 1e-3
FLAT = 1e-3  # volume of a box with edges of length 1
MM = ("", "mm", "millimeter", "millimeters", "millimetre", "millimetres", "?", "???")
NRRD_ALIASES = {"axismins": "axis mins", "axismaxs": "axis maxs", "datafile": "data file"}
# kinds of axes that ITK takes as axes of space; it makes channels of one axis of another kind
NRRD_DOMAIN = ("domain", "space", "???", "none")
NRRD_ANATOMICAL = {
    *("left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las"),
}
NRRD_SPACES = {*NRRD_ANATOMICAL, "scanner-xyz", "3d-right-handed", "3d-left-handed"}


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

    def check_data_files(self, name: str, folder: Path) -> None:
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


def check_nrrd(path: Path) -> str:
    """Check the header of a NRRD file, and return a note if it does not relate its axes to the patient.

    Raises:
        ValueError: when spacings, directions or origin are not finite numbers of mm that make a grid, when there are
            more than three axes of space, or when a data file does not exist.
    """
    header = _read_nrrd_header(path)
    fields = header.fields
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
        header.check_data_files("data file", path.parent)
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
            fields[NRRD_ALIASES.get(name, name)] = value.strip()
    return _Header(fields, listed, ": ")


def check_metaimage(path: Path) -> None:
    """Check the header of a MetaImage.

    Raises:
        ValueError: when spacings, directions or origin are not finite numbers of mm that make a grid, when there are
            several volumes, or when a data file does not exist.
    """
    header = _read_metaimage_header(path)
    fields = header.fields
    sizes = header.numbers("DimSize")
    rank = len(sizes)
    if header.words("NDims") != [str(rank)]:  # ITK crashes if it is large
        header.refuse("NDims", f"DimSize has {rank} values")
    if rank > 4 or (sizes[3:] != 1).any():
        header.refuse("DimSize", "a file must contain one volume, so save each as its own file")
    if "DistanceUnits" in fields:
        header.check_unit("DistanceUnits", header.words("DistanceUnits"))
    spacing = next((name for name in ("ElementSpacing", "ElementSize") if name in fields), None)
    if spacing:
        header.check_spacing(spacing, header.numbers(spacing, rank))
    for name in {"TransformMatrix", "Rotation", "Orientation"} & fields.keys():
        axes = header.numbers(name, rank**2).reshape(rank, rank).T
        header.check_axes(name, axes)
        if np.abs(np.linalg.norm(axes, axis=0) - 1).max() > UNIT_LENGTH_TOLERANCE:
            header.refuse(name, "each direction must have length 1, because ElementSpacing gives the spacing")
    for name in {"Offset", "Position", "Origin"} & fields.keys():
        header.check_finite(name, header.numbers(name, rank))
    if fields.get("ElementDataFile", "").upper() != "LOCAL":
        header.words("ElementDataFile")
        header.check_data_files("ElementDataFile", path.parent)


def _read_metaimage_header(path: Path) -> _Header:
    with path.open("rb") as file:
        lines = iter(file.read(HEADER_BYTES).splitlines())
    fields: dict[str, str] = {}
    for line in lines:
        name, *value = re.split("[=:]", line.decode("utf-8", "replace"), maxsplit=1)
        fields[name.strip()] = "".join(value).strip()
        if name.strip() == "ElementDataFile":
            break
    listed = fields.get("ElementDataFile", "").upper().startswith("LIST")
    files = [line.decode("utf-8", "replace").strip() for line in lines] if listed else []
    return _Header(fields, [name for name in files if name], " = ")
