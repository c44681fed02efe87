"""A training on 2D noise, small enough to be repeated often, with everything random that a bundle's has."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import CacheDataset, DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import MeanDice, ParamSchedulerHandler, ValidationHandler, from_engine
from monai.transforms import Compose, EnsureTyped, RandAffined, RandGaussianNoised
from torch import nn
from torch.optim import lr_scheduler as schedules

from segbundles.data import TrainingDataLoader
from segbundles.handlers import TrainingRun
from segbundles.transforms import LogitsToClassd

SCHEDULES = {
    "polynomial": lambda o, n=7: schedules.PolynomialLR(o, total_iters=n, power=0.9),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, mode="max", factor=0.5, patience=0),
    "steps": lambda o: schedules.MultiStepLR(o, milestones=[2, 4]),
    "one-cycle": lambda o, n=8: schedules.OneCycleLR(o, max_lr=0.1, total_steps=2 * n),
    "cosine": lambda o, n=7: schedules.CosineAnnealingLR(o, T_max=n),
    "warm-up": lambda o, n=5: schedules.SequentialLR(
        o, [schedules.LinearLR(o, total_iters=2), schedules.CosineAnnealingLR(o, T_max=n)], milestones=[2]
    ),
    "none": lambda o: None,
}


class Loss(nn.Module):
    weight = 0.0

    def set_weight(self, value: float) -> None:
        self.weight = value

    def forward(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.weight * nn.functional.binary_cross_entropy_with_logits(pred, target) + pred.square().mean()


class Freeze:
    """Keeps the weights as they are."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0


class Interrupt:
    """Ends a run in an epoch."""

    def __init__(self, epoch: int, error: Any = KeyboardInterrupt) -> None:
        self.epoch, self.error = epoch, error

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if engine.state.epoch == self.epoch:
            raise self.error


def items(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(1, 8, 8, generator=generator) for _ in range(count)]
    return [{"image": image, "label": (image > 0.5).float()} for image in images]


def build(
    folder: Path,
    max_epochs: int,
    *,
    schedule: str = "polynomial",
    length: int | None = None,
    patience: int | None = None,
    val_interval: int = 1,
    seed: int = 3,
    num_workers: int = 0,
    batch_size: int = 2,
    hidden: int = 6,
    handlers: Sequence[Any] = (),
    order: Sequence[int] | None = None,
    **arguments: Any,
) -> SimpleNamespace:
    """Build a trainer as the bundles configure it; everything is written below ``folder``.

    ``length`` is the number of epochs of the schedule, ``order`` the places of all handlers (weight of the loss,
    validation, the run, and then ``handlers``), and ``arguments`` are those of the ``TrainingRun``.
    """
    torch.manual_seed(seed)  # what set_determinism does at the start of a bundle
    network = nn.Sequential(nn.Linear(8, hidden), nn.Dropout(0.5), nn.ReLU(), nn.Linear(hidden, 8))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    lr_scheduler = SCHEDULES[schedule](*(optimizer, length)[: 1 if length is None else 2])
    loss = Loss()
    transforms = [
        EnsureTyped(["image", "label"]),
        RandAffined(["image", "label"], prob=0.8, rotate_range=0.5, translate_range=2, padding_mode="border"),
        RandGaussianNoised("image", prob=0.7, std=0.3),
    ]
    dataset = CacheDataset(items(4, 0), Compose(transforms), cache_rate=1.0, num_workers=2, progress=False)
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(CacheDataset(items(2, 1), EnsureTyped(["image"]), progress=False)),
        network=network,
        postprocessing=LogitsToClassd("pred"),
        key_val_metric={"dice": MeanDice(output_transform=from_engine(["pred", "label"]))},
    )
    run = TrainingRun(
        folder / "output",
        folder / "models",
        network,
        optimizer,
        loss,
        evaluator,
        lr_scheduler,
        **{
            "dataset": dataset,
            "seed": seed,
            "run_name": "curves",
            "lr_every_iteration": schedule == "one-cycle",
            "early_stop_patience": patience,
            **arguments,
        },
    )
    weighing = ParamSchedulerHandler(
        loss.set_weight,
        "linear",
        {"initial_value": 0.0, "step_constant": 0, "step_max_value": 6, "max_value": 1.0},
        epoch_level=True,
        event=Events.EPOCH_STARTED,
    )
    listed = [weighing, ValidationHandler(val_interval, evaluator), run, *handlers]
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=max_epochs,
        train_data_loader=TrainingDataLoader(dataset, batch_size=batch_size, num_workers=num_workers),
        network=network,
        loss_function=loss,
        optimizer=optimizer,
        train_handlers=[listed[place] for place in order or range(len(listed))],
    )
    path = folder / "output" / "training.ckpt"
    return SimpleNamespace(
        trainer=trainer, evaluator=evaluator, network=network, optimizer=optimizer, path=path, run=run, loss=loss
    )


def train(folder: Path, max_epochs: int, **arguments: Any) -> SimpleNamespace:
    """Build a trainer and run it."""
    made = build(folder, max_epochs, **arguments)
    # a new process starts with other random numbers than those at which the last one stopped
    torch.manual_seed(random.randrange(2**30))
    np.random.seed(random.randrange(2**30))
    made.trainer.run()
    return made


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def assert_equal(a: Any, b: Any, name: str = "state") -> None:
    """Check that two nested structures are equal, bit for bit."""
    assert type(a) is type(b), name
    if isinstance(a, dict):
        assert list(a) == list(b), name
        for key in a:
            assert_equal(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), name
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{name}.{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    else:
        assert a == b, name


def assert_same_run(one: SimpleNamespace, other: SimpleNamespace) -> None:
    """Check that all that two runs leave is equal, bit for bit."""
    assert_equal(load(one.path), load(other.path))
    assert_equal(one.network.state_dict(), other.network.state_dict())
    assert_equal(*(load(made.path.parents[1] / "models/model.pt") for made in (one, other)))
    for name in ("best_metric", "best_metric_epoch"):
        assert getattr(one.evaluator.state, name) == getattr(other.evaluator.state, name)
    assert one.trainer.state.resumable == other.trainer.state.resumable
