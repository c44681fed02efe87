"""A case as compact data that a page shows with a slider through its slices."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import find_contours

from segbundles.report.overlay import PREDICTION_COLOURS, TRUTH_COLOURS, _displayed, _grey_window, _to_uint8
from segbundles.report.sections import CELL_COLOURS, group_cells

__all__ = ["case_slices", "share_of_page"]

TRUTH, CELLS, UNCERTAINTY = "truth", "cells", "uncertainty"  # overlays with colours of their own
UNCERTAINTY_COLOURS = ((240, 228, 66), (204, 121, 167))

_MOST_PIXELS = 5_000_000  # of all slices together, for the time it takes to encode them
_PIXELS_PER_BYTE = 6  # of a JPEG picture, about
_QUALITIES = (75, 60, 45)
_BLOCK = 8  # pixels, side of a JPEG block; slices that share none do not mix
_STEPS = (1, 2, 4, 8, 16, 32)  # pixels of the image per step of an outline
_SAMPLES = 500_000  # voxels from which the range of grey levels is estimated
_SMALLEST_SHARE = 30_000  # bytes

Paths = dict[int, dict[str, str]]  # by class and slice
Box = tuple[slice, slice, slice]


def case_slices(
    image: Any,
    overlays: Mapping[str, Any],
    *,
    spacing_mm: Sequence[float] | None = None,
    slice_axis: int = -1,
    affine: Any | None = None,
    most_bytes: int = 1_000_000,
) -> dict[str, Any]:
    """Turn a case into data for a page that shows every slice, and overlays that can be switched on and off.

    All slices become one JPEG picture. Class maps become outlines as SVG paths on the grid of the image, so that they
    stay sharp at any size. If there are many slices, or complicated outlines, both become coarser; no slice is left
    out. Slices are turned as in :func:`segbundles.report.case_figure`.

    Args:
        image: as for ``case_figure``.
        overlays: name of each overlay, and its class map (spatial). ``"truth"`` has the colours of truth, all others
            have those of predictions. ``"cells"`` numbers cells instead, section by section; they are filled.
            ``"uncertainty"`` has levels, which are filled too; it is switched off at first, and left out where
            nothing is uncertain.
        spacing_mm: as for ``case_figure``.
        slice_axis: as for ``case_figure``.
        affine: as for ``case_figure``.
        most_bytes: how large the result may be as JSON. Below about 2 kB per slice it is coarse.

    Returns:
        What ``viewer.js.j2`` shows, as JSON has it: ``size`` (columns and rows of a slice, in pixels of the image);
        ``aspect`` (width over height); ``slices`` (their number); ``start`` (the slice with the most truth, or
        otherwise with the most of all overlays, from 0); ``picture`` (data URI of all slices, row by row), its
        ``columns`` and ``tile`` (width and height of a slice in it); and ``overlays``, each with ``name``, ``style``
        (``solid``, ``dashed`` or ``filled``), ``hidden`` (whether it is switched off at first) and ``classes``. Each of
        these has its ``class``, its ``colour`` and, by slice, its ``paths``, in half pixels of the image.

    Raises:
        ValueError: when the shapes do not match, or a class map contains fractions.
    """
    pixels, maps, (row_mm, column_mm), _ = _displayed(image, overlays, spacing_mm, slice_axis, affine)
    height, width, count = pixels.shape[:3]
    if CELLS in maps:
        cells = maps[CELLS]
        maps[CELLS] = np.stack([group_cells(cells[:, :, k]) for k in range(count)], axis=2)
    doubt = maps.pop(UNCERTAINTY, None)
    boxes = {name: _box(classes) for name, classes in maps.items()}
    drawn, used = _drawn(maps, boxes, most_bytes // 2)
    if doubt is not None and doubt.any():
        found, more = _drawn({UNCERTAINTY: doubt}, {UNCERTAINTY: _box(doubt)}, most_bytes // 8)
        drawn, used = drawn | found, used + more
    picture, tile, columns = _picture(pixels, max(1, (most_bytes - used - 500) * 3 // 4))
    return {
        "size": [width, height],
        "aspect": round(width * column_mm / (height * row_mm), 4),
        "slices": count,
        "start": _largest(maps, boxes, count),
        "picture": f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}",
        "columns": columns,
        "tile": list(tile),
        "overlays": [_overlay(name, paths, TRUTH in maps) for name, paths in drawn.items()],
    }


def share_of_page(total: int, cases: int, most: int) -> int:
    """Return how many bytes each of the cases on a page may have, at least 30 kB.

    Args:
        total: bytes of all cases.
        cases: number of cases.
        most: bytes of one case.
    """
    return max(_SMALLEST_SHARE, min(most, total // max(1, cases)))


def _overlay(name: str, paths: Paths, has_truth: bool) -> dict[str, Any]:
    own = {TRUTH: TRUTH_COLOURS, CELLS: CELL_COLOURS, UNCERTAINTY: UNCERTAINTY_COLOURS}
    colours = own.get(name, PREDICTION_COLOURS)
    style = "filled" if name in (CELLS, UNCERTAINTY) else "dashed" if has_truth and name != TRUTH else "solid"
    classes = [
        {"class": value, "colour": f"rgb{colours[(value - 1) % len(colours)]}", "paths": by_slice}
        for value, by_slice in paths.items()
    ]
    return {"name": name, "style": style, "hidden": name == UNCERTAINTY, "classes": classes}


def _largest(maps: Mapping[str, NDArray], boxes: Mapping[str, Box], count: int) -> int:
    """Return the slice with the most truth, or with the most of all; the middle one of empty maps."""
    names = [TRUTH] if TRUTH in maps and maps[TRUTH][boxes[TRUTH]].any() else list(maps)
    area = np.zeros(count, int)
    for name in names:
        area[boxes[name][2]] += np.count_nonzero(maps[name][boxes[name]], axis=(0, 1))
    return int(np.argmax(area)) if area.any() else count // 2


def _drawn(maps: Mapping[str, NDArray], boxes: Mapping[str, Box], most: int) -> tuple[dict[str, Paths], int]:
    """Outline every class on every slice, as finely as the bytes allow; return the outlines and their bytes."""
    for step in _STEPS:
        coarse = {name: maps[name][box][::step, ::step] for name, box in boxes.items()}
        last = step == _STEPS[-1]
        if not last and sum(map(_edges, coarse.values())) > most:  # about two bytes per edge of a pixel
            continue
        drawn = {name: _paths(classes, boxes[name], step, maps[name].shape) for name, classes in coarse.items()}
        used = sum(
            len(path) + 8 for paths in drawn.values() for by_slice in paths.values() for path in by_slice.values()
        )
        if last or used <= most:
            break
    return drawn, used


def _box(classes: NDArray) -> Box:
    """Return the bounding box of a class map; an empty one of an empty map."""
    plane = classes.any(axis=2)
    spans = []
    for found in (plane.any(axis=1), plane.any(axis=0), classes.any(axis=(0, 1))):
        inside = np.flatnonzero(found)
        spans.append(slice(int(inside[0]), int(inside[-1]) + 1) if inside.size else slice(0, 0))
    return spans[0], spans[1], spans[2]


def _edges(classes: NDArray) -> int:
    return sum(np.count_nonzero(a != b) for a, b in ((classes[1:], classes[:-1]), (classes[:, 1:], classes[:, :-1])))


def _paths(classes: NDArray, box: Box, step: int, shape: tuple[int, ...]) -> Paths:
    planes = _planes(classes)
    start, most = np.array([box[0].start, box[1].start]), 2 * np.array(shape[:2])
    found: Paths = {int(value): {} for value in np.unique(planes) if value > 0}
    for k, plane in enumerate(planes, box[2].start):
        for value, by_slice in found.items():
            if (mask := plane == value).any():
                by_slice[str(k)] = _path(mask, start, step, most)
    return found


def _path(mask: NDArray[np.bool_], start: NDArray, step: int, most: NDArray) -> str:
    """Return the outlines of a mask as an SVG path, in half pixels of the image and without needless points."""
    # thousands of small outlines: all of them at once; each ends where it starts
    contours = [contour[:-1] for contour in find_contours(np.pad(mask, 1).astype(np.float32), 0.5)]
    points = np.rint((np.concatenate(contours) - 0.5) * 2 * step).astype(int) + 2 * start
    points = np.clip(points, 0, most)[:, ::-1]
    ends = np.cumsum([len(contour) for contour in contours])
    starts = np.concatenate([[0], ends[:-1]])
    following, previous = np.arange(1, len(points) + 1), np.arange(-1, len(points) - 1)
    following[ends - 1], previous[starts] = starts, ends - 1
    steps = points[following] - points
    before = steps[previous]
    is_corner = before[:, 0] * steps[:, 1] != before[:, 1] * steps[:, 0]
    corners, last = points[is_corner], np.cumsum(is_corner)[ends - 1].tolist()
    moves = list(map(str, np.diff(corners, axis=0).ravel().tolist()))
    parts = [
        f"M{corners[first, 0]} {corners[first, 1]}l{' '.join(moves[2 * first : 2 * end - 2])}z"
        for first, end in pairwise([0, *last])
    ]
    return "".join(parts).replace(" -", "-")


def _picture(pixels: NDArray, most: int) -> tuple[bytes, tuple[int, int], int]:
    """Return a JPEG picture of all slices, width and height of a slice in it, and its number of columns."""
    height, width, count = pixels.shape[:3]
    colours = pixels.ndim == 4
    every = math.ceil((height * width * count / _SAMPLES) ** (1 / 3))
    window = (0.0, 255.0) if colours and pixels.dtype == np.uint8 else _grey_window(pixels[::every, ::every, ::every])
    scale = math.sqrt(min(1.0, min(_MOST_PIXELS, most * _PIXELS_PER_BYTE) / (height * width * count)))
    tiles = [Image.fromarray(plane) for plane in _planes(_to_uint8(_shrunk(pixels, int(1 / scale)), window))]
    columns = math.ceil(math.sqrt(count))
    while True:
        side = [
            _BLOCK * max(1, round(n * scale / _BLOCK)) if count > 1 else max(1, round(n * scale))
            for n in (width, height)
        ]
        sheet = Image.new("RGB" if colours else "L", (side[0] * columns, side[1] * math.ceil(count / columns)))
        for k, tile in enumerate(tiles):
            small = tile.resize(side, Image.Resampling.BILINEAR)
            sheet.paste(small, (k % columns * side[0], k // columns * side[1]))
        for quality in _QUALITIES:
            buffer = io.BytesIO()
            sheet.save(buffer, "JPEG", quality=quality)
            if buffer.tell() <= most or max(side) <= _BLOCK:
                return buffer.getvalue(), (side[0], side[1]), columns
        scale *= max(0.3, 0.95 * math.sqrt(most / buffer.tell()))


def _planes(volume: NDArray) -> NDArray:
    """Return the slices of a volume (rows, columns, slices, ...), each in one piece of memory."""
    # several times faster than numpy.ascontiguousarray
    positive = volume[tuple(slice(None, None, -1 if step < 0 else 1) for step in volume.strides)]
    flipped = [axis for axis, step in enumerate(volume.strides) if step < 0]
    if not positive.flags.writeable or min(positive.strides) < 0:  # which torch refuses
        positive = positive.copy()
    return torch.from_numpy(positive).flip(flipped).movedim(2, 0).contiguous().numpy()


def _shrunk(pixels: NDArray, factor: int) -> NDArray:
    """Average blocks of pixels; what is left at the end of rows and columns is lost."""
    if factor < 2:
        return pixels
    height, width = (n // factor * factor for n in pixels.shape[:2])
    blocks = (pixels[i:height:factor, j:width:factor] for i in range(factor) for j in range(factor))
    return sum(block.astype(np.float32, copy=False) for block in blocks) / factor**2
