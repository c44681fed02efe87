"""The evaluation report: one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image, UnidentifiedImageError

from segbundles.errors import fail
from segbundles.facts import versions
from segbundles.files import atomic_path
from segbundles.metrics import higher_is_better
from segbundles.report.overlay import PREDICTION_COLOURS, TRUTH_COLOURS
from segbundles.report.parts import Part
from segbundles.report.plots import distribution_svg
from segbundles.report.words import glossary, label
from segbundles.statistics import over_cases

__all__ = ["write_page", "write_report"]

_UNDEFINED = "\N{EM DASH}"
_NO_FAILURE = ("ok", "empty", "one class")


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    figures: Mapping[str, bytes] | None = None,
    slices: Mapping[str, Mapping[str, Any]] | None = None,
    summary: Mapping[str, Mapping[str, float | None]],
    units: Mapping[str, str] | None = None,
    notes: str | Sequence[str] | None = None,
    settings: Mapping[str, Sequence[Sequence[Any]]] | None = None,
    sort_by: str | None = None,
    class_names: Sequence[str] | None = None,
    outlines: bool = True,
    parts: Sequence[Part] = (),
    headings: Mapping[str, str | None] | None = None,
    classes: Mapping[str, str] | None = None,
    plots: Mapping[str, bytes] | None = None,
    boxes: bool = True,
) -> Path:
    """Write the report of an evaluation as one HTML page that needs no other file and no network.

    The page has the summary table, one distribution plot per metric, further parts, a table of all cases, a picture of
    each case and a glossary. Metrics and columns have the headings of :func:`segbundles.report.label`.
    The worst cases come first: failures (a status other than "ok", "empty" or "one class", or no value of ``sort_by``),
    then all others by ``sort_by`` (:func:`higher_is_better` gives the direction), then empty cases without a value. The
    page is written to a temporary file and renamed, so there is never an incomplete page at ``path``.

    Args:
        path: file to write; missing folders are created, an existing file is replaced.
        title: heading of the page, which says what was evaluated.
        rows: one dict per case: "case" (its name, unique), metrics (None and NaN mean undefined), "status" (default:
            "missed" if a metric is undefined, else "ok") and any other columns.
        figures: picture of each case (JPEG, PNG or WebP, as from :func:`case_figure`); not every case needs one.
        slices: the slices of each case, as from :func:`case_slices`, for a slider below its picture; not every case
            needs them.
        summary: "mean", "low" and "high" (its interval), "sd", "median", "worst" and "n" of each metric; missing values
            are shown as undefined. A metric that is in no row (such as one pooled over the cases) is only shown in the
            summary, with "counted", what its n counts.
        units: unit of each metric that has one, such as {"hd95": "mm"}.
        notes: paragraphs below the heading.
        settings: tables of the evaluation's settings by heading, shown at the end with the versions of the libraries.
            The first cell of a row is its name; text is shown unchanged, other values as JSON.
        sort_by: metric that orders the cases. Defaults to the first metric in the rows.
        class_names: names of classes 1, 2, ... for the legend; None for a single foreground class.
        outlines: whether the figures outline truth and prediction, so that the page needs a legend.
        parts: further parts, shown after the distributions.
        headings: headings of columns that are called otherwise here, such as {"group": "patient"}. None hides a column.
        classes: name of each class, by its number, for headings.
        plots: distribution plot of each metric as an SVG document; None draws them.
        boxes: whether the distributions have box plots; without, they only show the cases.

    Returns:
        The path written.

    Raises:
        ValueError: when there are no rows, a case has no name or the name of another, ``sort_by`` is not a metric of
            the rows, a figure or slices belong to no case, a figure is not a picture, or the file cannot be written.
    """
    figures, slices, units, headings = figures or {}, slices or {}, units or {}, headings or {}
    metrics = list(summary)
    _check_cases(rows, {"figures": figures, "slices": slices})
    per_case = [name for name in metrics if any(name in row for row in rows)]
    if sort_by is None and per_case:
        sort_by = per_case[0]
    if sort_by is not None and sort_by not in per_case:
        fail(f"sort_by must be a metric of the rows ({', '.join(per_case)}), got {sort_by!r}.")

    shown = (column for part in parts for columns, _ in part.tables.values() for column in columns)
    names = dict.fromkeys([*metrics, *(key for row in rows for key in row), *shown])
    labels = {name: headings.get(name) or label(name, classes, units.get(name, "")) for name in names}
    digits = {name: _digits(name, rows, summary, units) for name in metrics}
    cases = []
    for row in sorted(rows, key=lambda row: _badness(row, per_case, sort_by)):
        name = row["case"]
        shown = {"figure": _figure(figures.get(name)), "slices": slices.get(name)}
        cases.append({"row": row, "status": _status(row, per_case), **shown})
    place = {case["row"]["case"]: k for k, case in enumerate(cases, 1)}

    if plots is None:
        plots = draw_distributions(rows, labels, metrics, boxes)
    hidden = ("case", "status", *per_case, *(name for name, heading in headings.items() if heading is None))
    columns = dict.fromkeys(key for row in rows for key in row if key not in hidden and row[key] not in ("", None))
    rows = [{**row, "status": _status(row, per_case)} for row in rows]
    software = {"python": platform.python_version(), **versions(), "numpy": np.__version__}
    return write_page(
        path,
        "report.html.j2",
        "report.js.j2",
        {
            "cell": lambda value, name=None: _text(value, digits.get(name)),
            "breakable": lambda name: escape(name).replace("_", Markup("_<wbr>")),
            "svg": _svg_source,
        },
        title=title,
        notes=[notes] if isinstance(notes, str) else list(notes or []),
        statuses=Counter(case["status"] for case in cases).most_common(),
        ok=_NO_FAILURE,
        cases=cases,
        metrics=[
            {"name": name, "plot": plots.get(name), **_describe(name, labels[name], rows, summary, digits)}
            for name in metrics
        ],
        labels=labels,
        parts=parts,
        boxes=boxes,
        intervals=any(entry.get("low") is not None for entry in summary.values()),
        glossary=glossary([*metrics, *columns]),
        per_case=per_case,
        other_columns=list(columns),
        numeric={key: all(_is_number(row.get(key, math.nan)) for row in rows) for key in columns},
        undefined_mark=_UNDEFINED,
        place=place,
        sort_by=sort_by,
        has_figures=bool(figures),
        legend=_legend(class_names) if outlines else [],
        settings={
            heading: [[_setting(cell) for cell in row] for row in table]
            for heading, table in {**(settings or {}), "Versions": software.items()}.items()
        },
    )


def draw_distributions(
    rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str], metrics: Sequence[str], boxes: bool
) -> dict[str, bytes]:
    """Return the distribution plot of each metric that has values, see :func:`distribution_svg`."""
    plots = {}
    for name in metrics:
        if values := [float(row[name]) for row in rows if _is_defined(row.get(name))]:
            plots[name] = distribution_svg(values, f"{labels[name]}, {_count(len(values), len(rows))}", boxes)
    return plots


def write_page(
    path: str | os.PathLike[str],
    template: str,
    script: str | None = None,
    filters: Mapping[str, Callable[..., Any]] | None = None,
    **values: Any,
) -> Path:
    """Write a page from the templates of this folder; no script but its own may run on it.

    Args:
        path: file to write; missing folders are created, an existing file is replaced.
        template: file name of the page's template.
        script: file name of the template of its script; None for a page without one.
        filters: further filters of the template.
        values: what the template shows, besides the ``date``.

    Returns:
        The path written.

    Raises:
        ValueError: when the file cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    code = environment.get_template(script).render() if script else ""
    page = environment.get_template(template).render(
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        script=code,
        script_hash=base64.b64encode(hashlib.sha256(code.encode()).digest()).decode(),
        **values,
    )
    with atomic_path(path) as part:
        part.write_text(page, encoding="utf-8", errors="backslashreplace")
    return Path(path)


