"""What an evaluation leaves in its folder: tables, summary, report, and the parts of it for a paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segbundles.files import write_json, write_table
from segbundles.metrics import METRIC_UNITS, SECTION_UNITS
from segbundles.metrics.segmentation import base_name
from segbundles.report.html import draw_distributions, write_report
from segbundles.report.parts import (
    SEQUENCE_COLUMNS,
    Part,
    Table,
    agreement_part,
    confidence_part,
    detection_part,
    group_rows,
    pooled_part,
    probability_part,
)
from segbundles.report.sections import limit_figures
from segbundles.report.tables import export
from segbundles.report.words import label
from segbundles.statistics import DETECTION_COLUMNS, ProbabilityCounts, group_names, probability_table, with_intervals

__all__ = ["write_evaluation"]

_FEW_GROUPS, _FEWEST_FOR_BOXES = 10, 5
_HIDDEN = ("content", "sequence", *(name for name in DETECTION_COLUMNS if name.endswith("iou50")), "predicted_objects")


def write_evaluation(
    folder: Path,
    *,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    unit: str = "groups",
    tables: Mapping[str, Table] | None = None,
    parts: Sequence[Part] = (),
    notes: Sequence[str] = (),
    figures: Mapping[str, bytes] | None = None,
    slices: Mapping[str, Mapping[str, Any]] | None = None,
    probabilities: Mapping[str, ProbabilityCounts] | None = None,
    run: Mapping[str, Any] | None = None,
    settings: Mapping[str, Sequence[Sequence[Any]]] | None = None,
    sort_by: str | None = None,
    classes: Mapping[str, str] | None = None,
    outlined_classes: int = 1,
) -> list[str]:
    """Write ``metrics.csv``, ``summary.json``, ``report.html``, further tables, and ``report`` with what a paper needs.

    Args:
        folder: folder to write to.
        title: heading of the report.
        rows: one per case: ``case``, ``group`` (empty where it has none), ``status``, metrics and other columns.
        summary: as from :func:`segbundles.metrics.summarize`; metrics get their intervals over the groups.
        unit: what a group is, in the plural, such as patients.
        tables: further tables by file name.
        parts: further parts of the report.
        notes: paragraphs under the heading.
        figures: picture of each case.
        slices: slices of each case, see :func:`segbundles.report.write_report`.
        probabilities: counts of the pixels of each group; they are also written to ``probabilities.csv``.
        run: how the evaluation was run, for ``summary.json``.
        settings: tables of the settings for the report.
        sort_by: metric that orders the cases.
        classes: name of each class, by its number.
        outlined_classes: number of foreground classes that the figures outline; 0 for figures that explain themselves.

    Returns:
        Lines that should also be logged.

    Raises:
        ValueError: when a file cannot be written.
    """
    groups = [row.get("group") for row in rows]
    classes = classes or {}
    summary = with_intervals(summary, rows, groups)
    metrics = {name: entry for name, entry in summary.items() if isinstance(entry, dict) and "mean" in entry}
    number = len({*group_names(groups)})
    known = all(groups)
    singular = unit.removesuffix("s")
    summary |= {"unit": unit if known else "cases", "groups": number}
    own = [
        agreement_part(rows, classes),
        detection_part(rows, "case"),
        confidence_part(rows),
        probability_part(probabilities, " or ".join(name for k, name in classes.items() if k != "0") or "foreground"),
    ]
    pooled = pooled_part(rows)
    parts = [*([pooled] if pooled else []), *parts, *filter(None, own)]
    if known and 1 < number < len(rows) and not any(unit in part.tables for part in parts):
        per_case = [name for name in metrics if any(name in row for row in rows)]
        table = (["group", "cases", "failures", *per_case], group_rows(rows, per_case))
        parts.insert(0, Part(unit.capitalize(), ["Means over the cases of each."], {unit: table}))
    for part in parts:
        summary |= part.summary
    summary |= {"run": dict(run)} if run else {}

    tables = {"metrics.csv": (list(dict.fromkeys(key for row in rows for key in row)), rows), **(tables or {})}
    if pooled:
        tables["sequences.csv"] = (SEQUENCE_COLUMNS, pooled.summary["sequences"])
    if probabilities:
        tables["probabilities.csv"] = probability_table(probabilities)
    for file, table in tables.items():
        write_table(folder / file, *table)
    write_json(folder / "summary.json", summary)
    boxes = number >= _FEWEST_FOR_BOXES
    few = _few_groups(len(rows), number, unit) if known else []
    units = METRIC_UNITS | SECTION_UNITS
    said = f"Unit of analysis: {number} {unit if number > 1 else singular}."
    if not known:
        said = "Unit of analysis: the case. The list of cases contains no groups, so each case counts by itself."
    if not known and any(groups):
        alone = sum(not group for group in groups)
        kind = "is a single case" if alone == 1 else "are single cases"
        said = f"Unit of analysis: {number} {unit}, of which {alone} {kind} without a group."
    headings = {name: label(name, classes, units.get(base_name(name), "")) for name in metrics}
    plots = draw_distributions(rows, headings, [*metrics], boxes)
    columns = ("metric", "mean", "low", "high", "sd", "median", "worst", "n", "left_out")
    means = [{**entry, "metric": headings[name]} for name, entry in metrics.items()]
    export(
        folder / "report",
        {"summary": (columns, means), **{name: table for part in parts for name, table in part.tables.items()}},
        {f"distribution_{name}": plot for name, plot in plots.items()}
        | {name: figure for part in parts for name, figure in part.figures.items()},
    )
    class_names = [classes.get(str(k), f"class {k}") for k in range(1, outlined_classes + 1)]
    write_report(
        folder / "report.html",
        title=title,
        rows=rows,
        figures=dict(zip(figures, limit_figures([*figures.values()]), strict=True)) if figures else None,
        slices=slices,
        summary=metrics,
        units={name: found for name in metrics if (found := units.get(base_name(name)))},
        notes=[said, *few, *notes],
        settings=settings,
        sort_by=sort_by,
        class_names=class_names if outlined_classes > 1 else None,
        outlines=outlined_classes > 0,
        parts=parts,
        headings={
            "group": singular if known and any(row["group"] != row["case"] for row in rows) else None,
            **dict.fromkeys(_HIDDEN),
            **dict.fromkeys(name for row in rows for name in row if name.startswith("pixels_")),
        },
        classes=classes,
        plots=plots,
        boxes=boxes,
    )
    return few


def _few_groups(cases: int, groups: int, unit: str) -> list[str]:
    """Return a note if there are fewer than five groups, or fewer than ten and several cases belong to one."""
    one = unit.removesuffix("s")
    counted = f"{groups} {unit if groups > 1 else one}"
    if groups < min(_FEW_GROUPS, cases):
        return [
            f"These {cases} cases belong to {counted}: cases of one {one} resemble each other. With fewer than "
            f"{_FEW_GROUPS} {unit}, the figures say little about others."
        ]
    if groups < _FEWEST_FOR_BOXES:
        return [f"All cases belong to {counted}: the figures say little about others, and there are no box plots."]
    return []
