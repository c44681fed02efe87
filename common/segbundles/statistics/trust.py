"""Whether a confidence deserves trust: does it order unseen cases by their true score, and find the failures?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from segbundles.statistics.intervals import bootstrap_interval

__all__ = ["failure_auroc", "judge_confidence", "rank_correlation"]


def rank_correlation(rows: NDArray) -> float:
    """Return Spearman's correlation of two columns; NaN with fewer than three rows, or if a column is constant."""
    if len(rows) < 3 or np.ptp(rows[:, 0]) == 0 or np.ptp(rows[:, 1]) == 0:
        return math.nan
    return float(np.corrcoef(rankdata(rows[:, :2], axis=0).T)[0, 1])  # several times faster than spearmanr


def failure_auroc(confidence: NDArray, is_failure: NDArray) -> float:
    """Return how probable it is that a failure has a smaller confidence than another case; NaN without one of both.

    J. Hanley and B. McNeil, The Meaning and Use of the Area under a Receiver Operating Characteristic (ROC) Curve,
    Radiology 1982.
    """
    good = ~is_failure
    if good.all() or not good.any():
        return math.nan
    below = rankdata(confidence)[good].sum() - good.sum() * (good.sum() + 1) / 2  # pairs in order
    return float(below / (good.sum() * is_failure.sum()))


def judge_confidence(
    confidence: ArrayLike,
    score: ArrayLike,
    groups: Sequence[Any],
    failure: float,
    low: ArrayLike | None = None,
    review: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """Compare the confidence of unseen cases with their true score.

    Args:
        confidence: one value per case, larger is better; a case with NaN here or in the score does not count.
        score: true score of each case.
        groups: group of each case.
        failure: a smaller score is a failure.
        low: lower bound of each case, NaN if it has none; None without bounds.
        review: why a person should look at each case, empty if there is no reason; None if nothing was flagged.

    Returns:
        ``rank_correlation``, Spearman's, with its interval over the groups; ``failures``, their number;
        ``auroc_failures``, how probable it is that a failure has a smaller confidence than another case;
        ``auroc_worst_fifth``, the same for the fifth of the cases with the smallest score; ``error``, the mean absolute
        difference; ``bias``, the mean of confidence minus score. With ``low`` also ``coverage``, the share of cases
        that score at least their bound, with its interval; with ``review`` also ``flagged``, the share of cases with a
        reason, and ``failures_flagged``, the same of the failures. None where there is nothing to compute.
    """
    values, true = np.asarray(confidence, float), np.asarray(score, float)
    known = ~np.isnan(values + true)
    values, true = values[known], true[known]
    groups = [group for group, good in zip(groups, known, strict=True) if good]
    bad = true < failure
    found = {
        "rank_correlation": bootstrap_interval(np.column_stack([values, true]), groups, rank_correlation).as_dict(),
        "failures": int(bad.sum()),
        "auroc_failures": _known(failure_auroc(values, bad)),
        "auroc_worst_fifth": _known(failure_auroc(values, true <= np.quantile(true, 0.2))) if len(true) else None,
        "error": _mean(np.abs(values - true)),
        "bias": _mean(values - true),
    }
    if low is not None:
        least = np.asarray(low, float)[known]
        reached = np.where(np.isnan(least), np.nan, true >= least)
        found["coverage"] = bootstrap_interval(reached, groups).as_dict()
    if review is not None:
        flagged = np.array([bool(why) for why in review])[known]
        found |= {"flagged": _mean(flagged), "failures_flagged": _mean(flagged[bad])}
    return found


def _mean(values: NDArray) -> float | None:
    return float(values.mean()) if len(values) else None


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
