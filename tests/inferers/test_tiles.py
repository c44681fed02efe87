from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer

from segbundles.inferers import AutocastInferer, TileInferer
from segbundles.networks import ValidUNet


def image(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def pointwise(x):
    """Two logits that depend on each pixel alone: tiles, borders and turns cannot change the probability."""
    return torch.cat([3 * x, 1 - x], 1)


def expected_of(x):
    return torch.softmax(torch.cat([3 * x, 1 - x], 1), 1)


@pytest.mark.parametrize("size", [(64, 64), (50, 20), (7, 90), (1, 1), (33, 47)])
@pytest.mark.parametrize("border", [0, 8, 40])
@pytest.mark.parametrize("views", [{}, {"mirror_axes": (1,)}, {"mirror_axes": (0, 1), "quarter_turns": True}])
def test_any_size_gives_the_probability_of_each_pixel(size, border, views):
    x = image(2, 1, *size)
    inferer = TileInferer((32, 32), 3, border=border, **views)
    torch.testing.assert_close(inferer(x, pointwise), expected_of(x), rtol=0, atol=1e-5)


def test_one_channel_is_a_sigmoid():
    x = image(1, 1, 40, 40)
    torch.testing.assert_close(TileInferer(32)(x, lambda t: t - 0.5), torch.sigmoid(x - 0.5), rtol=0, atol=1e-5)


def test_a_stack_is_its_sections_and_keeps_its_metadata():
    torch.manual_seed(0)
    x = image(1, 1, 40, 24, 3)
    given = MetaTensor(x, meta={"filename_or_obj": "a.tif"})
    net = torch.nn.Conv2d(1, 2, 3, padding=1)
    inferer = TileInferer((32, 32), border=4)
    out = inferer(given, net)
    assert out.shape == (1, 2, 40, 24, 3)
    assert isinstance(out, MetaTensor)
    assert out.meta["filename_or_obj"] == "a.tif"
    for k in range(3):
        torch.testing.assert_close(out[..., k].as_tensor(), inferer(x[..., k], net), rtol=0, atol=1e-5)
    assert not out.requires_grad


def test_tiles_are_those_of_monai_with_probabilities_blended():
    torch.manual_seed(0)
    x = image(1, 1, 70, 64)
    net = torch.nn.Conv2d(1, 2, 5, padding=2)
    net.weight.data *= 10  # or blended logits would give nearly the same
    expected = SlidingWindowInferer((32, 32), 4, 0.5, "gaussian")(x, lambda t: net(t).softmax(1))
    out = TileInferer((32, 32), 4, 0.5)(x, net)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.sum(1), torch.ones(1, 70, 64), rtol=0, atol=1e-5)
    blended_logits = SlidingWindowInferer((32, 32), 4, 0.5, "gaussian")(x, net).softmax(1)
    assert (out - blended_logits).abs().max() > 1e-3


def test_the_border_is_the_mirror_image():
    """A network that looks one pixel to the left sees, left of the image, its first column again."""
    x = torch.arange(16.0).reshape(1, 1, 16, 1).expand(1, 1, 16, 16).contiguous() / 16

    def look_left(t):
        return torch.logit(torch.nn.functional.pad(t, (0, 0, 1, 0))[:, :, :-1].clamp(1e-4, 1 - 1e-4))

    with_border, without = (TileInferer((32, 32), border=b)(x, look_left)[0, 0, :, 0] for b in (4, 0))
    torch.testing.assert_close(with_border[:3], torch.tensor([1e-4, 1e-4, 1 / 16]), rtol=0, atol=1e-5)
    assert without[0] == pytest.approx(1e-4, abs=1e-5)  # outside the tile is the network's own padding
    brighter = TileInferer((16, 16), border=4)(x + 0.25, look_left)[0, 0, :, 0]
    assert brighter[0] == pytest.approx(0.25, abs=1e-3)
    assert TileInferer((16, 16))(x + 0.25, look_left)[0, 0, 0, 0] == pytest.approx(1e-4, abs=1e-5)


def mirrored(x, by):
    return torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (by, by), (by, by)), "symmetric"))


