from __future__ import annotations

import json
import math

import numpy as np
import pytest

from segbundles.report import glossary, label, write_evaluation
from segbundles.report.parts import (
    agreement_part,
    confidence_part,
    detection_part,
    group_rows,
    pooled_part,
    probability_part,
)
from segbundles.statistics import DETECTION_COLUMNS, ProbabilityCounts

SIZES = [(10.0, 12.0), (20.0, 19.0), (30.0, 32.0), (math.nan, 3.0)]
ROWS = [{"group": f"p{k}", "true_volume_ml": true, "predicted_volume_ml": seen} for k, (true, seen) in enumerate(SIZES)]


def test_sizes_by_hand():
    part = agreement_part(ROWS, {})
    found = part.summary["agreement"]["predicted_volume_ml"]
    # differences 2, -1 and 2; the fourth case has no truth
    assert (found["n"], found["left_out"], found["unit"]) == (3, 1, "ml")
    assert (found["bias"], found["sd"]) == pytest.approx((1.0, math.sqrt(3)))
    assert (found["lower"], found["upper"]) == pytest.approx((1 - 1.96 * math.sqrt(3), 1 + 1.96 * math.sqrt(3)))
    (row,) = part.tables["agreement"][1]
    assert (row["quantity"], row["limits of agreement"]) == ("volume (ml)", "-2.39 to 4.39")
    assert {*part.figures} == {"scatter_volume_ml", "bland_altman_volume_ml"}
    assert b"predicted volume (ml)" in part.figures["scatter_volume_ml"]


def test_sizes_of_each_class_and_of_none():
    rows = [{"group": "", "true_fraction_2": 0.1, "predicted_fraction_2": 0.2}, {"group": ""}]
    part = agreement_part(rows, {"2": "scar"})
    assert [row["quantity"] for row in part.tables["agreement"][1]] == ["share of the image, scar"]
    assert agreement_part([{"group": "", "dice": 0.5}], {}) is None
    assert agreement_part([{"group": "", "true_pixels": math.nan, "predicted_pixels": 3}], {}) is None


def test_detection_by_hand():
    counts = [(3, 2, 1, 4, 1, 3), (1, 0, 0, 0, 0, 0)]
    rows = [dict(zip(DETECTION_COLUMNS, count, strict=True)) for count in counts]
    part = detection_part(rows, "frame")
    overlap, iou = part.tables["detection"][1]
    assert (overlap["found"], overlap["false"], iou["found"], iou["false"]) == ("2 of 4", 1, "1 of 4", 3)
    assert overlap["sensitivity (95 % interval)"] == "0.5 (0 to 0.667)"
    assert iou["false per frame (95 % interval)"] == "1.5 (0 to 3)"
    assert detection_part([{"dice": 1.0}], "frame") is None


def test_probabilities_by_hand():
    counts = ProbabilityCounts.of(np.array([0.85] * 4 + [0.05] * 6), np.array([1, 1, 1, 0] + [1] + [0] * 5))
    part = probability_part({"a": counts}, "polyp")
    found = part.summary["probabilities"]
    assert found["ece"] == pytest.approx(0.6 * (1 / 6 - 0.05) + 0.4 * (0.85 - 0.75))
    assert found["dice"] == pytest.approx(6 / 8)
    assert 0.05 < found["best_threshold"] <= 0.85
    assert "70 % are polyp" in part.notes[0]
    assert probability_part(None, "polyp") is None
    assert probability_part({"a": ProbabilityCounts()}, "polyp") is None


def test_intervals_of_probabilities_are_over_the_groups():
    right, wrong = (ProbabilityCounts.of([0.95] * 10, [1] * n + [0] * (10 - n)) for n in (10, 5))
    part = probability_part({"a": right, "b": wrong}, "polyp")
    found = part.summary["probabilities"]
    # two draws of two groups: a alone, both, or b alone; all of .95, of which 100, 75 or 50 % are foreground
    ends = {"ece": (0.2, 0.05, 0.45), "average_precision": (0.75, 0.5, 1), "dice": (6 / 7, 2 / 3, 1)}
    for name, expected in ends.items():
        one = found["intervals"][name]
        assert (found[name], one["low"], one["high"]) == pytest.approx(expected)
        assert one["groups"] == 2
    assert part.tables["probabilities"][1][0]["value (95 % interval)"] == "0.2 (0.05 to 0.45)"


def test_rows_of_groups():
    rows = [
        {"group": "a", "status": "missed", "dice": 0.0, "hd": math.nan},
        {"group": "a", "status": "ok", "dice": 0.5, "hd": 3.0},
        {"group": "b", "status": "empty", "dice": math.nan},
    ]
    assert group_rows(rows, ["dice", "hd"]) == [
        {"group": "a", "cases": 2, "failures": 1, "dice": 0.25, "hd": 3.0},
        {"group": "b", "cases": 1, "failures": 0, "dice": None, "hd": None},
    ]


