"""Networks in files that contain their program: ``.pt2`` of torch.export, ``.ts`` of TorchScript."""

from __future__ import annotations

import logging
import shlex
import zipfile
from pathlib import Path

import torch
from monai.config import PathLike
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.nn.modules.conv import _ConvNd

from segbundles.errors import fail
from segbundles.files import atomic_path

__all__ = ["ExportedNetwork", "export_network", "load_exported"]

logger = logging.getLogger("segbundles")

#: sizes of the example that is exported; other sizes must not look like one of them, so no two are equal
_EXAMPLE = {2: (256, 512), 3: (128, 256, 384)}


class ExportedNetwork(nn.Module):
    """An exported program as a network in evaluation mode; ``train`` and ``to`` do not change it.

    Args:
        program: program of one input and one output.
    """

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self._program = (program.module(),)  # a submodule would refuse eval()
        self.training = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the network on an input of any batch and size that it takes."""
        return self._program[0](x)


def export_network(network: nn.Module, path: PathLike) -> None:
    """Write a network as an exported program, which takes any batch and any size that the network takes.

    Args:
        network: network of one input (B, C, spatial) and one output, with its weights. It is left in evaluation mode.
        path: file to write, with the suffix ``.pt2``.

    Raises:
        ValueError: when the file cannot be written.
    """
    first = next(module for module in network.modules() if isinstance(module, _ConvNd))
    sizes = _EXAMPLE[len(first.kernel_size)]
    x = torch.zeros(2, first.in_channels, *sizes, device=first.weight.device)
    free = {axis: Dim.DYNAMIC for axis in range(x.ndim) if axis != 1}
    with torch.no_grad():
        program = torch.export.export(network.eval(), (x,), dynamic_shapes=(free,))
    program.example_inputs = None  # it would be most of the file
    with atomic_path(path) as part:
        torch.export.save(program, part)


def load_exported(
    path: PathLike,
    bundle_root: PathLike = ".",
    net_id: str = "network_def",
    device: torch.device | str | None = None,
) -> nn.Module:
    """Load an exported network with its weights, in evaluation mode.

    The facts of the weights, such as the spacing they were trained at, stay beside the ``.pt`` file that was exported.
    If it is not there, a warning says that the config's values are used.

    Args:
        path: file that ``segbundles export`` (``.pt2``) or ``monai.bundle ckpt_export`` (``.ts``) wrote.
        bundle_root: folder of the bundle it was exported from, used in the error message.
        net_id: id of the network in ``inference.json``, used in the error message.
        device: device to load it to; None means the device it was exported on.

    Raises:
        ValueError: when the file is missing or cannot be read; the message gives the command that writes it.
    """
    file = Path(path)
    is_program = file.suffix == ".pt2"
    words = ["segbundles", "export", str(bundle_root)]
    if not is_program:
        words = ["python", "-m", "monai.bundle", "ckpt_export", "--net_id", net_id, "--bundle_root", str(bundle_root)]
        words += ["--config_file", str(Path(bundle_root) / "configs" / "inference.json")]
        words += ["--ckpt_file", str(file.with_suffix(".pt")), "--filepath", str(file)]
    export = f"this command writes it: {shlex.join(words)}"
    if not file.is_file():
        fail(f"there is no exported network at {file}: {export}")
    if not file.with_suffix(".pt").is_file():
        logger.warning(f"{file.stem}.pt is not beside {file}: knobs that are facts of it are taken from the config.")
    try:
        return _read_program(file, device) if is_program else torch.jit.load(file, map_location=device).eval()
    except (RuntimeError, ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        kind = "an exported program" if is_program else "TorchScript"
        fail(f"{file} cannot be read as {kind} ({type(error).__name__}); {export}")


def _read_program(file: Path, device: torch.device | str | None) -> ExportedNetwork:
    program = torch.export.load(file)
    return ExportedNetwork(program if device is None else move_to_device_pass(program, device))
