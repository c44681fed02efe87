"""ISBI 2012 challenge: membranes of neurons in serial sections, transmission electron microscopy (ssTEM).

Layout: ``train-volume.tif`` and ``train-labels.tif``, one page per section (labels 255 cell, 0 membrane), and
``test-volume.tif`` without truth; or folders of PNG pairs, as in published copies. References: Cardona et al., PLoS
Biology 8 (2010) e1000502; Arganda-Carreras et al., Frontiers in Neuroanatomy 9 (2015) 142.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated

from segbundles.errors import fail

from .datalist import Case, Checked, DataFaults, DataSet, Fault
from .layout import files_by_name, pair
from .reading import KEYS, SIZE, CaseReader, blank_note, problem_of, size_faults
from .splits import shorten

VOLUME_FILE, LABEL_FILE, TEST_FILE = "train-volume.tif", "train-labels.tif", "test-volume.tif"
# stored values of class 0, membrane, and class 1, cell
LABEL_VALUES = (0, 255)
_IMAGE_FOLDERS = ("image", "images", "imgs")
_LABEL_FOLDERS = ("label", "labels", "masks")
_SWAPPED = "membrane and cell look swapped"
_NUMBER = re.compile(r"([0-9]+)[^0-9]*")


def find_cases(source: Path) -> tuple[list[Case], list[Fault]]:
    """Find the sections: pages of the challenge's TIFF files, or PNG pairs.

    Pairs are PNG files of one number (the last in the name), or of one name, in ``image`` (``images``, ``imgs``) and
    ``label`` (``labels``, ``masks``).

    Args:
        source: folder of the TIFF files or of the two folders, or the folder above it if it is named ``train``.

    Returns:
        The sections, named ``section_07`` by page or number (``test_07`` in the test stack), and faults.

    Raises:
        DataFaults: when a TIFF file cannot be read, or the number of pages of the two differs.
        ValueError: when there is no section at all.
    """
    for root in (source, source / "train"):
        if (root / VOLUME_FILE).is_file() or (root / LABEL_FILE).is_file():
            return _find_pages(root, source), []
        images, labels = (
            next((root / name for name in names if any((root / name).glob("*.png"))), None)
            for names in (_IMAGE_FOLDERS, _LABEL_FOLDERS)
        )
        if images and labels:
            faults: list[Fault] = []
            found = [files_by_name(folder.glob("*.png"), _section_name, faults) for folder in (images, labels)]
            return pair(*found, (f"{images.name}/", f"{labels.name}/"), faults), faults
    fail(f"no case in {source}: expected {VOLUME_FILE} and {LABEL_FILE}, or PNG files in image/ and label/")


def _find_pages(root: Path, source: Path) -> list[Case]:
    volume, labels, test = (root / name for name in (VOLUME_FILE, LABEL_FILE, TEST_FILE))
    faults = [
        Fault("stack", other, f"has no partner: {path.name} is missing next to it")
        for path, other in ((volume, labels), (labels, volume))
        if not path.is_file()
    ]
    pages = {path: _page_count(path, faults) for path in (volume, labels, test) if path.is_file()}
    if not faults and pages[volume] != pages[labels]:
        problem = f"has {pages[labels]} pages, {VOLUME_FILE} has {pages[volume]}: both need one page per section"
        faults.append(Fault("stack", labels, problem))
    if faults:
        raise DataFaults(faults, source)
    return [
        Case(name := f"{stem}_{page:02d}", path, label, name, split, page)
        for path, label, stem, split in ((volume, labels, "section", None), (test, None, "test", "testing"))
        for page in range(pages.get(path, 0))
    ]


def _page_count(path: Path, faults: list[Fault]) -> int:
    from segbundles.data import StackReader

    try:
        return StackReader().get_data(([path], {}))[0].shape[2]
    except ValueError as error:
        faults.append(Fault("stack", path, problem_of(error, path)))
        return 0


def _section_name(path: Path) -> str:
    numbers = _NUMBER.findall(path.stem)
    return f"section_{int(numbers[-1]):02d}" if numbers else path.stem


@cache
def _reader(label_values: tuple[float, ...] | None) -> CaseReader:
    from segbundles.transforms import CheckImaged, LabelToClassd, LoadPaged

    return CaseReader(
        [LoadPaged(KEYS, allow_missing_keys=True)],
        CheckImaged(KEYS, allow_constant=True, allow_missing_keys=True),
        LabelToClassd("label", values=label_values),
    )


def check_section(case: Case, label_values: tuple[float, ...] | None = LABEL_VALUES) -> Checked:
    """Read image and label of a section and gather all that is wrong with them.

    Args:
        case: the section.
        label_values: stored values of membrane and cell; None accepts 0 and 255, or 0 and 1.

    Returns:
        Faults, hashes (None for an image and a label with one value), the entry's ``membrane_fraction`` and, if
        ``label_values`` are not the publisher's, ``label_values``; and facts.
    """
    reading = _reader(label_values)(case)
    result, image = reading.checked, reading.image
    if image is not None:
        result.facts[SIZE] = tuple(image.shape[1:3])
    if reading.label is None:
        return result
    membrane = reading.label.numpy(force=True) == 0
    result.extra["membrane_fraction"] = round(float(membrane.mean()), 4)
    if label_values not in (None, LABEL_VALUES):
        result.extra["label_values"] = list(label_values)
    result.facts["membrane (%)"] = (100 * float(membrane.mean()),)
    if result.label_hash and image is not None and image.shape == membrane.shape:
        pixels = image.numpy(force=True)
        swapped = membrane.mean() > 0.5 and pixels[membrane].mean() > pixels[~membrane].mean()
        result.facts["labels"] = _SWAPPED if swapped else "membrane is dark or rare, as expected"
    return result


def review_sections(
    source: Path,
    cases: Sequence[Case],
    checked: Mapping[str, Checked],
    invert: str = "--invert-labels",
    same_size: bool = True,
) -> tuple[list[Fault], list[str]]:
    """Compare the sections.

    Args:
        source: the folder that was read.
        cases: the sections.
        checked: what `check_section` found, by case name.
        invert: option that swaps the values of the labels.
        same_size: whether all sections are of one stack and must have one size.

    Returns:
        Faults (labels that look inverted, sections whose size differs from most) and notes (missing sections,
        blank images, labels of one class).
    """
    faults = size_faults(cases, checked, "most sections") if same_size else []
    notes = _notes(cases, checked)
    judged = [c for c in cases if "labels" in checked[c.name].facts]
    swapped = [c for c in judged if checked[c.name].facts["labels"] == _SWAPPED]
    if swapped and 2 * len(swapped) > len(judged):
        flagged = "label_values" in checked[swapped[0].name].extra
        value, repair = (LABEL_VALUES[0], "leave out") if flagged else (LABEL_VALUES[1], "if so, use")
        problem = f"looks inverted: {value} is the dark, rare class, which should be membrane; {repair} {invert}"
        files = {c.label: c for c in reversed(swapped) if c.label is not None}
        faults += [Fault(case.name, file, problem) for file, case in files.items()]
    elif swapped:
        names = shorten([c.name for c in swapped])
        notes.append(f"{_SWAPPED} in {len(swapped)} sections, look at them: {names}")
    return faults, notes


def _notes(cases: Sequence[Case], checked: Mapping[str, Checked]) -> list[str]:
    notes = []
    numbers = {int(n[-1]) for c in cases if c.split is None and (n := _NUMBER.findall(c.name))}
    if numbers and (absent := sorted({*range(min(numbers), max(numbers))} - numbers)):
        notes.append(f"section numbers have gaps: {shorten([str(n) for n in absent])} missing")
    notes += blank_note("sections", cases, checked)
    fractions = {c.name: checked[c.name].extra.get("membrane_fraction") for c in cases}
    for fraction, what in ((0.0, "membrane"), (1.0, "cell")):
        if names := [name for name, found in fractions.items() if found == fraction]:
            notes.append(f"{len(names)} sections have no {what}: {shorten(names)}")
    return notes


def with_options(
    invert_labels: Annotated[bool, "Label files hold 255 for membrane."] = False,
) -> DataSet:
    """Return the data set with the two values of its label files swapped, or as published."""
    return replace(DATA_SET, check=partial(check_section, label_values=LABEL_VALUES[:: -1 if invert_labels else 1]))


DATA_SET = DataSet(
    name="isbi2012",
    summary="ISBI 2012 challenge, ssTEM: train-volume.tif and train-labels.tif, or PNG in image and label.",
    metadata={
        "description": "Neuronal membranes in ssTEM sections of the Drosophila larva ventral nerve cord",
        "reference": (
            "Cardona et al., PLoS Biology 8 (2010) e1000502; Arganda-Carreras et al., Frontiers in Neuroanatomy 9 "
            "(2015) 142, https://doi.org/10.3389/fnana.2015.00142"
        ),
        "licence": "free for research; cite both references",
        "tensorImageSize": "2D",
        "modality": {"0": "ssTEM"},
        "labels": {"0": "membrane", "1": "cell"},
    },
    find=find_cases,
    check=check_section,
    review=review_sections,
    units=("sections", "blocks"),
    contiguous=True,
    options=with_options,
)
