"""What follows the validations and epochs of a training: the learning rate, and when to stop early."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from ignite.engine import Engine
from ignite.handlers import EarlyStopping
from monai.engines import Evaluator
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR, PolynomialLR, ReduceLROnPlateau

from segbundles.errors import fail
from segbundles.handlers.state import resumable

__all__ = ["EarlyStop", "LearningRate"]

logger = logging.getLogger("segbundles")

# entries of an optimizer's parameter groups that a schedule may set
_SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "momentum", "betas", "max_momentum", "base_momentum")

# schedules that have an end: the attribute with their length, and what happens after it
_LENGTHS = {
    PolynomialLR: ("total_iters", "the learning rate reaches 0"),
    OneCycleLR: ("total_steps", "the one-cycle schedule ends"),
    CosineAnnealingLR: ("T_max", "the learning rate rises again"),
}


def _validated(engine: Engine, validator: Evaluator) -> bool:
    """Return whether this epoch was validated."""
    return validator.state.epoch == engine.state.epoch and bool(validator.state.metrics)


def _score(validator: Evaluator) -> float:
    return float(validator.state.metrics[validator.state.key_metric_name])


class LearningRate:
    """Step a schedule: after each epoch or each iteration, a plateau schedule after each validation.

    When a run is resumed, the schedule is as long as it is configured now, and continues at the step the run has
    reached. A run of 60 epochs that is extended to 80 thus continues on the curve of 80 epochs. A schedule that was
    not changed continues bit for bit.

    Every schedule of torch that is defined by numbers can be extended in this way, and so can a ``SequentialLR`` or
    ``ChainedScheduler`` of such schedules. A plateau schedule takes its new arguments and keeps its count. A schedule
    that is defined by functions, such as a ``LambdaLR``, goes on with the functions it has now.

    Args:
        lr_scheduler: a schedule of torch; None keeps the learning rate.
        optimizer: the optimizer of the schedule.
        validator: evaluator whose key metric a plateau schedule watches.
        every_iteration: step after each iteration instead of each epoch.

    Raises:
        ValueError: when a plateau schedule has the wrong ``mode`` for the key metric.
    """

    def __init__(
        self,
        lr_scheduler: LRScheduler | None,
        optimizer: Optimizer,
        validator: Evaluator,
        every_iteration: bool = False,
    ) -> None:
        self.lr_scheduler = lr_scheduler
        self.optimizer = optimizer
        self.validator = validator
        self.plateau = isinstance(lr_scheduler, ReduceLROnPlateau)
        self.every_iteration = every_iteration and not self.plateau
        # the groups at step 0, from which a changed schedule is repeated
        self._first = [
            {k: deepcopy(v) for k, v in group.items() if k in _SCHEDULED} for group in optimizer.param_groups
        ]
        if self.plateau and (lr_scheduler.mode == "max") != bool(validator.metric_cmp_fn(1.0, 0.0)):
            fail(
                f"the ReduceLROnPlateau has mode {lr_scheduler.mode!r}, which takes a better key metric for a worse "
                f"one: set its mode to {'min' if lr_scheduler.mode == 'max' else 'max'!r}."
            )

    def check_length(self, engine: Engine) -> None:
        """Compare the length of the schedule with that of the run.

        Raises:
            ValueError: when a polynomial or one-cycle schedule ends before the run.
        """
        name, end = _LENGTHS.get(type(self.lr_scheduler), ("", ""))
        if not name:
            return
        length, epochs = getattr(self.lr_scheduler, name), engine.state.max_epochs
        steps, unit = (epochs * engine.state.epoch_length, "steps") if self.every_iteration else (epochs, "epochs")
        if length < steps:
            message = f"{end} after {length} {unit}, this run takes {steps}: set lr_epochs to {epochs}, like max_epochs"
            if isinstance(self.lr_scheduler, CosineAnnealingLR):
                logger.warning(f"{message}.")
            else:
                fail(f"{message}.")
        elif length > steps and not self.every_iteration and isinstance(self.lr_scheduler, PolynomialLR):
            logger.info(
                f"The learning rate falls over {length} epochs (lr_epochs), this run ends after {steps}: "
                "set both to the same number unless you want to resume it."
            )

    def after_iteration(self, engine: Engine) -> None:
        """Step a schedule that counts iterations."""
        if self.every_iteration:
            self.lr_scheduler.step()

    def after_epoch(self, engine: Engine) -> None:
        """Step a schedule that counts epochs or validations."""
        if self.plateau:
            if _validated(engine, self.validator):
                self.lr_scheduler.step(_score(self.validator))
        elif self.lr_scheduler is not None and not self.every_iteration:
            self.lr_scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the schedule."""
        return {} if self.lr_scheduler is None else self.lr_scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the schedule stopped, with the arguments it has now. The optimizer must be loaded before.

        Args:
            state: what :meth:`state_dict` returned.
        """
        schedule = self.lr_scheduler
        if schedule is None:
            return
        arguments, changed = _arguments(schedule), _changed(schedule, state)
        if self.plateau or not changed:
            schedule.load_state_dict(state)
            vars(schedule).update(arguments)
            return
        for group, first in zip(self.optimizer.param_groups, self._first, strict=True):
            group.update(deepcopy(first))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that no optimizer step comes in between
            for _ in range(_steps(state)):
                schedule.step()
        rate = float(self.optimizer.param_groups[0]["lr"])
        logger.info(f"The learning rate schedule was changed: it continues on the new one, at {rate:.2e}.")


def _steps(state: Mapping[str, Any]) -> int:
    """Return the number of steps of a saved schedule; a chained one keeps it only in its parts."""
    return state["last_epoch"] if "last_epoch" in state else _steps(state["_schedulers"][0])


def _arguments(schedule: LRScheduler) -> dict[str, Any]:
    """Return the attributes that a schedule was constructed with, and which no step changes."""
    names = {*inspect.signature(type(schedule)).parameters, "_schedule_phases", "_milestones"} - {"last_epoch"}
    return {name: value for name, value in vars(schedule).items() if name in names and name != "optimizer"}


def _changed(schedule: LRScheduler, state: Mapping[str, Any]) -> bool:
    """Return whether a schedule, or one of those it is made of, was saved with other arguments."""
    parts = zip(getattr(schedule, "_schedulers", ()), state.get("_schedulers", ()), strict=True)
    return any(state[name] != value for name, value in _arguments(schedule).items()) or any(
        _changed(part, saved) for part, saved in parts
    )


class EarlyStop:
    """Stop a trainer after a number of validations without a better key metric; a resumed run continues to count.

    Args:
        patience: number of validations to wait; None never stops.
        validator: evaluator whose key metric (greater is better) is watched.
        engine: trainer to stop.
        min_delta: smallest increase that counts as better.
    """

    def __init__(self, patience: int | None, validator: Evaluator, engine: Engine, min_delta: float = 0.0) -> None:
        self.validator = validator
        self._stopping = None if patience is None else EarlyStopping(patience, _score, engine, min_delta)

    def begin(self, engine: Engine) -> None:
        """Continue the count of a resumed run, and stop at once if that run had stopped."""
        if self._stopping is not None and "early_stop" in resumable(engine):
            self._stopping.load_state_dict(resumable(engine)["early_stop"])
            if self._stopping.counter >= self._stopping.patience:
                logger.warning(
                    f"{self._stopping.counter} validations in a row were no better: nothing to resume. "
                    "Increase early_stop_patience to continue."
                )
                engine.terminate()

    def after_epoch(self, engine: Engine) -> None:
        """Count the validation of this epoch, if there was one."""
        if self._stopping is not None and _validated(engine, self.validator):
            self._stopping(self.validator)
            resumable(engine)["early_stop"] = dict(self._stopping.state_dict())
