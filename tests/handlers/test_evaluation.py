from __future__ import annotations

import csv
import io
import json
import logging
import re

import numpy as np
import pytest
import tifffile
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged
from PIL import Image

from segbundles import report
from segbundles.handlers import EvaluationReport
from segbundles.inferers import LocatorCropInferer
from segbundles.transforms import LabelToClassd, LogitsToClassd, SetSpacingd

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


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(folder):
    return read(folder / "metrics.csv")


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("figures", [False, True])
def test_three_files(tmp_path, figures, batch_size, caplog):
    with caplog.at_level(logging.INFO, "segbundles"):
        evaluate(tmp_path, CASES, batch_size, figures=figures, title="Fish & chips", settings={"weights": "w.pt"})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "evaluation.log",
        "metrics.csv",
        "report.html",
        "summary.json",
    ]
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


def planes(*columns, width=8):
    """(W, 8, slices): slice k has ones in ``columns[k]`` of its rows 2 to 5."""
    volume = np.zeros((width, 8, len(columns)), dtype=np.uint8)
    for k, (start, end) in enumerate(columns):
        volume[start:end, 2:6, k] = 1
    return volume


# by slice: half found; nothing there, 8 pixels predicted; nothing at all; missed; all found
TRUTH = planes((1, 5), (0, 0), (0, 0), (0, 1), (3, 6))
SEEN = planes((3, 7), (0, 2), (0, 0), (0, 0), (3, 6))
HEALTHY = planes((0, 0), (0, 0))
SOMETHING = planes((0, 0), (4, 5))


def write_stack(folder, truth, seen):
    """Three-channel slices of which the second shows what will be predicted, and masks; an entry of the datalist."""
    folder.mkdir(parents=True)
    entry = {"image": [], "label": [], "case": folder.name}
    for k in range(truth.shape[-1]):
        picture = np.random.default_rng(k).integers(0, 90, (*truth.shape[1::-1], 3), dtype=np.uint8)
        picture[..., 1] += 150 * seen[..., k].T
        for key, postfix, values in (("image", "", picture), ("label", "_mask", 255 * truth[..., k].T)):
            path = folder / f"{folder.name}_{k + 1}{postfix}.tif"
            tifffile.imwrite(path, values, photometric="rgb" if key == "image" else "minisblack")
            entry[key].append(str(path))
    return entry


class SecondChannel(torch.nn.Module):
    def forward(self, x):
        return x[:, 1:2] - 120.0


def evaluate_stacks(folder, entries, spacing_mm=None, **arguments):
    handler = EvaluationReport(folder, **{"slice_axis": 2, "figures": False, **arguments})
    keys = ["image", "label"]
    before = Compose(
        [
            LoadImaged(keys, reader="segbundles.data.StackReader"),
            EnsureChannelFirstd(keys),
            LabelToClassd("label"),
            SetSpacingd(keys, spacing_mm),
        ]
    )
    evaluator = SupervisedEvaluator(
        "cpu",
        DataLoader(Dataset(entries, before)),
        SecondChannel(),
        postprocessing=LogitsToClassd("pred"),
        val_handlers=[handler],
    )
    evaluator.run()
    return handler


@pytest.fixture
def entries(tmp_path):
    source = tmp_path / "d"
    return [
        write_stack(source / "ill", TRUTH, SEEN),
        write_stack(source / "alarm", HEALTHY, SOMETHING),
        write_stack(source / "healthy", HEALTHY, HEALTHY),
        write_stack(source / "one", TRUTH[..., -1:], SEEN[..., -1:]),
    ]


def test_slices_of_stacks_by_hand(tmp_path, entries):
    evaluate_stacks(tmp_path / "o", entries)
    # 16 + 4 + 12 voxels of truth, 16 + 8 + 12 predicted, 8 + 12 in both; by slice 2 * 8 / 32, 0 and 1
    expected = [
        ("ill", "ok", f"{2 * 20 / 68:.6g}", "0.5", "3", "2", "1"),
        ("alarm", "false positive", "0", "", "0", "2", "1"),
        ("healthy", "empty", "", "", "0", "2", "0"),
        ("one", "ok", "1", "1", "1", "0", "0"),
    ]
    columns = ["case", "status", "dice", "slice_dice", "lesion_slices", "lesion_free_slices", "false_positive_slices"]
    rows = table(tmp_path / "o")
    assert [tuple(row[c] for c in columns) for row in rows] == expected
    assert [(*row.values(),) for row in read(tmp_path / "o/slices.csv")] == [
        ("ill", "ill_1.tif", "0.5", "16", "16", "16"),
        ("ill", "ill_2.tif", "", "0", "8", "8"),
        ("ill", "ill_3.tif", "", "0", "0", "0"),
        ("ill", "ill_4.tif", "0", "4", "0", "4"),
        ("ill", "ill_5.tif", "1", "12", "12", "0"),
        ("alarm", "alarm_1.tif", "", "0", "0", "0"),
        ("alarm", "alarm_2.tif", "", "0", "4", "4"),
        ("healthy", "healthy_1.tif", "", "0", "0", "0"),
        ("healthy", "healthy_2.tif", "", "0", "0", "0"),
        ("one", "one_1.tif", "1", "12", "12", "0"),
    ]
    assert list(read(tmp_path / "o/slices.csv")[0]) == [
        *("case", "slice", "dice", "truth_pixels", "predicted_pixels", "error_pixels")
    ]
    summary = json.loads((tmp_path / "o/summary.json").read_text())
    assert (summary["dice"]["mean"], summary["dice"]["n"]) == (pytest.approx((40 / 68 + 0 + 1) / 3), 3)
    assert (summary["slice_dice"]["mean"], summary["slice_dice"]["n"]) == (0.75, 2)
    assert summary["slice_dice_all"] == {
        "mean": pytest.approx(2.5 / 4),  # of 0.5, 0, 1 and 1
        "sd": pytest.approx(np.std([0.5, 0, 1, 1], ddof=1)),
        "median": 0.75,
        "worst": 0.0,
        "n": 4,
    }
    counts = ("cases", "missed", "false_positive", "empty", "lesion_slices", "lesion_free_slices")
    assert [summary[c] for c in (*counts, "false_positive_slices")] == [4, 0, 1, 1, 4, 6, 2]
    page = (tmp_path / "o/report.html").read_text(encoding="utf-8")
    assert "6 slices hold no truth; in 2 of them something was predicted" in page
    assert "A case with no truth at all has no Dice" in page
    assert "slice_dice_all" in page


