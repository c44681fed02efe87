from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from segbundles.handlers import FrameReport


def frame(rows: str) -> torch.Tensor:
    """Class map (1, W, H) of a text, a line a row; v is void."""
    values = [[255 if c == "v" else int(c) for c in line] for line in rows.split()]
    return torch.tensor(values, dtype=torch.uint8).T[None]


def run(tmp_path: Path, cases: list[tuple[str, str, str]], num_classes: int = 2) -> tuple[list[dict], dict, str]:
    """Rows, summary and page of (sequence, truth, prediction)."""
    batches = []
    for k, (sequence, truth, pred) in enumerate(cases):
        label = MetaTensor(frame(truth), meta={"has_spacing": False, "filename_or_obj": f"{k}.png"})
        image = MetaTensor(torch.full((3, *label.shape[1:]), 90, dtype=torch.uint8), meta=dict(label.meta))
        batch = {"case": f"f{k}", "image": image} | ({"group": sequence} if sequence else {})
        batches.append(([batch], [{"label": label, "pred": frame(pred)}]))

    def step(engine: Engine, pair: tuple) -> list:
        engine.state.batch, output = pair
        return output

    engine = Engine(step)
    FrameReport(tmp_path, num_classes).attach(engine)
    engine.run(batches)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    summary = json.loads((tmp_path / "summary.json").read_text())
    return rows, summary, (tmp_path / "report.html").read_text()


CASES = [
    ("a", "1100 0000", "1000 0000"),
    ("a", "1111 0000", "1111 0000"),
    ("b", "0000 0000", "0000 0001"),
    ("b", "vv11 0000", "1111 0000"),
    ("c", "0000 0000", "0000 0000"),
]


def test_frames_sequences_and_the_set(tmp_path: Path) -> None:
    rows, summary, page = run(tmp_path, CASES)
    assert [(r["case"], r["sequence"], r["status"]) for r in rows] == [
        ("f0", "a", "ok"), ("f1", "a", "ok"), ("f2", "b", "false positive"), ("f3", "b", "ok"), ("f4", "c", "empty")
    ]  # fmt: skip
    assert [r["dice"] for r in rows] == ["0.666667", "1", "0", "1", ""]  # void pixels do not count in the fourth
    assert "spacing_mm" not in rows[0]
    assert summary["dice"]["n"] == 4
    # hits 1 + 4 + 0 + 2, union 2 + 4 + 1 + 2; background 29 of 31; 38 pixels known
    assert summary["pooled_jaccard"] == summary["pooled_jaccard_1"] == pytest.approx(7 / 9)
    assert summary["pooled_jaccard_0"] == pytest.approx(29 / 31)
    assert summary["pooled_mean_jaccard"] == pytest.approx((7 / 9 + 29 / 31) / 2)
    assert summary["pooled_accuracy"] == pytest.approx(36 / 38)
    a, b, c = summary["sequences"]
    assert a == {
        "sequence": "a",
        "frames": 2,
        "jaccard": pytest.approx(5 / 6),
        "dice": pytest.approx(5 / 6),
        "missed": 0,
        "false_positive": 0,
    }
    assert (b["jaccard"], b["dice"], b["false_positive"]) == (pytest.approx(2 / 3), 0.5, 1)
    assert (c["jaccard"], c["dice"]) == (None, None)
    with (tmp_path / "sequences.csv").open() as file:
        assert [row["sequence"] for row in csv.DictReader(file)] == ["a", "b", "c"]
    assert "Jaccard of the foreground 0.7778" in page
    assert "c undefined (1)" in page
    alone = run(tmp_path / "alone", [(f"s{k}", *case[1:]) for k, case in enumerate(CASES)])[2]
    assert "Pooled over each sequence" not in alone  # as the table of frames says it all


def test_three_classes_without_sequences(tmp_path: Path) -> None:
    rows, summary, _ = run(tmp_path, [("", "1122 0000", "1122 0002")], num_classes=3)
    assert rows[0]["sequence"] == ""
    assert summary["pooled_jaccard"] == pytest.approx((1 + 2 / 3) / 2)
    assert summary["pooled_jaccard_2"] == pytest.approx(2 / 3)
    assert summary["sequences"][0]["sequence"] == ""


def test_a_second_run_starts_afresh(tmp_path: Path) -> None:
    run(tmp_path, CASES)
    _, summary, _ = run(tmp_path, CASES[:1])
    assert summary["pooled_jaccard"] == 0.5
    assert summary["cases"] == 1
