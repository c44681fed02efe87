from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.inferers import SimpleInferer, SlidingWindowInferer
from torch import nn

from segbundles.inferers import AutocastInferer
from segbundles.inferers import autocast as module


class Probe(nn.Module):
    """A convolution that remembers what it was asked to compute in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 1, 3, padding=1)
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        self.seen.append(x.dtype)
        return x


def cases(n: int = 2) -> Dataset:
    affine = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0]))
    images = [
        MetaTensor(torch.rand(1, 8, 8, 8), affine=affine, meta={"filename_or_obj": f"{i}.nrrd"}) for i in range(n)
    ]
    return Dataset([{"image": image, "label": (image > 0.5).float()} for image in images])


@pytest.mark.parametrize("inferer", [SimpleInferer(), SlidingWindowInferer(roi_size=(4, 8, 8), overlap=0.0)])
@pytest.mark.parametrize(("enabled", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_network_computes_in_bfloat16_and_output_is_float32(inferer, enabled, dtype):
    network = Probe()
    inputs = torch.rand(2, 1, 8, 8, 8)
    with torch.no_grad():
        out = AutocastInferer(inferer, enabled=enabled)(inputs, network)
        expected = network.conv(inputs)
    assert out.dtype == torch.float32
    assert set(network.seen) == {dtype}
    if isinstance(inferer, SimpleInferer):
        torch.testing.assert_close(out, expected, rtol=0.02 if enabled else 0.0, atol=0.02 if enabled else 0.0)
        assert torch.equal(out, expected) is not enabled


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: (x, 1), lambda y: y[0]),
        (lambda x: [x], lambda y: y[0]),
        (lambda x: {"pred": {"deep": x}}, lambda y: y["pred"]["deep"]),
    ],
)
def test_nested_outputs_become_float32(wrap, unwrap):
    network = Probe()
    out = AutocastInferer(SimpleInferer())(torch.rand(1, 1, 4, 4, 4), lambda x: wrap(network(x)))
    assert type(out) is type(wrap(torch.zeros(1)))
    assert unwrap(out).dtype == torch.float32
    assert network.seen == [torch.bfloat16]


def test_integer_outputs_stay():
    out = AutocastInferer(SimpleInferer())(torch.rand(1, 1, 4), lambda x: x.argmax(1))
    assert out.dtype == torch.int64


def test_arguments_reach_the_inferer():
    out = AutocastInferer(SimpleInferer())(torch.ones(1, 1, 2), lambda x, a, b: x * a + b, 2, b=3)
    assert out.flatten().tolist() == [5.0, 5.0]


def test_trainer_trains_in_bfloat16():
    torch.manual_seed(0)
    network = Probe()
    losses = []

    def loss_function(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        assert pred.dtype == torch.float32
        losses.append(nn.functional.binary_cross_entropy_with_logits(pred, target))
        return losses[-1]

    SupervisedTrainer(
        device="cpu",
        max_epochs=20,
        train_data_loader=DataLoader(cases(), batch_size=2),
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), 0.05),
        loss_function=loss_function,
        inferer=AutocastInferer(SimpleInferer()),
    ).run()
    assert set(network.seen) == {torch.bfloat16}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in network.parameters())
    assert losses[-1] < 0.9 * losses[0]


def test_evaluator_keeps_meta_data():
    network = Probe()
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(cases(), batch_size=2),
        network=network,
        inferer=AutocastInferer(SlidingWindowInferer(roi_size=(4, 8, 8))),
        decollate=False,
    )
    evaluator.run()
    assert set(network.seen) == {torch.bfloat16}
    preds = decollate_batch(evaluator.state.output["pred"])
    assert [p.meta["filename_or_obj"] for p in preds] == ["0.nrrd", "1.nrrd"]
    assert [p.dtype for p in preds] == [torch.float32] * 2
    assert preds[1].affine.diagonal().tolist() == [1.0, 2.0, 3.0, 1.0]


def test_device_without_bfloat16_runs_in_full_precision_and_says_so_once(caplog):
    module._has_bfloat16.cache_clear()
    inferer = AutocastInferer(SimpleInferer())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            out = inferer(torch.rand(1, 1, 4, device="meta"), nn.Conv1d(1, 1, 1, device="meta"))
    assert out.dtype == torch.float32
    assert [r.message for r in caplog.records] == [
        "Device 'meta' does not compute in bfloat16: mixed precision (amp) is off."
    ]


def test_copies_and_pickles():
    inferer = AutocastInferer(SlidingWindowInferer(roi_size=(4, 8, 8)), enabled=False)
    for other in (copy.deepcopy(inferer), pickle.loads(pickle.dumps(inferer))):
        assert other.enabled is False
        assert other.inferer.roi_size == (4, 8, 8)


def test_a_network_that_was_not_loaded_is_refused_and_a_good_one_looked_at_once(tmp_path, monkeypatch):
    network, other = Probe(), Probe()
    torch.save(network.state_dict(), tmp_path / "model.pt")
    inferer = AutocastInferer(SimpleInferer(), ckpt_dir=tmp_path)
    with pytest.raises(ValueError, match=r"the Probe given was not loaded with any weights in .*the values differ"):
        inferer(torch.ones(1, 1, 2, 2, 2), other)
    assert other.seen == []

    looked = []
    monkeypatch.setattr(module, "check_loaded", lambda *arguments: looked.append(arguments))
    for _ in range(2):
        inferer(torch.ones(1, 1, 2, 2, 2), network)
    assert looked == [(network, tmp_path)]
    inferer(torch.ones(1, 1, 2, 2, 2), other)
    assert len(looked) == 2
    inferer(torch.ones(1, 1, 2, 2, 2), torch.jit.script(nn.Conv3d(1, 1, 1)))  # holds its weights itself
    inferer(torch.ones(1, 1, 2, 2, 2), lambda x: x)
    assert len(looked) == 2
    assert pickle.loads(pickle.dumps(inferer)).ckpt_dir == tmp_path
