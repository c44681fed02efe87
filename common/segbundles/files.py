"""Write files that appear complete or not at all, check folders before long work, and lock them during a run."""

from __future__ import annotations

import csv
import errno
import json
import logging
import math
import os
import platform
import re
import shlex
import sys
import traceback
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from segbundles.errors import fail, refusal_in

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "DATALIST_NAME",
    "SPLITS",
    "RunLock",
    "RunLog",
    "atomic_path",
    "check_writable",
    "read_json",
    "read_table",
    "shown",
    "shown_below",
    "walk",
    "write_json",
    "write_table",
]

logger = logging.getLogger("segbundles")

DATALIST_NAME = "datalist.json"
SPLITS = ("training", "validation", "testing")

_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_PART = re.compile(rf"\.{_HOST}-(\d+)\.part\.")
_swept: set[Path] = set()
_holders: weakref.WeakValueDictionary[str, RunLock] = weakref.WeakValueDictionary()


def shown(path: str | os.PathLike) -> str:
    r"""Return a path as text that can be printed: bytes that are not UTF-8 are escaped, as in ``caf\xe9.png``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def shown_below(path: str | os.PathLike, root: str | os.PathLike) -> str:
    """Return a path relative to a folder, with ``/``, as :func:`shown`; a path outside the folder stays as it is.

    Args:
        path: a file or folder.
        root: the folder. A path that equals it, such as that of a DICOM series, is shown as its name.
    """
    path, root = Path(path), Path(root)
    if path == root:
        return shown(path.name)
    return shown(path.relative_to(root).as_posix() if path.is_relative_to(root) else path)


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file in UTF-8, with or without a byte-order mark.

    Raises:
        ValueError: when it is not JSON.
    """
    return json.loads(Path(path).read_text(encoding="utf-8-sig"))


def read_table(path: str | os.PathLike, errors: str = "strict") -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV file in UTF-8, separated by commas, semicolons or tabs, as spreadsheets save them.

    Args:
        path: the file; its first line names the columns.
        errors: what to do with bytes that are not UTF-8, as in ``open``.

    Raises:
        ValueError: when it is not UTF-8 and ``errors`` is ``"strict"``.
        csv.Error: when it is not CSV.
    """
    with Path(path).open(newline="", encoding="utf-8-sig", errors=errors) as file:
        head = file.readline()
        file.seek(0)
        yield from csv.DictReader(file, delimiter=max(",;\t", key=head.count))


def write_table(path: str | os.PathLike, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file that :func:`read_table` reads; it appears complete or not at all.

    Args:
        path: file to write.
        columns: names of the columns.
        rows: one dictionary per row. NaN, None and missing values are empty cells; numbers have six digits.

    Raises:
        ValueError: when the file cannot be written.
    """
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({name: _table_cell(value) for name, value in row.items()} for row in rows)


