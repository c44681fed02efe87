"""Converting a network's output to a class map."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from segbundles.errors import fail

__all__ = ["LogitsToClassd"]


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
