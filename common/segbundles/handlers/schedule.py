"""Schedules that follow the validation: learning rate and early stopping."""

from __future__ import annotations

import logging

from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping
from monai.engines import Evaluator
from monai.handlers import LrScheduleHandler as _LrScheduleHandler
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, PolynomialLR, ReduceLROnPlateau

from segbundles.errors import fail
from segbundles.handlers.resume import resumable

__all__ = ["EarlyStopHandler", "LrScheduleHandler"]

logger = logging.getLogger("segbundles")


def _validated(engine: Engine, validator: Evaluator) -> bool:
    """Whether this epoch was validated."""
    return validator.state.epoch == engine.state.epoch and bool(validator.state.metrics)


def _score(validator: Evaluator) -> float:
    return float(validator.state.metrics[validator.state.key_metric_name])


class LrScheduleHandler(_LrScheduleHandler):
    """MONAI's handler of the same name that takes a plateau schedule as well.

    A ``ReduceLROnPlateau`` is stepped with the validator's key metric after each validation, so that its patience
    counts validations; any other schedule once an epoch, or once an iteration.

    Args:
        lr_scheduler: a schedule of torch.
        validator: evaluator that a plateau schedule watches.
        epoch_level: step an epoch, else an iteration.

    Raises:
        ValueError: when a plateau schedule has no validator, or the wrong ``mode`` for its key metric; when the run
            starts and the schedule ends before it.
    """

    def __init__(self, lr_scheduler: LRScheduler, validator: Evaluator | None = None, epoch_level: bool = True) -> None:
        """See the class."""
        plateau = isinstance(lr_scheduler, ReduceLROnPlateau)
        if plateau and validator is None:
            raise ValueError("a ReduceLROnPlateau needs validator: the evaluator whose key metric it watches.")
        if plateau and (lr_scheduler.mode == "max") != bool(validator.metric_cmp_fn(1.0, 0.0)):
            raise ValueError(
                f"the ReduceLROnPlateau has mode {lr_scheduler.mode!r}, which takes a better key metric for a worse "
                f"one: set its mode to {'min' if lr_scheduler.mode == 'max' else 'max'!r}."
            )
        super().__init__(lr_scheduler, print_lr=False, epoch_level=epoch_level or plateau)
        self.validator = validator

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, behind its ``ValidationHandler``."""
        super().attach(engine)
        engine.add_event_handler(Events.STARTED, self.check_length)

    def check_length(self, engine: Engine) -> None:
        """Compare the length of a schedule that has an end, polynomial or one-cycle, with that of the run."""
        steps = engine.state.max_epochs * (1 if self.epoch_level else engine.state.epoch_length)
        if isinstance(self.lr_scheduler, OneCycleLR):
            length = self.lr_scheduler.total_steps
            end = f"the one-cycle schedule ends after {length} steps, this run takes {steps}"
        elif isinstance(self.lr_scheduler, PolynomialLR):
            length = self.lr_scheduler.total_iters
            end = f"the learning rate comes down to 0 after {length} "
            end += f"epochs, max_epochs is {steps}" if self.epoch_level else f"iterations, this run takes {steps}"
        else:
            return
        if length < steps:
            made = "" if self.epoch_level else ", with a schedule made for iterations (lr_every_iteration)"
            fail(f"{end}: set lr_epochs to max_epochs or more{made}.")
        if length > steps and self.epoch_level and isinstance(self.lr_scheduler, PolynomialLR):
            logger.info(
                f"The learning rate is made to fall over {length} epochs (lr_epochs), this run ends at {steps}: "
                "set both alike unless you mean to resume it."
            )

    def __call__(self, engine: Engine) -> None:
        """Step the schedule."""
        if not isinstance(self.lr_scheduler, ReduceLROnPlateau):
            self.lr_scheduler.step()
        elif _validated(engine, self.validator):
            self.lr_scheduler.step(_score(self.validator))


class EarlyStopHandler:
    """Stop a trainer after so many validations without a better key metric; a resumed run goes on counting.

    Args:
        patience: validations to wait; None never stops.
        validator: evaluator whose key metric (greater is better) is watched.
        min_delta: least increase that counts.
    """

    def __init__(self, patience: int | None, validator: Evaluator, min_delta: float = 0.0) -> None:
        """See the class."""
        self.patience = patience
        self.validator = validator
        self.min_delta = min_delta
        self._stopping: EarlyStopping | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, behind its ``ValidationHandler``."""
        if self.patience is None:
            return
        self._stopping = EarlyStopping(
            self.patience, lambda _: _score(self.validator), engine, min_delta=self.min_delta
        )
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def start(self, engine: Engine) -> None:
        """Take up the count of a stopped run, and stop at once where that run had."""
        if "early_stop" in resumable(engine):
            self._stopping.load_state_dict(resumable(engine)["early_stop"])
            if self._stopping.counter >= self.patience:
                logger.warning(f"{self._stopping.counter} validations brought nothing better: nothing to resume.")
                engine.terminate()

    def __call__(self, engine: Engine) -> None:
        """Count."""
        if _validated(engine, self.validator):
            self._stopping(self.validator)
            resumable(engine)["early_stop"] = dict(self._stopping.state_dict())
