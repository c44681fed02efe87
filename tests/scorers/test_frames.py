from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from segbundles.bundle import RunSettings
from segbundles.scorers import FrameScorer
from segbundles.statistics import DETECTION_COLUMNS


def frame(rows: str) -> torch.Tensor:
    """Return the class map (1, W, H) of a text with one row per line; v is void."""
    values = [[255 if c == "v" else int(c) for c in line] for line in rows.split()]
    return torch.tensor(values, dtype=torch.uint8).T[None]


def frames(*given: tuple[str, str, str]) -> list[dict]:
    """Return cases of (sequence, truth, prediction)."""
    cases = []
    for k, (sequence, truth, pred) in enumerate(given):
        label = MetaTensor(frame(truth), meta={"has_spacing": False, "filename_or_obj": f"{k}.png"})
        image = MetaTensor(torch.full((3, *label.shape[1:]), 90, dtype=torch.uint8), meta=dict(label.meta))
        cases.append({"case": f"f{k}", "image": image, "label": label, "pred": frame(pred)})
        cases[-1] |= {"group": sequence} if sequence else {}
    return cases


CASES = [
    ("a", "1100 0000", "1000 0000"),
    ("a", "1111 0000", "1111 0000"),
    ("b", "0000 0000", "0000 0001"),
    ("b", "vv11 0000", "1111 0000"),
    ("c", "0000 0000", "0000 0000"),
]


def test_frames_sequences_and_the_set(evaluate) -> None:
    written = evaluate(FrameScorer(), frames(*CASES), settings=RunSettings(classes={"0": "wall", "1": "polyp"}))
    rows, summary = written.table(), written.summary
    assert [(r["case"], r["sequence"], r["status"]) for r in rows] == [
        ("f0", "a", "ok"), ("f1", "a", "ok"), ("f2", "b", "false positive"), ("f3", "b", "ok"), ("f4", "c", "empty")
    ]  # fmt: skip
    assert [r["dice"] for r in rows] == ["0.666667", "1", "0", "1", ""]  # void pixels do not count in the fourth
    assert list(rows[0]) == [
        *("case", "group", "content", "sequence", "status", "dice", "jaccard", "precision", "recall", "true_fraction"),
        *("predicted_fraction", *DETECTION_COLUMNS, "pixels_0_0", "pixels_0_1", "pixels_1_0", "pixels_1_1", "notes"),
    ]
    assert [(r["true_fraction"], r["predicted_fraction"]) for r in rows[:3]] == [
        ("0.25", "0.125"), ("0.5", "0.5"), ("0", "0.125")
    ]  # fmt: skip
    # one object in each of the first, second and fourth frame; found, but with an IoU of only 0.5 in the first
    detection = summary["detection"]
    assert (detection["objects"], detection["any_overlap"]["sensitivity"]["value"]) == (3, 1.0)
    assert detection["iou50"]["sensitivity"]["value"] == pytest.approx(2 / 3)
    assert detection["any_overlap"]["false_per_case"]["value"] == pytest.approx(1 / 5)
    agreement = summary["agreement"]["predicted_fraction"]
    assert agreement["bias"] == pytest.approx(np.mean([-1 / 8, 0, 1 / 8, 0, 0]))
    assert (summary["cases"], summary["dice"]["n"]) == (5, 4)
    assert [rows[3][f"pixels_{pair}"] for pair in ("0_0", "0_1", "1_0", "1_1")] == ["4", "0", "0", "2"]
    # hits 1 + 4 + 0 + 2, union 2 + 4 + 1 + 2; background 29 of 31; 38 pixels known
    assert summary["pooled_jaccard"] == summary["pooled_jaccard_1"] == pytest.approx(7 / 9)
    assert summary["pooled_jaccard_0"] == pytest.approx(29 / 31)
    assert summary["pooled_mean_jaccard"] == pytest.approx((7 / 9 + 29 / 31) / 2)
    assert summary["pooled_accuracy"] == pytest.approx(36 / 38)
    a, b, c = summary["sequences"]
    known = {"frames": 2, "jaccard": pytest.approx(5 / 6), "dice": pytest.approx(5 / 6)}
    assert a == {"sequence": "a", **known, "missed": 0, "false_positive": 0}
    assert (b["jaccard"], b["dice"], b["false_positive"]) == (pytest.approx(2 / 3), 0.5, 1)
    assert (c["jaccard"], c["dice"]) == (None, None)
    assert [row["sequence"] for row in written.table("sequences.csv")] == ["a", "b", "c"]
    interval = summary["pooled_intervals"]["jaccard"]
    assert (interval["value"], interval["groups"]) == (pytest.approx(7 / 9), 3)
    # a alone, b alone and all that is between; a draw of c alone has no Jaccard
    assert (interval["low"], interval["high"]) == pytest.approx((2 / 3, 5 / 6))
    assert (summary["unit"], summary["groups"]) == ("sequences", 3)
    assert "0.778 (0.667 to 0.833)" in written.page
    for text in ("Unit of analysis: 3 sequences", "Pooled over all pixels", "Jaccard (IoU), polyp", ">Sequences<"):
        assert text in written.page


def test_sequences_of_one_frame_are_not_listed_again(evaluate) -> None:
    alone = frames(*((f"s{k}", *case[1:]) for k, case in enumerate(CASES)))
    assert ">Sequences<" not in evaluate(FrameScorer(), alone).page


def test_three_classes_without_sequences(evaluate) -> None:
    written = evaluate(FrameScorer(3), frames(("", "1122 0000", "1122 0002")))
    summary = written.summary
    assert written.table()[0]["sequence"] == summary["sequences"][0]["sequence"] == ""
    assert summary["pooled_jaccard"] == pytest.approx((1 + 2 / 3) / 2)
    assert summary["pooled_jaccard_2"] == pytest.approx(2 / 3)
    assert "class 2 prediction (dashed)" in written.page
