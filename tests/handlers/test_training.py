from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from monai.handlers import CheckpointLoader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_run import Interrupt, assert_equal, assert_same_run, build, load, train

from segbundles.handlers import save_weights


def test_a_handler_added_while_an_event_is_fired_is_called_last():
    """What ignite must do so that a run can put itself behind the other handlers."""
    called = []
    engine = Engine(lambda *_: None)

    def first(engine):
        called.append("first")
        if called == ["first"]:
            engine.add_event_handler(Events.STARTED, lambda _: called.append("added"))

    engine.add_event_handler(Events.STARTED, first)
    engine.add_event_handler(Events.STARTED, lambda _: called.append("last"))
    for _ in range(2):
        engine.run([0])
    assert called == ["first", "last", "added"] * 2


class Loader:
    """A ``CheckpointLoader`` that is made before its network, and that draws random numbers in each epoch."""

    def __init__(self, path):
        self.path = path

    def attach(self, engine):
        engine.add_event_handler(Events.STARTED, self)
        engine.add_event_handler(Events.EPOCH_STARTED, lambda _: torch.rand(3))

    def __call__(self, engine):
        CheckpointLoader(str(self.path), {"model": engine.network})(engine)


# places of: weight of the loss, validation, the run, loader
@pytest.mark.parametrize("order", [(2, 0, 1, 3), (3, 2, 1, 0), (1, 0, 3, 2), (0, 3, 2, 1)])
@pytest.mark.parametrize("schedule", ["polynomial", "plateau", "one-cycle"])
def test_the_order_of_handlers_does_not_matter(tmp_path, order, schedule):
    torch.save(build(tmp_path, 1, seed=9).network.state_dict(), path := tmp_path / "loaded.pt")
    arguments = {"schedule": schedule, "patience": 2, "average_epochs": 1.5, "handlers": [Loader(path)]}
    expected = train(tmp_path / "a", 5, **arguments)
    assert_same_run(train(tmp_path / "b", 5, order=order, **arguments), expected)
    train(tmp_path / "c", 2, order=order[::-1], **arguments)
    assert_same_run(train(tmp_path / "c", 5, order=order, resume=True, **arguments), expected)


def test_a_trainer_that_runs_again_continues(tmp_path):
    """As in a federation, where each round has more epochs."""
    weights = tmp_path / "initial.pt"
    save_weights(build(tmp_path, 1, seed=9).network, weights)
    expected = train(tmp_path / "a", 4, initial_weights=weights)
    made = build(tmp_path / "b", 2, initial_weights=weights)
    made.trainer.run()
    made.trainer.state.max_epochs = 4
    made.trainer.run()
    assert_same_run(made, expected)
    assert (tmp_path / "b/output/training.log").read_text().count("Started as process") == 2


@pytest.mark.parametrize(("resume", "there", "afresh"), [(True, True, False), (True, False, True), (False, True, True)])
def test_initial_weights_are_for_runs_that_start_afresh(tmp_path, monkeypatch, resume, there, afresh):
    initial = build(tmp_path, 1, seed=9).network
    save_weights(initial, tmp_path / "initial.pt")
    if there:
        train(tmp_path, 1)
    calls, shared = [], []
    monkeypatch.setattr(
        "segbundles.handlers.training.broadcast", lambda network: shared.append(network[0].weight.clone())
    )
    made = build(
        tmp_path,
        1,
        resume=resume,
        initial_weights=tmp_path / "initial.pt",
        fresh_start=lambda: calls.append(made.network[0].weight.clone()),
    )
    before, started = made.network[0].weight.clone(), []
    made.trainer.add_event_handler(Events.EPOCH_STARTED, lambda _: started.append(made.network[0].weight.clone()))
    made.trainer.run()
    assert len(calls) == len(shared) == len(started) == int(afresh)
    if afresh:
        assert torch.equal(calls[0], before)  # before the initial weights
        # all processes get the first one's weights when all are loaded
        assert torch.equal(shared[0], initial[0].weight.half().float())
        assert torch.equal(started[0], shared[0])


def test_names_of_another_stage(tmp_path):
    train(tmp_path, 1, name="locator", filename="locator.pt", run_name=None)
    assert {p.name for p in (tmp_path / "models").iterdir()} == {"locator.pt"}
    assert {p.name for p in (tmp_path / "output").iterdir()} == {"locator.ckpt", "locator.log", "tensorboard"}
    (curves,) = (tmp_path / "output/tensorboard").iterdir()
    assert curves.name.startswith("locator_20")


