"""What unseen cases say about the confidence of weights: ``segbundles calibrate``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segbundles.calibration.cases import Case, evaluation_folders, read_cases
from segbundles.calibration.fitting import (
    CANDIDATES,
    fit,
    fit_probabilities,
    lower_margin,
    review_limit,
    usual_ranges,
)
from segbundles.calibration.judging import out_of_fold, parts_of, simplest
from segbundles.confidence import FAILURES
from segbundles.errors import fail
from segbundles.facts import facts_path, read_facts
from segbundles.files import read_json, write_json
from segbundles.statistics import Interval, judge_confidence, short

__all__ = [
    "CANDIDATES",
    "Case",
    "calibrate",
    "evaluation_folders",
    "expected_by",
    "fit",
    "fit_probabilities",
    "lower_margin",
    "out_of_fold",
    "parts_of",
    "read_cases",
    "review_limit",
    "simplest",
    "summary_lines",
    "summary_rows",
    "usual_ranges",
]


def calibrate(
    root: Path,
    folder: str | Path,
    weights: str | Path,
    record: str | Path | None = None,
    track: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """Calibrate the confidence of weights: write it into their facts, and how well it does on unseen cases.

    Everything is measured on unseen cases: the network was not trained with them, and what is fitted for a case is
    fitted without its group.

    Args:
        root: folder of the bundle.
        folder: see :func:`evaluation_folders`.
        weights: the weights, with facts beside them.
        record: JSON file to write the comparison to; None writes ``folder/confidence.json``.
        track: shows progress through the cases.

    Returns:
        The record, see docs/confidence.md.

    Raises:
        ValueError: when predictions or facts are missing, or there are fewer than two groups.
    """
    score, facts = expected_by(root), read_facts(weights)
    if facts is None:
        fail(f"{weights} has no facts beside it, {facts_path(weights).name}: confidence is a fact of the weights.")
    cases = read_cases(root, folder, score, track)
    groups, true = [case.group for case in cases], np.array([case.score for case in cases])
    if len(set(groups)) < 2:
        fail(f"{folder} has cases of one group only: a confidence needs at least two.")
    found = {name: out_of_fold(cases, name, score) for name in CANDIDATES}
    columns = {
        name: [[row[key] for row in rows] for key in ("confidence", "confidence_low", "review")]
        for name, rows in found.items()
    }
    judged = {
        name: judge_confidence(column[0], true, groups, FAILURES[score], *column[1:])
        for name, column in columns.items()
    }
    chosen = simplest({name: column[0] for name, column in columns.items()}, true, groups, FAILURES[score])
    fitted = fit(cases, chosen, score)
    about = {
        "candidate": chosen,
        "cases": len(cases),
        "groups": len(set(groups)),
        "folds": len({case.fold for case in cases}),
    }
    result = {
        "bundle": root.name,
        "weights_sha256": facts["sha256"],
        "score": score,
        "failure_below": FAILURES[score],
        **about,
        "mean_score": float(true.mean()),
        **{key: fitted[key] for key in ("temperature", "shift", "margin", "low")},
        "measured": judged[chosen],
        "candidates": judged,
        "cases_scored": [
            {"case": case.name, "group": case.group, "fold": case.fold, "score": case.score, **row}
            for case, row in zip(cases, found[chosen], strict=True)
        ],
    }
    write_json(facts_path(weights), read_json(facts_path(weights)) | {"confidence": {**fitted, **about}})
    write_json(Path(record or Path(folder, "confidence.json")), result)
    return result


def expected_by(root: Path) -> str:
    """Return the score that a bundle's ``inference.json`` expects of its masks.

    Args:
        root: folder of the bundle.

    Raises:
        ValueError: when it expects none.
    """
    config = read_json(root / "configs" / "inference.json")
    for step in config.get("postprocessing", {}).get("transforms", ()):
        if str(step.get("_target_")).endswith(".Confidenced"):
            return step.get("score", "dice")
    fail(f"inference.json of {root} has no Confidenced in its postprocessing: add it, see docs/confidence.md.")


def summary_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """Return the candidates of a record as rows of a table: name, rank correlation, both AUROC and mean error."""
    rows = []
    for name, found in record["candidates"].items():
        others = (found["auroc_failures"], found["auroc_worst_fifth"], found["error"])
        rank = str(Interval(**found["rank_correlation"]))
        rows.append([name, rank, *("" if value is None else short(value) for value in others)])
    return rows


def summary_lines(record: Mapping[str, Any]) -> list[str]:
    """Say what was measured on unseen cases, one line per figure."""
    got, groups = record["measured"], record["groups"]
    covered = got["coverage"]["value"]
    caught = "" if got["failures_flagged"] is None else f", and {got['failures_flagged']:.0%} of the failures"
    return [
        f"Chosen: {record['candidate']}",
        f"Cases: {record['cases']} of {groups} groups, mean {record['score']} {record['mean_score']:.3f}",
        f"No lower bound: it needs 9 groups or more in each fit, there are {groups}"
        if covered is None
        else f"Score at or above the lower bound: {covered:.1%} of the cases (wanted: 90 %)",
        f"Flagged for review: {got['flagged']:.1%} of the cases{caught}",
        f"Failures ({record['score']} below {record['failure_below']}): {got['failures']}",
    ]
