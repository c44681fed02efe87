"""Metrics pooled over a data set, from one confusion matrix of all pixels of all images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ignite.metrics import ConfusionMatrix, MetricsLambda
from monai.utils import CommonKeys as Keys
from torch.nn import functional as F

from .segmentation import mean_defined

__all__ = [
    "PooledConfusion",
    "confusion_columns",
    "confusion_counts",
    "confusion_of",
    "pooled_metric",
    "pooled_scores",
]


class PooledConfusion(ConfusionMatrix):
    """Ignite's confusion matrix (rows are truth) of the decollated class maps of a MONAI engine.

    Pixels whose label is not a class (:data:`segbundles.data.VOID`) are ignored. The matrix is summed over processes.

    Args:
        num_classes: number of classes, background included.
    """

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__(num_classes, output_transform=self._pair)

    def _pair(self, output: Sequence[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one-hot predictions (1, C, pixels) and labels (1, pixels) of images of any size."""
        pred, label = (
            torch.cat([torch.as_tensor(item[key]).detach().cpu().flatten() for item in output]).long()
            for key in (Keys.PRED, Keys.LABEL)
        )
        return F.one_hot(pred, self.num_classes).T[None], label[None]


def confusion_counts(prediction: torch.Tensor, truth: torch.Tensor, num_classes: int = 2) -> torch.Tensor:
    """Compute the confusion matrix (truth, prediction) of one image, as ignite counts it.

    Args:
        prediction: class indices.
        truth: class indices of the same shape; pixels that are not a class are ignored.
        num_classes: number of classes, background included.
    """
    known = truth < num_classes
    pairs = num_classes * truth[known].long() + prediction[known].long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def confusion_columns(matrix: torch.Tensor) -> dict[str, int]:
    """Return a confusion matrix as columns: ``pixels_1_0`` has the pixels of class 1 that were predicted as 0."""
    return {f"pixels_{t}_{p}": int(n) for t, row in enumerate(matrix) for p, n in enumerate(row)}


def confusion_of(row: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the matrix that :func:`confusion_columns` has written into a row; None if the row has none."""
    classes = 0
    while f"pixels_{classes}_0" in row:
        classes += 1
    if not classes:
        return None
    return torch.tensor([[int(row[f"pixels_{t}_{p}"]) for p in range(classes)] for t in range(classes)])


def pooled_scores(matrix: torch.Tensor) -> dict[str, float]:
    """Compute the scores of a confusion matrix.

    Args:
        matrix: rows are truth, columns prediction.

    Returns:
        ``accuracy``; ``mean_jaccard``, the mean over all classes including the background; ``jaccard``, the mean over
        the foreground classes; and ``jaccard_k`` for each class k. A class that is neither in truth nor in prediction
        has no Jaccard (NaN) and does not count in the means.
    """
    counts = matrix.double()
    hits, union = counts.diag(), counts.sum(0) + counts.sum(1) - counts.diag()
    by_class = [float(h / u) if u > 0 else math.nan for h, u in zip(hits, union, strict=True)]
    total = float(counts.sum())
    return {
        "accuracy": float(hits.sum()) / total if total else math.nan,
        "mean_jaccard": mean_defined(by_class),
        "jaccard": mean_defined(by_class[1:]),
        **{f"jaccard_{k}": value for k, value in enumerate(by_class)},
    }


def pooled_metric(confusion: ConfusionMatrix, name: str = "jaccard") -> MetricsLambda:
    """Return one of :func:`pooled_scores` as a metric of an engine; 0 if it is not defined.

    Args:
        confusion: the matrix; several metrics of an engine may share it.
        name: name of the score.
    """

    def score(matrix: torch.Tensor) -> float:
        value = pooled_scores(matrix)[name]
        return 0.0 if math.isnan(value) else value

    return MetricsLambda(score, confusion)
