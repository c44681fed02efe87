"""The channels a network was made for, from images that lack some, or may."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandomizableTransform

from segbundles.errors import fail
from segbundles.transforms.check import file_name

__all__ = ["FillChannelsd", "RandFillChannelsd"]

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


class RandFillChannelsd(RandomizableTransform, MapTransform):
    """Replace channels by one of the others, as if they had not been acquired.

    Every channel but the source is replaced on its own. Networks trained so do with images in which
    :class:`FillChannelsd`, or whoever published them, filled channels in the same way.

    Args:
        keys: images, (C, spatial), normalised channel by channel, all drawn alike.
        prob: probability of each channel to be replaced.
        channel: index of the channel that replaces others.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when ``prob`` is not in 0 .. 1, or an image has no such channel.
    """

    def __init__(
        self, keys: KeysCollection, prob: float = 0.1, channel: int = 0, allow_missing_keys: bool = False
    ) -> None:
        """See the class."""
        if not 0 <= prob <= 1:
            fail(f"prob must be in 0 .. 1, got {prob}.")
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, 1.0)
        self.share = prob
        self.channel = channel

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data, some channels replaced."""
        d = dict(data)
        draws: np.ndarray | None = None
        for key in self.key_iterator(d):
            image = d[key]
            if not 0 <= self.channel < image.shape[0]:
                fail(f"{file_name(image)} has {image.shape[0]} channels, none of index {self.channel}.")
            draws = self.R.random(image.shape[0]) if draws is None else draws
            replaced = torch.as_tensor(draws < self.share)
            if replaced.any():
                image = image.clone()
                image[replaced] = image[self.channel].clone()
            d[key] = image
        return d
