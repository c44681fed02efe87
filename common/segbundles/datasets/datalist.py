"""What all data sets share: checks gathered into one table, splits by group, and the datalist.json they end in.

A datalist is the Decathlon format: descriptive keys beside ``training``, ``validation`` and ``testing``, each a list of
entries ``image``, ``label`` (paths relative to the datalist's folder) and ``group``; further keys of an entry, such as
``spacing_mm``, are facts that the files themselves do not state.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segbundles.files import atomic_path

if TYPE_CHECKING:
    import numpy as np

DATALIST_NAME = "datalist.json"
SECTIONS = ("training", "validation", "testing")
_COUNTS = {"numTraining": "training", "numValidation": "validation", "numTest": "testing"}


@dataclass(frozen=True)
class Case:
    """One case of a data set, before its files are opened.

    Args:
        name: unique in the data set; what split files and ``--validation-case`` name, as well as its group.
        image: image file.
        label: label file, or None for a test case without truth.
        group: patient, video or stack; a group never crosses a split.
        section: the section that the publisher's layout fixes, or None.
        page: page of a file that holds many images, from 0; None is a file of one.
    """

    name: str
    image: Path
    label: Path | None
    group: str
    section: str | None = None
    page: int | None = None


@dataclass(frozen=True)
class Fault:
    """One thing wrong with one file of a case.

    Args:
        case: name of the case.
        file: the file.
        problem: what is wrong with it.
        group: group of the case; None is a case that is a group by itself.
    """

    case: str
    file: Path
    problem: str
    group: str | None = None


@dataclass
class Checked:
    """What opening a case's files found.

    Args:
        faults: all that is wrong; empty for a good case.
        image_hash: hash of the decoded image; cases with equal hashes fall in one group. None takes no part.
        label_hash: the same of the decoded label.
        extra: further keys of the case's datalist entry.
        facts: figures (tuples of numbers, summed up as ranges) and words (counted) that describe the case.
    """

    faults: list[Fault] = field(default_factory=list)
    image_hash: str | None = None
    label_hash: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, tuple[float, ...] | str] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSet:
    """How one data set is laid out and checked.

    Args:
        name: goes into the datalist, and marks the datalist as this data set's.
        metadata: descriptive keys of the datalist (description, reference, licence, modality, labels ...).
        find: finds the cases under a source folder, and the faults of the layout (missing pairs).
        check: opens and checks one case.
        review: looks at the checked cases side by side, given the source folder; returns faults and notes.
        units: what a case and a group are, in the plural, such as slices and patients.
        contiguous: whether cases follow one another and neighbours look alike: validation is then one run of them,
            and groups are the runs of neighbours that the split left together.
    """

    name: str
    metadata: Mapping[str, Any]
    find: Callable[[Path], tuple[list[Case], list[Fault]]]
    check: Callable[[Case], Checked]
    review: Callable[[Path, Sequence[Case], Mapping[str, Checked]], tuple[list[Fault], list[str]]] | None = None
    units: tuple[str, str] = ("cases", "groups")
    contiguous: bool = False


@dataclass(frozen=True)
class Prepared:
    """What `prepare` or `merge` wrote.

    Args:
        path: the datalist.json.
        datalist: its contents.
        notes: what the user should know, such as duplicates found.
        facts: summary of the cases, name to text.
        units: what a case and a group are, as in `DataSet`.
    """

    path: Path
    datalist: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    units: tuple[str, str] = ("cases", "groups")


class DataFaults(ValueError):  # noqa: N818
    """All faults of a data set at once.

    Args:
        faults: what is wrong, file by file.
        source: the folder that was read; paths in the message are relative to it.
    """

    def __init__(self, faults: Sequence[Fault], source: Path) -> None:
        self.faults = sorted(faults, key=lambda f: (_natural(f.case), str(f.file)))
        self.source = source
        self.summary = (
            f"{len(faults)} fault{'s' if len(faults) > 1 else ''} in {source}, nothing was written. Mend or remove "
            "these files, or leave their cases out with --split"
        )
        super().__init__("\n".join([self.summary, *(f"{self.shown(f)}: {f.problem}" for f in self.faults)]))

    def shown(self, fault: Fault) -> str:
        """Return the file of a fault as a path relative to the source."""
        return os.path.relpath(fault.file, self.source)


def prepare(
    data_set: DataSet,
    source: str | os.PathLike,
    out: str | os.PathLike,
    validation_fraction: float = 0.2,
    seed: int = 0,
    validation_cases: Collection[str] = (),
    split: str | os.PathLike | Mapping[str, Sequence[str]] | None = None,
    folds: int | None = None,
    fold: int | None = None,
    track: Callable[[Sequence[Case]], Iterable[Case]] = iter,
) -> Prepared:
    """Check a data set and write its datalist.json; files are referenced, never copied.

    Every case is opened and checked before anything is written. Cases with an identical image or an identical label
    are joined in one group. Entries are in natural order (2 before 10) of group and case.

    Args:
        data_set: layout and checks, from `get_data_set`.
        source: folder in the publisher's layout.
        out: folder of the datalist.json.
        validation_fraction: part of the cases (not fixed by the publisher as test cases) for validation, 0 to 1.
        seed: the draw of the groups; the same seed and cases give the same split. Contiguous cases are not drawn, see
            `split_runs`.
        validation_cases: cases, or whole groups, that go to validation with their group, whatever is drawn; they count
            in the fraction.
        split: exact split: lists of names by section, or a JSON file of them. A name is a case's, or a group's for all
            its cases; a case of that name goes first. Cases in no list are left out.
        folds: number of parts for cross-validation, instead of ``validation_fraction``.
        fold: the part that is validation, from 0.
        track: wraps the cases while they are checked, for a progress bar.

    Returns:
        What was written, with notes and a summary of the cases.

    Raises:
        DataFaults: (a ValueError) when any file has a fault; it holds all of them.
        ValueError: when the source has no case, the split does not fit, or ``out`` cannot be written.
    """
    source, out = _resolve(source), _resolve(out)
    if not source.is_dir():
        raise ValueError(f"source {source} is not a folder")
    check_out(out, data_set.name)
    _check_split_options(validation_fraction, validation_cases, split, folds, fold)

    cases, faults = data_set.find(source)
    owners = {f.case: f.group or f.case for f in faults} | {c.name: c.group for c in cases}
    notes = []
    if split is not None:
        sections = _expand(_read_split(split), owners, "the split names")
        if left_out := sorted(set(owners) - set(sections), key=_natural):
            notes.append(
                f"{len(left_out)} {data_set.units[0]} are in no list of the split and left out: {shorten(left_out)}"
            )
        cases = [c for c in cases if c.name in sections]
        faults = [f for f in faults if f.case in sections]
    else:
        sections = {}
        validation_cases = _expand(dict.fromkeys(validation_cases, "validation"), owners, "--validation-case names")

    cases = sorted(cases, key=lambda c: (_natural(c.group), _natural(c.name)))
    faults += [Fault(b.name, b.image, f"is a second case {b.name}") for a, b in pairwise(cases) if a.name == b.name]
    checked = {c.name: data_set.check(c) for c in track(cases)}
    faults = faults + [f for result in checked.values() for f in result.faults]
    if data_set.review is not None:
        found, remarks = data_set.review(source, cases, checked)
        faults, notes = faults + found, notes + remarks
    if faults:
        raise DataFaults(faults, source)

    groups, duplicates = _group(cases, checked)
    notes += duplicates
    if split is None:
        fixed = {c.name: c.section for c in cases if c.section is not None}
        for name in validation_cases:
            if fixed.setdefault(name, "validation") != "validation":
                raise ValueError(f"case {name!r} cannot go to validation: the publisher's layout says {fixed[name]}")
        if data_set.contiguous:
            sections = split_runs(list(groups), fixed, validation_fraction, folds, fold)
        else:
            sections = split_cases(groups, fixed, validation_fraction, seed, folds, fold)
    if split is not None or data_set.contiguous:
        _check_groups(groups, sections)
    if data_set.contiguous:
        groups = _runs(sections, [c.name for c in cases])

    datalist: dict[str, Any] = {"name": data_set.name, **data_set.metadata, **{s: [] for s in SECTIONS}}
    for case in cases:
        section = sections[case.name]
        if case.label is None and section != "testing":
            raise ValueError(f"case {case.name!r} has no label and cannot go to {section}: list it in testing")
        entry: dict[str, Any] = {"case": case.name, "image": _relative(case.image, out)}
        if case.label is not None:
            entry["label"] = _relative(case.label, out)
        if case.page is not None:
            entry["page"] = case.page
        datalist[section].append({**entry, "group": groups[case.name], **checked[case.name].extra})
    notes += [f"{section} is empty" for section in ("training", "validation") if not datalist[section]]
    path = write_datalist(datalist, out)
    facts = _summarize([checked[c.name].facts for c in cases])
    return Prepared(path, _read_datalist(out), notes, facts, data_set.units)


def merge(sources: Sequence[str | os.PathLike], out: str | os.PathLike) -> Prepared:
    """Join the datalists of prepared folders into one; sections are kept, groups get the data set's name in front.

    Args:
        sources: folders with a datalist.json each.
        out: folder of the joined datalist.json; paths are rewritten relative to it.

    Returns:
        What was written; an image that occurs twice in one section is kept once, with a note.

    Raises:
        ValueError: when a datalist or a file is missing, labels differ, or an image or a group occurs in two sections.
    """
    folders, out = [_resolve(s) for s in sources], _resolve(out)
    if len(folders) < 2:
        raise ValueError(f"merge needs two prepared folders or more, got {len(folders)}")
    if out in folders:
        raise ValueError(f"{out} is one of the folders to merge: choose another --out")
    datalists = [_read_datalist(folder) for folder in folders]
    names = [datalist["name"] for datalist in datalists]
    name = "+".join(dict.fromkeys(names))
    check_out(out, name)
    labels = datalists[0].get("labels")
    for folder, datalist in zip(folders, datalists, strict=True):
        if datalist.get("labels") != labels:
            raise ValueError(
                f"labels differ: {labels} in {folders[0]}, {datalist.get('labels')} in {folder}: such data sets cannot "
                "train one network"
            )

    texts = defaultdict(list)
    for datalist in datalists:
        for key, value in datalist.items():
            if key not in (*SECTIONS, *_COUNTS, "name", "labels"):
                texts[key].append(value)
    metadata = {key: _join_texts(values) for key, values in texts.items()}
    merged: dict[str, Any] = {"name": name, **metadata, "labels": labels, **{s: [] for s in SECTIONS}}
    seen: dict[tuple[str, int | None], str] = {}
    group_sections: dict[str, str] = {}
    notes, missing = [], []
    for folder, datalist in zip(folders, datalists, strict=True):
        for section in SECTIONS:
            for entry in datalist.get(section, []):
                paths = {key: folder / entry[key] for key in ("image", "label") if key in entry}
                missing += [str(p) for p in paths.values() if not p.is_file()]
                image = os.path.realpath(paths["image"])
                first = seen.setdefault((image, entry.get("page")), section)
                if first != section:
                    raise ValueError(f"{image} is in {first} of one data set and in {section} of another")
                group = f"{datalist['name']}/{entry['group']}"
                if group_sections.setdefault(group, section) != section:
                    raise ValueError(f"group {group!r} is in both {group_sections[group]} and {section}")
                paths = {key: _relative(Path(os.path.normpath(path)), out) for key, path in paths.items()}
                if any(
                    paths["image"] == other["image"] and entry.get("page") == other.get("page")
                    for other in merged[section]
                ):
                    notes.append(f"{paths['image']} occurs twice in {section}: kept once")
                else:
                    merged[section].append({**entry, **paths, "group": group})
    if missing:
        raise ValueError(f"{len(missing)} files are missing, prepare their folder again: {shorten(missing)}")
    path = write_datalist(merged, out)
    return Prepared(path, _read_datalist(out), notes)


def split_cases(
    groups: Mapping[str, str],
    fixed: Mapping[str, str] | None = None,
    validation_fraction: float = 0.2,
    seed: int = 0,
    folds: int | None = None,
    fold: int | None = None,
) -> dict[str, str]:
    """Split cases into training and validation so that no group is in both.

    Groups are shuffled by ``seed`` and taken for validation while they fit into its share. With ``folds`` they are
    dealt, in that order, each to the smallest part so far.

    Args:
        groups: case name to group.
        fixed: cases with a given section; their group follows them.
        validation_fraction: share of validation among the cases that are not testing, fixed cases included.
        seed: seed of the shuffle.
        folds: number of parts for cross-validation.
        fold: the part that is validation, from 0.

    Returns:
        Case name to section.

    Raises:
        ValueError: when fixed cases pull one group in two sections, or there are fewer groups than folds.
    """
    members: dict[str, list[str]] = defaultdict(list)
    for case, group in sorted(groups.items()):
        members[group].append(case)
    group_section: dict[str, str] = {}
    for case, section in (fixed or {}).items():
        group = groups[case]
        if (other := group_section.setdefault(group, section)) != section:
            others = shorten([c for c in members[group] if fixed.get(c) == other])
            raise ValueError(
                f"case {case} of {section} and {others} of {other} form one group (same patient, or identical images "
                f"or labels) and cannot be both in {other} and {section}: give a split that lists them in one section, "
                "or not at all"
            )
    free = [g for g in sorted(members) if g not in group_section]
    random.Random(seed).shuffle(free)

    if folds is not None:
        if len(free) < folds:
            raise ValueError(f"{folds} folds need {folds} groups or more, found {len(free)}")
        parts: list[list[str]] = [[] for _ in range(folds)]
        sizes = [0] * folds
        for group in free:
            smallest = sizes.index(min(sizes))
            parts[smallest].append(group)
            sizes[smallest] += len(members[group])
        chosen = set(parts[fold or 0])
    else:
        taken = sum(len(members[g]) for g, s in group_section.items() if s == "validation")
        share = round(validation_fraction * (taken + sum(len(members[g]) for g in free)))
        chosen = set()
        for group in free:
            if taken + len(members[group]) <= share:
                chosen.add(group)
                taken += len(members[group])
        if validation_fraction > 0 and taken == 0 and len(free) > 1:
            chosen.add(min(free, key=lambda g: len(members[g])))
    return {
        case: group_section.get(group, "validation" if group in chosen else "training")
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

    It is the last share of them; where cases are fixed for validation, the last run of that length that holds them all
    (longer where they lie further apart). Folds are equal runs, in order. Nothing is drawn.

    Args:
        cases: names, in the order in which they follow one another.
        fixed: cases with a given section; those of testing are left out of the runs.
        validation_fraction: share of validation among the cases that are not testing.
        folds: number of runs for cross-validation.
        fold: the run that is validation, from 0.

    Returns:
        Case name to section.

    Raises:
        ValueError: when there are fewer cases than folds, or folds and cases fixed for validation.
    """
    sections = dict(fixed or {})
    free = [c for c in cases if sections.get(c, "validation") == "validation"]
    named = [i for i, c in enumerate(free) if c in sections]
    if folds is not None:
        if named:
            raise ValueError(
                f"{free[named[0]]!r} cannot be given to validation with folds, which are runs of neighbours: choose "
                "the fold that holds it"
            )
        if len(free) < folds:
            raise ValueError(f"{folds} folds need {folds} cases or more, found {len(free)}")
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
    return {c: "validation" if c in chosen else sections.get(c, "training") for c in cases}


