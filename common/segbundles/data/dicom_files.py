"""One DICOM file: whether it is an image, what its header says about its frames, and their pixels."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
from monai.config import PathLike
from pydicom import encaps
from pydicom.datadict import tag_for_keyword
from pydicom.uid import RLELossless

from segbundles.errors import InputError
from segbundles.files import shown

__all__ = [
    "Frame",
    "NotPlacedError",
    "SeriesTags",
    "is_dicom_slice",
    "read_frames",
    "read_header",
    "read_pixels",
    "read_series_tags",
]

STORAGE = "1.2.840.10008.5.1.4.1.1."
# waveforms, presentation states, registrations and segmentations, reports, documents, radiotherapy, spectra
NOT_SCANS = ("9.", "11.", "66", "88.", "104.", "481.", "4.2")
SYNTAX = "1.2.840.10008.1.2"
UNCOMPRESSED = ("", SYNTAX, f"{SYNTAX}.1", f"{SYNTAX}.1.99", f"{SYNTAX}.2")
CODECS: dict[str, Callable[[bytes], np.ndarray]] = {
    **dict.fromkeys([f"{SYNTAX}.4.{n}" for n in (50, 51, 57, 70)], imagecodecs.jpeg8_decode),
    **dict.fromkeys([f"{SYNTAX}.4.{n}" for n in (80, 81)], imagecodecs.jpegls_decode),
    **dict.fromkeys([f"{SYNTAX}.4.{n}" for n in (90, 91, 201, 202, 203)], imagecodecs.jpeg2k_decode),
}
COSINE_TOLERANCE = 1e-3
SERIES = ["SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "PatientID", "NumberOfFrames", "Rows"]
# what may differ between slices at the same place: its tag, and where an enhanced file has it
REPEATS = {
    "EchoTime": ("EchoTime", "MREchoSequence", "EffectiveEchoTime"),
    "InversionTime": ("InversionTime", "MRModifierSequence", "InversionTimes"),
    "TriggerTime": ("TriggerTime", "CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"),
    "DiffusionBValue": ("DiffusionBValue", "MRDiffusionSequence", "DiffusionBValue"),
    "TemporalPositionIdentifier": (
        "TemporalPositionIdentifier",
        "FrameContentSequence",
        "TemporalPositionIndex",
    ),
    "ImageType": ("ImageType", "MRImageFrameTypeSequence", "FrameType"),
    "AcquisitionNumber": ("AcquisitionNumber", "FrameContentSequence", "FrameAcquisitionNumber"),
}
GROUPS = ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")
HEADER = [
    *(tag for tag, _, _ in REPEATS.values()),
    *GROUPS,
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
]
PIXELS = [
    *("PixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *("FloatPixelData", "ModalityLUTSequence"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "PixelRepresentation"),
]


class NotPlacedError(InputError):
    """Report an image whose header does not say where in the patient it is, such as a photograph of a screen."""


@dataclass(frozen=True)
class SeriesTags:
    """What says to which series a file belongs.

    Args:
        uid: identifier of the series.
        number: its number, or None.
        description: its description; may be empty.
        patient: identifier of the patient, which only serves to tell patients apart.
        frames: number of frames in the file.
    """

    uid: str
    number: int | None
    description: str
    patient: str
    frames: int


@dataclass(frozen=True)
class Frame:
    """The parts of a frame's header that are needed; nothing that identifies the patient.

    Args:
        path: the file.
        index: number of the frame in the file, from 0.
        count: number of frames in the file.
        columns_rows: size in pixels.
        grey: whether it has grey levels, not colours.
        position: centre of the first pixel, in mm, LPS.
        axes: directions of a row and of a column, (2, 3).
        spacing: distances in mm of columns and of rows.
        repeat: what may differ between slices at the same place.
        bits: BitsAllocated, BitsStored and HighBit.
        signed: whether stored values have a sign.
        inverted: whether low values are bright.
        slope: factor from stored values to grey levels.
        intercept: grey level of the stored value 0.
        padding: lowest and highest stored value that mark pixels outside the field of view.
    """

    path: Path
    index: int
    count: int
    columns_rows: tuple[int, int]
    grey: bool
    position: np.ndarray
    axes: np.ndarray
    spacing: np.ndarray
    repeat: dict[str, str]
    bits: tuple[int, int, int]
    signed: bool
    inverted: bool
    slope: float
    intercept: float
    padding: tuple[int, int] | None

    @property
    def name(self) -> str:
        """Name for messages."""
        return _name(self.path, self.index, self.count)


def _name(path: Path, index: int, count: int) -> str:
    return shown(path.name) + (f" frame {index + 1}" if count > 1 else "")


def is_dicom_slice(path: PathLike) -> bool:
    """Return whether a file is a DICOM image, whatever its name; a damaged file that ends in ``.dcm`` counts as one.

    DICOMDIR, reports, presentation states and other objects that are not scans do not count.
    """
    with Path(path).open("rb") as file:
        head = file.read(1024)
    if head[128:132] == b"DICM":
        # group 2 is always in explicit little endian
        found = re.search(rb"\x02\x00\x02\x00UI..([\d.]+)", head[132:], re.DOTALL)
        return not found or _is_scan(found[1])
    if Path(path).suffix.lower() == ".dcm":
        return True
    # without the preamble: the first element is of group 2 or 8, and one of the next says what kind of object it is
    found = head[:2] in (b"\x02\x00", b"\x08\x00", b"\x00\x08") and re.search(
        rb"(?:\x02\x00\x02\x00|\x08\x00\x16\x00|\x00\x08\x00\x16)(?:UI..|..\x00\x00)([\d.]+)", head, re.DOTALL
    )
    return bool(found) and _is_scan(found[1])


def _is_scan(kind: bytes) -> bool:
    """Return whether a class of objects (SOPClassUID) is of scans."""
    name = kind.decode()
    return name.startswith(STORAGE) and not name.removeprefix(STORAGE).startswith(NOT_SCANS)


@contextmanager
def _careful(path: Path) -> Iterator[None]:
    """Refuse a file by name whatever pydicom raises, and silence what it reports about headers that can be read."""
    log = logging.getLogger("pydicom")
    disabled, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{shown(path.name)} does not fit into memory, or its header is damaged.") from None
    except Exception:
        raise InputError(f"{shown(path.name)} is truncated or damaged: copy it again.") from None
    finally:
        log.disabled = disabled


def _text(dataset: pydicom.Dataset, keyword: str) -> str:
    """Return a value as the header has it, several of them separated by backslashes; empty if there is none."""
    try:
        value = dataset.get(keyword)
    except Exception:  # for example letters where numbers are expected
        value = dataset.get_item(tag_for_keyword(keyword)).value
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    many = isinstance(value, Sequence) and not isinstance(value, str)
    return "" if value is None else "\\".join(map(str, value)) if many else str(value).strip(" \0")


def _integer(dataset: pydicom.Dataset, keyword: str, default: int) -> int:
    return int(_text(dataset, keyword) or default)


def read_series_tags(path: Path) -> SeriesTags:
    """Return the tags of a file that say to which series it belongs.

    Raises:
        ValueError: when the header is truncated or damaged.
    """
    with _careful(path):
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=SERIES)
        header.Rows  # noqa: B018  # one of the last tags: a truncated header does not have it
        number, frames = (_text(header, keyword) for keyword in ("SeriesNumber", "NumberOfFrames"))
        return SeriesTags(
            uid=_text(header, "SeriesInstanceUID"),
            number=int(number) if re.fullmatch(r"-?\d+", number) else None,
            description=_text(header, "SeriesDescription"),
            patient=_text(header, "PatientID"),
            frames=int(frames or 1),
        )


def read_header(path: Path) -> pydicom.Dataset:
    """Return all tags of a file except the pixels, as the source of an object that is derived from it.

    Raises:
        ValueError: when the header is truncated or damaged.
    """
    with _careful(path):
        return pydicom.dcmread(path, stop_before_pixels=True, force=True)


def read_frames(path: Path) -> list[Frame]:
    """Return the frames of a file: one of a classic slice, several of an enhanced (multi-frame) file.

    Raises:
        ValueError: when the header is truncated or damaged, or does not say where the frames are.
    """
    with _careful(path):
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=HEADER)
        header.Rows, header.Columns  # noqa: B018
        count = _integer(header, "NumberOfFrames", 1)
        each = header.get(GROUPS[0])
        shared = (header.get(GROUPS[1]) or [pydicom.Dataset()])[0]
        if each is None and count == 1:
            return [_frame(path, header, [], 0, 1)]
        if not each:
            raise InputError(
                f"{shown(path.name)} has {count} frames, but not where each of them is: convert it to NIfTI with "
                "dcm2niix, or export it as single slices."
            )
        if len(each) != count:
            raise InputError(
                f"{shown(path.name)} has {count} frames but describes {len(each)} of them: copy it again, or export it "
                "again."
            )
        return [_frame(path, header, [group, shared], index, count) for index, group in enumerate(each)]


def _frame(path: Path, header: pydicom.Dataset, groups: Sequence[pydicom.Dataset], index: int, count: int) -> Frame:
    name = _name(path, index, count)

    def text(keyword: str, sequence: str, inner: str = "") -> str:
        """Return the value of this frame, of all frames, or of the file."""
        for group in groups:
            if items := group.get(sequence):
                return _text(items[0], inner or keyword)
        return _text(header, keyword)

    def numbers(keyword: str, sequence: str, length: int, default: str = "") -> np.ndarray:
        stated = text(keyword, sequence) or default
        try:
            values = np.array([float(part) for part in stated.split("\\")])
        except ValueError:
            values = np.empty(0)
        if len(values) != length or not np.isfinite(values).all():
            raise NotPlacedError(
                f"the {keyword} of {name} is {stated or 'missing'} but must have {length} number{'s'[: length > 1]}: "
                "the file is not a slice of a volume, or its anonymisation removed too much; leave it out, or export "
                "it again."
            )
        return values

    axes = numbers("ImageOrientationPatient", "PlaneOrientationSequence", 6).reshape(2, 3)
    if np.abs(axes @ axes.T - np.eye(2)).max() > COSINE_TOLERANCE:
        raise InputError(
            f"{name} has axes {format_numbers(axes.ravel())}, which are not perpendicular and of length 1: export it "
            "again."
        )
    spacing = numbers("PixelSpacing", "PixelMeasuresSequence", 2)[::-1]  # rows come first
    if not (spacing > 0).all():
        raise InputError(
            f"the PixelSpacing of {name} is {format_numbers(spacing[::-1])} but must be two positive numbers (mm): "
            "export it again."
        )
    slope, intercept = (
        numbers(keyword, "PixelValueTransformationSequence", 1, default)[0]
        for keyword, default in (("RescaleSlope", "1"), ("RescaleIntercept", "0"))
    )
    if not slope:
        raise InputError(f"the RescaleSlope of {name} is 0, so that all its grey levels are equal: export it again.")
    allocated = _integer(header, "BitsAllocated", 16)
    stored = _integer(header, "BitsStored", allocated)
    bits = (allocated, stored, _integer(header, "HighBit", stored - 1))
    if allocated not in (8, 16, 32) or not 0 < stored <= bits[2] + 1 <= allocated:
        raise InputError(
            f"{name} has BitsAllocated {bits[0]}, BitsStored {bits[1]} and HighBit {bits[2]}, which is not supported: "
            "export it again."
        )
    signed = _integer(header, "PixelRepresentation", 0) == 1
    photometric = _text(header, "PhotometricInterpretation")
    return Frame(
        path=path,
        index=index,
        count=count,
        columns_rows=(int(header.Columns), int(header.Rows)),
        grey=photometric in ("", "MONOCHROME1", "MONOCHROME2") and _integer(header, "SamplesPerPixel", 1) == 1,
        position=numbers("ImagePositionPatient", "PlanePositionSequence", 3),
        axes=axes / np.linalg.norm(axes, axis=1, keepdims=True),
        spacing=spacing,
        repeat={label: text(*where) for label, where in REPEATS.items()},
        bits=bits,
        signed=signed,
        inverted=photometric == "MONOCHROME1",
        slope=float(slope),
        intercept=float(intercept),
        padding=_padding(header, signed),
    )


def _padding(header: pydicom.Dataset, signed: bool) -> tuple[int, int] | None:
    """Return the range of stored values that mark padding.

    The tags are US or SS as PixelRepresentation says, but not every writer follows this.
    """
    found = []
    for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        value: Any = header.get(keyword)
        if isinstance(value, bytes):  # implicit: the type is not in the file
            value = int.from_bytes(value[:2], "little") if value else None
        if isinstance(value, int):
            value &= 0xFFFF
            found.append(value - 0x10000 if signed and value >= 0x8000 else value)
        elif keyword == "PixelPaddingValue":
            return None
    return min(found), max(found)


def read_pixels(frames: Sequence[Frame]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield the grey levels of each frame, and where it is padded.

    Args:
        frames: frames of one or several files.

    Yields:
        Grey levels (columns, rows), float32, rescaled, with low values dark; and the pixels that are padding, or None.

    Raises:
        ValueError: when a file is truncated or damaged, or has a compression that is not supported.
    """
    opened: dict[Path, pydicom.Dataset] = {}
    for frame in frames:
        path = frame.path
        with _careful(path):
            dataset = opened.get(path)
            if dataset is None:
                dataset = pydicom.dcmread(path, force=True, specific_tags=PIXELS)
            if frame.count > 1:
                opened[path] = dataset
            held = _decode(dataset, frame)
            stored = _without_unused_bits(held, frame)
            padded = None
            if frame.padding is not None:
                low, high = frame.padding
                # the padding value may need more bits than BitsStored
                padded = (((held >= low) & (held <= high)) | ((stored >= low) & (stored <= high))).T
            if tables := dataset.get("ModalityLUTSequence"):
                values = _looked_up(stored, tables[0], frame, _is_little_endian(dataset))
            else:
                if frame.inverted:
                    stored = (-1 if frame.signed else 2 ** frame.bits[1] - 1) - stored
                values = stored * frame.slope + frame.intercept
        yield values.astype(np.float32).T, padded


