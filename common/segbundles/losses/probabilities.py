"""A loss of logits, computed from probabilities."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.modules.loss import _Loss

__all__ = ["FromProbabilities"]


class FromProbabilities(_Loss):
    """Compute a loss that expects logits from the probabilities of a softmax.

    The logarithm of the probabilities serves as logits: its softmax is the probabilities again. Use it where an inferer
    returns probabilities, such as :class:`segbundles.inferers.TileInferer`.

    Args:
        loss: loss of logits (B, C, spatial) and a target, which applies softmax itself.
        smallest: probabilities below this count as this, so that the logarithm is finite.
    """

    def __init__(self, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], smallest: float = 1e-7) -> None:
        super().__init__()
        self.loss, self.smallest = loss, smallest

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the loss.

        Args:
            input: probabilities (B, C, spatial), which sum to 1 over the classes.
            target: passed on to the loss.
        """
        return self.loss(input.clamp(min=self.smallest).log(), target)
