from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from segbundles.inferers import LocatorCropInferer
from segbundles.transforms import CropBoxd

AFFINE = torch.diag(torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64))  # 1 x 2 x 0.5 mm


def pair(*box, size=(20, 10, 30), meta=True):
    label = torch.zeros(1, *size)
    if box:
        label[(0, *(slice(a, b) for a, b in zip(*box, strict=True)))] = 1
    picture = torch.arange(label.numel(), dtype=torch.float32).reshape(label.shape)
    data = {"image": picture, "label": label}
    return {k: MetaTensor(v, affine=AFFINE) for k, v in data.items()} if meta else data


@pytest.mark.parametrize(
    ("margin", "start", "end"),
    [
        (0, (5, 4, 10), (8, 6, 20)),
        (2, (3, 3, 6), (10, 7, 24)),  # 2, 1 and 4 voxels
        (2.1, (2, 2, 5), (11, 8, 25)),  # rounded up
        ([0, 4, 1], (5, 2, 8), (8, 8, 22)),
        (100, (0, 0, 0), (20, 10, 30)),
    ],
)
def test_margin_in_mm(margin, start, end):
    data = pair((5, 4, 10), (8, 6, 20))
    crop = CropBoxd(["image", "label"], margin_mm=margin)
    assert [tuple(x) for x in crop.box(data)] == [start, end]
    out = crop(data)
    window = (slice(None), *(slice(a, b) for a, b in zip(start, end, strict=True)))
    for key in ("image", "label"):
        assert torch.equal(out[key].as_tensor(), data[key].as_tensor()[window])
    origin = out["image"].affine[:3, 3]
    torch.testing.assert_close(origin, torch.tensor(start, dtype=torch.float64) * torch.tensor([1, 2, 0.5]).double())


def test_plain_tensors_count_as_1_mm_and_missing_keys_may_be_allowed():
    data = pair((5, 4, 10), (8, 6, 20), meta=False)
    out = CropBoxd(["image", "label", "label_distance"], margin_mm=1, allow_missing_keys=True)(data)
    assert out["image"].shape == (1, 5, 4, 12)
    assert set(out) == {"image", "label"}


def test_without_foreground_the_whole_image_is_kept():
    data = pair()
    assert CropBoxd(["image", "label"], margin_mm=3)(data)["image"].shape == (1, 20, 10, 30)


def test_object_at_the_border_and_of_one_voxel():
    assert [tuple(x) for x in CropBoxd("image").box(pair((0, 9, 29), (1, 10, 30)))] == [(0, 9, 29), (1, 10, 30)]


def test_2d():
    data = {"image": torch.rand(3, 12, 12), "label": torch.zeros(1, 12, 12)}
    data["label"][0, 3:5, 6:9] = 2
    assert CropBoxd(["image", "label"], margin_mm=1)(data)["image"].shape == (3, 4, 5)


class Bright(nn.Module):
    def forward(self, x):
        return 40 * (x - 0.5)


@pytest.mark.parametrize(("low", "expected"), [(0.0, (4, 4, 12)), (-1.0, (2, 4, 12))])
def test_box_of_a_locator(low, expected):
    """The margins add up: 1 mm of the locator's, 0.5 of this; without a find, the label's box."""
    data = pair((5, 4, 10), (7, 6, 20))
    data["image"] = MetaTensor(data["label"].as_tensor() + low, affine=AFFINE)
    locator = LocatorCropInferer(
        roi_size=16, locator=Bright(), locator_spacing_mm=(1.0, 2.0, 0.5), margin_mm=(0.5, 0, 0), divisible_k=1
    )
    out = CropBoxd(["image", "label"], margin_mm=(0, 2, 0.5), locator=locator)(data)
    assert out["image"].shape == (1, *expected)
