from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from segbundles.data import VOID
from segbundles.transforms import FrameHeightd, MaskToClassd
from segbundles.transforms.frames import frame_size


@pytest.mark.parametrize(
    ("size", "height", "most", "expected"),
    [
        ((384, 288), None, None, (384, 288)),
        ((384, 288), 288, None, (384, 288)),
        ((384, 288), 144, None, (192, 144)),
        ((1920, 1080), 288, None, (512, 288)),
        ((100, 50), 75, None, (150, 75)),
        ((400, 100), None, 10_000, (200, 50)),
        ((400, 100), 100, 40_000, (400, 100)),
        ((400, 100), 200, 40_000, (400, 100)),
        ((2000, 1), 1, 20, (200, 1)),
    ],
)
def test_frame_size(size, height, most, expected) -> None:
    assert frame_size(size, height, most) == expected


def test_mask_keeps_its_metadata() -> None:
    mask = MetaTensor(torch.tensor([[[0, 200, 127]]], dtype=torch.uint8), meta={"filename_or_obj": "m.png"})
    classes = MaskToClassd("label")({"label": mask})["label"]
    assert classes.tolist() == [[[0, 1, 0]]]
    assert classes.dtype == torch.uint8
    assert classes.meta["filename_or_obj"] == "m.png"
    void = MaskToClassd("label", num_classes=3, void_class=3)({"label": torch.tensor([[[0, 3, 2]]])})["label"]
    assert void.tolist() == [[[0, VOID, 2]]]


def test_mask_with_other_values_is_refused_by_name() -> None:
    mask = MetaTensor(torch.tensor([[[0, 9]]]), meta={"filename_or_obj": "x/m.png"})
    with pytest.raises(ValueError, match=r"x/m.png holds the values 9: .* set num_classes and void_class\."):
        MaskToClassd("label")({"label": mask})


def test_frames_and_labels_come_to_one_height() -> None:
    image = torch.arange(24, dtype=torch.uint8).reshape(1, 6, 4)
    label = torch.tensor([0, 0, 1, 1, VOID, VOID], dtype=torch.uint8)[None, :, None].repeat(1, 1, 4)
    data = {"image": MetaTensor(image, meta={"a": 1}), "label": label}
    found = FrameHeightd(("image", "label"), 2, label=(False, True))(data)
    assert found["image"].shape == found["label"].shape == (1, 3, 2)
    assert found["image"].dtype == found["label"].dtype == torch.uint8
    assert found["label"][0, :, 0].tolist() == [0, 1, VOID]
    assert found["image"].meta["a"] == 1
    assert abs(float(found["image"].float().mean()) - 11.5) < 0.6
    doubled = FrameHeightd("label", 8, label=True)(data)["label"]
    np.testing.assert_array_equal(doubled.numpy(), np.kron(label.numpy(), np.ones((1, 2, 2))))


@pytest.mark.parametrize("height", [None, 4])
def test_no_op_at_the_height_due(height) -> None:
    image = torch.rand(3, 6, 4)
    assert FrameHeightd("image", height)({"image": image})["image"] is image


def test_height_must_be_positive() -> None:
    with pytest.raises(ValueError, match="height must be 1 pixel or more, or None, got 0"):
        FrameHeightd("image", 0)
