"""Run a network on images that are scaled to the pixel size that it was trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch.nn import functional as F

from segbundles.errors import fail
from segbundles.meta import without_meta

__all__ = ["ScaleInferer", "run_at_size"]


class ScaleInferer(Inferer):
    """Run another inferer on scaled 2D images or stacks, section by section, and return its output on their grid.

    Both ways the interpolation is linear, with a low-pass filter where the image shrinks. Outputs may be logits or
    probabilities.

    Args:
        inferer: the inferer to run.
        factor: how much larger than the image the inferer's input is in each direction: pixels of 8 nm and a network
            that was trained with 4 nm need 2. None or 1 changes nothing.

    Raises:
        ValueError: when ``factor`` is not positive.
    """

    def __init__(self, inferer: Inferer, factor: float | None = None) -> None:
        if factor is not None and not 0 < factor < float("inf"):
            fail(f"factor must be positive, or None, got {factor}.")
        self.inferer = inferer
        self.factor = 1.0 if factor is None else float(factor)

    @torch.no_grad()
    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the inferer.

        Args:
            inputs: images (B, C, W, H), or stacks (B, C, W, H, D).
            network: the network.
            args: further arguments of the inferer.
            kwargs: further keyword arguments of the inferer.

        Returns:
            Output of the inferer, (B, channels, W, H) or (B, channels, W, H, D), with the metadata of ``inputs``.

        Raises:
            ValueError: when the input has other axes.
        """
        if inputs.ndim not in (4, 5):
            fail(f"(B, C, W, H) or (B, C, W, H, sections) is expected, got shape {tuple(inputs.shape)}.")
        size = tuple(max(1, round(n * self.factor)) for n in inputs.shape[2:4])
        if size == tuple(inputs.shape[2:4]):
            return self.inferer(inputs, network, *args, **kwargs)
        data = without_meta(inputs)
        sections = data.unbind(-1) if data.ndim == 5 else [data]
        found = [run_at_size(self.inferer, size, section, network, *args, **kwargs) for section in sections]
        output = torch.stack(found, dim=-1) if data.ndim == 5 else found[0]
        return MetaTensor(output).copy_meta_from(inputs) if isinstance(inputs, MetaTensor) else output


def run_at_size(
    inferer: Inferer, size: Sequence[int], images: torch.Tensor, network: Callable, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Run an inferer on images scaled to a size, and scale its output back.

    Args:
        inferer: the inferer to run.
        size: width and height of its input.
        images: (B, C, W, H).
        network: the network.
        args: further arguments of the inferer.
        kwargs: further keyword arguments of the inferer.

    Returns:
        Output of the inferer, (B, channels, W, H); rounding never takes it out of the range that it had.
    """
    before = tuple(images.shape[2:])
    if tuple(size) == before:
        return inferer(images, network, *args, **kwargs)
    scaled = F.interpolate(images, tuple(size), mode="bilinear", antialias=True)
    output = inferer(scaled, network, *args, **kwargs)
    low, high = output.aminmax()
    return F.interpolate(output, before, mode="bilinear", antialias=True).clamp(low, high)
