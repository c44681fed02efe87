"""Checking of 3D volumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from .datalist import Case, Checked, Fault
from .reading import KEYS, CaseReader

# header fields written in single precision differ in the sixth digit; a real difference is far above this
_TOLERANCE_MM = 1e-3


@cache
def _reader(label_values: tuple[int, ...]) -> CaseReader:
    from monai.transforms import LoadImaged

    from segbundles.data import SuffixReader
    from segbundles.transforms import CheckImaged, LabelToClassd

    return CaseReader(
        [LoadImaged(KEYS, SuffixReader, allow_missing_keys=True)],
        CheckImaged(KEYS, allow_missing_keys=True),
        LabelToClassd("label", len(label_values), label_values),
    )


def check_volumes(
    case: Case,
    label_values: Sequence[int],
    unit_spacing_mm: Callable[[Sequence[int]], Sequence[float] | None] = lambda size: None,
) -> Checked:
    """Read image and label of a case and gather all that is wrong with them.

    Args:
        case: the case; without a label only the image is checked.
        label_values: values that a label may contain, background first.
        unit_spacing_mm: takes the size of an image whose header says 1 mm, and returns its true spacing, which goes
            into the entry as ``spacing_mm``, or None. A header that says otherwise is believed.

    Returns:
        Faults, hashes, the entry's further keys and facts (sizes in voxels, mm and ml).
    """
    import numpy as np
    from nibabel.orientations import aff2axcodes

    from segbundles.meta import spacing_of

    reading = _reader(tuple(label_values))(case)
    result, image = reading.checked, reading.image
    if image is not None:
        spacing = np.array(spacing_of(image))
        if np.allclose(spacing, 1, rtol=0, atol=_TOLERANCE_MM):
            true = unit_spacing_mm(tuple(image.shape[1:]))
            if true is not None:
                spacing = np.array(true)
                result.extra["spacing_mm"] = list(true)
        result.facts["size (voxels)"] = tuple(image.shape[1:])
        result.facts["spacing (mm)"] = tuple(np.round(spacing, 4))
        result.facts["orientation"] = "".join(aff2axcodes(image.affine.numpy(force=True)))
    if reading.label is not None and case.label is not None:
        foreground = reading.label[0].numpy(force=True) > 0
        if not foreground.any():
            result.faults.append(Fault(case.name, case.label, "is empty: it has no foreground voxel", case.group))
        elif not result.faults:
            extent = [np.ptp(np.flatnonzero(foreground.any(axis))) + 1 for axis in ((1, 2), (0, 2), (0, 1))]
            result.facts["label box (voxels)"] = tuple(extent)
            result.facts["label box (mm)"] = tuple(extent * spacing)
            result.facts["label volume (ml)"] = (float(foreground.sum() * np.prod(spacing) / 1000),)
    return result
