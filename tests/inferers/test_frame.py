from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer
from torch import nn

from segbundles.inferers import FrameInferer


class Spy(nn.Module):
    """Keeps what it was given, and gives its first two channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return x[:, :2]


def test_frames_are_normalised_as_for_imagenet() -> None:
    frame = torch.zeros(1, 3, 4, 5, dtype=torch.uint8)
    frame[:, 0] = 255
    spy = Spy()
    FrameInferer(SimpleInferer())(frame, spy)
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]
    torch.testing.assert_close(spy.seen[0, :, 0, 0], torch.tensor(expected))
    FrameInferer(SimpleInferer(), mean=(0, 0, 0), std=(1, 1, 1))(frame, spy)
    assert spy.seen[0, :, 0, 0].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({}, (12, 8)),
        ({"height": 8}, (12, 8)),
        ({"height": 4}, (6, 4)),
        ({"height": 16}, (24, 16)),
        ({"max_pixels": 24}, (6, 4)),
        ({"height": 16, "max_pixels": 96}, (12, 8)),
    ],
)
def test_the_network_sees_one_height_and_logits_are_on_the_frames_grid(settings: dict, seen: tuple) -> None:
    frame = MetaTensor(torch.randint(0, 256, (2, 3, 12, 8), dtype=torch.uint8), meta={"filename_or_obj": "a"})
    spy = Spy()
    logits = FrameInferer(SimpleInferer(), **settings)(frame, spy)
    assert tuple(spy.seen.shape[2:]) == seen
    assert logits.shape == (2, 2, 12, 8)
    assert logits.meta["filename_or_obj"] == "a"


def test_scaling_there_and_back_keeps_a_ramp_and_gradients() -> None:
    ramp = torch.linspace(0, 255, 16)[None, None, :, None].repeat(1, 3, 1, 8).requires_grad_()
    logits = FrameInferer(SimpleInferer(), height=4, mean=(0, 0, 0), std=(1, 1, 1))(ramp, Spy())
    torch.testing.assert_close(logits[:, :1, 2:-2], ramp[:, :1, 2:-2] / 255, rtol=0, atol=0.02)
    logits.sum().backward()
    assert ramp.grad.abs().sum() > 0


@pytest.mark.parametrize("settings", [{}, {"height": 12}, {"max_pixels": 24 * 12}])
def test_black_borders_make_no_difference_inside_the_picture(settings: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(60, 256, (3, 3, 48, 24), dtype=torch.uint8, generator=generator)
    frames = torch.zeros(3, 3, 96, 48, dtype=torch.uint8)
    places = ((20, 10), (30, 4), (20, 10))
    for frame, picture, (x, y) in zip(frames, pictures, places, strict=True):
        frame[:, x : x + 48, y : y + 24] = picture
    seen = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return x[:, :2]

    expected = FrameInferer(SimpleInferer(), **settings)(pictures, network)
    found = FrameInferer(SimpleInferer(), crop_borders=True, **settings)(frames, network)
    assert [shape[0] for shape in seen] == [3, 2, 1]  # equal borders share a batch
    assert {shape[2:] for shape in seen} == {seen[0][2:]}
    outside = torch.ones(96, 48, dtype=torch.bool)
    for logits, wanted, (x, y) in zip(found, expected, places, strict=True):
        torch.testing.assert_close(logits[:, x : x + 48, y : y + 24], wanted)
        rest = outside.clone()
        rest[x : x + 48, y : y + 24] = False
        assert set(logits.argmax(0)[rest].tolist()) == {0}
    plain = FrameInferer(SimpleInferer(), crop_borders=False, **settings)(frames, network)
    assert (plain - found).abs().max() > 1


def test_frames_without_borders_are_computed_in_one_batch() -> None:
    frames = torch.randint(60, 256, (4, 3, 20, 30), dtype=torch.uint8)
    frames[1, :, :3, :3] = 0  # a black corner is no border
    spy = Spy()
    logits = FrameInferer(SimpleInferer(), crop_borders=True)(frames, spy)
    assert spy.seen.shape == (4, 3, 20, 30)
    torch.testing.assert_close(logits, spy.seen[:, :2])


@pytest.mark.parametrize(
    ("settings", "notes"),
    [
        ({"max_pixels": 24}, ["computed at 6 x 4 pixels, as max_pixels is 24"] * 2),
        ({"max_pixels": 96}, None),
        ({"height": 4, "max_pixels": 24}, None),  # that small by the height
        ({"height": 16, "max_pixels": 96}, ["computed at 12 x 8 pixels, as max_pixels is 96"] * 2),
    ],
)
def test_frames_with_too_many_pixels_are_noted(settings: dict, notes: list | None) -> None:
    frame = MetaTensor(torch.randint(99, 256, (2, 3, 12, 8), dtype=torch.uint8), meta={"filename_or_obj": ["a", "b"]})
    logits = FrameInferer(SimpleInferer(), **settings)(frame, Spy())
    assert logits.meta.get("notes") == notes
    assert "notes" not in frame.meta


@pytest.mark.parametrize("name", ["height", "max_pixels"])
def test_sizes_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be 1 or more pixels, or None, got 0"):
        FrameInferer(SimpleInferer(), **{name: 0})
