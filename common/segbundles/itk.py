"""Silencing ITK's warnings, in a module that imports neither torch nor MONAI, and ITK only when it is used."""

from __future__ import annotations

import locale
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_itk"]

_lock = threading.Lock()
_before: list[tuple[str, bool]] = []  # one entry per open block, in any thread


@contextmanager
def quiet_itk() -> Iterator[None]:
    """Silence ITK's warnings, because this library's errors say what is wrong, and preserve the locale.

    Both belong to the process. If several threads are in such a block, the last one to leave restores them.
    """
    import SimpleITK as sitk  # noqa: N813

    # GDCM's JPEG sets the locale to C, so that text files opened afterwards would be read as ASCII
    with _lock:
        _before.append((locale.setlocale(locale.LC_ALL), sitk.ProcessObject.GetGlobalWarningDisplay()))
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        with _lock:
            name, level = _before.pop()
            if not _before:  # the values that the first block found
                sitk.ProcessObject.SetGlobalWarningDisplay(level)
                locale.setlocale(locale.LC_ALL, name)
