"""The average of a network's weights over the last epochs of a training."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from ignite.engine import Engine
from torch import nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["WeightAverage"]

logger = logging.getLogger("segbundles")


class WeightAverage:
    """Keep an exponential moving average of a network's weights and buffers, updated after every iteration.

    After n iterations the average forgets the fraction ``1 / (epochs * iterations per epoch)`` of what it has, so that
    it reaches back over about that many epochs; near the start it forgets more, (1 + n) / (10 + n) being left at most.
    The averaged network is usually better than the last one, and varies less from epoch to epoch
    (Polyak and Juditsky, SIAM Journal on Control and Optimization 30 (1992) 838).

    Args:
        network: network that is trained, or its DDP wrapper.
        epochs: epochs that the average reaches back over.

    Attributes:
        network: the averaged network; it shares no memory with the trained one.
    """

    def __init__(self, network: nn.Module, epochs: float) -> None:
        self.source = getattr(network, "module", network)
        self.epochs = epochs
        self._decay = 0.0
        self._average = AveragedModel(self.source, multi_avg_fn=self._blend, use_buffers=True)
        self.network: nn.Module = self._average.module

    def begin(self, engine: Engine) -> None:
        """Learn how many iterations an epoch has."""
        self._decay = math.exp(-1 / (self.epochs * engine.state.epoch_length))
        if int(self._average.n_averaged) == 0:  # the trained network may have loaded weights since
            self.network.load_state_dict(self.source.state_dict())

    def after_iteration(self, engine: Engine) -> None:
        """Add the weights of this iteration."""
        self._average.update_parameters(self.source)

    def state_dict(self) -> dict[str, Any]:
        """Return the average."""
        return self._average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the average that :meth:`state_dict` returned."""
        self._average.load_state_dict(state)

    @torch.no_grad()
    def _blend(self, average: Sequence[torch.Tensor], current: Sequence[torch.Tensor], count: torch.Tensor) -> None:
        number = int(count)
        decay = min(self._decay, (1 + number) / (10 + number))
        if average[0].is_floating_point():
            torch._foreach_lerp_(list(average), list(current), 1 - decay)
        else:  # how many batches a batch norm has seen
            torch._foreach_copy_(list(average), list(current))