def test_no_distances_without_spacing(tmp_path, entries):
    evaluate_stacks(tmp_path / "o", entries)
    assert {row["spacing_mm"] for row in table(tmp_path / "o")} == {"unknown"}
    for name in ("metrics.csv", "summary.json"):
        text = (tmp_path / "o" / name).read_text()
        assert "hd" not in text
        assert "assd" not in text
    assert "Distances are left out for these images" in (tmp_path / "o/report.html").read_text(encoding="utf-8")


def test_distances_where_spacing_is_set(tmp_path, entries):
    evaluate_stacks(tmp_path / "o", entries, spacing_mm=[0.5, 0.5, 30])
    rows = table(tmp_path / "o")
    assert {row["spacing_mm"] for row in rows} == {"0.5 x 0.5 x 30"}
    # the one-row truth of slice 4 is 30 mm from slice 5 and 1.5 mm from its columns
    assert [row["hd_mm"] for row in rows] == [f"{np.hypot(30, 1.5):.6g}", "", "", "0"]
    assert "Distances are left out" not in (tmp_path / "o/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("unknown", [0, 1])
def test_spacing_known_of_some(tmp_path, unknown):
    handler = EvaluationReport(tmp_path, figures=False, slice_axis=2)
    for k in range(2):
        meta = {"filename_or_obj": f"{k}", "has_spacing": k != unknown, "notes": "one channel"}
        truth, pred = (MetaTensor(torch.as_tensor(x)[None], affine=AFFINE, meta=dict(meta)) for x in (TRUTH, SEEN))
        handler.add_case(f"c{k}", truth, truth, pred)
    handler.write()
    rows = table(tmp_path)
    known = 1 - unknown
    assert (rows[unknown]["hd_mm"], rows[unknown]["spacing_mm"]) == ("", "unknown")
    assert float(rows[known]["hd_mm"]) > 0
    assert rows[known]["spacing_mm"] == "1 x 2 x 0.5"
    assert list(rows[0]) == [
        *("case", "status", "dice", "jaccard", "precision", "recall", "hd_mm", "hd95_mm", "assd_mm", "slice_dice"),
        *("lesion_slices", "lesion_free_slices", "false_positive_slices", "spacing_mm", "notes"),
    ]
    assert [row["notes"] for row in rows] == ["one channel"] * 2
    assert json.loads((tmp_path / "summary.json").read_text())["hd_mm"]["n"] == 1
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Distances are left out for 1 of 2 cases" in page
    # without files the slices are counted
    assert [row["slice"] for row in read(tmp_path / "slices.csv")] == ["1", "2", "3", "4", "5"] * 2


def test_another_slice_axis(tmp_path):
    handler = EvaluationReport(tmp_path, figures=False, slice_axis=0)
    truth, pred = (MetaTensor(torch.as_tensor(x)[None], meta={"slices": "a\nb"}) for x in (TRUTH, SEEN))
    handler.add_case("c", truth[:, :2], truth[:, :2], pred[:, :2])
    handler.write()
    # x = 0: truth in slice 4, predicted in slice 2; x = 1: truth in slice 1, predicted in slice 2
    assert [(*row.values(),) for row in read(tmp_path / "slices.csv")] == [
        ("c", "1", "0", "4", "4", "8"),
        ("c", "2", "0", "4", "4", "8"),
    ]


def test_a_2d_image_has_no_slices(tmp_path):
    handler = EvaluationReport(tmp_path, slice_axis=2)
    with pytest.raises(ValueError, match=r"slice_axis must be an axis of a volume of three, got 2 of shape \(8, 8\)"):
        handler.add_case("c", torch.zeros(3, 8, 8), torch.zeros(1, 8, 8), torch.zeros(1, 8, 8))


def test_the_figure_shows_one_channel_and_the_slice_with_most_errors(tmp_path, entries, monkeypatch):
    seen = []
    monkeypatch.setattr(report, "case_figure", lambda *given, **named: seen.append((given, named)) or JPEG)
    evaluate_stacks(tmp_path / "o", entries[:1], figures=True, channel=1)
    ((image, truth, pred), named) = seen[0]
    assert image.shape == TRUTH.shape
    np.testing.assert_array_equal(image > 120, SEEN)
    assert named["slice_axis"] == 2
    reasons = dict(report.choose_slices(truth, pred))
    assert "most errors" in reasons[0]
    with pytest.raises(ValueError, match=r"channel 3 is to be shown, ill has 3: give one from 0, or None"):
        evaluate_stacks(tmp_path / "o", entries[:1], figures=True, channel=3)


def _jpeg():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "JPEG")
    return buffer.getvalue()


JPEG = _jpeg()


def test_a_report_without_slices_has_no_table_of_them(tmp_path):
    evaluate(tmp_path, CASES[:1], figures=False)
    assert not (tmp_path / "slices.csv").exists()
    assert "slice_dice" not in (tmp_path / "report.html").read_text(encoding="utf-8")
