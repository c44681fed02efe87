"""Files that appear complete or not at all, folders checked before long work, and one run at a time in each."""

from __future__ import annotations

import logging
import os
import platform
import re
import shlex
import sys
import traceback
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from segbundles.errors import fail

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

__all__ = ["RunLock", "RunLog", "atomic_path", "check_writable", "walk"]

logger = logging.getLogger("segbundles")

_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_PART = re.compile(rf"\.{_HOST}-(\d+)\.part\.")
_swept: set[Path] = set()
_holders: weakref.WeakValueDictionary[str, RunLock] = weakref.WeakValueDictionary()


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to, and rename it when the block ends well.

    The temporary name starts with a dot and keeps the suffix, by which libraries choose a format. What a process that
    was killed left under such a name is removed when another one first writes to the folder.

    Args:
        path: file to write; its folder is made.

    Raises:
        ValueError: when the file cannot be written.
    """
    target = Path(path)
    part = target.with_name(f".{_HOST}-{os.getpid()}.part.{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        yield part
        part.replace(target)
    except (OSError, RuntimeError) as error:  # torch and SimpleITK report a full disk as RuntimeError
        fail(f"cannot write {target} ({_reason(error, part)}): make room, or choose another folder.")
    finally:
        with suppress(OSError):
            part.unlink()


def _reason(error: Exception, part: Path) -> str:
    if isinstance(error, RuntimeError):
        try:  # what the libraries do not tell
            with part.open("ab") as file:
                file.write(bytes(2**16))
        except OSError as cause:
            error = cause
    return getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[-1]


def _sweep(folder: Path) -> None:
    """Remove what killed processes of this machine were writing in a folder, once a process."""
    if folder in _swept or fcntl is None:
        return
    _swept.add(folder)
    for path in folder.iterdir():
        found = _PART.match(path.name)
        if found and not _runs(int(found[1])):
            with suppress(OSError):
                path.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


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


def walk(folder: str | os.PathLike) -> Iterator[Path]:
    """Files below a folder, hidden folders left out.

    What else is not searched is logged: folders that cannot be read, and links to folders.

    Args:
        folder: folder to search.
    """

    def cannot(error: OSError) -> None:
        logger.warning(f"{error.filename} was not searched ({error.strerror}).")

    for place, folders, files in os.walk(folder, onerror=cannot):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if (path := Path(place) / name).is_symlink():
                logger.warning(f"{path} was not searched: it is a link to a folder. Name that folder to search it.")
        yield from (Path(place) / name for name in files)


class RunLock:
    """Keep other processes from writing a file, until the lock is released or this process ends, however it does.

    In one process the lock may be taken again, which releases the one before. Where the system knows no locks, none is
    held.

    Args:
        path: file that a run writes.
        setting: name of the knob that chose its folder.
    """

    def __init__(self, path: str | os.PathLike, setting: str) -> None:
        """See the class."""
        self.path = Path(path)
        self.setting = setting
        self._finish: Callable[[], Any] = _nothing

    def take(self) -> None:
        """Take the lock.

        Raises:
            ValueError: when another process has it.
        """
        self.release()
        if fcntl is None:
            return
        lock = self.path.with_name(f".{self.path.name}.lock")
        if (file := self._locked(lock)) is not None:
            self._finish = weakref.finalize(self, _remove, lock, file, os.getpid())

    def release(self) -> None:
        """Release the lock, if it was taken."""
        self._finish()

    def _locked(self, path: Path) -> TextIO | None:
        """Open a file to append to, and lock it; None when it cannot be opened."""
        # a process loses its lock on a file when it closes any that it has opened of it
        if (earlier := _holders.get(os.path.realpath(path))) is not None:
            earlier.release()
        _holders[os.path.realpath(path)] = self
        while True:
            try:
                file = path.open("a", encoding="utf-8")
            except OSError as error:  # of another user
                logger.warning(f"{path} cannot be written ({error.strerror}): the run goes on without it.")
                return None
            if fcntl is None:
                return file
            try:
                # not flock: processes that are forked in the meantime would hold it too
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            except FileNotFoundError:
                pass
            except (BlockingIOError, PermissionError):
                file.close()
                fail(
                    f"{self.setting} {str(self.path.parent)!r} is in use: another run is writing {self.path.name} "
                    f"there. Wait until it is over, or give --{self.setting} another folder."
                )
            except OSError:  # a file system without locks
                return file
            file.close()  # another run was over just now, and has removed it


class RunLog(RunLock):
    """The log file of a run: what is logged in this process goes there too, from ``take`` to ``release``.

    It is appended to. While it is open it is locked, which keeps other processes from running into the same folder.

    Args:
        path: file to write.
        setting: name of the knob that chose its folder.
    """

    def __init__(self, path: str | os.PathLike, setting: str = "output_dir") -> None:
        """See the class."""
        super().__init__(path, setting)
        self._handler: logging.StreamHandler | None = None

    def take(self) -> None:
        """Open the file.

        Raises:
            ValueError: when another process has it.
        """
        self.release()
        if (file := self._locked(self.path)) is None:
            return
        self._handler = _LogHandler(file)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._note("INFO", f"Started as process {os.getpid()} on {platform.node()}: {shlex.join(sys.orig_argv)}")
        logging.getLogger().addHandler(self._handler)
        self._finish = weakref.finalize(self, _stop_logging, self._handler)

    def release(self, error: BaseException | None = None) -> None:
        """Close the file, if it is open; what stopped the run is written to it before."""
        if error is not None and self._handler is not None:
            self._note("ERROR", "".join(traceback.format_exception(error)).rstrip())
        self._handler = None
        self._finish()

    def _note(self, level: str, text: str) -> None:
        self._handler.handle(logging.makeLogRecord({"levelname": level, "msg": text}))


class _LogHandler(logging.StreamHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """A log that cannot be written is no reason to fill the screen."""


def _nothing() -> None:
    return


def _remove(path: Path, file: TextIO, process: int) -> None:
    if os.getpid() == process:  # and not one that was forked
        with suppress(OSError):
            path.unlink()
    file.close()


def _stop_logging(handler: logging.StreamHandler) -> None:
    logging.getLogger().removeHandler(handler)
    with suppress(OSError):  # what could not be written before cannot be now
        handler.stream.close()
