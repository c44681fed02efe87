"""2018 Atrial Segmentation Challenge: late gadolinium enhanced MR of the left atrium.

Layout: ``<case>/lgemri.nrrd`` (uint8) and ``<case>/laendo.nrrd`` (0 and 255), with or without the folders
``Training Set`` and ``Testing Set`` above. Reference: Xiong et al., Medical Image Analysis 67 (2021) 101832.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

from segbundles.errors import fail

from .datalist import Case, Checked, DataSet, Fault
from .splits import shorten
from .volumes import check_volumes

IMAGE_NAME = "lgemri.nrrd"
LABEL_NAME = "laendo.nrrd"
LABEL_VALUES = (0, 255)
# the challenge states 0.625 mm; its files say 1 mm. All have this number of slices; other volumes are not its files
SPACING_MM = (0.625, 0.625, 0.625)
SLICES = 88
_HEADER, _BELIEVED = "header of 1 mm", "believed"


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


def check_case(case: Case, spacing_mm: Sequence[float] | None = None) -> Checked:
    """Read image and label of a case and gather all that is wrong with them.

    Args:
        case: the case.
        spacing_mm: true spacing of files whose header says 1 mm. None is 0.625 mm for files with the challenge's number
            of slices; of others the header is believed.

    Returns:
        As :func:`segbundles.datasets.volumes.check_volumes`.
    """
    result = check_volumes(
        case, LABEL_VALUES, lambda size: spacing_mm or (SPACING_MM if size[2:] == (SLICES,) else None)
    )
    if "spacing_mm" in result.extra:
        result.facts[_HEADER] = "replaced"
    elif set(result.facts.get("spacing (mm)", ())) == {1}:
        result.facts[_HEADER] = _BELIEVED
    return result


def review_cases(source: Path, cases: Sequence[Case], checked: Mapping[str, Checked]) -> tuple[list[Fault], list[str]]:
    """Return no faults, and a note on the cases whose header of 1 mm is believed."""
    names = [case.name for case in cases if checked[case.name].facts.get(_HEADER) == _BELIEVED]
    if not names:
        return [], []
    return [], [
        f"{len(names)} cases have a header of 1 mm and not the {SLICES} slices of the challenge's files, so the header "
        f"is believed; if the voxels have another size, give it with --spacing-mm: {shorten(names)}"
    ]


def with_options(
    spacing_mm: Annotated[
        tuple[float, float, float] | None,
        "Voxel size (width, height, depth) of files whose header says 1 mm. Without it: 0.625 mm for files with the "
        f"{SLICES} slices of the challenge, and 1 mm for others.",
    ] = None,
) -> DataSet:
    """Return the data set with another spacing for files whose header says 1 mm.

    Args:
        spacing_mm: three numbers above 0.

    Raises:
        ValueError: when they are not.
    """
    if spacing_mm is not None and not (len(spacing_mm) == 3 and all(value > 0 for value in spacing_mm)):
        fail(f"spacing_mm must be three numbers above 0 (mm), got {' '.join(map(str, spacing_mm))}")
    return replace(DATA_SET, check=partial(check_case, spacing_mm=spacing_mm))


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
    check=check_case,
    review=review_cases,
    options=with_options,
)
