"""Measurements of the cells in EM sections."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

__all__ = ["CELL_COLUMNS", "CellTotals", "cell_measurements", "measure_cells"]

#: columns of ``<stem>_cells.csv``
CELL_COLUMNS = ("section", "label", "area_pixels", "area_nm2", "centroid_x", "centroid_y", "touches_border")


class CellTotals:
    """Count the pixels of the numbered cells of a section, block by block.

    Args:
        count: the largest number of a cell.
        size: width and height of the section.

    Attributes:
        areas: pixels of each cell from 0, which is no cell.
    """

    def __init__(self, count: int, size: Sequence[int]) -> None:
        self.size = tuple(size)
        self.areas = np.zeros(count + 1, np.int64)
        self._sums = np.zeros((2, count + 1))
        self._at_border = np.zeros(count + 1, bool)

    def add(self, cells: np.ndarray, start: Sequence[int] = (0, 0)) -> None:
        """Add a block (W, H) that begins at a pixel of the section."""
        count = len(self.areas)
        numbers, size = cells.ravel(), cells.shape
        self.areas += np.bincount(numbers, minlength=count)
        for axis in (0, 1):
            along = np.broadcast_to(np.expand_dims(np.arange(size[axis], dtype=np.float64), 1 - axis), size)
            sums = np.bincount(numbers, along.ravel(), minlength=count)
            self._sums[axis] += sums + float(start[axis]) * np.bincount(numbers, minlength=count)
            edges = [(0, start[axis] == 0), (-1, start[axis] + size[axis] == self.size[axis])]
            for place, outer in edges:
                if outer:
                    self._at_border[cells.take(place, axis)] = True

    def rows(self, section: int, pixel_nm: float | None) -> list[dict[str, Any]]:
        """Return one row per cell with the columns :data:`CELL_COLUMNS`."""
        found = np.flatnonzero(self.areas[1:]) + 1
        areas = self.areas[found]
        columns = (
            [section] * len(found),
            found.tolist(),
            areas.tolist(),
            [None] * len(found) if pixel_nm is None else (areas * pixel_nm**2).tolist(),
            *(self._sums[:, found] / areas).tolist(),
            self._at_border[found].tolist(),
        )
        return [dict(zip(CELL_COLUMNS, values, strict=True)) for values in zip(*columns, strict=True)]


def measure_cells(
    cells: np.ndarray, membrane: np.ndarray, pixel_nm: float | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure the numbered cells of a stack of sections.

    Args:
        cells: numbers of cells from 1 in each section, 0 elsewhere, (W, H, sections).
        membrane: where the membrane mask has membrane, (W, H, sections).
        pixel_nm: size of a pixel in nm; None if it is not known.

    Returns:
        As from :func:`cell_measurements`.
    """
    sections = []
    for number in range(cells.shape[2]):
        section = np.ascontiguousarray(cells[..., number])
        sections.append(CellTotals(int(section.max(initial=0)), section.shape))
        sections[-1].add(section)
    return cell_measurements(sections, float(np.count_nonzero(membrane) / membrane.size), pixel_nm)


def cell_measurements(
    sections: Sequence[CellTotals], membrane_fraction: float, pixel_nm: float | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the measurements of the cells of a stack of sections.

    Args:
        sections: the counted pixels of each section.
        membrane_fraction: share of pixels that are membrane.
        pixel_nm: size of a pixel in nm; None if it is not known.

    Returns:
        ``cells`` (number in all sections), ``cells_per_section`` and ``membrane_fraction``; and one row per cell with
        the columns :data:`CELL_COLUMNS`: sections count from 1, centroids are in pixels from 0, and ``area_nm2`` is
        None without ``pixel_nm``.
    """
    tables = [totals.rows(number, pixel_nm) for number, totals in enumerate(sections, 1)]
    counts = [len(table) for table in tables]
    measured = {"cells": sum(counts), "cells_per_section": counts, "membrane_fraction": membrane_fraction}
    return measured, list(chain.from_iterable(tables))
