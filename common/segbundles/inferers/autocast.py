"""Mixed precision on CPU and GPU, for trainer, evaluator and sliding window."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from monai.inferers import Inferer

__all__ = ["AutocastInferer", "cpu_has_bfloat16"]

logger = logging.getLogger("segbundles")


class AutocastInferer(Inferer):
    """Run another inferer in bfloat16 mixed precision, and return its output in float32.

    MONAI's engines have ``amp`` for CUDA and float16 only. This inferer works on a CPU too, for training as well as
    evaluation, and needs no gradient scaling, because bfloat16 has the range of float32. Keep the engine's own ``amp``
    off with it. The loss is computed outside, in float32.

    Args:
        inferer: the inferer to run.
        enabled: False runs it unchanged. A device without instructions for bfloat16 runs it in full precision too, and
            the log says so once.

    Example:
        >>> import torch
        >>> from monai.inferers import SlidingWindowInferer
        >>> inferer = AutocastInferer(SlidingWindowInferer(roi_size=(32, 32)))
        >>> inferer(torch.rand(1, 1, 40, 40), torch.nn.Conv2d(1, 2, 1)).dtype
        torch.float32
    """

    def __init__(self, inferer: Inferer, enabled: bool = True) -> None:
        self.inferer = inferer
        self.enabled = enabled

    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> Any:
        """Run the inferer.

        Args:
            inputs: input of the network; it runs on the device of this tensor.
            network: the network.
            args: further arguments of the inferer.
            kwargs: further keyword arguments of the inferer.

        Returns:
            Output of the inferer, with all floating point tensors (also in tuples, lists and dicts) as float32.
        """
        device = inputs.device.type
        if not self.enabled or not _has_bfloat16(device):
            return self.inferer(inputs, network, *args, **kwargs)
        with torch.autocast(device, dtype=torch.bfloat16):
            return _to_float32(self.inferer(inputs, network, *args, **kwargs))


def cpu_has_bfloat16() -> bool:
    """Return whether the processor has instructions for bfloat16 (AVX512-BF16, AMX, or those of ARM).

    Without them bfloat16 is emulated, which takes more than twice the time of float32.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
    private = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # older versions of torch, x86 only
    return any(getattr(torch.cpu, name, bool)() for name in private)


def _has_bfloat16(device: str) -> bool:
    if device == "cpu":
        found = cpu_has_bfloat16()
    else:
        found = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if not found:
        _say_off(device)
    return found


@cache
def _say_off(device: str) -> None:
    name = {"cpu": "The processor", "cuda": "The GPU"}.get(device, f"Device {device!r}")
    logger.info(f"{name} has no instructions for bfloat16: everything runs in full precision, as with amp false.")


def _to_float32(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.float() if output.is_floating_point() else output
    if isinstance(output, dict):
        return {key: _to_float32(value) for key, value in output.items()}
    if isinstance(output, (tuple, list)):
        values = map(_to_float32, output)
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)  # a named tuple
    return output
