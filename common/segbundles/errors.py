"""How this library refuses bad input: a ``ValueError`` that is also logged once."""

from __future__ import annotations

import logging
from typing import NoReturn

logger = logging.getLogger("segbundles")


def fail(message: str, cause: BaseException | None = None) -> NoReturn:
    """Log a message as ERROR and raise it as ``ValueError``.

    MONAI wraps what an expression raises in ``RuntimeError`` whose last line is the expression, so the log is where
    a person reads what was wrong.

    Args:
        message: what was wrong, the value seen, and what to do.
        cause: the exception behind it, if there is one.

    Raises:
        ValueError: always.
    """
    logger.error(message)
    raise ValueError(message) from cause
