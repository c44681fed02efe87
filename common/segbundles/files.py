"""Files that appear under their name only when they are complete, and folders checked before long work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from segbundles.errors import fail

__all__ = ["atomic_path", "check_writable"]


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to, and rename it when the block ends well.

    The temporary name starts with a dot and keeps the suffix, by which libraries choose a format.

    Args:
        path: file to write; its folder is made.

    Raises:
        ValueError: when the file cannot be written.
    """
    target = Path(path)
    part = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(target)
    except (OSError, RuntimeError) as error:  # torch and SimpleITK report a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[-1]
        fail(f"cannot write {target} ({reason}): make room, or choose another folder.")
    finally:
        with suppress(OSError):
            part.unlink()


def check_writable(folder: str | os.PathLike, setting: str) -> None:
    """Make a folder and try to write in it.

    Args:
        folder: folder to check.
        setting: name of the knob that chose it.

    Raises:
        ValueError: when it cannot be written to.
    """
    probe = Path(folder) / f".write_test_{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # a process of another machine may have the same number
    except OSError as error:
        reason = error.strerror or error
        fail(f"{setting} {str(folder)!r} cannot be written to ({reason}): give --{setting} another folder.")
