"""Finished evaluations, read back from their folders."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from segbundles.errors import fail
from segbundles.facts import sha256
from segbundles.files import DATALIST_NAME, SPLITS, read_json, read_table
from segbundles.meta import files_of
from segbundles.metrics import METRIC_UNITS, SECTION_UNITS
from segbundles.metrics.segmentation import base_name
from segbundles.statistics import ProbabilityCounts, counts_of_table

__all__ = ["PastEvaluation", "case_figures", "content_of", "metric_names", "read_evaluation", "splits_of"]

_TEXTS = ("case", "status", "notes", "group", "sequence", "data_set", "content", "spacing_mm", "review")


@dataclass
class PastEvaluation:
    """What an evaluation has written.

    Args:
        folder: its folder.
        rows: the rows of ``metrics.csv``; numbers are floats, NaN where they are undefined.
        record: how it was run, from ``evaluating.config.json``; empty where there is none.
        summary: ``summary.json``; empty where there is none.
        probabilities: ``probabilities.csv``, the counts of each group; empty where there is none.
    """

    folder: Path
    rows: list[dict[str, Any]]
    record: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    probabilities: dict[str, ProbabilityCounts] = field(default_factory=dict)


def read_evaluation(folder: str | Path) -> PastEvaluation:
    """Read the results of ``segbundles evaluate`` or ``crossvalidate``.

    Args:
        folder: the folder that they were written to.

    Raises:
        ValueError: when it has no ``metrics.csv`` with cases.
    """
    folder = Path(folder)
    path = folder / "metrics.csv"
    if not path.is_file():
        fail(f"{folder} has no metrics.csv: give a folder that `segbundles evaluate` or `crossvalidate` has written.")
    rows = [{name: _value(name, text) for name, text in row.items()} for row in read_table(path)]
    if not rows or "case" not in rows[0]:
        fail(f"{path} has no cases: evaluate again.")
    records = ("evaluating.config.json", "crossvalidation.json"), ("summary.json",)
    record, summary = (
        next((read_json(folder / name) for name in names if (folder / name).is_file()), {}) for names in records
    )
    path = folder / "probabilities.csv"
    counts = counts_of_table(read_table(path)) if path.is_file() else {}
    return PastEvaluation(folder, rows, record, summary, counts)


def metric_names(rows: list[dict[str, Any]]) -> list[str]:
    """Return the columns that are metrics, in their order."""
    return [name for name in rows[0] if base_name(name) in METRIC_UNITS | SECTION_UNITS]


def case_figures(folder: str | Path) -> dict[str, bytes]:
    """Return the picture of each case from the report of an evaluation; none where it has none."""
    path = Path(folder) / "report.html"
    if not path.is_file():
        return {}
    page = _Pictures()
    page.feed(path.read_text(encoding="utf-8"))
    return page.found


def content_of(item: Mapping[str, Any]) -> str:
    """Return a hash of a case: of its truth, and of the files of its image.

    Args:
        item: the case with ``image`` and ``label``, see :meth:`segbundles.scorers.Scorer.score`.

    Returns:
        16 hexadecimal digits.
    """
    label = np.ascontiguousarray(item["label"].detach().cpu().numpy().astype(np.uint8))
    content = hashlib.blake2b(str(label.shape).encode() + label.tobytes(), digest_size=8)
    for file in map(Path, files_of(item["image"])):
        for member in sorted(file.iterdir()) if file.is_dir() else [file]:
            if member.is_file():
                content.update(member.read_bytes())
    return content.hexdigest()


def splits_of(dataset_dir: str | Path | None) -> dict[str, Any]:
    """Return what is known of a prepared data set; nothing without a readable ``datalist.json``.

    Args:
        dataset_dir: its folder.

    Returns:
        ``name``, ``datalist_sha256``, and ``splits``: the number of ``cases`` and ``groups`` of each.
    """
    path = Path(dataset_dir or "", DATALIST_NAME)
    if dataset_dir is None or not path.is_file():
        return {}
    datalist, splits = read_json(path), {}
    for split in SPLITS:
        groups = {str(entry.get("group", number)) for number, entry in enumerate(datalist.get(split) or [])}
        splits[split] = {"cases": len(datalist.get(split) or []), "groups": len(groups)}
    return {"name": datalist.get("name", ""), "datalist_sha256": sha256(path), "splits": splits}


def _value(name: str, text: str) -> Any:
    if name in _TEXTS:
        return text or ""
    try:
        return float(text) if text else np.nan
    except ValueError:
        return text


class _Pictures(HTMLParser):
    """Find the heading and the first picture of each article."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, bytes] = {}
        self._name: str | None = None
        self._in_heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "article":
            self._name = None
        self._in_heading = tag == "h3"
        source = dict(attrs).get("src") or ""
        if tag == "img" and self._name and source.startswith("data:image/") and self._name not in self.found:
            self.found[self._name] = base64.b64decode(source.partition("base64,")[2])

    def handle_data(self, data: str) -> None:
        if self._in_heading:
            self._name = (self._name or "") + data

    def handle_endtag(self, tag: str) -> None:
        if tag == "h3":
            self._in_heading = False