def _check_cases(rows: Sequence[Mapping[str, Any]], pictures: Mapping[str, Mapping[str, Any]]) -> None:
    if not rows:
        fail("rows is empty: there is no case to report.")
    names = Counter(row.get("case") for row in rows)
    if None in names:
        fail(f'every row needs "case", the name of its case; got a row with only {_keys_without_case(rows)}.')
    if repeated := [name for name, count in names.items() if count > 1]:
        fail(f"case names must differ, got more than one {repeated[0]!r}: put the folder into the name.")
    for kind, given in pictures.items():
        if strays := [name for name in given if name not in names]:
            fail(f"{kind} has a picture for {strays[0]!r}, which is not a case of rows.")


def _keys_without_case(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return next(list(row) for row in rows if row.get("case") is None)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_defined(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _status(row: Mapping[str, Any], per_case: Sequence[str]) -> str:
    undefined = any(not _is_defined(row.get(name)) for name in per_case)
    return str(row.get("status") or ("missed" if undefined else "ok"))


def _badness(row: Mapping[str, Any], per_case: Sequence[str], sort_by: str | None) -> tuple[int, float]:
    """Return a sort key, which is smallest for the worst case."""
    status, value = _status(row, per_case), row.get(sort_by)
    if not _is_defined(value):
        return (2 if status in _NO_FAILURE[1:] or sort_by is None else 0), 0.0
    return int(status in _NO_FAILURE), value if higher_is_better(sort_by) else -value


def _digits(name: str, rows: Sequence[Mapping], summary: Mapping[str, Mapping], units: Mapping[str, str]) -> int:
    values = [row.get(name) for row in rows] + [summary.get(name, {}).get(key) for key in ("mean", "worst")]
    fraction = name not in units and all(abs(value) <= 1 for value in values if _is_defined(value))
    return 3 if fraction else 2


def _text(value: Any, digits: int | None = None) -> str:
    if value is None or (_is_number(value) and not math.isfinite(value)):
        return _UNDEFINED
    if isinstance(value, Integral) or not _is_number(value):
        return str(value)
    if digits is not None:
        return f"{value:.{digits}f}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _describe(
    name: str,
    label: str,
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Mapping[str, float | None]],
    digits: Mapping[str, int],
) -> dict[str, Any]:
    """Collect what the page shows about one metric."""
    higher = higher_is_better(name)
    defined = {row["case"]: float(row[name]) for row in rows if _is_defined(row.get(name))}
    described = {
        "label": label,
        "better": "higher" if higher else "lower",
        "count": _count(len(defined), len(rows)),
        "arrow": "\N{UPWARDS ARROW}" if higher else "\N{DOWNWARDS ARROW}",
        "worst_case": (min if higher else max)(defined, key=defined.get) if defined else None,
    }
    found = summary.get(name, {})
    described |= {key: _text(found.get(key), digits[name]) for key in ("mean", "sd", "median", "worst")}
    described["interval"] = _UNDEFINED
    if found.get("low") is not None:
        described["interval"] = " to ".join(_text(found[key], digits[name]) for key in ("low", "high"))
    if any(name in row for row in rows):
        described["n"] = over_cases(rows, name).replace(" cases", "")
    else:
        described["n"] = f"{_text(found.get('n'))} {found.get('counted', '')}".strip()
    return described


