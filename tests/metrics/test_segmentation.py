from __future__ import annotations

import logging
import math

import pytest
import torch
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_surface_dice,
)

from segbundles.metrics import METRIC_UNITS, higher_is_better, segmentation_metrics, summarize
from segbundles.metrics.segmentation import slice_metrics

NAN = math.nan


def box(size, start, end, value=1):
    out = torch.zeros(size, dtype=torch.uint8)
    out[tuple(slice(a, b) for a, b in zip(start, end, strict=True))] = value
    return out


def same(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, nan_ok=True), name


def test_overlaps_and_distances_by_hand():
    """Boxes 4 x 4 x 4, the prediction one voxel of 2.5 mm further along the last axis."""
    truth = box((10, 10, 10), (2, 2, 2), (6, 6, 6))
    prediction = box((10, 10, 10), (2, 2, 3), (6, 6, 7))
    found = segmentation_metrics(prediction, truth, (1.0, 2.0, 2.5))
    # a surface is two full end slices of 16 voxels and two rings of 12. One end slice of each box is 2.5 mm off the
    # other box; the 4 inner voxels of its other end slice, in the other's ring, are min(1, 2, 2.5) mm off that
    distances = [2.5] * 16 + [1.0] * 4 + [0.0] * 36
    same(
        found,
        {
            "status": "ok",
            "dice": 2 * 48 / 128,
            "jaccard": 48 / 80,
            "precision": 48 / 64,
            "recall": 48 / 64,
            "hd_mm": 2.5,
            "hd95_mm": 2.5,
            "assd_mm": sum(distances) / 56,
        },
    )


def test_precision_and_recall_are_not_swapped():
    truth, prediction = box((9, 9), (0, 0), (4, 4)), box((9, 9), (0, 0), (4, 2))
    found = segmentation_metrics(prediction, truth, (1, 1))
    assert (found["precision"], found["recall"]) == (1.0, 0.5)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.625, 0.8, 3.1)])
@pytest.mark.parametrize("seed", range(3))
def test_parity_with_monai(spacing, seed):
    generator = torch.Generator().manual_seed(seed)
    truth = box((16, 14, 12), (3, 3, 3), (12, 11, 9)) | (torch.rand(16, 14, 12, generator=generator) > 0.97)
    prediction = box((16, 14, 12), (4, 2, 4), (14, 10, 9)) | (torch.rand(16, 14, 12, generator=generator) > 0.98)
    found = segmentation_metrics(prediction, truth, spacing)
    y, t = prediction[None, None].float(), truth[None, None].float()
    assert found["dice"] == pytest.approx(compute_dice(y, t).item(), rel=1e-6)
    for name, percentile in (("hd_mm", None), ("hd95_mm", 95)):
        expected = compute_hausdorff_distance(
            y, t, include_background=True, percentile=percentile, spacing=spacing
        ).item()
        assert found[name] == pytest.approx(expected, rel=1e-6)
    expected = compute_average_surface_distance(y, t, include_background=True, symmetric=True, spacing=spacing).item()
    assert found["assd_mm"] == pytest.approx(expected, rel=1e-6)
    for tolerance in (0.0, 1.0, 2.1):
        found = segmentation_metrics(prediction, truth, spacing, tolerance_mm=tolerance)
        expected = compute_surface_dice(y, t, [tolerance], include_background=True, spacing=spacing).item()
        assert found["surface_dice"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("tolerance", "expected"), [(0.5, 6 / 8), (1.0, 7 / 8), (2.0, 1.0)])
def test_surface_dice_by_hand(tolerance, expected):
    """Lines of 3 and 5 pixels of 1 mm that start together: 3 + 3 pixels lie on each other, 2 are 1 and 2 mm off."""
    truth, prediction = box((3, 9), (1, 1), (2, 4)), box((3, 9), (1, 1), (2, 6))
    found = segmentation_metrics(prediction, truth, (1.0, 1.0), tolerance_mm=tolerance)
    assert found["surface_dice"] == pytest.approx(expected)


def test_2d_and_bool():
    truth, prediction = box((8, 8), (1, 1), (4, 4)).bool(), box((8, 8), (1, 1), (4, 6)).bool()
    found = segmentation_metrics(prediction, truth, (3.0, 0.5))
    assert found["dice"] == pytest.approx(2 * 9 / 24)
    assert found["hd_mm"] == pytest.approx(1.0)


EMPTY, FULL = torch.zeros(5, 5, 5, dtype=torch.uint8), box((5, 5, 5), (1, 1, 1), (3, 3, 3))
UNDEFINED = {"hd_mm": NAN, "hd95_mm": NAN, "assd_mm": NAN}


