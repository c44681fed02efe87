"""What all data sets share: all faults in one table, splits by group, and the datalist.json that is written.

A datalist is in Decathlon format: descriptive keys, and under ``training``, ``validation`` and ``testing`` one list of
entries each. An entry has ``image``, ``label`` (paths relative to the datalist's folder), ``group`` and ``case``;
further keys of an entry, such as ``spacing_mm``, are facts that the files themselves do not contain.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from segbundles.errors import InputError, fail
from segbundles.files import DATALIST_NAME, atomic_path, read_json, shown

from .splits import (
    SPLITS,
    check_groups,
    check_options,
    expand,
    natural,
    read_split,
    runs,
    shorten,
    split_cases,
    split_runs,
)

CONVERTED = "converted_labels"
_OBJECT = "the same object in another crop"
_COUNTS = {"numTraining": "training", "numValidation": "validation", "numTest": "testing"}


@dataclass(frozen=True)
class Case:
    """One case of a data set, before its files are opened.

    Args:
        name: unique in the data set; split files and ``--validation-case`` use it, or the name of the group.
        image: image file, or the files of its channels.
        label: label file, or None for a test case without truth.
        group: patient, video or stack; a group is never in two splits.
        split: the split that the publisher's layout fixes, or None.
        page: page of a file that contains many images, from 0; None is a file with one image.
    """

    name: str
    image: Path | tuple[Path, ...]
    label: Path | None
    group: str
    split: str | None = None
    page: int | None = None

    @property
    def images(self) -> tuple[Path, ...]:
        """The files of the image: one, or one per channel."""
        return self.image if isinstance(self.image, tuple) else (self.image,)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of image and label."""
        return self.images if self.label is None else (*self.images, self.label)


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with one file of a case.

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
    """What was found in the files of a case.

    Args:
        faults: all that is wrong; empty for a good case.
        image_hash: hash of the decoded image; cases with equal hashes form one group. None is never compared.
        label_hash: the same for the decoded label.
        object_hashes: hashes of label and image inside the box around the object, which find it in another crop too;
            cases that have one in common form one group.
        extra: further keys of the case's datalist entry.
        facts: figures (tuples of numbers, summed up as ranges) and words (counted) that describe the case.
        label_file: contents of a compressed NIfTI file with the label, where training cannot read the file that there
            is; `prepare` writes it below its output folder.
    """

    faults: list[Fault] = field(default_factory=list)
    image_hash: str | None = None
    label_hash: str | None = None
    object_hashes: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, tuple[float, ...] | str] = field(default_factory=dict)
    label_file: bytes | None = None


@dataclass(frozen=True)
class DataSet:
    """How one data set is laid out and checked.

    Args:
        name: name of the data set; the datalist keeps it.
        metadata: descriptive keys of the datalist (description, reference, licence, modality, labels ...).
        find: finds the cases under a source folder, and the faults of the layout (missing pairs).
        check: opens and checks one case.
        review: compares the checked cases with each other, given the source folder; returns faults and notes.
        units: what a case and a group are called, in the plural, such as slices and patients.
        contiguous: whether cases follow one another and neighbours look alike. Validation is then one run of them, and
            groups are the runs of neighbours that the split left together.
        summary: one line about the data set and its layout, for the command line.
        further_files: names of files and folders in the source that belong to no case but are read or need no note.
        options: takes the data set's own options and returns the data set read with them. Each parameter, annotated
            with its type and help text, becomes an option of ``segbundles prepare <name>``.
    """

    name: str
    metadata: Mapping[str, Any]
    find: Callable[[Path], tuple[list[Case], list[Fault]]]
    check: Callable[[Case], Checked]
    review: Callable[[Path, Sequence[Case], Mapping[str, Checked]], tuple[list[Fault], list[str]]] | None = None
    units: tuple[str, str] = ("cases", "groups")
    contiguous: bool = False
    summary: str = ""
    further_files: tuple[str, ...] = ()
    options: Callable[..., DataSet] | None = None