def _runs(sections: Mapping[str, str], cases: Sequence[str]) -> dict[str, str]:
    """Return case name to the name of its run, the neighbours in one section: ``<first>..<last>``."""
    groups: dict[str, str] = {}
    for _, run in groupby(cases, sections.__getitem__):
        names = list(run)
        groups.update(dict.fromkeys(names, f"{names[0]}..{names[-1]}" if len(names) > 1 else names[0]))
    return groups


def write_datalist(datalist: Mapping[str, Any], out: str | os.PathLike) -> Path:
    """Write ``out/datalist.json`` in one step, one entry a line; numbers of cases are filled in.

    Args:
        datalist: descriptive keys and sections.
        out: its folder, made if it is not there.

    Returns:
        The path of the file.

    Raises:
        ValueError: when the folder cannot be written.
    """
    out = _resolve(out)
    counts = {key: len(datalist.get(section, [])) for key, section in _COUNTS.items()}
    head = {key: value for key, value in datalist.items() if key not in SECTIONS and key not in counts}
    lines = [f" {_dumps(key)}: {_dumps(value)}" for key, value in {**head, **counts}.items()]
    for section in SECTIONS:
        entries = ",\n".join(f"  {_dumps(entry)}" for entry in datalist.get(section, []))
        lines.append(f' "{section}": [\n{entries}\n ]' if entries else f' "{section}": []')
    path = out / DATALIST_NAME
    with atomic_path(path) as part:
        part.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return path


