"""The page of a comparison."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segbundles.metrics import higher_is_better
from segbundles.report.html import _figure, _setting, _text, write_page
from segbundles.report.plots import agreement_svg
from segbundles.report.tables import export
from segbundles.report.words import label
from segbundles.statistics import difference_line

__all__ = ["write_comparison"]

_PLOTS = 4


def write_comparison(
    path: Path,
    *,
    summary: Mapping[str, Any],
    values: Mapping[str, np.ndarray],
    units: Mapping[str, str],
    changed: Sequence[tuple[str, Sequence[bytes | None], int]],
    classes: Mapping[str, str] | None = None,
) -> None:
    """Write the page of a comparison, which needs no other file and no network; ``report`` beside it has its parts.

    Args:
        path: file to write.
        summary: see :func:`segbundles.comparison.compare`.
        values: each metric as (evaluations, cases), in the order of the page.
        units: unit of each metric, empty where it has none.
        changed: the cases that changed most: name, its picture in each evaluation, and its place in ``values``.
        classes: name of each class, by its number.

    Raises:
        ValueError: when the file cannot be written.
    """
    labels = {name: label(name, classes, unit) for name, unit in units.items()}
    letters = [one["letter"] for one in summary["evaluations"]]
    plots = {
        f"{name}_{letter}": agreement_svg(
            found[0], found[number], f"{labels[name]} of A", f"{labels[name]} of {letter}"
        )
        for number, letter in enumerate(letters[1:], 1)
        for name, found in list(values.items())[:_PLOTS]
        if not np.isnan(found[[0, number]]).all()
    }
    name, first = next(iter(values.items()))
    differences = summary["differences"]
    export(path.parent / "report", {"differences": ([*differences[0]], differences)}, plots)
    write_page(
        path,
        "compare.html.j2",
        filters={"number": lambda value: _text(value, 3), "setting": _setting},
        difference=difference_line,
        higher=higher_is_better,
        summary=summary,
        labels=labels,
        letters=letters,
        ordered_by=labels[name],
        plots=[f"data:image/svg+xml;base64,{base64.b64encode(plot).decode()}" for plot in plots.values()],
        changed=[
            {"case": case, "figures": [_figure(one) for one in pictures], "values": first[:, place].tolist()}
            for case, pictures, place in changed
        ],
    )
