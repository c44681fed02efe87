"""Measurements as columns of a table and as words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["columns", "describe", "summarize"]


def columns(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return measurements as cells of a table's row.

    Args:
        measured: as from :func:`segbundles.measurements.measure`.

    Returns:
        One cell per number, such as ``volume_ml_left_atrium``: the name of the quantity, and of its class where it has
        one. Ranges of slices are text, ``12-40``; of a list of parts only the number is a cell.
    """
    cells: dict[str, Any] = {}
    for name, values in measured.get("classes", {}).items():
        for quantity, value in values.items():
            if quantity == "slices":
                value = "-".join(map(str, value or ()))
            elif isinstance(value, Sequence) and not isinstance(value, str):
                if quantity != "parts":
                    continue
                value = len(value)
            cells[f"{quantity}_{name.replace(' ', '_')}"] = "" if value is None else value
    return cells | {key: value for key, value in measured.items() if isinstance(value, int | float)}


def describe(measured: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return measurements for a person: what is measured, and its size in words, the most important first.

    Args:
        measured: as from :func:`segbundles.measurements.measure`.
    """
    lines = []
    for name, values in measured.get("classes", {}).items():
        if not values.get("voxels", values.get("pixels")):
            lines.append((name, "not found"))
            continue
        said = (say(values) for quantity, say in _WORDS.items() if values.get(quantity) is not None)
        lines.append((name, ", ".join(filter(None, said))))
    if "cells" in measured:
        sections = len(measured["cells_per_section"])
        lines.append(("cells", f"{measured['cells']}" + (f" in {sections} sections" if sections > 1 else "")))
        lines.append(("membrane", f"{100 * measured['membrane_fraction']:.1f} % of the area"))
        if measured.get("pixel_nm"):
            lines.append(("pixel size", f"{measured['pixel_nm']:.4g} nm"))
    return lines


def summarize(measured: Mapping[str, Any]) -> str:
    """Return what was found in a few words, such as ``left atrium: 133.6 ml``."""
    return "; ".join(f"{name}: {text.split(', ')[0]}" for name, text in describe(measured))


def _parts(values: Mapping[str, Any]) -> str:
    if "part_volumes_ml" in values:
        sizes = ", ".join(f"{size:.1f}" for size in values["part_volumes_ml"][:5])
        more = ", ..." if values["parts"] > 5 else ""
        return f"{values['parts']} parts of {sizes}{more} ml" if values["parts"] > 1 else "in one part"
    count = values["parts"] if isinstance(values["parts"], int) else len(values["parts"])
    return f"{count} parts" if count > 1 else "in one part"


_WORDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "volume_ml": lambda values: f"{values['volume_ml']:.1f} ml",
    "fraction": lambda values: f"{100 * values['fraction']:.2g} % of the image",
    "parts": _parts,
    "extent_mm": lambda values: f"{values['extent_mm']:.0f} mm at its longest",
    "sphericity": lambda values: f"sphericity {values['sphericity']:.2f}",
    "slices": lambda values: "slices {} to {}".format(*values["slices"]),
}
