from __future__ import annotations

import numpy as np
import pytest
import torch
from monai import transforms
from monai.data import MetaTensor
from skimage import measure

from segbundles.transforms import KeepLargestConnectedComponentd


def blobs() -> torch.Tensor:
    label = torch.zeros(1, 20, 18, 16, dtype=torch.uint8)
    label[0, 3:7, 3:7, 3:7] = 1
    label[0, 10:12, 10:12, 10:12] = 1
    label[0, 14:18, 5, 5] = 2
    label[0, 19, 17, 15] = 2
    return label


@pytest.mark.parametrize("arguments", [{}, {"num_components": 2}, {"connectivity": 3}])
@pytest.mark.parametrize("label", [blobs(), blobs() * 0, blobs().float()])
def test_equals_monai_where_nothing_touches(arguments: dict, label: torch.Tensor) -> None:
    expected = transforms.KeepLargestConnectedComponentd("pred", **arguments)({"pred": label.clone()})["pred"]
    out = KeepLargestConnectedComponentd("pred", **arguments)({"pred": label})["pred"]
    assert out.dtype == label.dtype
    assert torch.equal(out, expected)


def test_known_counts_and_the_input_stays() -> None:
    label = MetaTensor(blobs(), meta={"notes": "n"})
    out = KeepLargestConnectedComponentd("pred")({"pred": label})["pred"]
    assert [int((out == k).sum()) for k in (1, 2)] == [64, 4]
    assert torch.equal(label, blobs())
    assert out.meta["notes"] == "n"
    channels = torch.cat([blobs() == 1, blobs() == 2]).byte()
    out = KeepLargestConnectedComponentd("pred")({"pred": channels})["pred"]
    assert out.sum((1, 2, 3)).tolist() == [64, 4]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1, 1, 0, 1, 1, 0, 1], [1, 1, 0, 0, 0, 0, 0]),  # equally large: the first
        ([1, 0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0, 0]),
        ([0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_of_equal_components_the_first_is_kept(row: list[int], expected: list[int]) -> None:
    label = torch.tensor(row, dtype=torch.uint8)[None, :, None, None]
    assert KeepLargestConnectedComponentd("pred")({"pred": label})["pred"].flatten().tolist() == expected


def test_voxels_are_joined_by_faces() -> None:
    """Two squares that share a corner are two components; with ``connectivity`` 2 they are one."""
    label = torch.zeros(1, 4, 4, dtype=torch.uint8)
    label[0, :2, :2] = label[0, 2:, 2:] = 1
    label[0, 3, 3] = 0
    assert int(KeepLargestConnectedComponentd("pred")({"pred": label})["pred"].sum()) == 4
    assert int(KeepLargestConnectedComponentd("pred", connectivity=2)({"pred": label})["pred"].sum()) == 7


def test_equals_scikit_image_on_random_volumes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((9, 8, 7)) < 0.3
        parts = measure.label(mask, connectivity=1)
        expected = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
        out = KeepLargestConnectedComponentd("pred")({"pred": torch.as_tensor(mask[None]).byte()})["pred"]
        np.testing.assert_array_equal(out[0].numpy(), expected)


def test_no_component_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="num_components must be 1 or more, got 0"):
        KeepLargestConnectedComponentd("pred", num_components=0)
