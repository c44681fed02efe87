"""LGG MRI segmentation (Kaggle's ``kaggle_3m``): FLAIR abnormality in brain MR slices of TCGA-LGG patients.

Layout: ``kaggle_3m/<patient>/<patient>_<slice>.tif`` (uint8, three channels: pre-contrast, FLAIR, post-contrast) and
``<patient>_<slice>_mask.tif`` (0 and 255). Reference: Buda et al., Computers in Biology and Medicine 109 (2019) 218.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from segbundles.errors import InputError, fail

from .datalist import Case, Checked, DataSet, Fault
from .layout import files_by_name, pair
from .reading import KEYS, SIZE, CaseReader, blank_note, size_faults
from .splits import shorten

FOLDER = "kaggle_3m"
LABEL_VALUES = (0, 255)
_CHANNELS = ("pre-contrast", "FLAIR", "post-contrast")
# the publisher's archive contains everything a second time in this folder
_COPY = "lgg-mri-segmentation"
_SLICE = re.compile(r".*_([0-9]+)(_mask)?\.tiff?", re.IGNORECASE | re.DOTALL)
_LAST_NUMBER = re.compile(r"[0-9]+$")
_SAME = "same as FLAIR"


def find_cases(source: Path) -> tuple[list[Case], list[Fault]]:
    """Find the slices of kaggle_3m's layout, and those without image or mask.

    A folder is a patient, whatever its name; a file in it is a slice when its name ends in ``_<number>.tif``.

    Args:
        source: ``kaggle_3m`` or the folder above it. ``lgg-mri-segmentation`` is read only if there is nothing else.

    Returns:
        The slices, named ``<patient>_<number>``, and the faults.

    Raises:
        ValueError: when there is no slice at all.
    """
    for root in (source / FOLDER, source, source / _COPY / FOLDER, source / _COPY):
        cases: list[Case] = []
        faults: list[Fault] = []
        for folder in sorted(root.glob("*")):
            if folder.is_dir() and not folder.name.startswith(".") and folder.name not in (FOLDER, _COPY):
                cases += _find_slices(folder, faults)
        if cases or faults:
            return cases, faults
    fail(f"no case in {source}: expected {FOLDER}/<patient>/ with <patient>_<slice>.tif and _mask.tif files")


def _find_slices(folder: Path, faults: list[Fault]) -> list[Case]:
    patient = folder.name

    def slice_name(path: Path, of_mask: bool) -> str | None:
        match = _SLICE.fullmatch(path.name)
        return f"{patient}_{int(match[1])}" if match and bool(match[2]) == of_mask else None

    images, masks = (
        files_by_name(folder.glob("*"), lambda path, of_mask=of_mask: slice_name(path, of_mask), faults, patient)
        for of_mask in (False, True)
    )
    return pair(images, masks, (f"{patient}/", f"{patient}/"), faults, "mask", lambda name: patient)


@cache
def _reader(num_classes: int, label_values: tuple[float, ...] | None, fill: bool) -> CaseReader:
    from monai.transforms import LoadImaged

    from segbundles.data import StackReader
    from segbundles.transforms import CheckImaged, FillChannelsd, LabelToClassd

    check = CheckImaged(KEYS, channels=len(_CHANNELS), allow_constant=True, allow_missing_keys=True)
    return CaseReader(
        [LoadImaged(KEYS, StackReader, allow_missing_keys=True), _check_pages],
        [FillChannelsd("image", len(_CHANNELS), allow_missing_keys=True), check] if fill else check,
        LabelToClassd("label", num_classes, label_values),
    )


def _check_pages(data: dict[str, Any]) -> dict[str, Any]:
    for key in KEYS:
        if key in data and (pages := data[key].shape[2]) > 1:
            raise InputError(f"has {pages} pages, expected one slice per file")
    return data


def check_slice(
    case: Case, num_classes: int = 2, label_values: Sequence[float] | None = LABEL_VALUES, fill: bool = False
) -> Checked:
    """Read image and mask of a slice and gather all that is wrong with them.

    Args:
        case: the slice.
        num_classes: number of classes in its mask.
        label_values: values that a mask may contain, background first; None accepts class indices, and for two classes
            also 0 and 255.
        fill: whether an image of one channel is accepted too, as in training.

    Returns:
        Faults, hashes (None for an image of one value and for an empty mask), the entry's ``slice`` (number at the end
        of the name, if there is one) and ``lesion_area`` (pixels), and facts.
    """
    reading = _reader(num_classes, None if label_values is None else tuple(label_values), fill)(case)
    result, image = reading.checked, reading.image
    if number := _LAST_NUMBER.search(case.name):
        result.extra["slice"] = int(number[0])
    if image is not None:
        result.facts[SIZE] = tuple(image.shape[1:3])
        for index in (0, 2) if result.image_hash else ():
            same = bool((image[index] == image[1]).all())
            result.facts[_CHANNELS[index]] = _SAME if same else "acquired"
    if reading.label is not None:
        area = int((reading.label > 0).sum())
        result.extra["lesion_area"] = area
        result.facts["slices"] = "with lesion" if area else "without lesion"
        if num_classes > 2:
            result.facts["classes"] = " ".join(map(str, reading.label.unique().tolist()))
        if area:
            result.facts["lesion area (pixels)"] = (area,)
    return result


def review_slices(source: Path, cases: Sequence[Case], checked: Mapping[str, Checked]) -> tuple[list[Fault], list[str]]:
    """Compare each patient's slices.

    Args:
        source: the folder that was read.
        cases: the slices.
        checked: what `check_slice` found, by case name.

    Returns:
        Faults (slices whose size differs from most of their patient's) and notes (an ignored second copy, channels that
        replace a missing sequence, gaps in the slice numbers, patients without lesion, blank slices).
    """
    patients: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        patients[case.group].append(case)
    faults: list[Fault] = []
    missing: dict[str, list[str]] = {_CHANNELS[0]: [], _CHANNELS[2]: []}
    gaps, healthy = [], []
    for patient, slices in patients.items():
        results = [checked[c.name] for c in slices]
        faults += size_faults(slices, checked, "the patient")
        for channel, found in missing.items():
            if {r.facts[channel] for r in results if channel in r.facts} == {_SAME}:
                found.append(patient)
        numbers = {r.extra["slice"] for r in results if "slice" in r.extra}
        if numbers and (absent := sorted({*range(min(numbers), max(numbers))} - numbers)):
            gaps.append(f"{patient} (missing {shorten([str(n) for n in absent])})")
        if not any(r.extra.get("lesion_area") for r in results):
            healthy.append(patient)

    notes = [
        f"{copy} is a second copy of the data and ignored"
        for copy in (source / _COPY, source / FOLDER / _COPY)
        if copy.is_dir() and not any(copy in c.image.parents for c in cases)
    ]
    for channel, found in missing.items():
        if found:
            notes.append(f"{channel} is missing and replaced by FLAIR in {len(found)} patients: {shorten(found)}")
    if gaps:
        notes.append(f"slice numbers have gaps in {len(gaps)} patients: {shorten(gaps)}")
    if healthy:
        notes.append(f"{len(healthy)} patients have no lesion: {shorten(healthy)}")
    return faults, notes + blank_note("slices", cases, checked)


DATA_SET = DataSet(
    name="lgg",
    summary="LGG MRI segmentation (kaggle_3m), brain MR slices: <patient>/<patient>_<slice>.tif and _mask.tif.",
    metadata={
        "description": (
            "FLAIR abnormality in brain MR slices of lower-grade glioma patients; label files hold 255 for it"
        ),
        "reference": (
            "Buda et al., Computers in Biology and Medicine 109 (2019) 218, "
            "https://doi.org/10.1016/j.compbiomed.2019.05.002; images from TCGA-LGG"
        ),
        "licence": "TCIA data usage terms of TCGA-LGG; the Kaggle page says CC BY-NC-SA 4.0",
        "tensorImageSize": "2D",
        "modality": {"0": "MRI pre-contrast", "1": "MRI FLAIR", "2": "MRI post-contrast"},
        "labels": {"0": "background", "1": "FLAIR abnormality"},
    },
    find=find_cases,
    check=check_slice,
    review=review_slices,
    units=("slices", "patients"),
    further_files=(_COPY,),  # the review has a note on it
)
