from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from skimage.metrics import adapted_rand_error, variation_of_information

from segbundles.metrics import SECTION_UNITS, higher_is_better, summarize
from segbundles.metrics.instances import (
    cells_at_threshold,
    label_cells,
    pixel_accuracy,
    section_metrics,
    thin_membranes,
    threshold_scores,
    v_info,
    v_rand,
)

# truth, prediction, and V_rand and V_info as F-score, split score and merge score
CASES = {
    "perfect, other numbers": ([1, 1, 2, 2], [9, 9, 4, 4], (1, 1, 1), (1, 1, 1)),
    # sum p^2 = 1/2, s^2 = 1/2, t^2 = 1; I = H(T) = 0
    "one cell split": ([1, 1, 1, 1], [1, 1, 2, 2], (2 / 3, 1 / 2, 1), (0, 0, 1)),
    # the same with S and T swapped
    "two cells merged": ([1, 1, 2, 2], [3, 3, 3, 3], (2 / 3, 1, 1 / 2), (0, 1, 0)),
    # p = 1/2, 1/4, 1/4; s the same; t = 1/2, 1/2; I = H(T) = ln 2, H(S) = 3/2 ln 2
    "one of two split": ([1, 1, 2, 2], [1, 1, 2, 3], (6 / 7, 3 / 4, 1), (4 / 5, 2 / 3, 1)),
    # sum p^2 = 20/64, s^2 = t^2 = 1/2; I = 2 ln 2 - 3/4 ln(8/3) - 1/4 ln 8, H = ln 2
    "table 3 1 1 3": ([1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 2, 1, 2, 2, 2], (5 / 8,) * 3, (0.1887218755,) * 3),
    # two pixels lost to membrane are cells by themselves: p = s = 1/2, 1/4, 1/4
    "membrane inside a cell": ([1, 1, 1, 1], [0, 0, 1, 1], (6 / 11, 3 / 8, 1), (0, 0, 1)),
    "true membrane does not count": ([0, 0, 1, 1, 2, 2], [1, 5, 1, 1, 5, 5], (1, 1, 1), (1, 1, 1)),
    "one cell in both": ([1, 1], [1, 1], (1, 1, 1), (1, 1, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_hand_computed(case):
    truth, prediction, rand, info = CASES[case]
    truth, prediction = np.array(truth), torch.tensor(prediction)
    for alpha, expected_rand, expected_info in zip((0.5, 0, 1), rand, info, strict=True):
        assert v_rand(truth, prediction, alpha) == pytest.approx(expected_rand)
        assert v_info(truth, prediction, alpha) == pytest.approx(expected_info, abs=1e-9)


def test_as_scikit_image_where_it_measures_the_same():
    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(0, 5, (100, 100)), rng.integers(1, 7, (100, 100))
    prediction[:50] = truth[:50] + 1
    # of pairs of different pixels; what it calls precision divides by the pairs of the truth
    error, split, merge = adapted_rand_error(truth, prediction)
    assert v_rand(truth, prediction) == pytest.approx(1 - error, abs=2e-3)
    assert v_rand(truth, prediction, 0) == pytest.approx(split, abs=2e-3)
    assert v_rand(truth, prediction, 1) == pytest.approx(merge, abs=2e-3)

    splits, merges = variation_of_information(truth, prediction, ignore_labels=(0,))
    of_truth, of_prediction = (entropy(np.bincount(x[truth > 0]), base=2) for x in (truth, prediction))
    assert v_info(truth, prediction, 0) == pytest.approx(1 - splits / of_prediction)
    assert v_info(truth, prediction, 1) == pytest.approx(1 - merges / of_truth)


@pytest.mark.parametrize("score", [v_rand, v_info])
def test_no_true_cell_is_undefined(score):
    assert math.isnan(score(np.zeros((3, 3), int), np.ones((3, 3), int)))


@pytest.mark.parametrize("score", [v_rand, v_info])
@pytest.mark.parametrize(
    ("truth", "prediction", "alpha", "message"),
    [
        (np.ones((2, 3), int), np.ones((3, 2), int), 0.5, r"prediction has shape \(3, 2\), truth \(2, 3\)"),
        (np.ones(3), np.ones(3, int), 0.5, "truth must be a label image of integers from 0, got float64 from 1"),
        (np.ones(3, int), np.array([1, -1, 2]), 0.5, "prediction must be a label image .* got int64 from -1"),
        (np.ones(3, int), np.ones(3, int), 1.5, r"alpha must be between 0 \(split score\) and 1 .*, got 1.5"),
    ],
)
def test_bad_labels(score, truth, prediction, alpha, message):
    with pytest.raises(ValueError, match=message):
        score(truth, prediction, alpha)


def test_cells_that_touch_by_a_corner_are_two():
    assert label_cells(torch.tensor([[1, 0], [0, 1]])).tolist() == [[1, 0], [0, 2]]


def test_thinned_to_the_middle_of_the_membrane():
    cells = np.zeros((4, 9), int)
    cells[:, :2], cells[:, 7:] = 1, 2
    assert thin_membranes(cells).tolist() == [[1, 1, 1, 1, 0, 2, 2, 2, 2]] * 4


def test_membrane_that_ends_in_a_cell_vanishes():
    cells = np.ones((5, 5), int)
    cells[2, :3] = 0
    assert (thin_membranes(cells) == 1).all()


@pytest.mark.parametrize("seed", range(3))
def test_thinned_cells_do_not_touch_and_stay_themselves(seed):
    noise = np.random.default_rng(seed).random((40, 40))
    cells = label_cells(noise > 0.45)
    thin = thin_membranes(cells)
    assert (thin[cells > 0] == cells[cells > 0]).all()
    for a, b in ((thin[1:], thin[:-1]), (thin[:, 1:], thin[:, :-1])):
        assert not ((a != b) & (a > 0) & (b > 0)).any()


def test_nothing_to_thin():
    assert not thin_membranes(np.zeros((3, 3), int)).any()
    assert (thin_membranes(np.full((3, 3), 4)) == 4).all()


def _wall() -> tuple[np.ndarray, np.ndarray]:
    """Return a membrane probability with a weak spot, and the true cells on both sides."""
    probability = np.full((6, 11), 0.25)
    probability[:, 4:7] = 0.85
    probability[2, 4:7] = 0.65
    truth = np.zeros((6, 11), int)
    truth[:, :4], truth[:, 7:] = 1, 2
    return probability, truth


def test_threshold_between_no_cell_and_a_leak():
    probability, truth = _wall()
    scores = {s["threshold"]: s for s in threshold_scores(probability, truth)}
    assert list(scores) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert scores[0.1]["v_rand"] == pytest.approx((1 / 48) / ((1 / 48 + 1 / 2) / 2))  # 48 cells of a pixel
    assert scores[0.3]["v_rand"] == scores[0.6]["v_rand"] == scores[0.6]["v_info"] == 1
    assert scores[0.7]["v_rand"] == pytest.approx(2 / 3)  # merged through the spot
    assert scores[1.0]["v_info"] == pytest.approx(0)
    assert [s["v_rand"] for s in threshold_scores(probability, truth, [0.8])] == [pytest.approx(2 / 3)]
    assert cells_at_threshold(probability, 0.5)[0].tolist() == [1, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2]


def test_section():
    probability, true_cells = _wall()
    truth = (true_cells > 0).astype(np.uint8)  # 18 pixels of membrane, 48 of cell
    prediction = (probability < 0.7).astype(np.uint8)  # 3 pixels of the membrane missed
    cells = label_cells(prediction)
    cells[0] = 0  # and 8 pixels of cell lost by post-processing
    row = section_metrics(torch.from_numpy(prediction), torch.from_numpy(truth), torch.from_numpy(cells))
    assert row == pytest.approx(
        {
            "pixel_accuracy": 63 / 66,
            "dice_membrane": 30 / 33,
            "pixel_accuracy_mask": 55 / 66,
            "v_rand_cells": 2 / 3,
            "v_info_cells": 0,
        }
    )
    assert set(row) | {"v_rand", "v_info"} == set(SECTION_UNITS)
    assert all(higher_is_better(name) for name in row)
    assert summarize([row])["v_rand_cells"]["worst"] == pytest.approx(2 / 3)
    assert list(section_metrics(prediction, truth)) == ["pixel_accuracy", "dice_membrane"]


def test_section_of_one_class():
    ones, zeros = np.ones((3, 3), int), np.zeros((3, 3), int)
    row = section_metrics(zeros, ones)
    assert row["pixel_accuracy"] == 0
    assert math.isnan(row["dice_membrane"])
    row = section_metrics(zeros, zeros, zeros)
    assert row["dice_membrane"] == row["pixel_accuracy_mask"] == 1
    assert math.isnan(row["v_rand_cells"])
    assert math.isnan(row["v_info_cells"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: section_metrics(np.ones((1, 3, 3)), np.ones((1, 3, 3))),
            r"prediction must be one section .*\(1, 3, 3\)",
        ),
        (lambda: pixel_accuracy(np.ones(3), np.ones(4)), r"prediction has shape \(3,\), truth \(4,\)"),
        (
            lambda: threshold_scores(np.ones((2, 2)), np.ones((2, 2), int), []),
            "thresholds must have at least one value",
        ),
        (
            lambda: cells_at_threshold(np.ones(4), 0.5),
            r"membrane_probability must be one section \(W, H\), got shape \(4,\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
