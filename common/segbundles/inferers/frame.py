"""Frames through a network: one normalisation and one height in training, evaluation and inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch.nn import functional as F

from segbundles.errors import fail
from segbundles.transforms.frames import frame_size

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "FrameInferer"]

#: of RGB in 0 .. 1, by which torchvision's ImageNet weights were trained
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class FrameInferer(Inferer):
    """Put frames of 0 .. 255 through another inferer, normalised and at one height, and give logits on their own grid.

    A batch is brought to the height by linear interpolation (with low-pass filter where it shrinks), its aspect kept;
    the logits are brought back in the same way. So a polyp has about the size, in pixels, that the network was trained
    at, whatever the endoscope.

    Args:
        inferer: the inferer to run.
        height: pixels; None computes frames at their own height.
        max_pixels: the most pixels of a frame that the network sees; larger ones are scaled down. None sets no limit.
        mean: of each channel in 0 .. 1, taken off.
        std: of each channel in 0 .. 1, divided by.

    Raises:
        ValueError: when ``height`` or ``max_pixels`` is not positive.
    """

    def __init__(
        self,
        inferer: Inferer,
        height: int | None = None,
        max_pixels: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        for name, value in (("height", height), ("max_pixels", max_pixels)):
            if value is not None and value < 1:
                fail(f"{name} must be 1 or more pixels, or None, got {value}.")
        self.inferer = inferer
        self.height = height
        self.max_pixels = max_pixels
        self.mean, self.std = (255 * torch.tensor(values).reshape(1, -1, 1, 1) for values in (mean, std))

    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the inferer.

        Args:
            inputs: frames (batch, channel, W, H), 0 .. 255, of any type.
            network: the network.
            args: further arguments of the inferer.
            kwargs: further keyword arguments of the inferer.

        Returns:
            Logits of the frames' size, with the metadata of ``inputs``.
        """
        frames = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        frames = (frames.float() - self.mean.to(frames.device)) / self.std.to(frames.device)
        size = tuple(frames.shape[2:])
        computed = frame_size(size, self.height, self.max_pixels)
        if computed != size:
            frames = F.interpolate(frames, computed, mode="bilinear", antialias=True)
        logits = self.inferer(frames, network, *args, **kwargs)
        if computed != size:
            logits = F.interpolate(logits, size, mode="bilinear", antialias=True)
        return MetaTensor(logits).copy_meta_from(inputs) if isinstance(inputs, MetaTensor) else logits
