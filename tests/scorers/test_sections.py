from __future__ import annotations

import io
import logging

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from segbundles.metrics import threshold_scores
from segbundles.metrics.instances import label_cells
from segbundles.report import sections
from segbundles.scorers import SectionScorer

COLUMNS = [
    *(
        "case",
        "group",
        "content",
        "status",
        "pixel_accuracy",
        "dice_membrane",
        "pixel_accuracy_mask",
        "v_rand",
        "v_info",
    ),
    *("v_rand_cells", "v_info_cells", "cells", "true_cells", "true_fraction", "predicted_fraction", "notes"),
]
# 12 x 9 pixels: two cells, a membrane of one pixel between them
TRUTH = np.ones((12, 9), np.uint8)
TRUTH[5] = 0


def probability(inside: float, gap: float) -> np.ndarray:
    """Membrane at 0.9 where the truth has it, but for a gap; ``inside`` in the cells."""
    p = np.where(TRUTH == 0, 0.9, inside)
    p[5, 4] = gap
    return p


GOOD = probability(0.05, 0.9)


def case(name, *pages, truth=TRUTH, lost=()):
    """A case of pages with these membrane probabilities (W, H); post-processing loses the cells of rows ``lost``."""
    p = np.stack(pages, -1)
    pred = (p < 0.5).astype(np.uint8)
    cells = np.stack([label_cells(page) for page in np.moveaxis(pred, -1, 0)], -1)
    cells[list(lost)] = 0
    return {
        "case": name,
        "image": MetaTensor(torch.rand(1, *p.shape), meta={"filename_or_obj": "d/a.tif"}),
        "label": torch.as_tensor(np.stack([truth] * len(pages), -1))[None],
        "pred": MetaTensor(torch.as_tensor(pred)[None], meta={"notes": "turned"}),
        "probability": torch.as_tensor(np.stack([p, 1 - p])),
        "cells": torch.as_tensor(cells)[None],
    }


def test_one_threshold_for_all_sections_is_the_best_of_their_means(evaluate, caplog):
    """Section a merges its cells above 0.35, section b loses its cells below 0.25: 0.3 is best for both together."""
    a, b = probability(0.05, 0.35), probability(0.25, 0.9)
    thresholds = (0.1, 0.2, 0.3, 0.5)
    with caplog.at_level(logging.INFO, "segbundles"):
        written = evaluate(SectionScorer(thresholds), [case("a", a), case("b", b)])
    by_hand = [threshold_scores(p, label_cells(TRUTH), thresholds) for p in (a, b)]
    rows, summary = written.table(), written.summary
    assert list(rows[0]) == COLUMNS
    assert [row["case"] for row in rows] == ["a", "b"]
    assert (summary["v_rand_threshold"], summary["v_info_threshold"]) == (0.3, 0.3)
    for row, scores in zip(rows, by_hand, strict=True):
        assert float(row["v_rand"]) == pytest.approx(scores[2]["v_rand"]) == 1
        assert row["notes"] == "turned"
    for k, row in enumerate(written.table("thresholds.csv")):
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
    page = written.page
    assert "0.3 for V_rand" in page
    assert page.count("data:image/jpeg") == 2
    assert 'class="legend"' not in page
    assert page.index(">a</h3>") < page.index(">b</h3>")  # worst cells first


def test_the_mask_that_inference_writes_is_scored_beside_the_more_probable_class(evaluate):
    """Every pixel has the right class; one row of 9 of the 108 pixels is lost when cells are made."""
    written = evaluate(SectionScorer(), [case("a", GOOD, lost=[0])], figures=False)
    (row,) = written.table()
    assert (float(row["pixel_accuracy"]), float(row["pixel_accuracy_mask"])) == (1, pytest.approx(99 / 108, abs=1e-6))
    assert written.summary["pixel_accuracy_mask"]["mean"] == pytest.approx(99 / 108)
    assert "mask that inference writes" in written.page


def test_pages_of_a_case_are_rows_with_unique_names(evaluate):
    written = evaluate(SectionScorer(), [case("s", *[GOOD] * 3), case("", GOOD), case("s", *[GOOD] * 2)], figures=False)
    names = [row["case"] for row in written.table()]
    assert names == [*(f"s_page_0{k}" for k in range(3)), "d/a", *(f"d/a.tif_page_0{k}" for k in range(2))]
    assert "data:image/jpeg" not in written.page


@pytest.mark.parametrize("value", [0, 1])
def test_a_section_of_one_class_alone_spoils_no_mean(value, evaluate):
    written = evaluate(SectionScorer(), [case("blank", GOOD, truth=np.full_like(TRUTH, value)), case("good", GOOD)])
    blank, good = written.table()
    assert (blank["status"], good["status"]) == ("one class", "ok")
    if value == 0:
        assert blank["v_rand"] == blank["v_rand_cells"] == ""
        found = {"mean": 1.0, "sd": None, "median": 1.0, "worst": 1.0, "n": 1, "left_out": 1}
        assert written.summary["v_rand"].items() >= found.items()
    else:
        assert blank["dice_membrane"] == ""
        assert written.summary["dice_membrane"]["n"] == 1


def test_a_report_of_200_sections_stays_below_20_mb(evaluate, monkeypatch):
    """With the largest pictures of sections, 300 kB each, it would have 80 MB."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (520, 680, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG", quality=85)
    assert 250_000 < len(buffer.getvalue()) <= 300_000
    monkeypatch.setattr("segbundles.report.section_figure", lambda *_: buffer.getvalue())
    monkeypatch.setattr(sections, "_encode", lambda image, most: buffer.getvalue()[:most])
    page = evaluate(SectionScorer((0.5,)), [case("s", *[GOOD] * 200)]).page
    assert page.count("data:image/jpeg") == 200
    assert 18_000_000 < len(page.encode()) < 20_000_000
