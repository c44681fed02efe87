"""CVC-ClinicDB: polyps in colonoscopy frames, 612 frames of 29 video sequences.

Layout: ``Original/<frame>.tif`` (RGB, 384 x 288) and ``Ground Truth/<frame>.tif`` (0 and 255, some with grey edges);
some published copies contain PNG. Frames of one sequence look alike and stay together in a split. Reference: Bernal et
al., Computerized Medical Imaging and Graphics 43 (2015) 99.
"""

from __future__ import annotations

import csv
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated

from segbundles.errors import fail
from segbundles.files import read_table

from .datalist import Case, Checked, DataFaults, DataSet, Fault
from .layout import files_by_name, pair
from .reading import KEYS, SIZE, CaseReader, blank_note
from .splits import shorten

IMAGE_FOLDER, MASK_FOLDER = "Original", "Ground Truth"
SEQUENCES_FILE = "sequences.csv"
# first frame of each of the publisher's sequences, 1 to 29, and the number after the last frame
_FIRST_FRAMES = (
    *(1, 26, 51, 68, 79, 104, 127, 152, 178, 200, 206, 228, 253, 278, 298, 318, 343, 364, 384, 409, 429, 448, 467, 479),
    *(504, 529, 547, 572, 592, 613),
)
_SIZE = (384, 288)
_POLYP = "polyp (%)"


def sequence_of(frame: int) -> int | None:
    """Return the publisher's sequence, 1 to 29, of a frame of CVC-ClinicDB, 1 to 612; None for any other number."""
    number = bisect_right(_FIRST_FRAMES, frame)
    return number if 1 <= number < len(_FIRST_FRAMES) else None


def find_cases(source: Path, publisher_sequences: bool = False) -> tuple[list[Case], list[Fault]]:
    """Find the frames, and those without image, mask or sequence.

    Args:
        source: folder with ``Original`` and ``Ground Truth``, or a folder above it. A ``sequences.csv`` (columns frame
            and sequence) in either gives the sequence of each frame.
        publisher_sequences: whether the frames have the publisher's numbers, so that its list gives their sequences if
            there is no table. All 612 frames of its size are recognised as the publisher's.

    Returns:
        The frames, named like their files and grouped as ``sequence_<number>``, and the faults.

    Raises:
        DataFaults: when ``sequences.csv`` cannot be read.
        ValueError: when there is no frame at all, or nothing gives their sequences.
    """
    root = next((path for path in (source, *sorted(source.glob("*"))) if _folder(path, MASK_FOLDER)), None)
    if root is None or (image_folder := _folder(root, IMAGE_FOLDER)) is None:
        fail(f"no case in {source}: expected the folders {IMAGE_FOLDER!r} and {MASK_FOLDER!r}")
    faults: list[Fault] = []
    images, masks = (frames_by_name(folder, faults) for folder in (image_folder, _folder(root, MASK_FOLDER)))
    table = next((path for path in (root / SEQUENCES_FILE, source / SEQUENCES_FILE) if path.is_file()), None)
    if table is None and images and not (publisher_sequences or _is_complete(images)):
        fail(
            f"nothing says which frames in {image_folder} are of one video, and these must stay together: "
            f"add {root / SEQUENCES_FILE} with the columns frame and sequence (a video, or an examination), or give "
            "--publisher-sequences if these are frames of CVC-ClinicDB with its publisher's numbers, 1 to 612"
        )
    if table is None:
        sequences = {name: sequence_of(int(name)) for name in images if name.isdecimal()}
        ungrouped = (
            "is not in the publisher's list of frames, 1 to 612: add a "
            f"{SEQUENCES_FILE} with the columns frame and sequence"
        )
    else:
        sequences, ungrouped = read_sequences(table, source), f"is in no row of {SEQUENCES_FILE}: add it"

    def group(name: str) -> str | None:
        number = sequences.get(name)
        return None if number is None else f"sequence_{number}"

    cases = pair(images, masks, (f"{IMAGE_FOLDER}/", f"{MASK_FOLDER}/"), faults, "mask", group, ungrouped)
    if not cases and not faults:
        fail(f"no case in {source}: {IMAGE_FOLDER} and {MASK_FOLDER} contain no {', '.join(_suffixes())} files")
    return cases, faults


def _is_complete(images: Mapping[str, Path]) -> bool:
    """Return whether the frames are all of the publisher's, by their numbers and the size of the first that opens."""
    from PIL import Image

    if {*images} != {str(number) for number in range(1, _FIRST_FRAMES[-1])}:
        return False
    for path in images.values():
        try:
            with Image.open(path) as image:
                return image.size == _SIZE
        except OSError:
            continue
    return False


def _suffixes() -> tuple[str, ...]:
    from segbundles.data import FrameReader

    return FrameReader.suffixes()


