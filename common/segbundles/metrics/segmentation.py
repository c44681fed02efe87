"""Overlap and surface distance of a case and of its slices, with NaN for undefined values, and their summary."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import torch
from monai.metrics.utils import get_edge_surface_distance

from segbundles.errors import fail

__all__ = ["METRIC_UNITS", "SECTION_UNITS", "higher_is_better", "segmentation_metrics", "slice_metrics", "summarize"]

METRIC_UNITS = {
    "dice": "",
    "slice_dice": "",
    "slice_dice_all": "",
    "jaccard": "",
    "precision": "",
    "recall": "",
    "hd_mm": "mm",
    "hd95_mm": "mm",
    "assd_mm": "mm",
    "surface_dice": "",
    "truth_in_box": "",
}
# of segbundles.metrics.section_metrics, which has no values per class
SECTION_UNITS = {
    "pixel_accuracy": "",
    "dice_membrane": "",
    "pixel_accuracy_mask": "",
    "v_rand": "",
    "v_info": "",
    "v_rand_cells": "",
    "v_info_cells": "",
}
_LOWER_IS_BETTER = re.compile(
    r"hausdorff|distance|error|loss|false|seconds|(^|[^a-z])(hd\d*|m?ass?d|vi|voi|mae|mse|rmse)([^a-z]|$)",
    re.IGNORECASE,
)
COUNTS = ("lesion_slices", "lesion_free_slices", "false_positive_slices")
STATUSES = ("ok", "missed", "false positive", "empty")


def segmentation_metrics(
    prediction: torch.Tensor,
    truth: torch.Tensor,
    spacing_mm: Sequence[float],
    num_classes: int = 2,
    distances: bool = True,
    tolerance_mm: float | None = None,
) -> dict[str, Any]:
    """Compute the metrics of one case.

    These are Dice, Jaccard, precision and recall, and in mm the Hausdorff distance (``hd_mm``), its 95th percentile
    (``hd95_mm``) and the average symmetric surface distance (``assd_mm``) between the surface voxels, as MONAI computes
    them. With ``tolerance_mm`` there is also ``surface_dice``, the share of both surfaces that is at most that far from
    the other one (S. Nikolov et al., arXiv:1809.04430). With several foreground classes, the means over the classes
    with a defined value come first, followed by the values per class, ``dice_1``, ``dice_2`` and so on.

    ``status`` is one of the following; with several classes, that of the worst class:

    - ``ok``;
    - ``missed``: there is truth but none of it was found. Overlaps are 0; if nothing at all was predicted, distances
      and precision are undefined, and the surface Dice is 0;
    - ``false positive``: something was predicted but there is no truth. Dice, Jaccard, precision and surface Dice are
      0, the rest is undefined;
    - ``empty``: neither truth nor prediction; everything is undefined.

    Undefined values are NaN, never 0.

    Args:
        prediction: class indices, spatial axes only, 2D or 3D.
        truth: class indices, of the same shape.
        spacing_mm: voxel size per axis.
        num_classes: number of classes, background included.
        distances: whether to measure distances; False if the spacing is not known.
        tolerance_mm: tolerance of the surface Dice; None leaves it out.

    Returns:
        ``status``, then the metrics by name.

    Raises:
        ValueError: when the shapes differ.
    """
    if prediction.shape != truth.shape:
        fail(f"prediction has shape {tuple(prediction.shape)}, truth {tuple(truth.shape)}: they must be equal.")
    spacing = spacing_mm if distances else None
    classes = [_one_class(prediction == k, truth == k, spacing, tolerance_mm) for k in range(1, num_classes)]
    found = {c["status"] for c in classes}
    row: dict[str, Any] = {"status": next(s for s in ("missed", "false positive", "ok", "empty") if s in found)}
    for name in classes[0]:
        if name != "status":
            row[name] = mean_defined([c[name] for c in classes])
    if num_classes > 2:
        for k, values in enumerate(classes, 1):
            row.update({f"{name}_{k}": value for name, value in values.items() if name != "status"})
    return row


def slice_metrics(
    prediction: torch.Tensor, truth: torch.Tensor, slice_axis: int = -1, num_classes: int = 2
) -> list[dict[str, Any]]:
    """Compute the scores of each slice of a volume.

    Args:
        prediction: class indices, (W, H, D).
        truth: class indices, of the same shape.
        slice_axis: axis across which the volume is cut.
        num_classes: number of classes, background included.

    Returns:
        One dictionary per slice with ``dice`` (NaN if the slice has no truth, whatever is predicted; with several
        foreground classes, the mean over those in truth or prediction), the number of pixels of any foreground class,
        ``truth_pixels`` and ``predicted_pixels``, and of the wrong class, ``error_pixels``.

    Raises:
        ValueError: when the shapes differ or are not 3D, or there is no such axis.
    """
    if prediction.ndim != 3 or not -3 <= slice_axis < 3:
        fail(f"slice_axis must be an axis of a 3D volume, got {slice_axis} and shape {tuple(prediction.shape)}.")
    if prediction.shape != truth.shape:
        fail(f"prediction has shape {tuple(prediction.shape)}, truth {tuple(truth.shape)}: they must be equal.")
    rows = []
    for seen, true in zip(prediction.unbind(slice_axis), truth.unbind(slice_axis), strict=True):
        n_truth = int((true > 0).sum())
        whole = segmentation_metrics(seen, true, (), num_classes, distances=False) if n_truth else {"dice": math.nan}
        rows.append(
            {
                "dice": whole["dice"],
                "truth_pixels": n_truth,
                "predicted_pixels": int((seen > 0).sum()),
                "error_pixels": int((seen != true).sum()),
            }
        )
    return rows


def _one_class(
    prediction: torch.Tensor, truth: torch.Tensor, spacing_mm: Sequence[float] | None, tolerance_mm: float | None
) -> dict[str, Any]:
    n_truth, n_pred = int(truth.sum()), int(prediction.sum())
    both = int((prediction & truth).sum())
    undefined = {} if spacing_mm is None else dict.fromkeys(("hd_mm", "hd95_mm", "assd_mm"), math.nan)
    if n_truth == 0 or n_pred == 0:
        status = "missed" if n_truth else "false positive" if n_pred else "empty"
        overlap = math.nan if status == "empty" else 0.0
        if spacing_mm is not None and tolerance_mm is not None:
            undefined["surface_dice"] = overlap
        return {
            "status": status,
            "dice": overlap,
            "jaccard": overlap,
            "precision": 0.0 if n_pred else math.nan,
            "recall": 0.0 if n_truth else math.nan,
            **undefined,
        }
    return {
        "status": "ok" if both else "missed",
        "dice": 2 * both / (n_truth + n_pred),
        "jaccard": both / (n_truth + n_pred - both),
        "precision": both / n_pred,
        "recall": both / n_truth,
        **({} if spacing_mm is None else _distances(prediction, truth, spacing_mm, tolerance_mm)),
    }


def _distances(
    prediction: torch.Tensor, truth: torch.Tensor, spacing_mm: Sequence[float], tolerance_mm: float | None
) -> dict[str, float]:
    _, (to_truth, to_prediction), _ = get_edge_surface_distance(
        prediction, truth, spacing=[float(s) for s in spacing_mm], symmetric=True
    )
    one, other = (np.asarray(d.detach().cpu(), dtype=np.float64) for d in (to_truth, to_prediction))
    both = np.concatenate([one, other])
    found = {
        "hd_mm": float(max(one.max(), other.max())),
        "hd95_mm": float(max(np.percentile(one, 95), np.percentile(other, 95))),
        "assd_mm": float(both.mean()),
    }
    if tolerance_mm is not None:  # as monai.metrics.compute_surface_dice, which would measure the distances again
        found["surface_dice"] = float((both <= tolerance_mm).mean())
    return found


def mean_defined(values: Sequence[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    defined = [v for v in values if not math.isnan(v)]
    return fmean(defined) if defined else math.nan


def higher_is_better(metric: str) -> bool:
    """Return whether a larger value of a metric is better, judging by its name.

    Distances (HD, HD95, ASD, ASSD), errors, losses, variations of information and times are better when lower. All
    other metrics, such as Dice, Jaccard, precision, recall, accuracy, V_rand and V_info, are better when higher.
    """
    return _LOWER_IS_BETTER.search(metric) is None


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarize the metrics of all cases.

    Args:
        rows: one row per case, as from :func:`segmentation_metrics`; other columns are allowed.

    Returns:
        For every metric ``mean``, ``sd`` (sample formula), ``median``, ``worst`` and ``n`` over the cases where it is
        defined (None if there is no such case); then ``cases``, the number of cases with each status other than ok,
        and, if the rows have them, the sums of ``lesion_slices``, ``lesion_free_slices`` and ``false_positive_slices``.
    """
    columns = [name for name in dict.fromkeys(k for row in rows for k in row) if _is_metric(rows, name)]
    summary: dict[str, Any] = {}
    for name in columns:
        values = [float(row[name]) for row in rows if name in row and not math.isnan(row[name])]
        worst = min if higher_is_better(base_name(name)) else max
        summary[name] = {
            "mean": fmean(values) if values else None,
            "sd": stdev(values) if len(values) > 1 else None,
            "median": median(values) if values else None,
            "worst": worst(values) if values else None,
            "n": len(values),
        }
    summary["cases"] = len(rows)
    for status in STATUSES[1:]:
        summary[status.replace(" ", "_")] = sum(row.get("status") == status for row in rows)
    for name in COUNTS:
        if any(name in row for row in rows):
            summary[name] = sum(row.get(name, 0) for row in rows)
    return summary


def base_name(name: str) -> str:
    """Return the metric of a column: ``dice_2`` gives ``dice``."""
    base, _, number = name.rpartition("_")
    return base if number.isdigit() else name


def _is_metric(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return base_name(name) in (METRIC_UNITS | SECTION_UNITS) and any(
        isinstance(row.get(name), (int, float)) for row in rows
    )
