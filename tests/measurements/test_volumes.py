from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from segbundles.measurements import extent_mm, measure_volume, sphericity, volume_ml

RADIUS = 20.0  # mm
SPACINGS = [(1.0, 1.0, 1.0), (0.625, 0.625, 1.25), (1.5, 0.8, 2.0)]
ANGLES = [(0, 0, 0), (25, -40, 60)]


def sphere(spacing: tuple[float, ...], angles: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A mask and its affine; the sphere's centre is not at a voxel's."""
    size = [int(2.6 * RADIUS / step) for step in spacing]
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(spacing)
    centre = affine[:3, :3] @ [(n - 1) / 2 + 0.3 for n in size]
    points = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1) @ affine[:3, :3].T
    affine[:3, 3] = (-30, 12, 7)
    return np.linalg.norm(points - centre, axis=-1) < RADIUS, affine


@pytest.mark.parametrize("angles", ANGLES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_sphere_of_known_radius(spacing: tuple[float, ...], angles: tuple[float, ...]) -> None:
    mask, affine = sphere(spacing, angles)
    found = measure_volume(mask.astype(np.uint8), affine, {1: "ball", 2: "nothing"}, shape=True, parts=True)
    ball = found["classes"]["ball"]
    assert ball["volume_ml"] == pytest.approx(4 / 3 * np.pi * RADIUS**3 / 1000, rel=0.01)
    assert ball["voxels"] == mask.sum()
    assert ball["extent_mm"] == pytest.approx(2 * RADIUS, abs=max(spacing))
    assert ball["sphericity"] == pytest.approx(1, abs=0.03)
    assert (ball["parts"], ball["part_volumes_ml"]) == (1, [ball["volume_ml"]])
    assert not found["touches_border"]
    empty = {"voxels": 0, "volume_ml": 0, "slices": None, "extent_mm": 0, "sphericity": None}
    assert found["classes"]["nothing"] == {**empty, "parts": 0, "part_volumes_ml": []}


def test_slices_parts_and_the_border_by_hand() -> None:
    classes = np.zeros((6, 5, 8), np.uint8)
    classes[1:3, 1:3, 2:5] = 1  # 12 voxels
    classes[3, 3, 5] = 1  # shares only a corner
    affine = np.diag([-2.0, 2, 5, 1])
    found = measure_volume(classes, affine, {1: "a"}, parts=True)
    assert found["classes"]["a"] == {
        "voxels": 13,
        "volume_ml": pytest.approx(0.26),
        "slices": [3, 6],
        "parts": 2,
        "part_volumes_ml": [pytest.approx(0.24), pytest.approx(0.02)],
    }
    assert not found["touches_border"]
    for face in ((0, 2, 2), (5, 2, 2), (2, 0, 2), (2, 4, 2), (2, 2, 0), (2, 2, 7)):
        other = classes.copy()
        other[face] = 1
        assert measure_volume(other, affine, {1: "a"})["touches_border"]
        assert not measure_volume(other, affine, {2: "b"})["touches_border"]


def test_boxes_and_single_voxels() -> None:
    mask = np.zeros((9, 9, 9), bool)
    mask[4, 4, 4] = True
    affine = np.diag([3.0, 4, 12, 1])
    assert extent_mm(mask, affine) == pytest.approx(12)
    assert volume_ml(1, affine) == pytest.approx(0.144)
    assert 0 < sphericity(mask, affine) < 1
    long = np.zeros((40, 12, 12), bool)
    long[4:36, 4:8, 4:8] = True
    assert extent_mm(long, np.eye(4)) == pytest.approx((32**2 + 3**2 + 3**2) ** 0.5)
    cube = np.pad(np.ones((24, 24, 24), bool), 3)
    assert sphericity(cube, np.eye(4)) == pytest.approx((np.pi / 6) ** (1 / 3), abs=0.06)  # rounded
    assert sphericity(long, np.eye(4)) < 0.75