@pytest.mark.parametrize(("size", "border"), [((70, 50), 0), ((70, 50), 8), ((9, 40), 0), ((3, 2), 0)])
@pytest.mark.parametrize("sw_batch_size", [1, 3])
def test_context_is_the_image_itself_and_its_mirror_image_only_outside(size, border, sw_batch_size):
    """A network that gives the pixel 5 to the left and 3 above: of the image, mirrored once at its borders."""
    x = image(2, 1, *size)
    c = 5
    net = lambda t: pointwise(t[:, :, : -2 * c, 2 : 2 - 2 * c])  # noqa: E731
    expected = expected_of(mirrored(x, c)[:, :, : -2 * c, 2 : 2 - 2 * c])
    out = TileInferer((16, 16), sw_batch_size, border=border, context=c)(x, net)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_a_network_without_padding_gives_by_tiles_what_it_gives_for_the_whole_image():
    torch.manual_seed(0)
    net = ValidUNet(channels=(4, 6, 8)).eval()
    x = image(1, 1, 64, 80)
    assert net.margin == 20
    with torch.no_grad():
        expected = net(mirrored(x, 20)).softmax(1)
    out = TileInferer((32, 32), context=20)(x, net)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_context_must_be_what_the_network_loses():
    net = ValidUNet(channels=(4, 6, 8)).eval()
    message = r"the network returns 32 x 32 pixels for tiles of 40 x 40 with 16 of context: set context to 20"
    with pytest.raises(ValueError, match=message):
        TileInferer((40, 40), context=16)(image(1, 1, 64, 64), net)


@pytest.mark.parametrize(
    ("mirror_axes", "quarter_turns", "views"),
    [
        ((), False, [("", 0)]),
        ((0,), False, [("", 0), ("0", 0)]),
        ((0, 1), False, [("", 0), ("", 2), ("0", 0), ("0", 2)]),
        ((), True, [("", 0), ("", 1)]),
        ((1,), True, [("", 0), ("", 1), ("0", 2), ("0", 3)]),
        ((0, 1), True, [(flip, turns) for flip in ("", "0") for turns in range(4)]),
    ],
)
def test_probabilities_are_averaged_over_mirrored_and_turned_images(mirror_axes, quarter_turns, views):
    torch.manual_seed(0)
    net = torch.nn.Conv2d(1, 2, 3, padding=1)
    x = image(1, 1, 32, 32)
    calls = []

    def counted(t):
        calls.append(t)
        return net(t)

    inferer = TileInferer((32, 32), mirror_axes=mirror_axes, quarter_turns=quarter_turns)
    out = inferer(x, counted)
    assert len(calls) == len({tuple(t.flatten().tolist()) for t in calls}) == len(views)
    expected = 0
    for flip, turns in views:
        dims = [2] if flip else []
        view = net(torch.rot90(x.flip(dims), turns, (2, 3))).softmax(1)
        expected = expected + torch.rot90(view, -turns, (2, 3)).flip(dims) / len(views)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    if len(views) == 8:  # then the result turns with the image
        again = inferer(torch.rot90(x, 1, (2, 3)), net)
        torch.testing.assert_close(again, torch.rot90(out, 1, (2, 3)), rtol=0, atol=1e-5)


def test_under_mixed_precision_the_probabilities_are_float32():
    x = image(1, 1, 40, 40)
    out = AutocastInferer(TileInferer(32))(x, torch.nn.Conv2d(1, 2, 1))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.sum(1), torch.ones(1, 40, 40), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"roi_size": (0, 32)}, r"roi_size and sw_batch_size must be positive, got \(0, 32\) and 4"),
        ({"roi_size": 32, "sw_batch_size": 0}, r"got \(32, 32\) and 0"),
        ({"roi_size": 32, "overlap": 1.0}, r"overlap must be a fraction of a tile, 0 or more and below 1, got 1\.0"),
        ({"roi_size": 32, "border": -1}, r"border and context must be 0 or more \(pixels\), got -1 and 0"),
        ({"roi_size": 32, "context": -1}, r"border and context must be 0 or more \(pixels\), got 0 and -1"),
        ({"roi_size": 32, "mirror_axes": [0, 2]}, r"mirror_axes must be axes of a 2D image, 0 and 1, got \[0, 2\]"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        TileInferer(**settings)


def test_other_axes_are_refused():
    with pytest.raises(
        ValueError, match=r"\(B, C, W, H\) or \(B, C, W, H, sections\) is expected, got shape \(1, 32, 32\)"
    ):
        TileInferer(32)(torch.rand(1, 32, 32), pointwise)
