"""polyps912 (EndoScene): 912 colonoscopy frames of CVC-ClinicDB and CVC-300, split by patient by its publisher.

Layout: ``polyps_split7/<train, valid or test>/images`` (BMP) and, beside it, ``masks2`` (background 0, polyp 1),
``masks3`` or ``masks4`` (TIFF, class indices). Reference: Vazquez et al., Journal of Healthcare Engineering 2017,
4037190.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .clinicdb import check_frame, list_images, read_sequences, review_frames
from .datalist import Case, DataSet, Fault

__all__ = ["DATA_SET", "MASKS", "METADATA", "PATIENTS_FILE", "find_cases", "with_masks"]

#: folder of masks: number of classes, and the class index that is void
MASKS = {"masks2": (2, 2), "masks3": (3, 3), "masks4": (3, 3)}
PATIENTS_FILE = "patients.csv"
_FOLDERS = {"train": "training", "valid": "validation", "test": "testing"}


def find_cases(source: Path, masks: str = "masks2") -> tuple[list[Case], list[Fault]]:
    """Find the frames, and those that lack image or mask.

    Args:
        source: ``polyps_split7`` or the folder above it. A ``patients.csv`` in it (columns frame, such as train/12, and
            sequence) says of which patient a frame is; without it each frame is a group by itself.
        masks: the folder of masks.

    Returns:
        The frames, named ``<folder>/<file>``, with the section that the publisher gave them, and the faults.

    Raises:
        ValueError: when there is no frame at all.
    """
    root = next((path for path in (source, source / "polyps_split7") if (path / "train" / "images").is_dir()), None)
    if root is None:
        raise ValueError(f"no case in {source}: expected train/, valid/ and test/ with images/ and {masks}/ in each")
    table = root / PATIENTS_FILE
    patients = read_sequences(table, source) if table.is_file() else None
    cases: list[Case] = []
    faults: list[Fault] = []
    for folder, section in _FOLDERS.items():
        if not (root / folder / "images").is_dir():
            continue
        if not (root / folder / masks).is_dir():
            there = sorted(path.name for path in (root / folder).glob("masks*")) or ["none"]
            raise ValueError(f"there is no {masks} in {root / folder}: choose --masks of {', '.join(there)}")
        images, labels = (list_images(root / folder / name, faults) for name in ("images", masks))
        for stem in sorted({*images, *labels}):
            name = f"{folder}/{stem}"
            path = images.get(stem, labels.get(stem))
            group = name if patients is None else patients.get(name)
            if stem not in labels:
                faults.append(Fault(name, path, f"has no mask: {masks}/ holds none of that name", group))
            elif stem not in images:
                faults.append(Fault(name, path, "has no image: images/ holds none of that name", group))
            elif group is None:
                faults.append(Fault(name, path, f"is in no row of {PATIENTS_FILE}: add {name}"))
            else:
                cases.append(Case(name, images[stem], labels[stem], group, section))
    if not cases and not faults:
        raise ValueError(f"no case in {source}: images/ and {masks}/ hold no frames")
    return cases, faults


def _metadata(masks: str) -> Mapping[str, Any]:
    classes, void = MASKS[masks]
    names = ["background", "polyp", *(f"class {k}" for k in range(2, classes))]
    return {
        "description": f"Polyps in colonoscopy frames, {masks}; masks hold class indices, {void} is void",
        "reference": (
            "Vazquez et al., Journal of Healthcare Engineering 2017, 4037190, https://doi.org/10.1155/2017/4037190"
        ),
        "licence": "research and education, no commercial use; cite the reference, and Bernal et al. 2012 and 2015",
        "tensorImageSize": "2D",
        "modality": {"0": "red", "1": "green", "2": "blue"},
        "labels": {str(k): name for k, name in enumerate(names)},
        "void_class": void,
    }


METADATA = _metadata("masks2")

DATA_SET = DataSet(
    name="polyps912",
    metadata=METADATA,
    find=find_cases,
    check=partial(check_frame, num_classes=MASKS["masks2"][0], void_class=MASKS["masks2"][1]),
    review=review_frames,
    units=("frames", "groups"),
)


def with_masks(masks: str) -> DataSet:
    """Return the data set with the masks of one folder.

    Args:
        masks: ``masks2``, ``masks3`` or ``masks4``.

    Raises:
        ValueError: when it is none of these.
    """
    if masks not in MASKS:
        raise ValueError(f"masks must be one of {', '.join(MASKS)}, got {masks!r}")
    classes, void = MASKS[masks]
    return replace(
        DATA_SET,
        metadata=_metadata(masks),
        find=partial(find_cases, masks=masks),
        check=partial(check_frame, num_classes=classes, void_class=void),
    )
