"""Measurements of frames and of single slices, in pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import ndimage

__all__ = ["measure_frame"]


def measure_frame(classes: np.ndarray, names: Mapping[int, str], parts: bool = False) -> dict[str, Any]:
    """Measure each class of a class map.

    Args:
        classes: class indices, (W, H), on the grid of the file.
        names: name of each class to measure, by its index.
        parts: whether to add each connected part (joined by edges), the largest first.

    Returns:
        ``classes``: for each name ``pixels``, ``fraction`` (of all pixels) and, if asked for, ``parts`` with the
        ``pixels``, ``fraction`` and ``box`` of each (left, top, width, height, in pixels from 0);
        ``touches_border``: whether any of the classes touches an edge of the frame.
    """
    result: dict[str, Any] = {"classes": {}, "touches_border": False}
    for index, name in names.items():
        mask = classes == index
        pixels = int(np.count_nonzero(mask))
        measured: dict[str, Any] = {"pixels": pixels, "fraction": pixels / mask.size}
        result["touches_border"] |= bool(mask[[0, -1]].any() or mask[:, [0, -1]].any())
        if parts:
            labels, _ = ndimage.label(mask)
            sizes = np.bincount(labels.ravel())[1:]
            boxes = ndimage.find_objects(labels)
            measured["parts"] = [
                {
                    "pixels": int(sizes[k]),
                    "fraction": int(sizes[k]) / mask.size,
                    "box": [boxes[k][0].start, boxes[k][1].start, *(side.stop - side.start for side in boxes[k])],
                }
                for k in np.argsort(-sizes, kind="stable")
            ]
        result["classes"][name] = measured
    return result
