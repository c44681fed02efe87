"""How this library refuses bad input: a ``ValueError`` that is also logged once."""

from __future__ import annotations

import logging
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


def innermost(error: BaseException) -> str:
    """What the innermost cause of an exception says, below what MONAI wrapped around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
