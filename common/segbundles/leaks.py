"""Leaks between the splits of a list of cases: the same group, file or content in two of them."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

from segbundles.errors import fail
from segbundles.files import SPLITS, read_json

__all__ = ["check_leaks"]

_MOST = 3
_SAMPLE = 1 << 14  # bytes of the start and the middle of a file, which tell most files of one size apart
_done: dict[Hashable, list[str]] = {}


@dataclass(frozen=True)
class _File:
    """A file of a case.

    Args:
        key: what it is for the case, such as image.
        name: path as in the list.
        path: absolute path without links.
        page: page that the case uses; None is the whole file.
        split: split of the case.
        number: number of the case in the list.
        case: name of the case.
        group: its group, or None.
    """

    key: str
    name: str
    path: Path
    page: str | None
    split: str
    number: int
    case: str
    group: str | None

    def __str__(self) -> str:
        return f"{self.split} (case {self.case})"


def check_leaks(path: Path, keys: Sequence[str], is_blank: Callable[[Path], bool]) -> None:
    """Fail when two splits of a list have a group, a file or the content of a file in common.

    Only files that exist are compared. Files with one value throughout, such as masks of images without an object, may
    have equal content; such a label may also be one file for many cases. A list is read once per process, and again
    when it has changed.

    Args:
        path: a ``datalist.json``.
        keys: keys of an entry that name its files, such as image and label.
        is_blank: says whether a file contains only one value.

    Raises:
        ValueError: naming cases and splits.
    """
    stat = path.stat()
    state = (path.resolve(), stat.st_mtime_ns, stat.st_size, tuple(keys))
    if state not in _done:
        _done[state] = list(_leaks(_read(path, keys), cache(is_blank)))
    if leaks := _done[state]:
        more = f"; and {len(leaks) - _MOST} more" if len(leaks) > _MOST else ""
        fail(
            f"{path}: {'; '.join(leaks[:_MOST])}{more}. What a network has seen in training says nothing about new "
            "cases: keep these cases in one split, or remove one of each two."
        )


def _read(path: Path, keys: Sequence[str]) -> list[_File]:
    """Return the files of all splits; what is not an entry with files is left to the reader of its split."""
    datalist = read_json(path)
    files = []
    number = 0
    for split in SPLITS:
        entries = datalist.get(split)
        for entry in entries if isinstance(entries, list) else []:
            if not isinstance(entry, dict):
                continue
            number += 1
            group = entry.get("group")
            names = {key: entry[key] for key in keys if entry.get(key)}
            case = str(entry.get("case") or next(iter(names.values()), "?"))
            for key, value in names.items():
                for name in value if isinstance(value, list) else [value]:
                    if isinstance(name, str) and (file := path.parent / name).exists():
                        place = Path(os.path.realpath(file))
                        page, owner = (None if value is None else str(value) for value in (entry.get("page"), group))
                        files.append(_File(key, name, place, page, split, number, case, owner))
    return files


def _leaks(files: Sequence[_File], is_blank: Callable[[Path], bool]) -> Iterator[str]:
    told: set[tuple[int, int]] = set()
    for one, other in _across(files, lambda file: file.group):
        yield f"group {one.group!r} is in {one} and in {other}"

    def new(pair: tuple[_File, _File]) -> bool:
        one, other = pair
        cases = (one.number, other.number)
        if cases in told or (one.group is not None and one.group == other.group):
            return False
        told.add(cases)
        return True

    for one, other in _across(files, lambda file: (file.key, file.path, file.page)):
        if not (one.key == "label" and is_blank(one.path)) and new((one, other)):
            page = "" if one.page is None else f", page {one.page},"
            yield f"{one.key} {one.name}{page} is in {one} and in {other}"
    for one, other in _identical(files):
        if not is_blank(one.path) and new((one, other)):
            yield f"{one.key} {one.name} of {one} and {other.name} of {other} have the same content"


def _across(files: Iterable[_File], key: Callable[[_File], Hashable]) -> Iterator[tuple[_File, _File]]:
    """Yield the first files, of each two splits, that have one key; files without a key are not compared."""
    first: dict[Hashable, dict[str, _File]] = defaultdict(dict)
    for file in files:
        if (value := key(file)) is not None:
            first[value].setdefault(file.split, file)
    for found in first.values():
        yield from combinations(found.values(), 2)


def _identical(files: Iterable[_File]) -> Iterator[tuple[_File, _File]]:
    """Yield files of two splits with the same bytes; size and samples are compared first, so that few are read.

    Empty files are not compared: no reader takes them.
    """
    digests: list[Callable[[Path], Hashable]] = [cache(digest) for digest in (_size, _sample, _content)]
    candidates = [list(files)]
    for digest in digests:
        groups: dict[Hashable, list[_File]] = defaultdict(list)
        for number, group in enumerate(candidates):
            for file in group:
                try:
                    found = digest(file.path)
                except OSError:  # the reader of its split names a file that cannot be read
                    continue
                if found is not None:
                    groups[number, file.key, file.page, found].append(file)
        candidates = [
            group for group in groups.values() if len({f.split for f in group}) > 1 and len({f.path for f in group}) > 1
        ]
    for group in candidates:
        yield from (pair for pair in _across(group, lambda file: "same") if pair[0].path != pair[1].path)


def _members(path: Path) -> list[Path]:
    """Return the file itself, or the files of a folder of slices."""
    return sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]


def _size(path: Path) -> Hashable:
    sizes = tuple(p.stat().st_size for p in _members(path))
    return (path.is_dir(), sizes) if any(sizes) else None


def _sample(path: Path) -> Hashable:
    samples = hashlib.blake2b()
    for member in _members(path):
        with member.open("rb") as file:
            samples.update(file.read(_SAMPLE))
            file.seek(member.stat().st_size // 2)
            samples.update(file.read(_SAMPLE))
    return samples.digest()


def _content(path: Path) -> Hashable:
    content = hashlib.blake2b()
    for member in _members(path):
        with member.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
    return content.digest()
