"""2018 Atrial Segmentation Challenge: late gadolinium enhanced MR of the left atrium.

Layout: ``<case>/lgemri.nrrd`` (uint8) and ``<case>/laendo.nrrd`` (0 and 255), with or without the folders
``Training Set`` and ``Testing Set`` above. Reference: Xiong et al., Medical Image Analysis 67 (2021) 101832.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from segbundles.errors import fail

from .datalist import Case, DataSet, Fault
from .volumes import check_volumes

IMAGE_NAME = "lgemri.nrrd"
LABEL_NAME = "laendo.nrrd"
LABEL_VALUES = (0, 255)
# the challenge states 0.625 mm; its files say 1 mm
SPACING_MM = (0.625, 0.625, 0.625)


def find_cases(source: Path) -> tuple[list[Case], list[Fault]]:
    """Find the cases of LASC18's layout, and the case folders in which one of the two files is missing.

    Args:
        source: the folder of the cases, or the one that contains ``Training Set`` (and ``Testing Set``, whose cases
            are testing).

    Returns:
        The cases and the faults.

    Raises:
        ValueError: when there is no case at all.
    """
    cases, faults = [], []
    for folder, split in ((source, None), (source / "Training Set", None), (source / "Testing Set", "testing")):
        for path in sorted(folder.glob("*")):
            image, label = path / IMAGE_NAME, path / LABEL_NAME
            if image.is_file() and (label.is_file() or split == "testing"):
                cases.append(Case(path.name, image, label if label.is_file() else None, path.name, split))
            elif image.is_file():
                faults.append(Fault(path.name, image, f"has no label: {LABEL_NAME} is missing next to it"))
            elif label.is_file():
                faults.append(Fault(path.name, label, f"has no image: {IMAGE_NAME} is missing next to it"))
    if not cases and not faults:
        fail(f"no case in {source}: expected folders with {IMAGE_NAME} and {LABEL_NAME}")
    return cases, faults


DATA_SET = DataSet(
    name="lasc18",
    summary="2018 Atrial Segmentation Challenge, LGE-CMR: <case>/lgemri.nrrd and laendo.nrrd.",
    metadata={
        "description": "Left atrium in late gadolinium enhanced MR; label files hold 255 for the atrium",
        "reference": "Xiong et al., Medical Image Analysis 67 (2021) 101832",
        "licence": "challenge data, for research; cite the reference",
        "tensorImageSize": "3D",
        "modality": {"0": "LGE-MRI"},
        "labels": {"0": "background", "1": "left atrium"},
    },
    find=find_cases,
    check=partial(check_volumes, label_values=LABEL_VALUES, unit_spacing_mm=SPACING_MM),
)
