"""How sure a figure is: the interval of a mean when whole groups are drawn again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from segbundles.errors import fail

__all__ = ["Interval", "bootstrap_interval", "group_names", "over_cases", "short", "with_intervals"]


@dataclass(frozen=True)
class Interval:
    """A figure over the cases of a set, and its interval.

    Args:
        value: the figure itself; None if no case has a value.
        low: lower end of the interval; None if fewer than two groups have a value.
        high: upper end.
        n: number of cases that have a value.
        left_out: number of cases without one, which do not count.
        groups: number of groups of the ``n`` cases.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    left_out: int
    groups: int

    def as_dict(self) -> dict[str, Any]:
        """Return the interval as JSON has it."""
        return asdict(self)

    def __str__(self) -> str:
        if self.value is None:
            return "undefined"
        return short(self.value) + ("" if self.low is None else f" ({short(self.low)} to {short(self.high)})")


def short(value: float) -> str:
    """Write a number with three significant digits, or as a whole number from 1000 on."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def group_names(groups: Sequence[Any]) -> list[Any]:
    """Return the groups of the cases; a case without one (None or empty) becomes a group of its own."""
    return [("case", number) if group in (None, "") else group for number, group in enumerate(groups)]


def bootstrap_interval(
    values: ArrayLike,
    groups: Sequence[Any],
    statistic: Callable[[NDArray], float] = np.mean,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Compute the percentile bootstrap interval of a figure; all cases of a group are drawn together.

    The cases of one patient resemble each other, so the groups are what is drawn, with replacement, as many as there
    are. ``scipy.stats.bootstrap`` only draws cases.

    B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.

    Args:
        values: one value per case (cases), or one row of numbers per case (cases, ...). Cases with NaN are left out.
        groups: group of each case, see :func:`group_names`.
        statistic: figure of the drawn rows, in the shape of ``values``. A figure that is pooled over the cases, such as
            the Jaccard of all pixels, sums counts: ``lambda rows: score(rows.sum(0))``.
        draws: number of draws.
        level: share of the draws inside the interval.
        seed: seed of the draws; the same cases give the same interval.

    Raises:
        ValueError: when there is not one group per case, or ``draws`` or ``level`` is out of its range.
    """
    rows = np.asarray(values, dtype=float)
    if len(rows) != len(groups):
        fail(f"groups must have one entry per case: got {len(groups)} for {len(rows)} cases.")
    if draws < 1 or not 0 < level < 1:
        fail(f"draws must be 1 or more and level between 0 and 1, got {draws} and {level}.")
    known = ~np.isnan(rows.reshape(len(rows), -1)).any(1) if len(rows) else np.zeros(0, bool)
    members: dict[Any, list[int]] = {}
    for case, group in enumerate(group_names(groups)):
        if known[case]:
            members.setdefault(group, []).append(case)
    n, left_out = int(known.sum()), int((~known).sum())
    value = float(statistic(rows[known])) if n else np.nan
    low = high = None
    if len(members) > 1 and not np.isnan(value):
        parts = [np.array(cases) for cases in members.values()]
        drawn = np.random.default_rng(seed).integers(len(parts), size=(draws, len(parts)))
        found = [statistic(rows[np.concatenate([parts[part] for part in draw])]) for draw in drawn]
        low, high = map(float, np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2]))
    return Interval(None if np.isnan(value) else value, low, high, n, left_out, len(members))


def with_intervals(
    summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], groups: Sequence[Any]
) -> dict[str, Any]:
    """Add the interval of the mean to each metric of a summary.

    Args:
        summary: as from :func:`segbundles.metrics.summarize`.
        rows: one row per case with the metrics.
        groups: group of each case.

    Returns:
        The summary; metrics of the rows also have ``low``, ``high``, ``groups`` and ``left_out``, see
        :class:`Interval`.
    """
    added = dict(summary)
    for name, entry in summary.items():
        if isinstance(entry, Mapping) and any(name in row for row in rows):
            found = bootstrap_interval([row.get(name, np.nan) for row in rows], groups)
            added[name] = {**entry, **{key: getattr(found, key) for key in ("low", "high", "groups", "left_out")}}
    return added


def over_cases(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Say over how many cases the mean of a metric is, and why the others do not count.

    Args:
        rows: one row per case with the metric and ``status``.
        metric: name of the metric.

    Returns:
        Such as "15 of 16 cases (1 missed)", or "16 cases" if all count.
    """
    without = [row for row in rows if (value := row.get(metric)) is None or np.isnan(value)]
    if not without:
        return f"{len(rows)} cases"
    reasons = Counter(row.get("status") if row.get("status", "ok") != "ok" else "without a value" for row in without)
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return f"{len(rows) - len(without)} of {len(rows)} cases ({why})"
