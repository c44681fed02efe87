"""Checking of 3D volumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from .datalist import Case, Checked, Fault
from .reading import KEYS, CaseReader

if TYPE_CHECKING:
    import torch

# header fields written in single precision differ in the sixth digit; a real difference is far above this
_TOLERANCE_MM = 1e-3


@cache
def _reader(num_classes: int, label_values: tuple[float, ...] | None, channels: int) -> CaseReader:
    from monai.transforms import LoadImaged

    from segbundles.data import StackReader, SuffixReader
    from segbundles.transforms import CheckImaged, FillChannelsd, LabelToClassd

    check = CheckImaged(KEYS, channels=channels, allow_missing_keys=True)
    return CaseReader(
        [LoadImaged(KEYS, SuffixReader if channels == 1 else StackReader, allow_missing_keys=True)],
        check if channels == 1 else [FillChannelsd("image", channels, allow_missing_keys=True), check],
        LabelToClassd("label", num_classes, label_values),
    )


def check_volumes(
    case: Case,
    label_values: Sequence[float] | None,
    unit_spacing_mm: Callable[[Sequence[int]], Sequence[float] | None] = lambda size: None,
    num_classes: int | None = None,
    channels: int = 1,
    allow_empty: bool = False,
    read_label: Callable[[], torch.Tensor] | None = None,
) -> Checked:
    """Read image and label of a case and gather all that is wrong with them.

    Args:
        case: the case; without a label only the image is checked.
        label_values: values that a label may contain, background first; None accepts class indices, and for two
            classes also 0 and 255.
        unit_spacing_mm: takes the size of an image whose header says 1 mm, and returns its true spacing, which goes
            into the entry as ``spacing_mm``, or None. A header that says otherwise is believed.
        num_classes: number of classes; None is one per value of ``label_values``.
        channels: channels of an image. With several, an image of one is accepted too, as in training.
        allow_empty: whether a label without foreground is accepted.
        read_label: returns the stored values of a label that is not to be loaded like others.

    Returns:
        Faults, hashes, the entry's further keys and facts (sizes in voxels, mm and ml).
    """
    import numpy as np
    from nibabel.orientations import aff2axcodes

    from segbundles.meta import has_spacing, notes_of, spacing_of

    values = None if label_values is None else tuple(label_values)
    reading = _reader(num_classes or len(values or ()), values, channels)(case, read_label)
    result, image = reading.checked, reading.image
    spacing = None
    if image is not None:
        result.facts["size (voxels)"] = tuple(image.shape[1:])
        result.facts |= {"notes": notes} if channels > 1 and (notes := notes_of(image)) else {}
    if image is not None and has_spacing(image):
        spacing = np.array(spacing_of(image))
        if np.allclose(spacing, 1, rtol=0, atol=_TOLERANCE_MM):
            true = unit_spacing_mm(tuple(image.shape[1:]))
            if true is not None:
                spacing = np.array(true)
                result.extra["spacing_mm"] = list(true)
        result.facts["spacing (mm)"] = tuple(np.round(spacing, 4))
        result.facts["orientation"] = "".join(aff2axcodes(image.affine.numpy(force=True)))
    if reading.label is not None and case.label is not None:
        if (num_classes or 0) > 2:
            result.facts["classes"] = " ".join(map(str, np.unique(reading.label.numpy(force=True))))
        foreground = reading.label[0].numpy(force=True) > 0
        if not foreground.any() and allow_empty:
            result.facts["labels"] = "empty"
        elif not foreground.any():
            result.faults.append(Fault(case.name, case.label, "is empty: it has no foreground voxel", case.group))
        elif not result.faults:
            extent = [np.ptp(np.flatnonzero(foreground.any(axis))) + 1 for axis in ((1, 2), (0, 2), (0, 1))]
            result.facts["label box (voxels)"] = tuple(extent)
            if spacing is not None:
                result.facts["label box (mm)"] = tuple(extent * spacing)
                result.facts["label volume (ml)"] = (float(foreground.sum() * np.prod(spacing) / 1000),)
    return result
