from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Engine

from segbundles.handlers import EvaluationReport
from segbundles.scorers import Scorer


class Written:
    """What an evaluation has written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def table(self, file: str = "metrics.csv") -> list[dict[str, str]]:
        with (self.folder / file).open(newline="", encoding="utf-8") as table:
            return list(csv.DictReader(table))

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def page(self) -> str:
        return (self.folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., Written]:
    """Evaluate cases that are given as image, label, pred and what else the engine has of them."""

    def run(scorer: Scorer, cases: Sequence[Mapping[str, Any]], folder: str = "o", **arguments: Any) -> Written:
        def step(engine: Engine, case: Mapping[str, Any]) -> list[Mapping[str, Any]]:
            engine.state.batch = [case]
            return [case]

        engine = Engine(step)
        EvaluationReport(tmp_path / folder, scorer, **arguments).attach(engine)
        engine.run(cases)
        return Written(tmp_path / folder)

    return run
