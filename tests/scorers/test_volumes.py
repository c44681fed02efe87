from __future__ import annotations

import io

import numpy as np
import pytest
import tifffile
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged
from PIL import Image

from segbundles import report
from segbundles.scorers import SliceScorer, VolumeScorer
from segbundles.statistics import DETECTION_COLUMNS
from segbundles.transforms import LabelToClassd, SetSpacingd

AFFINE = torch.diag(torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64))


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


def load_stack(folder, truth, seen, spacing_mm=None):
    """A case read from three-channel slices, whose second channel shows what is predicted, and their masks."""
    folder.mkdir(parents=True)
    entry = {"image": [], "label": [], "case": folder.name}
    for k in range(truth.shape[-1]):
        picture = np.random.default_rng(k).integers(0, 90, (*truth.shape[1::-1], 3), dtype=np.uint8)
        picture[..., 1] += 150 * seen[..., k].T
        for key, postfix, values in (("image", "", picture), ("label", "_mask", 255 * truth[..., k].T)):
            path = folder / f"{folder.name}_{k + 1}{postfix}.tif"
            tifffile.imwrite(path, values, photometric="rgb" if key == "image" else "minisblack")
            entry[key].append(str(path))
    keys = ["image", "label"]
    load = [LoadImaged(keys, reader="segbundles.data.StackReader"), EnsureChannelFirstd(keys)]
    case = Compose([*load, LabelToClassd("label"), SetSpacingd(keys, spacing_mm)])(entry)
    return {**case, "pred": (case["image"][1:2] > 120).to(torch.uint8)}


@pytest.fixture(params=[None])
def stacks(tmp_path, request):
    given = {"ill": (TRUTH, SEEN), "alarm": (HEALTHY, SOMETHING), "healthy": (HEALTHY, HEALTHY)}
    given |= {"one": (TRUTH[..., -1:], SEEN[..., -1:])}
    return [load_stack(tmp_path / name, *maps, request.param) for name, maps in given.items()]