@pytest.mark.parametrize(
    ("prediction", "truth", "status", "overlap", "precision", "recall"),
    [
        (EMPTY, FULL, "missed", 0.0, NAN, 0.0),
        (FULL, EMPTY, "false positive", 0.0, 0.0, NAN),
        (EMPTY, EMPTY, "empty", NAN, NAN, NAN),
    ],
)
def test_missed_false_positive_and_empty(prediction, truth, status, overlap, precision, recall):
    expected = {"status": status, "dice": overlap, "jaccard": overlap, "precision": precision, "recall": recall}
    same(segmentation_metrics(prediction, truth, (1, 1, 1)), expected | UNDEFINED)
    expected |= UNDEFINED | {"surface_dice": overlap}
    same(segmentation_metrics(prediction, truth, (1, 1, 1), tolerance_mm=1.0), expected)


def test_no_overlap_is_missed_with_distances():
    prediction, truth = box((5, 5, 5), (0, 0, 0), (1, 1, 1)), box((5, 5, 5), (0, 0, 4), (1, 1, 5))
    found = segmentation_metrics(prediction, truth, (1, 1, 2))
    assert (found["status"], found["dice"], found["hd_mm"]) == ("missed", 0.0, 8.0)


@pytest.mark.parametrize(
    ("classes", "status", "dice", "dice_1", "dice_2"),
    [
        (((1, 2), (1, 2)), "ok", 1.0, 1.0, 1.0),
        (((1, 0), (1, 2)), "missed", 0.5, 1.0, 0.0),
        (((1, 2), (1, 0)), "false positive", 0.5, 1.0, 0.0),
        (((1, 0), (1, 0)), "ok", 1.0, 1.0, NAN),  # the mean of what is defined
        (((0, 2), (1, 0)), "missed", 0.0, 0.0, 0.0),
        (((0, 0), (0, 0)), "empty", NAN, NAN, NAN),
    ],
)
def test_several_classes(classes, status, dice, dice_1, dice_2):
    def scene(first, second):
        return box((8, 8, 8), (0, 0, 0), (3, 3, 3), first) + box((8, 8, 8), (4, 4, 4), (8, 8, 8), second)

    found = segmentation_metrics(scene(*classes[0]), scene(*classes[1]), (1, 1, 1), 3, tolerance_mm=1.0)
    assert found["status"] == status
    for name, value in (("dice", dice), ("dice_1", dice_1), ("dice_2", dice_2)):
        assert found[name] == pytest.approx(value, nan_ok=True)
    of_a_class = METRIC_UNITS.keys() - {"truth_in_box", "slice_dice", "slice_dice_all"}
    assert {f"{name}_{k}" for name in of_a_class for k in (1, 2)} < set(found)


@pytest.mark.parametrize("prediction", [EMPTY, FULL, 1 - FULL])
@pytest.mark.parametrize("truth", [EMPTY, FULL])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_without_distances_all_else_is_the_same(prediction, truth, num_classes):
    whole = segmentation_metrics(prediction, truth, (1, 1, 1), num_classes)
    found = segmentation_metrics(prediction, truth, (1, 1, 1), num_classes, distances=False)
    same(found, {name: value for name, value in whole.items() if "_mm" not in name})


def slices(*planes):
    """A volume (2, 3, slices) of the given planes (2, 3)."""
    return torch.stack([torch.tensor(plane, dtype=torch.uint8) for plane in planes], dim=-1)


NOTHING = [[0, 0, 0], [0, 0, 0]]
TRUTH = slices([[1, 1, 0], [1, 1, 0]], NOTHING, [[1, 0, 0], [0, 0, 0]], NOTHING)
PREDICTION = slices([[0, 1, 1], [0, 1, 0]], [[1, 1, 0], [0, 0, 0]], NOTHING, NOTHING)
BY_SLICE = [  # first: 2 of 4 found, and 1 more: 2 * 2 / (4 + 3)
    {"dice": 4 / 7, "truth_pixels": 4, "predicted_pixels": 3, "error_pixels": 3},
    {"dice": NAN, "truth_pixels": 0, "predicted_pixels": 2, "error_pixels": 2},
    {"dice": 0.0, "truth_pixels": 1, "predicted_pixels": 0, "error_pixels": 1},
    {"dice": NAN, "truth_pixels": 0, "predicted_pixels": 0, "error_pixels": 0},
]


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_slices_by_hand(axis):
    found = slice_metrics(PREDICTION.movedim(-1, axis), TRUTH.movedim(-1, axis), axis)
    assert len(found) == 4
    for row, expected in zip(found, BY_SLICE, strict=True):
        same(row, expected)


