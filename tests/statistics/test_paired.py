from __future__ import annotations

import math

import pytest
from scipy import stats

from segbundles.statistics import paired_difference

NAN = math.nan
BEFORE, AFTER = [0.5, 0.6, 0.7, 0.8, NAN, 0.9], [0.6, 0.6, 0.9, 0.7, 0.5, NAN]


@pytest.mark.parametrize(("higher", "wins", "losses"), [(True, 2, 1), (False, 1, 2)])
def test_differences_by_hand(higher, wins, losses):
    """Differences .1, 0, .2, -.1; two cases lack one of the two values."""
    found = paired_difference(BEFORE, AFTER, "AABBCD", higher)
    assert (found["n"], found["groups"]) == (4, 2)
    assert (found["before"], found["after"], found["difference"]) == pytest.approx((0.65, 0.7, 0.05))
    assert (found["low"], found["high"]) == pytest.approx((0.05, 0.05))  # both groups have this mean
    assert (found["wins"], found["losses"], found["ties"]) == (wins, losses, 1)
    assert (found["only_before"], found["only_after"]) == (1, 1)
    assert found["p"] == pytest.approx(0.5)  # two differences of one sign


def test_wilcoxon_of_single_cases():
    before = [0.1 * k for k in range(10)]
    after = [value + 0.01 * (k - 3) for k, value in enumerate(before)]
    found = paired_difference(before, after, [None] * 10)
    assert found["p"] == pytest.approx(stats.wilcoxon([k - 3 for k in range(10) if k != 3]).pvalue)
    assert (found["wins"], found["losses"], found["ties"]) == (6, 3, 1)


@pytest.mark.parametrize(
    ("before", "after", "difference"), [([0.5, 0.5], [0.5, 0.5], 0.0), ([1.0], [2.0], 1.0), ([NAN], [1.0], None)]
)
def test_no_test_without_differences(before, after, difference):
    found = paired_difference(before, after, range(len(before)))
    assert (found["difference"], found["p"]) == (difference, None)


def test_refuses():
    with pytest.raises(ValueError, match="before has 2 values and after 1"):
        paired_difference([1, 2], [1], "A")
