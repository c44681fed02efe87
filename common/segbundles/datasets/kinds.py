"""What a bundle reads, taken from its configs: the kind of its cases, and how one is checked as in training."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segbundles.commands import find_bundle
from segbundles.errors import fail
from segbundles.files import read_json
from segbundles.segments import SEGMENTATION

from . import clinicdb, isbi2012, lgg
from .datalist import Case, Checked
from .volumes import check_volumes

if TYPE_CHECKING:
    import torch

VOLUMES, STACKS, SECTIONS, FRAMES = "volumes", "stacks", "sections", "frames"
# the class of a bundle's transforms that reads images, and what it reads
_READERS = {"SuffixReader": VOLUMES, "StackReader": STACKS, "LoadPaged": SECTIONS, "FrameReader": FRAMES}


@dataclass(frozen=True)
class LabelValues:
    """What the label files of a data set contain.

    Args:
        num_classes: number of classes, background included.
        values: stored value of each class; None accepts class indices, and for two classes also 0 and 255.
        segments: segments of 3D Slicer that are class 1, 2 and so on; none where each file has one.
        void_class: class of pixels to be ignored, in frames.
    """

    num_classes: int = 2
    values: tuple[float, ...] | None = None
    segments: tuple[str, ...] = ()
    void_class: int | None = None


@dataclass(frozen=True)
class Kind:
    """What a bundle reads.

    Args:
        bundle: folder of the bundle.
        name: `VOLUMES` (of one channel), `STACKS` (slices and volumes of several channels), `SECTIONS` or `FRAMES`.
        channels: number of channels of an image.
        modality: name of each channel, by its number.
        classes: name of each class, by its index.
    """

    bundle: Path
    name: str
    channels: int = 1
    modality: dict[str, str] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, bundle: str) -> Kind:
        """Read the configs of a bundle.

        Args:
            bundle: its folder or name, see :func:`segbundles.commands.find_bundle`.

        Raises:
            ValueError: when there is no such bundle, or its transforms read images in a way that is not known here.
        """
        root = find_bundle(bundle)
        configs = root / "configs"
        try:
            train, formats = read_json(configs / "train.json"), read_json(configs / "metadata.json")
            steps = train["train"]["deterministic_transforms"]
            formats = formats["network_data_format"]
            image, pred = formats["inputs"]["image"], formats["outputs"]["pred"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(
                f"{configs} does not say what the bundle reads ({error!r}): give the folder of a bundle that can train."
            )
        targets = [str(step.get(key, "")).rpartition(".")[2] for step in steps for key in ("_target_", "reader")]
        name = next((_READERS[target] for target in targets if target in _READERS), None)
        if name is None:
            fail(
                f"{configs / 'train.json'} reads images with none of {', '.join(_READERS)}: write its datalist by hand."
            )
        channels = next((step.get("channels", 1) for step in steps if "CheckImaged" in step.get("_target_", "")), 1)
        return cls(root, name, channels, image.get("channel_def", {}), pred.get("channel_def", {}))

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the files that can be read; ``.dcm`` means folders of DICOM slices."""
        from segbundles.data import FrameReader, SuffixReader
        from segbundles.data.base import PIL, TIFF

        pictures = FrameReader.suffixes()
        if self.name == VOLUMES:
            return tuple(suffix for suffix in SuffixReader.suffixes() if suffix not in (*TIFF, *PIL))
        return SuffixReader.suffixes() if self.name == STACKS else pictures

    def is_slice(self, case: Case) -> bool:
        """Return whether a case of `STACKS` is one slice of a stack."""
        from segbundles.data.pictures import is_slice

        return self.name == STACKS and len(case.images) == 1 and is_slice(case.images[0])

    def check(self, case: Case, labels: LabelValues) -> Checked:
        """Read image and label of a case as training does, and gather all that is wrong with them.

        Args:
            case: the case.
            labels: what its label file contains.

        Returns:
            Faults, hashes, the entry's further keys, facts, and the label file that has to be written.
        """
        if self.name == SECTIONS:
            return isbi2012.check_section(case, labels.values)
        if self.name == FRAMES:
            return clinicdb.check_frame(case, labels.num_classes, labels.void_class)
        if self.is_slice(case):
            checked = lgg.check_slice(case, labels.num_classes, labels.values, fill=True)
        else:
            checked = self._check_volume(case, labels)
        if labels.values is not None and case.label is not None:
            checked.extra["label_values"] = list(labels.values)
        return checked

    def _check_volume(self, case: Case, labels: LabelValues) -> Checked:
        options: dict[str, Any] = {"num_classes": labels.num_classes, "channels": self.channels}
        options["allow_empty"] = self.name == STACKS
        if case.label is None or not case.label.name.lower().endswith(SEGMENTATION):
            return check_volumes(case, labels.values, **options)
        written: list[bytes] = []
        checked = check_volumes(case, labels.values, **options, read_label=_segments(case, labels, written))
        checked.label_file = written[0] if written else None
        return checked


def _segments(case: Case, labels: LabelValues, written: list[bytes]) -> Callable[[], torch.Tensor]:
    """Return a function that reads the segments of a case, and adds the label file that is to be written."""

    def read() -> torch.Tensor:
        import nibabel as nib
        import numpy as np
        import torch
        from monai.data import MetaTensor

        from segbundles.data import read_segments
        from segbundles.meta import FILE

        array, affine = read_segments(case.label, case.images[0], labels.segments)
        if labels.values is not None:
            array = np.asarray(labels.values, np.float32)[array]
        written.append(gzip.compress(nib.Nifti1Image(array, affine).to_bytes(), mtime=0))
        return MetaTensor(torch.from_numpy(array)[None], affine=torch.from_numpy(affine), meta={FILE: str(case.label)})

    return read


def names_of(classes: Sequence[str]) -> dict[str, str]:
    """Return class names by index, as a datalist has them."""
    return {str(index): name for index, name in enumerate(classes)}
