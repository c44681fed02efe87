"""LGG MRI segmentation (Kaggle's ``kaggle_3m``): FLAIR abnormality in brain MR slices of TCGA-LGG patients.

Layout: ``kaggle_3m/<patient>/<patient>_<slice>.tif`` (uint8, three channels: pre-contrast, FLAIR, post-contrast) and
``<patient>_<slice>_mask.tif`` (0 and 255). Reference: Buda et al., Computers in Biology and Medicine 109 (2019) 218.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tifffile

from .datalist import Case, Checked, DataSet, Fault, array_hash, shorten

__all__ = ["CHANNELS", "DATA_SET", "FOLDER", "LABEL_VALUES", "METADATA", "check_slice", "find_cases", "review_slices"]

FOLDER = "kaggle_3m"
CHANNELS = ("pre-contrast", "FLAIR", "post-contrast")
LABEL_VALUES = (0, 255)
# the publisher's archive holds everything a second time in this folder
_COPY = "lgg-mri-segmentation"
_SLICE = re.compile(r".*_([0-9]+)(_mask)?\.tiff?", re.IGNORECASE | re.DOTALL)
_SIZE = "size (pixels)"
_SAME = "same as FLAIR"


def find_cases(source: Path) -> tuple[list[Case], list[Fault]]:
    """Find the slices of kaggle_3m's layout, and those that lack image or mask.

    A folder is a patient, whatever its name; a file in it is a slice when its name ends in ``_<number>.tif``.

    Args:
        source: ``kaggle_3m`` or the folder above it. ``lgg-mri-segmentation`` is read only where nothing else is there.

    Returns:
        The slices, named ``<patient>_<number>``, and the faults.

    Raises:
        ValueError: when there is no slice at all.
    """
    for root in (source / FOLDER, source, source / _COPY / FOLDER, source / _COPY):
        cases, faults = [], []
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            if folder.is_dir() and not folder.name.startswith(".") and folder.name not in (FOLDER, _COPY):
                _find_slices(folder, cases, faults)
        if cases or faults:
            return cases, faults
    raise ValueError(
        f"no case in {source}: expected {FOLDER}/<patient>/ with <patient>_<slice>.tif and _mask.tif files"
    )


def _find_slices(folder: Path, cases: list[Case], faults: list[Fault]) -> None:
    patient = folder.name
    images: dict[int, Path] = {}
    masks: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        # the publisher's archive may hold ._* twins, which are no images
        match = _SLICE.fullmatch(path.name)
        if match is None or path.name.startswith(".") or not path.is_file():
            continue
        number = int(match[1])
        first = (masks if match[2] else images).setdefault(number, path)
        if first != path:
            what = "mask" if match[2] else "image"
            problem = f"is a second {what} of slice {number}, beside {first.name}"
            faults.append(Fault(f"{patient}_{number}", path, problem, patient))
    for number in sorted({*images, *masks}):
        name = f"{patient}_{number}"
        if number not in masks:
            faults.append(
                Fault(name, images[number], f"has no mask: {images[number].stem}_mask.tif is missing", patient)
            )
        elif number not in images:
            faults.append(Fault(name, masks[number], f"has no image: slice {number} is missing beside it", patient))
        else:
            cases.append(Case(name, images[number], masks[number], patient))


def check_slice(case: Case) -> Checked:
    """Open image and mask of a slice and gather all that is wrong with them.

    Args:
        case: the slice.

    Returns:
        Faults, hashes (None for an image of one value throughout and for an empty mask), the entry's ``slice`` (number
        in the name) and ``lesion_area`` (pixels), and facts.
    """
    result = Checked(extra={"slice": int(case.name.rpartition("_")[2])})
    image = _open(case, case.image, result)
    mask = _open(case, case.label, result) if case.label is not None else None

    if image is not None:
        channels = image.shape[2] if image.ndim == 3 else 1
        if channels != len(CHANNELS) or image.dtype != np.uint8:
            found = f"{channels} channel{'s' if channels > 1 else ''} of {image.dtype}"
            due = f"3 of uint8 are due ({', '.join(CHANNELS)})"
            result.faults.append(Fault(case.name, case.image, f"has {found} where {due}", case.group))
        else:
            result.facts[_SIZE] = image.shape[1::-1]
            if image.min() != image.max():
                result.image_hash = array_hash(image)
                for index in (0, 2):
                    same = np.array_equal(image[..., index], image[..., 1])
                    result.facts[CHANNELS[index]] = _SAME if same else "acquired"
    if mask is not None and case.label is not None:
        if problem := _mask_problem(mask):
            result.faults.append(Fault(case.name, case.label, problem, case.group))
        else:
            lesion = mask != LABEL_VALUES[0]
            area = int(lesion.sum())
            result.extra["lesion_area"] = area
            result.facts["slices"] = "with lesion" if area else "without lesion"
            if area:
                result.label_hash = array_hash(lesion)
                result.facts["lesion area (pixels)"] = (area,)
        if image is not None and image.shape[:2] != mask.shape[:2]:
            problem = f"size {_show(mask.shape[1::-1])} differs from the image's {_show(image.shape[1::-1])}"
            result.faults.append(Fault(case.name, case.label, problem, case.group))
    return result


def _open(case: Case, path: Path, result: Checked) -> np.ndarray | None:
    """Return pixels (H, W) or (H, W, channels), or None with the fault noted."""
    from segbundles.data.readers import tiff_pixels

    try:
        with tifffile.TiffFile(path) as file:
            array, pages = tiff_pixels(file.pages[0]), len(file.pages)
    except Exception as error:  # tifffile raises anything from struct.error to ValueError on a broken file
        lines = str(error).splitlines() or [type(error).__name__]
        result.faults.append(Fault(case.name, path, f"cannot be read: {lines[-1]}", case.group))
        return None
    if pages > 1:
        result.faults.append(Fault(case.name, path, f"has {pages} pages where one slice a file is due", case.group))
        return None
    return array


def _mask_problem(mask: np.ndarray) -> str | None:
    if mask.ndim != 2:
        return f"has {mask.shape[2]} channels: a mask has one"
    odd = [f"{v:g}" for v in np.unique(mask[(mask != LABEL_VALUES[0]) & (mask != LABEL_VALUES[1])])]
    if odd:
        more = " ..." if len(odd) > 5 else ""
        return f"holds the values {', '.join(odd[:5])}{more} where only {', '.join(map(str, LABEL_VALUES))} are due"
    return None


def review_slices(source: Path, cases: Sequence[Case], checked: Mapping[str, Checked]) -> tuple[list[Fault], list[str]]:
    """Look at each patient's slices together.

    Args:
        source: the folder that was read.
        cases: the slices.
        checked: what `check_slice` found, by case name.

    Returns:
        Faults (slices of other size than most of their patient's) and notes (an ignored second copy, channels that
        stand for a missing sequence, gaps in the slice numbers, patients without lesion, blank slices).
    """
    patients: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        patients[case.group].append(case)
    faults: list[Fault] = []
    missing: dict[str, list[str]] = {CHANNELS[0]: [], CHANNELS[2]: []}
    gaps, healthy = [], []
    for patient, slices in patients.items():
        results = [checked[c.name] for c in slices]
        faults += _size_faults(patient, slices, results)
        for channel, found in missing.items():
            if {r.facts[channel] for r in results if channel in r.facts} == {_SAME}:
                found.append(patient)
        numbers = {r.extra["slice"] for r in results}
        if absent := sorted({*range(min(numbers), max(numbers))} - numbers):
            gaps.append(f"{patient} (lacks {shorten([str(n) for n in absent])})")
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
    blank = [c.name for c in cases if checked[c.name].image_hash is None]
    if blank:
        notes.append(f"{len(blank)} slices are blank, one value throughout: {shorten(blank)}")
    return faults, notes


def _size_faults(patient: str, slices: Sequence[Case], results: Sequence[Checked]) -> list[Fault]:
    sizes = {c: r.facts[_SIZE] for c, r in zip(slices, results, strict=True) if _SIZE in r.facts}
    usual = Counter(sizes.values()).most_common(1)
    return [
        Fault(case.name, case.image, f"size {_show(size)} differs from {_show(usual[0][0])} of the patient", patient)
        for case, size in sizes.items()
        if size != usual[0][0]
    ]


def _show(size: Sequence[float]) -> str:
    return " x ".join(map(str, size))


METADATA = {
    "description": "FLAIR abnormality in brain MR slices of lower-grade glioma patients; label files hold 255 for it",
    "reference": (
        "Buda et al., Computers in Biology and Medicine 109 (2019) 218, "
        "https://doi.org/10.1016/j.compbiomed.2019.05.002; images from TCGA-LGG"
    ),
    "licence": "TCIA data usage terms of TCGA-LGG; the Kaggle page says CC BY-NC-SA 4.0",
    "tensorImageSize": "2D",
    "modality": {"0": "MRI pre-contrast", "1": "MRI FLAIR", "2": "MRI post-contrast"},
    "labels": {"0": "background", "1": "FLAIR abnormality"},
}

DATA_SET = DataSet(
    name="lgg",
    metadata=METADATA,
    find=find_cases,
    check=check_slice,
    review=review_slices,
    units=("slices", "patients"),
)
