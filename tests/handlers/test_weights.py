from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from ignite.metrics import Metric
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import ValidationHandler
from torch import nn

from segbundles.facts import facts_path, read_facts, sha256
from segbundles.handlers import TrainingRun, WeightsLoader, save_weights
from segbundles.transforms import LogitsToClassd


class Scores(Metric):
    """One given score a validation."""

    def __init__(self, scores):
        self.scores = list(scores)
        super().__init__()

    def reset(self):
        pass

    def update(self, output):
        pass

    def iteration_completed(self, engine):
        pass

    def compute(self):
        return self.scores.pop(0)


class Shift(nn.Module):
    """A weight that tells the epoch it was saved in: each adds 1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.weight + 0 * x


def train(folder, scores, epochs, resume=False, interval=1, network=None):
    """SGD at rate 1 on -weight: the weight is the epoch's number."""
    network = network or Shift()
    data = [{"image": torch.zeros(1, 1, 4, 4), "label": torch.zeros(1, 1, 4, 4)}]
    evaluator = SupervisedEvaluator(
        "cpu", data, network, postprocessing=LogitsToClassd("pred"), key_val_metric={"score": Scores(scores)}
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)

    def loss(pred, _):
        return -pred.mean()

    trainer = SupervisedTrainer(
        "cpu",
        epochs,
        data,
        network,
        optimizer,
        loss,
        train_handlers=[
            TrainingRun(folder, folder / "models", network, optimizer, loss, evaluator, resume=resume),
            ValidationHandler(interval, evaluator),
        ],
    )
    trainer.run()
    return trainer


def weight(folder, name="model.pt"):
    state = torch.load(folder / "models" / name, weights_only=True)
    assert list(state) == ["weight"]
    assert state["weight"].dtype == torch.float16
    return state["weight"].item()


def names(folder):
    return sorted(p.name for p in (folder / "models").glob("[!.]*"))


@pytest.mark.parametrize(
    ("scores", "interval", "best"),
    [([0.1, 0.5, 0.3, 0.4], 1, 2), ([0.1, 0.2, 0.3, 0.4], 1, 4), ([0.4, 0.3], 2, 2), ([-2.0, -3.0, -3.0, -4.0], 1, 1)],
)
def test_the_best_weights_are_kept(tmp_path, scores, interval, best):
    trainer = train(tmp_path, scores, 4, interval=interval)
    assert weight(tmp_path) == best
    assert trainer.state.resumable["saved_epoch"] == best
    assert names(tmp_path) == ["model.pt"]


def test_the_file_replaced_is_kept_once_a_run(tmp_path):
    train(tmp_path, [0.1, 0.2, 0.3], 3)  # three bests, no older file
    assert names(tmp_path) == ["model.pt"]
    train(tmp_path, [0.5, 0.6], 2)
    assert (weight(tmp_path), weight(tmp_path, "model_previous.pt")) == (2, 3)
    train(tmp_path, [0.7, 0.8, 0.9, 1.0, 1.1], 5)
    assert (weight(tmp_path), weight(tmp_path, "model_previous.pt")) == (5, 2)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_keeps_the_previous_file(tmp_path, stop):
    """No better validation before epoch 2, so the older file is replaced before or after the stop."""
    train(tmp_path, [0.1, 0.2, 0.3], 3)
    scores = [0.5, 0.6, 0.7, 0.8]
    train(tmp_path, scores[:stop], stop)
    train(tmp_path, scores[stop:], 4, resume=True)
    assert (weight(tmp_path), weight(tmp_path, "model_previous.pt")) == (4, 3)


def test_the_older_file_is_kept_when_the_first_best_comes_after_the_stop(tmp_path):
    train(tmp_path, [0.1, 0.2, 0.3], 3)
    with pytest.raises(IndexError):  # the score of epoch 2 is missing: stopped in its validation
        train(tmp_path, [], 2, interval=2)
    train(tmp_path, [0.9], 2, resume=True, interval=2)
    assert (weight(tmp_path), weight(tmp_path, "model_previous.pt")) == (2, 3)


