"""benchmarks/decision.py compares rules that make a mask of probabilities."""

from __future__ import annotations

import decision
import numpy as np
import pytest
from scipy.special import expit

from segbundles.calibration import Case
from segbundles.confidence import pixel_counts


def made_case(group, logits, truth, pixels=100):
    p, truth = expit(np.array(logits)), np.array(truth, bool)
    mask = p > 0.5
    return Case(
        name=group,
        group=group,
        fold=0,
        score=0.0,
        inside=pixel_counts(p, mask),
        outside=pixel_counts(p, ~mask),
        true=pixel_counts(p, truth),
        size=int(truth.sum()),
        pixels=pixels,
        mask={},
        truth={},
        image={},
    )


# masks are too large: of three pixels above 0.5, only the one at 0.88 is true
TOO_LARGE = ([2.0, 0.5, 0.5, -3.0], [1, 0, 0, 0])


@pytest.mark.parametrize(
    ("score", "half", "best"),
    [
        ("dice", 2 * 1 / (3 + 1), 1.0),
        ("accuracy", 98 / 100, 1.0),  # two of 100 pixels are wrong
    ],
)
def test_a_threshold_of_the_other_groups_corrects_masks_that_are_too_large(score, half, best):
    cases = [made_case(name, *TOO_LARGE) for name in "abc"]
    found = [values.tolist() for values in decision.decide(cases, score).values()]
    assert found[:2] == [[half] * 3, [best] * 3]
    assert found[2] == [best] * 3  # after a shift, the pixels at 0.62 are probably background


def test_the_threshold_comes_from_other_groups():
    # nothing is wrong at 0.5 in b and c, but a is too large: what b and c say does not help it
    cases = [made_case("a", *TOO_LARGE)] + [made_case(name, [2.0, 0.5, 0.5, -3.0], [1, 1, 1, 0]) for name in "bc"]
    half, fitted, _ = decision.decide(cases, "dice").values()
    assert half.tolist() == [0.5, 1, 1]
    assert fitted[0] == 0.5


def test_the_table_has_differences_with_intervals():
    table = decision.rows([made_case(name, *TOO_LARGE) for name in "abc"], "dice", "fish")
    assert table[0] == ["fish: 3 cases, 3 groups", "mean Dice", "difference (95 % interval)"]
    assert table[1] == ["probability above 0.5", "0.5000", ""]
    assert table[2][1:] == ["1.0000", "+0.5000 (+0.5000 to +0.5000)"]
