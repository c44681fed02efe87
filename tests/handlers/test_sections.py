from __future__ import annotations

import csv
import io
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from segbundles.handlers import SectionReport
from segbundles.metrics import threshold_scores
from segbundles.metrics.instances import label_cells
from segbundles.report import sections

COLUMNS = [
    *("case", "status", "pixel_accuracy", "dice_membrane", "pixel_accuracy_mask", "v_rand", "v_info"),
    *("v_rand_cells", "v_info_cells", "cells", "true_cells", "notes"),
]
# 12 x 9 pixels: two cells, a membrane of one pixel between them
TRUTH = np.ones((12, 9), np.uint8)
TRUTH[5] = 0


def probability(inside: float, gap: float) -> np.ndarray:
    """Membrane at 0.9 where the truth has it, but for a gap; ``inside`` in the cells."""
    p = np.where(TRUTH == 0, 0.9, inside)
    p[5, 4] = gap
    return p


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def run(report, cases, lost=None):
    """What an evaluator does with a batch of one for each (name, probabilities (W, H) of its pages, truth).

    Post-processing loses the pixels of the rows ``lost``.
    """
    report.start(None)
    for name, pages, truth in cases:
        p = np.stack(pages, -1)
        pred = (p < 0.5).astype(np.uint8)
        cells = np.stack([label_cells(page) for page in np.moveaxis(pred, -1, 0)], -1)
        cells[lost or []] = 0
        image = MetaTensor(torch.rand(1, *p.shape), meta={"filename_or_obj": "d/a.tif"})
        output = {
            "label": torch.as_tensor(np.stack([truth] * p.shape[-1], -1))[None],
            "pred": MetaTensor(torch.as_tensor(pred)[None], meta={"notes": "turned"}),
            "probability": torch.as_tensor(np.stack([p, 1 - p])),
            "cells": torch.as_tensor(cells)[None],
        }
        batch = {"image": image} if name is None else {"image": image, "case": name}
        report.add(SimpleNamespace(state=SimpleNamespace(batch=[batch], output=[output])))
    report.write()


def test_one_threshold_for_all_sections_is_the_best_of_their_means(tmp_path, caplog):
    """Section a merges its cells above 0.35, section b loses its cells below 0.25: 0.3 is best for both together."""
    a, b = probability(0.05, 0.35), probability(0.25, 0.9)
    thresholds = (0.1, 0.2, 0.3, 0.5)
    report = SectionReport(tmp_path, thresholds=thresholds)
    with caplog.at_level(logging.INFO, "segbundles"):
        run(report, [("a", [a], TRUTH), ("b", [b], TRUTH)])
    by_hand = [threshold_scores(p, label_cells(TRUTH), thresholds) for p in (a, b)]
    rows = table(tmp_path / "metrics.csv")
    assert list(rows[0]) == COLUMNS
    assert [row["case"] for row in rows] == ["a", "b"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["v_rand_threshold"], summary["v_info_threshold"]) == (0.3, 0.3)
    for row, scores in zip(rows, by_hand, strict=True):
        assert float(row["v_rand"]) == pytest.approx(scores[2]["v_rand"]) == 1
        assert row["notes"] == "turned"
    means = table(tmp_path / "thresholds.csv")
    for k, row in enumerate(means):
        for key in ("v_rand", "v_info"):
            assert float(row[key]) == pytest.approx(np.mean([scores[k][key] for scores in by_hand]), rel=1e-5)
    # cells of a at 0.5 are merged: 107 of 108 pixels right, one cell instead of two
    assert float(rows[0]["pixel_accuracy"]) == pytest.approx(107 / 108, abs=1e-6)
    assert float(rows[0]["dice_membrane"]) == pytest.approx(2 * 8 / 17, abs=1e-6)
    assert (rows[0]["cells"], rows[0]["true_cells"]) == ("1", "2")
    assert float(rows[0]["v_rand_cells"]) < 0.75
    assert float(rows[1]["v_rand_cells"]) == 1
    assert summary["v_rand"]["mean"] == 1
    assert any("v_rand 1.0000 (worst 1.0000) at threshold 0.3" in message for message in caplog.messages)
    page = (tmp_path / "report.html").read_text()
    assert "0.3 for V_rand" in page
    assert page.count("data:image/jpeg") == 2
    assert 'class="legend"' not in page
    assert page.index(">a</h3>") < page.index(">b</h3>")  # worst cells first


def test_the_mask_that_inference_writes_is_scored_beside_the_more_probable_class(tmp_path):
    """Right in every pixel by class; a row of 9 pixels of the 108 is lost on the way to cells."""
    report = SectionReport(tmp_path, figures=False)
    run(report, [("a", [probability(0.05, 0.9)], TRUTH)], lost=[0])
    (row,) = table(tmp_path / "metrics.csv")
    assert (float(row["pixel_accuracy"]), float(row["pixel_accuracy_mask"])) == (1, pytest.approx(99 / 108, abs=1e-6))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["pixel_accuracy_mask"]["mean"] == pytest.approx(99 / 108)
    assert "mask that inference writes" in (tmp_path / "report.html").read_text()


def test_pages_of_a_case_are_rows_and_names_stay_apart(tmp_path):
    good = probability(0.05, 0.9)
    report = SectionReport(tmp_path, figures=False)
    run(report, [("s", [good] * 3, TRUTH), (None, [good], TRUTH), ("s", [good] * 2, TRUTH)])
    names = [row["case"] for row in table(tmp_path / "metrics.csv")]
    assert names[:4] == ["s_page_00", "s_page_01", "s_page_02", "d/a"]
    assert len(set(names)) == 6
    assert "data:image/jpeg" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("value", [0, 1])
def test_a_section_of_one_class_alone_spoils_no_mean(value, tmp_path):
    good = probability(0.05, 0.9)
    run(SectionReport(tmp_path), [("blank", [good], np.full_like(TRUTH, value)), ("good", [good], TRUTH)])
    rows = {row["case"]: row for row in table(tmp_path / "metrics.csv")}
    assert (rows["blank"]["status"], rows["good"]["status"]) == ("one class", "ok")
    summary = json.loads((tmp_path / "summary.json").read_text())
    if value == 0:
        assert rows["blank"]["v_rand"] == rows["blank"]["v_rand_cells"] == ""
        assert summary["v_rand"] == {"mean": 1.0, "sd": None, "median": 1.0, "worst": 1.0, "n": 1}
    else:
        assert rows["blank"]["dice_membrane"] == ""
        assert summary["dice_membrane"]["n"] == 1


def test_a_report_of_200_sections_stays_below_20_mb(tmp_path, monkeypatch):
    """As large as pictures of sections get: 300 kB each would make 80 MB."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (520, 680, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG", quality=85)
    assert 250_000 < len(buffer.getvalue()) <= 300_000
    monkeypatch.setattr("segbundles.report.section_figure", lambda *_: buffer.getvalue())
    monkeypatch.setattr(sections, "_encode", lambda image, most: buffer.getvalue()[:most])
    report = SectionReport(tmp_path, thresholds=(0.5,))
    run(report, [("s", [probability(0.05, 0.9)] * 200, TRUTH)])
    page = tmp_path / "report.html"
    assert page.read_text().count("data:image/jpeg") == 200
    assert 18_000_000 < page.stat().st_size < 20_000_000


def test_a_second_run_forgets_the_first(tmp_path):
    report = SectionReport(tmp_path, figures=False)
    for name in ("first", "second"):
        run(report, [(name, [probability(0.05, 0.9)], TRUTH)])
    assert [row["case"] for row in table(tmp_path / "metrics.csv")] == ["second"]
