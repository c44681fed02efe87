from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from segbundles.inferers import AutocastInferer, autocast
from segbundles.networks import engine, use_engine


class Net(nn.Sequential):
    """Two convolutions with a batch norm between them, which must be exported in evaluation mode."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
        self[1].running_mean.fill_(0.1)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(params=["onnx reference", "openvino"])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An engine: OpenVINO where it is installed, and the slow one of the ``onnx`` package."""
    if request.param == "openvino":
        pytest.importorskip("openvino")
        return "openvino"
    reference = pytest.importorskip("onnx.reference")

    def start(path: Path, half: bool):
        run = reference.ReferenceEvaluator(str(path)).run
        return lambda x: run(None, {"image": x})[0]

    monkeypatch.setitem(engine.ENGINES, "onnx", start)
    return "onnx"


def exports(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_same_logits_at_any_size_and_the_export_is_kept(
    network: nn.Module, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images = [torch.randn(1, 1, 8, 8), torch.randn(3, 1, 16, 8)]
    with torch.no_grad():
        expected = [network(x) for x in images]
    weights = tmp_path / "model.pt"
    state = network.state_dict()
    assert use_engine(network, name, weights) is network
    assert network.state_dict().keys() == state.keys()
    with caplog.at_level(logging.INFO, "segbundles"):
        for x, logits in zip(images, expected, strict=True):
            torch.testing.assert_close(network(x), logits, rtol=1e-4, atol=1e-5)
    (file,) = exports(tmp_path)
    assert file.startswith("model.")
    assert file.endswith(".onnx")
    assert caplog.messages == [f"Exported the network for engine {name}: {tmp_path / file}"]

    again = Net().eval()
    again.load_state_dict(state)
    monkeypatch.setattr(engine, "export_onnx", lambda *_: pytest.fail("exported again"))
    torch.testing.assert_close(use_engine(again, name, str(weights))(images[1]), expected[1], rtol=1e-4, atol=1e-5)
    monkeypatch.undo()


def test_other_weights_have_another_export(network: nn.Module, tmp_path: Path) -> None:
    before = engine._fingerprint(network)
    with torch.no_grad():
        network[3].bias[1] += 1e-6
    assert engine._fingerprint(network) != before


@pytest.mark.parametrize("folder", [None, "read-only"])
def test_without_a_folder_to_write_to_the_export_is_temporary(
    folder: str | None, network: nn.Module, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(engine.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "models").mkdir()
    x = torch.randn(1, 1, 8, 8)
    expected = network(x).detach()
    use_engine(network, name, folder and tmp_path / "models" / "model.pt")
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)
    assert exports(tmp_path / "models") == []
    (made,) = (path for path in tmp_path.iterdir() if path.name.startswith("segbundles-"))
    assert len(exports(made)) == 1


@pytest.mark.parametrize("half", [True, False])
def test_computes_in_bfloat16_inside_autocast(half: bool, network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def start(path: Path, half: bool):
        asked.append(half)
        return lambda x: np.concatenate([x, x], axis=1)

    monkeypatch.setattr(autocast, "cpu_has_bfloat16", lambda: True)
    monkeypatch.setitem(engine.ENGINES, "onnx", start)
    monkeypatch.setattr(engine._Engine, "_exported", lambda self, x: Path("model.onnx"))
    use_engine(network, "onnx")
    inferer = AutocastInferer(SlidingWindowInferer((8, 8)), enabled=half)
    x = torch.randn(1, 1, 12, 8)
    torch.testing.assert_close(inferer(x, network), torch.cat([x, x], dim=1))
    assert asked == [half]


def test_an_engine_that_computes_something_else_is_refused(
    network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    monkeypatch.setitem(engine.ENGINES, "onnx", lambda path, half: lambda x: np.zeros((*x.shape[:1], 2, *x.shape[2:])))
    use_engine(network, "onnx", tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"^engine onnx computes something else than torch .*: set engine to torch\.$"):
        network(torch.randn(1, 1, 8, 8))
    assert exports(tmp_path) == []


class Refuses(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no such layer")


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (Net, "tensorflow", r"^engine must be torch or openvino, got 'tensorflow'\.$"),
        (Net, "absent", r"^engine absent needs more packages: `pip install absent`, or set engine to torch\.$"),
        (lambda: Net().to("meta"), "onnx", r"runs on the processor, but device is meta: set device to cpu, or engine"),
        (lambda: Net().train(), "onnx", r"^engine onnx is for inference only, but the network is in training mode"),
        (lambda: Refuses().eval(), "onnx", r"^Refuses cannot be exported \(NotImplementedError: no such layer\)"),
    ],
)
def test_refused(make, name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    if name != "tensorflow":
        monkeypatch.setitem(engine.ENGINES, name, lambda path, half: lambda x: x)
    with pytest.raises(ValueError, match=message):
        use_engine(make(), name)(torch.zeros(1, 1, 8, 8))


def test_torch_changes_nothing(network: nn.Module) -> None:
    assert "forward" not in vars(use_engine(network, "torch", "model.pt"))
