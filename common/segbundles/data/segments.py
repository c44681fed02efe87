"""Segmentations of 3D Slicer (``.seg.nrrd``): as labels on the grid of their images, and the header to write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import PathLike
from monai.utils import MetaKeys
from scipy.ndimage import affine_transform, find_objects

from segbundles.data.base import CHANNEL_TOLERANCE
from segbundles.data.readers import StackReader
from segbundles.data.volumes import SimpleITKReader
from segbundles.errors import InputError
from segbundles.itk import quiet_itk
from segbundles.segments import Segment

__all__ = ["read_segments", "segments_of", "slicer_header"]


def segments_of(path: PathLike) -> list[dict[str, Any]]:
    """Return the segments of a file in their order: ``name``, stored ``value`` and ``layer``.

    Args:
        path: a ``.seg.nrrd`` file.

    Raises:
        ValueError: when it has no segments.
    """
    import SimpleITK as sitk  # noqa: N813

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with quiet_itk():
        reader.ReadImageInformation()
    keys = [key for key in reader.GetMetaDataKeys() if re.fullmatch(r"Segment\d+_ID", key)]
    numbers = sorted(int(key[len("Segment") : -len("_ID")]) for key in keys)

    def field(number: int, name: str, default: Any) -> str:
        key = f"Segment{number}_{name}"
        return reader.GetMetaData(key).strip() if reader.HasMetaDataKey(key) else str(default)

    found = [
        {"name": field(n, "Name", n + 1), "value": int(field(n, "LabelValue", 1)), "layer": int(field(n, "Layer", 0))}
        for n in numbers
    ]
    if not found:
        raise InputError("has no segments: save it in 3D Slicer as a segmentation, or rename it if it is a label")
    return found


def read_segments(path: PathLike, image: PathLike, names: Sequence[str] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Read segments as class indices on the grid of an image.

    3D Slicer stores only the box around the segments. Outside it is background.

    Args:
        path: a ``.seg.nrrd`` file.
        image: the image that was segmented, or its first channel.
        names: segments that become class 1, 2 and so on: names in upper or lower case, or numbers, from 1. Where they
            overlap, the last counts. Without names the file must have one segment.

    Returns:
        Class indices (W, H, D), uint8, and the RAS affine of the image in mm.

    Raises:
        ValueError: when a segment is missing, several are there without ``names``, a file cannot be read, or the voxels
            of the segmentation are not voxels of the image.
    """
    reader = SimpleITKReader()
    array, meta = reader.get_data(reader.read(path))
    layers = array if array.ndim == 4 else array[..., None]
    chosen = [_chosen(segments_of(path), name) for name in names or (None,)]
    classes = np.zeros(layers.shape[:3], np.uint8)
    for index, segment in enumerate(chosen, 1):
        classes[layers[..., segment["layer"]] == segment["value"]] = index
    stack = StackReader()
    _, of_image = stack.get_data(stack.read(image))
    size = tuple(int(n) for n in of_image[MetaKeys.SPATIAL_SHAPE])
    to_segments = np.linalg.inv(meta[MetaKeys.AFFINE]) @ of_image[MetaKeys.AFFINE]
    axes = np.rint(to_segments)
    apart = np.abs(axes - to_segments)[:3] @ [*size, 1]  # at the far corner, in voxels
    if (np.abs(axes[:3, :3]).sum(0) != 1).any() or apart.max() > CHANNEL_TOLERANCE:
        spacings = (nib.affines.voxel_sizes(one[MetaKeys.AFFINE]).round(3).tolist() for one in (meta, of_image))
        raise InputError(
            "has other voxels than its image {} (spacing {} and {} mm, or shifted): in 3D Slicer, set the "
            "segmentation's source geometry to the image and save it again".format(Path(image).name, *spacings)
        )
    on_image = affine_transform(classes, axes[:3, :3], axes[:3, 3], size, order=0, mode="constant")
    if np.count_nonzero(on_image) < np.count_nonzero(classes):
        raise InputError(f"has segments outside its image {Path(image).name}: is it of another image?")
    return on_image, np.asarray(of_image[MetaKeys.AFFINE])


def _chosen(segments: Sequence[dict[str, Any]], name: str | None) -> dict[str, Any]:
    listed = ", ".join(f"{number} {segment['name']}" for number, segment in enumerate(segments, 1))
    if name is None:
        if len(segments) > 1:
            raise InputError(f"has the segments {listed}: give the segment of class 1, 2 and so on with --segments")
        return segments[0]
    for number, segment in enumerate(segments, 1):
        if name.casefold() in (segment["name"].casefold(), str(number)):
            return segment
    raise InputError(f"has no segment {name!r}, it has {listed}: add it in 3D Slicer (it may be empty), or rename it")


def slicer_header(array: np.ndarray, segments: Sequence[Segment]) -> dict[str, str]:
    """Return the fields by which 3D Slicer recognises a segmentation.

    Args:
        array: class indices, (x, y, z).
        segments: its classes.
    """
    fields = {
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    boxes = find_objects(array, max_label=max(segment.index for segment in segments))
    for number, segment in enumerate(segments):
        box = boxes[segment.index - 1] or (slice(0, 0),) * 3
        category, kind, region = ("^".join(code or ("", "", "")) for code in _slicer_codes(segment))
        terminology = f"Segmentation category and type - 3D Slicer General Anatomy list~{category}~{kind}~^^"
        anatomy = f"Anatomic codes - DICOM master list~{region}~^^"
        fields |= {
            f"Segment{number}_{name}": value
            for name, value in {
                "ID": f"Segment_{segment.index}",
                "Name": segment.name,
                "NameAutoGenerated": "0",
                "Color": " ".join(f"{level / 255:.6g}" for level in segment.colour),
                "ColorAutoGenerated": "0",
                "LabelValue": str(segment.index),
                "Layer": "0",
                "Extent": " ".join(f"{side.start} {side.stop - 1}" for side in box),
                "Tags": f"TerminologyEntry:{terminology}~{anatomy}|",
            }.items()
        }
    return fields


def _slicer_codes(segment: Segment) -> list[tuple[str, str, str] | None]:
    """Return category, type and region with the coding scheme first."""
    codes = (segment.category, segment.type, segment.region)
    return [code and (code[1], code[0], code[2]) for code in codes]
