"""Writing segmentations of DICOM series as DICOM SEG."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from monai.config import KeysCollection, PathLike

from segbundles import __version__
from segbundles.data.dicom import sorted_frames
from segbundles.data.dicom_files import GROUPS, read_header
from segbundles.errors import InputError, innermost
from segbundles.files import atomic_path
from segbundles.meta import add_note, file_name
from segbundles.segments import Code, segments_of

from .io import SaveOutputd

if TYPE_CHECKING:
    import highdicom
    import pydicom

__all__ = ["SaveDicomSegd"]

_NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime"),
    *("AccessionNumber", "ReferringPhysicianName"),
)
_FRAME_OF_REFERENCE = "FrameOfReferenceUID"
_SERIES_NUMBER = 1000  # added to that of the source
_LONG = 64  # characters of a description


class SaveDicomSegd(SaveOutputd):
    """Write the segmentation of a DICOM series also as DICOM SEG, ``<stem>_seg.dcm``; of other images nothing.

    The object has one segment per class, is of the type BINARY, refers to the slices that it was made from, and belongs
    to their study. Each of its frames is at the position of one of them; slices without any class are left out, unless
    all are. Missing or invalid descriptions of patient and study stay empty. What makes a DICOM SEG impossible becomes
    a note on the segmentation, and nothing is written.

    Args:
        keys: class maps, (1, x, y, z), on the grid that :class:`segbundles.data.DicomReader` gave the series.
        output_dir: folder to write to.
        data_root_dir: folder (or single image) whose sub-folders are mirrored.
        output_postfix: end of the stem.
        classes: name of each class by its index, see :func:`segbundles.segments.segments_of`.
        codes: codes of the classes.
        series: as for the reader of the images. If several series are the channels of an image, the segmentation
            refers to the first.
        algorithm: name of what made the segmentation, up to 64 characters.
        version: its version.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when the file cannot be written, or a class map is not on the grid of its image.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: PathLike = "./",
        data_root_dir: PathLike = "",
        output_postfix: str = "seg",
        classes: Mapping[Any, str] | None = None,
        codes: Mapping[Any, Mapping[str, Sequence[str]]] | None = None,
        series: int | str | Sequence[int | str] | None = None,
        algorithm: str = "segbundles",
        version: str = __version__,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, output_dir, data_root_dir, output_postfix, allow_missing_keys=allow_missing_keys)
        self.segments = segments_of({1: "segmentation"} if classes is None else classes, codes)
        self.series = series
        self.algorithm = algorithm
        self.version = version

    def _suffix(self, suffix: str, pages: bool) -> str:
        return ".dcm"

    def _save(self, output: torch.Tensor) -> None:
        if not self._is_dicom(output):
            return
        classes = self._on_grid(output)[0]
        source = file_name(output)
        try:
            with _silent():
                made, note = self._object(Path(source), classes)
        except InputError as error:
            add_note(output, f"no DICOM SEG: {innermost(error)}")
        except Exception as error:  # its text may name the patient
            add_note(output, f"no DICOM SEG: the headers of the series are not as expected ({type(error).__name__})")
        else:
            add_note(output, note)
            with atomic_path(self.output_path(source)) as part, _silent():
                made.save_as(part)

    def _object(self, path: Path, classes: np.ndarray) -> tuple[highdicom.seg.Segmentation, str]:
        """Return the DICOM SEG of a class map (x, y, z), and a note on it."""
        import highdicom as hd

        headers, order = _sources(path, self.series)
        if classes.shape != (headers[0].Columns, headers[0].Rows, len(order)):
            raise InputError("the series has changed since it was read.")
        numbers = np.zeros(256, np.uint8)
        numbers[[segment.index for segment in self.segments]] = range(1, len(self.segments) + 1)
        planes = np.empty((len(order), headers[0].Rows, headers[0].Columns), np.uint8)
        planes[order] = numbers[classes.astype(np.uint8)].transpose(2, 1, 0)
        note = _completed(headers)
        first = headers[0]
        made = hd.seg.Segmentation(
            source_images=headers,
            pixel_array=planes,
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=self._descriptions(),
            series_instance_uid=hd.UID(),
            series_number=_SERIES_NUMBER + max(int(first.get("SeriesNumber") or 0), 0),
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="segbundles",
            manufacturer_model_name=self.algorithm,
            software_versions=self.version,
            device_serial_number=self.version,
            content_description="Made by a neural network, not checked by a person",
            series_description=f"Segmentation: {', '.join(segment.name for segment in self.segments)}"[:_LONG],
            omit_empty_frames=bool(planes.any()),
        )
        return made, note

    def _descriptions(self) -> list[highdicom.seg.SegmentDescription]:
        import highdicom as hd
        from pydicom.sr.codedict import codes

        def coded(code: Code) -> hd.sr.CodedConcept:
            return hd.sr.CodedConcept(*code)

        algorithm = hd.AlgorithmIdentificationSequence(
            self.algorithm, codes.DCM.ArtificialIntelligence, self.version, source="segbundles"
        )
        return [
            hd.seg.SegmentDescription(
                segment_number=number,
                segment_label=segment.name[:_LONG],
                segmented_property_category=coded(segment.category),
                segmented_property_type=coded(segment.type),
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
                anatomic_regions=[coded(segment.region)] if segment.region else None,
                display_color=hd.color.CIELabColor.from_rgb(*segment.colour),
            )
            for number, segment in enumerate(self.segments, 1)
        ]


