from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator
from torch.optim.lr_scheduler import LinearLR, OneCycleLR, PolynomialLR, ReduceLROnPlateau, StepLR

from segbundles.handlers import EarlyStopHandler, LrScheduleHandler

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


def sgd():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


class Validator:
    """Validates every so many epochs, and gives one score after another."""

    def __init__(self, scores, interval=1):
        self.scores, self.interval = iter(scores), interval
        self.state = SimpleNamespace(epoch=0, metrics={}, key_metric_name="dice")
        self.metric_cmp_fn = lambda new, old: new > old

    def attach(self, engine):
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self)

    def __call__(self, engine):
        self.state.epoch, self.state.metrics = engine.state.epoch, {"dice": next(self.scores), "loss": 0.0}


def trainer(*handlers):
    engine = Engine(lambda *_: None)
    for handler in handlers:
        handler.attach(engine)
    return engine


def rates(optimizer, engine, event=Events.EPOCH_COMPLETED):
    seen = []
    engine.add_event_handler(event, lambda _: seen.append(optimizer.param_groups[0]["lr"]))
    return seen


def test_polynomial_steps_every_epoch():
    optimizer = sgd()
    engine = trainer(LrScheduleHandler(PolynomialLR(optimizer, total_iters=4, power=1.0)))
    seen = rates(optimizer, engine)
    engine.run([0, 0, 0], max_epochs=4)
    assert seen == pytest.approx([0.75, 0.5, 0.25, 0.0])


def test_a_polynomial_shorter_than_the_run_is_refused_and_a_warm_up_is_not():
    optimizer = sgd()
    engine = trainer(LrScheduleHandler(PolynomialLR(optimizer, total_iters=2)))
    with pytest.raises(ValueError, match="comes down to 0 after 2 epochs, max_epochs is 3: set lr_epochs"):
        engine.run([0], max_epochs=3)
    optimizer = sgd()
    engine = trainer(LrScheduleHandler(LinearLR(optimizer, start_factor=0.5, total_iters=2)))
    seen = rates(optimizer, engine)
    engine.run([0], max_epochs=3)
    assert seen == pytest.approx([0.75, 1.0, 1.0])


@pytest.mark.parametrize("length", [5, 6])
@pytest.mark.parametrize(
    ("make", "end"),
    [
        (
            lambda length: PolynomialLR(sgd(), total_iters=length),
            "the learning rate comes down to 0 after 5 iterations, this run takes 6",
        ),
        (
            lambda length: OneCycleLR(sgd(), 1.0, total_steps=length),
            "the one-cycle schedule ends after 5 steps, this run takes 6",
        ),
    ],
    ids=["polynomial", "one-cycle"],
)
def test_a_schedule_of_iterations_is_as_long_as_the_run(make, end, length):
    engine = trainer(LrScheduleHandler(make(length), epoch_level=False))
    if length == 6:
        engine.run([0, 0, 0], max_epochs=2)
        return
    advice = r"set lr_epochs to max_epochs or more, with a schedule made for iterations \(lr_every_iteration\)\.$"
    with pytest.raises(ValueError, match=f"^{end}: {advice}"):
        engine.run([0, 0, 0], max_epochs=2)


def test_iteration_level():
    optimizer = sgd()
    engine = trainer(LrScheduleHandler(StepLR(optimizer, 2, gamma=0.5), epoch_level=False))
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
@pytest.mark.parametrize("epoch_level", [True, False])
def test_plateau_counts_validations(interval, expected, epoch_level):
    optimizer = sgd()
    validator = Validator([0.5, 0.6, 0.6, 0.5, 0.55, 0.6, 0.1, 0.1], interval)
    plateau = ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=1)
    engine = trainer(validator, LrScheduleHandler(plateau, validator, epoch_level=epoch_level))
    seen = rates(optimizer, engine)
    engine.run([0, 0, 0], max_epochs=8)
    assert seen == expected


def test_plateau_arguments():
    with pytest.raises(ValueError, match=r"a ReduceLROnPlateau needs validator: the evaluator whose key metric"):
        LrScheduleHandler(ReduceLROnPlateau(sgd(), mode="max"))
    with pytest.raises(
        ValueError, match=r"has mode 'min', which takes a better key metric for a worse one: set its mode"
    ):
        LrScheduleHandler(ReduceLROnPlateau(sgd()), SupervisedEvaluator("cpu", [0], torch.nn.Identity()))
    smaller = SupervisedEvaluator("cpu", [0], torch.nn.Identity(), metric_cmp_fn=lambda new, old: new < old)
    LrScheduleHandler(ReduceLROnPlateau(sgd()), smaller)


@pytest.mark.parametrize(
    ("scores", "patience", "interval", "min_delta", "last"),
    [
        ([0.1, 0.2, 0.2, 0.1, 0.5, 0.5], 2, 1, 0.0, 4),
        ([0.1, 0.2, 0.2, 0.3, 0.3, 0.3], 2, 1, 0.0, 6),
        ([0.1, 0.1, 0.1], 2, 2, 0.0, 6),
        ([0.10, 0.11, 0.12, 0.13], 2, 1, 0.05, 3),
        ([0.1] * 8, None, 1, 0.0, 8),
    ],
)
def test_early_stop(scores, patience, interval, min_delta, last):
    validator = Validator(scores, interval)
    engine = trainer(validator, EarlyStopHandler(patience, validator, min_delta))
    engine.run([0], max_epochs=8)
    assert engine.state.epoch == last


def test_epochs_without_validation_are_not_counted():
    validator = Validator([])
    engine = trainer(EarlyStopHandler(1, validator))
    engine.run([0], max_epochs=5)
    assert engine.state.epoch == 5
