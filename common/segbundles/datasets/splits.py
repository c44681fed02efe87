"""Which cases go to training, validation and testing, so that no group is in two splits."""

from __future__ import annotations

import difflib
import os
import random
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from segbundles.errors import fail
from segbundles.files import SPLITS, read_json


def split_cases(
    groups: Mapping[str, str],
    fixed: Mapping[str, str] | None = None,
    validation_fraction: float = 0.2,
    seed: int = 0,
    folds: int | None = None,
    fold: int | None = None,
) -> dict[str, str]:
    """Split cases into training and validation so that no group is in both.

    The groups are shuffled with ``seed``; each goes to validation if it still fits into its share. With ``folds`` they
    are dealt out in that order, each to the smallest part so far.

    Args:
        groups: group of each case.
        fixed: cases whose split is given; their group follows them.
        validation_fraction: share of validation among the cases that are not testing, fixed cases included.
        seed: seed of the shuffle.
        folds: number of parts for cross-validation.
        fold: the part that is validation, from 0.

    Returns:
        The split of each case.

    Raises:
        ValueError: when fixed cases pull one group into two splits, or there are fewer groups than folds.
    """
    members = _members(groups)
    group_split: dict[str, str] = {}
    for case, split in (fixed or {}).items():
        group = groups[case]
        if (other := group_split.setdefault(group, split)) != split:
            others = shorten([c for c in members[group] if (fixed or {}).get(c) == other])
            fail(
                f"case {case} of {split} and {others} of {other} form one group (same patient, or the same image, "
                f"label or object) and cannot be both in {other} and {split}: use --split with a file that lists them "
                "in one split, or not at all"
            )
    free = [g for g in sorted(members) if g not in group_split]
    random.Random(seed).shuffle(free)

    if folds is not None:
        if len(free) < folds:
            fail(f"{folds} folds need {folds} groups or more, found {len(free)}")
        parts: list[list[str]] = [[] for _ in range(folds)]
        sizes = [0] * folds
        for group in free:
            smallest = sizes.index(min(sizes))
            parts[smallest].append(group)
            sizes[smallest] += len(members[group])
        chosen = set(parts[fold or 0])
    else:
        taken = sum(len(members[g]) for g, s in group_split.items() if s == "validation")
        share = round(validation_fraction * (taken + sum(len(members[g]) for g in free)))
        chosen = set()
        for group in free:
            if taken + len(members[group]) <= share:
                chosen.add(group)
                taken += len(members[group])
        if validation_fraction > 0 and taken == 0 and len(free) > 1:
            chosen.add(min(free, key=lambda g: len(members[g])))
    return {
        case: group_split.get(group, "validation" if group in chosen else "training")
        for case, group in sorted(groups.items())
    }


