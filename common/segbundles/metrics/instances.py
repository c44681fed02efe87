"""Scores of cells separated by membranes: pixel accuracy, V_rand and V_info of the ISBI 2012 challenge.

Arganda-Carreras et al., Crowdsourcing the creation of image segmentation algorithms for connectomics, Frontiers in
Neuroanatomy 9 (2015) 142, https://doi.org/10.3389/fnana.2015.00142. Let p_ij be the share of the pixels in
cell i of the truth T and cell j of the prediction S, and t_i and s_j its sums:

- V_rand = sum p_ij^2 / (alpha sum s_j^2 + (1 - alpha) sum t_i^2). alpha = 0 is the split score (it falls when a true
  cell is split), alpha = 1 the merge score (it falls when true cells are merged), 0.5 the challenge's F-score.
- V_info = I(S; T) / ((1 - alpha) H(S) + alpha H(T)), with the mutual information I, the entropy H and the same alpha.

Both are restricted to the foreground, the pixels that are a cell in the truth. A foreground pixel that is membrane in
the prediction counts as a cell of its own, as in the challenge's program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from monai.utils import convert_to_numpy
from scipy import ndimage
from scipy.stats import entropy
from skimage.metrics import contingency_table
from skimage.segmentation import watershed

from segbundles.errors import fail

__all__ = [
    "THRESHOLDS",
    "cells_at_threshold",
    "label_cells",
    "pixel_accuracy",
    "section_metrics",
    "thin_membranes",
    "threshold_scores",
    "v_info",
    "v_rand",
]

# of the membrane probability; those of the challenge's program except 0, where no cell is left
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def label_cells(cell: Any) -> np.ndarray:
    """Number the cells of a mask: 4-connected components, membranes 0.

    Args:
        cell: mask (W, H), not 0 in cells.

    Returns:
        Label image (W, H), int32.
    """
    labels, _ = ndimage.label(_section(cell, "cell") != 0)
    return labels.astype(np.int32)


def thin_membranes(cells: Any) -> np.ndarray:
    """Grow cells into the membranes until these are one pixel wide and no cells touch.

    A membrane that ends inside a cell disappears. Without any cell nothing changes.

    Args:
        cells: label image (W, H), membranes 0.

    Returns:
        Label image (W, H), int32, of the same cells.
    """
    cells = _section(cells, "cells").astype(np.int32)
    if not cells.any() or cells.all():
        return cells
    membrane = cells == 0
    return watershed(ndimage.distance_transform_edt(membrane), cells, watershed_line=True).astype(np.int32)


def cells_at_threshold(membrane_probability: Any, threshold: float = 0.5) -> np.ndarray:
    """Segment cells as the challenge does, as 4-connected regions below a threshold, and thin their membranes.

    Args:
        membrane_probability: (W, H), 0 to 1.
        threshold: pixels with a lower probability are cell.

    Returns:
        Label image (W, H), int32, membranes 0.
    """
    return thin_membranes(label_cells(_section(membrane_probability, "membrane_probability") < threshold))


def v_rand(truth: Any, prediction: Any, alpha: float = 0.5) -> float:
    """Compute the foreground-restricted Rand score, V_rand.

    Args:
        truth: label image of the true cells, any shape, membranes 0.
        prediction: label image of the predicted cells, membranes 0.
        alpha: 0.5 the F-score, 0 the split score, 1 the merge score.

    Returns:
        0 to 1, higher is better; NaN when the truth has no cell.

    Raises:
        ValueError: when shapes differ, labels are negative or not integers, or ``alpha`` is not between 0 and 1.
    """
    joint, true, seen = _shares(truth, prediction, alpha)
    if not joint.size:
        return math.nan
    return float((joint @ joint) / (alpha * (seen @ seen) + (1 - alpha) * (true @ true)))


def v_info(truth: Any, prediction: Any, alpha: float = 0.5) -> float:
    """Compute the foreground-restricted information-theoretic score, V_info.

    Args:
        truth: label image of the true cells, any shape, membranes 0.
        prediction: label image of the predicted cells, membranes 0.
        alpha: 0.5 the F-score, 0 the split score, 1 the merge score.

    Returns:
        0 to 1, higher is better; NaN when the truth has no cell, and 1 when both entropies are 0 (one cell in both).

    Raises:
        ValueError: when shapes differ, labels are negative or not integers, or ``alpha`` is not between 0 and 1.
    """
    joint, true, seen = _shares(truth, prediction, alpha)
    if not joint.size:
        return math.nan
    of_joint, of_true, of_seen = (float(entropy(share)) for share in (joint, true, seen))
    whole = (1 - alpha) * of_seen + alpha * of_true
    return max(0.0, of_true + of_seen - of_joint) / whole if whole > 0 else 1.0


def _shares(truth: Any, prediction: Any, alpha: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return p_ij, t_i and s_j, each as an array of shares that sum to 1."""
    if not 0 <= alpha <= 1:
        fail(f"alpha must be between 0 (split score) and 1 (merge score), got {alpha}.")
    true, seen = convert_to_numpy(truth), convert_to_numpy(prediction)
    if true.shape != seen.shape:
        fail(f"prediction has shape {seen.shape}, truth {true.shape}: they must be equal.")
    for name, labels in (("truth", true), ("prediction", seen)):
        if labels.size and (labels.dtype.kind not in "biu" or labels.min() < 0):
            fail(f"{name} must be a label image of integers from 0, got {labels.dtype} from {labels.min():g}.")
    foreground = true != 0
    true, seen = true[foreground].astype(np.int64), seen[foreground].astype(np.int64)
    if not true.size:
        return np.empty(0), np.empty(0), np.empty(0)
    membrane = seen == 0
    seen[membrane] = seen.max() + 1 + np.arange(membrane.sum())
    table = contingency_table(true, seen, normalize=True, sparse_type="array")
    return table.data, *(share[share > 0] for share in (table.sum(1), table.sum(0)))


