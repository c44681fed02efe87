"""Normalise and resize frames for a network, in the same way in training, evaluation and inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer

from segbundles.errors import fail
from segbundles.meta import set_notes, without_meta
from segbundles.transforms.frames import frame_box, frame_size

from .scale import run_at_size

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "FrameInferer"]

#: of RGB in 0 .. 1, as torchvision's ImageNet weights were trained
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_NEVER = -100.0  # logit of an impossible class, beside 0


class FrameInferer(Inferer):
    """Run another inferer on normalised frames of one height, and return logits on the grid of the frames.

    Frames are scaled to the height by linear interpolation (with a low-pass filter if they shrink), without changing
    their aspect ratio; the logits are scaled back in the same way. A polyp then has about the size in pixels that the
    network was trained with, whatever the endoscope. Black borders (:func:`segbundles.transforms.frames.frame_box`) can
    be left out: the network then sees frames without borders, those with equal borders in one batch, and the borders
    are class 0.

    A note on the output says which frames were made smaller because of ``max_pixels``.

    Args:
        inferer: the inferer to run.
        height: height of the network's input in pixels; None keeps the height of each frame.
        max_pixels: the most pixels of the network's input; larger frames are scaled down. None sets no limit.
        crop_borders: whether to leave out black borders.
        mean: mean of each channel, in 0 .. 1, which is subtracted.
        std: standard deviation of each channel, in 0 .. 1, which the result is divided by.

    Raises:
        ValueError: when ``height`` or ``max_pixels`` is not positive.
    """

    def __init__(
        self,
        inferer: Inferer,
        height: int | None = None,
        max_pixels: int | None = None,
        crop_borders: bool = False,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        for name, value in (("height", height), ("max_pixels", max_pixels)):
            if value is not None and value < 1:
                fail(f"{name} must be 1 or more pixels, or None, got {value}.")
        self.inferer = inferer
        self.height = height
        self.max_pixels = max_pixels
        self.crop_borders = crop_borders
        self.mean, self.std = (255 * torch.tensor(values).reshape(1, -1, 1, 1) for values in (mean, std))

    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the inferer.

        Args:
            inputs: frames (B, C, W, H), 0 .. 255, of any type.
            network: the network.
            args: further arguments of the inferer.
            kwargs: further keyword arguments of the inferer.

        Returns:
            Logits (B, classes, W, H), with the metadata of ``inputs``.
        """
        frames = without_meta(inputs)
        whole = (0, frames.shape[2], 0, frames.shape[3])
        boxes = [frame_box(frame) if self.crop_borders else whole for frame in frames]
        frames = (frames.float() - self.mean.to(frames.device)) / self.std.to(frames.device)
        if set(boxes) == {whole}:
            logits = self._run(frames, network, *args, **kwargs)
        else:
            logits = self._run_boxes(frames, boxes, network, *args, **kwargs)
        if not isinstance(inputs, MetaTensor):
            return logits
        logits = MetaTensor(logits).copy_meta_from(inputs)
        if any(notes := [self._note(box) for box in boxes]):
            set_notes(logits, notes)
        return logits

    def _run(self, frames: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        size = tuple(frames.shape[2:])
        computed = frame_size(size, self.height, self.max_pixels)
        return run_at_size(self.inferer, computed, frames, network, *args, **kwargs)

    def _run_boxes(
        self, frames: torch.Tensor, boxes: Sequence[tuple[int, ...]], network: Callable, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        logits = None
        for box in dict.fromkeys(boxes):
            members = [k for k, other in enumerate(boxes) if other == box]
            columns, rows = slice(*box[:2]), slice(*box[2:])
            part = self._run(frames[members][:, :, columns, rows], network, *args, **kwargs)
            if logits is None:
                logits = part.new_full((len(frames), part.shape[1], *frames.shape[2:]), _NEVER)
                logits[:, 0] = 0
            logits[members, :, columns, rows] = part
        return logits

    def _note(self, box: tuple[int, ...]) -> str:
        size = (box[1] - box[0], box[3] - box[2])
        computed = frame_size(size, self.height, self.max_pixels)
        if computed == frame_size(size, self.height):
            return ""
        return f"computed at {computed[0]} x {computed[1]} pixels, as max_pixels is {self.max_pixels}"
