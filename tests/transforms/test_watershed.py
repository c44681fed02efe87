from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.ndimage import gaussian_filter

from segbundles.metrics import label_cells, v_rand
from segbundles.phantoms.em import make_section
from segbundles.transforms import GreyWatershedd, ProbabilityWatershedd, grey_watershed, probability_watershed


def _two_cells(gap: int = 0) -> np.ndarray:
    """Return a probability (21, 30) with a membrane of three pixels, open by some pixels in the middle."""
    probability = np.full((21, 30), 0.1, np.float32)
    probability[:, 13:16] = 0.9
    probability[10 : 10 + gap, 13:16] = 0.1
    return probability


@pytest.mark.parametrize("scale", [1, 255])
@pytest.mark.parametrize("dark", [True, False])
def test_grey_two_cells_and_their_membrane(scale, dark):
    probability = _two_cells()
    cells = grey_watershed(scale * (1 - probability if dark else probability), dark_membranes=dark)
    assert cells.dtype == np.int32
    assert np.unique(cells[:, :12]).tolist() == [1]
    assert np.unique(cells[:, 17:]).tolist() == [2]
    assert not cells[:, 14].any()


@pytest.mark.parametrize(
    ("settings", "gap", "expected"),
    [
        ({"dilation_iterations": 0}, 1, 1),
        ({"dilation_iterations": 1}, 2, 2),  # a pixel from either side
        ({"dilation_iterations": 1}, 3, 1),
        ({"dilation_iterations": 2}, 3, 2),
        ({"dilation_iterations": 0, "closing_size": 3}, 2, 2),
        ({"dilation_iterations": 0, "closing_size": 3}, 3, 1),
        ({"dilation_iterations": 0, "threshold": 0.05}, 0, 1),  # what is left of the membrane is nothing
    ],
)
def test_grey_gap_in_the_membrane(settings, gap, expected):
    assert grey_watershed(1 - _two_cells(gap), **settings).max() == expected


def test_grey_depth_of_thin_membranes_beside_a_thick_one():
    image = np.ones((30, 40))
    image[:, 10] = 0  # depth 1
    image[:, 20:31] = 0  # depth 6: a fifth is 1.2
    whole = grey_watershed(image, foreground_fraction=0.2, dilation_iterations=1)
    parts = grey_watershed(image, foreground_fraction=0.2, dilation_iterations=1, per_component=True)
    assert whole.max() == parts.max() == 3
    # too shallow beside the thick one, the thin one is only a line between cells
    assert (whole[15] == 0).nonzero()[0][:2].tolist() == [10, 19]
    assert (parts[15] == 0).nonzero()[0][:3].tolist() == [9, 10, 11]


def test_grey_small_cells_go_to_the_membrane_around_them():
    image = np.ones((40, 40))
    image[:, 18:29] = 0
    image[20:25, 21:26] = 1
    assert grey_watershed(image).max() == 3
    cells = grey_watershed(image, min_cell_area=40)
    assert cells.max() == 2
    assert not cells[22, 20:27].any()


@pytest.mark.parametrize(
    ("settings", "gap", "expected"),
    [
        ({}, 0, 2),
        ({}, 3, 1),
        ({"sigma": 0}, 1, 1),
        ({"marker_threshold": 0.05}, 0, 0),
        ({"membrane_threshold": None}, 0, 2),
        ({"min_cell_area": 200}, 0, 2),
        ({"min_cell_area": 300}, 0, 0),
    ],
)
def test_probability_gap_in_the_membrane(settings, gap, expected):
    cells = probability_watershed(_two_cells(gap), **settings)
    assert (cells.dtype, cells.max()) == (np.int32, expected)


def test_probability_membrane_is_wide_or_a_line():
    wide = probability_watershed(_two_cells())
    assert (wide[0] == 0).nonzero()[0].tolist() == [13, 14, 15]
    line = probability_watershed(_two_cells(), membrane_threshold=None)
    assert (line[0] == 0).nonzero()[0].tolist() == [14]


def test_probability_two_minima_of_one_part():
    x = np.linspace(0, 1, 41)
    probability = np.tile(0.1 + 0.1 * np.cos(4 * np.pi * x) ** 2 * (x > 0.25) * (x < 0.75), (12, 1)).astype(np.float32)
    assert probability_watershed(probability, sigma=0, h=None).max() == 1
    ridge = np.where(np.abs(x - 0.5) < 0.1, 0.25, np.abs(x - 0.5) * 0.1)
    ridge = np.tile(ridge, (12, 1)).astype(np.float32)
    assert probability_watershed(ridge, sigma=0).max() == 1
    assert probability_watershed(ridge, sigma=0, h=0.1).max() == 2
    assert probability_watershed(ridge, sigma=0, h=0.3).max() < 2


def test_probability_small_cell_goes_to_its_neighbour():
    probability = _two_cells()
    probability[4:9, 4:9] = 0.4  # an organelle with a hole, no membrane
    probability[6, 6] = 0.1
    assert probability_watershed(probability, sigma=0).max() == 3
    cells = probability_watershed(probability, sigma=0, min_cell_area=30)
    assert cells.max() == 2
    assert (cells[4:9, 4:9] == 1).all()


