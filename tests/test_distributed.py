from __future__ import annotations

import logging
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from process_group import Group
from torch import nn

from segbundles.distributed import broadcast, gather, join, leave, process_count, process_rank, share


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


def network_of(rank: int) -> nn.Module:
    """A network of this process, as the bundles have it: its weights in channels_last, a norm with counts."""
    torch.manual_seed(rank)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    network(torch.rand(2, 3, 8, 8))
    return network


def receive(rank: int, folder: Path) -> None:
    """Take part in a broadcast of two processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    broadcast(network := network_of(rank))
    torch.save(network.state_dict(), folder / f"{rank}.pt")
    leave()


def test_all_processes_get_the_network_of_the_first(tmp_path: Path) -> None:
    broadcast(network := network_of(0))  # without a group nothing happens
    # this file as a script: a fork would inherit torch's threads and could wait for them forever
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    commands = [[sys.executable, __file__, str(rank), str(tmp_path)] for rank in (0, 1)]
    processes = [subprocess.Popen(command, env=environment) for command in commands]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert not torch.equal(network_of(1)[0].weight, network[0].weight)
    for rank in (0, 1):
        for name, value in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            assert torch.equal(value, network.state_dict()[name]), (rank, name)


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


if __name__ == "__main__":
    receive(int(sys.argv[1]), Path(sys.argv[2]))
