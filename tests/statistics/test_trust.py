from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from segbundles.statistics import failure_auroc, judge_confidence, rank_correlation


def test_rank_correlation_is_spearmans():
    rows = np.random.default_rng(0).integers(0, 9, (40, 2)).astype(float)  # with ties
    assert rank_correlation(rows) == pytest.approx(spearmanr(rows[:, 0], rows[:, 1]).statistic)


@pytest.mark.parametrize("rows", [[[1, 2], [2, 3]], [[1, 2], [1, 3], [1, 5]]])
def test_rank_correlation_needs_an_order(rows):
    assert np.isnan(rank_correlation(np.array(rows, float)))


def test_a_confidence_is_judged():
    confidence, score = [0.9, 0.5, 0.8, 0.7, 0.6], [0.95, 0.4, 0.65, 0.9, np.nan]
    found = judge_confidence(confidence, score, list("abcde"), 0.7)
    # failures: 0.5 and 0.8; pairs with 0.9 and 0.7: three of four in order
    assert (found["failures"], found["auroc_failures"]) == (2, 0.75)
    assert found["auroc_worst_fifth"] == 1.0  # the smallest score has the smallest confidence
    assert found["error"] == pytest.approx((0.05 + 0.1 + 0.15 + 0.2) / 4)
    assert found["bias"] == pytest.approx((-0.05 + 0.1 + 0.15 - 0.2) / 4)
    assert found["rank_correlation"]["n"] == 4


def test_auroc_is_the_share_of_pairs_in_order():
    # pairs of a failure and another case: 0.1 < 0.5, 0.1 < 0.9, 0.5 = 0.5 (counts half), 0.5 < 0.9
    found = failure_auroc(np.array([0.1, 0.5, 0.5, 0.9]), np.array([True, True, False, False]))
    assert found == 3.5 / 4


def test_bounds_and_flags_are_judged():
    confidence, score = [0.9, 0.5, 0.8, 0.7, 0.6], [0.95, 0.4, 0.65, 0.9, np.nan]
    low, review = [0.8, 0.45, np.nan, 0.9, 0.1], ["", "look", "", "look", "look"]
    found = judge_confidence(confidence, score, list("abcde"), 0.7, low, review)
    # of three cases with a bound and a score, the first and the fourth reach it; of two failures, one is flagged
    assert (found["coverage"]["value"], found["coverage"]["n"]) == (pytest.approx(2 / 3), 3)
    assert (found["flagged"], found["failures_flagged"]) == (0.5, 0.5)


def test_without_failures_there_is_nothing_to_find():
    assert judge_confidence([0.9, 0.8], [0.9, 0.8], list("ab"), 0.7)["auroc_failures"] is None
