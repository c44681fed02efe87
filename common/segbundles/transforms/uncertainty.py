"""Where a prediction is in doubt."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from functools import cache

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import ensure_tuple_rep
from scipy.optimize import brentq
from scipy.special import entr

from segbundles.errors import fail
from segbundles.meta import without_meta

__all__ = ["Uncertaintyd", "uncertainty", "uncertainty_levels"]

#: uncertainty from which a pixel belongs to the first and second level of the preview; of two classes, the less
#: probable one has 0.11 and 0.32 there
LEVELS = (0.5, 0.9)
_SURE = 1 - 1e-6


def uncertainty(probabilities: torch.Tensor) -> torch.Tensor:
    """Return the entropy of probabilities, divided by its largest possible value.

    It is 1 where all classes are equally probable and 0 where one is certain (a probability above 0.999999).

    Args:
        probabilities: of each class, (classes, spatial), which add up to 1.

    Returns:
        0 to 1, (1, spatial), float32.

    Raises:
        ValueError: when there is a single class.
    """
    if len(probabilities) < 2:
        fail("the uncertainty of one class is not defined: give the probability of every class.")
    plain = without_meta(probabilities)
    result = plain.new_zeros(plain.shape[1:], dtype=torch.float32)
    doubtful = plain.amax(0) < _SURE  # usually a small part
    entropy = torch.special.entr(plain[:, doubtful].float()).sum(0) / math.log(len(plain))
    result[doubtful] = entropy.clamp(0, 1)
    return result[None]


def uncertainty_levels(probabilities: torch.Tensor) -> torch.Tensor:
    """Return the levels of uncertainty that a preview shows.

    Args:
        probabilities: see :func:`uncertainty`.

    Returns:
        2 above 0.9, 1 above 0.5, otherwise 0; (spatial), uint8.
    """
    if len(probabilities) > 2:
        found = uncertainty(probabilities)[0]
        return sum((found > level).to(torch.uint8) for level in LEVELS)
    plain = without_meta(probabilities)
    one = plain[1]  # of two classes, comparisons are many times faster than entropies
    least = map(_less_probable, LEVELS)
    return sum(((one > p) & (one < 1 - p)).to(torch.uint8) for p in least)


@cache
def _less_probable(level: float) -> float:
    """Return the probability of the less probable one of two classes at a level of uncertainty."""
    return brentq(lambda p: (entr(p) + entr(1 - p)) / math.log(2) - level, 0, 0.5)


class Uncertaintyd(MapTransform):
    """Keep the uncertainty of probabilities, see :func:`uncertainty`, under another key.

    Args:
        keys: probabilities, (classes, spatial), see :class:`segbundles.transforms.ToProbabilitiesd`.
        uncertainty_keys: keys of the uncertainty, (1, spatial), float32.
        allow_missing_keys: as in MONAI.
    """

    def __init__(
        self,
        keys: KeysCollection = "prob",
        uncertainty_keys: KeysCollection = "uncertainty",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.uncertainty_keys = ensure_tuple_rep(uncertainty_keys, len(self.keys))

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with the uncertainty."""
        d = dict(data)
        for key, name in self.key_iterator(d, self.uncertainty_keys):
            found = uncertainty(d[key])
            d[name] = MetaTensor(found).copy_meta_from(d[key]) if isinstance(d[key], MetaTensor) else found
        return d
