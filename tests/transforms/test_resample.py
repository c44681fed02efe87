from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.transforms import Compose, Invertd, Resize

from segbundles.transforms.resample import ResampleToSpacing, ResampleToSpacingd, resample, resampled_size

OBLIQUE = np.array(
    [
        [0.0, -1.5, 0.3, 10.0],
        [0.8, 0.0, 0.0, -20.0],
        [0.0, 0.4, 2.0, 5.0],
        [0.0, 0.0, 0.0, 1.0],
    ]
)


@pytest.mark.parametrize(
    ("values", "size", "mode", "expected"),
    [
        ([[0.0, 4.0, 1.0, 3.0]], (2,), "area", [[2.0, 2.0]]),
        ([[0.0, 3.0, 6.0, 9.0, 1.0, 2.0]], (2,), "area", [[3.0, 4.0]]),
        ([[0.0, 1.0]], (4,), "area", [[0.0, 0.25, 0.75, 1.0]]),
        # the first axis shrinks to its mean, the second grows
        ([[[0.0, 1.0], [2.0, 3.0]]], (1, 4), "area", [[[1.0, 1.25, 1.75, 2.0]]]),
        ([[0, 4, 1, 3]], (2,), "area", [[2.0, 2.0]]),
        ([[1, 2, 3, 4, 5, 6]], (2,), "nearest", [[2, 5]]),
        ([[7, 9]], (4,), "nearest", [[7, 7, 9, 9]]),
    ],
)
def test_resample_gives_values_computed_by_hand(values, size, mode, expected):
    torch.testing.assert_close(resample(torch.tensor(values), size, mode), torch.tensor(expected))


@pytest.mark.parametrize("size", [(4, 6, 10), (8, 3, 10), (3, 12, 7)])
def test_resample_treats_a_batch_as_its_items(size):
    batch = torch.rand(2, 3, 6, 7, 5)
    expected = torch.stack([resample(item, size) for item in batch])
    torch.testing.assert_close(resample(batch, size), expected)
    assert resample(batch, size).shape == (2, 3, *size)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64])
def test_nearest_keeps_labels_and_type(dtype):
    labels = (torch.arange(120).reshape(1, 4, 5, 6) % 2).to(dtype)
    out = resample(labels, (7, 3, 6), mode="nearest")
    assert out.dtype == dtype
    assert set(out.unique().tolist()) <= {0, 1}


def test_nearest_keeps_labels_beyond_single_precision():
    assert resample(torch.tensor([[2**24 + 1, 5]]), (4,), mode="nearest").tolist() == [[2**24 + 1, 2**24 + 1, 5, 5]]


def test_area_keeps_what_nearest_would_skip():
    line = torch.zeros(1, 8, 8)
    line[0, 3] = 1.0
    assert resample(line, (2, 2)).tolist() == [[[0.25, 0.25], [0.0, 0.0]]]
    assert resample(line, (2, 2), mode="nearest").sum() == 0


@pytest.mark.parametrize(
    ("size", "spacing", "new", "expected"),
    [
        ((640, 640, 88), (0.625, 0.625, 0.625), (2.5, 2.5, 1.25), (160, 160, 44)),
        ((320, 320, 130), (1.25, 1.25, 1.37), (1.0, 1.0, 1.0), (400, 400, 178)),
        ((10, 3), (1.0, 1.0), (4.0, 100.0), (2, 1)),
    ],
)
def test_resampled_size(size, spacing, new, expected):
    assert resampled_size(size, spacing, new) == expected


@pytest.mark.parametrize(
    ("image", "size", "mode", "message"),
    [
        (torch.zeros(4, 4), (2, 2), "area", r"size \(2, 2\) needs .* 2 spatial axes, got shape \(4, 4\)"),
        (torch.zeros(1, 4, 4), (2, 2), "cubic", "cubic"),
    ],
)
def test_resample_says_what_is_wrong(image, size, mode, message):
    with pytest.raises(ValueError, match=message):
        resample(image, size, mode)


@pytest.mark.parametrize("affine", [np.diag([0.5, 1.0, 2.0, 1.0]), OBLIQUE])
@pytest.mark.parametrize("spacing_mm", [1.0, (1.7, 0.6, 1.1)])
def test_affine_is_that_of_monai_resize_and_keeps_the_field_of_view(affine, spacing_mm):
    image = MetaTensor(torch.rand(2, 9, 11, 6), affine=torch.as_tensor(affine))
    out = ResampleToSpacing(spacing_mm)(image)
    expected = Resize(out.shape[1:], mode="area")(image)
    assert out.shape != image.shape
    torch.testing.assert_close(out.affine, expected.affine)
    for corner, size in ((-0.5, 0), (-0.5, 1)):  # outer corner of the first and of the last voxel
        old, new = (torch.tensor([*(corner + size * np.array(x.shape[1:])), 1.0]).double() for x in (image, out))
        torch.testing.assert_close(out.affine @ new, image.affine @ old)


