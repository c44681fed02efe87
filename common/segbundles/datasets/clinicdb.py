"""CVC-ClinicDB: polyps in colonoscopy frames, 612 frames of 29 video sequences.

Layout: ``Original/<frame>.tif`` (RGB, 384 x 288) and ``Ground Truth/<frame>.tif`` (0 and 255, grey at the edges of
some); some published copies hold PNG. Frames of one sequence look alike and stay together in a split. Reference: Bernal
et al., Computerized Medical Imaging and Graphics 43 (2015) 99.
"""

from __future__ import annotations

import csv
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .datalist import Case, Checked, DataFaults, DataSet, Fault, array_hash, shorten

__all__ = [
    "DATA_SET",
    "IMAGE_FOLDER",
    "MASK_FOLDER",
    "METADATA",
    "SEQUENCES_FILE",
    "check_frame",
    "find_cases",
    "list_images",
    "read_sequences",
    "review_frames",
    "sequence_of",
]

IMAGE_FOLDER, MASK_FOLDER = "Original", "Ground Truth"
SEQUENCES_FILE = "sequences.csv"
# first frame of each of the publisher's sequences, 1 to 29, and one beyond the last frame
_FIRST_FRAMES = (
    *(1, 26, 51, 68, 79, 104, 127, 152, 178, 200, 206, 228, 253, 278, 298, 318, 343, 364, 384, 409, 429, 448, 467, 479),
    *(504, 529, 547, 572, 592, 613),
)
_SIZE = "size (pixels)"
_POLYP = "polyp (%)"


def sequence_of(frame: int) -> int | None:
    """Return the publisher's sequence, 1 to 29, of a frame of CVC-ClinicDB, 1 to 612; None for any other number."""
    number = bisect_right(_FIRST_FRAMES, frame)
    return number if 1 <= number < len(_FIRST_FRAMES) else None


def find_cases(source: Path) -> tuple[list[Case], list[Fault]]:
    """Find the frames, and those that lack image or mask or are of no sequence.

    Args:
        source: folder with ``Original`` and ``Ground Truth``, or a folder above it. A ``sequences.csv`` (columns frame
            and sequence) in either says which sequence a frame is of; without it the publisher's list does.

    Returns:
        The frames, named as their files and grouped as ``sequence_<number>``, and the faults.

    Raises:
        DataFaults: when ``sequences.csv`` cannot be read.
        ValueError: when there is no frame at all.
    """
    root = next((path for path in (source, *sorted(source.glob("*"))) if _folder(path, MASK_FOLDER)), None)
    if root is None or (image_folder := _folder(root, IMAGE_FOLDER)) is None:
        raise ValueError(f"no case in {source}: expected the folders {IMAGE_FOLDER!r} and {MASK_FOLDER!r}")
    faults: list[Fault] = []
    images, masks = (list_images(folder, faults) for folder in (image_folder, _folder(root, MASK_FOLDER)))
    table = next((path for path in (root / SEQUENCES_FILE, source / SEQUENCES_FILE) if path.is_file()), None)
    sequences = None if table is None else read_sequences(table, source)
    cases = []
    for name in sorted({*images, *masks}):
        sequence = _sequence(name, sequences)
        path = images.get(name, masks.get(name))
        if name not in masks:
            faults.append(Fault(name, path, f"has no mask: {MASK_FOLDER}/ holds none of that name", sequence))
        elif name not in images:
            faults.append(Fault(name, path, f"has no image: {IMAGE_FOLDER}/ holds none of that name", sequence))
        elif sequence is None:
            where = f"is in no row of {SEQUENCES_FILE}" if table else "is no frame of the publisher's list, 1 to 612"
            repair = f"give a {SEQUENCES_FILE} with the columns frame and sequence" if table is None else "add it"
            faults.append(Fault(name, path, f"{where}: {repair}"))
        else:
            cases.append(Case(name, images[name], masks[name], sequence))
    if not cases and not faults:
        endings = ", ".join(_suffixes())
        raise ValueError(f"no case in {source}: {IMAGE_FOLDER} and {MASK_FOLDER} hold no {endings} files")
    return cases, faults


def _suffixes() -> tuple[str, ...]:
    from segbundles.data.frames import FrameReader

    return FrameReader.suffixes()


def _folder(root: Path, name: str) -> Path | None:
    """The folder of a name, also where copies spell it in lower case or with an underscore."""
    plain = name.lower().replace(" ", "")
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if path.is_dir() and path.name.lower().replace(" ", "").replace("_", "") == plain:
            return path
    return None


