"""How good a mask is expected to be, and why a person should look at it.

What is known about the weights comes from cases that the network had not seen, see :mod:`segbundles.calibration`. It is
kept in their facts as ``confidence``. The functions here describe one case and compare it with these facts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.special import entr, expit, logit

__all__ = [
    "COLUMNS",
    "FAILURES",
    "LOGITS",
    "SCORES",
    "UNCALIBRATED",
    "calibrated",
    "confidence_columns",
    "confidence_of",
    "describe_confidence",
    "expected_score",
    "image_features",
    "join_confidence",
    "mask_features",
    "pixel_counts",
    "reasons_to_review",
    "score_features",
]

#: scores that can be expected: the Dice of the foreground, or the share of the pixels that have the right class
SCORES = ("dice", "accuracy")
#: what :class:`segbundles.transforms.Confidenced` adds to a case
COLUMNS = ("confidence", "confidence_low", "confidence_calibrated", "review")
#: what counts as a failure: a smaller score
FAILURES = {"dice": 0.7, "accuracy": 0.9}

_FLOOR = 0.01  # probability; a volume has millions of pixels below it, which say nothing about the mask
_STEP, _LEAST, _MOST = 0.25, -5.0, 10.0  # logits; that of the floor is -4.6, and float16 ends at 7.6
#: logit of the pixels in each bin of :func:`pixel_counts`
LOGITS = np.arange(_LEAST, _MOST, _STEP) + _STEP / 2
#: probability of the pixels in each bin, as the network says
UNCALIBRATED = expit(LOGITS)
_DOUBTFUL, _SURE = (0.1, 0.9), 0.8  # probabilities
_SLICES, _SIDE = 12, 512  # of an image, from which its grey levels are described
_SMALL_PART = 0.01  # share of the mask; smaller parts are not counted
_WORDS = {
    "mean": "brightness",
    "sd": "contrast",
    "skewness": "distribution of grey levels",
    "flat": "share of uniform areas",
    "rough": "texture",
    "correlation": "likeness of the channels",
    "spacing": "size of voxels",
    "extent": "field of view",
}


def pixel_counts(probability: ArrayLike, mask: ArrayLike) -> NDArray:
    """Count pixels by the logit of their probability of foreground.

    Args:
        probability: probability of foreground (spatial), 0 to 1.
        mask: pixels to count (spatial).

    Returns:
        Number of pixels in each bin of `LOGITS`. Pixels with a probability below 0.01 are left out.
    """
    p = np.asarray(probability)
    p = p[(p >= _FLOOR) & np.asarray(mask, dtype=bool)].astype(np.float64)
    bins = (np.clip(logit(p), _LEAST, LOGITS[-1]) - _LEAST) / _STEP
    return np.bincount(bins.astype(int), minlength=len(LOGITS))


def calibrated(temperature: float = 1.0, shift: float = 0.0) -> NDArray:
    """Return the calibrated probability of the pixels in each bin of `LOGITS`.

    Args:
        temperature: what logits are divided by; larger for a network that is too sure.
        shift: what is added to them then; negative for masks that are too large. J. Platt, Probabilistic Outputs for
            Support Vector Machines, 1999.
    """
    return expit(LOGITS / temperature + shift)


def expected_score(
    inside: ArrayLike, outside: ArrayLike, pixels: int, score: str = "dice", p: NDArray = UNCALIBRATED
) -> float:
    """Compute the score that a mask is expected to have, from the probabilities of its pixels.

    With p the calibrated probability of a pixel, and m its mask (0 or 1), the expected Dice is about
    ``2 sum(p m) / (sum(p) + sum(m))``, and the expected accuracy is the mean of p inside and of 1 - p outside. An empty
    mask has Dice 1 if there is nothing, and otherwise 0: its expected Dice is the probability that every pixel is
    background, ``prod(1 - p)``. All of this takes pixels as independent.

    Args:
        inside: counts of the pixels of the mask, see :func:`pixel_counts`.
        outside: counts of the other pixels.
        pixels: number of all pixels.
        score: one of `SCORES`.
        p: probability of each bin, see :func:`calibrated`.

    Returns:
        0 to 1.
    """
    inside, outside = np.asarray(inside, float), np.asarray(outside, float)
    right, missed, size = float(inside @ p), float(outside @ p), float(inside.sum())
    if score == "accuracy":
        return (right + pixels - size - missed) / pixels
    if not size:
        return float(np.exp(outside @ np.log1p(-p)))
    return 2 * right / (right + missed + size)


def score_features(
    inside: ArrayLike, outside: ArrayLike, pixels: int, parts: float, score: str, p: NDArray
) -> dict[str, float]:
    """Return what may say how good a mask is; arguments as of :func:`expected_score`, and its number of parts.

    Returns:
        ``expected``, the expected score; ``precision``, the mean probability inside; ``sure``, the share of the mask
        with a probability above 0.8 (both the expected score of an empty mask); ``entropy_inside`` (mean, nats; the
        largest possible for an empty mask) and ``entropy_rim``, the entropy of the pixels between 0.1 and 0.9, per
        pixel of the mask; ``log_size`` (of the pixels), and ``parts``.
    """
    inside, outside = np.asarray(inside, float), np.asarray(outside, float)
    size, entropy = float(inside.sum()), entr(p) + entr(1 - p)
    rim = (p > _DOUBTFUL[0]) & (p < _DOUBTFUL[1])
    expected = expected_score(inside, outside, pixels, score, p)
    return {
        "expected": expected,
        "precision": float(inside @ p) / size if size else expected,
        "sure": float(inside @ (p > _SURE)) / size if size else expected,
        "entropy_inside": float(inside @ entropy) / size if size else float(np.log(2)),
        "entropy_rim": float((inside + outside) @ (entropy * rim)) / max(size, 1.0),
        "log_size": float(np.log1p(size)),
        "parts": parts,
    }


def mask_features(mask: ArrayLike, spacing_mm: Sequence[float] | None = None) -> dict[str, float]:
    """Describe a mask by what is compared with the training data.

    Args:
        mask: foreground (spatial).
        spacing_mm: size of a pixel along each axis; None if it is not known.

    Returns:
        ``size_percent`` (of the image) and, of a volume with known spacing, ``size_ml``; ``parts`` (connected parts of
        at least 1 % of the mask, joined by faces); ``border`` (share of the mask on the edge of the image).
    """
    mask = np.asarray(mask, dtype=bool)
    count = int(np.count_nonzero(mask))
    found = {"size_percent": 100 * count / max(mask.size, 1)}
    if mask.ndim == 3 and spacing_mm is not None:
        found["size_ml"] = count * float(np.prod(spacing_mm)) / 1000
    parts = edge = 0
    if count:
        (box,) = ndimage.find_objects(mask.view(np.uint8))
        labels, _ = ndimage.label(mask[box])
        parts = int((np.bincount(labels.ravel())[1:] >= _SMALL_PART * count).sum())
        edge = count - int(np.count_nonzero(mask[(slice(1, -1),) * mask.ndim]))
    return {**found, "parts": float(parts), "border": edge / max(count, 1)}


def image_features(image: ArrayLike, spacing_mm: Sequence[float] | None = None) -> dict[str, float]:
    """Describe an image by what is compared with the training data, from at most 12 of its slices.

    Args:
        image: the image that the network gets (C, spatial).
        spacing_mm: size of a pixel along each axis; None if it is not known.

    Returns:
        Of each channel ``skewness``, ``flat`` (the share of neighbouring pixels that are equal) and ``rough`` (the mean
        difference of neighbouring pixels, in standard deviations); of each two channels their ``correlation``; of 8-bit
        images, which nothing has normalised, also ``mean`` and ``sd``; of each axis ``spacing`` and ``extent`` in mm.
    """
    image = np.asarray(image)
    planes = image[..., None] if image.ndim == 3 else image
    chosen = np.unique(np.linspace(0, planes.shape[-1] - 1, _SLICES + 2).round().astype(int)[1:-1])
    starts = [max(0, (n - _SIDE) // 2) for n in planes.shape[1:3]]
    seen = planes[:, starts[0] : starts[0] + _SIDE, starts[1] : starts[1] + _SIDE, chosen].astype(np.float64)
    flat = seen.reshape(len(seen), -1)
    mean, sd = flat.mean(1), flat.std(1)
    normal = (flat - mean[:, None]) / np.where(sd > 0, sd, 1)[:, None]
    found: dict[str, float] = {}
    for c, channel in enumerate(seen):
        steps = np.abs(np.concatenate([np.diff(channel, axis=axis).ravel() for axis in (0, 1)]))
        if image.dtype == np.uint8:
            found |= {f"mean_{c}": float(mean[c]), f"sd_{c}": float(sd[c])}
        found[f"skewness_{c}"] = float((normal[c] ** 3).mean())
        found[f"flat_{c}"] = float((steps == 0).mean()) if steps.size else 1.0
        found[f"rough_{c}"] = float(steps.mean() / sd[c]) if steps.size and sd[c] > 0 else 0.0
        found |= {f"correlation_{b}{c}": float((normal[b] * normal[c]).mean()) for b in range(c)}
    for axis, step in enumerate(spacing_mm or ()):
        found |= {f"spacing_{axis}": float(step), f"extent_{axis}": float(step * image.shape[1 + axis])}
    return found


def confidence_of(features: Mapping[str, float], facts: Mapping[str, Any]) -> tuple[float, float | None]:
    """Return the confidence of a mask, and the score that 9 of 10 such masks reach.

    Args:
        features: as from :func:`score_features`.
        facts: ``confidence`` of the facts of the weights, see :func:`segbundles.calibration.fit`.

    Returns:
        Both 0 to 1; the second is None where too few cases were there to say it.
    """
    value = facts["intercept"] + sum(weight * features[name] for name, weight in facts["coefficients"].items())
    value = float(np.clip(value, 0, 1))
    return value, None if facts["margin"] is None else float(np.clip(value - facts["margin"], 0, 1))


def confidence_columns(item: Mapping[Any, Any]) -> dict[str, Any]:
    """Return what :class:`segbundles.transforms.Confidenced` has added to a case, as tables and files have it."""
    return {name: item[name] for name in COLUMNS if name in item}


def join_confidence(parts: Sequence[Mapping[str, Any]], pixels: Sequence[int], name: str) -> dict[str, Any]:
    """Return the columns of an image that was segmented in parts, such as blocks or pages.

    The expected accuracy of the image is the mean over its pixels. A part that needs a look is enough to look at the
    image, so each kind of reason is kept, in the words of the least certain part that has it, with the number of parts.

    Args:
        parts: the columns of each part, as from :func:`confidence_columns`, all from the same weights.
        pixels: number of pixels of each part.
        name: what the parts are called, in the plural.

    Returns:
        The same columns.
    """
    lows = [part["confidence_low"] for part in parts]
    found: dict[str, list[str]] = {}
    for part in sorted(parts, key=lambda part: part["confidence"]):
        for reason in filter(None, part["review"].split("; ")):
            found.setdefault(reason.partition(":")[0], []).append(reason)
    several = len(parts) > 1
    reasons = (same[0] + f" (in {len(same)} of {len(parts)} {name})" * several for same in found.values())
    return {
        **parts[0],
        "confidence": float(np.average([part["confidence"] for part in parts], weights=pixels)),
        "confidence_low": None if None in lows else float(np.average(lows, weights=pixels)),
        "review": "; ".join(reasons),
    }


def describe_confidence(item: Mapping[Any, Any]) -> list[tuple[str, str]]:
    """Return the confidence of a case for a person: its name, and how much; nothing if it has none."""
    if "confidence" not in item:
        return []
    low = item["confidence_low"]
    more = "" if low is None else f", at least {low:.2f} in 9 of 10"
    return [
        ("confidence", f"{item['confidence']:.2f}" + (more if item["confidence_calibrated"] else ", not calibrated"))
    ]


def reasons_to_review(
    mask: Mapping[str, float],
    image: Mapping[str, float],
    facts: Mapping[str, Any] | None = None,
    confidence: float | None = None,
    score: str = "dice",
) -> list[str]:
    """Say why a person should look at a mask; nothing if there is no reason.

    Args:
        mask: as from :func:`mask_features`.
        image: as from :func:`image_features`.
        facts: ``confidence`` of the facts of the weights; without them only the mask itself is judged.
        confidence: as from :func:`confidence_of`.
        score: one of `SCORES`. Cells fill the image, so with ``accuracy`` parts and borders of a mask are not judged.
    """
    found: list[str] = []
    empty = not mask["size_percent"]
    ranges = facts["masks"] if facts else {"border": [0.0, 0.0]}
    if empty and score == "dice":
        found.append("nothing found")
    if facts and confidence is not None and confidence < facts["low"]:
        found.append(f"low confidence: {confidence:.2f}, below {facts['low']:.2f}")
    if not empty and score == "dice" and mask["border"] > ranges["border"][1]:
        found.append("touches the border of the image")
    if not facts:
        return found
    if score == "dice" and mask["parts"] > ranges["parts"][1]:
        found.append(f"{mask['parts']:.0f} parts, usually at most {ranges['parts'][1]:.0f}")
    # a volume in ml does not depend on the field of view
    size = "size_ml" if "size_ml" in mask and "size_ml" in ranges else "size_percent"
    if not empty and size in ranges and not _within(mask[size], ranges[size]):
        low, high = ranges[size]
        unit = "ml" if size == "size_ml" else "% of the image"
        found.append(f"unusual size: {mask[size]:.3g} {unit}, not {low:.3g} to {high:.3g} as in the training data")
    strange = [name for name, value in image.items() if not _within(value, facts["images"].get(name))]
    if strange:
        words = dict.fromkeys(_WORDS[name.partition("_")[0]] for name in strange)
        found.append(f"input unlike the training data: {', '.join(words)}")
    return found


def _within(value: float, limits: Sequence[float] | None) -> bool:
    return limits is None or limits[0] <= value <= limits[1]
