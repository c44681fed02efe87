from __future__ import annotations

import base64
import csv
import io
import json
import re

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image
from typer.testing import CliRunner

from segbundles.cli import app
from segbundles.comparison import compare
from segbundles.evaluations import case_figures, content_of, read_evaluation
from segbundles.report import write_report


def picture(grey):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (grey, grey, grey)).save(buffer, "PNG")
    return buffer.getvalue()


def evaluation(folder, rows, record=None, figures=None):
    """A folder as an evaluation leaves it; rows are (case, group, dice, hd95_mm) and more columns."""
    columns = ["case", "group", "dice", "hd95_mm", "status", "notes", "content"]
    folder.mkdir()
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([*row, *["ok", "", ""][len(row) - 4 :]] for row in rows)
    if record:
        (folder / "evaluating.config.json").write_text(json.dumps(record))
    if figures:
        shown = [{"case": row[0], "dice": float(row[2] or "nan")} for row in rows]
        write_report(folder / "report.html", title="t", rows=shown, figures=figures, summary={"dice": {}})
    return folder


A = [("p1", "x", 0.5, 4), ("p2", "x", 0.7, 2), ("p3", "y", 0.9, 1), ("p4", "y", 0, "", "missed")]
B = [("p4", "y", 0.4, 9), ("p1", "x", 0.6, 3), ("p2", "x", 0.6, 2), ("p3", "y", 0.9, 1.5)]


@pytest.fixture
def folders(tmp_path):
    knobs = {"mirror_axes": [], "amp": True, "output_dir": "a"}
    pictures = {"p1": picture(10), "p4": picture(20)}
    weights = {"weights": {"sha256": "c0ffee"}}
    one = evaluation(tmp_path / "a", A, {"knobs": knobs, "command": "run <a>", "weights": weights}, pictures)
    knobs = {**knobs, "mirror_axes": [0, 1], "output_dir": "b"}
    other = evaluation(tmp_path / "b", B, {"knobs": knobs, "weights": weights}, {"p4": picture(30)})
    return one, other


