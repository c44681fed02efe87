from __future__ import annotations

import json
import logging
import random

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.handlers import CheckpointLoader
from toy_run import SCHEDULES, Freeze, Interrupt, assert_equal, assert_same_run, build, load, train

from segbundles.bundle import RunSettings
from segbundles.handlers.training import EpochSeed


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    """Runs of 5 epochs that were never stopped, made when first asked for."""
    runs = {}

    def get(max_epochs=5, **arguments):
        key = (max_epochs, *sorted(arguments.items()))
        if key not in runs:
            runs[key] = train(tmp_path_factory.mktemp("unstopped"), max_epochs, **arguments)
        return runs[key]

    return get


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_resumed_after_any_epoch(tmp_path, unstopped, stop):
    arguments = {"schedule": "plateau", "patience": 5, "val_interval": 2}
    train(tmp_path, stop, **arguments)
    resumed = train(tmp_path, 5, resume=True, **arguments)
    assert resumed.trainer.state.epoch == 5
    assert resumed.trainer.state.iteration == 10
    assert_same_run(resumed, unstopped(**arguments))


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "plateau"])
def test_resumed_with_any_schedule(tmp_path, unstopped, schedule):
    train(tmp_path, 3, schedule=schedule)
    assert_same_run(train(tmp_path, 5, resume=True, schedule=schedule), unstopped(schedule=schedule))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_resumed_with_any_number_of_workers(tmp_path, unstopped, num_workers):
    train(tmp_path, 1, num_workers=2)
    assert_same_run(train(tmp_path, 3, resume=True, num_workers=num_workers), unstopped(3))


def test_stopped_after_every_epoch(tmp_path, unstopped):
    for epoch in range(1, 6):
        last = train(tmp_path, epoch, resume=epoch > 1)
    assert_same_run(last, unstopped())


def test_the_comparison_can_fail(tmp_path, unstopped):
    """Other seeds and another order of epochs give other weights; epochs differ among themselves."""
    other = train(tmp_path, 5, seed=4)
    assert not torch.equal(other.network[0].weight, unstopped().network[0].weight)
    drawn = []
    engine = Engine(lambda *_: None)
    for epoch in (1, 2, 1):
        engine.state.epoch = epoch
        EpochSeed(3)(engine)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[2]
    assert not set(drawn[0]) & set(drawn[1])


def rates(made):
    seen = []
    made.trainer.add_event_handler(
        Events.ITERATION_STARTED, lambda _: seen.append([made.optimizer.param_groups[0][k] for k in ("lr", "betas")])
    )
    made.trainer.run()
    return seen


@pytest.mark.parametrize("schedule", ["polynomial", "one-cycle", "cosine", "warm-up"])
def test_a_finished_run_is_extended(tmp_path, schedule, caplog):
    """The learning rates of the new epochs are those of a run that was made for 6 epochs."""
    whole = rates(build(tmp_path / "whole", 6, schedule=schedule, length=6))
    assert len(whole) == 12
    train(tmp_path, 3, schedule=schedule, length=3)
    with caplog.at_level(logging.INFO, "segbundles"):
        assert rates(build(tmp_path, 6, schedule=schedule, length=6, resume=True)) == whole[6:]
    assert f"schedule was changed: it continues on the new one, at {whole[6][0]:.2e}." in caplog.text
    # and this run is stopped and resumed like any other
    once = train(tmp_path / "once", 3, schedule=schedule, length=3)
    once = train(tmp_path / "once", 6, schedule=schedule, length=6, resume=True)
    train(tmp_path / "twice", 3, schedule=schedule, length=3)
    with pytest.raises(SystemExit):
        train(tmp_path / "twice", 6, schedule=schedule, length=6, resume=True, handlers=[Interrupt(5)])
    assert_same_run(train(tmp_path / "twice", 6, schedule=schedule, length=6, resume=True), once)


@pytest.mark.parametrize(
    ("schedule", "end"),
    [
        ("polynomial", "the learning rate reaches 0 after 3 epochs, this run takes 6"),
        ("one-cycle", "the one-cycle schedule ends after 6 steps, this run takes 12"),
    ],
)
def test_extended_without_its_schedule(tmp_path, schedule, end):
    """The message says what to do, and doing it works."""
    before = load(train(tmp_path, 3, schedule=schedule, length=3).path)
    with pytest.raises(ValueError, match=f"^{end}: set lr_epochs to 6, like max_epochs"):
        train(tmp_path, 6, schedule=schedule, length=3, resume=True)
    assert_equal(load(tmp_path / "output/training.ckpt"), before)
    assert train(tmp_path, 6, schedule=schedule, length=6, resume=True).trainer.state.epoch == 6


