"""Exchanging colours between frames."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from skimage.color import rgb2lab

from segbundles.transforms import RandColourExchanged


def frame(low, high, size=(12, 10)):
    values = np.random.default_rng(low).integers(low, high, (3, *size))
    return torch.from_numpy(values.astype(np.float32))


def statistics(image):
    lab = rgb2lab(np.moveaxis(np.asarray(image), 0, -1) / 255)
    return lab.mean((0, 1)), lab.std((0, 1))


def exchanged(image, other, prob=1.0):
    transform = RandColourExchanged("image", [{"image": other}], load=dict, prob=prob)
    return transform.set_random_state(0)({"image": image})["image"]


def test_the_statistics_are_those_of_the_other_frame():
    out = exchanged(frame(80, 120), frame(150, 190, size=(7, 20)))
    for found, expected in zip(statistics(out), statistics(frame(150, 190, size=(7, 20))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.05)


def test_a_frame_keeps_its_own_colours_and_metadata():
    image = MetaTensor(frame(50, 200), meta={"filename_or_obj": "a.png"})
    out = exchanged(image, image)
    torch.testing.assert_close(out.as_tensor(), image.as_tensor(), rtol=0, atol=0.1)
    assert out.meta["filename_or_obj"] == "a.png"


@pytest.mark.parametrize("constant", ["frame", "other"])
def test_frames_of_one_colour(constant):
    grey = torch.full((3, 4, 4), 90.0)
    out = exchanged(grey, frame(100, 140)) if constant == "frame" else exchanged(frame(100, 140), grey)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, out[:, :1, :1].expand_as(out), rtol=0, atol=1e-3)


def test_cases_are_read_once_and_drawn_with_the_seed():
    read = []

    def load(case):
        read.append(case["name"])
        return case

    cases = [{"name": name, "image": frame(low, low + 30)} for name, low in (("a", 20), ("b", 120), ("c", 200))]
    transform = RandColourExchanged("image", cases, load, prob=0.5)
    runs = []
    for _ in range(2):
        transform.set_random_state(3)
        runs.append([transform(cases[0])["image"] for _ in range(20)])
    assert sorted(read) == ["a", "b", "c"]
    assert 3 <= sum(torch.equal(out, cases[0]["image"]) for out in runs[0]) <= 17
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