def test_slices_of_several_classes():
    """A class in truth or prediction counts: 1 is all found, 2 all taken for 3."""
    truth, prediction = slices([[1, 1, 0], [2, 0, 0]]), slices([[1, 1, 0], [3, 0, 0]])
    (found,) = slice_metrics(prediction, truth, num_classes=4)
    same(found, {"dice": pytest.approx(1 / 3), "truth_pixels": 3, "predicted_pixels": 3, "error_pixels": 1})


@pytest.mark.parametrize(
    ("prediction", "truth", "axis", "message"),
    [
        (TRUTH, TRUTH, 3, r"slice_axis must be an axis of a 3D volume, got 3 and shape \(2, 3, 4\)"),
        (TRUTH, TRUTH, -4, r"slice_axis must be .* got -4"),
        (TRUTH[0], TRUTH[0], 1, r"got 1 and shape \(3, 4\)"),
        (TRUTH, TRUTH[1:], 2, r"prediction has shape \(2, 3, 4\), truth \(1, 3, 4\)"),
    ],
)
def test_slices_refuse(prediction, truth, axis, message):
    with pytest.raises(ValueError, match=message):
        slice_metrics(prediction, truth, axis)


@pytest.mark.parametrize(
    ("name", "higher"),
    [("slice_dice", True), ("slice_dice_all", True), ("false_positive_slices", False), ("error_pixels", False)],
)
def test_which_way_is_better(name, higher):
    assert higher_is_better(name) is higher


def test_shapes_must_agree(caplog):
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match=r"shape \(2, 2\), truth \(2, 3\): they must"):
        segmentation_metrics(torch.zeros(2, 2), torch.zeros(2, 3), (1, 1))


def test_summary():
    rows = [
        {
            "case": "a",
            "status": "ok",
            "dice": 0.8,
            "hd95_mm": 2.0,
            "dice_1": 0.7,
            "hd_mm_2": 3.0,
            "spacing_mm": "1 x 1",
        },
        {
            "case": "b",
            "status": "ok",
            "dice": 0.9,
            "hd95_mm": 7.0,
            "dice_1": 0.9,
            "hd_mm_2": 9.0,
            "spacing_mm": "1 x 1",
        },
        {"case": "c", "status": "missed", "dice": 0.0, "hd95_mm": NAN, "dice_1": NAN, "hd_mm_2": NAN},
        {"case": "d", "status": "empty", "dice": NAN, "hd95_mm": NAN, "dice_1": NAN, "hd_mm_2": NAN, "notes": "x"},
        {"case": "e", "status": "false positive", "dice": 0.0, "hd95_mm": NAN, "truth_in_box": 0.25},
    ]
    summary = summarize(rows)
    assert list(summary) == [
        *("dice", "hd95_mm", "dice_1", "hd_mm_2", "truth_in_box", "cases", "missed", "false_positive", "empty"),
    ]
    # of 0.8, 0.9, 0, 0: mean 0.425, sum of squares 0.7275
    sd = math.sqrt((0.375**2 + 0.475**2 + 2 * 0.425**2) / 3)
    same(summary["dice"], {"mean": 0.425, "sd": sd, "median": 0.4, "worst": 0.0, "n": 4})
    same(summary["hd95_mm"], {"mean": 4.5, "sd": math.sqrt(12.5), "median": 4.5, "worst": 7.0, "n": 2})
    assert summary["dice_1"]["worst"] == 0.7
    assert summary["hd_mm_2"]["worst"] == 9.0
    same(summary["truth_in_box"], {"mean": 0.25, "sd": None, "median": 0.25, "worst": 0.25, "n": 1})
    assert [summary[k] for k in ("cases", "missed", "false_positive", "empty")] == [5, 1, 1, 1]


def test_summary_of_slices():
    rows = [
        {"status": "ok", "slice_dice": 0.5, "lesion_slices": 2, "lesion_free_slices": 3, "false_positive_slices": 1},
        {"status": "empty", "slice_dice": NAN, "lesion_slices": 0, "lesion_free_slices": 4, "false_positive_slices": 0},
        {"status": "ok"},
    ]
    summary = summarize(rows)
    counts = ["lesion_slices", "lesion_free_slices", "false_positive_slices"]
    assert list(summary) == ["slice_dice", "cases", "missed", "false_positive", "empty", *counts]
    same(summary["slice_dice"], {"mean": 0.5, "sd": None, "median": 0.5, "worst": 0.5, "n": 1})
    assert [summary[name] for name in counts] == [2, 7, 1]


def test_summary_of_undefined_values_and_of_nothing():
    summary = summarize([{"status": "missed", "hd_mm": NAN}])
    assert summary["hd_mm"] == {"mean": None, "sd": None, "median": None, "worst": None, "n": 0}
    assert summarize([]) == {"cases": 0, "missed": 0, "false_positive": 0, "empty": 0}
