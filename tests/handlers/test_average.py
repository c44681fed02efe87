from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toy_run import build, load, train

from segbundles.handlers.average import WeightAverage
from segbundles.networks import load_weights


def test_the_average_of_known_weights() -> None:
    """By hand: weights 1, 2, 3, 4 with decays (taken as they are), 2/11, 3/12 and the limit of 2 epochs of 2 steps."""
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    average = WeightAverage(network, epochs=2)
    average.begin(SimpleNamespace(state=SimpleNamespace(epoch_length=2)))
    expected = [1.0, 2 - 2 / 11, 0.0, 0.0]
    expected[2] = 3 - 3 / 12 * (3 - expected[1])
    limit = math.exp(-1 / 4)
    assert limit > 4 / 13
    expected[3] = 4 - 4 / 13 * (4 - expected[2])
    for step, value in enumerate(expected):
        nn.init.constant_(network[0].weight, step + 1)
        network[1].running_mean.fill_(step + 1)
        network[1].num_batches_tracked.fill_(step)
        average.after_iteration(None)
        assert average.network[0].weight.item() == pytest.approx(value)
        assert average.network[1].running_mean.item() == pytest.approx(value)
        assert average.network[1].num_batches_tracked.item() == step
    for _ in range(200):
        average.after_iteration(None)
    nn.init.constant_(network[0].weight, 5.0)
    average.after_iteration(None)
    assert average.network[0].weight.item() == pytest.approx(5 - limit, abs=1e-4)
    assert network[0].weight.item() == 5.0


def test_the_average_is_validated_and_saved(tmp_path: Path) -> None:
    made = train(tmp_path / "a", 3, average_epochs=2)
    assert made.evaluator.network is made.run.average.network is not made.network
    saved, averaged = load(tmp_path / "a/models/model.pt"), made.run.average.network.state_dict()
    assert made.evaluator.state.best_metric_epoch in (1, 2, 3)
    again = build(tmp_path / "b", 1).network
    load_weights(again, tmp_path / "a/models/model.pt")
    plain = train(tmp_path / "c", 3)
    assert plain.evaluator.network is plain.network
    for name, value in plain.network.state_dict().items():
        assert torch.equal(value, made.network.state_dict()[name])  # averaging does not change the training
        assert not torch.equal(value, averaged[name])
        assert saved[name].shape == value.shape


def test_a_federated_client_does_not_average(tmp_path: Path) -> None:
    settings = SimpleNamespace(federated=True, write=lambda path: None, notes=[], knobs={}, facts={})
    made = build(tmp_path, 1, average_epochs=2, settings=settings)
    assert made.run.average is None
    assert made.evaluator.network is made.network
