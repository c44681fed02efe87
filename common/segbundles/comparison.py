"""Compare evaluations of the same cases: paired differences, and the cases that changed most."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segbundles.datasets.splits import shorten
from segbundles.errors import fail
from segbundles.evaluations import PastEvaluation, case_figures, metric_names, read_evaluation
from segbundles.files import write_json, write_table
from segbundles.metrics import METRIC_UNITS, SECTION_UNITS, higher_is_better
from segbundles.metrics.segmentation import base_name
from segbundles.statistics import paired_difference

__all__ = ["compare"]

_MOST_CHANGED = 6
_FAILURES = ("missed", "false positive")
_PLACES = ("output_dir", "ckpt_dir", "bundle_root", "dataset_dir")  # not what was done, but where


def compare(folders: Sequence[str | Path], out: str | Path) -> dict[str, Any]:
    """Compare evaluations with the first one, case by case; write ``compare.csv``, ``.json`` and ``.html`` to ``out``.

    ``out/report`` has the table of differences as CSV and LaTeX, and the figures as SVG.

    Args:
        folders: two or more folders of ``segbundles evaluate`` or ``crossvalidate``. They are called A, B and so on.
        out: folder to write to.

    Returns:
        The contents of ``compare.json``: ``evaluations`` (``letter``, ``folder``, ``failures``, ``command`` and
        ``differs``, the knobs and weights that are not the same in all), ``groups``, ``unit``, and
        ``differences``, one row per evaluation after the first and metric, with ``letter``, ``metric`` and what
        :func:`segbundles.statistics.paired_difference` returns; its ``before`` is A.

    Raises:
        ValueError: when a folder has no evaluation, the cases differ, or no metric is in all of them.
    """
    from segbundles.report.compare import write_comparison

    if len(folders) < 2:
        fail(f"compare needs two evaluations or more, got {len(folders)}.")
    past = [read_evaluation(folder) for folder in folders]
    letters = [chr(ord("A") + number) for number in range(len(past))]
    cases = _same_cases(past)
    first = past[0].rows
    names = [name for name in metric_names(first) if all(name in metric_names(one.rows) for one in past)]
    if not names:
        fail(f"{past[0].folder} and the others have no metric in common: compare evaluations of one task.")
    groups = [row.get("group") or row.get("sequence") or "" for row in first]
    values = {name: np.array([[row[case][name] for case in cases] for row in map(_by_case, past)]) for name in names}
    differences = [
        {"letter": letter, "metric": name, **paired_difference(values[name][0], values[name][number], groups, higher)}
        for number, letter in enumerate(letters[1:], 1)
        for name in names
        for higher in [higher_is_better(name)]
    ]
    summary = {
        "evaluations": [
            {"letter": letter, "folder": str(one.folder), "failures": _failures(one), **more}
            for letter, one, more in zip(letters, past, _what_differs(past), strict=True)
        ],
        "cases": len(cases),
        "groups": len({*groups}) if all(groups) else len(cases),
        "unit": past[0].summary.get("unit", "groups") if all(groups) else "cases",
        "differences": differences,
    }
    table = [
        {
            "case": case,
            "group": groups[place],
            **{f"{name}_{x}": values[name][k][place] for name in names for k, x in enumerate(letters)},
            **{f"status_{x}": _by_case(one)[case].get("status", "") for x, one in zip(letters, past, strict=True)},
        }
        for place, case in enumerate(cases)
    ]
    write_table(Path(out, "compare.csv"), [*table[0]], table)
    write_json(Path(out, "compare.json"), summary)
    figures = [case_figures(one.folder) for one in past]
    changed = _most_changed(values[names[0]])
    units = METRIC_UNITS | SECTION_UNITS
    write_comparison(
        Path(out, "compare.html"),
        summary=summary,
        values=values,
        units={name: units[base_name(name)] for name in names},
        changed=[(cases[place], [pictures.get(cases[place]) for pictures in figures], place) for place in changed],
        classes=past[0].summary.get("run", {}).get("classes"),
    )
    return summary


def _by_case(evaluation: PastEvaluation) -> dict[str, dict[str, Any]]:
    return {row["case"]: row for row in evaluation.rows}


def _same_cases(past: Sequence[PastEvaluation]) -> list[str]:
    """Return the cases of all evaluations, in the order of the first; refuse any that is not in all."""
    first = _by_case(past[0])
    for other in past[1:]:
        rows = _by_case(other)
        for one, names in ((other, first.keys() - rows), (past[0], rows.keys() - first)):
            if names:
                fail(
                    f"{past[0].folder} and {other.folder} scored different cases: {shorten(sorted(names))} not in "
                    f"{one.folder}. Evaluate both on the same split of the same data."
                )
        contents = {name: [rows[name].get("content"), first[name].get("content")] for name in first}
        if differing := [name for name, both in contents.items() if all(both) and both[0] != both[1]]:
            fail(
                f"{shorten(differing)} of {past[0].folder} and of {other.folder} have the same name but another image "
                "or label. Evaluate both on the same data."
            )
    return [*first]


def _failures(evaluation: PastEvaluation) -> dict[str, int]:
    statuses = [row.get("status") for row in evaluation.rows]
    return {name: statuses.count(name) for name in _FAILURES}


def _what_differs(past: Sequence[PastEvaluation]) -> list[dict[str, Any]]:
    """Return command, and the knobs and weights that are not the same in all evaluations."""
    found = []
    for one in past:
        weights = {knob: f"sha256 {entry['sha256']}" for knob, entry in one.record.get("weights", {}).items()}
        found.append({**one.record.get("knobs", {}), **weights})
    names = [name for name in dict.fromkeys(key for knobs in found for key in knobs) if name not in _PLACES]
    differing = [name for name in names if any(knobs.get(name) != found[0].get(name) for knobs in found)]
    return [
        {"command": one.record.get("command", ""), "differs": {name: knobs.get(name) for name in differing}}
        for one, knobs in zip(past, found, strict=True)
    ]


def _most_changed(values: np.ndarray) -> list[int]:
    """Return the cases that changed most: first those with a value in some evaluations alone, then by difference."""
    known = ~np.isnan(values)
    partly = known.any(0) & ~known.all(0)
    spread = np.where(known.all(0), values.max(0) - values.min(0), np.where(partly, np.inf, 0.0))
    order = np.argsort(-spread, kind="stable")
    return [int(place) for place in order[:_MOST_CHANGED] if spread[place] > 0]
