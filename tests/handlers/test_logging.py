from __future__ import annotations

import logging
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import MeanDice, StatsHandler, TensorBoardStatsHandler, ValidationHandler, from_engine
from monai.losses import DiceLoss
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from segbundles.handlers import EpochLog, OverlayImageHandler
from segbundles.handlers.curves import TensorBoardWriter
from segbundles.handlers.epoch_log import LossTerms, _duration
from segbundles.losses import HybridLoss
from segbundles.transforms import LogitsToClassd


def hybrid(weight):
    loss = HybridLoss(DiceLoss(sigmoid=True))
    loss.set_region_weight(weight)
    return loss


def test_terms_of_a_hybrid_loss():
    loss = hybrid(0.75)
    terms = LossTerms(loss)
    target = torch.zeros(1, 1, 6, 6)
    target[..., 2:4, 2:4] = 1
    total = loss(torch.randn(1, 1, 6, 6, generator=torch.Generator().manual_seed(0)), target)
    found = terms([{"loss": total.item()}])
    assert list(found) == ["train_loss", "region", "boundary", "region_weight"]
    assert all(type(value) is float for value in found.values())
    assert found["region_weight"] == 0.75
    assert 0.75 * found["region"] + 0.25 * found["boundary"] == pytest.approx(found["train_loss"], rel=1e-5)


def test_a_term_that_was_not_computed_is_left_out_but_a_loss_of_nan_is_not():
    loss = hybrid(1.0)
    loss(torch.zeros(1, 1, 6, 6), torch.ones(1, 1, 6, 6))
    assert list(LossTerms(loss)([{"loss": 0.5}])) == ["train_loss", "region", "region_weight"]
    assert math.isnan(LossTerms(nn.MSELoss())([{"loss": torch.tensor(float("nan"))}])["train_loss"])
    assert LossTerms(nn.MSELoss())([{"loss": torch.tensor(0.25)}]) == {"train_loss": 0.25}


def items(count=4):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        image = torch.rand(1, 8, 6, 5, generator=generator)
        yield {"image": image, "label": (image > 0.5).float()}


def attach(log, engine):
    engine.add_event_handler(Events.STARTED, log.begin)
    engine.add_event_handler(Events.EPOCH_STARTED, log.begin_epoch)
    engine.add_event_handler(Events.ITERATION_COMPLETED, log.after_iteration)
    engine.add_event_handler(Events.EPOCH_COMPLETED, log.after_epoch)


def engines(epochs=4, interval=2):
    data = list(items())
    network = nn.Conv3d(1, 1, 1)
    loss = hybrid(1.0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.125)
    evaluator = SupervisedEvaluator(
        "cpu",
        DataLoader(Dataset(data), batch_size=2),
        network,
        postprocessing=LogitsToClassd("pred"),
        key_val_metric={"val_mean_dice": MeanDice(output_transform=from_engine(["pred", "label"]))},
    )
    terms = LossTerms(loss)
    trainer = SupervisedTrainer(
        "cpu",
        epochs,
        DataLoader(Dataset(data), batch_size=2),
        network,
        optimizer,
        loss,
        train_handlers=[
            ValidationHandler(interval, evaluator),
            StatsHandler(name="stats", output_transform=terms),
        ],
    )
    attach(EpochLog(terms, evaluator, optimizer), trainer)
    return trainer, evaluator


def test_epoch_log_says_all_in_a_line(caplog):
    trainer, evaluator = engines()
    losses = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output[0]["loss"]))
    with caplog.at_level(logging.INFO, "segbundles"):
        trainer.run()
    lines = [r.message for r in caplog.records if r.name == "segbundles"]
    assert len(lines) == 4
    number = r"\d\.\d{4}"
    for epoch, line in enumerate(lines, 1):
        mean = float(np.mean([float(x) for x in losses[2 * epoch - 2 : 2 * epoch]]))
        validated = rf", val_mean_dice {number}, best {number} \(epoch [24]\)" if epoch % 2 == 0 else ""
        assert re.fullmatch(
            rf"epoch {epoch}/4, train_loss {mean:.4f}, region {mean:.4f}, region_weight 1\.0000{validated}, "
            r"learning rate 1\.25e-01, \d+\.\d s, \d+ s left",
            line,
        ), line
    state = evaluator.state
    assert f"best {state.best_metric:.4f} (epoch {state.best_metric_epoch})" in lines[-1]