def _sources(path: Path, series: int | str | Sequence[int | str] | None) -> tuple[list[pydicom.Dataset], list[int]]:
    """Return the headers of a series, and for each plane of its volume which header, or frame of the only one, it is.

    Raises:
        ValueError: when the series is such that no DICOM SEG can refer to it.
    """
    frames = sorted_frames(path, series)
    files = list(dict.fromkeys(frame.path for frame in frames))
    headers = [read_header(file) for file in files]
    for header in headers:
        if missing := [name for name in _NEEDED if not header.get(name)]:
            raise InputError(f"{missing[0]} is missing in the series.")
    several = len(files) > 1
    if several and (len(files) < len(frames) or any(GROUPS[0] in one for one in headers)):
        raise InputError("the series has several enhanced (multi-frame) files.")
    distance = float(np.linalg.norm(frames[1].position - frames[0].position))
    for header in headers:  # an object of many frames must have a thickness
        groups = [group for name in GROUPS for group in header.get(name) or ()]
        measures = [item for group in groups for item in group.get("PixelMeasuresSequence") or ()]
        for item in (header, *measures):
            item.SliceThickness = item.get("SliceThickness") or f"{distance:.6g}"
    return headers, list(range(len(frames))) if several else [frame.index for frame in frames]


def _completed(headers: Sequence[pydicom.Dataset]) -> str:
    """Give the headers, in place, what an object that is derived from them must copy, and return a note."""
    import highdicom as hd
    from pydicom.valuerep import DA, TM

    first = headers[0]
    for name in _MAY_BE_EMPTY:
        if first.get(name) is None:
            setattr(first, name, "")
    for name, kind in (
        ("PatientBirthDate", DA),
        ("StudyDate", DA),
        ("StudyTime", TM),
        ("PatientSex", hd.PatientSexValues),
    ):
        if not _valid(kind, first.get(name)):
            setattr(first, name, "")
    first.Modality = first.get("Modality") or "OT"
    if all(header.get(_FRAME_OF_REFERENCE) for header in headers):
        return ""
    made = hd.UID()
    for header in headers:
        header.FrameOfReferenceUID = made
    return "DICOM SEG with a frame of reference of its own, because the series has none"


def _valid(kind: Callable[[Any], Any], value: Any) -> str:
    with suppress(Exception):
        return str(kind(value) or "")
    return ""


@contextmanager
def _silent() -> Iterator[None]:
    """Keep what pydicom and highdicom say about headers out of the log, because it may name the patient."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
