from __future__ import annotations

import logging
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import CacheDataset, DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import CheckpointLoader, MeanDice, ParamSchedulerHandler, ValidationHandler, from_engine
from monai.transforms import Compose, EnsureTyped, RandAffined, RandGaussianNoised
from torch import nn
from torch.optim import lr_scheduler as schedules

from segbundles.handlers import BestWeightsSaver, EarlyStopHandler, LrScheduleHandler, RunLoader, RunSaver, can_resume
from segbundles.transforms import LogitsToClassd

SCHEDULES = {
    "polynomial": lambda o: schedules.PolynomialLR(o, total_iters=7, power=0.9),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, mode="max", factor=0.5, patience=0),
    "steps": lambda o: schedules.MultiStepLR(o, milestones=[2, 4]),
    "one-cycle": lambda o: schedules.OneCycleLR(o, max_lr=0.1, total_steps=16),
    "cosine": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, total_iters=2), schedules.CosineAnnealingLR(o, T_max=5)], milestones=[2]
    ),
}


class Loss(nn.Module):
    weight = 0.0

    def set_weight(self, value):
        self.weight = value

    def forward(self, pred, target):
        return self.weight * nn.functional.binary_cross_entropy_with_logits(pred, target) + pred.square().mean()


def items(count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        image = torch.rand(1, 8, 8, generator=generator)
        yield {"image": image, "label": (image > 0.5).float()}


def build(
    folder,
    max_epochs,
    resume=False,
    num_workers=0,
    schedule="polynomial",
    patience=None,
    val_interval=1,
    seed=3,
    batch_size=2,
    hidden=6,
    handlers=(),
):
    """A run as the bundles configure it, on 2D noise."""
    torch.manual_seed(seed)  # what set_determinism does at the start of a bundle
    network = nn.Sequential(nn.Linear(8, hidden), nn.Dropout(0.5), nn.ReLU(), nn.Linear(hidden, 8))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    scheduler = SCHEDULES[schedule](optimizer)
    loss = Loss()
    transforms = [
        EnsureTyped(["image", "label"]),
        RandAffined(["image", "label"], prob=0.8, rotate_range=0.5, translate_range=2, padding_mode="border"),
        RandGaussianNoised("image", prob=0.7, std=0.3),
    ]
    dataset = CacheDataset(list(items(4, 0)), Compose(transforms), cache_rate=1.0, num_workers=2, progress=False)
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(CacheDataset(list(items(2, 1)), EnsureTyped(["image"]), progress=False)),
        network=network,
        postprocessing=LogitsToClassd("pred"),
        key_val_metric={"dice": MeanDice(output_transform=from_engine(["pred", "label"]))},
    )
    objects = {"network": network, "optimizer": optimizer, "lr_scheduler": scheduler, "evaluator": evaluator}
    path = folder / "output" / "training.ckpt"
    stopper = EarlyStopHandler(patience, evaluator)
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=max_epochs,
        train_data_loader=DataLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=num_workers),
        network=network,
        loss_function=loss,
        optimizer=optimizer,
        train_handlers=[
            RunLoader(path, objects, dataset, seed, resume),
            ParamSchedulerHandler(
                loss.set_weight,
                "linear",
                {"initial_value": 0.0, "step_constant": 0, "step_max_value": 6, "max_value": 1.0},
                epoch_level=True,
                event=Events.EPOCH_STARTED,
            ),
            ValidationHandler(val_interval, evaluator),
            LrScheduleHandler(scheduler, evaluator, epoch_level=schedule != "one-cycle"),
            BestWeightsSaver(folder / "models", network, evaluator),
            stopper,
            *handlers,
            RunSaver(path, objects),
        ],
    )
    return SimpleNamespace(trainer=trainer, evaluator=evaluator, network=network, path=path, stopper=stopper, loss=loss)


def run(folder, max_epochs, **arguments):
    made = build(folder, max_epochs, **arguments)
    # a new process starts with other random numbers than those at which the last one stopped
    torch.manual_seed(random.randrange(2**30))
    np.random.seed(random.randrange(2**30))
    made.trainer.run()
    return made


