"""Unseen cases of finished evaluations: what an inference knows of each, and the truth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch
from numpy.typing import NDArray

from segbundles.confidence import mask_features, pixel_counts, score_features
from segbundles.data import VOID
from segbundles.errors import fail
from segbundles.files import read_json

__all__ = ["Case", "evaluation_folders", "read_cases"]


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

    def features(self, score: str, p: NDArray) -> dict[str, float]:
        """Return :func:`segbundles.confidence.score_features`."""
        return score_features(self.inside, self.outside, self.pixels, self.mask["parts"], score, p)


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
