from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.losses import BoundaryLoss as MonaiBoundaryLoss
from monai.transforms import Compose, ConcatItemsd, Flipd, RandAffined, RandFlipd, RandRotate90d, SpatialCropd
from scipy.ndimage import distance_transform_edt

from segbundles.transforms.signed_distance import SignedDistanceMap, SignedDistanceMapd, signed_distance_map

LINE = [[0, 0, 1, 1, 1, 0]]  # one row: as in one dimension
POINT = [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
R2, R5 = 2**0.5, 5**0.5

CASES = {
    "row, voxels": (LINE, 1.0, [[2, 1, 0, -1, 0, 1]]),
    "row, 0.5 mm": (LINE, 0.5, [[1, 0.5, 0, -0.5, 0, 0.5]]),
    # the smallest spacing is 0.5, between the rows: the border voxels along the row lie at 0.5 - 2
    "row, 0.5 x 2 mm": (LINE, (0.5, 2.0), [[4, 2, -1.5, -3.5, -1.5, 2]]),
    "point, voxels": (POINT, 1.0, [[R2, 1, R2], [1, 0, 1], [R2, 1, R2]]),
    "point, 1 x 2 mm": (POINT, (1.0, 2.0), [[R5, 1, R5], [2, 0, 2], [R5, 1, R5]]),
    "point, 2 x 1 mm": (POINT, (2.0, 1.0), [[R5, 2, R5], [1, 0, 1], [R5, 2, R5]]),
}


def blob(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A random mask without symmetry, channel first."""
    noise = np.random.default_rng(seed).random(shape)
    return (noise > 0.7)[None].astype(np.uint8)


def scipy_map(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    inside = distance_transform_edt(mask, sampling=spacing)
    return np.where(mask, min(spacing) - inside, distance_transform_edt(1 - mask, sampling=spacing))


@pytest.mark.parametrize(("mask", "spacing", "expected"), CASES.values(), ids=CASES.keys())
def test_hand_computed(mask, spacing, expected):
    output = signed_distance_map(np.array([mask]), spacing)
    assert output.dtype == np.float32
    np.testing.assert_allclose(output, [expected], rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((17, 23), (1.0, 1.0)), ((17, 23), (0.7, 2.3)), ((9, 14, 11), (2.5, 0.625, 1.1)), ((1, 14, 11), (3.0, 1.0, 0.5))],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_agrees_with_scipy(shape, spacing, order):
    mask = blob(shape)
    output = signed_distance_map(np.asarray(mask, order=order), spacing)
    np.testing.assert_allclose(output[0], scipy_map(mask[0], spacing), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(31, 29), (13, 16, 15)])
def test_agrees_with_monai_at_spacing_one(shape):
    masks = torch.from_numpy(np.concatenate([blob(shape, seed) for seed in range(3)]))
    expected = MonaiBoundaryLoss().compute_distance_map(masks[None])[0]
    torch.testing.assert_close(signed_distance_map(masks), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 7)])
def test_empty_and_full_masks_give_zero_and_leave_other_channels(value, shape):
    masks = np.concatenate([np.full((1, *shape), value), blob(shape)])
    output = signed_distance_map(masks)
    assert not output[0].any()
    np.testing.assert_allclose(output[1], scipy_map(masks[1], (1.0,) * len(shape)), rtol=1e-6)


@pytest.mark.parametrize(
    ("spacing", "message"),
    [
        ((1.0, 2.0, 3.0), r"2 spatial axes, got \(1.0, 2.0, 3.0\)"),
        (0.0, "one positive number, .*got 0.0"),
        ((1.0, float("nan")), "got .*nan"),
    ],
)
def test_wrong_spacing(spacing, message):
    with pytest.raises(ValueError, match=message):
        signed_distance_map(np.zeros((1, 4, 4)), spacing)


def test_wrong_shape():
    with pytest.raises(ValueError, match=r"got \(4, 4\)"):
        signed_distance_map(np.zeros((4, 4)))


@pytest.mark.parametrize(
    ("label_type", "dtype"), [(np.asarray, np.float32), (torch.from_numpy, torch.float32), (MetaTensor, torch.float32)]
)
def test_keeps_the_type_and_gives_float32(label_type, dtype):
    label = label_type(blob((6, 7)))
    output = SignedDistanceMap()(label)
    assert type(output) is type(label)
    assert output.dtype == dtype


def test_spacing_comes_from_the_affine():
    mask = blob((9, 14, 11))
    spacing = (2.5, 0.625, 1.1)
    turn = np.array([[0, -1, 0, 5.0], [1, 0, 0, -3], [0, 0, 1, 8], [0, 0, 0, 1]])
    affine = turn @ np.diag([*spacing, 1])
    label = MetaTensor(mask, affine=affine, meta={"filename_or_obj": "case.nrrd"})
    output = SignedDistanceMap()(label)
    np.testing.assert_allclose(output[0].numpy(), scipy_map(mask[0], spacing), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(output.affine, affine)
    assert output.meta["filename_or_obj"] == "case.nrrd"
    output.affine[0, 3] = 99.0
    assert label.affine[0, 3] == 5.0


@pytest.mark.parametrize("rank", [2, 3])
def test_spacing_of_a_2d_image(rank):
    mask = blob((9, 14))
    affine = np.diag([0.7, 2.3, 5.0, 1.0] if rank == 3 else [0.7, 2.3, 1.0])
    output = SignedDistanceMap()(MetaTensor(mask, affine=affine))
    np.testing.assert_allclose(output[0].numpy(), scipy_map(mask[0], (0.7, 2.3)), rtol=1e-5, atol=1e-5)


def test_spacing_mm_replaces_the_header():
    mask = blob((9, 14, 11))
    output = SignedDistanceMap(spacing_mm=0.625)(MetaTensor(mask, affine=np.eye(4)))
    np.testing.assert_allclose(output[0].numpy(), 0.625 * scipy_map(mask[0], (1.0, 1.0, 1.0)), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(output.affine, np.eye(4))


def test_class_indices_and_one_hot_give_the_same_maps():
    indices = np.random.default_rng(1).integers(0, 3, (1, 8, 9))
    one_hot = np.stack([indices[0] == c for c in range(3)])
    from_indices = SignedDistanceMap(num_classes=3)(indices)
    assert from_indices.shape == (3, 8, 9)
    np.testing.assert_array_equal(from_indices, SignedDistanceMap()(one_hot))
    np.testing.assert_array_equal(from_indices, SignedDistanceMap(num_classes=3)(one_hot))
    np.testing.assert_allclose(from_indices[2], scipy_map(indices[0] == 2, (1.0, 1.0)), rtol=1e-6)
    foreground = SignedDistanceMap(num_classes=3, include_background=False)(indices)
    np.testing.assert_array_equal(foreground, from_indices[1:])


def test_mask_of_0_and_255():
    mask = blob((8, 9))
    np.testing.assert_array_equal(SignedDistanceMap()(mask * 255), SignedDistanceMap()(mask))


@pytest.mark.parametrize(
    ("label", "num_classes", "message"),
    [
        ([[0, 1, 2]], None, "must be binary .*values from 0 to 2.*give num_classes"),
        ([[0.0, 0.3, 1.0]], None, "must be binary"),
        ([[0, 1, 255]], 3, "class indices 0 to 2, got values from 0 to 255"),
        ([[0.0, 0.5, 1.0]], 2, "class indices 0 to 1"),
        ([[-1, 0, 1]], 2, "values from -1 to 1"),
    ],
)
def test_wrong_label_values(label, num_classes, message):
    with pytest.raises(ValueError, match=message):
        SignedDistanceMap(num_classes=num_classes)(np.array([label]))


def test_wrong_channels():
    with pytest.raises(ValueError, match=r"num_classes=3 classes, got shape \(2, 4, 4\)"):
        SignedDistanceMap(num_classes=3)(np.zeros((2, 4, 4)))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"num_classes must be 2 or more.*got 1"):
        SignedDistanceMap(num_classes=1)
    with pytest.raises(ValueError, match="output_postfix must not be empty"):
        SignedDistanceMapd(keys="label", output_postfix="")


def test_dictionary_form():
    label = MetaTensor(blob((6, 7)))
    data = {"label": label, "image": 0}
    output = SignedDistanceMapd(keys=["label", "other"], spacing_mm=2.0, allow_missing_keys=True)(data)
    assert set(output) == {"label", "image", "label_distance"}
    assert output["label"] is label
    assert set(data) == {"label", "image"}
    torch.testing.assert_close(output["label_distance"], SignedDistanceMap(spacing_mm=2.0)(label))
    assert "label_phi" in SignedDistanceMapd(keys="label", output_postfix="phi")(data)
    with pytest.raises(KeyError, match="other"):
        SignedDistanceMapd(keys="other")(data)


def with_map(shape: tuple[int, ...] = (12, 16, 14)) -> dict:
    """A label, an image equal to it, and the label's map."""
    label = MetaTensor(blob(shape).astype(np.float32), affine=np.diag([2.5, 0.625, 0.625, 1.0]))
    return SignedDistanceMapd(keys="label")({"label": label, "image": label.clone()})


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_flip_of_the_map_is_the_map_of_the_flip(axis):
    data = Flipd(keys=["label", "label_distance"], spatial_axis=axis)(with_map())
    torch.testing.assert_close(data["label_distance"], SignedDistanceMap()(data["label"]))


@pytest.mark.parametrize(
    "transform",
    [
        RandFlipd(keys=["image", "label", "label_distance"], prob=1.0, spatial_axis=1),
        RandRotate90d(keys=["image", "label", "label_distance"], prob=1.0, spatial_axes=(0, 1)),
        # one voxel of translation, no interpolation
        RandAffined(
            keys=["image", "label", "label_distance"],
            prob=1.0,
            translate_range=((1, 1), (2, 2), (-3, -3)),
            mode=["nearest", "nearest", "bilinear"],
            padding_mode="border",
        ),
        SpatialCropd(keys=["image", "label", "label_distance"], roi_start=(2, 3, 4), roi_end=(9, 12, 10)),
    ],
    ids=["flip", "rotate90", "affine", "crop"],
)
def test_map_moves_with_image_and_label(transform):
    before = with_map()
    after = transform(before)
    label, phi = after["label"], after["label_distance"]
    assert phi.dtype == torch.float32
    assert phi.shape == label.shape
    torch.testing.assert_close(phi.affine, after["image"].affine)
    assert not torch.equal(label, before["label"])
    # the sign still tells inside (up to the smallest spacing) from outside: 0.625 is the smallest positive distance
    torch.testing.assert_close((phi <= 1e-4).float().as_tensor(), label.as_tensor())


def test_crop_keeps_distances_to_a_border_outside_it():
    label = torch.zeros(1, 1, 40)
    label[..., :3] = 1
    data = SpatialCropd(keys=["label", "label_distance"], roi_start=(0, 30), roi_end=(1, 33))(
        SignedDistanceMapd(keys="label", spacing_mm=2.0)({"label": MetaTensor(label)})
    )
    assert data["label_distance"].flatten().tolist() == [56.0, 58.0, 60.0]
    assert data["label"].sum() == 0


def test_rotated_map_is_close_to_the_map_of_the_rotated_label():
    label = torch.zeros(1, 64, 64)
    label[:, 12:52, 25:40] = 1
    data = SignedDistanceMapd(keys="label")({"label": MetaTensor(label)})
    rotate = RandAffined(
        keys=["label", "label_distance"],
        prob=1.0,
        rotate_range=((0.2, 0.2),),
        mode=["nearest", "bilinear"],
        padding_mode="border",
    )
    after = rotate(data)
    expected = SignedDistanceMap()(after["label"])
    error = (after["label_distance"] - expected).abs()
    near = expected.abs() < 10
    assert (data["label_distance"] - expected).abs()[near].max() > 3  # the label did move
    assert error[near].max() < 1  # no more than the jagged border of the rotated label explains


def test_concatenates_behind_its_label():
    data = Compose([SignedDistanceMapd(keys="label"), ConcatItemsd(keys=["label", "label_distance"], name="target")])(
        {"label": MetaTensor(blob((6, 7)))}
    )
    assert data["target"].shape == (2, 6, 7)
    assert data["target"].dtype == torch.float32
    torch.testing.assert_close(data["target"][1:], data["label_distance"])