def test_without_validation_the_last_weights_are_kept(tmp_path, caplog):
    train(tmp_path, [0.1], 1)
    with caplog.at_level(logging.WARNING, "segbundles"):
        train(tmp_path, [], 3, interval=10)
    assert (weight(tmp_path), weight(tmp_path, "model_previous.pt")) == (3, 1)
    assert "No validation gave a metric: the weights of the last epoch are kept." in caplog.messages
    train(tmp_path, [], 5, interval=10, resume=True)  # and again, without pushing out the previous file
    assert (weight(tmp_path), weight(tmp_path, "model_previous.pt")) == (5, 1)


def put(folder, value, **facts):
    """Weights with facts, as a training or a bundle brings them."""
    network = Shift()
    network.weight.data.fill_(value)
    save_weights(network, path := folder / "models" / "model.pt", keep_previous=True)
    facts_path(path).write_text(json.dumps({"knobs": {"value": value}, "sha256": sha256(path), **facts}))


def facts(folder, name):
    """The value that the facts of a file tell; None without facts."""
    read = read_facts(folder / "models" / name)
    return read and read["knobs"]["value"]


def test_facts_go_with_the_weights_they_are_about(tmp_path):
    (tmp_path / "models").mkdir()
    put(tmp_path, 1)
    put(tmp_path, 2)
    assert (facts(tmp_path, "model.pt"), facts(tmp_path, "model_previous.pt")) == (2, 1)
    train(tmp_path, [0.1], 1)  # no settings, so no facts
    assert (weight(tmp_path, "model_previous.pt"), facts(tmp_path, "model_previous.pt")) == (2, 2)
    assert names(tmp_path) == ["model.pt", "model_previous.json", "model_previous.pt"]
    train(tmp_path, [0.1], 1)
    assert names(tmp_path) == ["model.pt", "model_previous.pt"]


def test_shipped_weights_are_kept_for_good(tmp_path):
    (tmp_path / "models").mkdir()
    put(tmp_path, 1, shipped=True)
    put(tmp_path, 2)
    put(tmp_path, 3, shipped=True)
    train(tmp_path, [0.1, 0.2], 2)
    assert (weight(tmp_path, "model_shipped.pt"), facts(tmp_path, "model_shipped.pt")) == (1, 1)
    assert (weight(tmp_path, "model_previous.pt"), weight(tmp_path)) == (3, 2)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"shipped": true, "sha256": "of others"}', '{"shipped": false}'])
def test_other_facts_do_not_make_weights_shipped(tmp_path, text):
    train(tmp_path, [0.1], 1)
    (tmp_path / "models/model.json").write_text(text)
    train(tmp_path, [0.1], 1)
    assert names(tmp_path) == ["model.pt", "model_previous.json", "model_previous.pt"]


@pytest.mark.parametrize("number", range(5))
def test_a_crash_never_leaves_wrong_facts_beside_weights(tmp_path, monkeypatch, number):
    """Stopped at any rename, the facts of each file are its own or absent."""
    (tmp_path / "models").mkdir()
    put(tmp_path, 1)
    put(tmp_path, 2, shipped=True)
    count, replace = itertools.count(), Path.replace

    def stopped(path, target):
        if next(count) == number:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", stopped)
    network = Shift()
    network.weight.data.fill_(3)
    with pytest.raises(KeyboardInterrupt):
        save_weights(network, tmp_path / "models/model.pt", keep_previous=True)
    monkeypatch.undo()
    assert weight(tmp_path) == 2
    for path in (tmp_path / "models").glob("model*.pt"):
        assert facts(tmp_path, path.name) in (None, weight(tmp_path, path.name))
    save_weights(network, tmp_path / "models/model.pt", keep_previous=True)
    assert (weight(tmp_path), weight(tmp_path, "model_previous.pt"), weight(tmp_path, "model_shipped.pt")) == (3, 2, 2)


def test_weights_that_are_not_finite_are_refused(tmp_path, caplog):
    train(tmp_path, [0.1], 1)
    train(tmp_path, [0.1, 0.2], 2)
    network = Shift()
    network.weight.data.fill_(float("nan"))
    with pytest.raises(
        ValueError, match=r"weights weight are not finite: .*model\.pt is kept as it was\. Try a smaller"
    ):
        train(tmp_path, [0.1], 1, network=network)
    assert (weight(tmp_path), weight(tmp_path, "model_previous.pt")) == (2, 1)
    assert names(tmp_path) == ["model.pt", "model_previous.pt"]