def test_settings_are_recorded_and_become_facts(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("segbundles.handlers.training.write_facts", lambda *a, **k: calls.append((a, k)))
    settings = SimpleNamespace(federated=False, write=lambda path: path.write_text("{}"))
    made = train(tmp_path, 3, settings=settings, val_interval=2)
    assert (tmp_path / "output/training.config.json").read_text() == "{}"
    best = {"metric": "dice", "value": made.evaluator.state.best_metric, "epoch": 2}
    expected = {"seed": 3, "epochs": 2, "validation": best, "dataset": made.run.dataset}
    expected["validation_dataset"] = made.evaluator.data_loader.dataset
    assert calls == [((tmp_path / "models/model.pt", settings), expected)]
    calls.clear()
    train(tmp_path / "no validation", 3, settings=settings, val_interval=9)
    assert [(call["epochs"], call["validation"]) for _, call in calls] == [(3, None)]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    for module in ("training", "state", "weights", "curves", "epoch_log"):
        monkeypatch.setattr(f"segbundles.handlers.{module}.process_rank", lambda: 1)
    train(tmp_path, 1)
    assert not list(tmp_path.rglob("*.*"))


def curves(folder: Path):
    """Steps and values of each curve of one folder."""
    events = EventAccumulator(str(folder)).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return scalars, {tag: [e.step for e in events.Images(tag)] for tag in events.Tags()["images"]}


def test_curves(tmp_path):
    made = build(tmp_path, 3, val_interval=2)
    losses, rates = [], []
    made.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output[0]["loss"]))
    made.trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda _: rates.append(made.optimizer.param_groups[0]["lr"])
    )
    expected = {}

    def validated(engine):
        """The trainer's loss, by hand."""
        made.network.eval()
        with torch.no_grad():
            data = list(engine.data_loader.dataset)
            values = [float(made.loss(made.network(item["image"]), item["label"])) for item in data]
        expected[engine.state.epoch] = sum(values) / len(values)

    made.evaluator.add_event_handler(Events.EPOCH_COMPLETED, validated)
    made.trainer.run()
    scalars, pictures = curves(tmp_path / "output/tensorboard/training_curves")
    assert set(scalars) == {"train_loss", "learning_rate", "dice", "val_loss"}
    assert scalars["train_loss"] == [(i, pytest.approx(float(v))) for i, v in enumerate(losses, 1)]
    assert scalars["learning_rate"] == [(i, pytest.approx(v)) for i, v in enumerate(rates, 1)]
    assert scalars["val_loss"] == [(2, pytest.approx(expected[2]))]
    assert scalars["dice"] == [(2, pytest.approx(made.evaluator.state.metrics["dice"]))]
    assert pictures == {"validation/case_0": [2]}


def test_each_training_has_its_curves_and_a_resumed_one_continues_its_own(tmp_path, monkeypatch):
    clock = iter(f"2030-01-0{n}" for n in range(1, 9))
    moment = type("Moment", (), {"__format__": lambda *_: next(clock)})
    monkeypatch.setattr("segbundles.handlers.curves.datetime", SimpleNamespace(now=moment))
    train(tmp_path, 1, run_name=None)
    with pytest.raises(SystemExit):
        train(tmp_path, 3, run_name=None, handlers=[Interrupt(3)])
    train(tmp_path, 4, run_name=None, resume=True)
    for _ in range(3):
        train(tmp_path, 1, run_name="mine")
    train(tmp_path, 2, run_name="mine", resume=True)
    with pytest.raises(SystemExit):  # before there is a state
        train(tmp_path, 2, run_name="mine", name="locator", handlers=[Interrupt(1)])
    train(tmp_path, 1, run_name="mine", name="locator", resume=True)
    folder = tmp_path / "output/tensorboard"
    steps = {path.name: [step for step, _ in curves(path)[0]["train_loss"]] for path in folder.iterdir()}
    # the iterations of the epoch that was interrupted are not there twice
    assert steps == {
        "training_2030-01-01": [1, 2],
        "training_2030-01-02": [*range(1, 9)],
        "training_mine": [1, 2],
        "training_mine_2": [1, 2],
        "training_mine_3": [1, 2, 3, 4],
        "locator_mine": [1, 2],
    }


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (None, ""),
        (lambda pred, label: pred @ label.new_zeros(3, 3), "There is no curve of the validation loss: RuntimeError"),
    ],
)
def test_without_a_validation_loss(tmp_path, caplog, loss, message):
    with caplog.at_level(logging.WARNING, "segbundles"):
        made = train(tmp_path, 3, validation_loss=loss)
    assert [text[: len(message)] for text in caplog.messages] == ([message] if message else [])
    assert "val_loss" not in curves(tmp_path / "output/tensorboard/training_curves")[0]
    assert_equal(load(made.path), load(train(tmp_path / "with", 3).path))


def test_the_region_loss_of_a_hybrid_loss_is_validated(tmp_path):
    made = build(tmp_path, 1)
    hybrid = torch.nn.Module()
    hybrid.region_loss = torch.nn.MSELoss()
    run = type(made.run)
    assert run(tmp_path, tmp_path, made.network, made.optimizer, hybrid, made.evaluator).curves.validation_loss is (
        hybrid.region_loss
    )
    assert made.run.curves.validation_loss is made.loss
    other = partial(print)
    assert build(tmp_path, 1, validation_loss=other).run.curves.validation_loss is other


def test_the_facts_that_come_with_the_weights(tmp_path):
    from segbundles.bundle import RunSettings

    settings = RunSettings(bundle="toy", knobs={"depth": 5}, schema={"properties": {"depth": {"fact": True}}})
    train(tmp_path, 1, settings=settings)
    facts = json.loads((tmp_path / "models/model.json").read_text())
    assert (facts["bundle"], facts["knobs"], facts["epochs"]) == ("toy", {"depth": 5}, 1)
    assert facts["data"] == {"training": {"cases": 4, "groups": 4}, "validation": {"cases": 2, "groups": 2}}