def _count(defined: int, cases: int) -> str:
    return f"n = {defined}" + (f" of {cases}" if defined < cases else "")


def _svg_source(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _figure(picture: bytes | None) -> dict[str, Any] | None:
    if picture is None:
        return None
    try:
        with Image.open(io.BytesIO(picture)) as opened:
            (width, height), mime = opened.size, opened.get_format_mimetype()
    except UnidentifiedImageError:
        fail(f"a figure must be the bytes of a picture, got {picture[:20]!r}...")
    return {"source": f"data:{mime};base64,{base64.b64encode(picture).decode()}", "width": width, "height": height}


def _legend(class_names: Sequence[str] | None) -> list[dict[str, str]]:
    entries = []
    for k, name in enumerate(class_names or [""]):
        truth, prediction = TRUTH_COLOURS[k % len(TRUTH_COLOURS)], PREDICTION_COLOURS[k % len(PREDICTION_COLOURS)]
        entries.append({"name": name, "truth": f"rgb{truth}", "prediction": f"rgb{prediction}"})
    return entries


def _setting(value: Any) -> str:
    if isinstance(value, Mapping):
        parts = (f"({_setting(part)})" if isinstance(part, Mapping) else _setting(part) for part in value.values())
        return ", ".join(f"{key}: {part}" for key, part in zip(value, parts, strict=True))
    return value if isinstance(value, str) else json.dumps(value, default=str)
