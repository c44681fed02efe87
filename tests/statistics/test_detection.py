from __future__ import annotations

import numpy as np
import pytest

from segbundles.statistics import DETECTION_COLUMNS, count_objects, detection_rates


def drawn(*rows):
    return np.array([[int(pixel != ".") for pixel in row] for row in rows])


# objects of 4, 2, 1 and 1 pixels; the last two touch by a corner
TRUTH = drawn("####...#", "......#.", "##......")
# 3 of the 4 pixels (IoU 3 / 4), 1 pixel and 2 more of the second (IoU 1 / 4), one object of its own
PREDICTION = drawn(".###....", "........", ".###..#.")


@pytest.mark.parametrize("depth", [None, 1, 2])
def test_objects_by_hand(depth):
    truth, prediction = (mask if depth is None else np.stack([mask] * depth) for mask in (TRUTH, PREDICTION))
    assert count_objects(prediction, truth) == dict(zip(DETECTION_COLUMNS, (4, 2, 1, 3, 1, 2), strict=True))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"connectivity": 2}, (3, 2, 1, 3, 1, 2)),  # the two that touch by a corner are one
        ({"min_size": 2}, (2, 2, 1, 2, 0, 1)),
        ({"min_size": 4}, (1, 1, 0, 0, 0, 0)),
    ],
)
def test_connectivity_and_small_objects(arguments, expected):
    if arguments == {"min_size": 4}:
        # the prediction has no object of that size, so none is found
        expected = (1, 0, 0, 0, 0, 0)
    assert tuple(count_objects(PREDICTION, TRUTH, **arguments).values()) == expected


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("....", "....", (0, 0, 0, 0, 0, 0)),
        ("##.#", "....", (0, 0, 0, 2, 2, 2)),
        ("....", "#.##", (2, 0, 0, 0, 0, 0)),
        ("###.", "#.#.", (2, 2, 0, 1, 0, 1)),  # one prediction over two objects finds both, and matches neither
        ("#.#.", "###.", (1, 1, 0, 2, 0, 2)),  # an IoU of 1 / 3 each
        ("##..", ".#..", (1, 1, 0, 1, 0, 1)),  # an IoU of 1 / 2 is not above it
    ],
)
def test_empty_split_and_merged(prediction, truth, expected):
    assert tuple(count_objects(drawn(prediction), drawn(truth)).values()) == expected


def test_rates_of_a_set():
    """Patients A (two cases) and B: 6 objects, of which 3 were found; 5 predicted, of which 2 are false."""
    rows = [
        dict(zip(DETECTION_COLUMNS, counts, strict=True))
        for counts in ((2, 2, 1, 3, 1, 2), (2, 0, 0, 0, 0, 0), (2, 1, 1, 2, 1, 1))
    ]
    found = detection_rates(rows, ["A", "A", "B"])
    expected = {"any_overlap": (3 / 6, 3 / 5, 2 / 3), "iou50": (2 / 6, 2 / 5, 3 / 3)}
    for matching, values in expected.items():
        assert [rate["value"] for rate in found[matching].values()] == pytest.approx(values)
    interval = found["any_overlap"]["false_per_case"]
    assert (interval["low"], interval["high"], interval["groups"]) == (0.5, 1.0, 2)
    nothing = detection_rates([dict.fromkeys(DETECTION_COLUMNS, 0)], ["A"])["iou50"]
    assert [rate["value"] for rate in nothing.values()] == [None, None, 0.0]


def test_refuses():
    with pytest.raises(ValueError, match=r"prediction has shape \(1, 2\), truth \(2, 1\): they must be equal"):
        count_objects([[1, 1]], [[1], [1]])