def test_a_plateau_takes_its_new_arguments_and_keeps_its_count(tmp_path):
    made = train(tmp_path, 3, schedule="plateau", handlers=[Freeze()])
    again = build(tmp_path, 3, schedule="plateau", resume=True)
    schedule = again.run.learning_rate.lr_scheduler
    schedule.factor = 0.25
    again.trainer.run()
    assert schedule.factor == 0.25
    assert schedule.best == made.run.learning_rate.lr_scheduler.best > 0


def test_another_kind_of_schedule_is_refused(tmp_path):
    train(tmp_path, 1)
    with pytest.raises(ValueError, match=r"does not fit this run's lr_scheduler \('T_max'\): resume with the same"):
        train(tmp_path, 2, schedule="cosine", resume=True)


def test_early_stop_continues_to_count(tmp_path):
    """The learning rate is 0: no validation is better than the first; patience 3 ends after the fourth."""
    frozen = {"patience": 3, "handlers": (Freeze(),)}
    never = train(tmp_path / "a", 6, **frozen)
    assert never.trainer.state.epoch == 4
    assert never.trainer.state.resumable["early_stop"]["counter"] == 3
    train(tmp_path / "b", 3, **frozen)
    assert_same_run(train(tmp_path / "b", 6, resume=True, **frozen), never)


def test_a_run_that_early_stopping_ended_stays_ended(tmp_path, caplog):
    frozen = {"handlers": (Freeze(),), "max_epochs": 6}
    ended = train(tmp_path, patience=2, **frozen)
    before = load(ended.path)
    with caplog.at_level(logging.WARNING, "segbundles"):
        again = train(tmp_path, resume=True, patience=2, **frozen)
    assert again.trainer.state.epoch == ended.trainer.state.epoch == 3
    assert_equal(load(again.path), before)
    assert (
        "2 validations in a row were no better: nothing to resume. Increase early_stop_patience to continue."
        in caplog.messages
    )
    assert train(tmp_path, resume=True, patience=3, **frozen).trainer.state.epoch == 4


def test_more_epochs_than_asked_for_are_done(tmp_path, caplog):
    train(tmp_path, 3)
    with caplog.at_level(logging.WARNING, "segbundles"):
        made = train(tmp_path, 2, resume=True)
    assert made.trainer.state.epoch == 3
    assert (
        "3 epochs are done and max_epochs is 2: nothing to do. "
        "To extend the run, increase max_epochs, and lr_epochs with it." in caplog.messages
    )


def test_another_batch_size_gives_whole_epochs(tmp_path):
    """3 epochs of 2 iterations, then whole ones of 4."""
    train(tmp_path, 3)
    made = build(tmp_path, 5, resume=True, batch_size=1)
    seen = []
    made.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.epoch))
    made.trainer.run()
    assert seen == [4] * 4 + [5] * 4
    assert made.trainer.state.iteration == 20


def test_nothing_to_resume_warns_and_starts_afresh(tmp_path, unstopped, caplog):
    with caplog.at_level(logging.WARNING, "segbundles"):
        assert_same_run(train(tmp_path, 5, resume=True), unstopped())
    assert f"Nothing to resume at {tmp_path}/output/training.ckpt: starting from the first epoch." in caplog.messages


def test_the_state_of_an_earlier_run_is_kept(tmp_path):
    first = load(train(tmp_path, 1).path)
    second = load(train(tmp_path, 2).path)
    assert second["trainer"]["epoch"] == 2
    assert_equal(load(tmp_path / "output/training_previous.ckpt"), first)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:1000]), r"ckpt cannot be resumed from \(\w+\): delete it to"),
        (lambda p: p.write_bytes(b""), r"training\.ckpt cannot be resumed from"),
        (
            lambda p: torch.save({f"w{i}": torch.ones(1) for i in range(9)}, p),
            r"holds w0, w1, w2, w3, w4; this run has",
        ),
        (
            lambda p: torch.save([1, 2], p),
            r"holds list; this run has evaluator, lr_scheduler, network, optimizer, trainer",
        ),
        (
            lambda p: torch.save(load(p) | {"optimizer": {"a": 1}}, p),
            r"does not fit this run's optimizer \(.*\): resume with the same settings",
        ),
        (lambda p: torch.save(load(p) | {"trainer": 3}, p), r"does not fit this run's trainer"),
    ],
)
def test_damaged_and_foreign_files(tmp_path, spoil, message, caplog):
    spoil(train(tmp_path, 1).path)
    with caplog.at_level(logging.ERROR, "segbundles"), pytest.raises(ValueError, match=message):
        train(tmp_path, 2, resume=True)
    assert len([r for r in caplog.records if r.name == "segbundles"]) == 1


