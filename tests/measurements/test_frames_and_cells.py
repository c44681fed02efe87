from __future__ import annotations

import numpy as np
import pytest
from skimage.measure import regionprops

from segbundles.measurements import CELL_COLUMNS, measure_cells, measure_frame


def test_parts_of_a_frame_by_hand() -> None:
    classes = np.zeros((20, 10), np.uint8)
    classes[2:4, 1:3] = 1
    classes[10:15, 4:6] = 1
    classes[7, 7] = 2
    found = measure_frame(classes, {1: "polyp", 2: "tool", 3: "none"}, parts=True)
    assert found["classes"]["polyp"] == {
        "pixels": 14,
        "fraction": 0.07,
        "parts": [
            {"pixels": 10, "fraction": 0.05, "box": [10, 4, 5, 2]},
            {"pixels": 4, "fraction": 0.02, "box": [2, 1, 2, 2]},
        ],
    }
    assert found["classes"]["none"] == {"pixels": 0, "fraction": 0.0, "parts": []}
    assert not found["touches_border"]
    classes[19, 5] = 1
    assert measure_frame(classes, {1: "polyp"})["touches_border"]
    assert not measure_frame(classes, {2: "tool"})["touches_border"]


@pytest.mark.parametrize("pixel_nm", [None, 4.0])
def test_cells_by_hand(pixel_nm: float | None) -> None:
    cells = np.zeros((8, 6, 2), np.int32)
    cells[1:3, 1:4, 0] = 1
    cells[5:8, 2:4, 0] = 7
    cells[3, 3, 1] = 1
    found, rows = measure_cells(cells, cells > 0, pixel_nm)
    assert found == {"cells": 3, "cells_per_section": [2, 1], "membrane_fraction": pytest.approx(1 - 13 / 96)}
    area = (lambda pixels: None) if pixel_nm is None else (lambda pixels: pixels * 16)
    assert [tuple(row[column] for column in CELL_COLUMNS) for row in rows] == [
        (1, 1, 6, area(6), 1.5, 2.0, False),
        (1, 7, 6, area(6), 6.0, 2.5, True),
        (2, 1, 1, area(1), 3.0, 3.0, False),
    ]


def test_cells_of_a_large_section_are_those_of_scikit_image() -> None:
    """Areas, centroids and borders; the section is higher than what is counted at once."""
    cells = np.random.default_rng(0).integers(0, 30, (9, 30)).repeat(5, 0).repeat(20, 1)
    _, rows = measure_cells(cells[..., None], cells[..., None] > 0)
    regions = regionprops(cells)
    assert len(regions) == len(rows) == 29
    for row, region in zip(rows, regions, strict=True):
        assert (row["label"], row["area_pixels"]) == (region.label, region.area)
        assert (row["centroid_x"], row["centroid_y"]) == pytest.approx(region.centroid)
        left, top, right, bottom = region.bbox
        assert row["touches_border"] == (left == 0 or top == 0 or right == 45 or bottom == 600)
