"""Measurements of volumes, in world units: right on oblique and anisotropic grids."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from nibabel.affines import apply_affine
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import pdist
from skimage.measure import marching_cubes, mesh_surface_area

__all__ = ["extent_mm", "measure_volume", "sphericity", "volume_ml"]

_SMOOTHING = 1.0  # voxels; without it the steps of the voxels count as surface


def volume_ml(voxels: int, affine: np.ndarray) -> float:
    """Return the volume of a number of voxels, in ml.

    Args:
        voxels: number of voxels.
        affine: (4, 4), from voxels to mm; its determinant is the volume of a voxel.
    """
    return float(voxels * abs(np.linalg.det(np.asarray(affine, dtype=np.float64)[:3, :3])) / 1000)


def measure_volume(
    classes: np.ndarray,
    affine: np.ndarray | None,
    names: Mapping[int, str],
    shape: bool = False,
    parts: bool = False,
) -> dict[str, Any]:
    """Measure each class of a class map.

    Args:
        classes: class indices, (x, y, z), on the grid of the file.
        affine: (4, 4), from voxels to mm; None if the size of a voxel is not known, as in a stack of pictures.
        names: name of each class to measure, by its index.
        shape: whether to add the extent and the sphericity, which need an affine.
        parts: whether to add the number of connected parts (joined by faces) and the size of each, the largest first.

    Returns:
        ``classes``: for each name ``volume_ml`` and ``voxels`` (without an affine ``pixels`` and ``fraction``, of all
        pixels), ``slices`` (the first and last along z that have the class, counted from 1; None if none has), and
        what was asked for: ``extent_mm``, ``sphericity``, ``parts`` and ``part_volumes_ml`` or ``part_pixels``;
        ``touches_border``: whether any of the classes touches a face of the volume, so that a part of it may be
        missing.
    """
    result: dict[str, Any] = {"classes": {}, "touches_border": False}
    for index, name in names.items():
        mask = classes == index
        voxels = int(np.count_nonzero(mask))
        measured: dict[str, Any] = {"pixels": voxels, "fraction": voxels / mask.size}
        if affine is not None:
            measured = {"volume_ml": volume_ml(voxels, affine), "voxels": voxels}
        measured["slices"] = None
        if voxels:
            box = ndimage.find_objects(mask.view(np.uint8))[0]
            measured["slices"] = [box[2].start + 1, box[2].stop]
            faces = zip(box, mask.shape, strict=True)
            result["touches_border"] |= any(side.start == 0 or side.stop == size for side, size in faces)
            mask = mask[box]
        if shape and affine is not None:
            measured["extent_mm"] = extent_mm(mask, affine) if voxels else 0.0
            measured["sphericity"] = sphericity(mask, affine) if voxels else None
        if parts:
            labels, _ = ndimage.label(mask)
            sizes = sorted(np.bincount(labels.ravel())[1:].tolist(), reverse=True)
            measured["parts"] = len(sizes)
            if affine is None:
                measured["part_pixels"] = sizes
            else:
                measured["part_volumes_ml"] = [volume_ml(size, affine) for size in sizes]
        result["classes"][name] = measured
    return result


def extent_mm(mask: np.ndarray, affine: np.ndarray) -> float:
    """Return the largest distance between two points of an object's surface, the centres of its outer voxels' faces.

    Args:
        mask: (x, y, z), not empty.
        affine: (4, 4), from voxels to mm.

    Returns:
        The distance in mm.
    """
    # the farthest points are corners of the convex hull, and so the first or last voxel of their row
    rows = np.argwhere(mask.any(0))
    along = mask[:, rows[:, 0], rows[:, 1]]
    ends = (along.argmax(0), len(mask) - 1 - along[::-1].argmax(0))
    centres = _corners(np.concatenate([np.column_stack([end, rows]) for end in ends]).astype(float))
    faces = np.concatenate([centres + side * step for side in (-0.5, 0.5) for step in np.eye(3)])
    return float(pdist(_corners(apply_affine(affine, faces))).max())


def _corners(points: np.ndarray) -> np.ndarray:
    with suppress(QhullError):  # all in one plane
        points = points[ConvexHull(points).vertices]
    return points


def sphericity(mask: np.ndarray, affine: np.ndarray) -> float:
    """Return the surface of a sphere of an object's volume, as a share of the object's surface; 1 for a sphere.

    The mask is smoothed by a Gaussian of one voxel first, because the steps of voxels would make a surface larger.
    H. Wadell, Journal of Geology 43 (1935) 250.

    Args:
        mask: (x, y, z), not empty.
        affine: (4, 4), from voxels to mm.
    """
    smooth = ndimage.gaussian_filter(np.pad(mask, 4).astype(np.float32), _SMOOTHING)
    if smooth.max() <= 0.5:  # an object of a few voxels
        smooth = np.pad(mask, 4).astype(np.float32)
    vertices, faces, _, _ = marching_cubes(smooth, 0.5)
    vertices = apply_affine(affine, vertices)
    surface = mesh_surface_area(vertices, faces)
    enclosed = (
        abs(np.einsum("ij,ij->i", vertices[faces[:, 0]], np.cross(vertices[faces[:, 1]], vertices[faces[:, 2]])).sum())
        / 6
    )
    return float(min(np.pi ** (1 / 3) * (6 * enclosed) ** (2 / 3) / surface, 1.0))
