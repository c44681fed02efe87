"""The inputs of an ensemble whose members differ in their preprocessing."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

__all__ = ["KeepOriginald", "MemberInputsd"]

_ORIGINAL = "original_{}"


class KeepOriginald(MapTransform):
    """Keep a copy of an image before the steps in which the members of an ensemble differ.

    :class:`MemberInputsd` uses it. The steps between the two must not change the grid.

    Args:
        keys: images, (C, spatial).
        members: the other members; without them nothing is kept.
        allow_missing_keys: as in MONAI.
    """

    def __init__(self, keys: KeysCollection, members: Sequence[Any] = (), allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.needed = bool(members)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with a copy."""
        d = dict(data)
        for key in self.key_iterator(d) if self.needed else ():
            d[_ORIGINAL.format(key)] = deepcopy(d[key])
        return d


class MemberInputsd(MapTransform):
    """Append the inputs of the other members of an ensemble to an image, as further channels.

    Each member's own steps make its input of what :class:`KeepOriginald` has kept.
    :class:`segbundles.inferers.EnsembleInferer` takes the channels apart again.

    Args:
        keys: images, (C, spatial).
        members: the other members, see :class:`segbundles.inferers.Member`; without them nothing changes.
        allow_missing_keys: as in MONAI.
    """

    def __init__(self, keys: KeysCollection, members: Sequence[Any] = (), allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.steps = [member.preprocessing for member in members]

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with the inputs of all members."""
        d = dict(data)
        for key in self.key_iterator(d) if self.steps else ():
            original = d.pop(_ORIGINAL.format(key))
            d[key] = torch.cat([d[key], *(steps({key: deepcopy(original)})[key] for steps in self.steps)])
        return d
