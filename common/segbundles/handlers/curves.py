"""What a training shows in TensorBoard: curves, and a picture of its predictions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.config import PathLike
from monai.engines import Evaluator, IterationEvents
from monai.handlers import TensorBoardStatsHandler
from monai.utils import CommonKeys, convert_to_tensor
from torch.optim import Optimizer

from segbundles.distributed import gather, process_rank
from segbundles.handlers.epoch_log import LossTerms
from segbundles.handlers.state import resumable

__all__ = ["Curves", "OverlayImageHandler", "TensorBoardWriter", "ValidationLoss"]

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger("segbundles")


class TensorBoardWriter:
    """A ``SummaryWriter`` that creates its folder and file when it first writes, and only in the first process.

    Torch's creates them at once, so that merely looking at a bundle would write into it. If the file cannot be written
    (because the disk is full, for example), this is logged, and the run continues without curves.

    Args:
        log_dir: folder of the event file.

    Attributes:
        purge_step: step from which on TensorBoard hides what earlier files of the folder contain.
    """

    def __init__(self, log_dir: PathLike) -> None:
        self.log_dir = str(log_dir)
        self.purge_step: int | None = None
        self._writer: SummaryWriter | None = None
        self._failed = False

    def _do(self, name: str, *args: Any, **kwargs: Any) -> None:
        if process_rank() > 0 or self._failed:
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

            self._writer = SummaryWriter(self.log_dir, purge_step=self.purge_step)
        return self._writer

    def add_scalar(self, *args: Any, **kwargs: Any) -> None:
        """Add a point of a curve; the arguments are those of torch's method."""
        self._do("add_scalar", *args, **kwargs)

    def add_image(self, *args: Any, **kwargs: Any) -> None:
        """Add a picture; the arguments are those of torch's method."""
        self._do("add_image", *args, **kwargs)

    def flush(self) -> None:
        """Write to the file what was added."""
        if self._writer is not None:
            self._do("flush")

    def close(self) -> None:
        """Close the file; what is added later opens a new one."""
        if self._writer is not None:
            self._do("close")
            self._writer = None


class OverlayImageHandler:
    """Show the prediction outlined over the truth in TensorBoard, for the first case of each validation.

    Args:
        summary_writer: where pictures are written, a :class:`TensorBoardWriter` or torch's ``SummaryWriter``.
        max_cases: number of cases shown per validation.
    """

    def __init__(self, summary_writer: Any, max_cases: int = 1) -> None:
        self.summary_writer = summary_writer
        self.max_cases = max_cases
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
            picture = self.picture(batch[CommonKeys.IMAGE], output[CommonKeys.LABEL], output[CommonKeys.PRED])
            tag = f"validation/case_{self._shown}"
            self.summary_writer.add_image(tag, picture, engine.state.epoch, dataformats="HWC")
            self.summary_writer.flush()
            self._shown += 1

    @staticmethod
    def picture(image: torch.Tensor, truth: torch.Tensor, pred: torch.Tensor) -> np.ndarray:
        """Return an RGB picture (H, W, 3), uint8, of the slice with the largest truth.

        Args:
            image: image, (C, W, H) or (C, W, H, D).
            truth: class map of the truth, (1, W, H) or (1, W, H, D).
            pred: class map of the prediction, like ``truth``.
        """
        from segbundles.report import overlay_rgb

        grey, true, guess = (np.asarray(t.detach().cpu()) for t in (image, truth[0], pred[0]))
        if true.ndim == 3:
            k = int(((true > 0) if true.any() else (guess > 0)).sum((0, 1)).argmax())
            grey, true, guess = grey[..., k], true[..., k], guess[..., k]
        grey = grey[0].T if grey.shape[0] != 3 else grey.transpose(2, 1, 0)
        return overlay_rgb(grey, true.T, guess.T)


