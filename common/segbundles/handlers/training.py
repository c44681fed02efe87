"""A training from beginning to end: everything that must happen around its epochs, in the right order."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.config import PathLike
from monai.engines import Evaluator
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from segbundles.data import TrainingDataLoader
from segbundles.distributed import broadcast, process_rank
from segbundles.errors import fail
from segbundles.facts import own_facts, write_facts
from segbundles.files import RunLog, check_writable, read_json
from segbundles.handlers.average import WeightAverage
from segbundles.handlers.curves import Curves
from segbundles.handlers.epoch_log import EpochLog
from segbundles.handlers.schedule import EarlyStop, LearningRate
from segbundles.handlers.state import RunState
from segbundles.handlers.weights import BestWeights, WeightsLoader, give_copies, refuse_strangers

if TYPE_CHECKING:
    from segbundles.bundle import RunSettings

__all__ = ["EpochSeed", "TrainingRun"]

logger = logging.getLogger("segbundles")

# what may be another when a run is resumed: how long it is, where it writes and where it computes
_MAY_CHANGE = {
    "resume",
    "max_epochs",
    "lr_epochs",
    "run_name",
    "bundle_root",
    "ckpt_dir",
    "output_dir",
    "locator_weights",
}
_MAY_CHANGE |= {"device", "num_workers", "num_threads", "cache_rate"}


class EpochSeed:
    """Seed Python, numpy, torch and the random transforms at the start of each epoch.

    All randomness of an epoch depends on the seed, the number of the epoch and the process, so that a resumed run
    draws the same numbers as one that was never stopped.

    Args:
        seed: seed of the run.
        dataset: training data set; its ``transform`` is seeded.
    """

    def __init__(self, seed: int, dataset: Any = None) -> None:
        self.seed = seed
        self.dataset = dataset

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed the epoch."""
        number = int(np.random.SeedSequence([self.seed, engine.state.epoch, process_rank()]).generate_state(1)[0])
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        transform = getattr(self.dataset, "transform", None)
        if hasattr(transform, "set_random_state"):
            transform.set_random_state(seed=number)
        if isinstance(engine.state.dataloader, TrainingDataLoader):
            engine.state.dataloader.set_epoch(engine.state.epoch)