def test_resumed_with_other_settings(tmp_path, caplog):
    """Facts of the weights are refused by name, other settings are named, and a finished run keeps its record."""

    def settings(**knobs):
        knobs = {"depth": 4, "rate": 0.1, "max_epochs": 2, **knobs}
        return RunSettings(knobs=knobs, schema={"properties": {"depth": {"fact": True}, "rate": {}}})

    state = train(tmp_path, 1, settings=settings()).path
    record = tmp_path / "output/training.config.json"
    before = (record.read_bytes(), state.read_bytes())
    with pytest.raises(ValueError, match=r"^depth is 5, but 4 in the run that was stopped: resume with the same value"):
        train(tmp_path, 2, resume=True, settings=settings(depth=5))
    train(tmp_path, 1, resume=True, settings=settings(rate=0.3))
    assert record.read_bytes() == before[0]
    caplog.clear()
    train(tmp_path, 2, resume=True, settings=settings(rate=0.2, max_epochs=3))
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "rate is 0.2, but 0.1 in the run that was stopped: it goes on with the new value."
    ]
    assert json.loads(record.read_text())["knobs"]["rate"] == 0.2
    record.write_text("{")  # damaged: there is nothing to compare with
    train(tmp_path, 3, resume=True, settings=settings(rate=0.1))


def test_another_architecture(tmp_path):
    train(tmp_path, 1)
    with pytest.raises(ValueError, match=r"does not fit this run's network \(.*size mismatch.*\): resume with"):
        train(tmp_path, 2, resume=True, hidden=5)


@pytest.mark.parametrize(
    ("epoch", "note"),
    [
        (1, "Interrupted in epoch 1: no epoch was finished."),
        (3, "Interrupted in epoch 3: epoch 2 is kept, continue with --resume true."),
    ],
)
def test_interrupted_by_hand(tmp_path, unstopped, caplog, epoch, note):
    with caplog.at_level(logging.WARNING, "segbundles"), pytest.raises(SystemExit) as caught:
        train(tmp_path, 6, handlers=(Interrupt(epoch),))
    assert caught.value.code == 130
    assert note in caplog.messages
    path = tmp_path / "output/training.ckpt"
    assert {p.name for p in path.parent.glob("training*")} == {"training.log"} | ({path.name} if epoch > 1 else set())
    if epoch > 1:
        assert load(path)["trainer"]["epoch"] == epoch - 1
        assert_same_run(train(tmp_path, 5, resume=True), unstopped())


def test_interrupted_while_validating(tmp_path, caplog):
    made = build(tmp_path, 6)
    made.evaluator.add_event_handler(Events.EPOCH_STARTED(once=2), Interrupt(2))
    with caplog.at_level(logging.WARNING, "segbundles"), pytest.raises(SystemExit):
        made.trainer.run()
    assert "Interrupted in epoch 2: epoch 1 is kept, continue with --resume true." in caplog.messages
    assert load(made.path)["trainer"]["epoch"] == 1


def test_other_errors_pass_and_are_in_the_log(tmp_path):
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, 2, handlers=(Interrupt(1, ZeroDivisionError("a fault")),))
    assert "ERROR Traceback" in (log := (tmp_path / "output/training.log").read_text())
    assert log.endswith("ZeroDivisionError: a fault\n")


@pytest.mark.parametrize(("setting", "folder"), [("output_dir", "output"), ("ckpt_dir", "models")])
def test_folder_that_cannot_be_written_to(tmp_path, setting, folder):
    (tmp_path / folder).touch()
    message = rf"{setting} '.*{folder}' cannot be written to .*: give --{setting} another folder"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, 1)


class TestLoaderThatDoesNotInsist:
    """As MONAI Label adds it in front of the handlers of train.json."""

    @staticmethod
    def loading(folder, state, strict=False):
        made = build(folder, 1)
        torch.save(state(made.network.state_dict()), folder / "model.pt")
        loader = CheckpointLoader(str(folder / "model.pt"), {"model": made.network}, strict=strict, map_location="cpu")
        loader.attach(made.trainer)
        return made

    def test_a_file_of_which_nothing_fits_is_refused(self, tmp_path):
        made = self.loading(tmp_path, lambda state: {f"net.{k}": v for k, v in state.items()})
        message = (
            r"of another architecture: 4 of the 4 parameters of the Sequential .*0\.weight .* contain net\.0\.weight"
        )
        with pytest.raises(ValueError, match=message):
            made.trainer.run()
        assert not (tmp_path / "models" / "model.pt").exists()

    def test_what_stays_random_is_logged(self, tmp_path, caplog):
        self.loading(tmp_path, lambda state: {k: v for k, v in state.items() if k != "3.bias"}).trainer.run()
        assert (
            "1 of the 4 parameters of the Sequential are not in the weights loaded and start at random: 3.bias"
            in caplog.text
        )

    def test_the_right_file_is_taken_without_a_word(self, tmp_path, caplog):
        made = self.loading(tmp_path, lambda state: {k: v.half() for k, v in state.items()})
        made.trainer.run()
        assert "at random" not in caplog.text
        made.network.load_state_dict({}, strict=False)  # once the run has begun nothing is watched
