"""Whether the confidence of unseen cases can be trusted, and which way to compute it is the simplest good one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segbundles.calibration.cases import Case
from segbundles.calibration.fitting import fit
from segbundles.confidence import calibrated, confidence_of, reasons_to_review
from segbundles.statistics import bootstrap_interval, failure_auroc, rank_correlation

__all__ = ["out_of_fold", "parts_of", "simplest"]

_PARTS = 20  # groups are left out one by one, or in so many parts
_ONE_ERROR = 0.68  # level of an interval of one standard error on both sides


def parts_of(groups: Sequence[str]) -> list[int]:
    """Return the part of each case: the cases of a part are judged by what was fitted to all other parts."""
    names = list(dict.fromkeys(groups))
    return [names.index(group) % _PARTS for group in groups]


def out_of_fold(cases: Sequence[Case], candidate: str, score: str) -> list[dict[str, Any]]:
    """Return confidence, lower bound and review of each case, fitted to the cases of the other parts.

    Args:
        cases: unseen cases.
        candidate: one of :data:`segbundles.calibration.CANDIDATES`.
        score: one of :data:`segbundles.confidence.SCORES`.
    """
    parts = parts_of([case.group for case in cases])
    rows: list[dict[str, Any]] = [{} for _ in cases]
    for part in set(parts):
        facts = fit([case for case, other in zip(cases, parts, strict=True) if other != part], candidate, score)
        p = calibrated(facts["temperature"], facts["shift"])
        for case, row, own in zip(cases, rows, parts, strict=True):
            if own == part:
                value, low = confidence_of(case.features(score, p), facts)
                why = reasons_to_review(case.mask, case.image, facts, value, score)
                row |= {"confidence": value, "confidence_low": low, "review": "; ".join(why)}
    return rows


def simplest(found: Mapping[str, Sequence[float]], true: NDArray, groups: Sequence[str], failure: float) -> str:
    """Return the first candidate within one standard error of the best in each of three figures.

    They are rank correlation, mean error, and the AUROC for finding failures.

    L. Breiman et al., Classification and Regression Trees, 1984, section 3.4.3.

    Args:
        found: confidence of each case by candidate, the simplest first.
        true: score of each case.
        groups: group of each case.
        failure: a smaller score is a failure.
    """

    def finding(rows: NDArray) -> float:
        return failure_auroc(rows[:, 0], rows[:, 1] < failure)

    within = dict.fromkeys(found, True)
    for statistic in (rank_correlation, _closeness, finding):
        values = {name: statistic(np.column_stack([one, true])) for name, one in found.items()}
        best = max(values, key=lambda name: np.nan_to_num(values[name], nan=-1))
        for name, one in found.items():
            rows = np.column_stack([found[best], one, true])
            gain = bootstrap_interval(
                rows, groups, lambda rows, s=statistic: s(rows[:, [0, 2]]) - s(rows[:, [1, 2]]), level=_ONE_ERROR
            )
            within[name] &= gain.low is None or gain.low <= 0
    return next((name for name, good in within.items() if good), next(iter(found)))


def _closeness(rows: NDArray) -> float:
    return -float(np.abs(rows[:, 0] - rows[:, 1]).mean())
