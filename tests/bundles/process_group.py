"""A stand-in for the process group of torch, for tests of what several processes do in turn."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest


class Group:
    """Be several processes that take turns, the first one last, in place of ``torch.distributed``.

    Args:
        monkeypatch: fixture of the test.
        count: number of processes.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.count, self.rank = count, 0
        self._given: dict[int, list[bytes]] = {}
        stand_in = SimpleNamespace(
            is_available=lambda: True,
            is_initialized=lambda: True,
            get_rank=lambda: self.rank,
            get_world_size=lambda: count,
            gather_object=self._gather,
        )
        monkeypatch.setattr("segbundles.distributed.dist", stand_in)

    def _gather(self, item: Any, found: list | None) -> None:
        assert (found is None) == (self.rank > 0)
        if self.rank > 0:
            self._given.setdefault(self.rank, []).append(pickle.dumps(item))
        else:
            found[:] = [item, *(pickle.loads(self._given[rank].pop(0)) for rank in range(1, self.count))]

    def each(self) -> Iterator[int]:
        """Take turns."""
        for rank in reversed(range(self.count)):
            self.rank = rank
            yield rank
