from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from segbundles.confidence import (
    COLUMNS,
    LOGITS,
    calibrated,
    confidence_of,
    describe_confidence,
    expected_score,
    image_features,
    join_confidence,
    mask_features,
    pixel_counts,
    reasons_to_review,
    score_features,
)


def counts(*logits):
    return pixel_counts(expit(np.array(logits)), np.ones(len(logits)))


def test_pixels_are_counted_by_their_logit():
    p = np.array([0.005, 0.5, 0.6, 1.0, 0.9])
    found = pixel_counts(p, np.array([1, 1, 1, 1, 0]))
    # logits: below the floor; 0; 0.405; the last bin; not in the mask
    assert {float(LOGITS[k]): int(found[k]) for k in np.flatnonzero(found)} == {0.125: 1, 0.375: 1, 9.875: 1}


# logits in the middle of a bin
@pytest.mark.parametrize(
    ("score", "temperature", "expected"),
    [
        # p of logit 1.875 is 0.86704, of -1.875 0.13296
        ("dice", 1.0, 2 * (2 * 0.86704) / (2 * 0.86704 + 0.13296 + 2)),
        ("accuracy", 1.0, (2 * 0.86704 + 7 + 0.86704) / 10),
        # with temperature 2: 0.71860 and 0.28140
        ("dice", 2.0, 2 * (2 * 0.71860) / (2 * 0.71860 + 0.28140 + 2)),
    ],
)
def test_expected_score_of_two_pixels_inside_and_one_outside(score, temperature, expected):
    found = expected_score(counts(1.875, 1.875), counts(-1.875), 10, score, calibrated(temperature))
    assert found == pytest.approx(expected, abs=2e-5)


# p of logit -2.875 is 0.05341
@pytest.mark.parametrize(
    ("outside", "expected"), [(counts(-1.875, -2.875), (1 - 0.13296) * (1 - 0.05341)), (0 * counts(0.0), 1.0)]
)
def test_an_empty_mask_is_right_if_no_pixel_is_foreground(outside, expected):
    assert expected_score(0 * outside, outside, 100) == pytest.approx(expected, abs=2e-5)


def test_expected_dice_agrees_with_drawn_truths():
    """The ratio of expectations is close to the mean Dice over truths drawn from the probabilities."""
    rng = np.random.default_rng(0)
    p = expit(rng.choice(LOGITS, 2000))
    p = p[(p > 0.02)]
    mask = p > 0.5
    truths = rng.random((400, len(p))) < p
    dice = 2 * (truths & mask).sum(1) / (truths.sum(1) + mask.sum())
    found = expected_score(pixel_counts(p, mask), pixel_counts(p, ~mask), len(p))
    assert found == pytest.approx(dice.mean(), abs=0.002)


def test_features_of_probabilities():
    found = score_features(counts(1.875, 9.875), counts(-1.875), 10, 1.0, "dice", calibrated())
    # p: 0.86704 and 0.99995 inside, 0.13296 outside
    assert found["precision"] == pytest.approx((0.86704 + 0.99995) / 2, abs=2e-5)
    assert found["sure"] == 1.0  # both are above 0.8; after a temperature of 2, 0.71860 is not
    assert score_features(counts(1.875, 9.875), counts(-1.875), 10, 1.0, "dice", calibrated(2.0))["sure"] == 0.5
    # both pixels of 0.867 and 0.133 are doubtful: entropy 0.39196 each, over two pixels of the mask
    assert found["entropy_rim"] == pytest.approx(0.39196, abs=2e-4)
    assert found["log_size"] == pytest.approx(np.log(3))


def test_a_mask_is_described():
    mask = np.zeros((10, 10, 4), bool)
    mask[0:5, 2:8, 1] = True  # 30 voxels, of which 6 are at the first row
    mask[8, 8, 2] = True
    found = mask_features(mask, (2.0, 2.0, 5.0))
    assert found == {
        "size_percent": pytest.approx(7.75),
        "size_ml": pytest.approx(31 * 20 / 1000),
        "parts": 2.0,
        "border": pytest.approx(6 / 31),
    }
    assert mask_features(np.zeros((4, 4))) == {"size_percent": 0.0, "parts": 0.0, "border": 0.0}


def test_an_image_is_described():
    ramp = np.tile(np.arange(8, dtype=np.float32), (8, 1))
    found = image_features(np.stack([ramp, -ramp]), None)
    # half of the steps (along rows) are 0, the others 1; sd of 0 .. 7 is 2.2913
    assert found["flat_0"] == 0.5
    assert found["rough_0"] == pytest.approx(0.5 / 2.2913, abs=1e-4)
    assert found["skewness_0"] == pytest.approx(0, abs=1e-9)
    assert found["correlation_01"] == pytest.approx(-1)
    assert "mean_0" not in found
    frame = image_features(ramp[None].astype(np.uint8))
    assert (frame["mean_0"], frame["sd_0"]) == (3.5, pytest.approx(2.2913, abs=1e-4))
    grid = image_features(np.zeros((1, 4, 5, 6), np.float32), (1.0, 2.0, 3.0))
    assert (grid["extent_0"], grid["extent_1"], grid["extent_2"], grid["spacing_2"]) == (4, 10, 18, 3)
    assert (grid["flat_0"], grid["rough_0"]) == (1, 0)


