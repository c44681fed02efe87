"""The confidence of a mask, and why a person should look at it."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from segbundles.confidence import (
    SCORES,
    UNCALIBRATED,
    calibrated,
    confidence_of,
    image_features,
    mask_features,
    pixel_counts,
    reasons_to_review,
    score_features,
)
from segbundles.errors import fail
from segbundles.meta import has_spacing, notes_of, spacing_of

__all__ = ["Confidenced", "describe_image", "foreground", "spacing_mm"]

logger = logging.getLogger("segbundles")

# how notes begin that are reasons to look at the mask
REASONS = ("locator ", "voxel size ")
_UNCALIBRATED = {"intercept": 0.0, "coefficients": {"expected": 1.0}, "margin": None}


class Confidenced(MapTransform):
    """Add ``confidence``, ``confidence_low``, ``confidence_calibrated`` and ``review`` of a mask to the data.

    ``confidence`` is the score that the mask is expected to have, ``confidence_low`` the score that 9 of 10 such masks
    reach (None if it is not known), and ``review`` says in words why a person should look at the mask; it is empty if
    there is no reason. Without facts, ``confidence_calibrated`` is False: the probabilities are taken as they are, and
    only the mask itself is judged.

    Use it while the image, mask and probabilities are on the grid of an evaluation, that is before ``Invertd``.

    Args:
        keys: class map (1, spatial), 0 is background; or scores of two classes (2, spatial), of which the larger one
            counts; one key.
        prob_key: probabilities (classes, spatial), the background first.
        image_key: image that the network got (C, spatial).
        score: what is expected: ``dice`` of the foreground, or ``accuracy``, the share of pixels of the right class.
        facts: ``confidence`` of the facts of the weights; None if they have none.
        image_channels: number of the image's first channels to judge; None for all. The inputs of further members of an
            ensemble follow them.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when ``score`` is unknown, or the facts are those of another score.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        prob_key: Hashable = "prob",
        image_key: Hashable = "image",
        score: str = "dice",
        facts: Mapping[str, Any] | None = None,
        image_channels: int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if score not in SCORES:
            fail(f"score must be one of {', '.join(SCORES)}, got {score!r}.")
        if facts and facts["score"] != score:
            fail(f"score is {score}, but the confidence of the weights was calibrated for {facts['score']}.")
        if not facts:
            logger.info("The confidence of these weights is not calibrated, and probably too high: docs/confidence.md.")
        self.prob_key, self.image_key = prob_key, image_key
        self.score, self.facts, self.image_channels = score, facts or None, image_channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with confidence and review."""
        d = dict(data)
        for key in self.key_iterator(d):
            pred, probability = d[key], foreground(d[self.prob_key])
            mask = (pred[0] > 0 if len(pred) == 1 else pred.argmax(0) > 0).numpy(force=True)
            shape = mask_features(mask, spacing_mm(d[self.image_key]))
            p = calibrated(self.facts["temperature"], self.facts["shift"]) if self.facts else UNCALIBRATED
            counts = pixel_counts(probability, mask), pixel_counts(probability, ~mask)
            features = score_features(*counts, mask.size, shape["parts"], self.score, p)
            d["confidence"], d["confidence_low"] = confidence_of(features, self.facts or _UNCALIBRATED)
            d["confidence_calibrated"] = self.facts is not None
            image = describe_image(d[self.image_key][: self.image_channels])
            why = reasons_to_review(shape, image, self.facts, d["confidence"], self.score)
            notes = notes_of(pred, d[self.image_key]).split("; ")
            d["review"] = "; ".join([*why, *(note for note in notes if note.startswith(REASONS))])
        return d


def foreground(probabilities: torch.Tensor) -> Any:
    """Return the probability of any foreground class, (spatial), of probabilities (classes, spatial)."""
    chosen = probabilities[1] if len(probabilities) == 2 else (1 - probabilities[0]).clamp(0, 1)
    return chosen.numpy(force=True)


def describe_image(image: torch.Tensor) -> dict[str, float]:
    """Return :func:`segbundles.confidence.image_features` of an image (C, spatial)."""
    return image_features(image.numpy(force=True), spacing_mm(image))


def spacing_mm(image: torch.Tensor) -> tuple[float, ...] | None:
    """Return the spacing of a volume (C, spatial) along each axis; None if it is not known, and for 2D images."""
    known = image.ndim == 4 and hasattr(image, "affine") and has_spacing(image)
    return spacing_of(image) if known else None