def test_slices_of_stacks_by_hand(stacks, evaluate):
    written = evaluate(SliceScorer(), stacks, figures=False)
    # 16 + 4 + 12 voxels of truth, 16 + 8 + 12 predicted, 8 + 12 in both; by slice 2 * 8 / 32, 0 and 1
    expected = [
        ("ill", "ok", f"{2 * 20 / 68:.6g}", "0.5", "3", "2", "1"),
        ("alarm", "false positive", "0", "", "0", "2", "1"),
        ("healthy", "empty", "", "", "0", "2", "0"),
        ("one", "ok", "1", "1", "1", "0", "0"),
    ]
    columns = ["case", "status", "dice", "slice_dice", "lesion_slices", "lesion_free_slices", "false_positive_slices"]
    assert [tuple(row[c] for c in columns) for row in written.table()] == expected
    slices = written.table("slices.csv")
    assert [(*row.values(),) for row in slices] == [
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
    assert list(slices[0]) == ["case", "slice", "dice", "truth_pixels", "predicted_pixels", "error_pixels"]
    summary = written.summary
    assert (summary["dice"]["mean"], summary["dice"]["n"]) == (pytest.approx((40 / 68 + 0 + 1) / 3), 3)
    assert (summary["slice_dice"]["mean"], summary["slice_dice"]["n"]) == (0.75, 2)
    spread = pytest.approx(np.std([0.5, 0, 1, 1], ddof=1))
    # its interval is over the cases with such slices, "ill" with a mean of 0.5 and "one" with 1
    found = {"mean": 2.5 / 4, "sd": spread, "median": 0.75, "worst": 0.0, "n": 4, "low": 0.5, "high": 1.0}
    assert summary["slice_dice_all"].items() >= found.items()
    counts = ("cases", "missed", "false_positive", "empty", "lesion_slices", "lesion_free_slices")
    assert [summary[c] for c in (*counts, "false_positive_slices")] == [4, 0, 1, 1, 4, 6, 2]
    assert "6 slices contain no truth; in 2 of them something was predicted" in written.page
    assert "A case without any truth has no Dice" in written.page
    assert "Dice of all slices" in written.page
    sizes = summary["agreement"]["predicted_pixels"]
    assert (sizes["n"], sizes["bias"]) == (4, (36 - 32 + 4) / 4)
    # no two slices of "ill" touch each other
    assert [row["objects"] for row in written.table()] == ["3", "0", "0", "1"]
    assert [row["predicted_objects"] for row in written.table()] == ["3", "1", "0", "1"]


def test_no_distances_without_spacing(stacks, evaluate):
    written = evaluate(SliceScorer(), stacks, figures=False)
    assert {row["spacing_mm"] for row in written.table()} == {"unknown"}
    for name in ("metrics.csv", "summary.json"):
        text = (written.folder / name).read_text()
        assert "hd" not in text
        assert "assd" not in text
    assert "Distances are left out for these images" in written.page


@pytest.mark.parametrize("stacks", [[0.5, 0.5, 30]], indirect=True)
def test_distances_where_spacing_is_set(stacks, evaluate):
    written = evaluate(SliceScorer(), stacks, figures=False)
    assert {row["spacing_mm"] for row in written.table()} == {"0.5 x 0.5 x 30"}
    # the one-row truth of slice 4 is 30 mm from slice 5 and 1.5 mm from its columns
    assert [row["hd_mm"] for row in written.table()] == [f"{np.hypot(30, 1.5):.6g}", "", "", "0"]
    assert "Distances are left out" not in written.page


@pytest.mark.parametrize("unknown", [0, 1])
def test_spacing_known_of_some(unknown, evaluate):
    cases = []
    for k in range(2):
        meta = {"filename_or_obj": f"{k}", "has_spacing": k != unknown, "notes": "one channel"}
        truth, pred = (MetaTensor(torch.as_tensor(x)[None], affine=AFFINE, meta=dict(meta)) for x in (TRUTH, SEEN))
        cases.append({"image": truth, "label": truth, "pred": pred})
    written = evaluate(SliceScorer(tolerance_mm=0.4), cases, figures=False)
    rows, known = written.table(), 1 - unknown
    assert (rows[unknown]["hd_mm"], rows[unknown]["spacing_mm"]) == ("", "unknown")
    assert float(rows[known]["hd_mm"]) > 0
    assert rows[known]["spacing_mm"] == "1 x 2 x 0.5"
    assert list(rows[0]) == [
        *("case", "group", "content", "status", "dice", "jaccard", "precision", "recall", "hd_mm", "hd95_mm"),
        *("assd_mm", "surface_dice", "true_volume_ml", "predicted_volume_ml", "slice_dice", "lesion_slices"),
        *("lesion_free_slices", "false_positive_slices", *DETECTION_COLUMNS, "spacing_mm", "notes", "true_pixels"),
        "predicted_pixels",
    ]
    assert (float(rows[known]["true_volume_ml"]), rows[unknown]["true_volume_ml"]) == (0.032, "")  # 32 voxels of 1 mm³
    assert (rows[unknown]["true_pixels"], rows[known]["true_pixels"]) == ("32", "")
    assert 0 < float(rows[known]["surface_dice"]) < 1
    assert "tolerance of the surface Dice is 0.4 mm" in written.page
    assert [row["notes"] for row in rows] == ["one channel"] * 2
    assert written.summary["hd_mm"]["n"] == 1
    assert "Distances are left out for 1 of 2 cases" in written.page
    # without files the slices are counted
    assert [row["slice"] for row in written.table("slices.csv")] == ["1", "2", "3", "4", "5"] * 2


def test_another_slice_axis(evaluate):
    truth, pred = (MetaTensor(torch.as_tensor(x)[None, :2], meta={"slices": "a\nb"}) for x in (TRUTH, SEEN))
    case = {"image": truth, "label": truth, "pred": pred, "case": "c"}
    written = evaluate(SliceScorer(slice_axis=0), [case], figures=False)
    # x = 0: truth in slice 4, predicted in slice 2; x = 1: truth in slice 1, predicted in slice 2
    assert [(*row.values(),) for row in written.table("slices.csv")] == [
        ("c", "1", "0", "4", "4", "8"),
        ("c", "2", "0", "4", "4", "8"),
    ]


def test_a_2d_image_has_no_slices():
    plane = torch.zeros(1, 8, 8)
    with pytest.raises(ValueError, match=r"^slice_axis must be an axis of a 3D volume, got 2 and shape \(8, 8\)"):
        SliceScorer().score("c", {"image": plane, "label": plane, "pred": plane}, False)


def test_the_figure_shows_one_channel_and_the_slice_with_most_errors(tmp_path, evaluate, monkeypatch):
    buffer, seen = io.BytesIO(), []
    Image.new("RGB", (4, 4)).save(buffer, "JPEG")
    monkeypatch.setattr(report, "case_figure", lambda *given, **more: seen.append((given, more)) or buffer.getvalue())
    case = load_stack(tmp_path / "ill", TRUTH, SEEN)
    evaluate(SliceScorer(channel=1), [case])
    ((image, truth, pred), more) = seen[0]
    assert image.shape == TRUTH.shape
    np.testing.assert_array_equal(image > 120, SEEN)
    assert more["slice_axis"] == 2
    reasons = dict(report.choose_slices(truth, pred))
    assert "most errors" in reasons[0]
    with pytest.raises(ValueError, match=r"^channel is 3, but .*ill_1.tif has 3: count from 0, or give None\.$"):
        SliceScorer(channel=3).score("ill", case, True)


def test_a_2d_colour_image(evaluate):
    truth = torch.zeros(1, 20, 16, dtype=torch.uint8)
    truth[0, 4:9, 3:8] = 1
    image = torch.randint(0, 255, (3, 20, 16), dtype=torch.uint8)
    written = evaluate(VolumeScorer(), [{"image": image, "label": truth, "pred": truth}])
    assert written.table()[0]["dice"] == "1"
    assert "data:image/jpeg" in written.page
    assert "slice_dice" not in written.page
