"""Synthetic DICOM series: slices written byte by byte, so that any tag may be wrong or missing, and enhanced files."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom

MR = "1.2.840.10008.5.1.4.1.1.4"
EXPLICIT = "1.2.840.10008.1.2.1"
PATIENT = "DOE^JANE"
PATIENT_ID = "PID0815"
TAGS = {
    "SOPClassUID": (0x0008, 0x0016, "UI"),
    "SOPInstanceUID": (0x0008, 0x0018, "UI"),
    "ImageType": (0x0008, 0x0008, "CS"),
    "Modality": (0x0008, 0x0060, "CS"),
    "StudyDate": (0x0008, 0x0020, "DA"),
    "SeriesDescription": (0x0008, 0x103E, "LO"),
    "PatientName": (0x0010, 0x0010, "PN"),
    "PatientID": (0x0010, 0x0020, "LO"),
    "PatientBirthDate": (0x0010, 0x0030, "DA"),
    "PatientSex": (0x0010, 0x0040, "CS"),
    "EchoTime": (0x0018, 0x0081, "DS"),
    "TriggerTime": (0x0018, 0x1060, "DS"),
    "StudyInstanceUID": (0x0020, 0x000D, "UI"),
    "SeriesInstanceUID": (0x0020, 0x000E, "UI"),
    "SeriesNumber": (0x0020, 0x0011, "IS"),
    "InstanceNumber": (0x0020, 0x0013, "IS"),
    "ImagePositionPatient": (0x0020, 0x0032, "DS"),
    "ImageOrientationPatient": (0x0020, 0x0037, "DS"),
    "FrameOfReferenceUID": (0x0020, 0x0052, "UI"),
    "SamplesPerPixel": (0x0028, 0x0002, "US"),
    "PhotometricInterpretation": (0x0028, 0x0004, "CS"),
    "PlanarConfiguration": (0x0028, 0x0006, "US"),
    "NumberOfFrames": (0x0028, 0x0008, "IS"),
    "Rows": (0x0028, 0x0010, "US"),
    "Columns": (0x0028, 0x0011, "US"),
    "PixelSpacing": (0x0028, 0x0030, "DS"),
    "BitsAllocated": (0x0028, 0x0100, "US"),
    "BitsStored": (0x0028, 0x0101, "US"),
    "HighBit": (0x0028, 0x0102, "US"),
    "PixelRepresentation": (0x0028, 0x0103, "US"),
    "PixelPaddingValue": (0x0028, 0x0120, "US"),
    "PixelPaddingRangeLimit": (0x0028, 0x0121, "US"),
    "RescaleIntercept": (0x0028, 0x1052, "DS"),
    "RescaleSlope": (0x0028, 0x1053, "DS"),
}


def element(group: int, number: int, kind: str, value: object) -> bytes:
    """One element in explicit little endian."""
    if kind == "US":
        body = struct.pack("<H", int(value) & 0xFFFF)
    elif isinstance(value, bytes):
        body = value
    else:
        values = value if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) else [value]
        body = "\\".join(f"{v:.10g}" if isinstance(v, float) else str(v) for v in values).encode()
    body += (b"\0" if kind in ("UI", "OB") else b" ") * (len(body) % 2)
    length = struct.pack("<HI", 0, len(body)) if kind in ("OB", "OW") else struct.pack("<H", len(body))
    return struct.pack("<HH", group, number) + kind.encode() + length + body


def write_slice(path: Path, pixels: np.ndarray, syntax: str = EXPLICIT, preamble: bool = True, **tags: object) -> Path:
    """Write stored values, (rows, columns) or (frames, rows, columns); a tag that is None is left out."""
    rows, columns = pixels.shape[-2:]
    bits = 8 * pixels.itemsize
    values = {
        "SOPClassUID": MR,
        "SOPInstanceUID": f"1.2.3.4.{tags.get('InstanceNumber', 1)}",
        "Modality": "MR",
        "PatientName": PATIENT,
        "PatientID": PATIENT_ID,
        "SeriesInstanceUID": "1.2.3.5",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": rows,
        "Columns": columns,
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        **({"NumberOfFrames": len(pixels)} if pixels.ndim == 3 else {}),
        **tags,
    }
    elements = [element(*TAGS[name], value) for name, value in values.items() if value is not None]
    elements.sort(key=lambda one: struct.unpack("<HH", one[:4]))
    data = element(0x7FE0, 0x0010, "OW", pixels.astype(pixels.dtype.newbyteorder("<")).tobytes())
    if syntax != EXPLICIT:  # one fragment behind an empty table
        items = [b"\xfe\xff\x00\xe0" + struct.pack("<I", len(body)) + body for body in (b"", pixels.tobytes())]
        data = struct.pack("<HH", 0x7FE0, 0x0010) + b"OB\0\0\xff\xff\xff\xff" + b"".join(items)
        data += b"\xfe\xff\xdd\xe0\0\0\0\0"
    meta = element(2, 1, "OB", b"\0\1") + element(2, 2, "UI", values["SOPClassUID"] or "")
    meta += element(2, 3, "UI", values["SOPInstanceUID"]) + element(2, 16, "UI", syntax) + element(2, 18, "UI", "1.2.3")
    start = b"\0" * 128 + b"DICM" + struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(meta)) + meta
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((start if preamble else b"") + b"".join(elements) + data)
    return path


def write_series(
    folder: Path, volume: np.ndarray, affine: np.ndarray, names: Sequence[str] | None = None, **tags: object
) -> list[Path]:
    """Write a volume (x, y, z) whose affine is RAS in mm, a file a slice, named IM0001 .. unless told."""
    places = _places(volume, affine)
    return [
        write_slice(
            folder / (names[k] if names else f"IM{k + 1:04}"),
            volume[:, :, k].T,
            **{
                "InstanceNumber": k + 1,
                **place,
                **tags,
            },
        )
        for k, place in enumerate(places)
    ]


def _places(volume: np.ndarray, affine: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Tags that say where each slice is."""
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :2], axis=0)
    axes = (lps[:3, :2] / spacing).T.ravel()
    return [
        {
            "ImagePositionPatient": lps[:3, 3] + k * lps[:3, 2],
            "ImageOrientationPatient": axes,
            "PixelSpacing": spacing[::-1],
        }
        for k in range(volume.shape[2])
    ]