class ValidationLoss:
    """Write the mean loss of each validation, ``val_loss``, over the cases of all processes.

    A loss that does not accept the logits and the label of a validation is reported once, and there is no curve.

    Args:
        loss: function of the logits and the label, both float32 and with a batch axis.
        writer: where the curve is written.
    """

    def __init__(self, loss: Callable[[torch.Tensor, torch.Tensor], Any], writer: TensorBoardWriter) -> None:
        self.loss = loss
        self.writer = writer
        self._failed = False
        self._sum, self._count = 0.0, 0

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self.add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Begin a validation."""
        self._sum, self._count = 0.0, 0

    @torch.no_grad()
    def add(self, engine: Engine) -> None:
        """Add the loss of a batch."""
        if self._failed:
            return
        try:
            keys = (CommonKeys.PRED, CommonKeys.LABEL)
            pred, label = (convert_to_tensor(engine.state.output[key], track_meta=False).float() for key in keys)
            value = float(self.loss(pred, label))
        except Exception as error:  # a curve is no reason to end a run
            self._failed, self._count = True, 0
            logger.warning(f"There is no curve of the validation loss: {type(error).__name__}: {error}")
        else:
            self._sum += value * len(pred)
            self._count += len(pred)

    def write(self, engine: Engine) -> None:
        """Write the mean."""
        shares = gather((self._sum, self._count))
        if shares and all(count for _, count in shares):
            mean = sum(total for total, _ in shares) / sum(count for _, count in shares)
            self.writer.add_scalar("val_loss", mean, engine.state.epoch)


class Curves:
    """Write the curves of a training: the loss with its terms, the learning rate, and the validation's.

    Each training has its own folder, ``<name>_<run_name>``; if there is one already, a number is appended. A resumed
    training continues in the folder in which it began.

    Args:
        folder: where the folder of this training is created.
        name: start of that folder's name.
        run_name: end of that folder's name; None takes the date and time.
        loss: the trainer's loss function.
        optimizer: optimizer whose learning rate is shown.
        validation_loss: see :class:`ValidationLoss`; None leaves that curve out.
        resume: use a folder that is there already, even if the run was stopped before it had a state.
    """

    def __init__(
        self,
        folder: PathLike,
        name: str,
        run_name: str | None,
        loss: Callable,
        optimizer: Optimizer,
        validation_loss: Callable | None,
        resume: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.name, self.run_name = name, run_name
        self.terms = LossTerms(loss)
        self.optimizer = optimizer
        self.writer = TensorBoardWriter(folder)
        self.validation_loss = validation_loss
        self.resume = resume
        training = TensorBoardStatsHandler(self.writer, output_transform=self.values)
        self.after_iteration, self.after_epoch = training.iteration_completed, training.epoch_completed

    def attach(self, validator: Evaluator) -> None:
        """Attach what shows a validation to its evaluator."""
        TensorBoardStatsHandler(self.writer, iteration_log=False).attach(validator)
        OverlayImageHandler(self.writer).attach(validator)
        if self.validation_loss is not None:
            ValidationLoss(self.validation_loss, self.writer).attach(validator)

    def values(self, output: Any) -> dict[str, float]:
        """Return the values of the iteration that was just completed."""
        return self.terms(output) | {"learning_rate": float(self.optimizer.param_groups[0]["lr"])}

    def begin(self, engine: Engine) -> None:
        """Choose the folder."""
        kept = resumable(engine)
        if "curves" not in kept:
            new = f"{self.name}_{self.run_name or format(datetime.now(), '%Y-%m-%d_%H-%M-%S')}"
            names = chain([new], (f"{new}_{number}" for number in count(2)))
            kept["curves"] = next(name for name in names if self.resume or not (self.folder / name).exists())
        self.writer.log_dir = str(self.folder / kept["curves"])
        self.writer.purge_step = engine.state.iteration + 1 if engine.state.iteration or self.resume else None

    def end(self, engine: Engine) -> None:
        """Close the file."""
        self.writer.close()
