"""Loading weights so that a wrong file is told apart from a good one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from monai.config import PathLike
from monai.networks.utils import get_state_dict
from torch import nn

from segbundles.errors import fail

__all__ = ["check_loaded", "load_weights", "read_weights"]


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
    except PermissionError as error:
        fail(f"{file} cannot be read ({error.strerror}): give leave to read it, or other weights.")
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
    if faults := _differences(network.state_dict(), state):
        fail(
            f"{path} is of another architecture than the {type(network).__name__} configured: {faults}. "
            "Give the settings it was trained with, or other weights."
        )
    network.load_state_dict(state)
    return (network if device is None else network.to(device)).eval()


def check_loaded(network: nn.Module, folder: PathLike) -> None:
    """Refuse a network that has the weights of no file in a folder.

    Programs that do not insist on every name, MONAI Label among them, leave what a file does not hold as it was
    initialised, and let such a network answer.

    Args:
        network: network, or its DDP wrapper. One that has no weights passes.
        folder: folder of the files (.pt), as :func:`read_weights` reads them.

    Raises:
        ValueError: naming what is different from the file of the shortest name, or that there is none.
    """
    own = get_state_dict(network)
    if not own:
        return
    files = sorted(Path(folder).glob("*.pt"), key=lambda path: (len(path.name), path.name))
    if not files:
        fail(f"there are no weights in {folder}, by which the network given could be told from one that is untrained.")
    first = ""
    for path in files:
        state = read_weights(path)
        faults = _differences(own, state)
        if not faults and all(torch.equal(own[name].cpu(), state[name].to(own[name].dtype)) for name in own):
            return
        first = first or faults or "the values differ"
    fail(
        f"the {type(network).__name__} given was not loaded with any weights in {folder}; of {files[0].name}, {first}. "
        "Give the settings they were trained with, or other weights."
    )


def _differences(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> str:
    """How names and shapes in a file differ from a network's: the first few, in words; nothing where they do not."""
    faults = [f"{name} is missing in the file" for name in own if name not in state]
    faults += [f"{name} is not in the network" for name in state if name not in own]
    faults += [
        f"{name} has shape {tuple(state[name].shape)} in the file and {tuple(own[name].shape)} in the network"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    return "; ".join(faults[:3]) + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")