def test_there_is_a_complete_file_at_every_moment(tmp_path, monkeypatch):
    train(tmp_path, [0.1], 1)
    seen, replace = [], Path.replace

    def watched(path, target):
        seen.append(weight(tmp_path))
        found = replace(path, target)
        seen.append(weight(tmp_path))
        return found

    monkeypatch.setattr(Path, "replace", watched)
    network = Shift()
    network.weight.data.fill_(2)
    save_weights(network, tmp_path / "models/model.pt", keep_previous=True)
    assert seen == [1, 1, 1, 2]  # the previous file, then the new one
    assert weight(tmp_path, "model_previous.pt") == 1


def test_a_write_that_fails_keeps_both_files(tmp_path, monkeypatch):
    train(tmp_path, [0.1], 1)
    train(tmp_path, [0.1, 0.2], 2)

    def full(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match=r"cannot write .*model\.pt \(PytorchStreamWriter failed.*choose another"):
        save_weights(Shift(), tmp_path / "models/model.pt", keep_previous=True)
    assert (weight(tmp_path), weight(tmp_path, "model_previous.pt")) == (2, 1)
    assert names(tmp_path) == ["model.pt", "model_previous.pt"]


def test_what_half_precision_cannot_hold_keeps_its_own(tmp_path):
    network = nn.BatchNorm1d(2)
    network.running_var[:] = torch.tensor([1.0, 1e6])
    save_weights(network, tmp_path / "m.pt")
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    assert state["running_var"].tolist() == [1.0, 1e6]
    assert state["weight"].dtype == torch.float16
    assert state["num_batches_tracked"].dtype == torch.int64
    copy = nn.BatchNorm1d(2)
    WeightsLoader(tmp_path / "m.pt", copy)()
    assert copy.running_var.tolist() == [1.0, 1e6]


def test_a_wrapped_network_is_saved_and_loaded_under_its_own_names(tmp_path):
    wrapped = nn.DataParallel(nn.Linear(2, 1))
    save_weights(wrapped, tmp_path / "m.pt")
    assert list(torch.load(tmp_path / "m.pt", weights_only=True)) == ["weight", "bias"]
    other = nn.DataParallel(nn.Linear(2, 1))
    WeightsLoader(tmp_path / "m.pt", other)()
    assert torch.equal(other.module.weight, wrapped.module.weight.half().float())


@pytest.mark.parametrize("training", [True, False])
def test_loader(tmp_path, caplog, training):
    source, target = nn.Linear(3, 1), nn.Linear(3, 1).train(training)
    save_weights(source, tmp_path / "m.pt")
    engine = Engine(lambda *_: None)
    WeightsLoader(tmp_path / "m.pt", target).attach(engine)
    with caplog.at_level(logging.INFO, "segbundles"):
        engine.run([0])
    assert torch.equal(target.weight, source.weight.half().float())
    assert target.training is training
    assert f"Loaded weights from {tmp_path}/m.pt" in caplog.messages


def test_loader_of_the_first_file_of_a_list_and_of_none(tmp_path):
    source, target = nn.Linear(3, 1), nn.Linear(3, 1)
    save_weights(source, tmp_path / "m.pt")
    for nothing in (None, []):
        WeightsLoader(nothing, target)()
    assert not torch.equal(target.weight, source.weight.half().float())
    WeightsLoader([str(tmp_path / "m.pt"), tmp_path / "none.pt"], target)()
    assert torch.equal(target.weight, source.weight.half().float())


def test_loader_refuses_when_the_engine_starts(tmp_path):
    engine = Engine(lambda *_: pytest.fail("work was done before the weights were looked at"))
    WeightsLoader(tmp_path / "no.pt", nn.Linear(1, 1)).attach(engine)
    with pytest.raises(ValueError, match=r"there are no weights at .*no\.pt"):
        engine.run([0])


def test_a_tensor_of_several_names_is_stored_once(tmp_path):
    layer = nn.Linear(300, 300)
    network = nn.ModuleDict({"first": layer, "again": layer, "other": nn.Linear(300, 300)})
    save_weights(network, tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert list(state) == list(network.state_dict())
    assert 2 * 300 * 301 * 2 < (tmp_path / "model.pt").stat().st_size < 2.2 * 300 * 301 * 2
    for name, value in network.state_dict().items():
        assert torch.equal(state[name], value.half())
