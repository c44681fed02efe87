"""What an inference needs to know to judge its masks, fitted to unseen cases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize

from segbundles.calibration.cases import Case
from segbundles.confidence import FAILURES, LOGITS, calibrated, confidence_of

__all__ = ["CANDIDATES", "fit", "fit_probabilities", "lower_margin", "review_limit", "usual_ranges"]


class Candidate(NamedTuple):
    """A way to expect a score.

    Args:
        features: see :func:`segbundles.confidence.score_features`.
        is_fitted: whether a ridge regression on them is fitted to the score; otherwise it is the only feature itself.
        is_calibrated: whether the probabilities are calibrated.
    """

    features: tuple[str, ...]
    is_fitted: bool = True
    is_calibrated: bool = True


#: ways to expect a score, the simplest first
CANDIDATES = {
    "expected score, as the network says": Candidate(("expected",), is_fitted=False, is_calibrated=False),
    "expected score": Candidate(("expected",), is_fitted=False),
    "mean probability inside": Candidate(("precision",), is_fitted=False),
    "line on the expected score": Candidate(("expected",)),
    "line on the mean probability inside": Candidate(("precision",)),
    "line on the sure share of the mask": Candidate(("sure",)),
    "line on the entropy inside": Candidate(("entropy_inside",)),
    "line on the entropy along the rim": Candidate(("entropy_rim",)),
    "line on the size": Candidate(("log_size",)),
    "line on the number of parts": Candidate(("parts",)),
    "regression on all of these": Candidate(
        ("expected", "precision", "sure", "entropy_inside", "entropy_rim", "log_size", "parts")
    ),
}
_LEVEL = 0.9  # of the lower bound
_FAILURES_FOUND, _FALSE_ALARMS = 0.9, 0.1  # shares that set the limit of a low confidence
_USUAL = 0.95  # share of new images inside of the ranges
_WIDER_OF_ONE_GROUP = 1.0
_RIDGE = 1.0
_TEMPERATURES, _SHIFTS = (0.2, 10.0), (-5.0, 5.0)


def fit(cases: Sequence[Case], candidate: str, score: str) -> dict[str, Any]:
    """Fit what an inference needs to know: ``confidence`` of the facts of weights.

    Args:
        cases: unseen cases.
        candidate: one of `CANDIDATES`.
        score: one of :data:`segbundles.confidence.SCORES`.

    Returns:
        ``score``, ``temperature`` and ``shift`` (of the logits), ``intercept`` and ``coefficients`` (of the features),
        ``low`` (a smaller confidence is flagged), ``margin`` (of the lower bound; None if unknown), and the ranges
        (low, high) of ``masks`` and ``images``.
    """
    names, is_fitted, is_calibrated = CANDIDATES[candidate]
    groups, true = [case.group for case in cases], np.array([case.score for case in cases])
    temperature, shift = fit_probabilities(cases) if is_calibrated else (1.0, 0.0)
    features = [case.features(score, calibrated(temperature, shift)) for case in cases]
    intercept, coefficients = _regression(features, true, names) if is_fitted else (0.0, {names[0]: 1.0})
    facts: dict[str, Any] = {"score": score, "temperature": temperature, "shift": shift}
    facts |= {"intercept": intercept, "coefficients": coefficients, "margin": None}
    confidence = np.array([confidence_of(one, facts)[0] for one in features])
    facts["margin"] = lower_margin(confidence - true, groups)
    facts["low"] = review_limit(confidence, true, FAILURES[score])
    truths = [case.truth for case in cases]
    sizes = [{name: value for name, value in one.items() if name.startswith("size")} for one in truths]
    facts["masks"] = usual_ranges(sizes, groups)
    for name in ("parts", "border"):  # most have one part that touches nothing: a range would not say so
        values = np.array([max(case.truth[name], case.mask[name]) for case in cases])
        facts["masks"][name] = [0.0, _quantile(values, groups, _USUAL)]
    facts["images"] = usual_ranges([case.image for case in cases], groups)
    return facts


def fit_probabilities(cases: Sequence[Case]) -> tuple[float, float]:
    """Fit the temperature and the shift of the logits that make the truth of the cases most likely.

    Every case counts the same; pixels with a probability below 0.01 do not count. See
    :func:`segbundles.confidence.calibrated`.
    """
    counts = np.array([case.inside + case.outside for case in cases], float)
    true = np.array([case.true for case in cases], float)
    weights = 1 / np.maximum(counts.sum(1), 1)
    foreground, background = weights @ true, weights @ (counts - true)

    def surprise(values: NDArray) -> float:
        z = LOGITS / math.exp(values[0]) + values[1]
        return float(foreground @ np.logaddexp(0, -z) + background @ np.logaddexp(0, z)) / len(cases)

    found = minimize(surprise, [0.0, 0.0], bounds=[tuple(map(math.log, _TEMPERATURES)), _SHIFTS], method="Nelder-Mead")
    return math.exp(found.x[0]), float(found.x[1])


def lower_margin(residuals: ArrayLike, groups: Sequence[str], level: float = _LEVEL) -> float | None:
    """Return the margin m so that a new case scores at least its confidence minus m, with a given probability.

    Split conformal prediction for groups: each group counts the same, and so does the new one, which may be worse than
    all others. R. Dunn et al., Distribution-Free Prediction Sets for Two-Layer Hierarchical Models, JASA 2023.

    Args:
        residuals: confidence minus score of each case.
        groups: group of each case.
        level: the probability, 0 to 1.

    Returns:
        The margin; None if there are too few groups, fewer than 9 for 0.9.
    """
    number = len(set(groups))
    needed = level * (number + 1) / number
    return None if needed > 1 + 1e-9 else _quantile(np.asarray(residuals, float), groups, min(needed, 1.0))


def review_limit(confidence: ArrayLike, score: ArrayLike, failure: float) -> float:
    """Return the limit below which a confidence is low.

    9 of 10 failures are below it, but no more than 1 of 10 other cases, except for those whose expected score itself is
    a failure.

    Args:
        confidence: one value per unseen case.
        score: true score of each.
        failure: a smaller score is a failure.
    """
    confidence, bad = np.asarray(confidence), np.asarray(score) < failure
    if not bad.any():
        return failure
    found = np.nextafter(np.quantile(confidence[bad], _FAILURES_FOUND, method="higher"), 1)
    good = np.sort(confidence[~bad])
    most = good[int(_FALSE_ALARMS * len(good))] if len(good) else 1.0
    return float(max(failure, min(found, most)))


def usual_ranges(rows: Sequence[Mapping[str, float]], groups: Sequence[str]) -> dict[str, list[float]]:
    """Return a range of each feature, so that 19 of 20 images of a new group are inside of all of them.

    A range reaches from the smallest to the largest value, and farther on both sides by a share of it that is the same
    for all features. This share is what the images of a group need that the other groups have not seen
    (:func:`lower_margin`; with fewer than 19 groups, that of the worst group).

    Args:
        rows: features of each image; those that only some images have are left out.
        groups: group of each image.

    Returns:
        Low and high of each feature. Sizes and distances are compared by their logarithm.
    """
    names = [name for name in rows[0] if all(name in row for row in rows)]
    sized = np.array([name.startswith(("size", "spacing", "extent")) for name in names], bool)
    values = np.array([[row[name] for name in names] for row in rows], float).reshape(len(rows), len(names))
    sizes = values[:, sized]
    values[:, sized] = np.log(sizes, out=np.full_like(sizes, np.nan), where=sizes > 0)  # an empty mask has no size
    index = np.unique(np.asarray(groups), return_inverse=True)[1]
    low, high = (_of_groups(values, index, function) for function in (np.fmin, np.fmax))

    def reach(left: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        least, most = np.fmin.reduce(low[left]), np.fmax.reduce(high[left])
        return least, most, most - least + np.where(sized, 0.05, 1e-3 * np.maximum(np.abs(most), 1e-3))

    wider = _WIDER_OF_ONE_GROUP
    if len(low) > 1:
        needed = np.zeros(len(rows))
        for group in range(len(low)):
            least, most, width = reach(np.arange(len(low)) != group)
            own = values[index == group]
            needed[index == group] = np.nanmax(np.maximum(least - own, own - most) / width, axis=1, initial=0)
        wider = lower_margin(needed, groups, _USUAL)
        wider = float(needed.max()) if wider is None else wider
    least, most, width = reach(np.arange(len(low)))
    limits = np.stack([least - wider * width, most + wider * width], 1)
    limits[sized] = np.exp(limits[sized])
    return dict(zip(names, limits.tolist(), strict=True))


def _of_groups(values: NDArray, index: NDArray, function: np.ufunc) -> NDArray:
    return np.stack([function.reduce(values[index == group]) for group in range(index.max() + 1)])


def _regression(
    features: Sequence[Mapping[str, float]], true: NDArray, names: Sequence[str]
) -> tuple[float, dict[str, float]]:
    """Fit a ridge regression; return its intercept and the coefficient of each feature."""
    x = np.array([[one[name] for name in names] for one in features], float)
    centre, scale = x.mean(0), x.std(0)
    scale[scale == 0] = 1
    z = (x - centre) / scale
    weights = np.linalg.solve(z.T @ z + _RIDGE * np.eye(len(names)), z.T @ (true - true.mean())) / scale
    return float(true.mean() - weights @ centre), dict(zip(names, map(float, weights), strict=True))


def _quantile(values: NDArray, groups: Sequence[str], level: float) -> float:
    """Return a quantile of cases of which those of a group have the same weight as those of another."""
    _, index, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(1 / counts[index[order]]) >= level * len(counts) - 1e-9
    return float(values[order[reached.argmax()]])
