from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.stats import entropy

from segbundles.transforms import Uncertaintyd, uncertainty, uncertainty_levels


def test_by_hand() -> None:
    two = torch.tensor([[0.5, 0.9, 0.0, 1.0], [0.5, 0.1, 1.0, 0.0]])
    # -(.9 log2 .9 + .1 log2 .1) = .468996
    torch.testing.assert_close(uncertainty(two), torch.tensor([[1.0, 0.468996, 0.0, 0.0]]))
    three = torch.tensor([[1 / 3, 0.5, 1.0], [1 / 3, 0.5, 0.0], [1 / 3, 0.0, 0.0]])
    torch.testing.assert_close(uncertainty(three), torch.tensor([[1.0, math.log(2) / math.log(3), 0.0]]))
    with pytest.raises(ValueError, match=r"^the uncertainty of one class is not defined: give the probability"):
        uncertainty(two[:1])


@pytest.mark.parametrize("classes", [2, 4])
def test_values_and_levels_are_those_of_scipy(classes: int) -> None:
    probabilities = np.random.default_rng(0).dirichlet([0.3] * classes, size=(20, 30, 4))
    expected = entropy(probabilities, axis=-1) / np.log(classes)
    given = torch.from_numpy(probabilities).movedim(-1, 0).float()
    np.testing.assert_allclose(uncertainty(given)[0], expected, atol=3e-5)
    levels = uncertainty_levels(given)
    assert levels.dtype == torch.uint8
    np.testing.assert_array_equal(levels, (expected > 0.5).astype(int) + (expected > 0.9))
    assert set(levels.unique().tolist()) == {0, 1, 2}


def test_metadata_is_kept() -> None:
    prob = MetaTensor(torch.full((2, 3, 3), 0.5), meta={"filename_or_obj": "a.png"})
    found = Uncertaintyd()({"prob": prob})["uncertainty"]
    assert (found.shape, found.meta["filename_or_obj"]) == ((1, 3, 3), "a.png")
