"""Measurements of the cells in EM sections."""

from __future__ import annotations

from typing import Any

import numpy as np
from skimage.measure import regionprops

__all__ = ["CELL_COLUMNS", "measure_cells"]

#: columns of ``<stem>_cells.csv``
CELL_COLUMNS = ("section", "label", "area_pixels", "area_nm2", "centroid_x", "centroid_y", "touches_border")


def measure_cells(
    cells: np.ndarray, membrane: np.ndarray, pixel_nm: float | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure the numbered cells of a stack of sections.

    Args:
        cells: numbers of cells from 1 in each section, 0 elsewhere, (W, H, sections).
        membrane: where the membrane mask has membrane, (W, H, sections).
        pixel_nm: size of a pixel in nm; None if it is not known.

    Returns:
        ``cells`` (number in all sections), ``cells_per_section`` and ``membrane_fraction``; and one row per cell with
        the columns :data:`CELL_COLUMNS`: sections count from 1, centroids are in pixels from 0, and ``area_nm2`` is
        None without ``pixel_nm``.
    """
    rows: list[dict[str, Any]] = []
    counts = []
    for number in range(cells.shape[2]):
        regions = regionprops(np.ascontiguousarray(cells[..., number]))
        counts.append(len(regions))
        width, height = cells.shape[:2]
        for region in regions:
            left, top, right, bottom = region.bbox
            values = (
                number + 1,
                int(region.label),
                int(region.area),
                None if pixel_nm is None else float(region.area * pixel_nm**2),
                float(region.centroid[0]),
                float(region.centroid[1]),
                left == 0 or top == 0 or right == width or bottom == height,
            )
            rows.append(dict(zip(CELL_COLUMNS, values, strict=True)))
    result = {
        "cells": sum(counts),
        "cells_per_section": counts,
        "membrane_fraction": float(np.count_nonzero(membrane) / membrane.size),
    }
    return result, rows
