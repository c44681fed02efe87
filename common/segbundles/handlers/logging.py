"""What a run shows of itself: the terms of its loss, and a picture of its predictions."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.config import PathLike
from torch import nn

from segbundles.distributed import gather, process_rank

__all__ = ["EpochLog", "LossTerms", "OverlayImageHandler", "TensorBoardWriter"]

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger("segbundles")


class LossTerms:
    """Give a trainer's loss, and the terms of a :class:`segbundles.losses.HybridLoss`, each by its own name.

    To be the ``output_transform`` of MONAI's ``StatsHandler`` and ``TensorBoardStatsHandler``.

    Args:
        loss: the trainer's loss function; one without ``terms`` gives the loss alone.
    """

    def __init__(self, loss: nn.Module) -> None:
        """See the class."""
        self.loss = loss

    def __call__(self, output: list[dict[str, Any]]) -> dict[str, float]:
        """Values of the iteration just completed."""
        terms = {name: float(value) for name, value in getattr(self.loss, "terms", {}).items()}
        # a term is NaN when it was not computed; a loss that is NaN must be seen
        return {"train_loss": float(output[0]["loss"])} | {k: v for k, v in terms.items() if not math.isnan(v)}


class EpochLog:
    """Log one line an epoch: mean loss and its terms, validation, learning rate, time taken and time left.

    Where a process group stands, the means are over all processes, and the first one logs.

    Args:
        terms: gives the values of an iteration by name.
        validator: evaluator run in between, whose metrics are shown.
        optimizer: whose learning rate is shown.
    """

    def __init__(
        self, terms: LossTerms, validator: Engine | None = None, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """See the class."""
        self.terms = terms
        self.validator = validator
        self.optimizer = optimizer
        self._sums: dict[str, float] = {}
        self._count = 0
        self._since = self._epoch_since = time.perf_counter()
        self._first = 0

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, behind its ``ValidationHandler``."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_STARTED, self.start_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Begin to measure time."""
        self._since, self._first = time.perf_counter(), engine.state.epoch

    def start_epoch(self, engine: Engine) -> None:
        """Begin an epoch."""
        self._epoch_since = time.perf_counter()
        self._sums, self._count = {}, 0

    def add(self, engine: Engine) -> None:
        """Add an iteration."""
        self._count += 1
        for name, value in self.terms(engine.state.output).items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def write(self, engine: Engine) -> None:
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


class TensorBoardWriter:
    """A ``SummaryWriter`` that makes its folder and file at the first thing written, and only in the first process.

    Torch's makes them at once, so that merely looking at a bundle would write into it. When the file cannot be written,
    on a full disk say, that is logged, and the run goes on without curves.

    Args:
        log_dir: folder of the event file.
    """

    def __init__(self, log_dir: PathLike) -> None:
        """See the class."""
        self.log_dir = str(log_dir)
        self._writer: SummaryWriter | None = None
        self._failed = False

    def _do(self, name: str, *args: Any, **kwargs: Any) -> None:
        if idist.get_rank() > 0 or self._failed:
            return
        try:
            getattr(self._open(), name)(*args, **kwargs)
        except OSError as error:
            self._failed, self._writer = True, None
            logger.warning(
                f"curves cannot be written to {self.log_dir} ({error.strerror or error}): there are no more."
            )

    def _open(self) -> SummaryWriter:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self.log_dir)
        return self._writer

    def add_scalar(self, *args: Any, **kwargs: Any) -> None:
        """As torch's."""
        self._do("add_scalar", *args, **kwargs)

    def add_image(self, *args: Any, **kwargs: Any) -> None:
        """As torch's."""
        self._do("add_image", *args, **kwargs)

    def flush(self) -> None:
        """As torch's."""
        if self._writer is not None:
            self._do("flush")

    def close(self) -> None:
        """As torch's."""
        if self._writer is not None:
            self._do("close")


class OverlayImageHandler:
    """Show the prediction outlined over the truth in TensorBoard, for the first case of each validation.

    Args:
        summary_writer: where pictures go, a :class:`TensorBoardWriter` or torch's ``SummaryWriter``.
        max_cases: cases shown a validation.
        image_key: image in the engine's batch.
        label_key: class map of the truth in the engine's output.
        pred_key: class map of the prediction in the engine's output.
    """

    def __init__(
        self,
        summary_writer: Any,
        max_cases: int = 1,
        image_key: str = "image",
        label_key: str = "label",
        pred_key: str = "pred",
    ) -> None:
        """See the class."""
        self.summary_writer = summary_writer
        self.max_cases = max_cases
        self.image_key, self.label_key, self.pred_key = image_key, label_key, pred_key
        self._shown = 0

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose batches and outputs are decollated."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)

    def start(self, engine: Engine) -> None:
        """Begin a validation."""
        self._shown = 0

    def add(self, engine: Engine) -> None:
        """Show the cases of a batch."""
        for batch, output in zip(engine.state.batch, engine.state.output, strict=True):
            if self._shown == self.max_cases:
                return
            picture = self.picture(batch[self.image_key], output[self.label_key], output[self.pred_key])
            tag = f"validation/case_{self._shown}"
            self.summary_writer.add_image(tag, picture, engine.state.epoch, dataformats="HWC")
            self.summary_writer.flush()
            self._shown += 1

    @staticmethod
    def picture(image: torch.Tensor, truth: torch.Tensor, pred: torch.Tensor) -> np.ndarray:
        """RGB picture (H, W, 3), uint8, of the slice with the largest truth."""
        from segbundles.report import overlay_rgb

        grey, true, guess = (np.asarray(t.detach().cpu()) for t in (image, truth[0], pred[0]))
        if true.ndim == 3:
            k = int(((true > 0) if true.any() else (guess > 0)).sum((0, 1)).argmax())
            grey, true, guess = grey[..., k], true[..., k], guess[..., k]
        grey = grey[0].T if grey.shape[0] != 3 else grey.transpose(2, 1, 0)
        return overlay_rgb(grey, true.T, guess.T)
