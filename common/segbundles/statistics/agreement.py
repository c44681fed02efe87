"""Agreement of two measurements of the same thing, such as true and predicted volumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from segbundles.errors import fail
from segbundles.statistics.intervals import bootstrap_interval

__all__ = ["bland_altman", "intraclass_correlation", "volume_agreement"]


def bland_altman(truth: ArrayLike, predicted: ArrayLike) -> dict[str, float | int | None]:
    """Compute bias and 95 % limits of agreement of predicted against true values.

    J. M. Bland and D. G. Altman, Statistical methods for assessing agreement between two methods of clinical
    measurement, Lancet 327, 1986.

    Args:
        truth: true values (cases).
        predicted: predicted values (cases). Cases where either is NaN are left out.

    Returns:
        ``n``; ``bias``, the mean of predicted - true; ``sd`` of the differences (sample formula); the limits ``lower``
        and ``upper``, bias -+ 1.96 sd. What is not defined is None.

    Raises:
        ValueError: when the numbers of values differ.
    """
    pairs = _pairs(truth, predicted)
    difference = pairs[:, 1] - pairs[:, 0]
    found: dict[str, float | int | None] = {"n": len(pairs), **dict.fromkeys(("bias", "sd", "lower", "upper"))}
    if len(pairs):
        found["bias"] = bias = float(difference.mean())
    if len(pairs) > 1:
        found["sd"] = sd = float(difference.std(ddof=1))
        found |= {"lower": bias - 1.96 * sd, "upper": bias + 1.96 * sd}
    return found


def intraclass_correlation(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Compute the intraclass correlation of true and predicted values, ICC(2,1).

    It is the one for absolute agreement (a constant bias lowers it), two-way random effects, single measurements:
    ICC(2,1) of P. E. Shrout and J. L. Fleiss, Psychological Bulletin 86, 1979; ICC(A,1) of K. O. McGraw and S. P. Wong,
    Psychological Methods 1, 1996.

    Args:
        truth: true values (cases).
        predicted: predicted values (cases). Cases where either is NaN are left out.

    Returns:
        At most 1; NaN for fewer than two cases, or if all values are equal.

    Raises:
        ValueError: when the numbers of values differ.
    """
    pairs = _pairs(truth, predicted)
    return _icc(pairs)


def volume_agreement(
    truth: ArrayLike, predicted: ArrayLike, unit: str, groups: Sequence[Any] | None = None
) -> dict[str, Any]:
    """Compute how well predicted volumes (or areas, or fractions) agree with true ones.

    Args:
        truth: true values (cases).
        predicted: predicted values (cases). Cases where either is NaN are left out.
        unit: unit of the values, such as ml.
        groups: group of each case, for the intervals; None makes each case a group.

    Returns:
        The entries of :func:`bland_altman`, ``unit``, ``left_out`` (number of cases without values), ``icc``
        (:func:`intraclass_correlation`), and intervals of the bias (``bias_low``, ``bias_high``) and of the ICC
        (``icc_low``, ``icc_high``) over the groups. What is not defined is None.

    Raises:
        ValueError: when the numbers of values or groups differ.
    """
    both = np.stack(_equally_long(truth, predicted), axis=1)
    groups = [None] * len(both) if groups is None else groups
    bias = bootstrap_interval(both[:, 1] - both[:, 0], groups)
    icc = bootstrap_interval(both, groups, _icc)
    return {
        "unit": unit,
        **bland_altman(truth, predicted),
        "left_out": bias.left_out,
        "bias_low": bias.low,
        "bias_high": bias.high,
        "icc": icc.value,
        "icc_low": icc.low,
        "icc_high": icc.high,
    }


def _equally_long(truth: ArrayLike, predicted: ArrayLike) -> tuple[NDArray, NDArray]:
    one, other = (np.asarray(values, dtype=float).ravel() for values in (truth, predicted))
    if len(one) != len(other):
        fail(f"truth has {len(one)} values and predicted {len(other)}: give one of each per case.")
    return one, other


def _pairs(truth: ArrayLike, predicted: ArrayLike) -> NDArray:
    pairs = np.stack(_equally_long(truth, predicted), axis=1)
    return pairs[~np.isnan(pairs).any(1)]


def _icc(pairs: NDArray) -> float:
    n, k = pairs.shape
    if n < 2:
        return np.nan
    mean, by_case, by_column = pairs.mean(), pairs.mean(1, keepdims=True), pairs.mean(0, keepdims=True)
    between_cases = k * ((by_case - mean) ** 2).sum() / (n - 1)
    between_columns = n * ((by_column - mean) ** 2).sum() / (k - 1)
    error = ((pairs - by_case - by_column + mean) ** 2).sum() / ((n - 1) * (k - 1))
    whole = between_cases + (k - 1) * error + k * (between_columns - error) / n
    return float((between_cases - error) / whole) if whole > 0 else np.nan
