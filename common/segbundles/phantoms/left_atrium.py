"""Phantom twin of LASC18: synthetic chest volumes with a left atrium, in its layout and value ranges.

The scene is built in mm, in a patient frame centred on the atrium (x to the patient's left, y to the back, z to the
head), so that any size and spacing shows the same anatomy. It contains what makes the real task hard: other chambers
and vessels as bright as the atrium, an atrium that opens into the ventricle, veins that are labelled only near it,
noise and a bias field.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from segbundles.datasets import Prepared, lasc18
from segbundles.datasets.lasc18 import IMAGE_NAME, LABEL_NAME, LABEL_VALUES
from segbundles.datasets.volumes import check_volumes
from segbundles.errors import fail
from segbundles.files import atomic_path

from .common import contents, finish, own, start, twin_of

if TYPE_CHECKING:
    import SimpleITK as sitk  # noqa: N813

__all__ = ["DATA_SET", "make_case", "make_phantom"]

_CASE_NAME = re.compile(r"phantom\d+_\d{3,}")
_MIN_EXTENT_MM = (120.0, 120.0, 72.0)

DATA_SET = twin_of(
    lasc18.DATA_SET,
    "left_atrium",
    "Synthetic chest volumes with a left atrium in LASC18's layout; label files hold 255 for it",
    check=partial(check_volumes, label_values=LABEL_VALUES),
)


def make_phantom(
    out: str | os.PathLike,
    cases: int = 10,
    seed: int = 0,
    size: Sequence[int] = (160, 160, 48),
    spacing_mm: Sequence[float] = (2.0, 2.0, 2.0),
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Prepared:
    """Write phantom cases under ``out`` and prepare them.

    Validation and testing get a fifth of the cases each. A case depends only on the seed and its number.

    Args:
        out: folder of the phantom; cases go to ``Training Set``, next to the datalist.json.
        cases: number of cases, 3 or more.
        seed: seed of the anatomy.
        size: voxels (W, H, D) of most cases; see `make_case`.
        spacing_mm: voxel size of most cases.
        track: wraps the case numbers, for a progress bar.

    Returns:
        What was written.

    Raises:
        ValueError: when there are too few cases, the volume is too small for the scene, or ``out`` contains other
            files than a phantom's.
    """
    out = start(DATA_SET, out, seed, "cases", cases)
    _check_extent(size, spacing_mm)
    root = out / "Training Set"
    own(contents(root), lambda path: path.is_dir() and bool(_CASE_NAME.fullmatch(path.name)))

    import SimpleITK as sitk  # noqa: N813

    names = [f"phantom{seed}_{index:03d}" for index in range(cases)]
    for index in track(range(cases)):
        volumes = make_case(seed, index, size, spacing_mm)
        for volume, name in zip(volumes, (IMAGE_NAME, LABEL_NAME), strict=True):
            with atomic_path(root / names[index] / name) as part:
                sitk.WriteImage(volume, str(part), useCompression=True)
    return finish(DATA_SET, out, names, share=5)


def make_case(
    seed: int, index: int, size: Sequence[int] = (160, 160, 48), spacing_mm: Sequence[float] = (2.0, 2.0, 2.0)
) -> tuple[sitk.Image, sitk.Image]:
    """Make one phantom case.

    Of every four cases one is on an oblique grid, one has its rows and columns reversed, and one has slightly different
    size and spacing, so that geometry matters.

    Args:
        seed: seed of the phantom.
        index: number of the case.
        size: voxels (W, H, D).
        spacing_mm: voxel size.

    Returns:
        Image (uint8, 0 to 255) and label (uint8, 0 and 255) on one grid.

    Raises:
        ValueError: when the volume is too small for the scene.
    """
    import SimpleITK as sitk  # noqa: N813

    _check_extent(size, spacing_mm)
    rng = np.random.default_rng([seed, index])
    kind = index % 4
    if kind == 3:
        size = [round(n * f) for n, f in zip(size, (0.95, 0.92, 0.9), strict=True)]
        spacing_mm = [s * f for s, f in zip(spacing_mm, (1.1, 1.1, 1.2), strict=True)]
    image, label = _draw(rng, size, spacing_mm)

    volumes = []
    direction = _rotation(np.deg2rad((6.0, 0.0, 12.0))) if kind == 1 else np.eye(3)
    centre = (np.array(size) - 1) / 2 * spacing_mm
    origin = rng.uniform(-30, 30, 3) - direction @ centre
    for array in (image, label):
        volume = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
        volume.SetSpacing([float(s) for s in spacing_mm])
        volume.SetOrigin(origin.tolist())
        volume.SetDirection(direction.ravel().tolist())
        volumes.append(sitk.Flip(volume, [True, True, False]) if kind == 2 else volume)
    return volumes[0], volumes[1]


def _check_extent(size: Sequence[int], spacing_mm: Sequence[float]) -> None:
    if len(size) != 3 or len(spacing_mm) != 3 or min(size) < 1 or min(spacing_mm) <= 0:
        fail(f"size and spacing_mm must be three positive numbers each, got {size} and {spacing_mm}")
    extent = [n * s for n, s in zip(size, spacing_mm, strict=True)]
    if any(e < least for e, least in zip(extent, _MIN_EXTENT_MM, strict=True)):
        fail(
            f"a volume of {tuple(round(e, 1) for e in extent)} mm is too small for the atrium: choose size x "
            f"spacing_mm of at least {_MIN_EXTENT_MM} mm"
        )


class _Scene:
    """A volume in mm on which shapes are painted, each with an edge one voxel wide."""

    def __init__(self, points: np.ndarray, voxel_mm: float) -> None:
        self.points = points  # (3, W, H, D)
        self.voxel_mm = voxel_mm
        self.values = np.full(points.shape[1:], 4.0, np.float32)

    def paint(self, distance: np.ndarray, value: float | np.ndarray) -> None:
        """Fill where the signed distance (mm) is negative."""
        weight = np.clip(0.5 - distance / self.voxel_mm, 0, 1)
        self.values += weight * (value - self.values)

    def ellipsoid(
        self, centre: Sequence[float], radii: Sequence[float], tilt: Sequence[float] = (0, 0, 0)
    ) -> np.ndarray:
        """Return the approximate signed distance to an ellipsoid; an infinite radius makes a cylinder."""
        p = self.points - np.reshape(np.asarray(centre, np.float32), (3, 1, 1, 1))
        if any(tilt):
            p = np.tensordot(_rotation(np.deg2rad(tilt)).T.astype(np.float32), p, axes=1)
        p *= np.reshape(1 / np.asarray(radii, np.float32), (3, 1, 1, 1))
        finite = [r for r in radii if np.isfinite(r)]
        return (np.sqrt((p**2).sum(0)) - 1) * np.float32(min(finite))

    def tube(self, start: Sequence[float], end: Sequence[float], radius: float) -> np.ndarray:
        """Return the signed distance to a tube with round ends."""
        a, axis = np.asarray(start, np.float32), np.subtract(end, start).astype(np.float32)
        p = self.points - a.reshape(3, 1, 1, 1)
        along = np.clip(np.tensordot(axis, p, axes=1) / (axis @ axis), 0, 1)
        return np.sqrt(((p - axis.reshape(3, 1, 1, 1) * along) ** 2).sum(0)) - np.float32(radius)

    def waves(self, rng: np.random.Generator, length_mm: float, count: int = 6) -> np.ndarray:
        """Return a smooth random field of unit standard deviation, with waves of about ``length_mm``."""
        field = np.zeros(self.points.shape[1:], np.float32)
        for _ in range(count):
            k = rng.normal(size=3)
            k *= 2 * np.pi / (length_mm * rng.uniform(0.7, 1.5) * np.linalg.norm(k))
            field += np.cos(
                np.tensordot(k.astype(np.float32), self.points, axes=1) + np.float32(rng.uniform(0, 2 * np.pi))
            )
        return field * np.float32(np.sqrt(2 / count))


def _draw(rng: np.random.Generator, size: Sequence[int], spacing_mm: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return image and label, uint8 (W, H, D), of one synthetic patient."""
    from scipy.ndimage import gaussian_filter, label

    extent = np.array(size) * spacing_mm
    room = np.maximum(extent - (112, 112, 68), 0) / 2
    shift = rng.uniform(-1, 1, 3) * np.minimum(room, (20, 16, 9))
    turn = _rotation(np.deg2rad(rng.normal(0, (3, 3, 5))))
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(size, spacing_mm, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij")) - shift.reshape(3, 1, 1, 1)
    scale = rng.uniform(0.93, 1.07)
    points = (np.tensordot(turn.T, grid, axes=1) / scale).astype(np.float32)
    scene = _Scene(points, float(min(spacing_mm)) / scale)
    inf = np.inf

    blood = rng.uniform(140, 190)
    muscle, fat, lung = rng.uniform(38, 58), rng.uniform(75, 110), rng.uniform(8, 18)
    wall = 0.8 * muscle

    def vary(values: Sequence[float], spread: float = 0.06) -> list[float]:
        return [v * (1 + spread * float(rng.uniform(-1, 1))) for v in values]

    def near(centre: Sequence[float], spread: float = 3.0) -> np.ndarray:
        return np.asarray(centre) + rng.uniform(-spread, spread, 3)

    def paint_vessel(distance: np.ndarray, value: float) -> None:
        scene.paint(distance - 2, wall)
        scene.paint(distance, value * float(rng.uniform(0.92, 1.08)))

    width, depth = vary((148, 112), 0.06)
    depth_centre = rng.uniform(-12, -6)
    skin = scene.ellipsoid((0, depth_centre, 0), (width, depth, inf)) + 2 * scene.waves(rng, 160)
    scene.paint(skin, fat)
    scene.paint(skin + rng.uniform(8, 18), muscle)
    for side in (-1, 1):
        radii = vary((50 if side < 0 else 46, 78, 150))
        cavity = scene.ellipsoid((side * 82 + 6, depth_centre + 6, 10), radii) + 3 * scene.waves(rng, 70)
        cavity = np.maximum(cavity, skin + 24)
        scene.paint(cavity - 4, 0.5 * (muscle + fat))
        vessels = np.clip(scene.waves(rng, 16, 8) - 1.6, 0, 1)
        scene.paint(cavity, lung + 70 * vessels)
    liver = np.maximum(scene.ellipsoid((-70, depth_centre, -130), (75, 85, vary((88,))[0])), skin + 20)
    scene.paint(liver, 1.5 * muscle)

    heart = scene.ellipsoid(near((12, -28, -14)), vary((66, 56, 82))) + 3 * scene.waves(rng, 60)
    scene.paint(heart, 0.55 * fat + 0.25 * muscle)
    spine = scene.ellipsoid(near((-4, 60, 0)), (*vary((22, 19)), inf))
    scene.paint(spine - 3, 1.1 * fat)
    scene.paint(spine, 0.9 * muscle + 6 * scene.waves(rng, 30))
    scene.paint(scene.ellipsoid((-4, 86, 0), (10, 9, inf)), 1.7 * muscle)
    scene.paint(scene.ellipsoid(near((6, 32, 0), 2), (6, 5, inf)), wall)

    # the other chambers and the great vessels, as bright as the atrium
    half_width, half_depth, half_height = rng.uniform(27.5, 36), rng.uniform(17, 22), rng.uniform(20, 26)
    ventricle, tilt = near((46, -42, -38)), (0, 35 + rng.uniform(-8, 8), 35 + rng.uniform(-8, 8))
    paint_vessel(scene.ellipsoid(near((-2, -66, -34)), vary((40, 22, 42)), (0, 20, 20)), blood)
    scene.paint(scene.ellipsoid(ventricle, vary((31, 29, 46)), tilt), muscle)
    scene.paint(scene.ellipsoid(ventricle, vary((20, 19, 36)), tilt), blood * rng.uniform(0.95, 1.05))
    paint_vessel(scene.ellipsoid(near((-46, -34, -16)), vary((23, 26, 34))) + 2 * scene.waves(rng, 40), blood)
    paint_vessel(scene.tube(near((-38, -14, 10)), near((-34, -22, 100)), rng.uniform(8, 11)), blood)
    paint_vessel(scene.tube(near((-8, -34, -4)), near((-14, -50, 60)), rng.uniform(13, 16)), blood)
    paint_vessel(scene.tube(near((16, -56, 6)), near((16, -22, 44)), rng.uniform(11, 14)), blood)
    paint_vessel(scene.tube((16, -20, half_height + 16), (-60, 2, half_height + 14), rng.uniform(7, 9)), blood)
    paint_vessel(scene.tube(near((24, 42, -120)), near((20, 42, 120)), rng.uniform(10.5, 13.5)), blood)

    # the atrium: body, appendage and veins
    body = scene.ellipsoid((0, 0, 0), (half_width, half_depth, half_height), rng.uniform(-8, 8, 3))
    body += 1.6 * scene.waves(rng, 45)
    neck = np.array([0.7 * half_width, -0.6 * half_depth, 0.35 * half_height])
    tip = neck + rng.uniform((9, -14, 2), (15, -8, 8))
    lobes = scene.ellipsoid(tip, (rng.uniform(8, 11), rng.uniform(6, 8), rng.uniform(8, 12)), (0, 0, -30))
    lobes += 1.5 * scene.waves(rng, 14)
    appendage = np.minimum(scene.tube(neck, tip, rng.uniform(5, 7)), lobes)
    roots = {
        "right upper": (-0.72, 0.25, 0.5), "right lower": (-0.75, 0.45, -0.4),
        "left upper": (0.72, 0.3, 0.5), "left lower": (0.75, 0.5, -0.3), "right middle": (-0.8, 0.35, 0.05),
    }  # fmt: skip
    kind = rng.choice(["four", "common left", "right middle"], p=[0.6, 0.2, 0.2])
    if kind != "right middle":
        del roots["right middle"]
    if kind == "common left":
        del roots["left lower"]
        roots["left upper"] = (0.75, 0.4, 0.15)
    veins = np.full(points.shape[1:], np.inf, np.float32)
    for name, root in roots.items():
        radius = rng.uniform(5, 7.5) + (2.5 if kind == "common left" and name == "left upper" else 0)
        start = np.array(root) * (half_width, half_depth, half_height)
        heading = np.array([np.sign(root[0]), rng.uniform(0.1, 0.5), 0.9 * root[2] + rng.uniform(-0.15, 0.15)])
        end = start + heading / np.linalg.norm(heading) * rng.uniform(45, 60)
        veins = np.minimum(veins, scene.tube(start, end, radius))
    atrium = np.minimum(np.minimum(body, appendage), np.maximum(veins, body - rng.uniform(9, 15)))

    scar = np.clip(2 * scene.waves(rng, 25) - 1.5, 0, 1)
    scene.paint(np.minimum(body, veins) - 2.5, wall + (0.8 * blood - wall) * scar)
    scene.paint(appendage - 2, wall)
    valve = scene.tube((0.35 * half_width, -0.5 * half_depth, -0.5 * half_height), ventricle, rng.uniform(11, 14))
    scene.paint(valve, blood)
    scene.paint(np.minimum(np.minimum(body, appendage), veins), blood * (1 + 0.04 * scene.waves(rng, 20)))

    texture = gaussian_filter(rng.normal(size=tuple(size)).astype(np.float32), 1.0)
    values = scene.values * (1 + 0.25 * texture) * np.exp(0.13 * scene.waves(rng, 320, 4))
    sd = rng.uniform(5, 9)
    noisy = np.hypot(values + sd * rng.normal(size=tuple(size)), sd * rng.normal(size=tuple(size)))
    image = np.clip(np.round(noisy), 0, 255).astype(np.uint8)
    parts, _ = label(atrium < 0)
    largest = parts == np.bincount(parts[parts > 0]).argmax()
    return image, np.where(largest, LABEL_VALUES[1], LABEL_VALUES[0]).astype(np.uint8)


def _rotation(radians: Sequence[float]) -> np.ndarray:
    """Return the rotation about x, then y, then z."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(radians), np.sin(radians)
    x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return z @ y @ x
