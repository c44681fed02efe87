from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from segbundles.transforms import Confidenced, ToProbabilitiesd

FACTS = {
    "score": "dice",
    "temperature": 2.0,
    "shift": 0.0,
    "intercept": 0.0,
    "coefficients": {"expected": 1.0},
    "margin": 0.25,
    "low": 0.7,
    "masks": {"size_percent": [1.0, 90.0], "parts": [0.0, 1.0], "border": [0.0, 1.0]},
    "images": {"rough_0": [0.0, 5.0]},
}


def item(logits, notes=""):
    logits = torch.tensor(logits)[None, None]
    image = MetaTensor(torch.rand(1, *logits.shape[1:]), meta={"notes": notes, "has_spacing": False})
    return ToProbabilitiesd("logits")({"logits": logits, "pred": (logits > 0).to(torch.uint8), "image": image})


def test_confidence_of_a_row_of_pixels():
    found = Confidenced(facts=FACTS)(item([1.875, 1.875, -1.875, -20.0, -20.0]))
    # at temperature 2: p 0.71860 twice inside, 0.28140 outside
    expected = 2 * 2 * 0.71860 / (2 * 0.71860 + 0.28140 + 2)
    assert found["confidence"] == pytest.approx(expected, abs=2e-5)
    assert found["confidence_low"] == pytest.approx(expected - 0.25, abs=2e-5)
    assert found["confidence_calibrated"]
    assert found["review"] == ""


def test_without_facts_probabilities_are_taken_as_they_are():
    found = Confidenced()(item([1.875, 1.875, -1.875, -20.0, -20.0]))
    assert found["confidence"] == pytest.approx(2 * 2 * 0.86704 / (2 * 0.86704 + 0.13296 + 2), abs=2e-5)
    assert (found["confidence_low"], found["confidence_calibrated"]) == (None, False)
    assert found["review"] == "touches the border of the image"


def test_reasons_are_joined_with_notes_of_the_locator_and_of_the_voxel_size():
    found = Confidenced(facts=FACTS)(item([-9.0] * 4, "one channel; locator found nothing: whole volume segmented"))
    assert found["review"] == "nothing found; locator found nothing: whole volume segmented"
    size = "voxel size 1 x 1 x 1 mm, as headers without one say: give spacing_mm if it is wrong"
    assert Confidenced(facts=FACTS)(item([-9.0] * 4, size))["review"] == f"nothing found; {size}"
    assert found["confidence"] == 1.0  # no pixel has a probability of 0.01 or more


def test_probabilities_of_two_classes_are_a_mask_for_an_accuracy():
    p = torch.tensor([[0.1, 0.2, 0.7], [0.9, 0.8, 0.3]])[:, None]
    data = {"pred": p, "prob": p, "image": torch.rand(1, 1, 3)}
    # each logit counts as the middle of its bin: 2.197 as 2.125, 1.386 as 1.375, -0.847 as -0.875
    sure = [1 / (1 + np.exp(-z)) for z in (2.125, 1.375, 0.875)]
    assert Confidenced(score="accuracy")(data)["confidence"] == pytest.approx(np.mean(sure), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"score": "iou"}, "score must be one of dice, accuracy, got 'iou'."),
        (
            {"score": "accuracy", "facts": FACTS},
            "score is accuracy, but the confidence of the weights was calibrated for dice.",
        ),
    ],
)
def test_scores_are_checked(arguments, said):
    with pytest.raises(ValueError, match=said):
        Confidenced(**arguments)
