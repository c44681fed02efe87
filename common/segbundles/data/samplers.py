"""Which cases a training draws in an epoch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from segbundles.distributed import process_count, process_rank
from segbundles.errors import fail

__all__ = ["BalancedSampler"]


class BalancedSampler(Sampler[int]):
    """Draw cases in random order, each data set equally often.

    An epoch has as many cases as there are. Each data set fills an equal share of them: with a random selection of its
    cases if it has more, with all of them several times if it has fewer. With one data set this is a random order of
    all cases.

    In a process group each process draws an equal part of the same order, which ``seed`` and ``set_epoch``, called by
    MONAI's trainers, decide; a remainder is left out. Without a group, torch's random state decides.

    Args:
        cases: dictionaries of paths, read at first use. Those without a ``data_set`` form a data set.
        balanced: whether each data set is drawn equally often; if not, each case is drawn once.
        seed: seed for several processes, the same in all.

    Raises:
        ValueError: at first use, when there are fewer cases than processes.
    """

    def __init__(self, cases: Sequence[Mapping[str, Any]], balanced: bool = True, seed: int = 0) -> None:
        self.cases = cases
        self.balanced = balanced
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch for several processes."""
        self.epoch = epoch

    def __len__(self) -> int:
        length = len(self.cases) // process_count()
        if not length:
            fail(f"{len(self.cases)} training cases cannot be shared by {process_count()} processes: start fewer.")
        return length

    def __iter__(self) -> Iterator[int]:
        generator = torch.default_generator
        if process_count() > 1:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
        sets: dict[Any, list[int]] = defaultdict(list)
        for index, case in enumerate(self.cases):
            sets[case.get("data_set") if self.balanced else None].append(index)
        total = len(self.cases)
        share = -(-total // len(sets))
        drawn: list[int] = []
        for members in sets.values():
            rounds = -(-share // len(members))
            orders = [torch.randperm(len(members), generator=generator) for _ in range(rounds)]
            drawn += [members[k] for k in torch.cat(orders)[:share].tolist()]
        order = torch.randperm(len(drawn), generator=generator)[:total].tolist()
        return iter([drawn[k] for k in order[process_rank() :: process_count()][: len(self)]])
