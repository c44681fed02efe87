from __future__ import annotations

import math

import numpy as np
import pytest

from segbundles.statistics import bland_altman, intraclass_correlation, volume_agreement
from segbundles.statistics.agreement import _icc

NAN = math.nan
TRUTH, PREDICTED = [10.0, 20.0, 30.0, 40.0, NAN], [12.0, 18.0, 33.0, 41.0, 7.0]


def test_bland_altman_by_hand():
    """Differences 2, -2, 3 and 1: mean 1, squares around it 1 + 9 + 4 + 0, over 3."""
    sd = math.sqrt(14 / 3)
    expected = {"n": 4, "bias": 1.0, "sd": sd, "lower": 1 - 1.96 * sd, "upper": 1 + 1.96 * sd}
    assert bland_altman(TRUTH, PREDICTED) == pytest.approx(expected)
    assert bland_altman([5], [7]) == {"n": 1, "bias": 2.0, "sd": None, "lower": None, "upper": None}
    assert bland_altman([], []) == {"n": 0, "bias": None, "sd": None, "lower": None, "upper": None}


def test_icc_by_hand():
    """Pairs (1, 2), (2, 3), (3, 4): mean squares of cases 2, of columns 1.5, of the rest 0."""
    assert intraclass_correlation([1, 2, 3], [2, 3, 4]) == pytest.approx(2 / (2 + 0 + 2 * 1.5 / 3))


def test_icc_of_shrout_and_fleiss():
    """Table 2 of the paper, six subjects and four judges; table 4 gives 0.29."""
    ratings = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
    assert _icc(np.array(ratings, float)) == pytest.approx(0.29, abs=0.005)


@pytest.mark.parametrize(
    ("truth", "predicted", "expected"),
    [([1, 2, 5], [1, 2, 5], 1.0), ([1, 2, 3], [3, 2, 1], -3.0), ([4], [4], NAN), ([2, 2], [2, 2], NAN)],
)
def test_icc_at_its_ends(truth, predicted, expected):
    assert intraclass_correlation(truth, predicted) == pytest.approx(expected, nan_ok=True)


def test_agreement_of_volumes():
    """Groups A (differences 2, -2) and B (3, 1): biases 0 and 2 if one group is drawn twice."""
    found = volume_agreement(TRUTH, PREDICTED, "ml", ["A", "A", "B", "B", "C"])
    assert (found["unit"], found["n"], found["left_out"]) == ("ml", 4, 1)
    assert (found["bias"], found["bias_low"], found["bias_high"]) == (1.0, 0.0, 2.0)
    assert found["icc"] == pytest.approx(intraclass_correlation(TRUTH, PREDICTED))
    assert found["icc_low"] <= found["icc"] <= found["icc_high"]
    empty = volume_agreement([NAN], [1.0], "ml")
    assert {empty[key] for key in ("bias", "icc", "icc_low", "lower")} == {None}


def test_refuses():
    with pytest.raises(ValueError, match="truth has 2 values and predicted 1: give one of each per case"):
        volume_agreement([1, 2], [1], "ml")
