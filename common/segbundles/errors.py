"""How this library refuses bad input: with one line that says what was wrong and what to do."""

from __future__ import annotations

import logging
from typing import NoReturn

__all__ = ["InputError", "fail", "innermost"]

logger = logging.getLogger("segbundles")


class InputError(ValueError):
    """Report input, a setting or a file that cannot be used; the message is written for the person who gave it."""


def fail(message: str) -> NoReturn:
    """Log a message as ERROR and raise it as :class:`InputError`.

    MONAI wraps what an expression raises in a ``RuntimeError`` whose last line is the expression, so the log is where
    a person reads the reason. An exception that caused it goes into the message.

    Args:
        message: what was wrong, the value, and what to do.

    Raises:
        InputError: always; it is a ``ValueError``.
    """
    logger.error(message)
    raise InputError(message) from None


def innermost(error: BaseException) -> str:
    """Return the message of the innermost cause of an exception, below what MONAI wrapped around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
