"""Run a network with another engine than torch, on a CPU."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from monai.config import PathLike
from monai.utils import convert_to_tensor
from torch import nn

from segbundles import __version__
from segbundles.errors import fail
from segbundles.facts import weights_files
from segbundles.files import atomic_path

__all__ = ["ENGINES", "export_onnx", "use_engine"]

logger = logging.getLogger("segbundles")

# of the largest logit: torch and another engine round differently, a wrong export is wrong by about 1
_TOLERANCE = 1e-2


def use_engine(network: nn.Module, engine: str, weights: PathLike | Sequence[PathLike] | None = None) -> nn.Module:
    """Let another engine than torch compute what a network returns, as MONAI's ``trt_compile`` does on a GPU.

    The network stays the same object with the same ``state_dict``. Its first call, after the weights were loaded,
    exports it to ONNX. The file is kept beside the weights, with a name that has the hash of what it contains, so that
    later runs find it; in a folder that cannot be written to, it is a temporary file. Do not change the weights later.

    Inside ``torch.autocast`` the engine computes in bfloat16, otherwise in float32.

    Args:
        network: network with one input and one output, for inference on a CPU.
        engine: a name in :data:`ENGINES`; ``"torch"`` changes nothing.
        weights: file of the weights, or a list of them; None keeps no export.

    Returns:
        The network.

    Raises:
        ValueError: when the engine is unknown or not installed, or the network is on another device. A network that
            cannot be exported, or that computes something else after that, is an error of its first call.
    """
    if engine == "torch":
        return network
    if engine not in ENGINES:
        fail(f"engine must be torch or {', '.join(ENGINES)}, got {engine!r}.")
    if missing := [name for name in (engine, "onnx") if find_spec(name) is None]:
        fail(f"engine {engine} needs more packages: `pip install {' '.join(missing)}`, or set engine to torch.")
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    if device.type != "cpu":
        fail(f"engine {engine} runs on the processor, but device is {device}: set device to cpu, or engine to torch.")
    network.forward = _Engine(network, engine, weights)
    return network


class _Engine:
    """A network's ``forward``, computed by an engine that is started by the first call."""

    def __init__(self, network: nn.Module, engine: str, weights: PathLike | Sequence[PathLike] | None) -> None:
        self.network = network
        self.torch_forward = network.forward
        self.engine = engine
        self.weights = weights
        self.file: Path | None = None
        self.temporary: tempfile.TemporaryDirectory | None = None
        self.running: dict[bool, Callable[[np.ndarray], np.ndarray]] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        half = torch.is_autocast_enabled("cpu")
        x = convert_to_tensor(x, dtype=torch.float32, track_meta=False).contiguous()
        if half not in self.running:
            self.running[half] = self._start(x, half)
        return torch.from_numpy(self.running[half](x.numpy()))

    def _start(self, x: torch.Tensor, half: bool) -> Callable[[np.ndarray], np.ndarray]:
        if self.network.training:
            fail(f"engine {self.engine} is for inference only, but the network is in training mode: use engine torch.")
        if self.file is None:
            self.network.forward = self.torch_forward
            try:
                self.file = self._exported(x)
            finally:
                self.network.forward = self
        return ENGINES[self.engine](self.file, half)

    @torch.no_grad()
    def _exported(self, x: torch.Tensor) -> Path:
        """Return the file of this network's export, which is made and compared with the network if there is none."""
        weights = next(iter(weights_files(self.weights)), None)
        name = f"{weights.stem if weights else 'network'}.{_fingerprint(self.network)}.onnx"
        if weights is not None and (kept := weights.with_name(name)).is_file():
            return kept
        if weights is not None and os.access(weights.parent, os.W_OK):
            folder = weights.parent
        else:
            self.temporary = tempfile.TemporaryDirectory(prefix="segbundles-", ignore_cleanup_errors=True)
            folder = Path(self.temporary.name)
        with torch.autocast("cpu", enabled=False), atomic_path(folder / name) as part:
            export_onnx(self.network, x, part)
            expected, found = self.network(x).numpy(), ENGINES[self.engine](part, False)(x.numpy())
            if expected.shape != found.shape or np.abs(expected - found).max() > _TOLERANCE * np.abs(expected).max():
                fail(f"engine {self.engine} computes something else than torch with this network: set engine to torch.")
        logger.info(f"Exported the network for engine {self.engine}: {folder / name}")
        return folder / name


def _fingerprint(network: nn.Module) -> str:
    """Return a hash of a network's layers and weights, and of what exports it."""
    found = hashlib.sha256(f"{network} {torch.__version__} {__version__}".encode())
    for name, value in network.state_dict().items():
        found.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def export_onnx(network: nn.Module, x: torch.Tensor, path: PathLike) -> None:
    """Write a network as ONNX, for any batch and any size that the network takes.

    Args:
        network: network in evaluation mode.
        x: an input (B, C, spatial).
        path: file to write.

    Raises:
        ValueError: when the network cannot be exported.
    """
    free = {axis: f"n{axis}" for axis in (0, *range(2, x.ndim))}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the newer exporter, which is recommended, fixes the size
            torch.onnx.export(
                network,
                (x,),
                str(path),
                dynamo=False,
                input_names=["image"],
                output_names=["pred"],
                dynamic_axes={"image": free, "pred": free},
            )
    except Exception as error:
        fail(f"{type(network).__name__} cannot be exported ({type(error).__name__}: {error}): set engine to torch.")


def _openvino(path: Path, half: bool) -> Callable[[np.ndarray], np.ndarray]:
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = openvino.Core().compile_model(path, "CPU", options)
    return lambda x: model([x])[0]


#: engines beside torch, by the name of their package: each makes a function of arrays from an ONNX file
ENGINES: dict[str, Callable[[Path, bool], Callable[[np.ndarray], np.ndarray]]] = {"openvino": _openvino}