def test_spacing_reached_is_field_of_view_over_voxels():
    out = ResampleToSpacing((2.0, 3.0, 1.0))(MetaTensor(torch.rand(1, 9, 10, 7), affine=torch.eye(4)))
    assert out.shape == (1, 4, 3, 7)
    torch.testing.assert_close(out.pixdim, torch.tensor([9 / 4, 10 / 3, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("spacing_mm", [None, 1.0, (1.0, 1.02, 1.0)])
def test_no_op_when_spacing_fits(spacing_mm):
    image = MetaTensor(torch.rand(1, 5, 6, 7), affine=torch.eye(4))
    transform = ResampleToSpacing(spacing_mm)
    out = transform(image)
    for same in (out, transform.inverse(out)):
        torch.testing.assert_close(same.as_tensor(), image.as_tensor(), rtol=0, atol=0)
        torch.testing.assert_close(same.affine, image.affine)


@pytest.mark.parametrize(
    "affine", [torch.diag(torch.tensor([0.5, 2.0, 1.0, 1.0])), torch.diag(torch.tensor([0.5, 2.0, 1.0]))]
)
def test_two_dimensional_images_use_the_first_two_axes_of_the_affine(affine):
    transform = ResampleToSpacing(1.0)
    image = MetaTensor(torch.rand(1, 8, 5), affine=affine)
    out = transform(image)
    assert out.shape == (1, 4, 10)
    back = transform.inverse(out)
    assert back.shape == image.shape
    torch.testing.assert_close(back.affine, image.affine)


def test_dictionary_keeps_labels_and_ignores_strings_beside_the_image():
    # MONAI Label puts the file's name under image_path
    image = MetaTensor(torch.rand(1, 6, 6, 6), affine=torch.as_tensor(OBLIQUE))
    label = MetaTensor((torch.rand(1, 6, 6, 6) > 0.5).to(torch.uint8), affine=torch.as_tensor(OBLIQUE))
    data = {"image": image, "label": label, "image_path": "a.nii.gz", "image_meta_dict": "b"}
    transform = ResampleToSpacingd(["image", "label"], spacing_mm=(0.4, 1.0, 3.0), mode=["area", "nearest"])
    out = transform(data)
    assert out["image"].shape == out["label"].shape == (1, 12, 9, 4)
    assert out["label"].dtype == torch.uint8
    assert out["image_path"] == "a.nii.gz"
    assert image.shape == (1, 6, 6, 6)
    torch.testing.assert_close(image.affine, torch.as_tensor(OBLIQUE))
    torch.testing.assert_close(out["image"].affine, out["label"].affine)
    back = transform.inverse(out)
    assert back["image"].shape == image.shape
    torch.testing.assert_close(back["image"].affine, image.affine)


def test_missing_key_is_an_error_unless_allowed():
    data = {"image": MetaTensor(torch.rand(1, 4, 4), affine=torch.eye(4))}
    with pytest.raises(KeyError, match="label"):
        ResampleToSpacingd(["image", "label"], spacing_mm=2.0)(data)
    out = ResampleToSpacingd(["image", "label"], spacing_mm=2.0, allow_missing_keys=True)(data)
    assert out["image"].shape == (1, 2, 2)


def test_invertd_brings_a_prediction_back_to_the_input_grid():
    preprocessing = Compose([ResampleToSpacingd("image", spacing_mm=2.0)])
    image = MetaTensor(torch.zeros(1, 8, 8, 4), affine=torch.as_tensor(OBLIQUE))
    batch = list_data_collate([preprocessing({"image": image})])
    batch["pred"] = (torch.arange(batch["image"].numel()).reshape(batch["image"].shape) % 2).float()
    item = decollate_batch(batch)[0]
    item["pred"] = MetaTensor(item["pred"]).copy_meta_from(item["image"])
    out = Invertd("pred", preprocessing, orig_keys="image", nearest_interp=True, to_tensor=True)(item)["pred"]
    assert out.shape == image.shape
    torch.testing.assert_close(out.affine, image.affine)
    assert set(out.unique().tolist()) == {0.0, 1.0}  # nearest: nothing between


@pytest.mark.parametrize(
    ("arguments", "image", "message"),
    [
        ({"spacing_mm": 0.0}, None, "spacing_mm must be positive, got 0.0"),
        ({"spacing_mm": 1.0, "mode": "cubic"}, None, "cubic"),
        (
            {"spacing_mm": (1.0, 2.0)},
            MetaTensor(torch.zeros(1, 4, 4, 4), affine=torch.eye(4)),
            r"spacing_mm must have 1 or 3 values for a 3D image, got 2: \(1.0, 2.0\)",
        ),
        ({"spacing_mm": 1.0}, torch.zeros(1, 4, 4, 4), "needs a MetaTensor, .* got Tensor"),
    ],
)
def test_transform_says_what_is_wrong(arguments, image, message):
    with pytest.raises(ValueError, match=message):
        ResampleToSpacing(**arguments)(image)
