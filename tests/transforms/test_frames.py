from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from segbundles.data import VOID
from segbundles.transforms import FrameHeightd, MaskToClassd, RandCropByKnownClassesd
from segbundles.transforms.frames import frame_box, frame_size


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
    with pytest.raises(ValueError, match=r"x/m.png contains the values 9; .* set num_classes and void_class\."):
        MaskToClassd("label")({"label": mask})


def test_frames_and_labels_are_scaled_to_one_height() -> None:
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
def test_no_op_at_the_target_height(height) -> None:
    image = torch.rand(3, 6, 4)
    assert FrameHeightd("image", height)({"image": image})["image"] is image


def bordered(size: tuple[int, int], box: tuple[int, int, int, int], noise: int = 28) -> torch.Tensor:
    """A frame (3, W, H) that is dark but for a picture in a box, one channel of which is enough."""
    frame = torch.randint(0, noise + 1, (3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    frame[1, box[0] : box[1], box[2] : box[3]] = 29
    return frame


@pytest.mark.parametrize(
    ("size", "box", "expected"),
    [
        ((64, 48), (0, 64, 0, 48), (0, 64, 0, 48)),
        ((64, 48), (10, 60, 3, 47), (10, 60, 3, 47)),
        ((384, 288), (40, 360, 12, 280), (40, 360, 12, 282)),  # steps of 8 columns and 6 rows
        ((384, 288), (43, 358, 14, 281), (40, 360, 12, 282)),
        ((384, 288), (7, 384, 0, 283), (0, 384, 0, 288)),
        ((64, 48), (0, 16, 0, 48), (0, 16, 0, 48)),
        ((64, 48), (20, 35, 0, 48), (0, 64, 0, 48)),  # less than a quarter
        ((64, 48), (0, 64, 30, 41), (0, 64, 0, 48)),
        ((64, 48), (5, 5, 5, 5), (0, 64, 0, 48)),  # black
    ],
)
def test_the_picture_inside_black_borders(size, box, expected) -> None:
    frame = bordered(size, box)
    assert frame_box(frame) == frame_box(frame.float()) == expected


def test_borders_are_cut_off_image_and_label_before_they_are_scaled() -> None:
    image = bordered((64, 48), (10, 50, 4, 44))
    label = torch.arange(48, dtype=torch.uint8)[None, None].repeat(1, 64, 1)
    found = FrameHeightd(("image", "label"), None, (False, True), crop_borders=True)({"image": image, "label": label})
    assert torch.equal(found["image"], image[:, 10:50, 4:44])
    assert torch.equal(found["label"], label[:, 10:50, 4:44])
    scaled = FrameHeightd(("image", "label"), 20, (False, True), crop_borders=True)({"image": image, "label": label})
    assert scaled["image"].shape == (3, 20, 20)
    assert scaled["image"][1].min() == 29
    assert (scaled["label"][0, 0, 0], scaled["label"][0, 0, -1]) in ((4, 42), (5, 43))


def test_crops_of_a_label_that_is_all_void_are_from_anywhere() -> None:
    crop = RandCropByKnownClassesd(
        ["image", "label"], "label", spatial_size=(4, 4), ratios=[1, 1], num_classes=2, num_samples=40, warn=False
    )
    crop.set_random_state(0)
    image = torch.arange(144.0).reshape(1, 12, 12)
    void = torch.full((1, 12, 12), float(VOID))
    corners = {int(item["image"][0, 0, 0]) for item in crop({"image": image, "label": void})}
    assert len(corners) > 10
    assert all(bool((item["label"] == VOID).all()) for item in crop({"image": image, "label": void}))
    one = void.clone()
    one[0, 6, 6] = 1  # the only pixel of a class is the middle of every crop
    assert {float(item["label"][0, 2, 2]) for item in crop({"image": image, "label": one})} == {1.0}


def test_height_must_be_positive() -> None:
    with pytest.raises(ValueError, match="height must be 1 pixel or more, or None, got 0"):
        FrameHeightd("image", 0)
