"""What out-of-fold predictions say about the confidence of weights: ``segbundles calibrate``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit

from segbundles.confidence import (
    FAILURES,
    LOGITS,
    confidence_of,
    mask_features,
    pixel_counts,
    reasons_to_review,
    score_features,
)
from segbundles.data import VOID
from segbundles.errors import fail
from segbundles.facts import facts_path, read_facts
from segbundles.files import read_json, write_json
from segbundles.statistics import Interval, bootstrap_interval, judge_confidence, rank_correlation, short

__all__ = [
    "Case",
    "calibrate",
    "fit",
    "fit_temperature",
    "lower_margin",
    "read_cases",
    "summary_rows",
]

#: ways to expect a score, the simplest first: the features of a regression, and whether probabilities are calibrated
MODELS: dict[str, tuple[tuple[str, ...], bool]] = {
    "expected score, as the network says": ((), False),
    "expected score, calibrated": ((), True),
    "line on the calibrated expected score": (("expected",), True),
    "line on the mean probability inside": (("precision",), True),
    "regression": (("expected", "precision", "log_size", "parts"), True),
}
_LEVEL = 0.9  # of the lower bound
_LOW = 0.1  # share of unseen cases whose confidence counts as low
# of a range, on both sides: a new case may be at its edge, and the fewer groups, the farther beyond
_WIDER, _WIDER_OF_ONE_GROUP = 0.25, 2.0
_RIDGE = 1.0
_ONE_ERROR = 0.68  # level of an interval of one standard error on both sides
_PARTS = 20  # groups are left out one by one, or in so many parts
_TEMPERATURES = (0.2, 10.0)


@dataclass
class Case:
    """An unseen case: what an inference knows of it, and the truth.

    Args:
        name: name of the case.
        group: group of the case, such as its patient.
        fold: fold that it was predicted in.
        score: true score of its mask.
        inside: see :func:`segbundles.confidence.expected_score`.
        outside: the same of the other pixels.
        true: those of both that are foreground.
        size: pixels of the true foreground.
        pixels: all pixels.
        mask: :func:`segbundles.confidence.mask_features` of the predicted mask.
        truth: the same of the true one.
        image: :func:`segbundles.confidence.image_features`.
    """

    name: str
    group: str
    fold: int
    score: float
    inside: NDArray
    outside: NDArray
    true: NDArray
    size: int
    pixels: int
    mask: dict[str, float]
    truth: dict[str, float]
    image: dict[str, float]

    def features(self, score: str, temperature: float) -> dict[str, float]:
        """Return :func:`segbundles.confidence.score_features`."""
        return score_features(self.inside, self.outside, self.pixels, self.mask["parts"], score, temperature)


def evaluation_folders(folder: str | Path) -> list[Path]:
    """Return the evaluations of a cross-validation, or the one evaluation of cases that the weights have not seen.

    Args:
        folder: folder that ``segbundles crossvalidate`` or ``segbundles evaluate`` wrote.

    Raises:
        ValueError: when one has no predictions.
    """
    folds = [path / "evaluation" for path in sorted(Path(folder).glob("fold*"))] or [Path(folder)]
    for path in folds:
        if not any((path / "predictions").glob("*.npz")):
            fail(f"{path} has no predictions: evaluate again with --save_predictions true.")
    return folds


def read_cases(
    root: Path, folder: str | Path, score: str, track: Callable[[Sequence[Any]], Iterable[Any]] = iter
) -> list[Case]:
    """Read the cases of evaluations: predictions and truths, and the images from where they were.

    Args:
        root: folder of the bundle.
        folder: see :func:`evaluation_folders`.
        score: one of :data:`segbundles.confidence.SCORES`.
        track: shows progress through the cases.

    Raises:
        ValueError: when predictions or images are missing.
    """
    from segbundles.handlers import prediction_name

    todo = []
    for fold, evaluation in enumerate(evaluation_folders(folder)):
        dataset = _dataset(root, evaluation)
        todo += [(fold, evaluation / "predictions", dataset, number) for number in range(len(dataset))]
    cases, taken = [], [set() for _ in todo]
    for fold, predictions, dataset, number in track(todo):
        item = dataset[number]
        path = predictions / f"{prediction_name(item, taken[fold])}.npz"
        if not path.is_file():
            fail(f"{path} is missing: evaluate again with --save_predictions true.")
        cases.append(_read_case(path, item, fold, score))
    return cases


def _dataset(root: Path, evaluation: Path) -> Any:
    """Return the data set of an evaluation, as its config and its knobs make it."""
    from monai.bundle import ConfigParser

    path = evaluation / "evaluating.config.json"
    if not path.is_file():
        fail(f"{path} is missing: evaluate again.")
    parser = ConfigParser()
    parser.read_config([str(root / "configs" / name) for name in ("train.json", "evaluate.json")])
    knobs = {name: value for name, value in read_json(path)["knobs"].items() if name in parser.config}
    parser.update({**knobs, "bundle_root": str(root)})
    return parser.get_parsed_content("validate::dataset")


def _read_case(path: Path, item: Mapping[str, Any], fold: int, score: str) -> Case:
    from segbundles.transforms import describe_image, foreground, spacing_mm

    with np.load(path) as kept:
        if "probability" not in kept:
            fail(f"{path} has no probabilities: evaluate again with --save_predictions true.")
        label, mask, probability = kept["label"][0], kept["pred"][0] > 0, kept["probability"]
    p = foreground(torch.as_tensor(probability).float())
    counted, spacing = label != VOID, spacing_mm(item["image"])
    truth = (label > 0) & counted
    inside, outside = (pixel_counts(p, part & counted) for part in (mask, ~mask))
    hits, wrong = int((mask & truth).sum()), int(((mask != truth) & counted).sum())
    size, pixels = int(truth.sum()), int(counted.sum())
    seen = int((mask & counted).sum())
    dice = 2 * hits / (seen + size) if seen + size else 1.0
    name = unquote(path.stem)
    return Case(
        name=name,
        group=str(item.get("group") or name),
        fold=fold,
        score=dice if score == "dice" else 1 - wrong / pixels,
        inside=inside,
        outside=outside,
        true=pixel_counts(p, truth),
        size=size,
        pixels=pixels,
        mask=mask_features(mask, spacing),
        truth=mask_features(truth, spacing),
        image=describe_image(item["image"]),
    )


def fit_temperature(cases: Sequence[Case]) -> float:
    """Fit the temperature that makes the probabilities of the cases most likely; every case counts the same.

    Pixels with a probability below 0.01 do not count. C. Guo et al., ICML 2017.
    """
    counts = np.array([case.inside + case.outside for case in cases], float)
    true = np.array([case.true for case in cases], float)
    weights = 1 / np.maximum(counts.sum(1), 1)
    foreground, background = weights @ true, weights @ (counts - true)

    def surprise(log_temperature: float) -> float:
        z = LOGITS / math.exp(log_temperature)
        return float(foreground @ np.logaddexp(0, -z) + background @ np.logaddexp(0, z))

    bounds = tuple(map(math.log, _TEMPERATURES))
    return math.exp(minimize_scalar(surprise, bounds=bounds, method="bounded").x)


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
    residuals = np.asarray(residuals, float)
    weights = _weights(groups)
    order = np.argsort(residuals, kind="stable")
    number = len(set(groups))
    reached = np.flatnonzero(np.cumsum(weights[order]) * number >= level * (number + 1) - 1e-9)
    return float(residuals[order[reached[0]]]) if reached.size else None


def fit(cases: Sequence[Case], model: str, score: str) -> dict[str, Any]:
    """Fit what an inference needs to know: ``confidence`` of the facts of weights.

    Args:
        cases: unseen cases.
        model: one of `MODELS`.
        score: one of :data:`segbundles.confidence.SCORES`.

    Returns:
        ``score``, ``temperature``, ``intercept`` and ``coefficients`` (of the features), ``low`` (a smaller confidence
        is flagged), ``margin`` (of the lower bound; None if unknown), and the ranges (low, high) of ``masks`` and
        ``images``.
    """
    names, calibrated = MODELS[model]
    temperature = fit_temperature(cases) if calibrated else 1.0
    intercept, coefficients = 0.0, {"expected": 1.0}
    features = [case.features(score, temperature) for case in cases]
    if names:
        intercept, coefficients = _regression(
            [[one[name] for name in names] for one in features], [case.score for case in cases], names
        )
    facts: dict[str, Any] = {"score": score, "temperature": temperature, "intercept": intercept}
    facts |= {"coefficients": coefficients, "margin": None}
    groups = [case.group for case in cases]
    confidence = np.array([confidence_of(one, facts)[0] for one in features])
    facts["margin"] = lower_margin(confidence - [case.score for case in cases], groups)
    facts["low"] = max(FAILURES[score], _quantile(confidence, _weights(groups), _LOW))
    wider = _WIDER + _WIDER_OF_ONE_GROUP / len(set(groups))
    facts["masks"] = _ranges([case.truth for case in cases], wider)
    for name in ("parts", "border"):  # most have one part that touches nothing: a range would not say so
        values = np.array([case.truth[name] for case in cases])
        facts["masks"][name] = [0.0, _quantile(values, _weights(groups), 0.95)]
    facts["images"] = _ranges([case.image for case in cases], wider)
    return facts


def calibrate(
    root: Path,
    folder: str | Path,
    weights: str | Path,
    record: str | Path | None = None,
    command: str = "",
    track: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """Calibrate the confidence of weights: write it into their facts, and how well it does on unseen cases.

    Everything is measured on unseen cases: the network was not trained with them, and what is fitted for a case is
    fitted without its group.

    Args:
        root: folder of the bundle.
        folder: see :func:`evaluation_folders`.
        weights: the weights, with facts beside them.
        record: JSON file to write the comparison to; None writes ``folder/confidence.json``.
        command: command that repeats it, for facts and record.
        track: shows progress through the cases.

    Returns:
        The record, see docs/confidence.md.

    Raises:
        ValueError: when predictions or facts are missing, or there are fewer than two groups.
    """
    score, facts = _score_of(root), read_facts(weights)
    if facts is None:
        fail(f"{weights} has no facts beside it, {facts_path(weights).name}: confidence is a fact of the weights.")
    cases = read_cases(root, folder, score, track)
    groups = [case.group for case in cases]
    folds = len({case.fold for case in cases})
    names = list(dict.fromkeys(groups))
    parts = [names.index(group) % _PARTS for group in groups]
    if len(names) < 2:
        fail(f"{folder} has cases of one group only: a confidence needs at least two.")
    found = {model: _out_of_fold(cases, parts, model, score) for model in MODELS}
    true = np.array([case.score for case in cases])
    chosen = _simplest({model: [one["confidence"] for one in rows] for model, rows in found.items()}, true, groups)
    fitted = fit(cases, chosen, score)
    about = {"cases": len(cases), "groups": len(set(groups)), "folds": folds, "model": chosen, "command": command}
    result = {
        "bundle": root.name,
        "weights_sha256": facts["sha256"],
        "score": score,
        "failure_below": FAILURES[score],
        **about,
        "mean_score": float(true.mean()),
        "temperature": fitted["temperature"],
        "margin": fitted["margin"],
        "candidates": {
            **{
                model: judge_confidence([one["confidence"] for one in rows], true, groups, FAILURES[score])
                for model, rows in found.items()
            },
            **_single_features(cases, parts, true, groups, score),
        },
        "chosen": chosen,
        "measured": _measured(found[chosen], true, groups, score),
        "thresholds": _thresholds(cases, parts) if score == "dice" else None,
        "cases_scored": [
            {"case": case.name, "group": case.group, "fold": case.fold, "score": case.score, **one}
            for case, one in zip(cases, found[chosen], strict=True)
        ],
    }
    result["lines"] = _lines(result)
    write_json(facts_path(weights), read_json(facts_path(weights)) | {"confidence": {**fitted, **about}})
    write_json(Path(record or Path(folder, "confidence.json")), result)
    return result


def _score_of(root: Path) -> str:
    """Return the score that a bundle's ``inference.json`` expects of its masks.

    Raises:
        ValueError: when it expects none.
    """
    config = read_json(root / "configs" / "inference.json")
    for step in config.get("postprocessing", {}).get("transforms", ()):
        if str(step.get("_target_")).endswith(".Confidenced"):
            return step.get("score", "dice")
    fail(f"inference.json of {root} has no Confidenced in its postprocessing: add it, see docs/confidence.md.")


def summary_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """Return the candidates of a record as rows of a table: name, rank correlation, both AUROC and mean error."""
    rows = []
    for name, found in record["candidates"].items():
        rank = Interval(**found["rank_correlation"])
        others = (found["auroc_failures"], found["auroc_worst_fifth"], found["error"] if name in MODELS else None)
        rows.append([name, str(rank), *("" if value is None else short(value) for value in others)])
    return rows


def _lines(record: Mapping[str, Any]) -> list[str]:
    """Say what was measured out of fold, one line per figure."""
    got, low = record["measured"], record["failure_below"]
    lines = [
        f"Cases: {record['cases']} of {record['groups']} groups, mean {record['score']} {record['mean_score']:.3f}"
    ]
    if got["coverage"]["n"]:
        lines.append(f"Score at or above the lower bound: {got['coverage']['value']:.1%} of the cases (wanted: 90 %)")
    else:
        lines.append(f"No lower bound: it needs 9 groups or more in each fit, there are {record['groups']}")
    caught = "" if got["failures_flagged"] is None else f", and {got['failures_flagged']:.0%} of the failures"
    lines.append(f"Flagged for review: {got['flagged']:.1%} of the cases{caught}")
    lines.append(f"Failures ({record['score']} below {low}): {got['failures']}")
    if rules := record["thresholds"]:
        lines.append(
            f"Mean Dice with threshold 0.5: {rules['half']:.4f}; fitted on the others: {rules['fitted']:.4f}; "
            f"largest expected Dice: {rules['optimal']:.4f} (all before other steps)"
        )
    return lines


def _out_of_fold(cases: Sequence[Case], parts: Sequence[Any], model: str, score: str) -> list[dict[str, Any]]:
    """Return confidence, lower bound and review of each case, fitted on the cases of the other parts."""
    rows: dict[int, dict[str, Any]] = {}
    for part in dict.fromkeys(parts):
        facts = fit([case for case, other in zip(cases, parts, strict=True) if other != part], model, score)
        for number in (n for n, other in enumerate(parts) if other == part):
            case = cases[number]
            value, low = confidence_of(case.features(score, facts["temperature"]), facts)
            review = "; ".join(reasons_to_review(case.mask, case.image, facts, value, score))
            rows[number] = {"confidence": value, "confidence_low": low, "review": review}
    return [rows[number] for number in range(len(cases))]


def _single_features(
    cases: Sequence[Case], parts: Sequence[Any], true: NDArray, groups: Sequence[str], score: str
) -> dict[str, dict[str, Any]]:
    """Judge features that are no score: only the order of the cases counts."""
    rows: list[dict[str, float]] = [{}] * len(cases)
    for part in dict.fromkeys(parts):
        temperature = fit_temperature([case for case, other in zip(cases, parts, strict=True) if other != part])
        for number in (n for n, other in enumerate(parts) if other == part):
            rows[number] = cases[number].features(score, temperature)
    signs = {"precision": 1, "recall": 1, "entropy_inside": -1, "entropy_rim": -1, "log_size": 1, "parts": -1}
    judged = {
        name: judge_confidence([sign * one[name] for one in rows], true, groups, FAILURES[score])
        for name, sign in signs.items()
    }
    sizes = np.array([one["log_size"] for one in rows])
    unusual = [-abs(size - np.median(sizes)) for size in sizes]
    return judged | {"usual_size": judge_confidence(unusual, true, groups, FAILURES[score])}


def _measured(rows: Sequence[Mapping[str, Any]], true: NDArray, groups: Sequence[str], score: str) -> dict[str, Any]:
    """Measure what a user gets: ranks, coverage of the lower bound, and what is flagged."""
    bad, flagged = true < FAILURES[score], np.array([bool(one["review"]) for one in rows])
    bounded = [(one["confidence_low"], value) for one, value in zip(rows, true, strict=True)]
    held = np.array([np.nan if low is None else float(value >= low) for low, value in bounded])
    coverage = bootstrap_interval(held, groups)
    return {
        **judge_confidence([one["confidence"] for one in rows], true, groups, FAILURES[score]),
        "coverage": coverage.as_dict(),
        "flagged": float(flagged.mean()),
        "failures_flagged": float(flagged[bad].mean()) if bad.any() else None,
    }


def _simplest(found: Mapping[str, Sequence[float]], true: NDArray, groups: Sequence[str]) -> str:
    """Return the first model within one standard error of the best one, in rank correlation and in mean error.

    L. Breiman et al., Classification and Regression Trees, 1984, section 3.4.3.
    """
    within = dict.fromkeys(found, True)
    for statistic in (rank_correlation, _closeness):
        values = {model: statistic(np.column_stack([one, true])) for model, one in found.items()}
        best = max(values, key=lambda model: np.nan_to_num(values[model], nan=-1))
        for model, one in found.items():
            rows = np.column_stack([found[best], one, true])
            gain = bootstrap_interval(
                rows, groups, lambda rows, s=statistic: s(rows[:, [0, 2]]) - s(rows[:, [1, 2]]), level=_ONE_ERROR
            )
            within[model] &= gain.low is None or gain.low <= 0
    return next((model for model, good in within.items() if good), next(iter(found)))


def _closeness(rows: NDArray) -> float:
    return -float(np.abs(rows[:, 0] - rows[:, 1]).mean())


def _thresholds(cases: Sequence[Case], parts: Sequence[Any]) -> dict[str, Any]:
    """Compare rules that make a mask of probabilities, by the mean Dice of the cases.

    Returns:
        ``half``: threshold 0.5; ``fitted``: the best threshold of the other parts; ``optimal``: of each case, the
        threshold with the largest expected Dice after calibration (B. Dai and C. Li, RankSEG, JMLR 2023). All before
        steps such as the largest component. ``threshold`` is the best one of all cases.
    """
    counts = np.array([case.inside + case.outside for case in cases], float)[:, ::-1].cumsum(1)[:, ::-1]
    hits = np.array([case.true for case in cases], float)[:, ::-1].cumsum(1)[:, ::-1]
    dice = 2 * hits / np.maximum(counts + np.array([[case.size] for case in cases]), 1)
    edges = expit(LOGITS - (LOGITS[1] - LOGITS[0]) / 2)
    half = int(np.argmin(np.abs(edges - 0.5)))
    fitted, optimal = np.zeros(len(cases)), np.zeros(len(cases))
    for part in dict.fromkeys(parts):
        others = np.array([other != part for other in parts])
        best = int(dice[others].mean(0).argmax())
        temperature = fit_temperature([case for case, other in zip(cases, others, strict=True) if other])
        p = expit(LOGITS / temperature)
        for n in np.flatnonzero(~others):
            both = cases[n].inside + cases[n].outside
            right = (both * p)[::-1].cumsum()[::-1]
            expected = 2 * right / np.maximum(counts[n] + (both * p).sum(), 1e-9)
            fitted[n], optimal[n] = dice[n, best], dice[n, int(expected.argmax())]
    groups = [case.group for case in cases]
    found = {"half": dice[:, half], "fitted": fitted, "optimal": optimal}
    gains = {
        f"{name}_gain": bootstrap_interval(found[name] - found["half"], groups).as_dict()
        for name in ("fitted", "optimal")
    }
    means = {name: float(values.mean()) for name, values in found.items()}
    return {**means, **gains, "threshold": float(edges[int(dice.mean(0).argmax())])}


def _regression(
    rows: Sequence[Sequence[float]], true: Sequence[float], names: Sequence[str]
) -> tuple[float, dict[str, float]]:
    """Fit a ridge regression; return its intercept and the coefficient of each feature."""
    x, y = np.asarray(rows, float), np.asarray(true, float)
    centre, scale = x.mean(0), x.std(0)
    scale[scale == 0] = 1
    z = (x - centre) / scale
    weights = np.linalg.solve(z.T @ z + _RIDGE * np.eye(len(names)), z.T @ (y - y.mean())) / scale
    return float(y.mean() - weights @ centre), dict(zip(names, map(float, weights), strict=True))


def _ranges(rows: Sequence[Mapping[str, float]], wider: float) -> dict[str, list[float]]:
    """Return the range of each feature that all cases have, made wider on both sides by a share of it."""
    found = {}
    for name in (key for key in rows[0] if all(key in row for row in rows)):
        values = [row[name] for row in rows]
        if name.startswith("size"):  # an empty mask has no size
            values = [value for value in values if value] or [0.0]
        low, high = min(values), max(values)
        if name.startswith(("size", "spacing", "extent")):  # sizes differ by factors
            factor = (max(high, 1e-9) / max(low, 1e-9)) ** wider * 1.05
            found[name] = [low / factor, high * factor]
        else:
            margin = wider * (high - low) + 1e-3 * max(abs(low), abs(high), 1e-3)
            found[name] = [low - margin, high + margin]
    return found


def _weights(groups: Sequence[str]) -> NDArray:
    """Return the weight of each case: those of a group have the weight 1 / number of groups together."""
    _, index, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    return 1 / (counts[index] * len(counts))


def _quantile(values: NDArray, weights: NDArray, level: float) -> float:
    order = np.argsort(values, kind="stable")
    place = np.searchsorted(np.cumsum(weights[order]), level - 1e-9)
    return float(values[order[min(place, len(values) - 1)]])
