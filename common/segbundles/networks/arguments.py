"""Checks of the arguments and inputs of networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.layers.factories import split_args

from segbundles.errors import fail

__all__ = ["check_at_least_one", "check_choice", "refuse", "split_norm"]


def refuse(message: str) -> None:
    """Fail, also in TorchScript, which cannot log."""
    if not torch.jit.is_scripting():
        fail(message)
    raise ValueError(message)


def check_at_least_one(**values: int) -> None:
    """Refuse a number below 1, by its name."""
    for name, value in values.items():
        if value < 1:
            fail(f"{name} must be at least 1, got {value}.")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse a value that is not one of the choices."""
    if value not in choices:
        fail(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def split_norm(norm: str | tuple | None, names: Sequence[str]) -> tuple[str, dict[str, Any]] | None:
    """Split a norm as MONAI writes it into its name, in lower case, and its arguments.

    Args:
        norm: a name, a pair of a name and arguments, or None.
        names: names that are allowed.

    Raises:
        ValueError: when the name is not allowed.
    """
    if norm is None:
        return None
    name, args = split_args(norm)
    if str(name).lower() not in names:
        fail(f"norm must be None or one of {', '.join(map(repr, names))}, got {norm!r}.")
    return str(name).lower(), dict(args)