def equal(a, b, name="state"):
    assert type(a) is type(b), name
    if isinstance(a, dict):
        assert list(a) == list(b), name
        for key in a:
            equal(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), name
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            equal(x, y, f"{name}.{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    else:
        assert a == b, name


def load(path):
    return torch.load(path, weights_only=True)


def same_run(one, other):
    """All that a run leaves is equal, bit for bit."""
    equal(load(one.path), load(other.path))
    equal(one.network.state_dict(), other.network.state_dict())
    models = [load(made.path.parents[1] / "models/model.pt") for made in (one, other)]
    equal(*models)
    for name in ("best_metric", "best_metric_epoch"):
        assert getattr(one.evaluator.state, name) == getattr(other.evaluator.state, name)
    assert one.trainer.state.resumable == other.trainer.state.resumable


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    """Runs of 5 epochs that were never stopped, made when first asked for."""
    runs = {}

    def get(max_epochs=5, **arguments):
        key = (max_epochs, *sorted(arguments.items()))
        if key not in runs:
            runs[key] = run(tmp_path_factory.mktemp("unstopped"), max_epochs, **arguments)
        return runs[key]

    return get


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_resumed_after_any_epoch(tmp_path, unstopped, stop):
    arguments = {"schedule": "plateau", "patience": 5, "val_interval": 2}
    run(tmp_path, stop, **arguments)
    resumed = run(tmp_path, 5, resume=True, **arguments)
    assert resumed.trainer.state.epoch == 5
    assert resumed.trainer.state.iteration == 10
    same_run(resumed, unstopped(**arguments))


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "plateau"])
def test_resumed_with_any_schedule(tmp_path, unstopped, schedule):
    run(tmp_path, 3, schedule=schedule)
    same_run(run(tmp_path, 5, resume=True, schedule=schedule), unstopped(schedule=schedule))


def test_resumed_with_workers(tmp_path, unstopped):
    run(tmp_path, 1, num_workers=2)
    same_run(run(tmp_path, 3, resume=True, num_workers=2), unstopped(3, num_workers=2))


def test_stopped_after_every_epoch(tmp_path, unstopped):
    for epoch in range(1, 6):
        last = run(tmp_path, epoch, resume=epoch > 1)
    same_run(last, unstopped())


def test_the_comparison_can_fail(tmp_path, unstopped):
    """Other seeds and another order of epochs give other weights; epochs differ among themselves."""
    other = run(tmp_path, 5, seed=4)
    assert not torch.equal(other.network[0].weight, unstopped().network[0].weight)
    drawn = []
    loader = RunLoader(tmp_path / "x", {}, seed=3)
    engine = Engine(lambda *_: None)
    for epoch in (1, 2, 1):
        engine.state.epoch = epoch
        loader.seed_epoch(engine)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[2]
    assert not set(drawn[0]) & set(drawn[1])


def test_early_stop_goes_on_counting(tmp_path, unstopped):
    """The learning rate is 0: no validation is better than the first; patience 3 ends after the fourth."""
    frozen = {"patience": 3, "schedule": "polynomial", "handlers": (Freeze(),)}
    never = run(tmp_path / "a", 6, **frozen)
    assert never.trainer.state.epoch == 4
    assert never.trainer.state.resumable["early_stop"]["counter"] == 3
    run(tmp_path / "b", 3, **frozen)
    resumed = run(tmp_path / "b", 6, resume=True, **frozen)
    same_run(resumed, never)


def test_a_run_that_early_stopping_ended_stays_ended(tmp_path, caplog):
    frozen = {"patience": 2, "handlers": (Freeze(),)}
    ended = run(tmp_path, 6, **frozen)
    before = load(ended.path)
    with caplog.at_level(logging.WARNING, "segbundles"):
        again = run(tmp_path, 6, resume=True, **frozen)
    assert again.trainer.state.epoch == ended.trainer.state.epoch == 3
    equal(load(again.path), before)
    assert "2 validations brought nothing better: nothing to resume." in caplog.messages
    more = run(tmp_path, 6, resume=True, patience=3, handlers=(Freeze(),))
    assert more.trainer.state.epoch == 4


class Freeze:
    """Keeps the weights as they are."""

    def attach(self, engine):
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine):
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0


def test_more_epochs_than_asked_for_are_done(tmp_path, caplog):
    run(tmp_path, 3)
    with caplog.at_level(logging.WARNING, "segbundles"):
        made = run(tmp_path, 2, resume=True)
    assert made.trainer.state.epoch == 3
    assert "3 epochs are done and max_epochs is 2: nothing to do." in caplog.messages


