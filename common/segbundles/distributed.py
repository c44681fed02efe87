"""Several processes that do one job: who does what, and bringing together what each has found."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

__all__ = ["gather", "process_count", "process_rank", "share"]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def process_rank() -> int:
    """Number of this process, from 0; 0 where no process group stands."""
    return dist.get_rank() if _several() else 0


def process_count() -> int:
    """Number of processes of the group; 1 where none stands."""
    return dist.get_world_size() if _several() else 1


def share(number: int) -> range:
    """Which of so many items are this process's. Every item is that of one process, and of no other.

    Args:
        number: items of all processes, in the same order in each.
    """
    return range(process_rank(), number, process_count())


def gather(item: Any) -> list[Any]:
    """Bring together what each process has; to be called by all of them.

    Args:
        item: what can be pickled.

    Returns:
        In the first process the items in the order of the processes, in the others nothing.
    """
    if process_count() == 1:
        return [item]
    found = [None] * process_count() if process_rank() == 0 else None
    dist.gather_object(item, found)
    return found or []