def _folder(root: Path, name: str) -> Path | None:
    """Return the folder of a name, also if a copy writes it in lower case or with an underscore."""
    plain = name.lower().replace(" ", "")
    folders = (path for path in sorted(root.glob("*")) if path.is_dir())
    return next((p for p in folders if p.name.lower().replace(" ", "").replace("_", "") == plain), None)


def frames_by_name(folder: Path, faults: list[Fault]) -> dict[str, Path]:
    """Return the frames or masks in a folder by the stem of their name; a second file of one stem is a fault."""
    suffixes = _suffixes()
    return files_by_name(folder.glob("*"), lambda p: p.stem if p.suffix.lower() in suffixes else None, faults)


def read_sequences(path: Path, source: Path) -> dict[str, str]:
    """Read a table of frames and their sequences.

    Args:
        path: CSV file with the columns frame and sequence.
        source: an error shows the path relative to this folder.

    Returns:
        The sequence of each frame.

    Raises:
        DataFaults: when it cannot be read.
    """
    try:
        return {row["frame"].strip(): row["sequence"].strip() for row in read_table(path)}
    except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:
        problem = f"cannot be read ({error}): it needs the columns frame and sequence"
        raise DataFaults([Fault(path.name, path, problem)], source) from error


@cache
def _reader(num_classes: int, void_class: int | None) -> CaseReader:
    import numpy as np
    from monai.transforms import LoadImaged

    from segbundles.data import FrameReader, MaskReader
    from segbundles.transforms import CheckImaged, MaskToClassd

    readers = {"image": FrameReader, "label": MaskReader}
    return CaseReader(
        [LoadImaged(key, reader, np.uint8, allow_missing_keys=True) for key, reader in readers.items()],
        CheckImaged(KEYS, spatial_dims=2, channels=3, allow_constant=True, allow_missing_keys=True),
        MaskToClassd("label", num_classes, void_class),
    )


def check_frame(case: Case, num_classes: int = 2, void_class: int | None = None) -> Checked:
    """Read image and mask of a frame and gather all that is wrong with them.

    Args:
        case: the frame.
        num_classes: number of classes in its mask.
        void_class: class of pixels to be ignored.

    Returns:
        Faults, hashes (None for a mask of one class and an image of one value) and facts.
    """
    from segbundles.data import VOID
    from segbundles.meta import notes_of

    reading = _reader(num_classes, void_class)(case)
    result, image = reading.checked, reading.image
    if image is not None:
        result.facts[SIZE] = tuple(image.shape[1:])
        result.facts["colour"] = notes_of(image) or "RGB"
    if reading.label is not None:
        values, classes = (set(mask.unique().tolist()) for mask in (reading.stored, reading.label))
        exact = values <= {0, 255} or max(values) < num_classes + 1
        result.facts["masks"] = "exact" if exact else "grey, taken above 127"
        result.facts[_POLYP] = (100 * float((reading.label == 1).numpy(force=True).mean()),)
        if num_classes > 2 or void_class is not None:
            result.facts["classes"] = " ".join("void" if k == VOID else str(k) for k in sorted(classes))
    return result


def review_frames(source: Path, cases: Sequence[Case], checked: Mapping[str, Checked]) -> tuple[list[Fault], list[str]]:
    """Compare the frames.

    Args:
        source: the folder that was read.
        cases: the frames.
        checked: what `check_frame` found, by case name.

    Returns:
        No faults; notes on frames without polyp and on blank images.
    """
    empty = [c.name for c in cases if checked[c.name].facts.get(_POLYP) == (0.0,)]
    notes = [f"{len(empty)} frames have no polyp: {shorten(empty)}"] if empty else []
    return [], notes + blank_note("frames", cases, checked)


def with_options(
    publisher_sequences: Annotated[
        bool, "The frames have the publisher's numbers, 1 to 612, which give their sequences without sequences.csv."
    ] = False,
) -> DataSet:
    """Return the data set with the sequences of the publisher's list, or of ``sequences.csv`` only."""
    return replace(DATA_SET, find=partial(find_cases, publisher_sequences=publisher_sequences))


DATA_SET = DataSet(
    name="clinicdb",
    summary="CVC-ClinicDB, polyps in colonoscopy frames: Original/<frame>.tif and Ground Truth/<frame>.tif.",
    metadata={
        "description": "Polyps in colonoscopy frames, 29 sequences; masks count as polyp above 127",
        "reference": (
            "Bernal et al., Computerized Medical Imaging and Graphics 43 (2015) 99, "
            "https://doi.org/10.1016/j.compmedimag.2015.02.007"
        ),
        "licence": "research and education, no commercial use; cite the reference",
        "tensorImageSize": "2D",
        "modality": {"0": "red", "1": "green", "2": "blue"},
        "labels": {"0": "background", "1": "polyp"},
    },
    find=find_cases,
    check=check_frame,
    review=review_frames,
    units=("frames", "sequences"),
    further_files=(SEQUENCES_FILE,),
    options=with_options,
)
