"""Converting a network's output to a class map, and to probabilities."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import ensure_tuple_rep

from segbundles.errors import fail

__all__ = ["LogitsToClassd", "ToProbabilitiesd"]


class LogitsToClassd(MapTransform):
    """Convert logits (C, spatial) to class indices (1, spatial), uint8.

    One channel gives class 1 where the probability exceeds ``threshold``, several give the class of the largest logit.

    Args:
        keys: outputs of a network.
        threshold: probability, only used with one channel.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when ``threshold`` is not between 0 and 1.
    """

    def __init__(self, keys: KeysCollection, threshold: float = 0.5, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if not 0 < threshold < 1:
            fail(f"threshold must be between 0 and 1 (a probability), got {threshold}.")
        self.logit = torch.logit(torch.tensor(float(threshold))).item()

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with class maps."""
        d = dict(data)
        for key in self.key_iterator(d):
            logits = d[key]
            classes = logits > self.logit if logits.shape[0] == 1 else logits.argmax(0, keepdim=True)
            d[key] = classes.to(torch.uint8)
        return d


class ToProbabilitiesd(MapTransform):
    """Keep the probability of every class, (classes, spatial), float32, under another key.

    The probabilities of a pixel add up to 1. The most probable class, the first one in a tie, is that of
    :class:`LogitsToClassd` with a threshold of 0.5, also where logits differ by less than float32 probabilities can.

    Args:
        keys: outputs of a network: logits, of which a single channel is class 1, or probabilities of all classes. They
            stay unchanged.
        prob_keys: keys of the probabilities.
        logits: whether the outputs are logits.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when probabilities have a single channel.
    """

    def __init__(
        self,
        keys: KeysCollection,
        prob_keys: KeysCollection = "prob",
        logits: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.prob_keys = ensure_tuple_rep(prob_keys, len(self.keys))
        self.logits = logits

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with probabilities."""
        d = dict(data)
        for key, prob_key in self.key_iterator(d, self.prob_keys):
            output = d[key].float()
            if not self.logits:
                if output.shape[0] == 1:
                    fail(f"{key} has one channel, but probabilities must have one per class: set logits to true.")
                d[prob_key] = output / output.sum(0, keepdim=True)
                continue
            if output.shape[0] == 1:
                output = torch.cat([torch.zeros_like(output), output])
            d[prob_key] = _softmax(output)
        return d


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    """Return probabilities whose largest one is where the largest logit is."""
    if len(logits) == 2:  # as below, but many times faster
        difference = logits[1] - logits[0]
        probabilities = torch.stack([-difference, difference]).sigmoid_()
        first, second = probabilities
        if (hidden := (difference > 0) & (second <= first)).any():
            second[hidden] = torch.nextafter(first[hidden], first.new_ones(()))
        return probabilities
    classes, probabilities = logits.argmax(0, keepdim=True), logits.softmax(0)
    hidden = probabilities.argmax(0, keepdim=True) != classes
    if hidden.any():
        largest = probabilities.amax(0, keepdim=True)
        above = torch.nextafter(largest, torch.ones_like(largest))
        probabilities.scatter_(0, classes, torch.where(hidden, above, probabilities.gather(0, classes)))
    return probabilities
