from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer
from skimage.metrics import adapted_rand_error

from segbundles.inferers import ScaleInferer, TileInferer
from segbundles.meta import file_name
from segbundles.phantoms.em import make_section
from segbundles.transforms import probability_watershed


class Tanh(torch.nn.Module):
    """Two channels of logits, as a network without context."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.tanh(), -x], 1)


@pytest.mark.parametrize("factor", [None, 1, 1.001])
def test_no_factor_changes_nothing(factor: float | None) -> None:
    image = MetaTensor(torch.rand(2, 1, 20, 30), meta={"filename_or_obj": "a.tif"})
    expected = SimpleInferer()(image, Tanh())
    torch.testing.assert_close(ScaleInferer(SimpleInferer(), factor)(image, Tanh()), expected, rtol=0, atol=0)


def test_the_network_sees_the_scaled_sections() -> None:
    seen = []

    class Network(Tanh):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(x.shape))
            return super().forward(x)

    stack = MetaTensor(torch.rand(1, 1, 20, 30, 3), meta={"filename_or_obj": "a.tif"})
    output = ScaleInferer(SimpleInferer(), 0.5)(stack, Network())
    assert seen == [(1, 1, 10, 15)] * 3
    assert output.shape == (1, 2, 20, 30, 3)
    assert file_name(output) == "a.tif"
    alone = ScaleInferer(SimpleInferer(), 0.5)(stack.as_tensor()[..., 1], Network())
    torch.testing.assert_close(output.as_tensor()[..., 1], alone, rtol=0, atol=0)


def test_constants_and_probabilities_stay_what_they_are() -> None:
    image = torch.full((1, 1, 33, 47), 0.7)
    torch.testing.assert_close(ScaleInferer(SimpleInferer(), 1.7)(image, torch.nn.Identity()), image)
    inferer = ScaleInferer(TileInferer(32), 2.3)
    found = inferer(torch.randn(1, 1, 33, 47) * 50, Tanh())
    assert found.min() >= 0
    assert found.max() <= 1
    torch.testing.assert_close(found.sum(1), torch.ones(1, 33, 47))


def test_sections_of_twice_the_pixel_size_give_the_same_cells() -> None:
    """The network looks for dark pixels in a window of a fixed number of pixels."""
    fine, _ = make_section(np.random.default_rng(0), (256, 256))
    fine = torch.as_tensor(fine[None].astype(np.float32))
    coarse = torch.nn.functional.avg_pool2d(fine, 2)
    blur = torch.nn.Conv2d(1, 1, 5, padding=2, padding_mode="reflect", bias=False)
    torch.nn.init.constant_(blur.weight, 1 / 25)

    def cells(image: torch.Tensor, factor: float | None, sigma: float, area: int) -> np.ndarray:
        inferer = ScaleInferer(TileInferer(128, border=16), factor)
        found = inferer(image, lambda x: (118 - blur(x)) / 6)
        return probability_watershed(found[0, 0], sigma=sigma, marker_threshold=0.2, min_cell_area=area)

    expected = cells(fine, None, 2, 40)
    by_scaling = np.kron(cells(coarse, 2, 1, 10), np.ones((2, 2), int))
    without = np.kron(cells(coarse, None, 1, 10), np.ones((2, 2), int))
    assert len(np.unique(expected)) > 5
    error, error_without = (adapted_rand_error(expected, one)[0] for one in (by_scaling, without))
    assert error < 0.15 < 0.5 < error_without


@pytest.mark.parametrize("factor", [0, -1, float("inf")])
def test_a_factor_that_is_not_positive_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match=f"^factor must be positive, or None, got {factor}.$"):
        ScaleInferer(SimpleInferer(), factor)


def test_other_axes_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^\(B, C, W, H\) or \(B, C, W, H, sections\) is expected, got shape \(2, 3\)"
    ):
        ScaleInferer(SimpleInferer(), 2)(torch.zeros(2, 3), Tanh())
