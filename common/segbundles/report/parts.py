"""Parts of the evaluation report that say more than means: volumes, detection, probabilities, groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import torch

from segbundles.confidence import FAILURES
from segbundles.metrics import confusion_of, pooled_scores
from segbundles.report.plots import (
    agreement_svg,
    bland_altman_svg,
    calibration_svg,
    precision_recall_svg,
    thresholds_svg,
)
from segbundles.statistics import (
    DETECTION_COLUMNS,
    Interval,
    ProbabilityCounts,
    bootstrap_interval,
    detection_rates,
    judge_confidence,
    short,
    volume_agreement,
)

__all__ = [
    "SEQUENCE_COLUMNS",
    "Part",
    "Table",
    "agreement_part",
    "confidence_part",
    "detection_part",
    "group_rows",
    "pooled_intervals",
    "pooled_part",
    "probability_part",
]

SEQUENCE_COLUMNS = ("sequence", "frames", "jaccard", "dice", "missed", "false_positive")
Table = tuple[Sequence[str], Sequence[Mapping[str, Any]]]

# true and predicted columns: quantity, unit
_PAIRS = {
    ("true_volume_ml", "predicted_volume_ml"): ("volume", "ml"),
    ("true_area_mm2", "predicted_area_mm2"): ("area", "mm²"),
    ("true_pixels", "predicted_pixels"): ("size", "pixels"),
    ("true_fraction", "predicted_fraction"): ("share of the image", ""),
    ("true_cells", "cells"): ("number of cells", ""),
}
# what a confidence expects, see segbundles.confidence.SCORES
_EXPECTED = {"dice": "dice", "pixel_accuracy": "accuracy"}
_SURELY_BACKGROUND = 0.01  # probability


@dataclass
class Part:
    """A part of the report between the distributions and the cases.

    Args:
        heading: its heading, also in the page's navigation.
        notes: paragraphs below the heading.
        tables: columns and rows by file name; values are shown as they are, or with three significant digits.
        captions: caption of each table or figure that needs one, by file name.
        figures: SVG documents by file name.
        summary: what ``summary.json`` has of it.
    """

    heading: str
    notes: Sequence[str] = ()
    tables: dict[str, Table] = field(default_factory=dict)
    figures: dict[str, bytes] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)


def agreement_part(rows: Sequence[Mapping[str, Any]], classes: Mapping[str, str]) -> Part | None:
    """Compare true and predicted sizes.

    Args:
        rows: one per case, with ``group``.
        classes: name of each class, by its number.

    Returns:
        None if the rows contain no sizes.
    """
    part = Part("True and predicted sizes", summary={"agreement": {}})
    table = []
    for (true, predicted), (quantity, unit) in _PAIRS.items():
        for column in (name for name in dict.fromkeys(key for row in rows for key in row) if _is_of(name, true)):
            suffix = column.removeprefix(true)
            values = [[_number(row.get(f"{name}{suffix}")) for row in rows] for name in (true, predicted)]
            found = volume_agreement(*values, unit, [row.get("group") for row in rows])
            if found["n"] == 0:
                continue
            name = f"{quantity}{', ' + classes.get(suffix[1:], f'class {suffix[1:]}') if suffix else ''}"
            of = f"{name} ({unit})" if unit else name
            part.summary["agreement"][predicted + suffix] = found
            table.append(
                {
                    "quantity": of,
                    "cases": found["n"],
                    "bias (95 % interval)": str(
                        Interval(found["bias"], found["bias_low"], found["bias_high"], 0, 0, 0)
                    ),
                    "limits of agreement": _range(found["lower"], found["upper"]),
                    "ICC (95 % interval)": str(Interval(found["icc"], found["icc_low"], found["icc_high"], 0, 0, 0)),
                }
            )
            key = predicted.removeprefix("predicted_") + suffix
            part.figures[f"scatter_{key}"] = agreement_svg(*values, f"true {of}", f"predicted {of}")
            part.figures[f"bland_altman_{key}"] = bland_altman_svg(*values, of)
    if not table:
        return None
    part.tables["agreement"] = ([*table[0]], table)
    part.notes = [
        "Bias: mean of predicted minus true; negative means that the prediction is too small. Limits of agreement: 95 "
        "% of the differences are expected between them. ICC(2,1): intraclass correlation for absolute agreement, at "
        "most 1. On the dashed line of a scatter plot both are equal; a Bland-Altman plot has differences and means."
    ]
    return part


def confidence_part(rows: Sequence[Mapping[str, Any]]) -> Part | None:
    """Compare the confidence of each case with its score.

    Args:
        rows: one per case, with ``group``, ``confidence``, ``confidence_low``, ``review`` and a score.

    Returns:
        None if the rows contain no confidence, or no score that it is an expectation of.
    """
    columns = {key for row in rows for key in row}
    metric = next((name for name in _EXPECTED if name in columns), None)
    if "confidence" not in columns or metric is None:
        return None
    confidence, low, score = (
        [_number(row.get(name)) for row in rows] for name in ("confidence", "confidence_low", metric)
    )
    groups, review = ([row.get(name) for row in rows] for name in ("group", "review"))
    found = judge_confidence(confidence, score, groups, FAILURES[_EXPECTED[metric]], low, review)
    shown = {
        "rank correlation of confidence and score (95 % interval)": str(Interval(**found["rank_correlation"])),
        "mean difference, without sign": found["error"],
        "mean of confidence minus score": found["bias"],
        "share of cases at or above their lower bound (90 % expected)": found["coverage"]["value"],
        "share of cases to review": found["flagged"],
    }
    table = [{"quantity": name, "value": value} for name, value in shown.items() if value is not None]
    return Part(
        "Confidence",
        notes=[
            "Confidence is the score that a mask is expected to have, without looking at the truth. On the dashed line "
            "of the plot it equals the score."
        ],
        tables={"confidence": (["quantity", "value"], table)},
        figures={"scatter_confidence": agreement_svg(confidence, score, "confidence", metric.replace("_", " "))},
        summary={"confidence": found},
    )


def detection_part(rows: Sequence[Mapping[str, Any]], per: str) -> Part | None:
    """Count the objects that were found.

    Args:
        rows: one per case, with ``group`` and the columns of :func:`segbundles.statistics.count_objects`.
        per: what a case is, such as frame.

    Returns:
        None if the rows have no such columns.
    """
    counted = [row for row in rows if all(isinstance(row.get(name), (int, float)) for name in DETECTION_COLUMNS)]
    if not counted:
        return None
    rates = detection_rates(counted, [row.get("group") for row in counted])
    objects = sum(int(row["objects"]) for row in counted)
    table = []
    for matching, words in (("any_overlap", "any overlap"), ("iou50", "IoU above 0.5")):
        hits, false = (
            ("objects_found", "false_objects")
            if matching == "any_overlap"
            else ("objects_found_iou50", "false_objects_iou50")
        )
        one = {name: Interval(**entry) for name, entry in rates[matching].items()}
        table.append(
            {
                "matched at": words,
                "found": f"{sum(int(row[hits]) for row in counted)} of {objects}",
                "sensitivity (95 % interval)": str(one["sensitivity"]),
                "false": sum(int(row[false]) for row in counted),
                f"false per {per} (95 % interval)": str(one["false_per_case"]),
                "precision (95 % interval)": str(one["precision"]),
            }
        )
    return Part(
        "Detection",
        [
            "An object is a connected part of the mask, of any size. At any overlap, a true object is found if any of "
            "its pixels is predicted, and a predicted object is false if it touches no true one. Above an intersection "
            "over union of 0.5, each object matches at most one other."
        ],
        {"detection": ([*table[0]], table)},
        summary={"detection": {"objects": objects, **rates}},
    )


def probability_part(groups: Mapping[str, ProbabilityCounts] | None, foreground: str) -> Part | None:
    """Describe the probabilities: calibration, precision and recall, and the effect of the threshold.

    Args:
        groups: counts of each group, over which the intervals are; None if there are none.
        foreground: what the probabilities are of.

    Returns:
        None without counts.
    """
    counts = sum((groups or {}).values(), ProbabilityCounts())
    if not groups or not counts.table.any():
        return None
    thresholds = counts.thresholds()
    best = max(thresholds, key=lambda row: (not math.isnan(row["dice"]), row["dice"]))
    parts = [*groups.values()]
    intervals = {
        "ece": _pooled([one.coarse() for one in parts], ProbabilityCounts.calibration_error),
        "ece_without_background": _pooled(
            [one.coarse(lowest=_SURELY_BACKGROUND) for one in parts], ProbabilityCounts.calibration_error
        ),
        "average_precision": _pooled(parts, ProbabilityCounts.average_precision),
        "dice": _pooled([one.coarse(2) for one in parts], lambda one: one.thresholds(2)[1]["dice"]),
    }
    found = {
        **{name: one.value for name, one in intervals.items()},
        "best_threshold": best["threshold"],
        "best_dice": None if math.isnan(best["dice"]) else best["dice"],
    }
    words = (
        "calibration error (ECE), all pixels",
        f"calibration error (ECE), pixels of probability {_SURELY_BACKGROUND} and more",
        "average precision (area under the precision-recall curve)",
        "Dice of all pixels at a threshold of 0.5",
        "threshold with the best Dice of all pixels",
        "Dice of all pixels at that threshold",
    )
    shown = {name: short(value) if value is not None else "undefined" for name, value in found.items()}
    shown |= {name: str(one) for name, one in intervals.items()}
    table = [{"score": word, "value (95 % interval)": shown[name]} for word, name in zip(words, found, strict=True)]
    return Part(
        "Probabilities",
        [
            f"Probability of {foreground}, pooled over the pixels of all cases, as the network gives it: before the "
            "largest component, the watershed or another last step. Calibrated probabilities are on the dashed line: "
            f"of the pixels with 0.7, 70 % are {foreground}. The threshold of the masks is 0.5; another one that is "
            "best here was chosen on these cases, so its Dice is optimistic."
        ],
        {"probabilities": ([*table[0]], table)},
        {
            "calibration": calibration_svg(counts.calibration(lowest=_SURELY_BACKGROUND)),
            "precision_recall": precision_recall_svg(thresholds),
            "thresholds": thresholds_svg(thresholds),
        },
        {
            "calibration": f"Calibration; pixels below {_SURELY_BACKGROUND} are left out",
            "precision_recall": "Precision and recall of all thresholds; the dot is the threshold of the masks",
            "thresholds": "What another threshold would give",
        },
        {"probabilities": {**found, "intervals": {name: one.as_dict() for name, one in intervals.items()}}},
    )


def pooled_part(rows: Sequence[Mapping[str, Any]]) -> Part | None:
    """Score the pixels of all cases together, and those of each group.

    Args:
        rows: one per case, with ``group``, ``status``, ``dice`` and the columns of
            :func:`segbundles.metrics.confusion_columns`.

    Returns:
        None if the rows have no such columns. The summary has ``pooled_accuracy``, ``pooled_mean_jaccard``,
        ``pooled_jaccard`` (of the foreground) and one per class; ``pooled_intervals``, the intervals of Jaccard and
        mean Jaccard over the groups; and ``sequences``, one row per group.
    """
    matrices = [confusion_of(row) for row in rows]
    if not rows or any(matrix is None for matrix in matrices):
        return None
    scores = pooled_scores(sum(matrices))
    intervals = pooled_intervals(rows)
    by_group: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        by_group.setdefault(row.get("group") or "", []).append(place)
    sequences = []
    for name, places in by_group.items():
        dice = [value for place in places if not math.isnan(value := _number(rows[place].get("dice")))]
        statuses = [rows[place].get("status") for place in places]
        jaccard = pooled_scores(sum(matrices[place] for place in places))["jaccard"]
        means = (None if math.isnan(jaccard) else jaccard, fmean(dice) if dice else None)
        counts = map(statuses.count, ("missed", "false positive"))
        sequences.append(dict(zip(SEQUENCE_COLUMNS, (name, len(places), *means, *counts), strict=True)))
    whole = {"frames": len(rows), **scores, **{f"{name}_interval": one for name, one in intervals.items()}}
    columns = ("frames", *(f"{name}_interval" for name in intervals))
    columns += (*(name for name in scores if name.startswith("jaccard_")), "accuracy")
    part = Part("Pooled over all pixels", tables={"pooled": (columns, [whole])})
    if len(sequences) < len(rows):  # otherwise the table of frames says the same
        part.tables["sequences"] = (SEQUENCE_COLUMNS, sequences)
        part.captions["sequences"] = "Sequences"
        part.notes = [
            "In the table of sequences, Jaccard is pooled over the pixels of a sequence and Dice is the mean of its "
            "frames."
        ]
    part.summary = {f"pooled_{name}": None if math.isnan(value) else value for name, value in scores.items()}
    part.summary["pooled_intervals"] = {name: one.as_dict() for name, one in intervals.items()}
    part.summary["sequences"] = sequences
    return part


def pooled_intervals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:
    """Return pooled Jaccard and mean Jaccard of the cases of :func:`pooled_part`, with their intervals over groups."""
    matrices = np.array([confusion_of(row).numpy() for row in rows])
    groups = [row.get("group") for row in rows]
    return {
        name: bootstrap_interval(
            matrices, groups, lambda drawn, name=name: pooled_scores(torch.as_tensor(drawn.sum(0)))[name]
        )
        for name in ("jaccard", "mean_jaccard")
    }


def group_rows(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row per group: its number of cases and of failures, and the mean of each metric."""
    found = []
    for name in dict.fromkeys(row["group"] for row in rows):
        part = [row for row in rows if row["group"] == name]
        failures = sum(row.get("status") in ("missed", "false positive") for row in part)
        values = {
            metric: [value for row in part if not math.isnan(value := _number(row.get(metric)))] for metric in metrics
        }
        means = {metric: fmean(known) if known else None for metric, known in values.items()}
        found.append({"group": name, "cases": len(part), "failures": failures, **means})
    return found


def _pooled(groups: Sequence[ProbabilityCounts], score: Callable[[ProbabilityCounts], float]) -> Interval:
    """Return a score of the pixels of all groups, and its interval over the groups."""
    tables = np.stack([one.table for one in groups])
    return bootstrap_interval(tables, range(len(tables)), lambda drawn: score(ProbabilityCounts(drawn.sum(0))))


def _is_of(name: str, column: str) -> bool:
    return name == column or (name.startswith(f"{column}_") and name.removeprefix(f"{column}_").isdigit())


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _range(low: float | None, high: float | None) -> str:
    return "undefined" if low is None else f"{short(low)} to {short(high)}"