def test_columns_in_words():
    assert label("hd95_mm") == "surface distance, 95th percentile (mm)"
    assert label("dice_2", {"2": "scar"}) == "Dice, scar"
    assert label("jaccard_0") == "Jaccard (IoU), class 0"
    assert label("my_metric_mm", unit="mm") == "my metric (mm)"
    assert label("my_metric") == "my metric"
    assert [*glossary(["dice", "dice_1", "dice_2", "spacing_mm", "mine"])] == ["Dice"]


def test_an_evaluation_names_unit_groups_and_failures(tmp_path):
    rows = [
        {"case": f"c{k}", "group": f"p{k // 2}", "content": "beef", "status": "ok", "dice": k / 20, "hd95_mm": 3.0}
        for k in range(12)
    ]
    rows[0] |= {"status": "missed", "hd95_mm": math.nan}
    summary = {
        "dice": {"mean": 0.275, "sd": 0.1, "median": 0.275, "worst": 0.0, "n": 12},
        "hd95_mm": {"mean": 3.0, "sd": 0.0, "median": 3.0, "worst": 3.0, "n": 11},
    }
    said = write_evaluation(tmp_path, title="t", rows=rows, summary=summary, unit="patients")
    assert said == [
        "These 12 cases belong to 6 patients: cases of one patient resemble each other. With fewer than 10 patients, "
        "the figures say little about others."
    ]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in (
        "Unit of analysis: 6 patients",
        "11 of 12 (1 missed)",
        "<h2>Patients</h2>",
        "Box: quartiles",
        ">patient<",
    ):
        assert text in page
    for code in ("hd95_mm<", "beef", ">group<"):
        assert code not in page
    found = json.loads((tmp_path / "summary.json").read_text())
    assert (found["unit"], found["groups"], found["dice"]["groups"]) == ("patients", 6, 6)
    files = {path.name for path in (tmp_path / "report").iterdir()}
    assert files == {f"{name}.{suffix}" for name in ("summary", "patients") for suffix in ("csv", "tex")} | {
        f"distribution_{name}.svg" for name in ("dice", "hd95_mm")
    }
    latex = (tmp_path / "report/summary.tex").read_text()
    assert "surface distance, 95th percentile (mm) & 3.000 & 3.000 & 3.000" in latex


def test_counts_are_pooled_over_all_cases_and_each_group():
    counts = [(6, 0, 1, 1), (4, 0, 0, 4), (7, 1, 0, 0)]  # true and predicted class: 00, 01, 10, 11
    names = ("pixels_0_0", "pixels_0_1", "pixels_1_0", "pixels_1_1")
    scores = [("a", "ok", 2 / 3), ("a", "ok", 1.0), ("b", "false positive", 0.0)]
    rows = [
        {"group": group, "status": status, "dice": dice, **dict(zip(names, map(float, count), strict=True))}
        for (group, status, dice), count in zip(scores, counts, strict=True)
    ]
    part = pooled_part(rows)
    found = part.summary["pooled_intervals"]["jaccard"]
    # 5 of 6 true pixels, and one false one; a alone has 5 of 6, b alone 0 of 1
    assert (part.summary["pooled_jaccard"], found["low"], found["high"]) == pytest.approx((5 / 7, 0.0, 5 / 6))
    assert part.summary["pooled_accuracy"] == pytest.approx(22 / 24)
    assert [(s["sequence"], s["jaccard"], s["false_positive"]) for s in part.summary["sequences"]] == [
        ("a", pytest.approx(5 / 6), 0), ("b", 0.0, 1)
    ]  # fmt: skip
    assert pooled_part([{"group": "a", "dice": 1.0}]) is None


def test_confidence_is_compared_with_the_score():
    rows = [
        {"case": k, "group": k, "dice": dice, "confidence": sure, "confidence_low": sure - 0.1, "review": why}
        for k, (dice, sure, why) in enumerate([(0.9, 0.8, ""), (0.6, 0.75, "low"), (0.8, 0.85, ""), (0.95, 0.9, "")])
    ]
    part = confidence_part(rows)
    found = part.summary["confidence"]
    # ranks of the score 3, 1, 2, 4 and of the confidence 2, 1, 3, 4: 1 - 6 * 2 / (4 * 15)
    assert found["rank_correlation"]["value"] == pytest.approx(0.8)
    assert found["error"] == pytest.approx((0.1 + 0.15 + 0.05 + 0.05) / 4)
    assert found["bias"] == pytest.approx((-0.1 + 0.15 + 0.05 - 0.05) / 4)
    assert (found["failures"], found["auroc_failures"]) == (1, 1.0)
    assert (found["coverage"]["value"], found["flagged"]) == (0.75, 0.25)  # 0.6 is below 0.65
    assert "scatter_confidence" in part.figures


@pytest.mark.parametrize("missing", ["dice", "confidence"])
def test_no_confidence_without_its_columns(missing):
    row = {"case": "a", "group": "a", "dice": 0.9, "confidence": 0.8, "confidence_low": None, "review": ""}
    assert confidence_part([{key: value for key, value in row.items() if key != missing}]) is None
