"""Pictures of a section: the image, the membrane probability, the cells, and the wrong pixels."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from monai.utils import convert_to_numpy
from numpy.typing import NDArray
from PIL import Image
from skimage.segmentation import expand_labels, relabel_sequential

from segbundles.errors import fail
from segbundles.report import overlay
from segbundles.report.overlay import (
    _TALLEST_PANEL,
    PREDICTION_COLOURS,
    TRUTH_COLOURS,
    _compose,
    _encode,
    _grey_window,
    _to_uint8,
)

__all__ = ["CELL_COLOURS", "colour_cells", "group_cells", "limit_figures", "section_figure"]

# Okabe and Ito's colour-blind-safe palette, with grey instead of black
CELL_COLOURS = (
    (86, 180, 233),
    (230, 159, 0),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (170, 170, 170),
)
_PANEL = 512  # pixels, width of one panel; thin membranes need more than an organ
_FIGURE_BYTES = 300_000  # a stack of 30 sections, base64-encoded, makes 12 MB
_REPORT_BYTES = 14_000_000  # of all sections; base64-encoded 19 MB
_REACH = 8  # pixels by which cells are grown to find their neighbours


def group_cells(cells: Any) -> NDArray[np.uint8]:
    """Divide the cells of a label image into as many groups as there are :data:`CELL_COLOURS`; neighbours differ.

    Cells are assigned one after the other, each to the smallest group that no neighbour belongs to. If no group is left
    (nine cells that all touch each other), two neighbours share one.

    Args:
        cells: label image (H, W), membranes 0.

    Returns:
        Groups, (H, W), uint8, from 1; membranes are 0.
    """
    labels = convert_to_numpy(cells)
    if labels.ndim != 2 or labels.dtype.kind not in "iub" or not labels.size or labels.min() < 0:
        fail(f"cells must be a label image (H, W) of integers from 0, got shape {labels.shape} of {labels.dtype}.")
    labels = relabel_sequential(labels.astype(np.int64))[0]
    grown = expand_labels(labels, _REACH)
    pairs = np.concatenate(
        [np.stack([a.ravel(), b.ravel()], 1) for a, b in ((grown[1:], grown[:-1]), (grown[:, 1:], grown[:, :-1]))]
    )
    neighbours: dict[int, set[int]] = {}
    for one, other in np.unique(pairs[(pairs[:, 0] != pairs[:, 1]) & pairs.all(1)], axis=0).tolist():
        neighbours.setdefault(one, set()).add(other)
        neighbours.setdefault(other, set()).add(one)
    table = np.zeros(labels.max() + 1, np.uint8)
    chosen: dict[int, int] = {}
    used: Counter[int] = Counter()
    for cell in range(1, len(table)):
        taken = {chosen[other] for other in neighbours.get(cell, ()) if other in chosen}
        free = [k for k in range(len(CELL_COLOURS)) if k not in taken] or list(range(len(CELL_COLOURS)))
        chosen[cell] = min(free, key=lambda k: used[k])
        used[chosen[cell]] += 1
        table[cell] = chosen[cell] + 1
    return table[labels]


def colour_cells(cells: Any) -> NDArray[np.uint8]:
    """Colour a label image so that neighbouring cells differ, see :func:`group_cells`.

    Args:
        cells: label image (H, W), membranes 0.

    Returns:
        Colours, (H, W, 3), uint8; membranes are black.
    """
    return np.array([(0, 0, 0), *CELL_COLOURS], np.uint8)[group_cells(cells)]


def section_figure(image: Any, truth: Any, prediction: Any, membrane_probability: Any, cells: Any) -> bytes:
    """Draw a section for the report: image, membrane probability, cells in colour, and wrong pixels.

    Args:
        image: grey values (W, H).
        truth: class indices (W, H), 0 membrane, 1 cell.
        prediction: class indices (W, H).
        membrane_probability: (W, H), 0 to 1.
        cells: label image (W, H), membranes 0.

    Returns:
        A JPEG picture of at most 300 kB.

    Raises:
        ValueError: when the shapes differ or are not 2D.
    """
    given = {"image": image, "truth": truth, "prediction": prediction}
    given |= {"membrane_probability": membrane_probability, "cells": cells}
    maps = {name: convert_to_numpy(value) for name, value in given.items()}
    if any(value.ndim != 2 or value.shape != maps["image"].shape for value in maps.values()):
        fail(
            "a section and its maps must have one shape (W, H), got "
            + ", ".join(f"{n} {v.shape}" for n, v in maps.items())
        )
    # MONAI's axes are (W, H), those of a picture (H, W)
    grey, true, seen, probability, found = (value.T for value in maps.values())
    shown = _to_uint8(grey, _grey_window(grey))
    errors = np.repeat(shown[..., None] // 2 + 96, 3, axis=-1)
    errors[(true == 0) & (seen != 0)] = TRUTH_COLOURS[0]
    errors[(true != 0) & (seen == 0)] = PREDICTION_COLOURS[0]
    share = float((true != seen).mean())
    panels = [
        ("image", f"{grey.shape[1]} x {grey.shape[0]} pixels", shown, Image.Resampling.BICUBIC),
        ("probability of membrane", "dark: certain", _to_uint8(1 - probability, (0.0, 1.0)), Image.Resampling.BICUBIC),
        ("cells", f"{len(np.unique(found[found > 0]))} found", colour_cells(found), Image.Resampling.NEAREST),
        (f"wrong pixels: {100 * share:.1f} %", "blue: missed membrane; orange: too much", errors, Image.Resampling.BOX),
    ]
    scale = min(_PANEL / grey.shape[1], _PANEL * _TALLEST_PANEL / grey.shape[0])
    size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
    drawn = [
        (name, reason, np.asarray(Image.fromarray(picture).convert("RGB").resize(size, how)))
        for name, reason, picture, how in panels
    ]
    return _encode(_compose(drawn, _PANEL), _FIGURE_BYTES)


def limit_figures(figures: Sequence[bytes]) -> list[bytes]:
    """Shrink the pictures of sections if a report would become too large to open or send.

    Up to 46 sections stay unchanged; 200 make a report of less than 20 MB.

    Args:
        figures: JPEG pictures of all sections.

    Returns:
        The same pictures, of at most 14 MB together, or 68 kB each if that is more.
    """
    most = max(overlay._FIGURE_BYTES, _REPORT_BYTES // max(1, len(figures)))
    return [figure if len(figure) <= most else _encode(Image.open(io.BytesIO(figure)), most) for figure in figures]
