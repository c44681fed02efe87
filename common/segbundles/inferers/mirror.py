"""Mean prediction over mirror images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, combinations
from typing import Any

import torch
from monai.inferers import Inferer

from segbundles.errors import fail

__all__ = ["MirrorInferer", "logits_of", "subsets"]


class MirrorInferer(Inferer):
    """Run another inferer with a network that also sees mirror images, and returns the mean of its logits, float32.

    Args:
        inferer: the inferer to run; its network returns one tensor of the spatial size of its input.
        mirror_axes: spatial axes of the network's input to mirror, singly and together: n axes take 2 ** n times the
            work. For a ``SliceInferer`` they are the axes of the slice. None mirrors nothing.

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
            Output of the inferer.

        Raises:
            ValueError: when ``mirror_axes`` has an axis that the network's input does not have, or the network's output
                has another size than its input.
        """
        mirrored = partial(self._mean, network)
        return self.inferer(inputs, mirrored if self.mirror_axes else network, *args, **kwargs)

    def _mean(self, network: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        spatial_dims = x.ndim - 2
        if any(not 0 <= axis < spatial_dims for axis in self.mirror_axes):
            fail(
                f"mirror_axes must be spatial axes from 0 to {spatial_dims - 1} for a {spatial_dims}D image, "
                f"got {self.mirror_axes}."
            )
        total: Any = 0
        views = subsets(axis + 2 for axis in self.mirror_axes)
        for dims in views:
            total = total + logits_of(network, x.flip(dims), *args, **kwargs).flip(dims)
        return total / len(views)


def subsets(axes: Iterable[int]) -> list[tuple[int, ...]]:
    """Return all subsets of some axes, the smaller ones first."""
    axes = tuple(axes)
    return list(chain.from_iterable(combinations(axes, n) for n in range(len(axes) + 1)))


def logits_of(network: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return the logits of a network in float32.

    Args:
        network: the network.
        x: its input, (B, C, spatial).
        args: further arguments of the network.
        kwargs: further keyword arguments of the network.

    Raises:
        ValueError: when the output is not one tensor of the spatial size of the input.
    """
    logits = network(x, *args, **kwargs)
    if not isinstance(logits, torch.Tensor) or logits.shape[2:] != x.shape[2:]:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        fail(f"network must return one tensor of its input's spatial size {tuple(x.shape[2:])}, got {found}.")
    return logits.float()
