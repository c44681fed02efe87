from __future__ import annotations

import copy
import logging
import pickle
from typing import NamedTuple

import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.inferers import SimpleInferer, SlidingWindowInferer
from torch import nn

from segbundles.inferers import AutocastInferer, autocast


@pytest.fixture(params=[True, False], ids=["bfloat16", "no bfloat16"])
def expected_dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """What a network computes in on a processor with and without instructions for bfloat16."""
    monkeypatch.setattr(autocast, "cpu_has_bfloat16", lambda: request.param)
    return torch.bfloat16 if request.param else torch.float32


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
@pytest.mark.parametrize("enabled", [True, False])
def test_network_computes_in_bfloat16_and_output_is_float32(inferer, enabled, expected_dtype):
    torch.manual_seed(0)
    network = Probe()
    inputs = torch.rand(2, 1, 8, 8, 8)
    with torch.no_grad():
        out = AutocastInferer(inferer, enabled=enabled)(inputs, network)
        expected = network.conv(inputs)
    mixed = enabled and expected_dtype == torch.bfloat16
    assert out.dtype == torch.float32
    assert set(network.seen) == {torch.bfloat16 if mixed else torch.float32}
    if isinstance(inferer, SimpleInferer):
        error = (out - expected).abs().max()
        assert 1e-4 < error < 0.02 if mixed else error < 1e-5


class Outputs(NamedTuple):
    logits: torch.Tensor
    size: int


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: (x, 1), lambda y: y[0]),
        (lambda x: Outputs(x, 1), lambda y: y.logits),
        (lambda x: [x], lambda y: y[0]),
        (lambda x: {"pred": {"deep": x}}, lambda y: y["pred"]["deep"]),
    ],
)
def test_nested_outputs_become_float32(wrap, unwrap, expected_dtype):
    network = Probe()
    out = AutocastInferer(SimpleInferer())(torch.rand(1, 1, 4, 4, 4), lambda x: wrap(network(x)))
    assert type(out) is type(wrap(torch.zeros(1)))
    assert unwrap(out).dtype == torch.float32
    assert network.seen == [expected_dtype]


def test_integer_outputs_stay():
    out = AutocastInferer(SimpleInferer())(torch.rand(1, 1, 4), lambda x: x.argmax(1))
    assert out.dtype == torch.int64


def test_arguments_reach_the_inferer():
    out = AutocastInferer(SimpleInferer())(torch.ones(1, 1, 2), lambda x, a, b: x * a + b, 2, b=3)
    assert out.flatten().tolist() == [5.0, 5.0]


def test_trainer_trains_in_bfloat16(expected_dtype):
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
    assert set(network.seen) == {expected_dtype}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in network.parameters())
    assert losses[-1] < 0.9 * losses[0]


def test_evaluator_keeps_meta_data(expected_dtype):
    network = Probe()
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(cases(), batch_size=2),
        network=network,
        inferer=AutocastInferer(SlidingWindowInferer(roi_size=(4, 8, 8))),
        decollate=False,
    )
    evaluator.run()
    assert set(network.seen) == {expected_dtype}
    preds = decollate_batch(evaluator.state.output["pred"])
    assert [p.meta["filename_or_obj"] for p in preds] == ["0.nrrd", "1.nrrd"]
    assert [p.dtype for p in preds] == [torch.float32] * 2
    assert preds[1].affine.diagonal().tolist() == [1.0, 2.0, 3.0, 1.0]


@pytest.mark.parametrize(("device", "name"), [("cpu", "The processor"), ("meta", "Device 'meta'")])
def test_a_device_without_bfloat16_is_named_once(device, name, caplog, monkeypatch):
    monkeypatch.setattr(autocast, "cpu_has_bfloat16", lambda: False)
    autocast._say_off.cache_clear()
    inferer = AutocastInferer(SimpleInferer())
    with caplog.at_level(logging.INFO, "segbundles"):
        for _ in range(2):
            out = inferer(torch.rand(1, 1, 4, device=device), nn.Conv1d(1, 1, 1, device=device))
    assert out.dtype == torch.float32
    message = f"{name} has no instructions for bfloat16: everything runs in full precision, as with amp false."
    assert caplog.messages == [message]


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "arm64", "neon": True, "bf16": False}, False),
        ({"architecture": "arm64", "neon": True, "bf16": True}, True),
    ],
)
def test_what_processors_have_instructions_for_bfloat16(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert autocast.cpu_has_bfloat16() is expected


@pytest.mark.parametrize(("name", "expected"), [("avx512_bf16", True), ("amx_tile", True), ("avx512", False)])
def test_what_older_versions_of_torch_know_about_the_processor(name, expected, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for other in ("avx512_bf16", "amx_tile", "avx512"):
        monkeypatch.setattr(torch.cpu, f"_is_{other}_supported", lambda found=other == name: found, raising=False)
    assert autocast.cpu_has_bfloat16() is expected
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert autocast.cpu_has_bfloat16() is False


def test_copies_and_pickles():
    inferer = AutocastInferer(SlidingWindowInferer(roi_size=(4, 8, 8)), enabled=False)
    for other in (copy.deepcopy(inferer), pickle.loads(pickle.dumps(inferer))):
        assert other.enabled is False
        assert other.inferer.roi_size == (4, 8, 8)