@pytest.mark.parametrize("max_epochs", [2, 3])
def test_another_number_of_epochs_is_said(tmp_path, caplog, max_epochs):
    with pytest.raises(SystemExit):
        run(tmp_path, 2, handlers=(Interrupt(2),))
    with caplog.at_level(logging.WARNING, "segbundles"):
        run(tmp_path, max_epochs, resume=True)
    said = "max_epochs was 2, is 3: a learning rate schedule made for 2 epochs goes on as it was made, and may have"
    assert any(message.startswith(said) for message in caplog.messages) is (max_epochs == 3)


def test_another_batch_size_gives_whole_epochs(tmp_path):
    """3 epochs of 2 iterations, then whole ones of 4."""
    run(tmp_path, 3)
    seen = []

    class Count:
        def attach(self, engine):
            engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.epoch))

    made = run(tmp_path, 5, resume=True, batch_size=1, handlers=(Count(),))
    assert seen == [4] * 4 + [5] * 4
    assert made.trainer.state.iteration == 20


@pytest.mark.parametrize(
    ("resume", "there", "expected"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_initial_weights_are_for_runs_that_start_afresh(tmp_path, resume, there, expected):
    path = tmp_path / "training.ckpt"
    if there:
        path.touch()
    assert can_resume(path, resume) is expected


def test_nothing_to_resume_warns_and_starts_afresh(tmp_path, unstopped, caplog):
    with caplog.at_level(logging.WARNING, "segbundles"):
        same_run(run(tmp_path, 5, resume=True), unstopped())
    assert f"Nothing to resume at {tmp_path}/output/training.ckpt: starting from the first epoch." in caplog.messages


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda p: p.write_bytes(p.read_bytes()[:1000]),
            r"training\.ckpt cannot be resumed from \(\w+\): delete it to",
        ),
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
    spoil(run(tmp_path, 1).path)
    with caplog.at_level(logging.ERROR, "segbundles"), pytest.raises(ValueError, match=message):
        run(tmp_path, 2, resume=True)
    assert len([r for r in caplog.records if r.name == "segbundles"]) == 1


def test_another_architecture(tmp_path):
    run(tmp_path, 1)
    with pytest.raises(
        ValueError, match=r"does not fit this run's network \(.*0\.weight|size mismatch.*\): resume with"
    ):
        run(tmp_path, 2, resume=True, hidden=5)


class Interrupt:
    def __init__(self, epoch, error=KeyboardInterrupt):
        self.epoch, self.error = epoch, error

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine):
        if engine.state.epoch == self.epoch:
            raise self.error


@pytest.mark.parametrize(
    ("epoch", "note"),
    [
        (1, "Interrupted in epoch 1: no epoch was finished."),
        (3, "Interrupted in epoch 3: epoch 2 is kept, go on with --resume true."),
    ],
)
def test_interrupted_by_hand(tmp_path, unstopped, caplog, epoch, note):
    with caplog.at_level(logging.WARNING, "segbundles"), pytest.raises(SystemExit) as caught:
        run(tmp_path, 6, handlers=(Interrupt(epoch),))
    assert caught.value.code == 130
    assert note in caplog.messages
    path = tmp_path / "output/training.ckpt"
    assert {p.name for p in path.parent.iterdir()} == {"training.log"} | ({path.name} if epoch > 1 else set())
    if epoch > 1:
        assert load(path)["trainer"]["epoch"] == epoch - 1
        same_run(run(tmp_path, 5, resume=True), unstopped())


def test_interrupted_while_validating(tmp_path, caplog):
    made = build(tmp_path, 6)
    made.evaluator.add_event_handler(Events.EPOCH_STARTED(once=2), Interrupt(2))
    with caplog.at_level(logging.WARNING, "segbundles"), pytest.raises(SystemExit):
        made.trainer.run()
    assert "Interrupted in epoch 2: epoch 1 is kept, go on with --resume true." in caplog.messages
    assert load(made.path)["trainer"]["epoch"] == 1


def test_other_errors_pass(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, 2, handlers=(Interrupt(1, ZeroDivisionError),))


def test_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "output").touch()
    with pytest.raises(ValueError, match=r"output_dir '.*output' cannot be written to .*: give --output_dir another"):
        run(tmp_path, 1)


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
            r"of another architecture: 4 of the 4 parameters of the Sequential are .*, 0\.weight .* but net\.0\.weight"
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
        made.network.load_state_dict({}, strict=False)  # in a run's course nothing is watched
