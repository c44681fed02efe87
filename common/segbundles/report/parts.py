"""Parts of the evaluation report that say more than means: volumes, detection, probabilities, groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from segbundles.confidence import FAILURES
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
    detection_rates,
    judge_confidence,
    short,
    volume_agreement,
)

__all__ = ["Part", "Table", "agreement_part", "confidence_part", "detection_part", "group_rows", "probability_part"]

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
    found = judge_confidence(confidence, score, [row.get("group") for row in rows], FAILURES[_EXPECTED[metric]])
    flagged = sum(bool(row.get("review")) for row in rows) / max(len(rows), 1)
    bounded = [value >= least for value, least in zip(score, low, strict=True) if not math.isnan(value + least)]
    coverage = fmean(bounded) if bounded else None
    shown = {
        "rank correlation of confidence and score (95 % interval)": str(Interval(**found["rank_correlation"])),
        "mean difference, without sign": found["error"],
        "mean of confidence minus score": found["bias"],
        "share of cases at or above their lower bound (90 % expected)": coverage,
        "share of cases to review": flagged,
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
        summary={"confidence": {**found, "coverage": coverage, "flagged": flagged}},
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


def probability_part(counts: ProbabilityCounts | None, foreground: str) -> Part | None:
    """Describe the probabilities: calibration, precision and recall, and the effect of the threshold.

    Args:
        counts: of all cases; None if there are none.
        foreground: what the probabilities are of.

    Returns:
        None without counts.
    """
    if counts is None or not counts.table.any():
        return None
    thresholds = counts.thresholds()
    best = max(thresholds, key=lambda row: (not math.isnan(row["dice"]), row["dice"]))
    found = {
        "ece": counts.calibration_error(),
        "ece_without_background": counts.calibration_error(lowest=_SURELY_BACKGROUND),
        "average_precision": counts.average_precision(),
        "dice": thresholds[len(thresholds) // 2]["dice"],
        "best_threshold": best["threshold"],
        "best_dice": best["dice"],
    }
    words = (
        "calibration error (ECE), all pixels",
        f"calibration error (ECE), pixels of probability {_SURELY_BACKGROUND} and more",
        "average precision (area under the precision-recall curve)",
        "Dice of all pixels at a threshold of 0.5",
        "threshold with the best Dice of all pixels",
        "Dice of all pixels at that threshold",
    )
    table = [{"score": word, "value": value} for word, value in zip(words, found.values(), strict=True)]
    return Part(
        "Probabilities",
        [
            f"Probability of {foreground}, pooled over the pixels of all cases, as the network gives it: before the "
            "largest component, the watershed or another last step. Calibrated probabilities are on the dashed line: "
            f"of the pixels with 0.7, 70 % are {foreground}. The threshold of the masks is 0.5; another one that is "
            "best here was chosen on these cases, so its Dice is optimistic."
        ],
        {"probabilities": (["score", "value"], table)},
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
        {"probabilities": {name: None if math.isnan(value) else value for name, value in found.items()}},
    )


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


def _is_of(name: str, column: str) -> bool:
    return name == column or (name.startswith(f"{column}_") and name.removeprefix(f"{column}_").isdigit())


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _range(low: float | None, high: float | None) -> str:
    return "undefined" if low is None else f"{short(low)} to {short(high)}"