def threshold_scores(
    membrane_probability: Any, truth: Any, thresholds: Sequence[float] = THRESHOLDS
) -> list[dict[str, float]]:
    """Score the cells at several thresholds of the membrane probability.

    The challenge uses the best of the means over a stack: average these over its sections, then take the maximum.

    Args:
        membrane_probability: (W, H), 0 to 1.
        truth: label image of the true cells (W, H), membranes 0, not thinned.
        thresholds: thresholds of :func:`cells_at_threshold`.

    Returns:
        One dictionary per threshold, with ``threshold``, ``v_rand`` and ``v_info``.
    """
    if not thresholds:
        fail("thresholds must have at least one value, got none.")
    found = []
    for threshold in thresholds:
        cells = cells_at_threshold(membrane_probability, threshold)
        found.append({"threshold": threshold, "v_rand": v_rand(truth, cells), "v_info": v_info(truth, cells)})
    return found


def pixel_accuracy(prediction: Any, truth: Any) -> float:
    """Compute the share of pixels with the right class.

    Args:
        prediction: class indices, any shape.
        truth: class indices, of the same shape.

    Raises:
        ValueError: when the shapes differ.
    """
    seen, true = convert_to_numpy(prediction), convert_to_numpy(truth)
    if seen.shape != true.shape:
        fail(f"prediction has shape {seen.shape}, truth {true.shape}: they must be equal.")
    return float((seen == true).mean())


def section_metrics(prediction: Any, truth: Any, cells: Any = None) -> dict[str, float]:
    """Compute the scores of one section; class 0 is membrane, class 1 cell.

    Args:
        prediction: class indices (W, H).
        truth: class indices (W, H).
        cells: label image (W, H) from post-processing, membranes 0; None omits its scores.

    Returns:
        ``pixel_accuracy`` and ``dice_membrane`` (NaN when the truth has no membrane); for the cells
        ``pixel_accuracy_mask``, and after thinning their membranes ``v_rand_cells`` and ``v_info_cells``.

    Raises:
        ValueError: when shapes differ or are not 2D.
    """
    seen, true = _section(prediction, "prediction"), _section(truth, "truth")
    row = {"pixel_accuracy": pixel_accuracy(seen, true)}
    n_true, n_seen = int((true == 0).sum()), int((seen == 0).sum())
    both = int(((true == 0) & (seen == 0)).sum())
    row["dice_membrane"] = 2 * both / (n_true + n_seen) if n_true else math.nan
    if cells is not None:
        true_cells, thinned = label_cells(true), thin_membranes(cells)
        row["pixel_accuracy_mask"] = pixel_accuracy(convert_to_numpy(cells) > 0, true > 0)
        row |= {"v_rand_cells": v_rand(true_cells, thinned), "v_info_cells": v_info(true_cells, thinned)}
    return row


def _section(image: Any, name: str) -> np.ndarray:
    array = convert_to_numpy(image)
    if array.ndim != 2:
        fail(f"{name} must be one section (W, H), got shape {array.shape}: score sections one by one.")
    return array
