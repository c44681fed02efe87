"""Making a run that was stopped go on as if it had not been."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.config import PathLike
from monai.engines import Workflow
from torch import nn
from torch.utils.hooks import RemovableHandle

from segbundles.errors import fail
from segbundles.files import RunLog, atomic_path, check_writable

__all__ = ["RunLoader", "RunSaver", "can_resume"]

logger = logging.getLogger("segbundles")


def resumable(engine: Engine) -> dict[str, Any]:
    """Where a handler keeps what must outlive a stop: a dictionary of numbers and strings in the engine's state."""
    if not hasattr(engine.state, "resumable"):
        engine.state.resumable = {}
    return engine.state.resumable


def can_resume(path: PathLike, resume: bool) -> bool:
    """Whether a run will go on from ``path``: otherwise it starts afresh, from initial weights if there are any."""
    return resume and Path(path).is_file()


class RunLoader:
    """Seed every epoch, and load the state of a stopped run. To be the first of a trainer's handlers.

    All randomness of an epoch comes from ``seed`` and the epoch's number, which is what lets a resumed run draw what an
    unstopped one would have.

    Other handlers may load weights when the run starts, and not insist on every name, as the ``CheckpointLoader`` that
    MONAI Label adds: a file of which nothing fits a network is refused, what is missing in another is logged.

    While the run goes on, what is logged goes to ``<stem of path>.log`` beside ``path`` too, and other processes cannot
    train into the same folder.

    Args:
        path: file that :class:`RunSaver` writes.
        objects: what to restore, by name: anything with ``state_dict``, and evaluators (epoch, iteration, best metric).
            The same as given to :class:`RunSaver`. The trainer itself, with what its handlers keep, is always included.
        dataset: training data set; its random transforms are seeded.
        seed: seed of the run.
        resume: whether to load. Without a file to load, the run starts afresh with a warning.

    Raises:
        ValueError: when the run starts and the file is damaged or is of another configuration, when its folder cannot
            be written to or another process trains into it, or when what another handler loads leaves a network as it
            was.
    """

    def __init__(
        self,
        path: PathLike,
        objects: dict[str, Any],
        dataset: torch.utils.data.Dataset | None = None,
        seed: int = 0,
        resume: bool = False,
    ) -> None:
        """See the class."""
        self.path = Path(path)
        self.objects = objects
        self.dataset = dataset
        self.seed = seed
        self.resume = resume
        self._guards: list[RemovableHandle] = []
        self._log = RunLog(self.path.with_suffix(".log"))

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        networks = (getattr(item, "module", item) for item in self.objects.values() if isinstance(item, nn.Module))
        self._guards = [network.register_load_state_dict_post_hook(_refuse_strangers) for network in networks]
        engine.add_event_handler(Events.STARTED, self.begin)
        engine.add_event_handler(Events.STARTED, self.load if self.resume else self.put_aside)
        engine.add_event_handler(Events.EPOCH_STARTED, self.seed_epoch)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.interrupted)

    def begin(self, engine: Engine) -> None:
        """Open the log, before anything is changed."""
        if idist.get_rank() > 0:
            return
        check_writable(self.path.parent, "output_dir")
        self._log.take()
        if not engine.has_event_handler(self.end, Events.COMPLETED):
            engine.add_event_handler(Events.COMPLETED, self.end)  # now, to be behind what others write at the end

    def end(self, engine: Engine) -> None:
        """Close the log."""
        self._log.release()

    def seed_epoch(self, engine: Engine) -> None:
        """Seed Python, numpy, torch and the random transforms for this epoch."""
        while self._guards:
            self._guards.pop().remove()
        number = int(np.random.SeedSequence([self.seed, engine.state.epoch, idist.get_rank()]).generate_state(1)[0])
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        transform = getattr(self.dataset, "transform", None)
        if hasattr(transform, "set_random_state"):
            transform.set_random_state(seed=number)

    def put_aside(self, engine: Engine) -> None:
        """Keep the state of an earlier run that this one would replace."""
        own = engine.state.epoch > 0  # run again: a later round of a federation
        if idist.get_rank() == 0 and not own and self.path.is_file():
            aside = self.path.with_name(f"{self.path.stem}_previous{self.path.suffix}")
            self.path.replace(aside)
            logger.info(f"An earlier run's state is kept as {aside}; --resume true would have gone on with it.")

    def load(self, engine: Engine) -> None:
        """Restore everything; the number of epochs asked for now stays."""
        if not self.path.is_file():
            logger.warning(f"Nothing to resume at {self.path}: starting from the first epoch.")
            return
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            fail(f"{self.path} cannot be resumed from ({type(error).__name__}): delete it to start afresh.")
        objects = _with_trainer(self.objects, engine)
        if not isinstance(state, dict) or set(state) != {*objects, "max_epochs"}:
            found = ", ".join(sorted(map(str, state))[:5]) if isinstance(state, dict) else type(state).__name__
            fail(
                f"{self.path} holds {found}; this run has {', '.join(sorted(objects))}: "
                "resume with the configuration it was started with."
            )
        planned = state.pop("max_epochs")
        for name, target in objects.items():
            try:
                _restore(target, state[name])
            except Exception as error:
                reason = str(error).strip().splitlines()[-1]
                fail(f"{self.path} does not fit this run's {name} ({reason}): resume with the same settings.")
        if engine.state.epoch_length:
            # whole epochs, also where another batch size gives them another length
            engine.state.iteration = engine.state.epoch * engine.state.epoch_length
        if engine.state.epoch >= engine.state.max_epochs:
            logger.warning(
                f"{engine.state.epoch} epochs are done and max_epochs is {engine.state.max_epochs}: nothing to do."
            )
        else:
            logger.info(f"Resumed from {self.path}, after epoch {engine.state.epoch}")
            if planned != engine.state.max_epochs:
                logger.warning(
                    f"max_epochs was {planned}, is {engine.state.max_epochs}: a learning rate schedule made for "
                    f"{planned} epochs goes on as it was made, and may have come down to 0."
                )

    def interrupted(self, engine: Engine, error: BaseException) -> None:
        """Say what was kept when a person stops the run."""
        if isinstance(error, KeyboardInterrupt):
            done = engine.state.epoch - 1
            kept = f"epoch {done} is kept, go on with --resume true" if done > 0 else "no epoch was finished"
            logger.warning(f"Interrupted in epoch {engine.state.epoch}: {kept}.")
            self._log.release()
            raise SystemExit(130)
        self._log.release(error)
        raise error


