"""How this library refuses bad input: with one line that says what was wrong and what to do."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

__all__ = ["InputError", "fail", "innermost", "refusal_in", "show_reason_last", "unwrapped"]

logger = logging.getLogger("segbundles")


class InputError(ValueError):
    """Report input, a setting or a file that cannot be used; the message is written for the person who gave it."""

    #: log file that has the traceback, once a run has written one
    log: Path | None = None


def fail(message: str) -> NoReturn:
    """Log a message as ERROR and raise it as :class:`InputError`.

    Programs that catch the exception, or wrap it in another, leave the log as the place where a person reads the
    reason. An exception that caused it goes into the message.

    Args:
        message: what was wrong, the value, and what to do.

    Raises:
        InputError: always; it is a ``ValueError``.
    """
    logger.error(message, extra={"refused": True})
    raise InputError(message) from None


def innermost(error: BaseException) -> str:
    """Return the message of the innermost cause of an exception, below what MONAI wrapped around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


def refusal_in(error: BaseException | None) -> InputError | None:
    """Return the :class:`InputError` that an exception is, or that it was raised from."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def unwrapped(method: Callable) -> Callable:
    """Let a function raise an :class:`InputError` itself, instead of MONAI's ``RuntimeError`` that it caused."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except RuntimeError as error:
            if (refusal := refusal_in(error)) is None:
                raise
        raise refusal

    return call


def show_reason_last() -> None:
    """Let ``python -m monai.bundle`` end with the reason of a refusal as its last line, instead of a traceback.

    The traceback goes to the log of the run, or to a file in the temporary folder if the run had not started; the line
    names that file. Any other exception is shown as before. In other programs nothing changes.
    """
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is None or spec.name != "monai.bundle.__main__" or isinstance(sys.excepthook, _ReasonLast):
        return
    hook = _ReasonLast(sys.excepthook)
    sys.excepthook = hook
    atexit.register(hook.leave)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr):
            # the last line says it
            handler.addFilter(lambda record: not getattr(record, "refused", False))


class _ReasonLast:
    def __init__(self, before: Callable) -> None:
        self.before = before
        self.refused = False

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        refusal = refusal_in(error)
        if refusal is None:
            self.before(kind, error, trace)
            return
        log = refusal.log
        if log is None:
            try:
                with tempfile.NamedTemporaryFile("w", prefix="segbundles_", suffix=".log", delete=False) as file:
                    file.writelines(traceback.format_exception(kind, error, trace))
                log = file.name
            except OSError:  # a full disk, for example: the reason is shown all the same
                log = None
        sys.stdout.flush()
        where = f" (traceback: {log})" if log else ""
        print(f"ERROR: {refusal}{where}", file=sys.stderr)
        self.refused = True

    def leave(self) -> None:
        """End the process before the interpreter does: threads that still read images in C++ code would abort it."""
        if self.refused and sys.excepthook is self and threading.active_count() > 1:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
