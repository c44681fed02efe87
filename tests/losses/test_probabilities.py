from __future__ import annotations

import math

import pytest
import torch
from monai.losses import DiceCELoss

from segbundles.losses import FromProbabilities


def test_equals_the_loss_of_the_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 5, generator=generator)
    label = torch.randint(0, 3, (2, 1, 6, 5), generator=generator)
    loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
    torch.testing.assert_close(FromProbabilities(loss)(logits.softmax(1), label), loss(logits, label))


@pytest.mark.parametrize(("arguments", "smallest"), [({}, 1e-7), ({"smallest": 1e-3}, 1e-3)])
def test_a_probability_of_zero_is_finite(arguments: dict, smallest: float) -> None:
    """Cross-entropy of a pixel that is surely class 0 and labelled 1."""
    probabilities = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
    loss = FromProbabilities(torch.nn.CrossEntropyLoss(), **arguments)
    expected = math.log(1 + smallest) - math.log(smallest)
    assert loss(probabilities, torch.ones(1, 1, 1, dtype=torch.long)).item() == pytest.approx(expected, rel=1e-6)
