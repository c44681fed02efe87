from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from segbundles.statistics import bootstrap_interval

NAN = math.nan


def test_whole_groups_are_drawn():
    """Two groups: both draws are A, the mean of 1 and 3, in a quarter of the draws, both B in another quarter."""
    found = bootstrap_interval([1.0, 3.0, 6.0], ["A", "A", "B"])
    assert (found.value, found.low, found.high) == (pytest.approx(10 / 3), 2.0, 6.0)
    assert (found.n, found.left_out, found.groups) == (3, 0, 2)
    assert str(found) == "3.33 (2 to 6)"


def test_single_cases_are_drawn_as_scipy_draws_them():
    values = np.random.default_rng(3).normal(5, 2, 40)
    found = bootstrap_interval(values, [None] * 40, draws=4000)
    expected = stats.bootstrap([values], np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.05)
    assert found.groups == 40
    assert found == bootstrap_interval(values, [""] * 40, draws=4000)


@pytest.mark.parametrize(
    ("values", "groups", "expected"),
    [
        ([NAN, 2.0, 2.0], "ABC", (2.0, 2.0, 2.0, 2, 1, 2)),
        ([NAN, 1.0, 3.0], "ABB", (2.0, None, None, 2, 1, 1)),
        ([1.0], "A", (1.0, None, None, 1, 0, 1)),
        ([NAN, NAN], "AB", (None, None, None, 0, 2, 0)),
        ([], "", (None, None, None, 0, 0, 0)),
    ],
)
def test_undefined_cases_are_counted_and_one_group_has_no_interval(values, groups, expected):
    found = bootstrap_interval(values, groups)
    assert tuple(found.as_dict().values()) == expected


def test_pooled_figure():
    """Hits and union of three cases: pooled 9 / 30; of the drawn groups alone 1 / 10 to 8 / 20."""
    counts = [[1, 5], [0, 5], [8, 20]]
    found = bootstrap_interval(counts, "AAB", lambda rows: rows[:, 0].sum() / rows[:, 1].sum())
    assert (found.value, found.low, found.high) == pytest.approx((9 / 30, 1 / 10, 8 / 20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": "A"}, "groups must have one entry per case: got 1 for 2 cases"),
        ({"draws": 0}, "draws must be 1 or more"),
        ({"level": 1}, "level between 0 and 1, got 2000 and 1"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(**{"values": [1.0, 2.0], "groups": "AB", **arguments})
