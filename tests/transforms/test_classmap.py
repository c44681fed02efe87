from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from segbundles.transforms import LogitsToClassd


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.5, [0, 0, 1, 1]),  # probabilities 0.269, 0.5, 0.525, 0.953
        (0.2, [1, 1, 1, 1]),
        (0.9, [0, 0, 0, 1]),
    ],
)
def test_one_channel(threshold, expected):
    logits = torch.tensor([-1.0, 0.0, 0.1, 3.0]).reshape(1, 4, 1)
    out = LogitsToClassd("pred", threshold)({"pred": logits})["pred"]
    assert out.dtype == torch.uint8
    assert out.shape == (1, 4, 1)
    assert out.flatten().tolist() == expected


def test_several_channels_whatever_the_threshold():
    logits = torch.tensor([[1.0, 0.0, -3.0], [0.0, 2.0, -2.0], [0.5, 1.0, -1.0]])
    out = LogitsToClassd("pred", 0.99)({"pred": logits})["pred"]
    assert out.dtype == torch.uint8
    assert out.tolist() == [[0, 1, 2]]


def test_metadata_stays():
    logits = MetaTensor(torch.ones(1, 2, 2), meta={"filename_or_obj": "a", "notes": "n"})
    out = LogitsToClassd("pred")({"pred": logits})["pred"]
    assert out.meta["notes"] == "n"
    assert torch.equal(logits, torch.ones(1, 2, 2))


@pytest.mark.parametrize("threshold", [0, 1, -0.5, 127])
def test_threshold_is_a_probability(threshold):
    with pytest.raises(ValueError, match=rf"threshold must be between 0 and 1 \(a probability\), got {threshold}"):
        LogitsToClassd("pred", threshold)
