"""Tables and figures to take into a paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segbundles.files import atomic_path, write_table

__all__ = ["export", "to_latex"]

_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_SPECIAL |= {character: f"\\{character}" for character in "&%$#_{}"}


def export(
    folder: Path,
    tables: Mapping[str, tuple[Sequence[str], Sequence[Mapping[str, Any]]]],
    figures: Mapping[str, bytes] | None = None,
) -> None:
    """Write tables as ``<name>.csv`` and ``<name>.tex``, and figures as ``<name>.svg``.

    Args:
        folder: folder to write to.
        tables: columns and rows by name.
        figures: SVG documents by name.

    Raises:
        ValueError: when a file cannot be written.
    """
    for name, (columns, rows) in tables.items():
        write_table(folder / f"{name}.csv", columns, rows)
        with atomic_path(folder / f"{name}.tex") as part:
            part.write_text(to_latex(columns, rows), encoding="utf-8")
    for name, figure in (figures or {}).items():
        with atomic_path(folder / f"{name}.svg") as part:
            part.write_bytes(figure)


def to_latex(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table in LaTeX, for the package booktabs.

    Args:
        columns: names of the columns, in their order; they are also the headings.
        rows: one dictionary per row. None, NaN and missing values become a dash.
    """
    numeric = [all(_is_number(row.get(name)) or _undefined(row.get(name)) for row in rows) for name in columns]
    lines = [r"\begin{table}", r"\centering"]
    lines += [f"\\begin{{tabular}}{{{''.join('r' if one else 'l' for one in numeric)}}}", r"\toprule"]
    lines += [" & ".join(map(_escaped, columns)) + r" \\", r"\midrule"]
    lines += [" & ".join(_cell(row.get(name)) for name in columns) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _undefined(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _cell(value: Any) -> str:
    if _undefined(value):
        return "--"
    return f"{value:.3f}" if isinstance(value, float) else _escaped(str(value))


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in text)