def test_epoch_log_of_a_resumed_run_and_without_the_rest(caplog, monkeypatch):
    """2 epochs of 3 were done before: 1 of 10 s is done now, none is left."""
    clock = iter([100.0, 100.0, 105.0, 110.0, 120.0, 250.0, 260.0, 400.0])
    monkeypatch.setattr("segbundles.handlers.epoch_log.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    log = EpochLog(LossTerms(nn.MSELoss()))  # 100
    engine = Engine(lambda *_: [{"loss": 2.0}])
    engine.add_event_handler(Events.STARTED, lambda e: setattr(e.state, "epoch", 2))
    attach(log, engine)
    with caplog.at_level(logging.INFO, "segbundles"):
        engine.run([0], max_epochs=4)
    # started at 100; epoch 3 from 105 to 110: 10 s an epoch, one left; epoch 4 from 120 to 250
    assert caplog.messages == [
        "epoch 3/4, train_loss 2.0000, 5.0 s, 10 s left",
        "epoch 4/4, train_loss 2.0000, 130.0 s, 0 s left",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (29.0, "29 s"), (31.0, "1 min"), (3540.0, "59 min"), (3600.0, "1 h 0 min"), (90000.0, "25 h 0 min")],
)
def test_duration(seconds, text):
    assert _duration(seconds) == text


def pictures(log_dir):
    events = EventAccumulator(str(log_dir), size_guidance={"images": 0}).Reload()
    return {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}


@pytest.mark.parametrize(
    ("max_cases", "expected"),
    [
        (1, {"validation/case_0": [2, 4]}),
        (3, {f"validation/case_{i}": [2, 4] for i in range(3)}),
        (9, {f"validation/case_{i}": [2, 4] for i in range(4)}),
    ],
)
def test_overlay_is_found_by_tensorboard_at_once(tmp_path, max_cases, expected):
    trainer, evaluator = engines()
    OverlayImageHandler(TensorBoardWriter(tmp_path), max_cases).attach(evaluator)
    trainer.run()
    assert pictures(tmp_path) == expected


def test_writer_makes_nothing_until_something_is_written(tmp_path):
    writer = TensorBoardWriter(tmp_path / "tensorboard")
    writer.flush()
    writer.close()
    trainer, _ = engines(epochs=1)
    TensorBoardStatsHandler(writer, output_transform=LossTerms(nn.MSELoss())).attach(trainer)
    assert not (tmp_path / "tensorboard").exists()
    trainer.run()
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2]


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("size", [(12, 8), (12, 8, 5)])
def test_picture_shows_the_slice_with_the_largest_truth(channels, size):
    truth = torch.zeros(1, *size, dtype=torch.uint8)
    truth[0, 2:6, 1:4] = 1 if len(size) == 2 else torch.tensor([0, 0, 0, 1, 0], dtype=torch.uint8)
    image = torch.zeros(channels, *size)
    image[:, 2:6, 1:4] = torch.tensor(1.0) if len(size) == 2 else torch.tensor([0.0, 0, 0, 1, 0])
    picture = OverlayImageHandler.picture(image, truth, torch.zeros_like(truth))
    assert picture.dtype == np.uint8
    height, width, colours = picture.shape
    assert (height / width, colours) == (8 / 12, 3)  # rows are the second axis
    step = width // 12
    inside = picture[2 * step + step // 2, 3 * step + step // 2]  # row 2, column 3
    assert inside.min() > 150
    assert picture[step // 2, -step // 2].max() < 100


@pytest.mark.parametrize("size", [(12, 8), (12, 8, 5)])
def test_picture_of_a_case_without_truth(size):
    nothing = torch.zeros(1, *size, dtype=torch.uint8)
    assert OverlayImageHandler.picture(torch.rand(1, *size), nothing, nothing).shape[2] == 3
    guess = nothing.clone()
    guess[0, 3:5, 3:5] = 1
    with_guess = OverlayImageHandler.picture(torch.zeros(1, *size), nothing, guess)
    assert with_guess.max() > 100


def test_curves_that_cannot_be_written_do_not_stop_the_run(tmp_path, caplog):
    (tmp_path / "in the way").touch()
    writer = TensorBoardWriter(tmp_path / "in the way")
    with caplog.at_level(logging.WARNING, "segbundles"):
        for step in range(3):
            writer.add_scalar("loss", 1.0, step)
        writer.flush()
        writer.close()
    (message,) = caplog.messages
    assert re.fullmatch(r"curves cannot be written to .*in the way \(.+\): there are no more\.", message)
