from __future__ import annotations

import csv
import json
import logging
import re

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator

from segbundles import report
from segbundles.handlers import EvaluationReport
from segbundles.inferers import LocatorCropInferer
from segbundles.transforms import LogitsToClassd

AFFINE = torch.diag(torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64))


def case(file, truth, seen=None, meta=True, **more):
    """A volume of 12 x 12 x 12 whose bright box is what will be predicted."""
    label, image = torch.zeros(1, 12, 12, 12), 0.01 * torch.rand(1, 12, 12, 12)
    if truth:
        label[(0, *(slice(a, b) for a, b in truth))] = 1
    if seen:
        image[(0, *(slice(a, b) for a, b in seen))] += 1
    if meta:
        image = MetaTensor(image, affine=AFFINE, meta={"filename_or_obj": file})
        label = MetaTensor(label, affine=AFFINE, meta={"filename_or_obj": file.replace("img", "lab")})
    return {"image": image, "label": label, **more}


BOX, OTHER = ((2, 6),) * 3, ((2, 6), (2, 6), (4, 8))
CASES = [
    case("d/p1/img.nrrd", BOX, BOX),
    case("d/p2/img.nrrd", BOX, OTHER),
    case("d/p3/img.nrrd", BOX),
    case("d/p4/img.nrrd", None, BOX),
]


class Network(torch.nn.Module):
    def forward(self, x):
        return 10 * (x - 0.5)


def evaluate(folder, cases, batch_size=1, locator=False, **arguments):
    handler = EvaluationReport(folder, **arguments)
    evaluator = SupervisedEvaluator(
        "cpu",
        DataLoader(Dataset(cases), batch_size=batch_size),
        Network(),
        inferer=LocatorCropInferer(
            16, Network() if locator else None, locator_spacing_mm=[1.0, 2.0, 0.5], margin_mm=0, divisible_k=4
        ),
        postprocessing=LogitsToClassd("pred"),
        val_handlers=[handler],
    )
    evaluator.run()
    return handler


def table(folder):
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("figures", [False, True])
def test_three_files(tmp_path, figures, batch_size, caplog):
    with caplog.at_level(logging.INFO, "segbundles"):
        evaluate(tmp_path, CASES, batch_size, figures=figures, title="Fish & chips", settings={"weights": "w.pt"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.csv", "report.html", "summary.json"]
    rows = table(tmp_path)
    assert [row["case"] for row in rows] == ["p1/img", "p2/img", "p3/img", "p4/img"]
    assert [row["status"] for row in rows] == ["ok", "ok", "missed", "false positive"]
    assert [row["dice"] for row in rows] == ["1", "0.5", "0", "0"]
    assert [row["hd_mm"] for row in rows] == ["0", "1", "", ""]  # 2 voxels of 0.5 mm; undefined
    assert [row["recall"] for row in rows] == ["1", "0.5", "0", ""]
    assert {row["spacing_mm"] for row in rows} == {"1 x 2 x 0.5"}
    assert list(rows[0])[-2:] == ["spacing_mm", "notes"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["dice"] == {
        "mean": 0.375,
        "sd": pytest.approx(np.std([1, 0.5, 0, 0], ddof=1)),
        "median": 0.25,
        "worst": 0.0,
        "n": 4,
    }
    assert summary["hd_mm"]["n"] == 2
    assert (summary["cases"], summary["missed"], summary["false_positive"]) == (4, 1, 1)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Fish &amp; chips" in page
    assert "w.pt" in page
    assert "p3/img" in page
    assert page.count("data:image/jpeg") == (4 if figures else 0)
    assert "Dice 0.3750 (sd 0.4787, worst 0.0000, n 4), 1 missed" in caplog.messages


def test_units_are_given_for_lengths_alone(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(report, "write_report", lambda path, **arguments: seen.update(arguments))
    evaluate(tmp_path, CASES[:2], figures=False, num_classes=3)
    assert set(seen["units"]) == {f"{m}_mm{s}" for m in ("hd", "hd95", "assd") for s in ("", "_1", "_2")}
    assert set(seen["units"].values()) == {"mm"}
    assert {"dice", "dice_1", "hd_mm_2"} < set(seen["summary"])
    assert seen["figures"] == {}


def test_kept_truth_and_notes_of_a_locator(tmp_path):
    evaluate(tmp_path, CASES, figures=False, locator=True)
    rows = table(tmp_path)
    assert [row["truth_in_box"] for row in rows] == ["1", "0.5", "1", ""]
    assert [row["notes"] for row in rows] == ["", "", "locator found nothing: whole volume segmented", ""]


def test_names(tmp_path):
    """The datalist's, or the image's folder and stem; the whole path where two would be the same."""
    cases = [
        case("d/p1/img.nii.gz", BOX, BOX, case="patient 1"),
        case("d/p1/img.nii.gz", BOX, BOX, case=""),
        case("e/p1/img.nii.gz", BOX, BOX, case=""),
        case("e/p1/img.nii.gz", BOX, BOX, case=""),
    ]
    evaluate(tmp_path, cases, figures=True)
    names = ["patient 1", "p1/img", "e/p1/img.nii.gz", "e/p1/img.nii.gz (4)"]
    assert [row["case"] for row in table(tmp_path)] == names
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("data:image/jpeg") == 4


def test_plain_tensors(tmp_path):
    evaluate(tmp_path, [case("", BOX, BOX, meta=False), case("", BOX, OTHER, meta=False)], figures=False)
    rows = table(tmp_path)
    assert [row["case"] for row in rows] == ["image", "image (2)"]
    assert [row["hd_mm"] for row in rows] == ["0", "2"]
    assert rows[0]["spacing_mm"] == "1 x 1 x 1"


def test_a_second_run_starts_afresh(tmp_path):
    handler = EvaluationReport(tmp_path, figures=False)
    evaluator = SupervisedEvaluator(
        "cpu",
        DataLoader(Dataset(CASES[:2])),
        Network(),
        postprocessing=LogitsToClassd("pred"),
        val_handlers=[handler],
    )
    evaluator.run()
    evaluator.run()
    assert len(table(tmp_path)) == 2


def test_output_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "o").touch()
    with pytest.raises(ValueError, match=re.escape(f"output_dir '{tmp_path}/o' cannot be written to")):
        evaluate(tmp_path / "o", CASES)


def test_2d_colour(tmp_path):
    handler = EvaluationReport(tmp_path)
    truth = torch.zeros(1, 20, 16, dtype=torch.uint8)
    truth[0, 4:9, 3:8] = 1
    handler.add_case("frame", torch.randint(0, 255, (3, 20, 16), dtype=torch.uint8), truth, truth)
    handler.write()
    assert table(tmp_path)[0]["dice"] == "1"
