from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from segbundles.transforms import FillPaddingd

RNG = np.random.default_rng(0)
DARK = 28  # the darkest 2 % may be raised to the level that replaces padding, 4 % of the range here


def volume(low: float = 0, high: float = 700) -> np.ndarray:
    """Grey levels from dark to bright, rounded, in a cube."""
    return np.rint(RNG.uniform(low, high, (1, 24, 24, 12))).astype(np.float32)


def padded(image: np.ndarray, value: float, columns: int = 4) -> np.ndarray:
    image = image.copy()
    image[:, :columns] = value
    return image


def fill(image: np.ndarray) -> MetaTensor:
    return FillPaddingd("image")({"image": MetaTensor(torch.from_numpy(image))})["image"]


@pytest.mark.parametrize("value", [-1024, -32768, -2000, 32767, 65535])
@pytest.mark.parametrize("columns", [1, 4, 14])
def test_far_off_padding_becomes_the_darkest_level(value: float, columns: int) -> None:
    image = padded(volume(), value, columns)
    out = fill(image)
    dark = np.quantile(image[image != value], 0.02)
    np.testing.assert_allclose(out[:, :columns].numpy(), dark, rtol=0, atol=DARK)
    np.testing.assert_allclose(out[:, columns:].numpy(), image[:, columns:], rtol=0, atol=DARK)
    assert out.meta["notes"] == f"padding of {value:g} outside the field of view: taken as background"


def test_the_blurred_edge_of_padding_is_filled_too() -> None:
    image = padded(volume(), -1024, 8)
    image[:, 8] = -1024 * 0.6 + 0.4 * image[:, 8]  # as linear interpolation leaves it
    out = fill(image)
    assert out.min() >= 0
    np.testing.assert_allclose(out[:, 9:].numpy(), image[:, 9:], rtol=0, atol=DARK)


@pytest.mark.parametrize("value", [-1024, -32768])
@pytest.mark.parametrize("order", [1, 3])
def test_padding_that_was_resampled(value: float, order: int) -> None:
    """Linear interpolation blurs it, and a cubic spline goes beyond it."""
    x, y, _ = np.indices((40, 40, 20)) - 20
    round_field = x**2 + y**2 < 18**2
    body = ndimage.gaussian_filter(RNG.uniform(0, 700, (40, 40, 20)), 1)
    image = ndimage.zoom(np.where(round_field, body, value), 1.1, order=order)
    inside = ndimage.binary_erosion(ndimage.zoom(round_field.astype(float), 1.1, order=1) > 0.99, iterations=4)
    out = fill(image[None].astype(np.float32))[0].numpy()
    assert out.min() >= 0
    np.testing.assert_allclose(out[inside], image[inside], rtol=0, atol=10)
    assert abs(out.mean() - np.where(inside, image, out).mean()) < 10


def test_two_paddings_and_padding_of_0_far_below_the_image() -> None:
    image = padded(volume(), -2000, 4)
    image[:, -6:] = -1024
    out = fill(image)
    assert out.min() >= 0
    np.testing.assert_allclose(out[:, 4:-6].numpy(), image[:, 4:-6], rtol=0, atol=DARK)
    assert fill(padded(volume(5000, 5700), 0, 8)).min() >= 5000
    assert fill(padded(volume(0, 740), 2000, 8)).max() <= 740


def test_each_channel_has_its_own_padding() -> None:
    image = np.concatenate([padded(volume(), -1024), volume(0, 3000), padded(volume(), 65535, 2)])
    out = fill(image)
    assert out[0].min() >= 0
    np.testing.assert_array_equal(out[1].numpy(), image[1])
    assert out[2].max() <= 700
    assert out.meta["notes"] == "padding of -1024 and 65535 outside the field of view: taken as background"


ORDINARY = {
    "plain": volume(),
    "black outside the head": padded(volume(200, 900), 0, 8),
    "saturated": np.minimum(volume(0, 5000), 4095),
    "standardized": (padded(volume(0, 900), 0, 8) - 300) / 250,
    "interpolated, with ringing": volume(-40, 700),
    "a few dead voxels": padded(volume(), -1024, 0),
    "a label": np.where(volume() > 600, 255, 0).astype(np.float32),
    "a drawing": np.rint(volume() / 350) * 100 - 300,
    "constant": np.full((1, 4, 4, 4), -1024, np.float32),
}
ORDINARY["a few dead voxels"][0, :2, 0, 0] = -1024


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_images_stay_as_they_are(name: str) -> None:
    image = MetaTensor(torch.from_numpy(ORDINARY[name].astype(np.float32)))
    out = FillPaddingd("image")({"image": image})["image"]
    assert out is image
    assert not out.meta.get("notes")
