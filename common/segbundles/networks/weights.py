"""Loading weights so that a wrong file is told apart from a good one."""

from __future__ import annotations

from pathlib import Path

import torch
from monai.config import PathLike
from torch import nn

from segbundles.errors import fail

__all__ = ["load_weights", "read_weights"]


def read_weights(path: PathLike) -> dict[str, torch.Tensor]:
    """Read a state_dict, with ``weights_only=True``, onto the CPU.

    Args:
        path: file with a bare state_dict, or one under the key ``model``.

    Raises:
        ValueError: when the file is missing, damaged, or holds anything else.
    """
    file = Path(path)
    if not file.is_file():
        fail(f"there are no weights at {file}: train first (`monai.bundle run training`), or set --ckpt_dir.")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        fail(f"{file} cannot be read as weights ({type(error).__name__}): it is damaged or not a state_dict.")
    if isinstance(state, dict) and set(state) == {"model"}:
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        fail(f"{file} holds no plain state_dict (names to tensors): give the file that training writes, model.pt.")
    return state


def load_weights(network: nn.Module, path: PathLike, device: torch.device | str | None = None) -> nn.Module:
    """Load weights into a network, strictly, and return it in evaluation mode.

    Args:
        network: network whose parameters are replaced; half-precision weights are cast to its own type.
        path: see :func:`read_weights`.
        device: where to move the network; None leaves it.

    Raises:
        ValueError: when names or shapes differ, naming the first of them.
    """
    state = read_weights(path)
    own = network.state_dict()
    faults = [f"{name} is missing in the file" for name in own if name not in state]
    faults += [f"{name} is not in the network" for name in state if name not in own]
    faults += [
        f"{name} has shape {tuple(state[name].shape)} in the file and {tuple(own[name].shape)} in the network"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        fail(
            f"{path} is of another architecture than the {type(network).__name__} configured: "
            f"{'; '.join(faults[:3])}{more}. Give the settings it was trained with, or other weights."
        )
    network.load_state_dict(state)
    return (network if device is None else network.to(device)).eval()
