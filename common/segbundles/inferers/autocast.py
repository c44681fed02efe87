"""Mixed precision on CPU and GPU alike, for trainer, evaluator and sliding window."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from monai.config import PathLike
from monai.inferers import Inferer
from torch import nn

from segbundles.networks.weights import check_loaded

__all__ = ["AutocastInferer"]

logger = logging.getLogger(__name__)

# networks found to hold the weights of a folder; outside the inferer, which can be pickled
_CHECKED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


class AutocastInferer(Inferer):
    """Run another inferer in bfloat16 mixed precision, and give what it returns in float32.

    MONAI's engines have ``amp``, but for CUDA and float16 alone. This works wherever an inferer does, the trainer
    included, on a CPU as on a GPU, and needs no gradient scaling, since bfloat16 has float32's range. Keep the
    engine's own ``amp`` off with it. The loss is computed outside, in float32.

    Args:
        inferer: the inferer to run.
        enabled: False runs it untouched. A device without bfloat16 arithmetic runs it in full precision too, with one
            warning in the log.
        ckpt_dir: folder of weights, one of whose files a network must have been loaded with, see
            :func:`segbundles.networks.check_loaded`. It is looked at when a network is first used. None: no check.

    Raises:
        ValueError: when called with a network that has other weights.

    Example:
        >>> import torch
        >>> from monai.inferers import SlidingWindowInferer
        >>> inferer = AutocastInferer(SlidingWindowInferer(roi_size=(32, 32)))
        >>> inferer(torch.rand(1, 1, 40, 40), torch.nn.Conv2d(1, 2, 1)).dtype
        torch.float32
    """

    def __init__(self, inferer: Inferer, enabled: bool = True, ckpt_dir: PathLike | None = None) -> None:
        self.inferer = inferer
        self.enabled = enabled
        self.ckpt_dir = ckpt_dir

    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> Any:
        """Run the inferer.

        Args:
            inputs: input of the network; its device says where to run.
            network: the network.
            args: further arguments of the inferer.
            kwargs: further keyword arguments of the inferer.

        Returns:
            What the inferer returns, its floating point tensors (in tuples, lists and dicts too) as float32.
        """
        self._check(network)
        if not self.enabled or not _has_bfloat16(inputs.device.type):
            return self.inferer(inputs, network, *args, **kwargs)
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
            return _to_float32(self.inferer(inputs, network, *args, **kwargs))

    def _check(self, network: Callable) -> None:
        # TorchScript holds its weights itself
        if self.ckpt_dir is None or not isinstance(network, nn.Module) or isinstance(network, torch.jit.ScriptModule):
            return
        if _CHECKED.get(network) != str(self.ckpt_dir):
            check_loaded(network, self.ckpt_dir)
            _CHECKED[network] = str(self.ckpt_dir)


@cache
def _has_bfloat16(device_type: str) -> bool:
    """Whether the device computes in bfloat16; says once if not."""
    if device_type == "cpu" or (device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)):
        return True
    logger.warning(f"Device {device_type!r} does not compute in bfloat16: mixed precision (amp) is off.")
    return False


def _to_float32(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.float() if output.is_floating_point() else output
    if isinstance(output, dict):
        return {key: _to_float32(value) for key, value in output.items()}
    if isinstance(output, (tuple, list)):
        return type(output)(_to_float32(value) for value in output)
    return output
