"""Mean prediction over mirror images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, combinations
from typing import Any

import torch
from monai.inferers import Inferer

from segbundles.errors import fail

__all__ = ["MirrorInferer", "predict_mirrored"]


class MirrorInferer(Inferer):
    """Run another inferer with a network that sees mirror images too, and gives the mean of its logits.

    Args:
        inferer: the inferer to run; its network gives one tensor of the spatial size of its input.
        mirror_axes: spatial axes of the network's input to mirror, singly and together: n axes cost 2 ** n times the
            work. Of a ``SliceInferer`` they are those of the slice. None mirrors nothing.

    Example:
        >>> import torch
        >>> from monai.inferers import SimpleInferer
        >>> inferer = MirrorInferer(SimpleInferer(), mirror_axes=[0, 1])
        >>> inferer(torch.rand(1, 1, 8, 8), torch.nn.Conv2d(1, 2, 1)).shape
        torch.Size([1, 2, 8, 8])
    """

    def __init__(self, inferer: Inferer, mirror_axes: Sequence[int] | None = None) -> None:
        self.inferer = inferer
        self.mirror_axes = tuple(mirror_axes or ())

    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> Any:
        """Run the inferer.

        Args:
            inputs: input of the inferer.
            network: the network.
            args: further arguments of the inferer.
            kwargs: further keyword arguments of the inferer.

        Returns:
            What the inferer returns.

        Raises:
            ValueError: when an axis of ``mirror_axes`` is none of the network's input, or the network changes the size.
        """
        mirrored = partial(predict_mirrored, network=network, mirror_axes=self.mirror_axes)
        return self.inferer(inputs, mirrored if self.mirror_axes else network, *args, **kwargs)


def predict_mirrored(
    x: torch.Tensor, *args: Any, network: Callable, mirror_axes: Sequence[int], **kwargs: Any
) -> torch.Tensor:
    """Return the mean of a network's logits, float32, over a batch and its mirror images.

    Args:
        x: batch (B, C, spatial).
        args: further arguments of ``network``.
        network: gives one tensor of the spatial size of its input.
        mirror_axes: spatial axes, from 0, to mirror singly and together.
        kwargs: further keyword arguments of ``network``.

    Raises:
        ValueError: when an axis is none of the input, or the network returns anything else.
    """
    spatial_dims = x.ndim - 2
    if any(not 0 <= axis < spatial_dims for axis in mirror_axes):
        fail(
            f"mirror_axes must be spatial axes from 0 to {spatial_dims - 1} for a {spatial_dims}D image, "
            f"got {tuple(mirror_axes)}."
        )
    subsets = list(chain.from_iterable(combinations(mirror_axes, n) for n in range(len(mirror_axes) + 1)))
    total: Any = None
    for axes in subsets:
        dims = [axis + 2 for axis in axes]
        logits = network(x.flip(dims) if dims else x, *args, **kwargs)
        if not isinstance(logits, torch.Tensor) or logits.shape[2:] != x.shape[2:]:
            found = f"shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
            fail(f"network must return one tensor of its input's spatial size {tuple(x.shape[2:])}, got {found}.")
        logits = logits.float().flip(dims) if dims else logits.float()
        total = logits if total is None else total + logits
    return total / len(subsets) if len(subsets) > 1 else total