def check_out(out: Path, name: str) -> None:
    """Check, before long work, that ``out`` can be written and holds no other data set's datalist.

    Args:
        out: output folder, there or not.
        name: data set that is to be written.

    Raises:
        ValueError: when it cannot be written, or its datalist.json was not written for the same data set.
    """
    nearest = next(p for p in (out, *out.parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"cannot write to {out}: {nearest} is not a writable folder; choose another --out")
    path = out / DATALIST_NAME
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["name"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found != name:
        what = f"belongs to data set {found!r}" if found is not None else "was not written by segbundles"
        raise ValueError(f"{path} {what} and is not overwritten with {name!r}: choose another --out or remove it")


def _check_split_options(
    validation_fraction: float, validation_cases: Collection[str], split: Any, folds: int | None, fold: int | None
) -> None:
    if not 0 <= validation_fraction <= 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, got {validation_fraction}")
    if (folds is None) != (fold is None):
        raise ValueError(f"folds and fold go together, got folds={folds} and fold={fold}")
    if folds is not None and folds < 2:
        raise ValueError(f"folds must be 2 or more, got {folds}")
    if folds is not None and fold is not None and not 0 <= fold < folds:
        raise ValueError(f"fold counts from 0 to {folds - 1} with {folds} folds, got {fold}")
    if split is not None and (validation_cases or folds is not None):
        raise ValueError("a split says where every case goes: leave out validation cases and folds")


def _read_split(split: str | os.PathLike | Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return case name to section."""
    if not isinstance(split, Mapping):
        try:
            split = json.loads(Path(split).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the split {split}: {error}") from error
    if not isinstance(split, Mapping) or not set(split) <= set(SECTIONS) or not any(split.values()):
        seen = sorted(split) if isinstance(split, Mapping) else type(split).__name__
        raise ValueError(f"a split is a JSON object with lists of case names under {', '.join(SECTIONS)}, got {seen}")
    sections: dict[str, str] = {}
    for section, names in split.items():
        if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"{section} of the split must be a list of case names, got {names!r}")
        for name in names:
            if name in sections:
                raise ValueError(f"case {name!r} is twice in the split: in {sections[name]} and in {section}")
            sections[name] = section
    return sections


def _expand(sections: Mapping[str, str], groups: Mapping[str, str], who: str) -> dict[str, str]:
    """Return case name to section, with each group's name replaced by its cases."""
    members: dict[str, list[str]] = defaultdict(list)
    for case, group in groups.items():
        members[group].append(case)
    _check_names(sections, {*groups, *members}, who)
    expanded: dict[str, str] = {}
    for name, section in sections.items():
        for case in [name] if name in groups else members[name]:
            if expanded.setdefault(case, section) != section:
                raise ValueError(f"case {case!r} is twice in the split: in {expanded[case]} and in {section}")
    return expanded


def _check_names(names: Iterable[str], known: Collection[str], who: str) -> None:
    unknown = [n for n in names if n not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{who} cases that are not in the source: {shorten(unknown)}{hint}")


def _check_groups(groups: Mapping[str, str], sections: Mapping[str, str]) -> None:
    members: dict[str, dict[str, str]] = defaultdict(dict)
    for case, group in groups.items():
        members[group][case] = sections[case]
    crossing = [found for found in members.values() if len(set(found.values())) > 1]
    if crossing:
        texts = []
        for found in crossing:
            by_section: dict[str, list[str]] = defaultdict(list)
            for case, section in found.items():
                by_section[section].append(case)
            texts.append(", ".join(f"{shorten(names)} in {section}" for section, names in by_section.items()))
        raise ValueError(
            "groups (same patient, or identical images or labels) cross the split: "
            f"{'; '.join(texts[:5])}{'; ...' if len(texts) > 5 else ''}. Put each in one section"
        )


def _group(cases: Sequence[Case], checked: Mapping[str, Checked]) -> tuple[dict[str, str], list[str]]:
    """Join the groups of cases with identical files; return case name to group, and notes on what was joined."""
    parent = {c.group: c.group for c in cases}

    def root(group: str) -> str:
        while parent[group] != group:
            group = parent[group]
        return group

    notes = []
    for kind in ("image", "label"):
        same: dict[str, list[Case]] = defaultdict(list)
        for case in cases:
            if (digest := getattr(checked[case.name], f"{kind}_hash")) is not None:
                same[digest].append(case)
        across: dict[frozenset[str], list[str]] = defaultdict(list)
        for found in same.values():
            roots = {root(c.group) for c in found}
            for group in roots:
                parent[group] = min(roots)
            if len(own := frozenset(c.group for c in found)) > 1:
                across[own] += [c.name for c in found]
        notes += [f"identical {kind}s: {shorten(names)} (one group)" for names in across.values()]
    return {c.name: root(c.group) for c in cases}, notes


def _summarize(facts: Sequence[Mapping[str, tuple[float, ...] | str]]) -> dict[str, str]:
    """Sum up the facts of all cases: ranges of figures, counts of words."""
    values: dict[str, list] = defaultdict(list)
    for case in facts:
        for key, value in case.items():
            values[key].append(value)
    summary = {}
    for key, found in values.items():
        if isinstance(found[0], str):
            summary[key] = ", ".join(f"{word} ({n})" for word, n in Counter(found).most_common())
        else:
            ranges = [(min(axis), max(axis)) for axis in zip(*found, strict=True)]
            summary[key] = " x ".join(f"{a:.4g}" if a == b else f"{a:.4g}-{b:.4g}" for a, b in ranges)
    return summary


def _read_datalist(folder: Path) -> dict[str, Any]:
    path = folder / DATALIST_NAME
    if not path.is_file():
        raise ValueError(f"{path} is missing: make it with `segbundles prepare`")
    try:
        datalist = json.loads(path.read_text(encoding="utf-8"))
        entries = [entry for section in SECTIONS for entry in datalist.get(section, [])]
        if (
            not entries
            or not isinstance(datalist["name"], str)
            or not all({"image", "group"} <= set(e) for e in entries)
        ):
            raise ValueError("name or entries with image and group are missing")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a datalist of `segbundles prepare`: {error}") from error
    return datalist


def _join_texts(values: Sequence[Any]) -> Any:
    distinct = [v for i, v in enumerate(values) if v not in values[:i]]
    if len(distinct) == 1:
        return distinct[0]
    if all(isinstance(v, dict) for v in distinct):
        keys = dict.fromkeys(key for v in distinct for key in v)
        return {key: _join_texts([v[key] for v in distinct if key in v]) for key in keys}
    return "; ".join(str(v) for v in distinct)


def _resolve(path: str | os.PathLike) -> Path:
    return Path(path).expanduser().resolve()


def _relative(path: Path, out: Path) -> str:
    return Path(os.path.relpath(path, out)).as_posix()


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts 2 before 10; names that read alike still differ by their last part."""
    parts = re.split("([0-9]+)", name)
    return [(int(part) if i % 2 else 0, "" if i % 2 else part) for i, part in enumerate(parts)] + [(0, name)]


def array_hash(array: np.ndarray) -> str:
    """Return a hash of an array's shape and values."""
    digest = hashlib.sha256(str(array.shape).encode())
    digest.update(array.tobytes())
    return digest.hexdigest()


def is_marked_tiff(path: Path, mark: str) -> bool:
    """Whether a file, no link, is a TIFF whose description is a phantom's mark."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            return not path.is_symlink() and file.pages[0].description == mark
    except Exception:  # tifffile raises anything from struct.error to ValueError on what is no TIFF
        return False


def shorten(names: Sequence[str], most: int = 5) -> str:
    """Return names in one line, at most ``most`` of them: ``A, B and 7 more``."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
