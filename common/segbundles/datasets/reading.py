"""Reading a case with the readers and transforms of training; what they refuse becomes a fault of the case."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .datalist import Case, Checked, Fault
from .splits import shorten

if TYPE_CHECKING:
    from pathlib import Path

    import torch

KEYS = ("image", "label")
SIZE = "size (pixels)"
# an object is compared in another crop if its box has this many voxels, and as many borders between object and
# background in it: simpler shapes can be equal by chance
_COMPLEX = 64
# values that the image must have in that box
_GREY_LEVELS = 16


@dataclass
class Reading:
    """A case that was read.

    Args:
        checked: its faults and hashes. An image or a label with one value throughout has no hash.
        image: (C, spatial), or None when it was refused.
        stored: values of the label file, (1, spatial), or None when it cannot be read.
        label: class indices (1, spatial), or None when it was refused.
    """

    checked: Checked
    image: torch.Tensor | None = None
    stored: torch.Tensor | None = None
    label: torch.Tensor | None = None


class CaseReader:
    """Read cases as training does.

    Args:
        load: transforms that load the keys ``image`` and ``label``, whichever are there.
        check: transforms that refuse an image, or a label that does not fit its image.
        to_class: transform that turns the stored values of a label into class indices.
    """

    def __init__(self, load: Sequence[Callable], check: Callable | Sequence[Callable], to_class: Callable) -> None:
        from monai.transforms import EnsureChannelFirstd

        self.load = (*load, EnsureChannelFirstd(KEYS, allow_missing_keys=True))
        self.check = check if isinstance(check, Sequence) else [check]
        self.to_class = to_class

    def __call__(self, case: Case, read_label: Callable[[], torch.Tensor] | None = None) -> Reading:
        """Read a case; without a label only the image is checked.

        Args:
            case: the case.
            read_label: returns the stored values of a label that is not to be loaded like others, (1, spatial).
        """
        faults: list[Fault] = []
        image = self._run(case, "image", {"image": case.image, "page": case.page}, [*self.load, *self.check], faults)
        stored = label = None
        if case.label is not None:
            load = self.load if read_label is None else [lambda data: {"label": read_label()}]
            stored = self._run(case, "label", {"label": case.label, "page": case.page}, load, faults)
        if stored is not None:
            label = self._run(case, "label", stored, [self.to_class], faults)
            if image is not None:
                self._run(case, "label", {**image, **stored}, self.check, faults)
        result = Reading(
            Checked(faults),
            *(data and data[key] for data, key in ((image, "image"), (stored, "label"), (label, "label"))),
        )
        checked = result.checked
        checked.image_hash, checked.label_hash = _hash(result.image), _hash(result.label)
        checked.object_hashes = _object_hashes(result.image, result.label)
        return result

    @staticmethod
    def _run(
        case: Case, key: str, data: dict[str, Any], steps: Sequence[Callable], faults: list[Fault]
    ) -> dict[str, Any] | None:
        file = case.images[0] if key == "image" else case.label
        try:
            for step in steps:
                data = step(data)
        except ValueError as error:
            faults.append(Fault(case.name, file, problem_of(error, file, *case.images), case.group))
            return None
        return data


def problem_of(error: ValueError, *files: Path) -> str:
    """Return the message of an error without the folder of the files it names, for a table that has their path."""
    text = str(error).removeprefix(f"{files[0]} ").replace(f"cannot read {files[0]}: ", "cannot be read: ")
    for file in files:
        text = text.replace(str(file), file.name)
    return text.removesuffix(".")


def _hash(tensor: torch.Tensor | None) -> str | None:
    """Return a hash of shape and values; None for one value throughout."""
    array = None if tensor is None else tensor.numpy(force=True)
    if array is None or array.min() == array.max():
        return None
    return hashlib.sha256(str(array.shape).encode() + array.tobytes()).hexdigest()


def _object_hashes(image: torch.Tensor | None, label: torch.Tensor | None) -> tuple[str, ...]:
    """Return hashes of label and image inside the box around the object, which do not depend on the crop.

    A shape that is so simple that others are equal by chance has no hash, nor has an image of few values.
    """
    import numpy as np

    from segbundles.data import VOID

    if label is None:
        return ()
    classes = label[0].numpy(force=True)
    inside = (classes > 0) & (classes != VOID)
    if not inside.any():
        return ()
    box = []
    for axis in range(inside.ndim):
        found = np.flatnonzero(inside.any(tuple(a for a in range(inside.ndim) if a != axis)))
        box.append(slice(found[0], found[-1] + 1))
    inside = inside[tuple(box)]
    borders = sum(np.count_nonzero(np.diff(inside, axis=axis)) for axis in range(inside.ndim))
    if inside.size < _COMPLEX or borders < _COMPLEX:
        return ()
    hashes = [_hash(label[(slice(None), *box)])]
    if image is not None and image.shape[1:] == label.shape[1:]:
        crop = image[(slice(None), *box)]
        if len(np.unique(crop.numpy(force=True))) >= _GREY_LEVELS:
            hashes.append(_hash(crop))
    return tuple(text for text in hashes if text is not None)


def blank_note(units: str, cases: Sequence[Case], checked: Mapping[str, Checked]) -> list[str]:
    """Return a note on the images with one value throughout, if there are any."""
    blank = [c.name for c in cases if checked[c.name].image_hash is None]
    return [f"{len(blank)} {units} are blank, one value throughout: {shorten(blank)}"] if blank else []


def size_faults(cases: Sequence[Case], checked: Mapping[str, Checked], of_group: str) -> list[Fault]:
    """Return a fault for each image whose size differs from that of most images, or of the first ones in a tie.

    Args:
        cases: cases that must be equal in size.
        checked: what was found in them; their fact `SIZE` is compared.
        of_group: what the cases are part of, for the message.
    """
    sizes = {case: checked[case.name].facts[SIZE] for case in cases if SIZE in checked[case.name].facts}
    counts = Counter(sizes.values())
    usual = max(counts, key=counts.__getitem__, default=())

    def text(size: Sequence[float]) -> str:
        return " x ".join(map(str, size))

    return [
        Fault(case.name, case.images[0], f"size {text(size)} differs from {text(usual)} of {of_group}", case.group)
        for case, size in sizes.items()
        if size != usual
    ]
