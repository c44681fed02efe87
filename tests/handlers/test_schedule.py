from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from bundle_runs import ROOT
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.engines import SupervisedEvaluator
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LinearLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    StepLR,
)

from segbundles.handlers.schedule import EarlyStop, LearningRate

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


def sgd():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


class Validator:
    """Validates every so many epochs, and gives one score after another."""

    def __init__(self, scores, interval=0):
        self.scores, self.interval = iter(scores), interval
        self.state = SimpleNamespace(epoch=0, metrics={}, key_metric_name="dice")
        self.metric_cmp_fn = lambda new, old: new > old

    def attach(self, engine):
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self)

    def __call__(self, engine):
        self.state.epoch, self.state.metrics = engine.state.epoch, {"dice": next(self.scores), "loss": 0.0}


def trainer(schedule=None, validator=None, every_iteration=False):
    """A trainer with a schedule behind its validation."""
    engine = Engine(lambda *_: None)
    validator = validator or Validator([])
    if validator.interval:
        validator.attach(engine)
    if schedule is not None:
        part = LearningRate(schedule, schedule.optimizer, validator, every_iteration)
        engine.add_event_handler(Events.STARTED, part.check_length)
        engine.add_event_handler(Events.ITERATION_COMPLETED, part.after_iteration)
        engine.add_event_handler(Events.EPOCH_COMPLETED, part.after_epoch)
    return engine


def rates(optimizer, engine, event=Events.EPOCH_COMPLETED):
    seen = []
    engine.add_event_handler(event, lambda _: seen.append(optimizer.param_groups[0]["lr"]))
    return seen


def test_polynomial_steps_every_epoch():
    optimizer = sgd()
    engine = trainer(PolynomialLR(optimizer, total_iters=4, power=1.0))
    seen = rates(optimizer, engine)
    engine.run([0, 0, 0], max_epochs=4)
    assert seen == pytest.approx([0.75, 0.5, 0.25, 0.0])


def test_a_polynomial_shorter_than_the_run_is_refused_and_a_warm_up_is_not():
    optimizer = sgd()
    engine = trainer(PolynomialLR(optimizer, total_iters=2))
    with pytest.raises(
        ValueError,
        match=r"^the learning rate reaches 0 after 2 epochs, .* takes 3: set lr_epochs to 3, like max_epochs\.$",
    ):
        engine.run([0], max_epochs=3)
    optimizer = sgd()
    engine = trainer(LinearLR(optimizer, start_factor=0.5, total_iters=2))
    seen = rates(optimizer, engine)
    engine.run([0], max_epochs=3)
    assert seen == pytest.approx([0.75, 1.0, 1.0])


@pytest.mark.parametrize("length", [5, 6])
@pytest.mark.parametrize(
    ("make", "end"),
    [
        (
            lambda length: PolynomialLR(sgd(), total_iters=length),
            "the learning rate reaches 0 after 5 steps, this run takes 6",
        ),
        (
            lambda length: OneCycleLR(sgd(), 1.0, total_steps=length),
            "the one-cycle schedule ends after 5 steps, this run takes 6",
        ),
    ],
    ids=["polynomial", "one-cycle"],
)
def test_a_schedule_of_iterations_is_as_long_as_the_run(make, end, length):
    engine = trainer(make(length), every_iteration=True)
    if length == 6:
        engine.run([0, 0, 0], max_epochs=2)
        return
    with pytest.raises(ValueError, match=rf"^{end}: set lr_epochs to 2, like max_epochs\.$"):
        engine.run([0, 0, 0], max_epochs=2)


def test_iteration_level():
    optimizer = sgd()
    engine = trainer(StepLR(optimizer, 2, gamma=0.5), every_iteration=True)
    seen = rates(optimizer, engine)
    engine.run([0, 0, 0, 0], max_epochs=2)
    assert seen == [0.25, 0.0625]


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (1, [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]),  # best, better, 1 no better, 2: halved, 1, 2: halved, ...
        (2, [1, 1, 1, 1, 1, 1, 1, 0.5]),  # as many epochs, half the validations
    ],
)
@pytest.mark.parametrize("every_iteration", [True, False])
def test_plateau_counts_validations(interval, expected, every_iteration):
    optimizer = sgd()
    validator = Validator([0.5, 0.6, 0.6, 0.5, 0.55, 0.6, 0.1, 0.1], interval)
    plateau = ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=1)
    engine = trainer(plateau, validator, every_iteration)
    seen = rates(optimizer, engine)
    engine.run([0, 0, 0], max_epochs=8)
    assert seen == expected