def test_differences_by_hand(folders, tmp_path):
    summary = compare(folders, tmp_path / "out")
    assert json.loads((tmp_path / "out/compare.json").read_text()) == summary
    dice, hd95 = summary["differences"]
    assert (dice["letter"], dice["metric"], dice["n"], dice["groups"]) == ("B", "dice", 4, 2)
    # .1, -.1, 0 and .4, in the order of A's cases; groups x and y have the means 0 and .2
    assert (dice["before"], dice["after"], dice["difference"]) == pytest.approx((0.525, 0.625, 0.1))
    assert (dice["low"], dice["high"]) == pytest.approx((0.0, 0.2))
    assert (dice["wins"], dice["ties"], dice["losses"]) == (2, 1, 1)
    # lower is better: -1, 0, .5 and one that only B has
    assert (hd95["n"], hd95["wins"], hd95["ties"], hd95["losses"], hd95["only_after"]) == (3, 1, 1, 1, 1)
    assert [one["failures"] for one in summary["evaluations"]] == [
        {"missed": 1, "false positive": 0},
        {"missed": 0, "false positive": 0},
    ]
    assert [one["differs"] for one in summary["evaluations"]] == [{"mirror_axes": []}, {"mirror_axes": [0, 1]}]
    with (tmp_path / "out/compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["p1", "p2", "p3", "p4"]
    assert [rows[3][name] for name in ("dice_A", "dice_B", "hd95_mm_A", "status_A", "status_B")] == [
        *("0", "0.4", "", "missed", "ok"),
    ]


def test_page_shows_what_changed_most_side_by_side(folders, tmp_path):
    compare(folders, tmp_path / "out")
    page = (tmp_path / "out/compare.html").read_text(encoding="utf-8")
    changed = page[page.index('id="changed"') :]
    places = [changed.index(f"<h3>{case}</h3>") for case in ("p4", "p1", "p2")]
    assert places == sorted(places)
    assert "<h3>p3</h3>" not in page  # did not change
    for grey, times in ((10, 1), (20, 1), (30, 1)):
        assert page.count(base64.b64encode(picture(grey)).decode()) == times
    assert "run &lt;a&gt;" in page
    assert "1 only in B" in page
    assert "A 1 missed, 0 false positive; B 0 missed" in page
    assert "over 2 groups" in page
    assert not re.search(r"https?:", page)
    files = ["dice_B.svg", "differences.csv", "differences.tex", "hd95_mm_B.svg"]
    assert sorted(path.name for path in (tmp_path / "out/report").iterdir()) == files
    latex = (tmp_path / "out/report/differences.tex").read_text()
    assert "B & dice & 4 & 2 & 0.525 & 0.625 & 0.100" in latex


def test_three_evaluations_on_the_command_line(folders, tmp_path):
    third = evaluation(tmp_path / "c", A)
    words = ["compare", *map(str, (*folders, third)), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "B: 0.625" in done.output
    assert "C: 0.525" in done.output
    assert f"Results: {tmp_path / 'out/compare.html'}" in done.output
    found = json.loads((tmp_path / "out/compare.json").read_text())
    assert [row["p"] for row in found["differences"] if row["letter"] == "C"] == [None, None]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (B[1:], r"scored different cases: p4 not in .*/b\. Evaluate both on the same split"),
        ([*B, ("p9", "z", 1, 1)], r"scored different cases: p9 not in .*/a\."),
        ([(*B[0], "ok", "", "beef"), *B[1:]], r"p4 of .*/a and of .*/b have the same name but another image or label"),
        ([], "has no cases: evaluate again"),
        (None, "b has no metrics.csv: give a folder that `segbundles evaluate`"),
    ],
)
def test_refuses_different_cases(tmp_path, rows, message):
    one = evaluation(tmp_path / "a", [*A[:3], (*A[3], "", "c0ffee")])
    other = tmp_path / "b" if rows is None else evaluation(tmp_path / "b", rows)
    with pytest.raises(ValueError, match=message):
        compare([one, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_one_evaluation_and_another_task(tmp_path):
    one = evaluation(tmp_path / "a", A)
    with pytest.raises(ValueError, match="two evaluations or more, got 1"):
        compare([one], tmp_path / "out")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/metrics.csv").write_text("case,v_rand\n" + "".join(f"{row[0]},0.5\n" for row in A))
    with pytest.raises(ValueError, match="have no metric in common: compare evaluations of one task"):
        compare([one, tmp_path / "b"], tmp_path / "out")


def test_without_groups_each_case_counts_by_itself(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, dice in zip(paths, ((0.5, 0.6), (0.7, 0.6)), strict=True):
        path.mkdir()
        (path / "metrics.csv").write_text(f"case,dice\n1,{dice[0]}\n2,{dice[1]}\n")
    summary = compare(paths, tmp_path / "out")
    assert (summary["groups"], summary["unit"]) == (2, "cases")
    assert "each case counts by itself" in (tmp_path / "out/compare.html").read_text(encoding="utf-8")


def test_pictures_and_numbers_are_read_back(folders):
    assert case_figures(folders[0]) == {"p1": picture(10), "p4": picture(20)}
    assert case_figures(folders[0].parent) == {}
    row = read_evaluation(folders[0]).rows[3]
    assert (row["case"], row["dice"], row["status"]) == ("p4", 0.0, "missed")
    assert np.isnan(row["hd95_mm"])


def test_content_depends_on_truth_and_image(tmp_path):
    image = tmp_path / "a.nrrd"
    image.write_bytes(b"grey")
    label = torch.tensor([[[0, 1], [1, 0]]])

    def content(truth=label):
        return content_of({"image": MetaTensor(label, meta={"filename_or_obj": str(image)}), "label": truth})

    first = content()
    assert content() == first
    assert len({first, content(1 - label), content(label.reshape(1, 1, 4))}) == 3
    image.write_bytes(b"gray")
    assert content() != first