class RunSaver:
    """Write the state of a run after every epoch and at its end. To be the last of a trainer's handlers.

    Args:
        path: file to write; a name ending in .ckpt, outside ``models/``.
        objects: as for :class:`RunLoader`.

    Raises:
        ValueError: when the run starts and the folder cannot be written to.
    """

    def __init__(self, path: PathLike, objects: dict[str, Any]) -> None:
        """See the class."""
        self.path = Path(path)
        self.objects = objects

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self.check_folder)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        engine.add_event_handler(Events.COMPLETED, self.save)

    def check_folder(self, engine: Engine) -> None:
        """Refuse a folder that cannot be written to, before training."""
        check_writable(self.path.parent, "output_dir")

    def save(self, engine: Engine) -> None:
        """Write the file."""
        if idist.get_rank() == 0:
            state = {name: _state(item) for name, item in _with_trainer(self.objects, engine).items()}
            with atomic_path(self.path) as part:
                torch.save(state | {"max_epochs": engine.state.max_epochs}, part)


def _refuse_strangers(network: nn.Module, keys: Any) -> None:
    """After a network was given a state_dict: refuse what fits none of its parameters, log what fits only some."""
    names = [name for name, _ in network.named_parameters(remove_duplicate=False)]
    missing = [name for name in names if name in set(keys.missing_keys)]
    if not missing:
        return
    number = f"{len(missing)} of the {len(names)} parameters of the {type(network).__name__}"
    if len(missing) == len(names):
        # not logged here: who loads may name the file, and ignite logs what ends a run
        raise ValueError(
            f"the weights are of another architecture: {number} are not in them, {missing[0]} the first, but "
            f"{', '.join(keys.unexpected_keys[:3]) or 'nothing'}. Give the settings they were trained with, or others."
        )
    logger.warning(f"{number} are not in the weights loaded and start at random: {', '.join(missing[:3])} ...")


def _with_trainer(objects: dict[str, Any], trainer: Engine) -> dict[str, Any]:
    # a config cannot name the trainer here: its handlers would refer to what holds them
    return {**objects, "trainer": trainer}


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