def test_grey_levels_do_not_depend_on_their_unit():
    image = np.random.default_rng(0).gamma(2, size=(1, 40, 40, 9)).astype(np.float32)
    assert image_features(image) == pytest.approx(image_features(image * 37 + 100), rel=1e-4)


FACTS = {
    "intercept": 0.1,
    "coefficients": {"expected": 0.5, "precision": 0.25},
    "margin": 0.2,
    "low": 0.7,
    "masks": {"size_ml": [10.0, 100.0], "size_percent": [1.0, 5.0], "parts": [0.0, 2.0], "border": [0.0, 0.1]},
    "images": {"rough_0": [0.1, 0.2], "flat_0": [0.0, 0.5], "rough_1": [0.1, 0.2]},
}
MASK = {"size_percent": 2.0, "parts": 1.0, "border": 0.0}
IMAGE = {"rough_0": 0.15, "flat_0": 0.1, "rough_1": 0.15, "spacing_0": 9.0}


def test_confidence_and_its_lower_bound():
    assert confidence_of({"expected": 0.8, "precision": 0.4}, FACTS) == pytest.approx((0.6, 0.4))
    assert confidence_of({"expected": 9.0, "precision": 0.0}, FACTS | {"margin": None}) == (1.0, None)


@pytest.mark.parametrize(
    ("mask", "image", "confidence", "reason"),
    [
        ({}, {}, 0.8, ""),
        ({}, {}, 0.65, "low confidence: 0.65, below 0.70"),
        ({"size_percent": 0.0, "parts": 0.0}, {}, 0.8, "nothing found"),
        ({"border": 0.2}, {}, 0.8, "touches the border of the image"),
        ({"parts": 3.0}, {}, 0.8, "3 parts, usually at most 2"),
        ({"size_percent": 6.0}, {}, 0.8, "unusual size: 6 % of the image, not 1 to 5 as in the training data"),
        # in ml, the share of the image does not matter
        ({"size_percent": 6.0, "size_ml": 50.0}, {}, 0.8, ""),
        ({"size_ml": 9.0}, {}, 0.8, "unusual size: 9 ml, not 10 to 100 as in the training data"),
        ({}, {"rough_0": 0.3, "rough_1": 0.3}, 0.8, "input unlike the training data: texture"),
        ({}, {"flat_0": 0.9, "rough_1": 0.0}, 0.8, "input unlike the training data: share of uniform areas, texture"),
    ],
)
def test_reasons_to_look_at_a_mask(mask, image, confidence, reason):
    image = {name: image.get(name, value) for name, value in (IMAGE | image).items()}
    assert "; ".join(reasons_to_review(MASK | mask, image, FACTS, confidence)) == reason


def test_cells_fill_the_image():
    mask = {"size_percent": 2.0, "parts": 50.0, "border": 0.4}
    assert reasons_to_review(mask, IMAGE, FACTS, 0.8, "accuracy") == []


def test_without_facts_only_the_mask_is_judged():
    strange = {"rough_0": 9.0}
    assert reasons_to_review(MASK, strange) == []
    assert reasons_to_review(MASK | {"border": 0.01}, strange) == ["touches the border of the image"]


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ((), []),
        ((0.876, None, True), [("confidence", "0.88")]),
        ((0.876, 0.7, True), [("confidence", "0.88, at least 0.70 in 9 of 10")]),
        ((0.876, None, False), [("confidence", "0.88, not calibrated")]),
    ],
)
def test_confidence_in_words(item, said):
    assert describe_confidence(dict(zip(COLUMNS, item, strict=False))) == said


def test_confidence_of_an_image_in_blocks():
    """The mean over pixels: (0.9 * 3 + 0.5 * 1) / 4; reasons are counted, in the words of the least certain block."""
    sure = {"confidence": 0.9, "confidence_low": 0.8, "confidence_calibrated": True, "review": ""}
    doubtful = {"confidence": 0.5, "confidence_low": 0.4, "review": "low confidence: 0.50, below 0.60; texture: b"}
    found = join_confidence([sure, doubtful], [3, 1], "blocks")
    assert found["confidence_calibrated"] is True
    assert found["confidence"] == pytest.approx(0.8)
    assert found["confidence_low"] == pytest.approx(0.7)
    assert found["review"] == "low confidence: 0.50, below 0.60 (in 1 of 2 blocks); texture: b (in 1 of 2 blocks)"
    other = {"confidence": 0.55, "confidence_low": None, "review": "low confidence: 0.55, below 0.60"}
    found = join_confidence([sure, other, doubtful], [1, 1, 1], "pages")
    assert found["confidence_low"] is None
    assert found["review"].startswith("low confidence: 0.50, below 0.60 (in 2 of 3 pages); ")
    assert join_confidence([doubtful], [7], "pages")["review"] == doubtful["review"]
