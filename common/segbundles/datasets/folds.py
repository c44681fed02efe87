"""The lists of a cross-validation: every case is tested once, by a network that has seen none of its group."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segbundles.errors import fail
from segbundles.files import DATALIST_NAME, SPLITS, read_json

from .datalist import _read_datalist, _relative, _resolve, write_datalist
from .splits import natural, runs, split_cases, split_runs

__all__ = ["case_of", "write_folds"]


def write_folds(data: str | os.PathLike, out: str | os.PathLike, folds: int) -> list[Path]:
    """Write one datalist per fold, ``out/fold0/data/datalist.json`` and so on.

    The cases for training and validation are dealt out to the folds by group; those for testing are left out. In the
    list of a fold, ``testing`` has its cases and ``training`` all others; ``validation`` is empty, so that a training
    chooses nothing on the cases that are scored, and keeps the weights of its last epoch. Each data set of a merged
    list is spread over all folds. Sections that follow one another become runs of neighbours, see
    :func:`segbundles.datasets.splits.split_runs`. The same list always gives the same folds.

    Args:
        data: folder with a datalist.json, as from ``segbundles prepare`` or ``merge``.
        out: folder to write to.
        folds: number of folds, 2 or more.

    Returns:
        The folders of the lists.

    Raises:
        ValueError: when the list cannot be read, there are fewer groups than folds, or ``out`` has other folds.
    """
    data, out = _resolve(data), _resolve(out)
    if folds < 2:
        fail(f"folds must be 2 or more, got {folds}.")
    datalist = _read_datalist(data)
    entries = [entry for split in SPLITS[:2] for entry in datalist.get(split) or []]
    if bare := [case_of(entry) for entry in entries if not entry.get("label")]:
        fail(f"case {bare[0]!r} has no label and cannot be scored: remove it from {data / DATALIST_NAME}.")
    by_data_set: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        by_data_set[entry.get("data_set", "")].append(entry)
    folders = []
    for fold in range(folds):
        folder = out / f"fold{fold}" / "data"
        lists: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        for name, own in by_data_set.items():
            for split, entry in _split(own, name, folds, fold):
                moved = {key: _moved(entry[key], data, folder) for key in ("image", "label")}
                lists[split].append({**entry, **moved})
        _write({**datalist, **lists}, folder, data)
        folders.append(folder)
    return folders


def case_of(entry: Mapping[str, Any]) -> str:
    """Return the name of a datalist's entry: its case, or its image."""
    return str(entry.get("case") or entry.get("image"))


def _split(entries: Sequence[dict[str, Any]], name: str, folds: int, fold: int) -> list[tuple[str, dict[str, Any]]]:
    """Return the entries of one data set, each with its split in a fold."""
    # two cases may have one name, but not one image and page
    ordered = sorted(entries, key=lambda entry: (natural(case_of(entry)), str(entry["image"]), str(entry.get("page"))))
    keys = [str(number) for number in range(len(ordered))]
    if _are_runs(ordered, f"{name}/" if name else ""):
        splits = split_runs(keys, folds=folds, fold=fold)
        names = runs({case_of(e): splits[k] for k, e in zip(keys, ordered, strict=True)}, [*map(case_of, ordered)])
        ordered = [{**entry, "group": f"{name}/{names[case_of(entry)]}".lstrip("/")} for entry in ordered]
    else:
        splits = split_cases({k: e["group"] for k, e in zip(keys, ordered, strict=True)}, folds=folds, fold=fold)
    place = {"training": "training", "validation": "testing"}
    return [(place[splits[key]], entry) for key, entry in zip(keys, ordered, strict=True)]


def _are_runs(entries: Sequence[Mapping[str, Any]], prefix: str) -> bool:
    """Return whether the groups are runs of neighbours, which ``prepare`` names after their first and last case."""
    members: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        members[str(entry["group"]).removeprefix(prefix)].append(case_of(entry))
    named = {group: f"{cases[0]}..{cases[-1]}" if len(cases) > 1 else cases[0] for group, cases in members.items()}
    return any(len(cases) > 1 for cases in members.values()) and all(group == run for group, run in named.items())


def _moved(paths: str | Sequence[str], data: Path, folder: Path) -> str | list[str]:
    """Return paths relative to another folder; several are the channels of one case."""
    if isinstance(paths, str):
        return _relative(data / paths, folder)
    return [_relative(data / path, folder) for path in paths]


def _write(datalist: Mapping[str, Any], folder: Path, data: Path) -> None:
    path = folder / DATALIST_NAME
    if path.is_file():
        there = read_json(path)
        if any(there.get(split) != datalist[split] for split in SPLITS):
            fail(f"{path} was made from other data or for another number of folds than {data}: choose another folder.")
        return
    write_datalist(datalist, folder)
