"""Loading weights, with an error message for every file that does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from monai.config import PathLike
from torch import nn

from segbundles.errors import fail
from segbundles.facts import weights_files

__all__ = ["load_if_given", "load_weights", "read_weights", "require_weights"]


def require_weights(weights: PathLike | Sequence[PathLike] | None) -> None:
    """Refuse a missing file of weights, before a run starts.

    Args:
        weights: file of the weights, or those of an ensemble; None requires nothing.

    Raises:
        ValueError: when a file is missing.
    """
    for path in weights_files(weights):
        if not path.is_file():
            fail(f"there are no weights at {path}: train first (`monai.bundle run training`), or give another file.")


def read_weights(path: PathLike) -> dict[str, torch.Tensor]:
    """Read a state_dict onto the CPU, with ``weights_only=True``.

    Args:
        path: file with a bare state_dict, or one under the key ``model``.

    Raises:
        ValueError: when the file is missing, damaged, or contains anything else.
    """
    file = Path(path)
    require_weights(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError as error:
        fail(f"{file} cannot be read ({error.strerror}): change its permissions, or give other weights.")
    except Exception as error:
        fail(f"{file} cannot be read as weights ({type(error).__name__}): it is damaged or not a state_dict.")
    if isinstance(state, dict) and set(state) == {"model"}:
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        fail(f"{file} is not a plain state_dict (names to tensors): give the file that training writes, model.pt.")
    return state


def load_weights(network: nn.Module, path: PathLike, device: torch.device | str | None = None) -> nn.Module:
    """Load weights into a network, strictly, and return it in evaluation mode.

    Args:
        network: network whose parameters are replaced; half-precision weights are cast to its own type.
        path: file of the weights, see :func:`read_weights`.
        device: device to move the network to; None leaves it where it is.

    Raises:
        ValueError: when names or shapes differ; the message lists the first of them.
    """
    state = read_weights(path)
    if faults := _differences(network.state_dict(), state):
        fail(
            f"{path} has another architecture than the configured {type(network).__name__}: {faults}. "
            "Give the settings it was trained with, or other weights."
        )
    network.load_state_dict(state)
    return (network if device is None else network.to(device)).eval()


def load_if_given(network: nn.Module, weights: PathLike | Sequence[PathLike] | None) -> nn.Module | None:
    """Load weights for a config in which they are optional.

    The file is read once, when the config is parsed. A config can also be parsed, exported and checked where the file
    is missing: then the network that is returned fails when it is called.

    Args:
        network: network whose parameters are replaced.
        weights: file of the weights, see :func:`read_weights`, or a list, whose first file is loaded; None returns
            None instead of the network.

    Raises:
        ValueError: see :func:`load_weights`.
    """
    for path in weights_files(weights)[:1]:
        return load_weights(network, path) if path.is_file() else _Missing(path)
    return None


class _Missing(nn.Module):
    """Stand in for a network whose weights are missing."""

    def __init__(self, path: PathLike) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        require_weights(self.path)
        return fail(f"{self.path} was missing when the config was read, and was added since: start again.")


def _differences(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> str:
    """Describe the first few names and shapes in a file that differ from a network's; "" if all are equal."""
    faults = [f"{name} is missing in the file" for name in own if name not in state]
    faults += [f"{name} is not in the network" for name in state if name not in own]
    faults += [
        f"{name} has shape {tuple(state[name].shape)} in the file and {tuple(own[name].shape)} in the network"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    return "; ".join(faults[:3]) + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")
