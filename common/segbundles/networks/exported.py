"""Networks that ``monai.bundle ckpt_export`` wrote."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch
from monai.config import PathLike

from segbundles.errors import fail

__all__ = ["load_exported"]


def load_exported(
    path: PathLike,
    bundle_root: PathLike = ".",
    net_id: str = "network_def",
    device: torch.device | str | None = None,
) -> torch.jit.ScriptModule:
    """Load a network in TorchScript, weights and all, in evaluation mode.

    Args:
        path: file that ``monai.bundle ckpt_export`` wrote.
        bundle_root: folder of the bundle it was exported from, to say how to export it.
        net_id: id of the network in ``inference.json``, for the same.
        device: where to load it to; None takes the device it was exported on.

    Raises:
        ValueError: when the file is missing or is no TorchScript, with the command that writes it.
    """
    file = Path(path)
    words = ["python", "-m", "monai.bundle", "ckpt_export", "--net_id", net_id, "--bundle_root", str(bundle_root)]
    words += ["--config_file", str(Path(bundle_root) / "configs" / "inference.json")]
    words += ["--ckpt_file", str(file.with_suffix(".pt")), "--filepath", str(file)]
    export = f"this writes it, with the settings of its training added: {shlex.join(words)}"
    if not file.is_file():
        fail(f"there is no exported network at {file}: {export}")
    try:
        return torch.jit.load(file, map_location=device).eval()
    except RuntimeError as error:
        fail(f"{file} cannot be read as TorchScript ({type(error).__name__}); {export}")