def _items(**tags: object) -> pydicom.Sequence:
    item = pydicom.Dataset()
    for name, value in tags.items():
        setattr(item, name, value)
    return pydicom.Sequence([item])


def write_enhanced(
    path: Path,
    volume: np.ndarray,
    affine: np.ndarray,
    shared: Sequence[str] = ("PlaneOrientationSequence", "PixelMeasuresSequence"),
    rescale: Sequence[tuple[float, float]] = ((1.0, 0.0),),
    **tags: object,
) -> Path:
    """Write a volume (x, y, z) as one enhanced MR file.

    Args:
        path: the file.
        volume: stored values.
        affine: RAS, in mm.
        shared: functional groups that are written once, for all frames.
        rescale: slope and intercept of each frame, or one for all.
        tags: tags of the file; one that is None is left out.
    """
    write_slice(path, np.ascontiguousarray(volume.T), **{"SOPClassUID": f"{MR}.1", "SeriesNumber": 1, **tags})
    file = pydicom.dcmread(path)
    everywhere, each = pydicom.Dataset(), []
    for k, place in enumerate(_places(volume, affine)):
        slope, intercept = rescale[k % len(rescale)]
        position, axes, spacing = ([round(float(v), 9) for v in values] for values in place.values())
        frame = pydicom.Dataset()
        groups = {
            "PlanePositionSequence": _items(ImagePositionPatient=position),
            "PlaneOrientationSequence": _items(ImageOrientationPatient=axes),
            "PixelMeasuresSequence": _items(PixelSpacing=spacing),
            "PixelValueTransformationSequence": _items(RescaleSlope=slope, RescaleIntercept=intercept),
            "FrameContentSequence": _items(TemporalPositionIndex=1 + k // volume.shape[2]),
        }
        for name, group in groups.items():
            setattr(everywhere if name in shared else frame, name, group)
        each.append(frame)
    file.FrameOfReferenceUID = "1.2.3.6"
    file.SharedFunctionalGroupsSequence = pydicom.Sequence([everywhere])
    file.PerFrameFunctionalGroupsSequence = pydicom.Sequence(each)
    file.save_as(path)
    return path