@dataclass(frozen=True)
class Prepared:
    """What `prepare` or `merge` wrote.

    Args:
        path: the datalist.json.
        datalist: its contents.
        notes: what the user should know, such as duplicates found.
        facts: summary of the cases, text by name.
        units: what a case and a group are called, as in `DataSet`.
    """

    path: Path
    datalist: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    units: tuple[str, str] = ("cases", "groups")


class DataFaults(InputError):  # noqa: N818
    """All faults of a data set at once.

    Args:
        faults: what is wrong, file by file.
        source: the folder that was read; paths in the message are relative to it.
    """

    def __init__(self, faults: Sequence[Fault], source: Path) -> None:
        self.faults = sorted(faults, key=lambda f: (natural(f.case), str(f.file)))
        self.source = source
        self.summary = (
            f"{len(faults)} fault{'s' if len(faults) > 1 else ''} in {source}, nothing was written. Fix or remove "
            "these files, or leave their cases out with --split"
        )
        super().__init__("\n".join([self.summary, *(f"{self.shown(f)}: {f.problem}" for f in self.faults)]))

    def shown(self, fault: Fault) -> str:
        """Return the file of a fault as a path relative to the source."""
        return shown(os.path.relpath(fault.file, self.source))


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

    Every case is opened and checked before anything is written. A label that training cannot read, such as a
    segmentation of 3D Slicer, is written anew below ``out``. Cases with an identical image or an identical label, or
    with the same object in another crop, are joined in one group. Files under ``source`` that belong to no case are
    named in a note. Entries are in natural order (2 before 10) of group and case.

    Args:
        data_set: layout and checks, from `get_data_set`.
        source: folder in the publisher's layout.
        out: folder of the datalist.json.
        validation_fraction: part of the cases (not fixed by the publisher as test cases) for validation, 0 to 1.
        seed: seed of the draw; the same seed and cases give the same split. Contiguous cases are not drawn, see
            `split_runs`.
        validation_cases: cases, or whole groups, that always go to validation with their group; they count in the
            fraction.
        split: exact split: lists of names by split, or a JSON file with them. A name is that of a case, or of a group
            for all its cases; if both exist it is the case. Cases in no list are left out.
        folds: number of parts for cross-validation, instead of ``validation_fraction``.
        fold: the part that is validation, from 0.
        track: wraps the cases while they are checked, for a progress bar.

    Returns:
        What was written, with notes and a summary of the cases.

    Raises:
        DataFaults: (a ValueError) when any file has a fault; it contains all of them.
        ValueError: when the source has no case, the split does not fit, or ``out`` cannot be written.
    """
    source, out = _resolve(source), _resolve(out)
    if not source.is_dir():
        fail(f"source {source} is not a folder")
    check_out(out, data_set.name)
    check_options(validation_fraction, validation_cases, split, folds, fold)

    cases, faults = data_set.find(source)
    owners = {f.case: f.group or f.case for f in faults} | {c.name: c.group for c in cases}
    notes = _left_out(data_set, source, out, cases, faults)
    if unnamed := [c.name for c in cases if any(shown(p) != str(p) for p in c.files)]:
        notes.append(
            f"{len(unnamed)} {data_set.units[0]} are left out, because their names contain bytes that are not UTF-8 "
            f"(rename them): {shorten([shown(name) for name in unnamed])}"
        )
        cases = [c for c in cases if c.name not in unnamed]
        if not cases:
            fail(f"no case is left in {source}: {notes[-1]}")
    splits: dict[str, str] = {}
    if split is not None:
        splits = expand(read_split(split), owners, "the split names")
        if left_out := sorted(set(owners) - set(splits), key=natural):
            notes.append(f"{data_set.units[0]} left out, because no list of the split names them: {shorten(left_out)}")
        cases = [c for c in cases if c.name in splits]
        faults = [f for f in faults if f.case in splits]
    else:
        validation_cases = expand(dict.fromkeys(validation_cases, "validation"), owners, "--validation-case names")

    cases = sorted(cases, key=lambda c: (natural(c.group), natural(c.name)))
    faults += [Fault(b.name, b.images[0], f"is a second case {b.name}") for a, b in pairwise(cases) if a.name == b.name]
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
        fixed = {c.name: c.split for c in cases if c.split is not None}
        for name in validation_cases:
            if fixed.setdefault(name, "validation") != "validation":
                fail(f"case {name!r} cannot go to validation: the publisher's layout says {fixed[name]}")
        if data_set.contiguous:
            splits = split_runs(list(groups), fixed, validation_fraction, folds, fold)
        else:
            splits = split_cases(groups, fixed, validation_fraction, seed, folds, fold)
    if split is not None or data_set.contiguous:
        check_groups(groups, splits)
    if data_set.contiguous:
        groups = runs(splits, [c.name for c in cases])

    datalist: dict[str, Any] = {"name": data_set.name, **data_set.metadata, **{s: [] for s in SPLITS}}
    for case in cases:
        if case.label is None and splits[case.name] != "testing":
            fail(f"case {case.name!r} has no label and cannot go to {splits[case.name]}: list it in testing")
        images = [_relative(path, out) for path in case.images]
        entry: dict[str, Any] = {"case": case.name, "image": images[0] if len(images) == 1 else images}
        if case.label is not None:
            entry["label"] = _relative(_written_label(case, checked[case.name], out), out)
        if case.page is not None:
            entry["page"] = case.page
        datalist[splits[case.name]].append({**entry, "group": groups[case.name], **checked[case.name].extra})
    notes += [f"{name} is empty" for name in ("training", "validation") if not datalist[name]]
    notes += _few_groups(datalist["validation"], data_set.units)
    path = write_datalist(datalist, out)
    facts = _summarize([checked[c.name].facts for c in cases])
    return Prepared(path, _read_datalist(out), notes, facts, data_set.units)


def _written_label(case: Case, found: Checked, out: Path) -> Path:
    """Return the label file that training reads, and write it first if it had to be converted."""
    if found.label_file is None:
        return case.label
    path = out / CONVERTED / f"{case.name}.nii.gz"
    with atomic_path(path) as part:
        part.write_bytes(found.label_file)
    return path


def merge(sources: Sequence[str | os.PathLike], out: str | os.PathLike) -> Prepared:
    """Join the datalists of folders; splits are kept, and each group gets its data set's name in front.

    A list by hand that has no name gets that of its folder, and one without labels has those of the others. Labels of
    the same numbers are the same classes: the names of the first list are kept.

    Args:
        sources: folders with a datalist.json each.
        out: folder of the joined datalist.json; paths are rewritten relative to it.

    Returns:
        What was written; an image that occurs twice in one split is kept once. Notes say so, and what was assumed.

    Raises:
        ValueError: when a datalist or a file is missing, no list has labels or their numbers differ, or an image or a
            group is in two splits.
    """
    folders, out = [_resolve(s) for s in sources], _resolve(out)
    if len(folders) < 2:
        fail(f"merge needs two folders or more with a datalist.json, got {len(folders)}")
    if out in folders:
        fail(f"{out} is one of the folders to merge: choose another --out")
    datalists = [_read_datalist(folder) for folder in folders]
    name = "+".join(dict.fromkeys(datalist["name"] for datalist in datalists))
    check_out(out, name)
    labels, notes = _common_labels(folders, datalists)
    texts = defaultdict(list)
    for datalist in datalists:
        for key, value in datalist.items():
            if key not in (*SPLITS, *_COUNTS, "name", "labels"):
                texts[key].append(value)
    metadata = {key: _join_texts(values) for key, values in texts.items()}
    merged: dict[str, Any] = {"name": name, **metadata, "labels": labels, **{s: [] for s in SPLITS}}
    seen: dict[tuple[tuple[str, ...], int | None], str] = {}
    group_splits: dict[str, str] = {}
    missing = []
    for folder, datalist in zip(folders, datalists, strict=True):
        for split, entry in ((name, entry) for name in SPLITS for entry in datalist.get(name, [])):
            files = {key: entry[key] for key in ("image", "label") if entry.get(key)}
            listed = {key: names if isinstance(names, list) else [names] for key, names in files.items()}
            # a DICOM series in a folder of several has a name only
            missing += [
                str(folder / name)
                for names in listed.values()
                for name in names
                if not (folder / name).exists() and (Path(name).suffix or not (folder / name).parent.is_dir())
            ]
            image = tuple(os.path.realpath(folder / name) for name in listed["image"])
            twin = seen.get((image, entry.get("page")))
            seen.setdefault((image, entry.get("page")), split)
            if twin and twin != split:
                fail(f"{image[0]} is in {twin} of one data set and in {split} of another")
            group = f"{datalist['name']}/{entry['group']}"
            if group_splits.setdefault(group, split) != split:
                fail(f"group {group!r} is in both {group_splits[group]} and {split}")
            moved = {key: [_relative(Path(os.path.normpath(folder / n)), out) for n in listed[key]] for key in listed}
            if twin:
                notes.append(f"{moved['image'][0]} occurs twice in {split}: kept once")
                continue
            paths = {key: names if isinstance(files[key], list) else names[0] for key, names in moved.items()}
            merged[split].append({"data_set": datalist["name"], **entry, **paths, "group": group})
    if missing:
        fail(f"{len(missing)} files are missing, prepare their folder again: {shorten(missing)}")
    path = write_datalist(merged, out)
    return Prepared(path, _read_datalist(out), notes)


def _common_labels(folders: Sequence[Path], datalists: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], list[str]]:
    """Return the class names of all lists, and notes on what was assumed."""
    given = [
        (folder, datalist["labels"])
        for folder, datalist in zip(folders, datalists, strict=True)
        if "labels" in datalist
    ]
    if not given:
        line = '"labels": {"0": "background", "1": "lesion"}'
        fail(
            f"no list says which classes its labels contain: add a line such as {line} to {folders[0] / DATALIST_NAME}"
        )
    first, labels = given[0]
    notes = []
    for folder, others in given[1:]:
        if set(others) != set(labels):
            fail(
                f"labels differ: {labels} in {first}, {others} in {folder}: such data sets cannot train one network; "
                'correct the line "labels" of one datalist.json if its label files have the same values'
            )
        if others != labels:
            notes.append(f"classes are called {others} in {folder}: taken as {labels}, which have the same numbers")
    notes += [
        f'{folder / DATALIST_NAME} has no line "labels": taken as {labels}'
        for folder, datalist in zip(folders, datalists, strict=True)
        if "labels" not in datalist
    ]
    return labels, notes


def write_datalist(datalist: Mapping[str, Any], out: str | os.PathLike) -> Path:
    """Write ``out/datalist.json`` in one step, one entry per line; numbers of cases are filled in.

    Args:
        datalist: descriptive keys and splits.
        out: its folder, which is created if it does not exist.

    Returns:
        The path of the file.

    Raises:
        ValueError: when the folder cannot be written.
    """
    out = _resolve(out)
    counts = {key: len(datalist.get(split, [])) for key, split in _COUNTS.items()}
    head = {key: value for key, value in datalist.items() if key not in SPLITS and key not in counts}
    lines = [f" {_dumps(key)}: {_dumps(value)}" for key, value in {**head, **counts}.items()]
    for split in SPLITS:
        entries = ",\n".join(f"  {_dumps(entry)}" for entry in datalist.get(split, []))
        lines.append(f' "{split}": [\n{entries}\n ]' if entries else f' "{split}": []')
    path = out / DATALIST_NAME
    with atomic_path(path) as part:
        part.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return path


def check_out(out: Path, name: str) -> None:
    """Check, before long work, that ``out`` can be written and contains no other data set's datalist.

    Args:
        out: output folder, which need not exist.
        name: data set that is to be written.

    Raises:
        ValueError: when it cannot be written, or its datalist.json was not written for the same data set.
    """
    nearest = next(p for p in (out, *out.parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        fail(f"cannot write to {out}: {nearest} is not a writable folder; choose another --out")
    path = out / DATALIST_NAME
    if not path.exists():
        return
    try:
        found = read_json(path)["name"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found != name:
        what = f"belongs to data set {found!r}" if found is not None else "was not written by segbundles"
        fail(f"{path} {what} and is not overwritten with {name!r}: choose another --out or remove it")


def _group(cases: Sequence[Case], checked: Mapping[str, Checked]) -> tuple[dict[str, str], list[str]]:
    """Join the groups of cases with identical files or objects; return each case's group, and notes on the joins."""
    parent = {c.group: c.group for c in cases}

    def root(group: str) -> str:
        while parent[group] != group:
            group = parent[group]
        return group

    notes = []
    told: list[set[str]] = []
    kinds: dict[str, Callable[[Checked], Sequence[str | None]]] = {
        "identical images": lambda found: [found.image_hash],
        "identical labels": lambda found: [found.label_hash],
        _OBJECT: lambda found: found.object_hashes,
    }
    for kind, hashes in kinds.items():
        same: dict[str, list[Case]] = defaultdict(list)
        for case in cases:
            for digest in hashes(checked[case.name]):
                if digest is not None:
                    same[digest].append(case)
        across: dict[frozenset[str], list[str]] = defaultdict(list)
        for found in same.values():
            roots = {root(c.group) for c in found}
            for group in roots:
                parent[group] = min(roots)
            names = [c.name for c in found]
            if len(own := frozenset(c.group for c in found)) > 1:
                if kind != _OBJECT or not any(before >= {*names} for before in told):
                    across[own] += names
                told.append({*names})
        notes += [f"{kind}: {shorten(names)} (one group)" for names in across.values()]
    return {c.name: root(c.group) for c in cases}, notes


