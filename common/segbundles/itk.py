"""ITK kept quiet, in a module of its own that loads neither torch nor MONAI."""

from __future__ import annotations

import locale
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import SimpleITK as sitk  # noqa: N813

__all__ = ["quiet_itk"]

_lock = threading.Lock()
_before: list[tuple[str, bool]] = []  # an entry a block that is open, in any thread


@contextmanager
def quiet_itk() -> Iterator[None]:
    """Keep ITK's warnings from standard error, as this library's errors say what is wrong, and the locale as it is.

    Both are the process's: while several threads are in such a block, the last one to leave puts them back.
    """
    # GDCM's JPEG sets it to C: text files opened afterwards would be read as ASCII
    with _lock:
        _before.append((locale.setlocale(locale.LC_ALL), sitk.ProcessObject.GetGlobalWarningDisplay()))
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        with _lock:
            name, level = _before.pop()
            if not _before:  # what was found by the first one
                sitk.ProcessObject.SetGlobalWarningDisplay(level)
                locale.setlocale(locale.LC_ALL, name)