class TrainingRun:
    """Run a training: log, seeds, initial weights or resumed state, schedule, best weights, early stop and curves.

    What it does happens after what the trainer's other handlers do at the same moment, so its position in their list
    does not matter: a validation comes before the decision about the best weights, and the state of a stopped run
    replaces what a ``CheckpointLoader`` has loaded. :meth:`open` has the whole order.

    It writes ``<name>.log``, ``<name>.config.json``, ``<name>.ckpt`` (the state of the run, after every epoch) and
    ``tensorboard/<name>_<run_name>`` into ``output_dir``, and the best weights with their facts into ``ckpt_dir``.
    While the run lasts, no other process can train into these folders. A trainer may be run again, as in a federation:
    it then continues.

    Args:
        output_dir: folder for everything except the weights.
        ckpt_dir: folder for the weights.
        network: network that is trained, or its DDP wrapper.
        optimizer: its optimizer.
        loss: the trainer's loss function.
        validator: evaluator that a ``ValidationHandler`` runs; its key metric decides.
        lr_scheduler: schedule of the learning rate, see :class:`LearningRate`; None keeps it.
        filename: name of the file with the weights.
        name: stem of the files in ``output_dir``.
        dataset: training data set; its random transforms are seeded, and the facts of the weights describe it.
        seed: seed of the run.
        resume: continue the run of ``<name>.ckpt``. If there is none, the run starts afresh with a warning. Settings
            that are not those of ``<name>.config.json`` are named in warnings, unless they only say how long or where
            to run; facts of the weights must be the same.
        run_name: end of the name of the curves' folder; None takes the date.
        initial_weights: file of weights with which a run starts afresh.
        fresh_start: called when a run starts afresh, before ``initial_weights`` are loaded.
        lr_every_iteration: step the schedule after each iteration instead of each epoch.
        early_stop_patience: number of validations without a better key metric after which to stop; None never stops.
        average_epochs: validate and save the average of the weights over about this many epochs, see
            :class:`WeightAverage`; None or 0 takes the weights as they are. A federated client never averages.
        min_delta: smallest increase of the key metric that counts as better for ``early_stop_patience``.
        validation_loss: function of logits and label whose mean over the validation cases becomes a curve. ``"loss"``
            means the trainer's loss, if it accepts them, or the region loss of a
            :class:`segbundles.losses.HybridLoss`. None leaves the curve out.
        settings: settings of the run, for its record and for the facts of the weights; None writes neither. In a
            federated client ``state_dict`` of the network returns copies, and the best weights keep their precision.

    Raises:
        ValueError: when a plateau schedule has the wrong ``mode``. When the run starts: if a folder cannot be written
            to or is in use, the schedule ends before the run, or the settings, state or weights to resume with do not
            fit.
    """

    def __init__(
        self,
        output_dir: PathLike,
        ckpt_dir: PathLike,
        network: nn.Module,
        optimizer: Optimizer,
        loss: Callable,
        validator: Evaluator,
        lr_scheduler: LRScheduler | None = None,
        filename: str = "model.pt",
        name: str = "training",
        dataset: Any = None,
        seed: int = 0,
        resume: bool = False,
        run_name: str | None = None,
        initial_weights: PathLike | None = None,
        fresh_start: Callable[[], Any] | None = None,
        lr_every_iteration: bool = False,
        early_stop_patience: int | None = None,
        average_epochs: float | None = None,
        min_delta: float = 0.0,
        validation_loss: Callable | str | None = "loss",
        settings: RunSettings | None = None,
    ) -> None:
        self.output_dir, self.name = Path(output_dir), name
        self.network, self.validator = network, validator
        self.dataset, self.seed = dataset, seed
        self.resume, self.initial_weights, self.fresh_start = resume, initial_weights, fresh_start
        self.early_stop_patience, self.min_delta = early_stop_patience, min_delta
        self.settings = settings
        self.log = RunLog(self.output_dir / f"{name}.log")
        self.learning_rate = LearningRate(lr_scheduler, optimizer, validator, lr_every_iteration)
        # what a federated client sends to the server: copies, in the precision of the training
        federated = settings is not None and settings.federated
        if federated:
            give_copies(network)
        objects = {"network": network, "optimizer": optimizer, "lr_scheduler": self.learning_rate}
        self.average = WeightAverage(network, average_epochs) if average_epochs and not federated else None
        if self.average is not None:
            objects["average"] = self.average
            validator.network = self.average.network
        facts = self._write_facts if settings else None
        self.weights = BestWeights(Path(ckpt_dir) / filename, validator.network, validator, facts, half=not federated)
        self.state = RunState(self.output_dir / f"{name}.ckpt", {**objects, "evaluator": validator})
        if validation_loss == "loss":
            validation_loss = getattr(loss, "region_loss", loss)
        folder = self.output_dir / "tensorboard"
        self.curves = Curves(folder, name, run_name, loss, optimizer, validation_loss, resume)
        self.epoch_log = EpochLog(self.curves.terms, validator, optimizer)
        self._begun = self._opened = False

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        self._watch = refuse_strangers(self.network)
        engine.add_event_handler(Events.STARTED, self.open)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.stop)

    def open(self, engine: Engine) -> None:
        """Open the log and, the first time, put everything else behind the other handlers of the trainer."""
        if process_rank() == 0:
            check_writable(self.output_dir, "output_dir")
            self.log.take()
        if self._opened:
            return
        self._opened = True
        self.curves.attach(self.validator)
        early_stop = EarlyStop(self.early_stop_patience, self.validator, engine, self.min_delta)
        order: dict[Events, list[Callable[[Engine], Any]]] = {
            # ignite runs handlers that are added to an event while it is being fired
            Events.STARTED: [
                self.weights.begin,
                self.learning_rate.check_length,
                self.begin,
                *([self.average.begin] if self.average else []),
                early_stop.begin,
                self.curves.begin,
                self.epoch_log.begin,
            ],
            Events.EPOCH_STARTED: [self.end_watch, EpochSeed(self.seed, self.dataset), self.epoch_log.begin_epoch],
            Events.ITERATION_COMPLETED: [
                *([self.average.after_iteration] if self.average else []),
                self.epoch_log.after_iteration,
                self.curves.after_iteration,
                self.learning_rate.after_iteration,
            ],
            Events.EPOCH_COMPLETED: [
                self.epoch_log.after_epoch,
                self.curves.after_epoch,
                self.learning_rate.after_epoch,
                self.weights.after_epoch,
                early_stop.after_epoch,
                self.state.save,
            ],
            Events.COMPLETED: [self.weights.end, self.state.save, self.curves.end, self.close],
        }
        for event, handlers in order.items():
            for handler in handlers:
                engine.add_event_handler(event, handler)

    @property
    def _record(self) -> Path:
        return self.output_dir / f"{self.name}.config.json"

    def begin(self, engine: Engine) -> None:
        """Resume the run or start it afresh, and record its settings. Nothing happens when a trainer runs again."""
        if self._begun:
            return
        self._begun = True
        if not (self.resume and self.state.path.is_file()):
            # before the state of an earlier run is set aside: the weights may be missing
            if self.fresh_start is not None:
                self.fresh_start()
            WeightsLoader(self.initial_weights, self.network)()
            # fresh_start may depend on the data, of which each process has its own
            broadcast(self.network)
        elif self.settings is not None:
            self._compare_with_stopped_run()
        self.state.begin(engine, self.resume)
        # a run that is finished keeps the settings that it was made with
        if self.settings is not None and engine.state.epoch < engine.state.max_epochs:
            self.settings.write(self._record)

    def _compare_with_stopped_run(self) -> None:
        """Refuse to resume with another network, and warn of other settings."""
        try:
            before = read_json(self._record)["knobs"]
        except (OSError, ValueError, KeyError, TypeError):  # of an older version, or lost
            return
        now = json.loads(json.dumps(self.settings.knobs, default=str))
        changed = [name for name in now if name in before and now[name] != before[name] and name not in _MAY_CHANGE]
        facts = own_facts(self.weights.path, self.settings.schema)
        for name in changed:
            said = f"{name} is {json.dumps(now[name])}, but {json.dumps(before[name])} in the run that was stopped"
            if name in facts:
                fail(f"{said}: resume with the same value, or start afresh in another output_dir.")
            logger.warning(f"{said}: it goes on with the new value.")

    def end_watch(self, engine: Engine) -> None:
        """Allow any weights from now on: the other handlers have loaded theirs."""
        self._watch.remove()

    def close(self, engine: Engine) -> None:
        """Close the log."""
        self.log.release()

    def stop(self, engine: Engine, error: BaseException) -> None:
        """Log what ends the run, and what is kept when a person stops it."""
        self.weights.lock.release()
        if isinstance(error, KeyboardInterrupt):
            done = engine.state.epoch - 1
            kept = f"epoch {done} is kept, continue with --resume true" if done > 0 else "no epoch was finished"
            logger.warning(f"Interrupted in epoch {engine.state.epoch}: {kept}.")
            self.log.release()
            raise SystemExit(130)
        self.log.release(error)
        raise error

    def _write_facts(self, path: Path, epochs: int, validation: dict[str, Any] | None) -> None:
        write_facts(
            path,
            self.settings,
            dataset=self.dataset,
            validation_dataset=getattr(self.validator.data_loader, "dataset", None),
            seed=self.seed,
            epochs=epochs,
            validation=validation,
        )
