"""Several processes that share one job: starting them, who does what, and bringing together what each has found."""

from __future__ import annotations

import atexit
import datetime
import logging
import os
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["broadcast", "gather", "join", "leave", "process_count", "process_rank", "share"]


def join(device: torch.device | str, gathers: bool = False) -> None:
    """Join the process group that ``torchrun`` started; the first process alone writes to the screen.

    On a machine with GPUs, ``cuda`` means this process's own GPU from then on. The group ends with the process. The
    function can be called again: MONAI evaluates ``initialize`` twice in some programs.

    Args:
        device: where this process computes.
        gathers: whether the processes work apart and bring their results together at the end. They then wait for each
            other as long as it takes, over the network of the CPUs. Otherwise they exchange gradients in every step.
    """
    device = torch.device(device)
    if not dist.is_initialized():
        if gathers:
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        else:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(leave)
    if device.type == "cuda":
        torch.cuda.set_device(device if device.index is not None else int(os.environ.get("LOCAL_RANK", "0")))
    if process_rank() > 0:
        logging.getLogger("segbundles").setLevel(logging.WARNING)


def leave() -> None:
    """Leave the process group, if there is one."""
    if _several():
        dist.destroy_process_group()


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def process_rank() -> int:
    """Return the number of this process, from 0; 0 without a process group."""
    return dist.get_rank() if _several() else 0


def process_count() -> int:
    """Return the number of processes of the group; 1 without a group."""
    return dist.get_world_size() if _several() else 1


def share(number: int) -> range:
    """Return which of ``number`` items are this process's. Every item belongs to exactly one process.

    Args:
        number: number of items, the same items in the same order in each process.
    """
    return range(process_rank(), number, process_count())


def broadcast(network: nn.Module) -> None:
    """Give a network in every process the parameters and buffers of the first. All processes must call it.

    Args:
        network: network, or its DDP wrapper; without a process group it stays as it is.
    """
    if process_count() == 1:
        return
    for tensor in chain(network.parameters(), network.buffers()):
        values = tensor.detach().contiguous()  # a copy of a weight in channels_last
        dist.broadcast(values, 0)
        tensor.detach().copy_(values)


def gather(item: Any) -> list[Any]:
    """Bring together what each process has. All processes must call it.

    Args:
        item: anything that can be pickled.

    Returns:
        In the first process the items in the order of the processes, in the others an empty list.
    """
    if process_count() == 1:
        return [item]
    found = [None] * process_count() if process_rank() == 0 else None
    dist.gather_object(item, found)
    return found or []
