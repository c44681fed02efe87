"""Networks that ``monai.bundle ckpt_export`` wrote."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

import torch
from monai.config import PathLike

from segbundles.errors import fail

__all__ = ["load_exported"]

logger = logging.getLogger("segbundles")


def load_exported(
    path: PathLike,
    bundle_root: PathLike = ".",
    net_id: str = "network_def",
    device: torch.device | str | None = None,
) -> torch.jit.ScriptModule:
    """Load a TorchScript network with its weights, in evaluation mode.

    The facts of the weights, such as the spacing they were trained at, stay beside the ``.pt`` file that was exported.
    If it is not there, a warning says that the config's values are used.

    Args:
        path: file that ``monai.bundle ckpt_export`` wrote.
        bundle_root: folder of the bundle it was exported from, used in the error message.
        net_id: id of the network in ``inference.json``, used in the error message.
        device: device to load it to; None means the device it was exported on.

    Raises:
        ValueError: when the file is missing or is not TorchScript; the message gives the command that writes it.
    """
    file = Path(path)
    words = ["python", "-m", "monai.bundle", "ckpt_export", "--net_id", net_id, "--bundle_root", str(bundle_root)]
    words += ["--config_file", str(Path(bundle_root) / "configs" / "inference.json")]
    words += ["--ckpt_file", str(file.with_suffix(".pt")), "--filepath", str(file)]
    export = f"this command writes it: {shlex.join(words)}"
    if not file.is_file():
        fail(f"there is no exported network at {file}: {export}")
    if not file.with_suffix(".pt").is_file():
        logger.warning(f"{file.stem}.pt is not beside {file}: knobs that are facts of it are taken from the config.")
    try:
        return torch.jit.load(file, map_location=device).eval()
    except RuntimeError as error:
        fail(f"{file} cannot be read as TorchScript ({type(error).__name__}); {export}")