def list_images(folder: Path, faults: list[Fault]) -> dict[str, Path]:
    """Return the images of a folder by the stem of their name; note a second file of one stem.

    Args:
        folder: the folder; hidden files and other suffixes are passed over.
        faults: where a fault is added.
    """
    found: dict[str, Path] = {}
    suffixes = _suffixes()
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in suffixes:
            continue
        if (first := found.setdefault(path.stem, path)) != path:
            faults.append(Fault(path.stem, path, f"is a second file of {path.stem}, beside {first.name}"))
    return found


def read_sequences(path: Path, source: Path) -> dict[str, str]:
    """Read a table of frames and their sequences.

    Args:
        path: CSV file with the columns frame and sequence.
        source: folder that an error names it relative to.

    Returns:
        Sequence by frame.

    Raises:
        DataFaults: when it cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        return {row["frame"].strip(): row["sequence"].strip() for row in rows}
    except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:
        problem = f"cannot be read ({error}): it has the columns frame and sequence"
        raise DataFaults([Fault(path.name, path, problem)], source) from error


def _sequence(name: str, sequences: Mapping[str, str] | None) -> str | None:
    published = sequence_of(int(name)) if name.isdecimal() else None
    number = published if sequences is None else sequences.get(name)
    return None if number is None else f"sequence_{number}"


def check_frame(case: Case, num_classes: int = 2, void_class: int | None = None) -> Checked:
    """Open image and mask of a frame and gather all that is wrong with them.

    Args:
        case: the frame.
        num_classes: number of classes of its mask.
        void_class: class of pixels to be ignored.

    Returns:
        Faults, hashes (None for a mask of one class throughout and an image of one value) and facts.
    """
    from segbundles.data.frames import VOID, mask_classes, read_frame, read_mask

    result = Checked()
    image = classes = None
    try:
        image, notes = read_frame(case.image)
        result.facts[_SIZE] = image.shape[1::-1]
        result.facts["colour"] = "RGB" if not notes else ", ".join(notes)
        if image.min() != image.max():
            result.image_hash = array_hash(image)
    except ValueError as error:
        result.faults.append(Fault(case.name, case.image, str(error), case.group))
    if case.label is None:
        return result
    try:
        mask = read_mask(case.label)
        classes = mask_classes(mask, num_classes, void_class)
        exact = set(np.unique(mask).tolist()) in ({0, 255}, {0}, {255}) or mask.max() < num_classes + 1
        result.facts["masks"] = "exact" if exact else "grey, taken above 127"
        result.facts[_POLYP] = (100 * float((classes == 1).mean()),)
        if num_classes > 2 or void_class is not None:
            found = ["void" if k == VOID else str(k) for k in np.unique(classes)]
            result.facts["classes"] = " ".join(found)
        if classes.min() != classes.max():
            result.label_hash = array_hash(classes)
    except ValueError as error:
        result.faults.append(Fault(case.name, case.label, str(error), case.group))
    if image is not None and classes is not None and image.shape[:2] != classes.shape:
        sizes = [" x ".join(map(str, a.shape[1::-1])) for a in (classes, image)]
        problem = f"size {sizes[0]} differs from the image's {sizes[1]}"
        result.faults.append(Fault(case.name, case.label, problem, case.group))
    return result


def review_frames(source: Path, cases: Sequence[Case], checked: Mapping[str, Checked]) -> tuple[list[Fault], list[str]]:
    """Look at the frames side by side.

    Args:
        source: the folder that was read.
        cases: the frames.
        checked: what `check_frame` found, by case name.

    Returns:
        No faults; notes on frames without polyp, blank images and masks of grey levels.
    """
    notes = []
    for what, names in (
        ("have no polyp", [c.name for c in cases if checked[c.name].facts.get(_POLYP) == (0.0,)]),
        ("are blank, one value throughout", [c.name for c in cases if _blank(checked[c.name])]),
    ):
        if names:
            notes.append(f"{len(names)} frames {what}: {shorten(names)}")
    return [], notes


def _blank(result: Checked) -> bool:
    return _SIZE in result.facts and result.image_hash is None


METADATA = {
    "description": "Polyps in colonoscopy frames, 29 sequences; masks count as polyp above 127",
    "reference": (
        "Bernal et al., Computerized Medical Imaging and Graphics 43 (2015) 99, "
        "https://doi.org/10.1016/j.compmedimag.2015.02.007"
    ),
    "licence": "research and education, no commercial use; cite the reference",
    "tensorImageSize": "2D",
    "modality": {"0": "red", "1": "green", "2": "blue"},
    "labels": {"0": "background", "1": "polyp"},
}

DATA_SET = DataSet(
    name="clinicdb",
    metadata=METADATA,
    find=find_cases,
    check=check_frame,
    review=review_frames,
    units=("frames", "sequences"),
)
