"""Compare rules that make a mask of probabilities, on cases that the network has not seen.

    segbundles crossvalidate B D O --folds 3 --save_predictions true
    python benchmarks/decision.py B O [--record]

The rules: a probability of 0.5; the best threshold of the cases of all other groups; and, for each case, the threshold
with the largest expected score after a calibration on all other groups (B. Dai and C. Li, RankSEG, JMLR 2023). The
score is the one that the bundle's confidence expects (Dice, or the share of pixels of the right class), of the mask
before steps such as the largest component. `--record` writes `docs/figures/decision.csv` of the bundle, which
docs/confidence.md shows.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from segbundles.calibration import Case, expected_by, fit_probabilities, parts_of, read_cases
from segbundles.commands import find_bundle
from segbundles.confidence import LOGITS, calibrated
from segbundles.files import atomic_path
from segbundles.statistics import Interval, bootstrap_interval

_EDGES = expit(LOGITS - (LOGITS[1] - LOGITS[0]) / 2)  # the thresholds: lower edges of the bins


def scores(hits: NDArray, found: NDArray, size: NDArray, pixels: NDArray, score: str) -> NDArray:
    """Return the score of masks with `found` pixels, of which `hits` are right, of `size` true ones."""
    if score == "accuracy":
        return (pixels - found - size + 2 * hits) / pixels
    return 2 * hits / np.maximum(found + size, 1e-9)


def decide(cases: Sequence[Case], score: str) -> dict[str, NDArray]:
    """Return the score of each case by rule."""
    size, pixels = (np.array([[getattr(case, name)] for case in cases]) for name in ("size", "pixels"))
    both = np.array([case.inside + case.outside for case in cases], float)
    found, hits = _above(both), _above(np.array([case.true for case in cases], float))
    table = scores(hits, found, size, pixels, score)  # (cases, thresholds)
    half = int(np.argmin(np.abs(_EDGES - 0.5)))
    fitted, optimal = np.zeros(len(cases)), np.zeros(len(cases))
    parts = np.array(parts_of([case.group for case in cases]))
    for part in set(parts):
        own, others = np.flatnonzero(parts == part), np.flatnonzero(parts != part)
        fitted[own] = table[own, table[others].mean(0).argmax()]
        p = calibrated(*fit_probabilities([cases[n] for n in others]))
        right = both[own] * p
        expected = scores(_above(right), found[own], right.sum(1, keepdims=True), pixels[own], score)
        optimal[own] = table[own, expected.argmax(1)]
    return {
        "probability above 0.5": table[:, half],
        f"threshold fitted without the group of the case (to all cases: {_EDGES[table.mean(0).argmax()]:.2f})": fitted,
        "threshold with the largest expected score of each case": optimal,
    }


def _above(counts: NDArray) -> NDArray:
    """Return how many pixels are at or above each threshold."""
    return counts[:, ::-1].cumsum(1)[:, ::-1]


def rows(cases: Sequence[Case], score: str, name: str) -> list[list[str]]:
    """Return the table: heads, and one row per rule."""
    groups = [case.group for case in cases]
    found = decide(cases, score)
    first = next(iter(found.values()))
    of = f"{len(cases)} cases, {len(set(groups))} groups"
    table = [[f"{name}: {of}", f"mean {score}".replace("dice", "Dice"), "difference (95 % interval)"]]
    for rule, values in found.items():
        gain = bootstrap_interval(values - first, groups)
        table.append([rule, f"{values.mean():.4f}", "" if values is first else _text(gain)])
    return table


def _text(gain: Interval) -> str:
    return f"{gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="name or folder of the bundle")
    parser.add_argument("folder", type=Path, help="folder of segbundles crossvalidate, with predictions")
    parser.add_argument("--record", action="store_true", help="write docs/figures/decision.csv of the bundle")
    args = parser.parse_args()
    root = find_bundle(args.bundle)
    score = expected_by(root)
    table = rows(read_cases(root, args.folder, score), score, root.name)
    csv.writer(sys.stdout).writerows(table)
    if args.record:
        with (
            atomic_path(root / "docs/figures/decision.csv") as part,
            part.open("w", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file, lineterminator="\n").writerows(table)


if __name__ == "__main__":
    main()
