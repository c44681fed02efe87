"""Loading weights before a run, saving the best ones during it."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.config import PathLike
from monai.engines import Evaluator
from monai.networks.utils import get_state_dict
from torch import nn

from segbundles.errors import fail
from segbundles.files import RunLock, atomic_path, check_writable
from segbundles.handlers.resume import resumable
from segbundles.networks.weights import load_weights

__all__ = ["BestWeightsSaver", "WeightsLoader", "save_weights"]

logger = logging.getLogger("segbundles")


def save_weights(network: nn.Module, path: PathLike, previous: PathLike | None = None) -> None:
    """Write a network's state_dict, floating-point tensors in half precision, under a name that appears complete.

    A tensor with values beyond half precision (a batch norm's variance, say) keeps its own. One that stands under
    several names (MONAI's DynUNet) is stored once.

    Args:
        network: network, or its DDP wrapper.
        path: file to write.
        previous: where a file that was at ``path`` is kept; None overwrites it.

    Raises:
        ValueError: when the file cannot be written, or a weight is not finite.
    """
    state = get_state_dict(network)
    once: dict[object, torch.Tensor] = {}
    for name, value in state.items():
        place = (value.data_ptr(), value.shape, value.stride()) if value.numel() else name
        state[name] = once.setdefault(place, _half(value.detach().cpu()))
    bad = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
    if bad:
        fail(f"weights {', '.join(bad[:3])} are not finite: {path} is kept as it was. Try a smaller learning_rate.")
    with atomic_path(path) as part:
        torch.save(dict(state), part)
        if previous is not None and Path(path).is_file():
            with atomic_path(previous) as copy:  # not moved: a process that is killed now leaves the older weights
                shutil.copyfile(path, copy)


def _half(value: torch.Tensor) -> torch.Tensor:
    half = value.half() if value.is_floating_point() else value
    return half if bool(torch.isfinite(half).all()) else value


class WeightsLoader:
    """Load weights into a network when the engine starts; a file of another architecture is refused.

    Args:
        path: file with a state_dict; None loads nothing.
        network: network to load into.

    Raises:
        ValueError: when the engine starts; see :func:`segbundles.networks.load_weights`.
    """

    def __init__(self, path: PathLike | None, network: nn.Module) -> None:
        """See the class."""
        self.path = path
        self.network = network

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer or evaluator."""
        if self.path is not None:
            engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Load."""
        training = self.network.training
        load_weights(getattr(self.network, "module", self.network), self.path)  # type: ignore[arg-type]
        self.network.train(training)
        logger.info(f"Loaded weights from {self.path}")


class BestWeightsSaver:
    """Write the weights of the best validation so far, in half precision.

    The file it replaces stays beside it as ``<stem>_previous.pt``, once a run. When nothing was validated in the
    whole run, the last weights are written at its end.

    Args:
        ckpt_dir: folder to write to.
        network: network whose weights are saved.
        validator: evaluator whose key metric decides.
        filename: name of the file.

    Raises:
        ValueError: when the run starts and ``ckpt_dir`` cannot be written to, or another process trains into it.
    """

    def __init__(
        self, ckpt_dir: PathLike, network: nn.Module, validator: Evaluator, filename: str = "model.pt"
    ) -> None:
        """See the class."""
        self.path = Path(ckpt_dir) / filename
        self.network = network
        self.validator = validator
        self._lock = RunLock(self.path, "ckpt_dir")

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, behind its ``ValidationHandler``."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save_best)
        engine.add_event_handler(Events.COMPLETED, self.save_last)

    def start(self, engine: Engine) -> None:
        """Refuse a folder that cannot be written to, before training."""
        check_writable(self.path.parent, "ckpt_dir")
        if idist.get_rank() == 0:
            self._lock.take()

    def save_best(self, engine: Engine) -> None:
        """Save when the validation of this epoch was the best."""
        if self.validator.state.best_metric_epoch == engine.state.epoch:
            self._save(engine)
            resumable(engine)["saved_epoch"] = engine.state.epoch

    def save_last(self, engine: Engine) -> None:
        """Save when no validation did."""
        if "saved_epoch" not in resumable(engine):
            logger.warning("No validation gave a metric: the weights of the last epoch are kept.")
            self._save(engine)
        self._lock.release()
        if idist.get_rank() == 0:
            logger.info(f"Weights: {self.path}")

    def _save(self, engine: Engine) -> None:
        # once replaced, the file there is this run's own, also after a stop
        replaced = resumable(engine).get("weights_replaced", False)
        if idist.get_rank() == 0:
            previous = None if replaced else self.path.with_name(f"{self.path.stem}_previous{self.path.suffix}")
            save_weights(self.network, self.path, previous)
        resumable(engine)["weights_replaced"] = True
