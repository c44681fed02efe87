"""Objects found, missed and invented: connected parts of truth and prediction, matched with each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from segbundles.errors import fail
from segbundles.statistics.intervals import bootstrap_interval

__all__ = ["DETECTION_COLUMNS", "count_objects", "detection_rates"]

DETECTION_COLUMNS = ("objects", "objects_found", "objects_found_iou50", "predicted_objects")
DETECTION_COLUMNS += ("false_objects", "false_objects_iou50")


def count_objects(prediction: ArrayLike, truth: ArrayLike, min_size: int = 1, connectivity: int = 1) -> dict[str, int]:
    """Count which objects of a case were found; an object is a connected part of a mask, 2D or 3D.

    Matched at any overlap, an object counts as found if any of its pixels is predicted, and a predicted object as false
    if it does not touch any true one. Matched at an intersection over union above 0.5, an object matches at most one
    other, and a predicted object without a match is false.

    The matching above 0.5 follows A. Kirillov et al., Panoptic Segmentation, CVPR 2019.

    Args:
        prediction: mask (spatial), foreground is not 0.
        truth: mask of the same shape.
        min_size: objects of fewer pixels or voxels do not count, neither true nor predicted ones.
        connectivity: 1 joins pixels by faces, 2 by edges too, 3 by corners too.

    Returns:
        :data:`DETECTION_COLUMNS`: the number of true objects (``objects``), of those found at any overlap and above an
        IoU of 0.5, of ``predicted_objects``, and of those that are false at any overlap and at IoU 0.5.

    Raises:
        ValueError: when the shapes differ.
    """
    seen, true = (np.asarray(mask) != 0 for mask in (prediction, truth))
    if seen.shape != true.shape:
        fail(f"prediction has shape {seen.shape}, truth {true.shape}: they must be equal.")
    (true_parts, true_sizes), (seen_parts, seen_sizes) = (_parts(mask, min_size, connectivity) for mask in (true, seen))
    found, touching, matched = set(), set(), 0
    shared = (true_parts > 0) & (seen_parts > 0)
    step = int(seen_parts.max(initial=0)) + 1
    pairs, overlaps = np.unique(true_parts[shared].astype(np.int64) * step + seen_parts[shared], return_counts=True)
    for pair, both in zip(pairs.tolist(), overlaps.tolist(), strict=True):
        t, s = divmod(pair, step)
        found.add(t)
        touching.add(s)
        matched += 2 * both > true_sizes[t] + seen_sizes[s] - both
    counts = (len(true_sizes), len(found), matched, len(seen_sizes))
    counts += (len(seen_sizes) - len(touching), len(seen_sizes) - matched)
    return dict(zip(DETECTION_COLUMNS, counts, strict=True))


def detection_rates(rows: Sequence[Mapping[str, Any]], groups: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Compute rates of detection over the cases of a set, each with its interval over the groups.

    Args:
        rows: one row per case with :data:`DETECTION_COLUMNS`, as from :func:`count_objects`.
        groups: group of each case.

    Returns:
        For ``any_overlap`` and ``iou50``: ``sensitivity`` (share of all true objects that were found), ``precision``
        (share of all predicted objects that are not false) and ``false_per_case`` (false objects per case), each as
        :meth:`segbundles.statistics.Interval.as_dict`. A set without objects has no sensitivity (None).
    """
    columns = np.array([[row[name] for name in DETECTION_COLUMNS] for row in rows], dtype=float)
    columns = columns.reshape(len(rows), len(DETECTION_COLUMNS))
    rates: dict[str, dict[str, Any]] = {}
    for matching, (hits, false) in {"any_overlap": (1, 4), "iou50": (2, 5)}.items():
        rates[matching] = {
            name: bootstrap_interval(columns, groups, statistic).as_dict()
            for name, statistic in {
                "sensitivity": lambda drawn, hits=hits: _share(drawn[:, hits], drawn[:, 0]),
                "precision": lambda drawn, false=false: _share(drawn[:, 3] - drawn[:, false], drawn[:, 3]),
                "false_per_case": lambda drawn, false=false: drawn[:, false].mean(),
            }.items()
        }
    return rates


def _parts(mask: NDArray, min_size: int, connectivity: int) -> tuple[NDArray, dict[int, int]]:
    """Return a label image whose small parts are 0, and the size of each other part."""
    parts, _ = ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, connectivity))
    sizes = np.bincount(parts.ravel())
    large = sizes >= min_size
    large[0] = False
    return np.where(large, np.arange(len(sizes)), 0)[parts], {k: int(sizes[k]) for k in np.flatnonzero(large).tolist()}


def _share(part: NDArray, whole: NDArray) -> float:
    return float(part.sum() / whole.sum()) if whole.sum() else np.nan
