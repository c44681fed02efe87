"""The number of channels a network was made for, from images that have one."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from segbundles.errors import fail
from segbundles.transforms.check import file_name

__all__ = ["FillChannelsd"]

logger = logging.getLogger("segbundles")


class FillChannelsd(MapTransform):
    """Give images of one channel the number due, by repeating it.

    What was done is logged as a warning that names the file, and added to ``meta["notes"]``.

    Args:
        keys: images, (C, spatial).
        channels: number of channels due.
        name: what a lone channel is taken for.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when an image has neither one channel nor the number due.
    """

    def __init__(
        self, keys: KeysCollection, channels: int = 3, name: str = "FLAIR", allow_missing_keys: bool = False
    ) -> None:
        """See the class."""
        super().__init__(keys, allow_missing_keys)
        self.channels = channels
        self.name = name

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with as many channels as are due."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self._fill(d[key])
        return d

    def _fill(self, image: torch.Tensor) -> torch.Tensor:
        seen = image.shape[0]
        if seen == self.channels:
            return image
        if seen != 1:
            repair = f"give {self.channels} channels, or one"
            if seen == 4 and self.channels == 3:
                repair = "if it is RGBA, drop the alpha channel: save it as RGB"
            fail(f"{file_name(image)} has {seen} channels, {self.channels} are due: {repair}.")
        note = f"one channel: taken as {self.name} and used for all {self.channels}"
        logger.warning(f"{file_name(image)} has {note}.")
        filled = image.repeat_interleave(self.channels, 0)
        if isinstance(filled, MetaTensor):
            filled.meta["notes"] = "; ".join(filter(None, [filled.meta.get("notes"), note]))
        return filled