def _table_cell(value: Any) -> Any:
    return value if not isinstance(value, float) else "" if math.isnan(value) else f"{value:.6g}"


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to, and rename it when the block ends without an error.

    The temporary name starts with a dot and keeps the suffix, because libraries choose the format by it. The files
    of a process that was killed are removed when another process first writes to the folder.

    Args:
        path: file to write; its folder is created.

    Raises:
        ValueError: when the file cannot be written.
    """
    target = Path(path)
    if shown(target) != str(target):  # the libraries that write images end the process at such a name
        fail(f"cannot write {shown(target)}: its name contains bytes that are not UTF-8; choose another name.")
    part = target.with_name(f".{_HOST}-{os.getpid()}.part.{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        yield part
        part.replace(target)
    except (OSError, RuntimeError) as error:  # torch and SimpleITK report a full disk as RuntimeError
        reason, full = _reason(error, part)
        fail(f"cannot write {shown(target)} ({reason}): {'make room, or ' if full else ''}choose another folder.")
    finally:
        with suppress(OSError):
            part.unlink()


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a JSON file that people can read, with short lists on one line; it appears complete or not at all.

    Args:
        path: file to write.
        value: anything that JSON can hold.

    Raises:
        ValueError: when the file cannot be written.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False)
    # line breaks in strings are escaped in JSON, so this only finds lists without inner lists
    text = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s*\]", lambda found: "[" + re.sub(r"\s*\n\s*", " ", found[1]) + "]", text)
    with atomic_path(path) as part:
        part.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def _reason(error: Exception, part: Path) -> tuple[str, bool]:
    """Return why a file cannot be written, and whether the disk or a quota is full."""
    if isinstance(error, RuntimeError):
        try:  # the libraries do not say what the system said
            with part.open("ab") as file:
                file.write(bytes(2**16))
        except OSError as cause:
            error = cause
    reason = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[-1]
    return reason, getattr(error, "errno", None) in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))


def _sweep(folder: Path) -> None:
    """Remove the temporary files of killed processes of this machine from a folder; each process does this once."""
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
    except OSError:  # it belongs to another user
        return True
    return True


def check_writable(folder: str | os.PathLike, setting: str) -> None:
    """Create a folder and check that files can be written to it.

    Args:
        folder: folder to check.
        setting: name of the knob that chose it.

    Raises:
        ValueError: when nothing can be written to it.
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
    """Yield the files below a folder, except those in hidden folders.

    Folders that cannot be read and links to folders are not searched; a warning names them.

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
    """Keep other processes from writing a file, until the lock is released or this process ends in any way.

    One process can take the lock again, which releases the earlier one. On a system without locks nothing is locked.

    Args:
        path: file that a run writes.
        setting: name of the knob that chose its folder.
    """

    def __init__(self, path: str | os.PathLike, setting: str) -> None:
        self.path = Path(path)
        self.setting = setting
        self._finish: Callable[[], Any] = _nothing

    def take(self) -> None:
        """Take the lock.

        Raises:
            ValueError: when another process holds it.
        """
        self.release()
        if fcntl is None:
            return
        lock = self.path.with_name(f".{self.path.name}.lock")
        if (file := self._locked(lock)) is not None:
            self._finish = weakref.finalize(self, _remove, lock, file, os.getpid())

    def release(self) -> None:
        """Release the lock, if it is held."""
        self._finish()

    def _locked(self, path: Path) -> TextIO | None:
        """Open a file for appending and lock it; return None if it cannot be opened."""
        # a process loses its lock on a file when it closes the file, even if it has opened it several times
        if (earlier := _holders.get(os.path.realpath(path))) is not None:
            earlier.release()
        _holders[os.path.realpath(path)] = self
        while True:
            try:
                file = path.open("a", encoding="utf-8", errors="backslashreplace")
            except OSError as error:  # it belongs to another user
                logger.warning(f"{path} cannot be written ({error.strerror}): the run continues without it.")
                return None
            if fcntl is None:
                return file
            try:
                # not flock: processes forked during the run would hold it too
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            except FileNotFoundError:
                pass
            except (BlockingIOError, PermissionError):
                file.close()
                fail(
                    f"{self.setting} {str(self.path.parent)!r} is in use: another run is writing {self.path.name} "
                    f"there. Wait until it ends, or give --{self.setting} another folder."
                )
            except OSError:  # a file system without locks
                return file
            file.close()  # another run has just ended and removed it


class RunLog(RunLock):
    """Copy everything that this process logs to a file, from ``take`` to ``release``.

    New lines are appended. The open file is locked, so that no other process can run with the same folder.

    Args:
        path: file to write.
        setting: name of the knob that chose its folder.
    """

    def __init__(self, path: str | os.PathLike, setting: str = "output_dir") -> None:
        super().__init__(path, setting)
        self._handler: logging.StreamHandler | None = None

    def take(self) -> None:
        """Open the file.

        Raises:
            ValueError: when another process has it open.
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
        """Close the file, if it is open, after writing the error that stopped the run."""
        if error is not None and self._handler is not None:
            self._note("ERROR", "".join(traceback.format_exception(error)).rstrip())
            if (refusal := refusal_in(error)) is not None:
                refusal.log = self.path
        self._handler = None
        self._finish()

    def _note(self, level: str, text: str) -> None:
        self._handler.handle(logging.makeLogRecord({"levelname": level, "msg": text}))


class _LogHandler(logging.StreamHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Ignore it: a log that cannot be written must not fill the screen with errors."""


def _nothing() -> None:
    return


def _remove(path: Path, file: TextIO, process: int) -> None:
    if os.getpid() == process:  # not in a forked process
        with suppress(OSError):
            path.unlink()
    file.close()


def _stop_logging(handler: logging.StreamHandler) -> None:
    logging.getLogger().removeHandler(handler)
    with suppress(OSError):  # a full disk refuses the last lines too
        handler.stream.close()
