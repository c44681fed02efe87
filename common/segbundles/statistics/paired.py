"""Two evaluations of the same cases: is one better?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from segbundles.errors import fail
from segbundles.statistics.intervals import bootstrap_interval, group_names

__all__ = ["difference_line", "paired_difference"]


def paired_difference(
    before: ArrayLike, after: ArrayLike, groups: Sequence[Any], higher_is_better: bool = True
) -> dict[str, Any]:
    """Compare a metric of the same cases before and after.

    The Wilcoxon signed-rank test (two-sided) looks at one difference per group, the mean of its cases, because the
    cases of a group are not independent. With fewer than six groups it cannot give a p below 0.05.

    Args:
        before: the metric (cases); NaN is undefined.
        after: the metric of the same cases.
        groups: group of each case.
        higher_is_better: which direction is a win.

    Returns:
        Over the cases where both are defined: ``n``, ``groups``, the means ``before`` and ``after``, their
        ``difference`` (after - before) with its 95 % interval over the groups (``low``, ``high``), ``p`` of the
        Wilcoxon test, and the number of ``wins``, ``losses`` and ``ties`` of ``after``. ``only_before`` and
        ``only_after`` count the cases where the other is undefined. What is not defined is None.

    Raises:
        ValueError: when the numbers of values or groups differ.
    """
    one, other = (np.asarray(values, dtype=float) for values in (before, after))
    if one.shape != other.shape:
        fail(f"before has {one.size} values and after {other.size}: give one of each per case.")
    difference = np.round(other - one, 9)  # otherwise equal differences are not ties
    interval = bootstrap_interval(difference, groups)
    known = ~np.isnan(difference)
    gain = difference[known] if higher_is_better else -difference[known]
    by_group: dict[Any, list[float]] = {}
    for group, value in zip(group_names(groups), difference.tolist(), strict=True):
        if not np.isnan(value):
            by_group.setdefault(group, []).append(value)
    means = np.round([np.mean(values) for values in by_group.values()], 9)
    differing = means[means != 0]
    return {
        "n": interval.n,
        "groups": interval.groups,
        "before": float(one[known].mean()) if known.any() else None,
        "after": float(other[known].mean()) if known.any() else None,
        "difference": interval.value,
        "low": interval.low,
        "high": interval.high,
        "p": float(stats.wilcoxon(differing).pvalue) if len(means) > 1 and len(differing) else None,
        "wins": int((gain > 0).sum()),
        "losses": int((gain < 0).sum()),
        "ties": int((gain == 0).sum()),
        "only_before": int((~np.isnan(one) & np.isnan(other)).sum()),
        "only_after": int((np.isnan(one) & ~np.isnan(other)).sum()),
    }


def difference_line(row: Mapping[str, Any]) -> str:
    """Write a :func:`paired_difference` with its interval, such as ``+0.012 (0.003 to 0.021)``."""
    if row["difference"] is None:
        return "undefined"
    interval = "" if row["low"] is None else f" ({row['low']:.3g} to {row['high']:.3g})"
    return f"{row['difference']:+.3g}{interval}"