def _looked_up(stored: np.ndarray, table: pydicom.Dataset, frame: Frame, little: bool) -> np.ndarray:
    """Return the grey levels that a table (Modality LUT) gives stored values, with low values dark."""
    count, first, bits = (int(value) & 0xFFFF for value in table.LUTDescriptor)
    count = count or 2**16
    if frame.signed and first >= 0x8000:
        first -= 0x10000
    data = table.LUTData
    if isinstance(data, bytes):
        kind = ("<u2" if little else ">u2") if len(data) >= 2 * count else "u1"
        levels = np.frombuffer(data, kind, count)
    else:
        levels = np.array(data)[:count] & 0xFFFF
    levels = levels.astype(np.int64)[np.clip(stored - first, 0, count - 1)]
    return 2**bits - 1 - levels if frame.inverted else levels


def _is_little_endian(dataset: pydicom.Dataset) -> bool:
    if hasattr(dataset, "original_encoding"):
        return bool(dataset.original_encoding[1])
    return bool(dataset.is_little_endian)  # pydicom 2


def _decode(dataset: pydicom.Dataset, frame: Frame) -> np.ndarray:
    """Return the values of a frame as the file holds them, (rows, columns), int64, with unused bits."""
    if "FloatPixelData" in dataset:
        raise InputError(
            f"{shown(frame.path.name)} has its pixels in FloatPixelData, which is not supported: convert the series to "
            "NIfTI."
        )
    syntax = str(getattr(dataset.file_meta, "TransferSyntaxUID", ""))
    columns, rows = frame.columns_rows
    allocated, stored, high = frame.bits
    size = allocated // 8
    if syntax in UNCOMPRESSED:
        data, length = dataset.PixelData, columns * rows * size
        little = _is_little_endian(dataset)
        if len(data) < length * frame.count:
            raise EOFError
        if size == 1 and not little and dataset["PixelData"].VR == "OW":  # pairs of bytes are swapped
            data = np.frombuffer(data, ">u2").astype("<u2").tobytes()
        kind = f"{'<' if little else '>'}{'i' if frame.signed else 'u'}{size}"
        array = np.frombuffer(data, kind, columns * rows, length * frame.index).reshape(rows, columns)
        array = array >> (high + 1 - stored)
    elif syntax == RLELossless:
        array = dataset.pixel_array
        array = array[frame.index] if array.ndim == 3 else array
    elif syntax in CODECS:
        array = CODECS[syntax](_encoded(dataset, frame))
    else:
        raise InputError(
            f"{shown(frame.path.name)} has an unsupported compression (transfer syntax {syntax}): export it "
            "uncompressed, or convert it with `gdcmconv --raw`."
        )
    if array.shape != (rows, columns) or array.dtype.kind not in "iu":
        raise EOFError
    return array.astype(np.int64)


def _encoded(dataset: pydicom.Dataset, frame: Frame) -> bytes:
    """Return the compressed data of a frame."""
    if not hasattr(encaps, "get_frame"):  # pydicom 2, which MONAI Label needs
        frames = encaps.generate_pixel_data_frame(dataset.PixelData, frame.count)
        return next(islice(frames, frame.index, None))
    tables = [dataset.get(keyword) for keyword in PIXELS[1:3]]
    offsets = tuple(tables) if all(tables) else None
    return encaps.get_frame(dataset.PixelData, frame.index, number_of_frames=frame.count, extended_offsets=offsets)


def _without_unused_bits(held: np.ndarray, frame: Frame) -> np.ndarray:
    """Return the stored values: older scanners keep drawings in the bits above BitsStored."""
    stored = frame.bits[1]
    values = held & (2**stored - 1)
    sign = 2 ** (stored - 1) if frame.signed else 0
    return (values ^ sign) - sign


def format_numbers(values: Sequence[float] | np.ndarray) -> str:
    """Write numbers with up to six digits, such as ``(0.5, 0.5, 2)``."""
    return f"({', '.join(f'{value:.6g}' for value in values)})"
