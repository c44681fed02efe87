"""Arrays that are larger than the memory: results of large images, on disk while they are measured and written."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

__all__ = ["DiskTensor", "each_page", "forget"]


class DiskTensor(MetaTensor):
    """A tensor whose values are in a memory-mapped file, and which :func:`each_page` goes through in flat memory.

    Args:
        values: the mapped array, or a view of it.
        meta: metadata.
    """

    @staticmethod
    def __new__(cls, values: np.memmap, meta: Mapping[str, Any] | None = None) -> DiskTensor:
        """Return the tensor, which shares the mapped memory."""
        tensor = MetaTensor.__new__(cls, torch.from_numpy(values), meta=dict(meta or {}))
        tensor._values = values
        return tensor

    def __init__(self, values: np.memmap, meta: Mapping[str, Any] | None = None) -> None:
        super().__init__(values, meta=dict(meta or {}))

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """Return the mapped array, which a tensor alone would not give back as such."""
        return self._values


def each_page(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the pages (H, W) of an array (..., H, W) in order; of an array on disk, only one is kept in memory."""
    for index in np.ndindex(array.shape[:-2]):
        yield array[index]
        forget(array)


def forget(array: np.ndarray) -> None:
    """Let the memory of an array on disk, or of a view of one, go; what was written stays in its file."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
