"""Probabilities of sections of any size, computed tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, sliding_window_inference
from monai.utils import ensure_tuple_rep

from segbundles.errors import fail
from segbundles.meta import without_meta

from .mirror import subsets

__all__ = ["TileInferer"]


class TileInferer(Inferer):
    """Average class probabilities over overlapping tiles, and over mirrored and turned images.

    MONAI's sliding window averages logits, where a confident tile dominates, and mirrors only images that are larger
    than the border it adds; here a 2D image may have any size. MONAI's ``TestTimeAugmentation`` draws its transforms at
    random; the eight ways to mirror and turn a square are few enough to use all of them.

    Args:
        roi_size: size (W, H) of a tile in pixels.
        sw_batch_size: number of tiles that the network gets at once.
        overlap: fraction of a tile that the next tile covers too.
        mode: how to blend the tiles, ``"gaussian"`` or ``"constant"``.
        border: pixels to mirror outside each border of the image, so that no pixel is at the edge of all its tiles.
        context: pixels around a tile that the network needs as input but has no output for, as a network without
            padding does. They come from the image, mirrored outside its borders.
        mirror_axes: axes of the image to mirror, singly and together: one axis takes 2 times the work, both 4 times.
        quarter_turns: whether to also turn each of these images by 90 degrees, which takes 2 times the work.

    Raises:
        ValueError: when a setting is out of its range.

    Example:
        >>> import torch
        >>> inferer = TileInferer(roi_size=(32, 32), border=8)
        >>> inferer(torch.rand(1, 1, 50, 20), torch.nn.Conv2d(1, 2, 1)).shape
        torch.Size([1, 2, 50, 20])
    """

    def __init__(
        self,
        roi_size: Sequence[int] | int,
        sw_batch_size: int = 4,
        overlap: float = 0.5,
        mode: str = "gaussian",
        border: int = 0,
        context: int = 0,
        mirror_axes: Sequence[int] = (),
        quarter_turns: bool = False,
    ) -> None:
        self.roi_size = ensure_tuple_rep(roi_size, 2)
        if min(self.roi_size) < 1 or sw_batch_size < 1:
            fail(f"roi_size and sw_batch_size must be positive, got {self.roi_size} and {sw_batch_size}.")
        if not 0 <= overlap < 1:
            fail(f"overlap must be a fraction of a tile, 0 or more and below 1, got {overlap}.")
        if border < 0 or context < 0:
            fail(f"border and context must be 0 or more (pixels), got {border} and {context}.")
        if not {0, 1}.issuperset(mirror_axes):
            fail(f"mirror_axes must be axes of a 2D image, 0 and 1, got {list(mirror_axes)}.")
        self.sw_batch_size = sw_batch_size
        self.overlap = overlap
        self.mode = mode
        self.border = border
        self.context = context
        # even numbers of axes first: turns of the image, then turns of its mirror image
        flips = sorted(subsets(axis + 2 for axis in mirror_axes), key=lambda dims: len(dims) % 2)
        self._views = list(product(flips, (0, 1) if quarter_turns else (0,)))

    @torch.no_grad()
    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Segment a batch of images, or a batch of stacks, section by section.

        Args:
            inputs: (B, C, W, H), or (B, C, W, H, D) with D sections.
            network: returns logits (B, classes, W, H), smaller than its input by ``context`` on each side; a single
                channel is the foreground.
            args: further arguments of ``network``.
            kwargs: further keyword arguments of ``network``.

        Returns:
            Probabilities (B, classes, W, H) or (B, classes, W, H, D), float32, with the metadata of the input.

        Raises:
            ValueError: when the input has other axes, or the network's output has another size.
        """
        data = without_meta(inputs)
        if data.ndim not in (4, 5):
            fail(f"(B, C, W, H) or (B, C, W, H, sections) is expected, got shape {tuple(data.shape)}.")
        predictor = partial(_probabilities, network=network, args=args, kwargs=kwargs)
        if data.ndim == 4:
            output = self._section(data, predictor)
        else:
            output = torch.stack([self._section(section, predictor) for section in data.unbind(-1)], dim=-1)
        return MetaTensor(output).copy_meta_from(inputs) if isinstance(inputs, MetaTensor) else output

    def _section(self, x: torch.Tensor, predictor: Callable) -> torch.Tensor:
        total: Any = 0
        for dims, turns in self._views:
            view = torch.rot90(x.flip(dims), turns, (2, 3))
            total = total + torch.rot90(self._tiled(view, predictor), -turns, (2, 3)).flip(dims)
        return total / len(self._views)

    def _tiled(self, x: torch.Tensor, predictor: Callable) -> torch.Tensor:
        size, around = x.shape[2:], self.context
        for axis, (n, tile) in enumerate(zip(size, self.roi_size, strict=True), 2):
            after = max(self.border, tile - n - self.border)
            x = _mirrored(x, axis, self.border + around, after + around)
        inner = x[:, :, around : x.shape[2] - around, around : x.shape[3] - around]

        def with_context(_: torch.Tensor, places: Sequence[Sequence[slice]]) -> torch.Tensor:
            wide = [(*place[:2], *(slice(p.start, p.stop + 2 * around) for p in place[2:])) for place in places]
            found = predictor(torch.cat([x[place] for place in wide]))
            if found.shape[2:] != self.roi_size:
                lost = self.roi_size[0] + 2 * around - found.shape[2]
                fail(
                    f"the network returns {found.shape[2]} x {found.shape[3]} pixels for tiles of {self.roi_size[0]} x "
                    f"{self.roi_size[1]} with {around} of context: set context to {lost // 2}."
                )
            return found

        found = sliding_window_inference(
            inner, self.roi_size, self.sw_batch_size, with_context, self.overlap, self.mode, with_coord=True
        )
        return found[:, :, self.border : self.border + size[0], self.border : self.border + size[1]]


def _mirrored(x: torch.Tensor, axis: int, before: int, after: int) -> torch.Tensor:
    if not before and not after:
        return x
    index = np.pad(np.arange(x.shape[axis]), (before, after), mode="symmetric")
    return x.index_select(axis, torch.as_tensor(index, device=x.device))


def _probabilities(x: torch.Tensor, network: Callable, args: tuple, kwargs: dict) -> torch.Tensor:
    logits = network(x, *args, **kwargs).float()
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)
