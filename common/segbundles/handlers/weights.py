"""Loading weights before a run, and saving the best ones during it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.config import PathLike
from monai.engines import Evaluator
from monai.networks.utils import get_state_dict
from torch import nn
from torch.utils.hooks import RemovableHandle

from segbundles.distributed import process_rank
from segbundles.errors import InputError, fail
from segbundles.facts import facts_path, sha256, weights_files
from segbundles.files import RunLock, atomic_path, check_writable, read_json
from segbundles.handlers.state import resumable
from segbundles.networks.weights import load_weights

__all__ = ["BestWeights", "WeightsLoader", "give_copies", "refuse_strangers", "save_weights"]

logger = logging.getLogger("segbundles")


def save_weights(network: nn.Module, path: PathLike, keep_previous: bool = False, half: bool = True) -> None:
    """Write a network's state_dict in half precision; the file appears complete or not at all.

    A tensor with values beyond half precision (the variance of a batch norm, for example) keeps its own precision.
    One that has several names (as in MONAI's DynUNet) is stored once. The facts of the weights that are replaced are
    removed: write the new ones next.

    Weights that came with the bundle (their facts say ``"shipped": true``) are kept with their facts as
    ``<stem>_shipped.pt`` when they are first replaced, and that copy is never overwritten.

    Args:
        network: network, or its DDP wrapper.
        path: file to write.
        keep_previous: whether the file that is replaced is kept with its facts as ``<stem>_previous.pt``.
        half: False keeps the network's own precision.

    Raises:
        ValueError: when the file cannot be written, or a weight is not finite.
    """
    path = Path(path)
    state = get_state_dict(network)
    _replace(state, lambda value: _half(value.detach().cpu()) if half else value.detach().cpu())
    bad = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
    if bad:
        fail(f"weights {', '.join(bad[:3])} are not finite: {path} is kept as it was. Try a smaller learning_rate.")
    with atomic_path(path) as part:
        torch.save(dict(state), part)
        if keep_previous and path.is_file():
            _keep(path, _kept(path, "previous"))
        if _shipped(path) and not _kept(path, "shipped").exists():
            _keep(path, _kept(path, "shipped"))
        facts_path(path).unlink(missing_ok=True)  # before the rename: no facts are better than wrong ones


def _replace(state: dict[str, torch.Tensor], make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace the tensors of a state_dict in place; one that has several names is made once."""
    once: dict[object, torch.Tensor] = {}
    for name, value in state.items():
        place = (value.data_ptr(), value.shape, value.stride()) if value.numel() else name
        if place not in once:
            once[place] = make(value)
        state[name] = once[place]


def _half(value: torch.Tensor) -> torch.Tensor:
    half = value.half() if value.is_floating_point() else value
    return half if bool(torch.isfinite(half).all()) else value


def _kept(path: Path, mark: str) -> Path:
    return path.with_name(f"{path.stem}_{mark}{path.suffix}")


def _keep(path: Path, copy: Path) -> None:
    """Copy weights and their facts; they are not moved, so that a process that is killed now leaves the older ones."""
    for source, target in ((facts_path(path), facts_path(copy)), (path, copy)):
        if source.is_file():
            with atomic_path(target) as part:
                shutil.copyfile(source, part)
        else:
            target.unlink(missing_ok=True)


def _shipped(path: Path) -> bool:
    with suppress(OSError, ValueError, TypeError, KeyError):
        facts = read_json(facts_path(path))
        return facts["shipped"] is True and facts["sha256"] == sha256(path)
    return False


class WeightsLoader:
    """Load weights into a network when the engine starts; a file of another architecture is refused.

    Args:
        path: file with a state_dict, or the files of an ensemble, whose first one is loaded here and the others by
            :func:`segbundles.ensemble.load_members`; None loads nothing.
        network: network to load into.

    Raises:
        ValueError: when the engine starts and the file does not fit; see :func:`segbundles.networks.load_weights`.
    """

    def __init__(self, path: PathLike | Sequence[PathLike] | None, network: nn.Module) -> None:
        self.path = path
        self.network = network

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer or evaluator."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine | None = None) -> None:
        """Load the weights."""
        for path in weights_files(self.path)[:1]:
            training = self.network.training
            load_weights(getattr(self.network, "module", self.network), path)
            self.network.train(training)
            logger.info(f"Loaded weights from {path}")


class BestWeights:
    """Save the weights of the best validation so far, and their facts.

    The file that a run replaces is kept as ``<stem>_previous.pt``. If nothing was validated in the whole run, the last
    weights are saved at its end.

    Args:
        path: file to write.
        network: network whose weights are saved.
        validator: evaluator whose key metric decides.
        write_facts: called after each save with the path, the number of epochs done, and the key metric of the
            validation (``metric``, ``value`` and ``epoch``; None without a validation).
        half: whether to save in half precision.
    """

    def __init__(
        self,
        path: PathLike,
        network: nn.Module,
        validator: Evaluator,
        write_facts: Callable[[Path, int, dict[str, Any] | None], None] | None = None,
        half: bool = True,
    ) -> None:
        self.path = Path(path)
        self.network = network
        self.validator = validator
        self.write_facts = write_facts
        self.half = half
        self.lock = RunLock(self.path, "ckpt_dir")

    def begin(self, engine: Engine) -> None:
        """Refuse a folder that cannot be written to or that another process trains into."""
        if process_rank() == 0:
            check_writable(self.path.parent, "ckpt_dir")
            self.lock.take()

    def after_epoch(self, engine: Engine) -> None:
        """Save the weights if the validation of this epoch was the best."""
        state = self.validator.state
        if state.best_metric_epoch == engine.state.epoch:
            best = {"metric": state.key_metric_name, "value": float(state.best_metric), "epoch": engine.state.epoch}
            self._save(engine, best)
            resumable(engine)["saved_epoch"] = engine.state.epoch

    def end(self, engine: Engine) -> None:
        """Save the weights if no validation did."""
        if "saved_epoch" not in resumable(engine):
            logger.warning("No validation gave a metric: the weights of the last epoch are kept.")
            self._save(engine, None)
        self.lock.release()
        if process_rank() == 0:
            logger.info(f"Weights: {self.path}")

    def _save(self, engine: Engine, validation: dict[str, Any] | None) -> None:
        # once replaced, the file there is this run's own, even after a stop
        replaced = resumable(engine).get("weights_replaced", False)
        if process_rank() == 0:
            save_weights(self.network, self.path, keep_previous=not replaced, half=self.half)
            if self.write_facts is not None:
                self.write_facts(self.path, engine.state.epoch, validation)
        resumable(engine)["weights_replaced"] = True


def give_copies(network: nn.Module) -> RemovableHandle:
    """Make a network's ``state_dict`` return copies of its weights.

    A federated client sends what ``state_dict`` returns, and a CPU shares that memory with the network: training would
    change weights that were already handed over, and PyTorch refuses to load a network's own memory back where
    ``channels_last`` leaves the strides ambiguous (one channel).

    Args:
        network: network, or its DDP wrapper.

    Returns:
        A handle whose ``remove`` ends this.
    """

    def copy(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, local_metadata: dict[str, Any]) -> None:
        _replace(state, torch.clone)

    return getattr(network, "module", network).register_state_dict_post_hook(copy)


def refuse_strangers(network: nn.Module) -> RemovableHandle:
    """Watch what is loaded into a network: refuse weights of which nothing fits, and log which ones are missing.

    Handlers that do not insist on every name, such as the ``CheckpointLoader`` that MONAI Label adds, would leave the
    network as it was initialized.

    Args:
        network: network, or its DDP wrapper.

    Returns:
        A handle whose ``remove`` ends the watch.
    """
    return getattr(network, "module", network).register_load_state_dict_post_hook(_check_loaded)


def _check_loaded(network: nn.Module, keys: Any) -> None:
    names = [name for name, _ in network.named_parameters(remove_duplicate=False)]
    missing = [name for name in names if name in set(keys.missing_keys)]
    if not missing:
        return
    number = f"{len(missing)} of the {len(names)} parameters of the {type(network).__name__}"
    if len(missing) == len(names):
        # not logged here: the caller may name the file, and ignite logs what ends a run
        raise InputError(
            f"the weights are of another architecture: {number} are not in them ({missing[0]} is the first); they "
            f"contain {', '.join(keys.unexpected_keys[:3]) or 'nothing'}. Give the settings they were trained with, or "
            "other weights."
        )
    logger.warning(f"{number} are not in the weights loaded and start at random: {', '.join(missing[:3])} ...")
