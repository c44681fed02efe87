from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from segbundles.files import read_table, write_table
from segbundles.statistics import ProbabilityCounts, add_counts, counts_of_table, probability_table

# a network that says .85 and is right 3 of 4 times, and says .05 where 1 of 6 is foreground
PROBABILITY = np.array([0.85] * 4 + [0.05] * 6)
TRUTH = np.array([1, 1, 1, 0] + [1] + [0] * 5)
COUNTS = ProbabilityCounts.of(PROBABILITY, TRUTH)


def test_calibration_by_hand():
    assert COUNTS.calibration() == [
        {"probability": pytest.approx(0.05), "foreground": pytest.approx(1 / 6), "pixels": 6},
        {"probability": pytest.approx(0.85), "foreground": pytest.approx(3 / 4), "pixels": 4},
    ]
    assert COUNTS.calibration_error() == pytest.approx(0.6 * (1 / 6 - 0.05) + 0.4 * (0.85 - 0.75))
    assert COUNTS.calibration_error(lowest=0.1) == pytest.approx(0.1)
    assert COUNTS.calibration_error(bins=1) == pytest.approx(abs((4 * 0.85 + 6 * 0.05 - 4) / 10))


def test_thresholds_by_hand():
    rows = {row["threshold"]: row for row in COUNTS.thresholds(10)}
    assert rows[0.0] == pytest.approx({"threshold": 0, "precision": 0.4, "recall": 1.0, "dice": 8 / 14})
    assert rows[0.5] == pytest.approx({"threshold": 0.5, "precision": 3 / 4, "recall": 3 / 4, "dice": 6 / 8})
    assert rows[0.9] == pytest.approx(
        {"threshold": 0.9, "precision": math.nan, "recall": 0.0, "dice": 0.0}, nan_ok=True
    )


def test_average_precision_as_scikit_learn_has_it():
    generator = np.random.default_rng(0)
    probability = np.round(generator.random(2000), 3).clip(0, 0.999)
    truth = generator.random(2000) < probability**2
    counts = ProbabilityCounts.of(probability + 1e-6, truth)
    assert counts.average_precision() == pytest.approx(average_precision_score(truth, probability))


def test_cases_add_up_and_a_mask_leaves_out_pixels():
    parts = [ProbabilityCounts.of(PROBABILITY[part], TRUTH[part]) for part in (slice(0, 3), slice(3, 10))]
    np.testing.assert_allclose(sum(parts, ProbabilityCounts()).table, COUNTS.table)
    masked = ProbabilityCounts.of(PROBABILITY.reshape(2, 5), TRUTH.reshape(2, 5), [[True] * 5, [False] * 5])
    assert masked.table.sum(1) == pytest.approx([5, 4, 4 * 0.85 + 0.05])


def test_counts_of_groups_are_added_written_and_read_back(tmp_path):
    parts = [ProbabilityCounts.of(PROBABILITY[part], TRUTH[part]) for part in (slice(0, 3), slice(3, 10))]
    groups = add_counts([{"b": parts[0], "a": parts[1]}, {"b": parts[1]}])
    assert [*groups] == ["a", "b"]
    write_table(tmp_path / "probabilities.csv", *probability_table(groups))
    read = counts_of_table(read_table(tmp_path / "probabilities.csv"))
    assert len([*read_table(tmp_path / "probabilities.csv")]) == 4  # two bins of each
    np.testing.assert_allclose(read["b"].table, COUNTS.table)
    np.testing.assert_allclose(read["a"].table, parts[1].table)


def test_ends_of_the_scale_and_nothing_at_all():
    counts = ProbabilityCounts.of([0.0, 1.0, 0.3], [0, 1, 1])
    assert np.flatnonzero(counts.table[0]).tolist() == [0, 300, 999]
    assert counts.thresholds(10)[3]["recall"] == 1.0
    empty = ProbabilityCounts()
    assert (empty.calibration(), *map(math.isnan, (empty.calibration_error(), empty.average_precision()))) == (
        *([], True, True),
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ProbabilityCounts.of([0.1], [1, 0]), r"probability has shape \(1,\), truth \(2,\)"),
        (lambda: ProbabilityCounts.of([-3.0, 0.5], [1, 0]), "between 0 and 1, got -3 to 0.5: are these logits"),
        (lambda: ProbabilityCounts.of([math.nan], [1]), "between 0 and 1, got nan"),
        (lambda: COUNTS.calibration(3), "bins must divide 1000, the number of bins that were counted, got 3"),
        (lambda: COUNTS.thresholds(0), "number must divide 1000"),
        (lambda: COUNTS + ProbabilityCounts.of([0.5], [1], bins=10), "1000 and 10 bins: they must be equal"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
