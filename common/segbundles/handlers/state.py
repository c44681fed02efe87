"""The state of a run, kept in a file so that a stopped run continues as if it had never been stopped."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine
from monai.config import PathLike
from monai.engines import Workflow

from segbundles.distributed import process_rank
from segbundles.errors import fail
from segbundles.files import atomic_path

__all__ = ["RunState", "resumable"]

logger = logging.getLogger("segbundles")


def resumable(engine: Engine) -> dict[str, Any]:
    """Return what outlives a stop: a dictionary of numbers, strings and dictionaries in the engine's state."""
    if not hasattr(engine.state, "resumable"):
        engine.state.resumable = {}
    return engine.state.resumable


class RunState:
    """Save the state of a run to a file, and restore it from there.

    Args:
        path: file to write and read; its name ends in .ckpt.
        objects: what to keep, by name: anything with ``state_dict`` and ``load_state_dict``, and evaluators (epoch,
            iteration, best metric). They are restored in this order. The trainer, with what is in :func:`resumable`,
            is always included.
    """

    def __init__(self, path: PathLike, objects: dict[str, Any]) -> None:
        self.path = Path(path)
        self.objects = objects

    def begin(self, engine: Engine, resume: bool) -> None:
        """Restore the state of a stopped run, or set that of an earlier run aside.

        Args:
            engine: trainer.
            resume: whether to restore. If there is no file, the run starts afresh with a warning.

        Raises:
            ValueError: when the file is damaged or belongs to another configuration.
        """
        if not self.path.is_file():
            if resume:
                logger.warning(f"Nothing to resume at {self.path}: starting from the first epoch.")
        elif resume:
            self.load(engine)
        elif process_rank() == 0:
            aside = self.path.with_name(f"{self.path.stem}_previous{self.path.suffix}")
            self.path.replace(aside)
            logger.info(f"The state of an earlier run is kept as {aside}; --resume true would have continued that run.")

    def load(self, engine: Engine) -> None:
        """Restore everything; ``max_epochs`` stays as it is configured now."""
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            fail(f"{self.path} cannot be resumed from ({type(error).__name__}): delete it to start afresh.")
        objects = self._all(engine)
        if not isinstance(state, dict) or set(state) != {*objects, "max_epochs"}:
            found = ", ".join(sorted(map(str, state))[:5]) if isinstance(state, dict) else type(state).__name__
            fail(
                f"{self.path} holds {found}; this run has {', '.join(sorted(objects))}: "
                "resume with the configuration it was started with."
            )
        for name, target in objects.items():
            try:
                _restore(target, state[name])
            except Exception as error:
                reason = str(error).strip().splitlines()[-1]
                fail(f"{self.path} does not fit this run's {name} ({reason}): resume with the same settings.")
        done, epochs = engine.state.epoch, engine.state.max_epochs
        if engine.state.epoch_length:
            # whole epochs, even if another batch size gives them another length
            engine.state.iteration = done * engine.state.epoch_length
        if done >= epochs:
            logger.warning(
                f"{done} epochs are done and max_epochs is {epochs}: nothing to do. "
                "To extend the run, increase max_epochs, and lr_epochs with it."
            )
        else:
            logger.info(f"Resumed from {self.path}, after epoch {done} of {state['max_epochs']} then planned.")

    def save(self, engine: Engine) -> None:
        """Write the file, in the first process."""
        if process_rank() == 0:
            state = {name: _state(item) for name, item in self._all(engine).items()}
            with atomic_path(self.path) as part:
                torch.save(state | {"max_epochs": engine.state.max_epochs}, part)

    def _all(self, trainer: Engine) -> dict[str, Any]:
        return {**self.objects, "trainer": trainer}


def _state(item: Any) -> Any:
    if isinstance(item, Workflow):
        return {
            "epoch": int(item.state.epoch),
            "iteration": int(item.state.iteration),
            "best_metric": float(item.state.best_metric),
            "best_metric_epoch": int(item.state.best_metric_epoch),
            "resumable": resumable(item),
        }
    return getattr(item, "module", item).state_dict()


def _restore(item: Any, state: Any) -> None:
    if isinstance(item, Workflow):
        for name, value in state.items():
            setattr(item.state, name, value)
    else:
        getattr(item, "module", item).load_state_dict(state)