@pytest.mark.parametrize("seed", range(3))
def test_phantom_cells_are_found(seed):
    image, label = (a[0] for a in make_section(np.random.default_rng(seed), (160, 128)))
    truth = label_cells(label)
    probability = np.clip(gaussian_filter(1.0 - label / 255, 1) * 1.2, 0, 1)
    probability = np.clip(probability + np.random.default_rng(seed).normal(0, 0.1, label.shape), 0, 1)
    assert v_rand(truth, probability_watershed(probability)) > 0.95
    assert v_rand(truth, grey_watershed(1 - probability, dilation_iterations=0)) > 0.95
    assert v_rand(truth, grey_watershed(1 - probability)) > 0.8  # the narrowest cells are dilated away
    assert v_rand(truth, grey_watershed(gaussian_filter(image, 1.5))) > 0.65
    assert v_rand(truth, np.ones_like(truth)) < 0.1


@pytest.mark.parametrize("transform", [GreyWatershedd, ProbabilityWatershedd])
def test_stack_page_by_page_with_metadata(transform):
    pages = torch.from_numpy(np.stack([_two_cells(gap) for gap in (0, 5)], -1))
    stack = MetaTensor(torch.stack([1 - pages, pages]), meta={"filename_or_obj": "a.tif"})
    channel = 0 if transform is GreyWatershedd else 1
    out = transform("prob", cells_keys="cells", mask_keys="prob", channel=channel)({"prob": stack})
    cells, mask = out["cells"], out["prob"]
    assert (tuple(cells.shape), cells.dtype) == ((1, 21, 30, 2), torch.int32)
    assert (tuple(mask.shape), mask.dtype) == ((1, 21, 30, 2), torch.uint8)
    assert cells.meta["filename_or_obj"] == mask.meta["filename_or_obj"] == "a.tif"
    assert cells.amax((0, 1, 2)).tolist() == [2, 1]
    assert torch.equal(mask.as_tensor() > 0, cells.as_tensor() > 0)
    single = transform("prob", channel=channel)({"prob": stack[..., 0]})
    assert torch.equal(single["cells"].as_tensor(), cells[..., 0].as_tensor())
    assert torch.equal(single["prob"].as_tensor(), stack[..., 0].as_tensor())
    assert torch.equal(stack[1].as_tensor(), pages)


def test_same_twice():
    probability = np.random.default_rng(0).random((60, 60))
    for segment in (grey_watershed, probability_watershed):
        np.testing.assert_array_equal(segment(probability), segment(probability.copy()))


def test_labels_have_no_gaps():
    cells = probability_watershed(np.random.default_rng(1).random((80, 80)), sigma=2, marker_threshold=0.5)
    assert np.unique(cells).tolist() == list(range(cells.max() + 1))


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_one_value_throughout(value):
    section = np.full((8, 8), value)
    assert not grey_watershed(section).any()
    assert probability_watershed(section, marker_threshold=0.3).max() == (1 if value < 0.3 else 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GreyWatershedd("a", closing_size=0), r"closing_size must be 1 or more \(pixels\), got 0"),
        (lambda: GreyWatershedd("a", dilation_iterations=-1), "dilation_iterations must be 0 or more .*got -1"),
        (lambda: GreyWatershedd("a", foreground_fraction=20), "foreground_fraction must be between 0 and 1, got 20"),
        (lambda: GreyWatershedd("a", min_cell_area=-5), "min_cell_area must be 0 or more"),
        (lambda: ProbabilityWatershedd("a", sigma=-1), "sigma must be 0 or more"),
        (
            lambda: ProbabilityWatershedd("a", marker_threshold=127),
            "marker_threshold must be between 0 and 1, got 127",
        ),
        (lambda: ProbabilityWatershedd("a", membrane_threshold=-0.1), "membrane_threshold must be between 0 and 1"),
        (lambda: ProbabilityWatershedd("a", h=2), "h must be between 0 and 1, got 2"),
        (lambda: ProbabilityWatershedd("a", cells_keys="b", mask_keys="b"), "every output needs its own key"),
        (lambda: probability_watershed(np.full((3, 3), 3.0)), "must be between 0 and 1, got 3 to 3: apply a sigmoid"),
        (lambda: probability_watershed(np.full((3, 3), np.nan)), "NaN or infinite"),
        (lambda: grey_watershed(np.ones((1, 3, 3))), r"two axes \(W, H\).*got shape \(1, 3, 3\)"),
        (
            lambda: ProbabilityWatershedd("a", channel=2)({"a": torch.zeros(2, 4, 4)}),
            r"shape \(2, 4, 4\) but must be .* with a channel 2\.",
        ),
        (lambda: ProbabilityWatershedd("a")({"a": torch.zeros(4, 4)}), r"a has shape \(4, 4\)"),
    ],
)
def test_bad_settings_and_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
