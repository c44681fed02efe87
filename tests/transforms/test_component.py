from __future__ import annotations

import pytest
import torch
from monai import transforms
from monai.data import MetaTensor

from segbundles.transforms.component import KeepLargestConnectedComponentd


def blobs() -> torch.Tensor:
    label = torch.zeros(1, 20, 18, 16, dtype=torch.uint8)
    label[0, 3:7, 3:7, 3:7] = 1
    label[0, 10:12, 10:12, 10:12] = 1
    label[0, 14:18, 5, 5] = 2
    label[0, 19, 17, 15] = 2
    return label


@pytest.mark.parametrize("arguments", [{}, {"independent": False}, {"applied_labels": [1]}, {"num_components": 2}])
@pytest.mark.parametrize("empty", [False, True])
def test_equals_monai(arguments, empty):
    label = blobs() * (not empty)
    expected = transforms.KeepLargestConnectedComponentd("pred", **arguments)({"pred": label.clone()})["pred"]
    assert torch.equal(KeepLargestConnectedComponentd("pred", **arguments)({"pred": label})["pred"], expected)


def test_known_counts_and_the_input_stays():
    label = MetaTensor(blobs(), meta={"notes": "n"})
    out = KeepLargestConnectedComponentd("pred")({"pred": label})["pred"]
    assert [int((out == k).sum()) for k in (1, 2)] == [64, 4]
    assert torch.equal(label, blobs())
    assert out.meta["notes"] == "n"
    assert out.dtype == torch.uint8


def test_one_hot_channels():
    label = torch.cat([blobs() == 1, blobs() == 2]).float()
    expected = transforms.KeepLargestConnectedComponentd("pred")({"pred": label.clone()})["pred"]
    assert torch.equal(KeepLargestConnectedComponentd("pred")({"pred": label})["pred"], expected)
