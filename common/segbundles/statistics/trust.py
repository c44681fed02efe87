"""Whether a confidence deserves trust: does it order unseen cases by their true score, and find the failures?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import mannwhitneyu, rankdata

from segbundles.statistics.intervals import bootstrap_interval

__all__ = ["judge_confidence", "rank_correlation"]


def rank_correlation(rows: NDArray) -> float:
    """Return Spearman's correlation of two columns; NaN with fewer than three rows, or if a column is constant."""
    if len(rows) < 3 or np.ptp(rows[:, 0]) == 0 or np.ptp(rows[:, 1]) == 0:
        return math.nan
    return float(np.corrcoef(rankdata(rows[:, :2], axis=0).T)[0, 1])  # several times faster than spearmanr


def judge_confidence(confidence: ArrayLike, score: ArrayLike, groups: Sequence[Any], failure: float) -> dict[str, Any]:
    """Compare the confidence of unseen cases with their true score.

    Args:
        confidence: one value per case, larger is better.
        score: true score of each case.
        groups: group of each case.
        failure: a smaller score is a failure.

    Returns:
        ``rank_correlation``, Spearman's, with its interval over the groups; ``failures``, their number;
        ``auroc_failures``, how probable it is that a failure has a smaller confidence than another case;
        ``auroc_worst_fifth``, the same for the fifth of the cases with the smallest score; ``error``, the mean absolute
        difference; ``bias``, the mean of confidence minus score. None where there is nothing to compute.
    """
    values, true = np.asarray(confidence, float), np.asarray(score, float)
    known = ~np.isnan(values + true)
    values, true = values[known], true[known]
    groups = [group for group, good in zip(groups, known, strict=True) if good]
    bad = true < failure
    return {
        "rank_correlation": bootstrap_interval(np.column_stack([values, true]), groups, rank_correlation).as_dict(),
        "failures": int(bad.sum()),
        "auroc_failures": _auroc(values, bad),
        "auroc_worst_fifth": _auroc(values, true <= np.quantile(true, 0.2)) if len(true) else None,
        "error": float(np.abs(values - true).mean()) if len(true) else None,
        "bias": float((values - true).mean()) if len(true) else None,
    }


def _auroc(values: NDArray, bad: NDArray) -> float | None:
    if bad.all() or not bad.any():
        return None
    return float(mannwhitneyu(values[~bad], values[bad]).statistic / (bad.sum() * (~bad).sum()))
