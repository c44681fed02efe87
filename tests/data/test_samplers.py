from __future__ import annotations

from collections import Counter

import pytest
import torch

from segbundles.data import BalancedSampler, samplers

LARGE, SMALL = [{"data_set": "a"}] * 9, [{"data_set": "b"}] * 3


def test_each_data_set_is_drawn_equally_often() -> None:
    cases = [*LARGE, *SMALL]
    torch.manual_seed(0)
    epochs = [list(BalancedSampler(cases)) for _ in range(3)]
    for drawn in epochs:
        assert len(drawn) == len(BalancedSampler(cases)) == 12
        large = [k for k in drawn if k < 9]
        assert len(large) == len(set(large)) == 6
        assert Counter(k for k in drawn if k >= 9) == {9: 2, 10: 2, 11: 2}
    assert epochs[0] != epochs[1]
    torch.manual_seed(0)
    assert list(BalancedSampler(cases)) == epochs[0]


@pytest.mark.parametrize(("cases", "balanced"), [(LARGE, True), ([{}] * 9, True), ([*LARGE, *SMALL], False)])
def test_one_data_set_or_none_is_a_random_order(cases: list[dict], balanced: bool) -> None:
    drawn = list(BalancedSampler(cases, balanced=balanced))
    assert sorted(drawn) == list(range(len(cases)))
    assert drawn != sorted(drawn)


def test_processes_share_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [*LARGE, *SMALL, {"data_set": "b"}]  # 13: one is left out
    monkeypatch.setattr(samplers, "process_count", lambda: 2)
    parts = []
    for rank in range(2):
        torch.manual_seed(rank)
        monkeypatch.setattr(samplers, "process_rank", lambda rank=rank: rank)
        sampler = BalancedSampler(cases, seed=3)
        sampler.set_epoch(5)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler) == 6
        sampler.set_epoch(6)
        assert list(sampler) != parts[-1]
    counts = Counter(parts[0] + parts[1])
    assert max(counts[k] for k in range(9)) == 1
    assert 5 <= sum(counts[k] for k in range(9)) <= 7
    monkeypatch.setattr(samplers, "process_count", lambda: 20)
    with pytest.raises(ValueError, match="13 training cases cannot be shared by 20 processes: start fewer"):
        len(BalancedSampler(cases))
