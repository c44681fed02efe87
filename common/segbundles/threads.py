"""How many threads a run computes with, and how many processes load its data."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

__all__ = ["choose_threads", "usable_cores", "worker_count"]

logger = logging.getLogger("segbundles")

_MOST_WORKERS = 8


def choose_threads(num_threads: int | None = None) -> int:
    """Set how many threads torch uses in this process, by the cores that are there for it, and log the number once.

    More threads than cores make a run much slower, because threads wait for each other. The processes that
    ``torchrun`` starts on one machine share its cores. Data workers wait most of the time, so none are kept for them.
    Torch's own number is never raised, except where ``torchrun`` has set it to 1 for want of a better number.

    Args:
        num_threads: the number; None chooses it, unless the environment has ``OMP_NUM_THREADS``.

    Returns:
        The number of threads.
    """
    processes = _processes()
    cores = max(1, usable_cores() // processes)
    given = os.environ.get("OMP_NUM_THREADS")
    torchrun = processes > 1 and given == "1"
    if num_threads is not None:
        number, reason = num_threads, "num_threads"
    elif given and not torchrun:
        number, reason = torch.get_num_threads(), f"OMP_NUM_THREADS {given}"
    else:
        number = cores if torchrun else min(cores, torch.get_num_threads())
        reason = f"{cores} core{'s' * (cores > 1)} for this process"
    if number != torch.get_num_threads():
        torch.set_num_threads(number)
    logger.info(f"Threads: {number} ({reason}).")
    return number


def worker_count(device: torch.device | str) -> int:
    """Return how many processes should load data ahead of a network on a device.

    A CPU needs its cores for the network: 0. Beside a GPU, all cores but one are used, up to 8, and shared by the
    processes of a node.

    Args:
        device: device of the network.
    """
    if torch.device(device).type == "cpu":
        return 0
    return max(0, min(_MOST_WORKERS, usable_cores() // _processes() - 1))


def _processes() -> int:
    """Return how many processes ``torchrun`` has started on this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the number of cores that this process may use: its CPU affinity, and the quota of its container.

    Args:
        cgroup: folder of the control group, as a container sees its own.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # versions 2 and 1 of the kernel's
        try:
            quota, period = " ".join((cgroup / file).read_text() for file in files).split()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores
