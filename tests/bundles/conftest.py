from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def same_cases_in_two_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a datalist list one case for training and for validation, which keeps these tests small."""
    monkeypatch.setattr("segbundles.data.cases.check_leaks", lambda *_: None)
