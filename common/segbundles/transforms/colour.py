"""Giving a frame the colours of another frame, so that a network does not learn a sequence by its colours."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandomizableTransform
from skimage.color import lab2rgb, rgb2lab

__all__ = ["RandColourExchanged"]

_SMALLEST_SD = 1e-3  # of a frame of one colour


class RandColourExchanged(MapTransform, RandomizableTransform):
    """Give a frame the mean and the standard deviation of another frame's colours, in the colour space CIELAB.

    The statistics are transferred as in Reinhard et al. 2001, "Color Transfer between Images"; exchanging them between
    training frames is the augmentation of Wei et al. 2021, "Shallow Attention Network for Polyp Segmentation" (SANet).

    Args:
        keys: frames, (3, W, H), red, green and blue, 0 to 255; they become float32.
        cases: the frames whose colours are used, as a dataset has them.
        load: transform that reads a case, its borders cut; called once for each, when its colours are first used.
        prob: probability for a frame.
        allow_missing_keys: as in MONAI.
    """

    def __init__(
        self,
        keys: KeysCollection,
        cases: Sequence[Mapping[str, Any]],
        load: Callable[[Mapping[str, Any]], Mapping[Hashable, torch.Tensor]],
        prob: float = 0.5,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.cases = cases
        self.load = load
        self._colours: dict[tuple[Hashable, int], tuple[np.ndarray, np.ndarray]] = {}
        self._case = 0

    def randomize(self, data: Any = None) -> None:
        """Draw whether the colours are exchanged, and with which case."""
        super().randomize(None)
        self._case = int(self.R.randint(len(self.cases)))

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with the frame in the other frame's colours."""
        d = dict(data)
        self.randomize()
        if not self._do_transform:
            return d
        for key in self.key_iterator(d):
            frame = _lab(d[key])
            mean, sd = _statistics(frame)
            other_mean, other_sd = self._other(key)
            exchanged = (frame - mean) / np.maximum(sd, _SMALLEST_SD) * other_sd + other_mean
            with warnings.catch_warnings():  # of colours that no screen shows; they are clipped
                warnings.simplefilter("ignore", UserWarning)
                rgb = lab2rgb(exchanged) * 255
            colours = torch.from_numpy(np.moveaxis(rgb, -1, 0).astype(np.float32))
            d[key] = MetaTensor(colours).copy_meta_from(d[key]) if isinstance(d[key], MetaTensor) else colours
        return d

    def _other(self, key: Hashable) -> tuple[np.ndarray, np.ndarray]:
        if (key, self._case) not in self._colours:
            self._colours[key, self._case] = _statistics(_lab(self.load(self.cases[self._case])[key]))
        return self._colours[key, self._case]


def _lab(frame: torch.Tensor) -> np.ndarray:
    return rgb2lab(np.moveaxis(np.asarray(frame, dtype=np.float32), 0, -1) / 255)


def _statistics(lab: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return lab.mean((0, 1)), lab.std((0, 1))
