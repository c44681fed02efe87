"""What a training logs about itself: one line per epoch, with the loss and its terms."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from ignite.engine import Engine

from segbundles.distributed import gather, process_rank

__all__ = ["EpochLog", "LossTerms"]

logger = logging.getLogger("segbundles")


class LossTerms:
    """Return a trainer's loss, and the terms of a :class:`segbundles.losses.HybridLoss`, each by its own name.

    Use it as ``output_transform`` of MONAI's ``StatsHandler`` and ``TensorBoardStatsHandler``.

    Args:
        loss: the trainer's loss function; one without ``terms`` gives the loss alone.
    """

    def __init__(self, loss: Callable) -> None:
        self.loss = loss

    def __call__(self, output: list[dict[str, Any]]) -> dict[str, float]:
        """Return the values of the iteration that was just completed."""
        terms = {name: float(value) for name, value in getattr(self.loss, "terms", {}).items()}
        # a term is NaN if it was not computed; a loss that is NaN must be seen
        return {"train_loss": float(output[0]["loss"])} | {k: v for k, v in terms.items() if not math.isnan(v)}


class EpochLog:
    """Log one line per epoch: mean loss and its terms, validation, learning rate, time taken and time left.

    With several processes the means are over all of them, and the first one logs.

    Args:
        terms: returns the values of an iteration by name.
        validator: evaluator whose metrics are shown.
        optimizer: optimizer whose learning rate is shown.
    """

    def __init__(
        self,
        terms: Callable[[Any], dict[str, float]],
        validator: Engine | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.terms = terms
        self.validator = validator
        self.optimizer = optimizer
        self._sums: dict[str, float] = {}
        self._count = 0
        self._since = self._epoch_since = time.perf_counter()
        self._first = 0

    def begin(self, engine: Engine) -> None:
        """Start to measure time."""
        self._since, self._first = time.perf_counter(), engine.state.epoch

    def begin_epoch(self, engine: Engine) -> None:
        """Start an epoch."""
        self._epoch_since = time.perf_counter()
        self._sums, self._count = {}, 0

    def after_iteration(self, engine: Engine) -> None:
        """Add the values of an iteration."""
        self._count += 1
        for name, value in self.terms(engine.state.output).items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def after_epoch(self, engine: Engine) -> None:
        """Log the line."""
        shares = gather((self._sums, self._count))
        if process_rank() > 0:
            return
        count = sum(number for _, number in shares)
        names = dict.fromkeys(name for sums, _ in shares for name in sums)
        epoch, epochs = engine.state.epoch, engine.state.max_epochs
        parts = [f"epoch {epoch}/{epochs}"]
        parts += [f"{name} {sum(sums.get(name, 0.0) for sums, _ in shares) / count:.4f}" for name in names]
        if self.validator is not None and self.validator.state.epoch == epoch:
            state = self.validator.state
            parts += [f"{name} {value:.4f}" for name, value in state.metrics.items()]
            parts.append(f"best {state.best_metric:.4f} (epoch {state.best_metric_epoch})")
        if self.optimizer is not None:
            parts.append(f"learning rate {self.optimizer.param_groups[0]['lr']:.2e}")
        now = time.perf_counter()
        left = (now - self._since) / (epoch - self._first) * (epochs - epoch)
        parts.append(f"{now - self._epoch_since:.1f} s, {_duration(left)} left")
        logger.info(", ".join(parts))


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
