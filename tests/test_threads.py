from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from segbundles import threads
from segbundles.threads import choose_threads, usable_cores, worker_count


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Eight cores, torch with eight threads, and an empty environment."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("arguments", "environment", "expected", "reason"),
    [
        ({}, {}, 8, "8 cores for this process"),
        ({}, {"LOCAL_WORLD_SIZE": "3"}, 2, "2 cores for this process"),
        ({}, {"LOCAL_WORLD_SIZE": "16"}, 1, "1 core for this process"),
        ({}, {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, 4, "4 cores for this process"),
        ({}, {"OMP_NUM_THREADS": "8"}, 8, "OMP_NUM_THREADS 8"),
        ({"num_threads": 5}, {"OMP_NUM_THREADS": "8", "LOCAL_WORLD_SIZE": "2"}, 5, "num_threads"),
    ],
)
def test_threads_follow_the_cores(
    arguments: dict[str, int],
    environment: dict[str, str],
    expected: int,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.INFO, "segbundles"):
        assert choose_threads(**arguments) == expected == torch.get_num_threads()
    assert caplog.messages == [f"Threads: {expected} ({reason})."]


def test_torchs_own_number_is_not_raised() -> None:
    torch.set_num_threads(3)
    assert choose_threads() == 3 == torch.get_num_threads()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 6),
        ({"cpu.max": "max 100000\n"}, 6),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ],
)
def test_cores_are_those_of_affinity_and_quota(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == expected


@pytest.mark.parametrize(
    ("device", "cores", "processes", "expected"),
    [
        ("cpu", 16, 1, 0),
        ("cuda", 16, 1, 8),
        ("cuda:1", 4, 1, 3),
        ("cuda", 16, 4, 3),
        ("cuda", 1, 1, 0),
        ("cuda", 2, 4, 0),
    ],
)
def test_workers_beside_a_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, cores: int, processes: int, expected: int
) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert worker_count(device) == expected
