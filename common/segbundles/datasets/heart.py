"""Medical Segmentation Decathlon, Task02_Heart: the left atrium in bright-blood MR.

Layout: ``Task02_Heart/imagesTr/<case>.nii.gz``, ``labelsTr`` (0 and 1) and ``imagesTs`` (without labels). Reference:
Antonelli et al., Nature Communications 13 (2022) 4128.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from segbundles.errors import fail

from .datalist import Case, DataSet, Fault
from .layout import files_by_name, pair
from .volumes import check_volumes

_SUFFIXES = (".nii.gz", ".nii")


def find_cases(source: Path) -> tuple[list[Case], list[Fault]]:
    """Find the cases of Task02_Heart, and images and labels that have no partner.

    Args:
        source: ``Task02_Heart`` or the folder above it.

    Returns:
        The cases, those of ``imagesTs`` as testing, and the faults.

    Raises:
        ValueError: when there is no case at all.
    """
    root = source / "Task02_Heart" if (source / "Task02_Heart").is_dir() else source
    faults: list[Fault] = []
    images, labels, tests = (
        files_by_name((root / folder).glob("*"), _case_name, faults) for folder in ("imagesTr", "labelsTr", "imagesTs")
    )
    if not images and not labels and not tests:
        fail(f"no case in {source}: expected Task02_Heart with imagesTr and labelsTr of .nii.gz files")
    cases = pair(images, labels, ("imagesTr", "labelsTr"), faults)
    return cases + [Case(name, path, None, name, "testing") for name, path in tests.items()], faults


def _case_name(path: Path) -> str | None:
    return next((path.name.removesuffix(suffix) for suffix in _SUFFIXES if path.name.endswith(suffix)), None)


DATA_SET = DataSet(
    name="heart",
    summary="Decathlon Task02_Heart, bright-blood MR: imagesTr and labelsTr, .nii.gz.",
    metadata={
        "description": "Left atrium in bright-blood MR; label files hold 1 for the atrium",
        "reference": "Antonelli et al., Nature Communications 13 (2022) 4128",
        "licence": "CC-BY-SA 4.0",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "left atrium"},
    },
    find=find_cases,
    check=partial(check_volumes, label_values=(0, 1)),
)
