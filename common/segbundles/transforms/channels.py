"""Images with fewer channels than the network needs."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandomizableTransform

from segbundles.errors import fail
from segbundles.meta import add_note, file_name

__all__ = ["FillChannelsd", "RandFillChannelsd"]

logger = logging.getLogger("segbundles")


class FillChannelsd(MapTransform):
    """Repeat the channel of a single-channel image until it has the required number.

    This is logged as a warning that names the file, and added to the image's notes.

    Args:
        keys: images, (C, spatial).
        channels: required number of channels.
        name: what a single channel is assumed to be.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when an image has neither one channel nor the required number.
    """

    def __init__(
        self, keys: KeysCollection, channels: int = 3, name: str = "FLAIR", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.channels = channels
        self.name = name

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with the required number of channels."""
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
                repair += " (if the fourth is transparency, save it as RGB)"
            fail(f"{file_name(image)} has {seen} channels but must have {self.channels}: {repair}.")
        note = f"one channel: taken as {self.name} and used for all {self.channels}"
        logger.warning(f"{file_name(image)} has {note}.")
        filled = image.repeat_interleave(self.channels, 0)
        if isinstance(filled, MetaTensor):
            add_note(filled, note)
        return filled


class RandFillChannelsd(RandomizableTransform, MapTransform):
    """Randomly replace channels by another channel, as if they had not been acquired.

    Each channel except the source is replaced independently. A network trained this way can handle images whose missing
    channels were filled in the same way, by :class:`FillChannelsd` or by their publisher.

    Args:
        keys: images, (C, spatial), normalised per channel; all keys get the same replacements.
        prob: probability that a channel is replaced.
        channel: index of the channel that replaces others.
        channels: number of sequences; an image with more channels has them once for each neighbouring slice, see
            :class:`segbundles.transforms.NeighbourSlicesd`, and all slices miss the same ones. None is as many as the
            image has channels.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when ``prob`` is not in 0 .. 1, or an image has no such channel.
    """

    def __init__(
        self,
        keys: KeysCollection,
        prob: float = 0.1,
        channel: int = 0,
        channels: int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        if not 0 <= prob <= 1:
            fail(f"prob must be in 0 .. 1, got {prob}.")
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, 1.0)
        self.share = prob
        self.channel = channel
        self.channels = channels

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with some channels replaced."""
        d = dict(data)
        draws: np.ndarray | None = None
        for key in self.key_iterator(d):
            image = d[key]
            if not 0 <= self.channel < image.shape[0]:
                fail(f"{file_name(image)} has {image.shape[0]} channel(s), so there is no channel {self.channel}.")
            number = self.channels or image.shape[0]
            draws = self.R.random(number) if draws is None else draws
            replaced = torch.as_tensor(draws < self.share)
            if replaced.any():
                image = image.clone()
                for first in range(0, image.shape[0], number):
                    image[first : first + number][replaced] = image[first + self.channel].clone()
            d[key] = image
        return d
