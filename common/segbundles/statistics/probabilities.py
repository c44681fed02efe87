"""Probabilities against truth: calibration, precision and recall, and the effect of the threshold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from segbundles.errors import fail

__all__ = ["ProbabilityCounts", "add_counts", "counts_of_table", "probability_table"]

TABLE_COLUMNS = ("group", "bin", "pixels", "foreground", "probability_sum")


def _zeros() -> NDArray:
    return np.zeros((3, 1000))


@dataclass
class ProbabilityCounts:
    """Count pixels by their probability of foreground, in memory that does not grow with the number of pixels.

    Counts of cases can be added up: ``sum(counts, ProbabilityCounts())``.

    Args:
        table: (3, bins): pixels of each bin, those of them whose truth is foreground, and the sum of their
            probabilities. Bin k has the probabilities from k / bins to less than (k + 1) / bins, the last one also 1.
    """

    table: NDArray = field(default_factory=_zeros)

    @classmethod
    def of(
        cls, probability: ArrayLike, truth: ArrayLike, mask: ArrayLike | None = None, bins: int = 1000
    ) -> ProbabilityCounts:
        """Count one case.

        Args:
            probability: probability of foreground (spatial), 0 to 1.
            truth: mask of the same shape, foreground is not 0.
            mask: pixels that count; None counts all.
            bins: number of bins. Counts with another number cannot be added.

        Raises:
            ValueError: when the shapes differ, or a probability is not between 0 and 1.
        """
        p, true = np.asarray(probability), np.asarray(truth) != 0
        if p.shape != true.shape:
            fail(f"probability has shape {p.shape}, truth {true.shape}: they must be equal.")
        if mask is not None:
            p, true = p[np.asarray(mask, dtype=bool)], true[np.asarray(mask, dtype=bool)]
        p, true = p.ravel(), true.ravel()
        if p.size and not (p.min() >= 0 and p.max() <= 1):  # neither holds for NaN
            fail(f"probabilities must be between 0 and 1, got {p.min():.4g} to {p.max():.4g}: are these logits?")
        # most pixels of a volume are in the first bin: count only the others one by one
        first = p < 1 / bins
        rest, true_rest = p[~first].astype(np.float64), true[~first]
        place = np.minimum((rest * bins).astype(np.int64), bins - 1)
        table = np.stack(
            [
                np.bincount(one, weights, bins)
                for one, weights in ((place, None), (place[true_rest], None), (place, rest))
            ]
        ).astype(float)
        below = (p.size - rest.size, true.sum() - true_rest.sum(), p[first].sum(dtype=np.float64))
        table[:, 0] += below
        return cls(table)

    def __add__(self, other: ProbabilityCounts) -> ProbabilityCounts:
        if self.table.shape != other.table.shape:
            fail(f"counts have {self.table.shape[1]} and {other.table.shape[1]} bins: they must be equal.")
        return ProbabilityCounts(self.table + other.table)

    def coarse(self, bins: int = 10, lowest: float = 0.0) -> ProbabilityCounts:
        """Return the counts in fewer bins; see :meth:`calibration`."""
        counted = self.table.shape[1]
        if bins < 1 or counted % bins:
            fail(f"bins must divide {counted}, the number of bins that were counted, got {bins}.")
        table = self.table * (np.arange(counted) >= round(lowest * counted))
        return ProbabilityCounts(table.reshape(3, bins, -1).sum(2))

    def calibration(self, bins: int = 10, lowest: float = 0.0) -> list[dict[str, Any]]:
        """Return the calibration curve: how often pixels of a probability are foreground.

        Args:
            bins: number of points; it must divide the number of bins that were counted.
            lowest: leave out pixels of a smaller probability. In a volume almost all pixels are background that nobody
                would take for anything else; 0.01 looks at the others.

        Returns:
            One row per bin that has pixels: ``probability`` (their mean), ``foreground`` (the share of them that is
            foreground) and ``pixels``.

        Raises:
            ValueError: when the number of bins does not fit.
        """
        rows = zip(*self.coarse(bins, lowest).table, strict=True)
        return [
            {"probability": float(p / n), "foreground": float(true / n), "pixels": int(n)} for n, true, p in rows if n
        ]

    def calibration_error(self, bins: int = 10, lowest: float = 0.0) -> float:
        """Compute the expected calibration error (ECE): the mean gap of the calibration curve, weighted by pixels.

        M. P. Naeini et al., Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI 2015.

        Args:
            bins: see :meth:`calibration`.
            lowest: see :meth:`calibration`.

        Returns:
            0 (perfect) to 1; NaN without pixels.
        """
        curve = self.calibration(bins, lowest)
        pixels = sum(row["pixels"] for row in curve)
        gaps = sum(row["pixels"] * abs(row["probability"] - row["foreground"]) for row in curve)
        return gaps / pixels if pixels else np.nan

    def thresholds(self, number: int = 100) -> list[dict[str, float]]:
        """Return precision, recall and Dice of the mask of each threshold, pooled over the pixels.

        Args:
            number: number of thresholds, evenly from 0; it must divide the number of bins that were counted.

        Returns:
            One row per threshold: ``threshold`` (foreground is a probability of at least that), ``precision`` (NaN if
            nothing is predicted), ``recall`` (NaN without any truth) and ``dice`` (NaN if there is neither).

        Raises:
            ValueError: when the number does not fit.
        """
        counted = self.table.shape[1]
        if number < 1 or counted % number:
            fail(f"number must divide {counted}, the number of bins that were counted, got {number}.")
        predicted, hits = np.cumsum(self.table[:2, ::-1], axis=1)[:, ::-1]
        true, rows = float(hits[0]), []
        for k in range(0, counted, counted // number):
            seen, both = float(predicted[k]), float(hits[k])
            rows.append(
                {
                    "threshold": k / counted,
                    "precision": both / seen if seen else np.nan,
                    "recall": both / true if true else np.nan,
                    "dice": 2 * both / (seen + true) if seen + true else np.nan,
                }
            )
        return rows

    def average_precision(self) -> float:
        """Compute the area under the precision-recall curve as a sum of steps; NaN without any truth."""
        predicted, hits = np.cumsum(self.table[:2, ::-1], axis=1)
        gained = self.table[1, ::-1]
        steps = gained > 0
        return float((gained[steps] * hits[steps] / predicted[steps]).sum() / hits[-1]) if hits[-1] else np.nan


def add_counts(parts: Iterable[Mapping[str, ProbabilityCounts]]) -> dict[str, ProbabilityCounts]:
    """Add up the counts of each group, and sort the groups by name, so that intervals do not depend on the order."""
    total: dict[str, ProbabilityCounts] = {}
    for part in parts:
        for group, counts in part.items():
            total[group] = total[group] + counts if group in total else counts
    return dict(sorted(total.items()))


def probability_table(groups: Mapping[str, ProbabilityCounts]) -> tuple[Sequence[str], list[dict[str, Any]]]:
    """Return columns and rows of ``probabilities.csv``: the bins of each group that have pixels."""
    return TABLE_COLUMNS, [
        dict(zip(TABLE_COLUMNS, (group, place, int(n), int(true), f"{p:.9g}"), strict=True))
        for group, counts in groups.items()
        for place, (n, true, p) in enumerate(counts.table.T.tolist())
        if n
    ]


def counts_of_table(rows: Iterable[Mapping[str, str]]) -> dict[str, ProbabilityCounts]:
    """Return the counts of each group from the rows of :func:`probability_table`, as text."""
    groups: dict[str, ProbabilityCounts] = {}
    for row in rows:
        table = groups.setdefault(row["group"], ProbabilityCounts()).table
        table[:, int(row["bin"])] = [float(row[name]) for name in TABLE_COLUMNS[2:]]
    return groups
