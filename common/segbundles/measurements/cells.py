"""Measurements of the cells in EM sections."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np

from segbundles.data import each_page

__all__ = ["CELL_COLUMNS", "measure_cells"]

#: columns of ``<stem>_cells.csv``
CELL_COLUMNS = ("section", "label", "area_pixels", "area_nm2", "centroid_x", "centroid_y", "touches_border")

_ROWS = 256  # of a section, which may be on disk, that are counted at once


def measure_cells(
    cells: np.ndarray, mask: np.ndarray, pixel_nm: float | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure the numbered cells of a stack of sections.

    Args:
        cells: numbers of cells from 1 in each section, 0 elsewhere, (W, H, sections).
        mask: 0 where there is membrane, (W, H, sections).
        pixel_nm: size of a pixel in nm; None if it is not known.

    Returns:
        ``cells`` (number in all sections), ``cells_per_section`` and ``membrane_fraction``; and one row per cell with
        the columns :data:`CELL_COLUMNS`: sections count from 1, centroids are in pixels from 0, and ``area_nm2`` is
        None without ``pixel_nm``.
    """
    tables = [_measure_section(page.T, number, pixel_nm) for number, page in enumerate(each_page(cells.T), 1)]
    counts = [len(table) for table in tables]
    fraction = 1 - sum(int(np.count_nonzero(page)) for page in each_page(mask.T)) / mask.size
    measured = {"cells": sum(counts), "cells_per_section": counts, "membrane_fraction": fraction}
    return measured, list(chain.from_iterable(tables))


def _measure_section(cells: np.ndarray, section: int, pixel_nm: float | None) -> list[dict[str, Any]]:
    """Return one row per cell of a section (W, H)."""
    count = int(cells.max(initial=0)) + 1
    areas, sums, at_border = np.zeros(count, np.int64), np.zeros((2, count)), np.zeros(count, bool)
    for start in range(0, cells.shape[1], _ROWS):
        strip = cells[:, start : start + _ROWS]
        numbers = strip.ravel()
        areas += np.bincount(numbers, minlength=count)
        for axis, along in enumerate(np.ogrid[: len(strip), start : start + strip.shape[1]]):
            sums[axis] += np.bincount(numbers, np.broadcast_to(along, strip.shape).ravel(), minlength=count)
    for edge in (cells[0], cells[-1], cells[:, 0], cells[:, -1]):
        at_border[edge] = True
    found = np.flatnonzero(areas[1:]) + 1
    areas = areas[found]
    columns = (
        [section] * len(found),
        found.tolist(),
        areas.tolist(),
        [None] * len(found) if pixel_nm is None else (areas * pixel_nm**2).tolist(),
        *(sums[:, found] / areas).tolist(),
        at_border[found].tolist(),
    )
    return [dict(zip(CELL_COLUMNS, values, strict=True)) for values in zip(*columns, strict=True)]
