from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import Dataset, MetaTensor
from monai.transforms import NormalizeIntensity, ScaleIntensity

from segbundles.data import SliceDataset
from segbundles.transforms import NeighbourSlicesd, NormalizeSlicesd, ScaleSlicesd
from segbundles.transforms.slices import flat_border

# two channels, (W, H) = (1, 2), three slices
VOLUME = [[[[0, 5, 7], [10, 5, 7]]], [[[20, 5, 9], [40, 5, 11]]]]


@pytest.mark.parametrize(
    ("channel_wise", "expected"),
    [
        (False, [[[[0, 0, 0], [0.25, 0, 0]]], [[[0.5, 0, 0.5], [1, 0, 1]]]]),
        (True, [[[[0, 0, 0], [1, 0, 0]]], [[[0, 0, 0], [1, 0, 1]]]]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int16, torch.float16])
@pytest.mark.parametrize("kind", [torch.Tensor, MetaTensor])
def test_each_slice_is_scaled_by_its_own_range(channel_wise, expected, dtype, kind):
    volume = torch.tensor(VOLUME, dtype=dtype)
    given = MetaTensor(volume, meta={"filename_or_obj": "a"}) if kind is MetaTensor else volume
    out = ScaleSlicesd("image", channel_wise)({"image": given})["image"]
    assert type(out) is kind
    assert out.dtype == torch.float32
    np.testing.assert_array_equal(out.numpy(), np.float32(expected))
    np.testing.assert_array_equal(given.numpy(), volume.numpy())
    if kind is MetaTensor:
        assert out.meta["filename_or_obj"] == "a"


@pytest.mark.parametrize("channel_wise", [False, True])
def test_against_monai_on_each_slice_alone(channel_wise):
    volume = torch.randn(3, 6, 5, 4, generator=torch.Generator().manual_seed(0)) * 100 - 30
    out = ScaleSlicesd("image", channel_wise)({"image": volume})["image"]
    for s in range(4):
        expected = ScaleIntensity(0, 1, channel_wise=channel_wise)(volume[..., s])
        np.testing.assert_allclose(out[..., s].numpy(), expected.numpy(), rtol=0, atol=1e-6)


def test_int16_whose_range_overflows_its_type():
    volume = torch.tensor([-32768, 0, 32767], dtype=torch.int16).reshape(1, 3, 1, 1)
    out = ScaleSlicesd("image")({"image": volume})["image"].flatten()
    np.testing.assert_allclose(out.numpy(), [0, 32768 / 65535, 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("transform", [ScaleSlicesd, NormalizeSlicesd])
def test_only_volumes(transform):
    flat = MetaTensor(torch.zeros(3, 4, 5), meta={"filename_or_obj": "p/a.png"})
    with pytest.raises(ValueError, match=r"p/a\.png has shape \(3, 4, 5\) but must have \(channels, W, H, slices\)"):
        transform("image")({"image": flat})
    assert transform("image", allow_missing_keys=True)({}) == {}


def test_each_slice_to_one_mean_and_deviation():
    volume = MetaTensor(torch.tensor(VOLUME), meta={"filename_or_obj": "a"})
    out = NormalizeSlicesd("image", mean=0.5, std=0.2)({"image": volume})["image"]
    # two pixels a slice: one deviation above and below; a slice of one value is the mean
    expected = [[[[0.3, 0.5, 0.5], [0.7, 0.5, 0.5]]], [[[0.3, 0.5, 0.3], [0.7, 0.5, 0.7]]]]
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-6)
    assert (out.dtype, out.meta["filename_or_obj"]) == (torch.float32, "a")
    assert volume.numpy().tolist() == VOLUME


def test_normalization_against_monai_on_each_slice_alone():
    volume = torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(0)) * 100 - 30
    out = NormalizeSlicesd("image")({"image": volume})["image"]
    for s in range(4):
        expected = NormalizeIntensity(channel_wise=True)(volume[..., s])
        np.testing.assert_allclose(out[..., s].numpy(), expected.numpy(), rtol=0, atol=1e-5)


def test_a_deviation_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"std must be positive, got 0"):
        NormalizeSlicesd("image", std=0)


def section(size: tuple[int, int] = (120, 100)) -> np.ndarray:
    return np.random.default_rng(0).normal(120, 30, size).clip(0, 255).round().astype(np.float32)


BORDERS = {
    "black half": (slice(0, 60), slice(None)),
    "edge": (slice(None), slice(90, 100)),
    "corner": (slice(0, 40), slice(70, 100)),
}


@pytest.mark.parametrize("grey", [0, 255, 128, -32768, 65535])
@pytest.mark.parametrize("name", BORDERS)
def test_a_flat_border_is_left_out_of_the_normalization(name: str, grey: float) -> None:
    image = section()
    image[BORDERS[name]] = grey
    known = np.ones(image.shape, bool)
    known[BORDERS[name]] = False
    expected = np.full(image.shape, 0.5, np.float32)
    expected[known] = (image[known] - image[known].mean()) / image[known].std() * 0.17 + 0.5
    volume = MetaTensor(torch.from_numpy(np.stack([image, section()], -1)[None]))
    out = NormalizeSlicesd("image", 0.5, 0.17)({"image": volume})["image"]
    np.testing.assert_allclose(out[0, ..., 0].numpy(), expected, rtol=0, atol=1e-5)
    plain = NormalizeSlicesd("image", 0.5, 0.17)({"image": volume[..., 1:]})["image"]
    assert torch.equal(out[..., 1:], plain)
    assert out.meta["notes"] == "flat border: left out of the normalisation"
    assert "notes" not in plain.meta


def test_a_border_of_a_jpeg_and_of_a_turned_section_is_found_but_no_hole_inside() -> None:
    image, turned = section(), section()
    image[:50] = np.random.default_rng(1).integers(0, 4, (50, 100))
    x, y = np.mgrid[:120, :100]
    turned[x + y < 60] = 0
    border = flat_border(turned)
    assert border is not None
    assert not border[x + y >= 60].any()
    assert border.sum() >= 0.8 * (x + y < 60).sum()
    np.testing.assert_array_equal(flat_border(image).nonzero()[0].max(), 49)
    image = section()
    image[40:80, 30:60] = 0
    assert flat_border(image) is None
    assert flat_border(section()) is None
    assert flat_border(np.zeros((40, 40), np.float32)) is None


@pytest.mark.parametrize("context", [0, 1, 2])
def test_neighbouring_slices_as_channels_are_those_that_training_cuts(context: int) -> None:
    volume = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    out = NeighbourSlicesd("image", context)({"image": MetaTensor(volume)})["image"]
    assert out.shape == (2 * (2 * context + 1), 3, 4, 5)
    for number in range(5):
        for place in range(-context, context + 1):
            channels = out[2 * (place + context) : 2 * (place + context + 1), ..., number]
            assert torch.equal(channels.as_tensor(), volume[..., min(max(number + place, 0), 4)])
    items = SliceDataset(
        Dataset([{"image": volume, "label": volume[:1]}]), keys=("image", "label"), context_slices=context
    )
    for number in range(5):
        assert torch.equal(items[number]["image"], out[..., number].as_tensor())
        assert torch.equal(items[number]["label"], volume[:1, ..., number])
    with pytest.raises(ValueError, match="context_slices must be 0 or more, got -1"):
        NeighbourSlicesd("image", -1)
