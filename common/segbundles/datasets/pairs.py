"""Own data in any layout: images and labels found by patterns, checked as a bundle reads them.

There is no publisher here. Name, licence and classes are what the person says who prepares the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

from segbundles.errors import InputError, fail
from segbundles.files import shown
from segbundles.patterns import Pattern, case_name, join, split_list
from segbundles.segments import SEGMENTATION

from . import clinicdb, isbi2012, lgg
from .datalist import Case, Checked, DataSet, Fault
from .kinds import FRAMES, SECTIONS, STACKS, VOLUMES, Kind, LabelValues, names_of
from .reading import problem_of

NOT_GIVEN = "not given"
_UNITS = {VOLUMES: "cases", STACKS: "images", SECTIONS: "sections", FRAMES: "frames"}


def find_cases(
    source: Path, kind: Kind, images: Sequence[str], labels: str, group: str | None = None
) -> tuple[list[Case], list[Fault]]:
    """Find the cases under a folder, and images without a label or the reverse.

    The files of a case are those for which the wildcards of their patterns stand for the same text, see
    :class:`segbundles.patterns.Pattern`. What the pattern of the labels matches is never an image. A TIFF with several
    pages is a case for each of them if the bundle reads sections.

    Args:
        source: folder to search; patterns are of paths relative to it.
        kind: what the bundle reads.
        images: one pattern per file of an image; several are its channels, in this order.
        labels: pattern of the labels.
        group: ``folder`` for the folder that an image is in, or a pattern with ``{group}`` of the end of its path; None
            makes each case a group by itself.

    Returns:
        The cases, named by what the wildcards stand for, and the faults.

    Raises:
        ValueError: when a pattern matches no file, or several files of a case, when no image has a label, and when
            nothing says which slices or frames belong together.
    """
    from segbundles.data import list_images

    paths = {path.relative_to(source).as_posix(): path for path in list_images(source, kind.suffixes)}
    of_labels = Pattern(labels)
    labelled, _ = join([of_labels], {name: path for name, path in paths.items() if of_labels.key(name) is not None})
    found, _ = join(list(map(Pattern, images)), {name: p for name, p in paths.items() if of_labels.key(name) is None})
    for what, option, texts in ((found, "--images", images), (labelled, "--labels", [labels])):
        if not what:
            seen = ", ".join(list(paths)[:3]) or f"none that {kind.bundle.name} reads"
            fail(f"no file under {source} matches {option} {' and '.join(texts)}; files there: {seen}")
    if not found.keys() & labelled.keys():
        firsts = (_first(next(iter(files.values()))) for files in (found, labelled))
        image, label = (shown(path.relative_to(source).as_posix()) for path in firsts)
        fail(
            f"no label of --labels {labels} fits an image of --images {' and '.join(images)}: their wildcards must "
            f"stand for the same text, as in {image} and {label} they do not; write {{case}} for the part that names "
            "the case"
        )
    group_of = _group_of(source, kind, group, [path for files in found.values() for path in files if path])
    cases: list[Case] = []
    faults: list[Fault] = []
    for key in dict.fromkeys([*found, *labelled]):
        files, label = found.get(key), labelled.get(key, [None])[0]
        name = case_name(key) or _first([label, *(files or ())]).name.split(".")[0]
        if files is None:
            faults.append(Fault(name, label, f"has no image: nothing that matches {' and '.join(images)} fits it"))
        elif label is None:
            faults.append(Fault(name, _first(files), f"has no label: nothing that matches {labels} fits it"))
        elif None in files:
            missing = images[files.index(None)]
            faults.append(Fault(name, _first(files), f"has no file for {missing}, one of {len(images)} channels"))
        elif (owner := group_of(name, files[0])) is None:
            faults.append(Fault(name, files[0], f"does not fit --group {group}, which must match the end of its path"))
        else:
            image = tuple(files) if len(files) > 1 else files[0]
            cases += _pages(Case(name, image, label, owner), kind, group is None, faults)
    return cases, faults


def _first(files: Sequence[Path | None]) -> Path:
    return next(path for path in files if path is not None)


def _group_of(source: Path, kind: Kind, group: str | None, images: Sequence[Path]) -> Callable[[str, Path], str | None]:
    """Return a function that takes the name and the first image of a case, and returns its group."""
    from segbundles.data.pictures import is_slice

    if group is None:
        if kind.name == FRAMES or (kind.name == STACKS and any(map(is_slice, images))):
            these = "frames are of one video" if kind.name == FRAMES else "slices are of one patient"
            fail(
                f"nothing says which {these}, and these must stay together: give --group folder if each has "
                'a folder, or a pattern such as --group "{group}_*" for the start of the file names'
            )
        return lambda name, path: name
    if group == "folder":

        def folder(name: str, path: Path) -> str:
            place = path.parent.relative_to(source).as_posix()
            return name if place == "." and path.is_dir() else place

        if any(path.parent == source and not path.is_dir() for path in images):
            fail(f"--group folder needs a folder per group, but images are in {source} itself: give a pattern")
        return folder
    pattern = Pattern(group, names=("group",), anywhere=True)
    if "{group}" not in group:
        fail(f'--group must be folder, or a pattern with {{group}} such as "{{group}}_*", got {group!r}')
    return lambda name, path: pattern.named(path.relative_to(source).as_posix(), "group")


def _pages(case: Case, kind: Kind, alone: bool, faults: list[Fault]) -> list[Case]:
    """Return a case, or one per page of a TIFF with sections."""
    if kind.name != SECTIONS:
        return [case]
    from segbundles.data import StackReader

    counts = {}
    for path in case.files:
        reader = StackReader()
        try:
            counts[path] = reader.get_data(reader.read(path))[0].shape[2]
        except ValueError as error:
            faults.append(Fault(case.name, path, problem_of(error, path), case.group))
            return []
    pages, others = counts.values()
    if pages != others:
        problem = f"has {others} pages, its image {case.images[0].name} has {pages}: both need one page per section"
        faults.append(Fault(case.name, case.label, problem, case.group))
        return []
    if pages == 1:
        return [case]
    names = [f"{case.name}_{page:02d}" for page in range(pages)]
    return [
        Case(name, case.image, case.label, name if alone else case.group, page=page) for page, name in enumerate(names)
    ]


def review_cases(
    source: Path, cases: Sequence[Case], checked: Mapping[str, Checked], kind: Kind, group: str | None
) -> tuple[list[Fault], list[str]]:
    """Compare the cases as those of a publisher of such images.

    Args:
        source: the folder that was read.
        cases: the cases.
        checked: what was found in them, by case name.
        kind: what the bundle reads.
        group: how groups were found.

    Returns:
        Faults and notes.
    """
    notes: list[str] = []
    faults: list[Fault] = []
    if kind.name == SECTIONS:
        faults, notes = isbi2012.review_sections(source, cases, checked, "--label-values 255,0", same_size=False)
    elif kind.name == FRAMES:
        faults, notes = clinicdb.review_frames(source, cases, checked)
    elif slices := [case for case in cases if kind.is_slice(case)]:
        faults, notes = lgg.review_slices(source, slices, checked)
        faults += _repeated(slices, checked)
    if group is None and kind.name in (VOLUMES, STACKS):
        notes.append("each case is a group: give --group if a patient has several, so that they stay in one split")
    return faults, notes


def _repeated(slices: Sequence[Case], checked: Mapping[str, Checked]) -> list[Fault]:
    """Return a fault for each slice of a group that has the number of another: a group of slices is one stack."""
    seen: dict[tuple[str, int], Case] = {}
    faults = []
    for case in slices:
        number = checked[case.name].extra.get("slice")
        if number is not None and (first := seen.setdefault((case.group, number), case)) is not case:
            problem = (
                f"is slice {number} of {case.group}, as {first.name} is: give each stack a group, and keep those of"
            )
            faults.append(
                Fault(case.name, case.images[0], f"{problem} a patient in one split with --split", case.group)
            )
    return faults


def with_options(
    *,
    bundle: Annotated[str, "Bundle that the data are for: its folder, or its name."],
    images: Annotated[list[str], 'Pattern of the images, such as "*/flair.nii.gz". Repeat it for each channel.'],
    labels: Annotated[str, 'Pattern of the labels. Its wildcards stand for the same text: "*/lesion.nii.gz".'],
    group: Annotated[
        str | None, 'What stays in one split: "folder" of the image, or a pattern with {group}: "{group}_*".'
    ] = None,
    classes: Annotated[str | None, "Names of the classes, with commas, background first."] = None,
    label_values: Annotated[str | None, "Values of the classes in the label files, with commas, as in 0,2,4."] = None,
    segments: Annotated[
        str | None, "Segments of .seg.nrrd files that are class 1, 2 ...: names or numbers, with commas."
    ] = None,
    void_class: Annotated[int | None, "Value of pixels that are neither learnt nor scored (frames only)."] = None,
    name: Annotated[str, "Name of the data set."] = "own data",
    licence: Annotated[str, "Licence of the data set."] = NOT_GIVEN,
) -> DataSet:
    """Return the data set of these patterns.

    Args:
        bundle: folder or name of the bundle that the data are for.
        images: see `find_cases`.
        labels: see `find_cases`.
        group: see `find_cases`.
        classes: names of the classes, separated by commas; None takes the segments, or the bundle's.
        label_values: values of the classes, separated by commas; None accepts class indices, and for two classes also 0
            and 255.
        segments: segments that are class 1, 2 and so on, separated by commas.
        void_class: class of pixels to be ignored.
        name: name of the data set.
        licence: its licence.

    Raises:
        ValueError: when there is no such bundle, or options contradict it or each other.
    """
    kind, chosen = Kind.of(bundle), split_list(segments)
    if len(images) not in {1, kind.channels if kind.name == STACKS else 1}:
        several = f"one, or {kind.channels} for its channels" if kind.name == STACKS else "one"
        fail(f"--images is given {len(images)} times, but {kind.bundle.name} takes {several}")
    given = ["background", *chosen] if chosen and not classes else split_list(classes)
    usual = isbi2012.DATA_SET.metadata["labels"] if kind.name == SECTIONS else kind.classes
    names = given or list(usual.values())
    if len(names) < 2:
        fail(f"--classes must have two names or more, the background first, got {', '.join(names)}")
    values = _numbers(label_values)
    if values is not None and len(values) != len(names):
        fail(f"--label-values has {len(values)} values, but there are {len(names)} classes: {', '.join(names)}")
    if chosen and len(chosen) != len(names) - 1:
        fail(f"--segments has {len(chosen)} names, but there are {len(names) - 1} classes beside {names[0]}")
    if chosen and not labels.lower().endswith(SEGMENTATION):
        fail(f"--segments applies to labels that end in {SEGMENTATION}, but --labels is {labels}")
    if kind.name == SECTIONS and len(names) != 2:
        fail(f"{kind.bundle.name} separates two classes, membrane and cell; --classes has {len(names)}")
    if kind.name == FRAMES and values is not None:
        fail("--label-values does not apply to frames: save class indices, or for two classes 0 and 255")
    if void_class is not None and kind.name != FRAMES:
        fail("--void-class applies to frames only")
    stored = LabelValues(len(names), values, tuple(chosen), void_class)
    metadata = {
        "description": NOT_GIVEN,
        "reference": NOT_GIVEN,
        "licence": licence,
        "tensorImageSize": "3D" if kind.name == VOLUMES else "2D",
        "modality": kind.modality,
        "labels": names_of(names),
    }
    if void_class is not None:
        metadata["void_class"] = void_class
    return DataSet(
        name=name,
        metadata=metadata,
        find=partial(find_cases, kind=kind, images=images, labels=labels, group=group),
        check=partial(kind.check, labels=stored),
        review=partial(review_cases, kind=kind, group=group),
        units=(_UNITS[kind.name], "groups"),
        contiguous=kind.name == SECTIONS and group is None,
    )


def _numbers(text: str | None) -> tuple[float, ...] | None:
    try:
        return tuple(int(word) if word.lstrip("-").isdecimal() else float(word) for word in split_list(text)) or None
    except ValueError:
        fail(f"--label-values must be numbers with commas, such as 0,2,4, got {text!r}")


def _without_options(*_: object) -> tuple[list[Case], list[Fault]]:
    raise InputError("pairs needs the options bundle, images and labels")


DATA_SET = DataSet(
    name="pairs",
    summary="Own data in any layout, for any bundle: images and labels by patterns.",
    metadata={},
    find=_without_options,
    check=lambda case: Checked(),
    options=with_options,
)
