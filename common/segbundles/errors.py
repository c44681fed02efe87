"""How this library refuses bad input: a ``ValueError`` that is also logged once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NoReturn

logger = logging.getLogger("segbundles")


def fail(message: str) -> NoReturn:
    """Log a message as ERROR and raise it as ``ValueError``.

    MONAI wraps what an expression raises in ``RuntimeError`` whose last line is the expression, so the log is where
    a person reads what was wrong. It is the root cause: an exception behind it goes into the message.

    Args:
        message: what was wrong, the value seen, and what to do.

    Raises:
        ValueError: always.
    """
    logger.error(message)
    raise ValueError(message) from None


def check_multiples(name: str, size: Sequence[int], depth: int, more: int = 0) -> None:
    """Refuse a size that a network cannot halve as often as it has levels below the first.

    Args:
        name: setting that holds the size.
        size: pixels or voxels along each axis.
        depth: levels of the network.
        more: pixels beyond the multiple that the network needs, as one without padding does.

    Raises:
        ValueError: when an axis less ``more`` is no multiple of 2 ** (depth - 1).
    """
    step = 2 ** (depth - 1)
    if any((n - more) % step for n in size):
        also = f", and {more} more" if more else ""
        fail(f"{name} {list(size)} must be multiples of 2 ** (depth - 1) = {step}{also}.")


def innermost(error: BaseException) -> str:
    """What the innermost cause of an exception says, below what MONAI wrapped around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
