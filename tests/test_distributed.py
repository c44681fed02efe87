from __future__ import annotations

import logging
from itertools import chain

import pytest
import torch
import torch.distributed as dist
from process_group import Group

from segbundles.distributed import gather, join, leave, process_count, process_rank, share


def test_one_process_has_all() -> None:
    assert (process_rank(), process_count(), list(share(3)), gather("a")) == (0, 1, [0, 1, 2], ["a"])
    leave()  # without a group nothing happens


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("number", [0, 1, 4, 7])
def test_every_item_belongs_to_one_process(number: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [list(share(number)) for _ in Group(monkeypatch, count).each()]
    assert sorted(chain(*shares)) == list(range(number))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_first_process_gathers_the_items_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [gather(rank) for rank in Group(monkeypatch, 3).each()] == [[], [], [0, 1, 2]]


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    for rank in ("0", "3"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        join("cuda")
    join("cuda:1")
    assert chosen == [0, 3, torch.device("cuda:1")]


@pytest.mark.parametrize("gathers", [False, True])
def test_join_and_leave(gathers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    try:
        join(torch.device("cpu"), gathers=gathers)
        join("cpu", gathers=gathers)  # as in --device cpu; a program may initialize twice
        assert dist.get_backend() == "gloo"
        assert (process_rank(), process_count()) == (0, 1)
    finally:
        leave()
    assert not dist.is_initialized()


def test_only_the_first_process_shows_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    for rank in Group(monkeypatch, 2).each():
        logging.getLogger("segbundles").setLevel(logging.INFO)
        join(torch.device("cpu"))
        shown.append((rank, logging.getLogger("segbundles").level))
    assert shown == [(1, logging.WARNING), (0, logging.INFO)]
