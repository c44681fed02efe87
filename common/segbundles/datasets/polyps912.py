"""polyps912 (EndoScene): 912 colonoscopy frames of CVC-ClinicDB and CVC-300, split by patient by its publisher.

Layout: ``polyps_split7/<train, valid or test>/images`` (BMP) and, next to it, ``masks2`` (background 0, polyp 1),
``masks3`` or ``masks4`` (TIFF, class indices). Reference: Vazquez et al., Journal of Healthcare Engineering 2017,
4037190.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

from segbundles.errors import fail

from .clinicdb import check_frame, frames_by_name, read_sequences, review_frames
from .datalist import Case, DataSet, Fault
from .layout import pair

PATIENTS_FILE = "patients.csv"
# folder of masks: number of classes, and the class index that is void
_MASKS = {"masks2": (2, 2), "masks3": (3, 3), "masks4": (3, 3)}
_FOLDERS = {"train": "training", "valid": "validation", "test": "testing"}


def find_cases(source: Path, masks: str) -> tuple[list[Case], list[Fault]]:
    """Find the frames, and those without image or mask.

    Args:
        source: ``polyps_split7`` or the folder above it. A ``patients.csv`` in it (columns frame, such as train/12, and
            sequence) gives the patient of each frame; without it each frame is a group by itself.
        masks: the folder of masks.

    Returns:
        The frames, named ``<folder>/<file>``, with the split that the publisher gave them, and the faults.

    Raises:
        ValueError: when there is no frame at all.
    """
    root = next((path for path in (source, source / "polyps_split7") if (path / "train" / "images").is_dir()), None)
    if root is None:
        fail(f"no case in {source}: expected train/, valid/ and test/ with images/ and {masks}/ in each")
    table = root / PATIENTS_FILE
    group_of = read_sequences(table, source).get if table.is_file() else str
    cases: list[Case] = []
    faults: list[Fault] = []
    for folder, split in _FOLDERS.items():
        if not (root / folder / "images").is_dir():
            continue
        if not (root / folder / masks).is_dir():
            found = sorted(path.name for path in (root / folder).glob("masks*")) or ["none"]
            fail(f"there is no {masks} in {root / folder}: choose --masks from {', '.join(found)}")
        images, labels = (
            {f"{folder}/{stem}": path for stem, path in frames_by_name(root / folder / name, faults).items()}
            for name in ("images", masks)
        )
        places, ungrouped = ("images/", f"{masks}/"), f"is in no row of {PATIENTS_FILE}: add it"
        cases += pair(images, labels, places, faults, "mask", group_of, ungrouped, split)
    if not cases and not faults:
        fail(f"no case in {source}: images/ and {masks}/ contain no frames")
    return cases, faults


def with_masks(
    masks: Annotated[str, "Folder of masks: masks2, masks3 or masks4."] = "masks2",
) -> DataSet:
    """Return the data set with the masks of one folder.

    Args:
        masks: ``masks2``, ``masks3`` or ``masks4``.

    Raises:
        ValueError: when it is none of these.
    """
    if masks not in _MASKS:
        fail(f"masks must be one of {', '.join(_MASKS)}, got {masks!r}")
    classes, void = _MASKS[masks]
    names = ["background", "polyp", *(f"class {k}" for k in range(2, classes))]
    return replace(
        _BASE,
        metadata={
            "description": f"Polyps in colonoscopy frames, {masks}; masks hold class indices, {void} is void",
            **_BASE.metadata,
            "labels": {str(k): name for k, name in enumerate(names)},
            "void_class": void,
        },
        find=partial(find_cases, masks=masks),
        check=partial(check_frame, num_classes=classes, void_class=void),
    )


_BASE = DataSet(
    name="polyps912",
    summary="polyps912 (EndoScene), colonoscopy frames: <train, valid, test>/images and masks2, masks3 or masks4.",
    metadata={
        "reference": (
            "Vazquez et al., Journal of Healthcare Engineering 2017, 4037190, https://doi.org/10.1155/2017/4037190"
        ),
        "licence": "research and education, no commercial use; cite the reference, and Bernal et al. 2012 and 2015",
        "tensorImageSize": "2D",
        "modality": {"0": "red", "1": "green", "2": "blue"},
    },
    find=partial(find_cases, masks="masks2"),
    check=check_frame,
    review=review_frames,
    units=("frames", "groups"),
    further_files=(PATIENTS_FILE, *_MASKS),
    options=with_masks,
)

DATA_SET = with_masks()
