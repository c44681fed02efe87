"""Medical Segmentation Decathlon, Task02_Heart: the left atrium in bright-blood MR.

Layout: ``Task02_Heart/imagesTr/<case>.nii.gz``, ``labelsTr`` (0 and 1) and ``imagesTs`` (without labels). Reference:
Antonelli et al., Nature Communications 13 (2022) 4128.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .datalist import Case, DataSet, Fault
from .volumes import check_volumes

__all__ = ["DATA_SET", "LABEL_VALUES", "find_cases"]

LABEL_VALUES = (0, 1)
_SUFFIXES = (".nii.gz", ".nii")


def find_cases(source: Path) -> tuple[list[Case], list[Fault]]:
    """Find the cases of Task02_Heart, and images and labels without their other half.

    Args:
        source: ``Task02_Heart`` or the folder above it.

    Returns:
        The cases, those of ``imagesTs`` as testing, and the faults.

    Raises:
        ValueError: when there is no case at all.
    """
    root = source / "Task02_Heart" if (source / "Task02_Heart").is_dir() else source
    images, labels, tests = (_files(root / folder) for folder in ("imagesTr", "labelsTr", "imagesTs"))
    if not images and not labels and not tests:
        raise ValueError(f"no case in {source}: expected Task02_Heart with imagesTr and labelsTr of .nii.gz files")
    cases = [Case(name, images[name], labels[name], name) for name in images if name in labels]
    cases += [Case(name, path, None, name, "testing") for name, path in tests.items()]
    faults = [Fault(n, p, "has no label: labelsTr lacks it") for n, p in images.items() if n not in labels]
    faults += [Fault(n, p, "has no image: imagesTr lacks it") for n, p in labels.items() if n not in images]
    return cases, faults


def _files(folder: Path) -> dict[str, Path]:
    """Return case name to file; hidden files are skipped, since the publisher's archive holds ``._*`` twins."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        suffix = next((s for s in _SUFFIXES if path.name.endswith(s)), None)
        if suffix is not None and path.is_file() and not path.name.startswith("."):
            found[path.name.removesuffix(suffix)] = path
    return found


METADATA = {
    "description": "Left atrium in bright-blood MR; label files hold 1 for the atrium",
    "reference": "Antonelli et al., Nature Communications 13 (2022) 4128",
    "licence": "CC-BY-SA 4.0",
    "tensorImageSize": "3D",
    "modality": {"0": "MRI"},
    "labels": {"0": "background", "1": "left atrium"},
}

DATA_SET = DataSet(
    name="heart", metadata=METADATA, find=find_cases, check=partial(check_volumes, label_values=LABEL_VALUES)
)