def _left_out(data_set: DataSet, source: Path, out: Path, cases: Sequence[Case], faults: Sequence[Fault]) -> list[str]:
    """Return a note on the files under the source that belong to no case; a folder without any case is named once."""
    used = {p for c in cases for p in c.files} | {f.file for f in faults}
    holding = {parent for path in used for parent in path.parents}
    # a DICOM series in a folder of several has a name only
    series = {path.parent for path in used if not path.exists()}
    skipped = {DATALIST_NAME, *data_set.further_files}
    left: list[str] = []
    for place, folders, files in os.walk(source):
        root = Path(place)
        names = [name for name in [*folders, *files] if not name.startswith(".") and name not in skipped]
        folders[:] = [name for name in folders if name in names and root / name in holding and root / name != out]
        for path in (root / name for name in names if name not in folders):
            if path in used or root in series:
                continue
            name = shown(path.relative_to(source).as_posix())
            if not path.is_dir():
                left.append(name)
            elif path not in holding and path != out and (count := sum(len(inner) for _, _, inner in os.walk(path))):
                left.append(f"{name}/ ({count} file{'s'[: count != 1]})")
    if not left:
        return []
    named = shorten(sorted(left, key=natural))
    return [f"files left out, because they belong to no case: {named}"]


def _few_groups(entries: Sequence[Mapping[str, Any]], units: tuple[str, str]) -> list[str]:
    """Return a note on a validation whose many cases are of few groups."""
    groups = len({entry["group"] for entry in entries})
    if not 0 < groups < min(10, len(entries)):
        return []
    cases, several = units
    one = several.removesuffix("s")
    return [
        f"validation has {len(entries)} {cases} of {groups} {one if groups == 1 else several}: all {cases} of one "
        f"{one} count as one; with fewer than ten {several} there, use --folds to score all {cases} once"
    ]


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
        fail(f"{path} is missing: make it with `segbundles prepare`")
    try:
        datalist = read_json(path)
        datalist["name"] = str(datalist.get("name") or folder.name)
        entries = [(split, number, e) for split in SPLITS for number, e in enumerate(datalist.get(split, []))]
        if not entries:
            raise InputError(f"it has no entries under {', '.join(SPLITS)}")
        for split, number, entry in entries:
            if not isinstance(entry, dict):
                raise InputError(f"entry {number} of {split} is {entry!r}, not a dictionary of files")
            for key, line in (("image", '"image": "scan.nii.gz"'), ("group", '"group": "patient 1"')):
                if not entry.get(key):
                    raise InputError(f"entry {number} of {split} has no {key}: add it, as in {line}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{path} is not a datalist: {error}")
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
