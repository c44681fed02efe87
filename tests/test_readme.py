"""The figures of the README are those of the bundles' metadata."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUNDLES = sorted(path.parents[1] for path in ROOT.glob("bundles/*/configs/metadata.json"))


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_figures_of_the_table_are_measured(bundle: Path) -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in lines if line.startswith(f"| [`{bundle.name}`]"))
    metrics = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))["eval_metrics"]
    shown = row.split("|")[-2]
    measured = {f"{value:.3f}" for value in metrics.values()}
    told = {word.strip(",;") for word in shown.split() if word.startswith("0.")}
    assert told
    assert told <= measured