def split_runs(
    cases: Sequence[str],
    fixed: Mapping[str, str] | None = None,
    validation_fraction: float = 0.2,
    folds: int | None = None,
    fold: int | None = None,
) -> dict[str, str]:
    """Split cases that follow one another, and look like their neighbours, so that validation is one run of them.

    By default validation is the last part of the cases. If some cases are fixed for validation, it is the last run of
    that length that contains all of them (a longer run if they are further apart). Folds are equal runs, in order.
    Nothing is random.

    Args:
        cases: names, in the order in which they follow one another.
        fixed: cases whose split is given; those of testing take no part in the runs.
        validation_fraction: share of validation among the cases that are not testing.
        folds: number of runs for cross-validation.
        fold: the run that is validation, from 0.

    Returns:
        The split of each case.

    Raises:
        ValueError: when there are fewer cases than folds, or folds and cases fixed for validation.
    """
    splits = dict(fixed or {})
    free = [c for c in cases if splits.get(c, "validation") == "validation"]
    named = [i for i, c in enumerate(free) if c in splits]
    if folds is not None:
        if named:
            fail(
                f"{free[named[0]]!r} cannot be given to validation with folds, which are runs of neighbours: choose "
                "the fold that contains it"
            )
        if len(free) < folds:
            fail(f"{folds} folds need {folds} cases or more, found {len(free)}")
        start, end = (len(free) * (fold or 0) // folds, len(free) * ((fold or 0) + 1) // folds)
    else:
        length = round(validation_fraction * len(free))
        if validation_fraction > 0 and len(free) > 1:
            length = max(length, 1)
        start = len(free) - length
        if named:
            length = max(length, named[-1] + 1 - named[0])
            start = min(named[0], len(free) - length)
        end = start + length
    chosen = set(free[start:end])
    return {c: "validation" if c in chosen else splits.get(c, "training") for c in cases}


def runs(splits: Mapping[str, str], cases: Sequence[str]) -> dict[str, str]:
    """Name the run of each case, which is the neighbours in one split: ``<first>..<last>``."""
    groups: dict[str, str] = {}
    for _, run in groupby(cases, splits.__getitem__):
        names = list(run)
        groups.update(dict.fromkeys(names, f"{names[0]}..{names[-1]}" if len(names) > 1 else names[0]))
    return groups


def check_options(
    validation_fraction: float, validation_cases: Collection[str], split: Any, folds: int | None, fold: int | None
) -> None:
    """Fail when the options of a split contradict each other or are out of range."""
    if not 0 <= validation_fraction <= 1:
        fail(f"validation_fraction must be between 0 and 1, got {validation_fraction}")
    if (folds is None) != (fold is None):
        fail(f"folds and fold go together, got folds={folds} and fold={fold}")
    if folds is not None and folds < 2:
        fail(f"folds must be 2 or more, got {folds}")
    if folds is not None and fold is not None and not 0 <= fold < folds:
        fail(f"fold must be 0 to {folds - 1} with {folds} folds, got {fold}")
    if split is not None and (validation_cases or folds is not None):
        fail("a split says where every case goes: leave out validation cases and folds")


def read_split(split: str | os.PathLike | Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Read an exact split, a JSON file or a dictionary of lists; return the split of each name in it."""
    if not isinstance(split, Mapping):
        try:
            split = read_json(split)
        except (OSError, ValueError) as error:
            fail(f"cannot read the split {split}: {error}")
    if not isinstance(split, Mapping) or not set(split) <= set(SPLITS) or not any(split.values()):
        seen = sorted(split) if isinstance(split, Mapping) else type(split).__name__
        fail(f"a split is a JSON object with lists of case names under {', '.join(SPLITS)}, got {seen}")
    splits: dict[str, str] = {}
    for key, names in split.items():
        if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(n, str) for n in names):
            fail(f"{key} of the split must be a list of case names, got {names!r}")
        for name in names:
            if name in splits:
                fail(f"case {name!r} is twice in the split: in {splits[name]} and in {key}")
            splits[name] = key
    return splits


def expand(splits: Mapping[str, str], groups: Mapping[str, str], who: str) -> dict[str, str]:
    """Replace each group's name by its cases.

    Args:
        splits: the split of each case or group.
        groups: group of each case.
        who: start of the message about a name that is neither.
    """
    members = _members(groups)
    _check_names(splits, {*groups, *members}, who)
    expanded: dict[str, str] = {}
    for name, split in splits.items():
        for case in [name] if name in groups else members[name]:
            if expanded.setdefault(case, split) != split:
                fail(f"case {case!r} is twice in the split: in {expanded[case]} and in {split}")
    return expanded


def _check_names(names: Iterable[str], known: Collection[str], who: str) -> None:
    unknown = [n for n in names if n not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        fail(f"{who} cases that are not in the source: {shorten(unknown)}{hint}")


def check_groups(groups: Mapping[str, str], splits: Mapping[str, str]) -> None:
    """Fail when a group is in two splits."""
    texts = []
    for cases in _members(groups).values():
        if len({splits[case] for case in cases}) > 1:
            by_split = _members({case: splits[case] for case in cases})
            texts.append(", ".join(f"{shorten(names)} in {split}" for split, names in by_split.items()))
    if texts:
        fail(
            "groups (same patient, or the same image, label or object) cross the split: "
            f"{'; '.join(texts[:5])}{'; ...' if len(texts) > 5 else ''}. Put each in one split"
        )


def _members(groups: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the cases of each group."""
    members: dict[str, list[str]] = defaultdict(list)
    for case, group in sorted(groups.items(), key=lambda pair: natural(pair[0])):
        members[group].append(case)
    return members


def natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts 2 before 10; names with equal numbers still differ by their last part."""
    parts = re.split("([0-9]+)", name)
    return [(int(part) if i % 2 else 0, "" if i % 2 else part) for i, part in enumerate(parts)] + [(0, name)]


def shorten(names: Sequence[str], most: int = 5) -> str:
    """Return names in one line, at most ``most`` of them: ``A, B and 7 more``."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