def test_the_mode_of_a_plateau_schedule():
    plateau = ReduceLROnPlateau(sgd())
    with pytest.raises(
        ValueError, match=r"has mode 'min', which takes a better key metric for a worse one: set its mode to 'max'"
    ):
        LearningRate(plateau, plateau.optimizer, SupervisedEvaluator("cpu", [0], torch.nn.Identity()))
    smaller = SupervisedEvaluator("cpu", [0], torch.nn.Identity(), metric_cmp_fn=lambda new, old: new < old)
    LearningRate(plateau, plateau.optimizer, smaller)


@pytest.mark.parametrize("name", ["brain_flair_unet", "em_membrane_unet"])
@pytest.mark.parametrize(("every_iteration", "steps"), [(False, 4), (True, 12)])
def test_the_schedules_of_the_bundles_are_as_long_as_lr_epochs(name, every_iteration, steps):
    """Whether they count epochs or iterations, so that the advice of the message above helps."""
    config = json.loads((ROOT / "bundles" / name / "configs" / "train.json").read_text())
    parser = ConfigParser(
        {
            **{key: config[key] for key in ("lr_scheduler", "lr_epochs", "lr_every_iteration")},
            "lr_epochs": 4,
            "lr_every_iteration": every_iteration,
            "optimizer": "$__import__('torch').optim.SGD([__import__('torch').nn.Parameter()], lr=1.0)",
            "train": {"dataloader": [0, 0, 0]},
        }
    )
    schedule = parser.get_parsed_content("lr_scheduler")
    assert schedule.total_iters == steps
    seen = rates(schedule.optimizer, engine := trainer(schedule, every_iteration=every_iteration))
    engine.run([0, 0, 0], max_epochs=4)
    assert seen[:3] == pytest.approx([0.75**0.9, 0.5**0.9, 0.25**0.9])
    assert seen[3] == 0


def test_a_chained_schedule_is_extended():
    def chained(length):
        optimizer = sgd()
        return ChainedScheduler(
            [PolynomialLR(optimizer, total_iters=length), LinearLR(optimizer, total_iters=2)], optimizer=optimizer
        )

    parts = {length: chained(length) for length in (4, 8)}
    for schedule in parts.values():
        for _ in range(3):
            schedule.step()
    extended = chained(8)
    part = LearningRate(extended, extended.optimizer, Validator([]))
    extended.optimizer.load_state_dict(parts[4].optimizer.state_dict())
    part.load_state_dict(parts[4].state_dict())
    for _ in range(3):
        assert extended.get_last_lr() == parts[8].get_last_lr() != parts[4].get_last_lr()
        assert extended.optimizer.param_groups[0]["lr"] == parts[8].get_last_lr()[0]
        extended.step()
        parts[8].step()


def test_a_cosine_that_rises_again_is_said(caplog):
    engine = trainer(CosineAnnealingLR(sgd(), T_max=2))
    engine.run([0], max_epochs=3)
    assert "the learning rate rises again after 2 epochs, this run takes 3: set lr_epochs to 3" in caplog.text


@pytest.mark.parametrize(
    ("scores", "patience", "interval", "min_delta", "last"),
    [
        ([0.1, 0.2, 0.2, 0.1, 0.5, 0.5], 2, 1, 0.0, 4),
        ([0.1, 0.2, 0.2, 0.3, 0.3, 0.3], 2, 1, 0.0, 6),
        ([0.1, 0.1, 0.1], 2, 2, 0.0, 6),
        ([0.10, 0.11, 0.12, 0.13], 2, 1, 0.05, 3),
        ([0.1] * 8, None, 1, 0.0, 8),
        ([], 1, 0, 0.0, 8),  # epochs without validation are not counted
    ],
)
def test_early_stop(scores, patience, interval, min_delta, last):
    validator = Validator(scores, interval)
    engine = trainer(validator=validator)
    engine.add_event_handler(Events.EPOCH_COMPLETED, EarlyStop(patience, validator, engine, min_delta).after_epoch)
    engine.run([0], max_epochs=8)
    assert engine.state.epoch == last
