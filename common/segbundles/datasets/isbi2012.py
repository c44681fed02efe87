"""ISBI 2012 challenge: membranes of neurons in serial sections, transmission electron microscopy (ssTEM).

Layout: ``train-volume.tif`` and ``train-labels.tif``, a page a section (uint8; labels 255 cell, 0 membrane), and
``test-volume.tif`` without truth; or folders of PNG pairs, as published copies have them. References: Cardona et al.,
PLoS Biology 8 (2010) e1000502; Arganda-Carreras et al., Frontiers in Neuroanatomy 9 (2015) 142.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from .datalist import Case, Checked, DataFaults, DataSet, Fault, array_hash, shorten

__all__ = [
    "DATA_SET",
    "INVERTED",
    "LABEL_FILE",
    "LABEL_VALUES",
    "METADATA",
    "VOLUME_FILE",
    "check_section",
    "find_cases",
    "review_sections",
]

VOLUME_FILE, LABEL_FILE, TEST_FILE = "train-volume.tif", "train-labels.tif", "test-volume.tif"
# stored values of class 0, membrane, and class 1, cell
LABEL_VALUES = (0, 255)
_IMAGE_FOLDERS = ("image", "images", "imgs")
_LABEL_FOLDERS = ("label", "labels", "masks")
_SIZE = "size (pixels)"
_SWAPPED = "membrane and cell look swapped"
_NUMBER = re.compile(r"([0-9]+)[^0-9]*")


def find_cases(source: Path) -> tuple[list[Case], list[Fault]]:
    """Find the sections: pages of the challenge's TIFF files, or PNG pairs.

    Pairs are PNG files of one number (the last in the name), or of one name, in ``image`` (``images``, ``imgs``) and
    ``label`` (``labels``, ``masks``).

    Args:
        source: folder of the TIFF files or of the two folders, or the folder above it if it is named ``train``.

    Returns:
        The sections, named ``section_07`` by page or number (``test_07`` of the test stack), and faults.

    Raises:
        DataFaults: when a TIFF file cannot be read, or its pages differ in number or size.
        ValueError: when there is no section at all.
    """
    for root in (source, source / "train"):
        if (root / VOLUME_FILE).is_file() or (root / LABEL_FILE).is_file():
            return _find_pages(root, source), []
        folders = [
            [root / name for name in names if any((root / name).glob("*.png"))]
            for names in (_IMAGE_FOLDERS, _LABEL_FOLDERS)
        ]
        if all(folders):
            return _find_pairs(folders[0][0], folders[1][0])
    raise ValueError(f"no case in {source}: expected {VOLUME_FILE} and {LABEL_FILE}, or PNG files in image/ and label/")


def _find_pages(root: Path, source: Path) -> list[Case]:
    volume, labels, test = (root / name for name in (VOLUME_FILE, LABEL_FILE, TEST_FILE))
    faults: list[Fault] = []
    for path, other in ((volume, labels), (labels, volume)):
        if not path.is_file():
            faults.append(Fault("stack", other, f"has no partner: {path.name} is missing beside it"))
    sizes = {path: _page_sizes(path, faults) for path in (volume, labels, test) if path.is_file()}
    if not faults and len(sizes[volume]) != len(sizes[labels]):
        problem = f"has {len(sizes[labels])} pages, {VOLUME_FILE} has {len(sizes[volume])}: a page a section is due"
        faults.append(Fault("stack", labels, problem))
    if faults:
        raise DataFaults(faults, source)
    cases = []
    for path, label, stem, section in ((volume, labels, "section", None), (test, None, "test", "testing")):
        for page in range(len(sizes.get(path, ()))):
            name = f"{stem}_{page:02d}"
            cases.append(Case(name, path, label, name, section, page))
    return cases


def _page_sizes(path: Path, faults: list[Fault]) -> list[tuple[int, ...]]:
    """Return (W, H) of the pages; note a file that cannot be read, and pages of different sizes."""
    try:
        with tifffile.TiffFile(path) as file:
            sizes = [(page.imagewidth, page.imagelength) for page in file.pages]
    except Exception as error:  # tifffile raises anything from struct.error to ValueError on a broken file
        faults.append(Fault("stack", path, f"cannot be read: {_last_line(error)}"))
        return []
    odd = [index for index, size in enumerate(sizes) if size != sizes[0]]
    if odd:
        pages = f"page {odd[0]} (from 0) is {_show(sizes[odd[0]])}, page 0 is {_show(sizes[0])}"
        faults.append(Fault("stack", path, f"has pages of different size: {pages}"))
    return sizes


def _find_pairs(images: Path, labels: Path) -> tuple[list[Case], list[Fault]]:
    faults: list[Fault] = []
    found: list[dict[str, Path]] = []
    for folder in (images, labels):
        files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.png")):
            name = _section_name(path)
            if path.name.startswith("."):  # archives may hold ._* twins, which are no images
                continue
            if (first := files.setdefault(name, path)) != path:
                faults.append(Fault(name, path, f"is a second file of {name}, beside {first.name}"))
        found.append(files)
    cases = []
    for name in sorted({*found[0], *found[1]}):
        image, label = found[0].get(name), found[1].get(name)
        if image is not None and label is not None:
            cases.append(Case(name, image, label, name))
        elif image is not None:
            faults.append(Fault(name, image, f"has no label: none of its number or name is in {labels.name}/"))
        elif label is not None:
            faults.append(Fault(name, label, f"has no image: none of its number or name is in {images.name}/"))
    return cases, faults


def _section_name(path: Path) -> str:
    numbers = _NUMBER.findall(path.stem)
    return f"section_{int(numbers[-1]):02d}" if numbers else path.stem


def check_section(case: Case, label_values: Sequence[int] = LABEL_VALUES) -> Checked:
    """Open image and label of a section and gather all that is wrong with them.

    Args:
        case: the section.
        label_values: stored values of membrane and cell.

    Returns:
        Faults, hashes (None for an image and a label of one value throughout), the entry's ``membrane_fraction`` and,
        where ``label_values`` are not the publisher's, ``label_values``; and facts.
    """
    result = Checked()
    image = _open(case, case.image, result)
    label = _open(case, case.label, result) if case.label is not None else None
    if image is not None:
        if problem := _format_problem(image):
            result.faults.append(Fault(case.name, case.image, problem))
            image = None
        else:
            result.facts[_SIZE] = image.shape[::-1]
            if image.min() != image.max():
                result.image_hash = array_hash(image)
    if label is None or case.label is None:
        return result
    problem = _format_problem(label) or _values_problem(label)
    if not problem and image is not None and image.shape != label.shape:
        problem = f"size {_show(label.shape[::-1])} differs from the image's {_show(image.shape[::-1])}"
    if problem:
        result.faults.append(Fault(case.name, case.label, problem))
        return result
    membrane = label == label_values[0]
    result.extra["membrane_fraction"] = round(float(membrane.mean()), 4)
    if tuple(label_values) != LABEL_VALUES:
        result.extra["label_values"] = list(label_values)
    result.facts["membrane (%)"] = (100 * membrane.mean(),)
    if membrane.any() and not membrane.all():
        result.label_hash = array_hash(membrane)
        if image is not None:
            swapped = membrane.mean() > 0.5 and image[membrane].mean() > image[~membrane].mean()
            result.facts["labels"] = _SWAPPED if swapped else "membrane is dark or rare, as it is due"
    return result


def _open(case: Case, path: Path, result: Checked) -> np.ndarray | None:
    """Return pixels (H, W) or (H, W, channels), or None with the fault noted."""
    try:
        if case.page is not None:
            from segbundles.data.readers import tiff_pixels

            with tifffile.TiffFile(path) as file:
                return tiff_pixels(file.pages[case.page])
        with Image.open(path) as file:
            return np.asarray(file if file.mode != "P" else file.convert())
    except Exception as error:  # tifffile and PIL raise anything from struct.error to ValueError on a broken file
        result.faults.append(Fault(case.name, path, f"cannot be read: {_last_line(error)}"))
        return None


def _format_problem(array: np.ndarray) -> str | None:
    if array.ndim != 2:
        shape = f"{array.shape[-1] if array.shape[-1] <= 4 else array.shape[0]} channels"
        return f"is in colour ({shape}): a section is grey, one channel; convert it"
    if array.dtype == bool:
        return "has 1 bit a pixel: 8 bit are due (uint8); convert it"
    if array.dtype != np.uint8:
        return f"is {array.dtype}: 8 bit are due (uint8, 0 to 255); rescale it"
    return None


def _values_problem(label: np.ndarray) -> str | None:
    odd = [str(v) for v in np.setdiff1d(label, LABEL_VALUES)]
    if odd:
        more = " ..." if len(odd) > 5 else ""
        return f"holds the values {', '.join(odd[:5])}{more} where only 0 and 255 are due"
    return None


def review_sections(
    source: Path, cases: Sequence[Case], checked: Mapping[str, Checked]
) -> tuple[list[Fault], list[str]]:
    """Look at the sections side by side.

    Args:
        source: the folder that was read.
        cases: the sections.
        checked: what `check_section` found, by case name.

    Returns:
        Faults (labels that look inverted, sections of other size than the first) and notes (sections missing between
        others, blank images, labels of one class).
    """
    faults: list[Fault] = []
    with_size = [c for c in cases if _SIZE in checked[c.name].facts]
    for case in with_size:
        size, first = (checked[c.name].facts[_SIZE] for c in (case, with_size[0]))
        if size != first:
            problem = f"size {_show(size)} differs from {_show(first)} of {with_size[0].name}"
            faults.append(Fault(case.name, case.image, problem))
    judged = [c for c in cases if "labels" in checked[c.name].facts]
    swapped = [c for c in judged if checked[c.name].facts["labels"] == _SWAPPED]
    if swapped and 2 * len(swapped) > len(judged):
        flagged = "label_values" in checked[swapped[0].name].extra
        value, repair = (LABEL_VALUES[0], "leave out") if flagged else (LABEL_VALUES[1], "if so, give")
        problem = f"looks inverted: what is {value} is the dark, rare class, membrane; {repair} --invert-labels"
        files = {c.label: c for c in reversed(swapped) if c.label is not None}
        faults += [Fault(case.name, file, problem) for file, case in files.items()]
    elif swapped:
        names = shorten([c.name for c in swapped])
        return faults, [*_notes(cases, checked), f"{_SWAPPED} in {len(swapped)} sections, look at them: {names}"]
    return faults, _notes(cases, checked)


def _notes(cases: Sequence[Case], checked: Mapping[str, Checked]) -> list[str]:
    notes = []
    numbers = {int(n[-1]) for c in cases if c.section is None and (n := _NUMBER.findall(c.name))}
    if numbers and (absent := sorted({*range(min(numbers), max(numbers))} - numbers)):
        notes.append(f"section numbers have gaps: {shorten([str(n) for n in absent])} missing")
    blank = [c.name for c in cases if _SIZE in checked[c.name].facts and checked[c.name].image_hash is None]
    if blank:
        notes.append(f"{len(blank)} sections are blank, one value throughout: {shorten(blank)}")
    fractions = {c.name: checked[c.name].extra.get("membrane_fraction") for c in cases}
    for fraction, what in ((0.0, "membrane"), (1.0, "cell")):
        if names := [name for name, found in fractions.items() if found == fraction]:
            notes.append(f"{len(names)} sections have no {what}: {shorten(names)}")
    return notes


def _last_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[-1]


def _show(size: Sequence[float] | str) -> str:
    return " x ".join(map(str, size))


METADATA = {
    "description": "Neuronal membranes in ssTEM sections of the Drosophila larva ventral nerve cord",
    "reference": (
        "Cardona et al., PLoS Biology 8 (2010) e1000502; Arganda-Carreras et al., Frontiers in Neuroanatomy 9 (2015) "
        "142, https://doi.org/10.3389/fnana.2015.00142"
    ),
    "licence": "free for research; cite both references",
    "tensorImageSize": "2D",
    "modality": {"0": "ssTEM"},
    "labels": {"0": "membrane", "1": "cell"},
}


DATA_SET = DataSet(
    name="isbi2012",
    metadata=METADATA,
    find=find_cases,
    check=check_section,
    review=review_sections,
    units=("sections", "blocks"),
    contiguous=True,
)

INVERTED = replace(DATA_SET, check=partial(check_section, label_values=LABEL_VALUES[::-1]))
