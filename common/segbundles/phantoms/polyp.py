"""Phantom twin of CVC-ClinicDB: synthetic colonoscopy frames with a polyp, in its layout and value ranges.

A sequence is one scene that the camera moves over. It contains what makes the real task hard: a polyp of nearly the
colour of the mucosa, visible only by its rounded shading; folds, vessels, a dark lumen and bright reflections that are
not polyps; and the black corners of an endoscope's frame. One sequence has no polyp.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence

import numpy as np

from segbundles.datasets import Prepared, clinicdb
from segbundles.datasets.clinicdb import IMAGE_FOLDER, MASK_FOLDER, SEQUENCES_FILE
from segbundles.errors import fail
from segbundles.files import atomic_path

from .common import check_size, contents, finish, is_marked, own, start, twin_of, write_tiff

__all__ = ["DATA_SET", "make_phantom", "make_sequence"]

# sequence by number from 1; the first ones are training
_NO_POLYP = 2

DATA_SET = twin_of(
    clinicdb.DATA_SET, "polyp", "Synthetic colonoscopy frames in CVC-ClinicDB's layout; masks hold 255 for polyp"
)
_MARK = DATA_SET.metadata["reference"]


def make_phantom(
    out: str | os.PathLike, sequences: int = 12, frames: int = 5, seed: int = 0, size: Sequence[int] = (96, 72)
) -> Prepared:
    """Write phantom frames under ``out`` and prepare them.

    Validation and testing get a sixth of the sequences each. The second sequence, which is training, has no polyp. A
    sequence depends only on the seed and its number.

    Args:
        out: folder of ``Original``, ``Ground Truth``, ``sequences.csv`` and datalist.json.
        sequences: number of sequences, 3 or more.
        frames: frames per sequence.
        seed: seed of the scenes.
        size: pixels (W, H).

    Returns:
        What was written.

    Raises:
        ValueError: when there are too few sequences, frames or pixels, or ``out`` contains other files than a
            phantom's.
    """
    out = start(DATA_SET, out, seed, "sequences", sequences)
    _check_size(size, frames)
    folders = (out / IMAGE_FOLDER, out / MASK_FOLDER)
    for path in own([path for folder in folders for path in contents(folder)], lambda path: is_marked(path, _MARK)):
        path.unlink()
    rows = []
    for number in range(1, sequences + 1):
        rng = np.random.default_rng([seed, number])
        image, label = make_sequence(rng, size, frames, polyp=number != _NO_POLYP)
        for k in range(frames):
            rows.append((len(rows) + 1, number))
            for folder, pixels in zip(folders, (image[..., k].T, label[0, ..., k].T), strict=True):
                write_tiff(folder / f"{rows[-1][0]}.tif", pixels, _MARK)
    with atomic_path(out / SEQUENCES_FILE) as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("frame", "sequence"), *rows])
    return finish(DATA_SET, out, [f"sequence_{number}" for number in range(1, sequences + 1)], share=6)


def make_sequence(
    rng: np.random.Generator, size: Sequence[int] = (96, 72), frames: int = 5, polyp: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Make the frames of one phantom sequence.

    Args:
        rng: source of the scene.
        size: pixels (W, H).
        frames: number of frames D.
        polyp: whether there is a polyp, in every frame.

    Returns:
        Image (3, W, H, D), uint8, RGB; label (1, W, H, D), uint8: 0, and 255 for the polyp.

    Raises:
        ValueError: when size or frames are too small.
    """
    _check_size(size, frames)
    from scipy.ndimage import gaussian_filter, map_coordinates

    width, height = size
    # the camera moves over a scene half as large again as a frame; lengths are in heights of a frame
    scene = (round(1.5 * width), round(1.5 * height))
    x, y = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in scene), indexing="ij")
    x, y = x / height, y / height

    def smooth(length: float) -> np.ndarray:
        """Return a random field of unit standard deviation, smooth over this many heights."""
        field = gaussian_filter(rng.normal(size=scene), length * height, mode="wrap")
        return field / field.std()

    mucosa = np.array([195, 110, 85]) * rng.uniform(0.85, 1.1, 3)
    shade = 1 + 0.10 * smooth(0.12) + 0.04 * smooth(0.02)
    fold = np.sin(2 * np.pi * (x * rng.uniform(-1, 1) + y * rng.uniform(1, 2)) + 1.5 * smooth(0.25))
    shade += 0.12 * np.clip(fold, 0.5, 1) - 0.06
    vessel = np.exp(-((smooth(0.06) / 0.12) ** 2)) * np.clip(smooth(0.3), 0, 1)
    colours = [c * shade * (1 - a * vessel) for c, a in zip(mucosa, (0.06, 0.3, 0.3), strict=True)]

    angle = rng.uniform(0, 2 * np.pi)
    lumen = 0.55 * np.array([np.cos(angle), np.sin(angle)]) + rng.uniform(-0.05, 0.05, 2)
    dark = np.clip(1.2 - np.hypot(x - lumen[0], y - lumen[1]) / rng.uniform(0.2, 0.3) + 0.15 * smooth(0.08), 0, 1)
    label = np.zeros(scene, bool)
    if polyp:
        centre = -0.25 * lumen / np.hypot(*lumen) + rng.uniform(-0.1, 0.1, 2)
        radii, turn = rng.uniform(0.13, 0.26, 2), rng.uniform(0, np.pi)
        u = ((x - centre[0]) * np.cos(turn) + (y - centre[1]) * np.sin(turn)) / radii[0]
        v = ((y - centre[1]) * np.cos(turn) - (x - centre[0]) * np.sin(turn)) / radii[1]
        r = np.hypot(u, v) + 0.06 * smooth(0.08)
        label = r < 1
        edge = np.clip((1 - r) / 0.08, 0, 1)
        hue = rng.uniform(0.95, 1.12, 3) * (1.12, 0.98, 0.98)
        dome = 0.72 + 0.45 * np.sqrt(np.clip(1 - r**2, 0, 1)) - 0.12 * np.clip(u + v, -1, 1)
        texture = 1 + 0.05 * smooth(0.015)
        colours = [c + edge * (m * h * dome * texture - c) for c, m, h in zip(colours, mucosa, hue, strict=True)]
        rim = np.exp(-(((r - 1.08) / 0.07) ** 2))
        colours = [c * (1 - 0.25 * rim) for c in colours]
        dark = dark * (r > 1.1)
    shine = np.clip((smooth(0.018) - 2.6) * 3, 0, 1)
    colours = [(c * (1 - 0.85 * dark)) * (1 - shine) + 245 * shine for c in colours]

    i, j = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in size), indexing="ij")
    corners = np.abs(i) / width + np.abs(j) / height > 0.86
    light = 1.08 - 0.35 * (i**2 + j**2) / (0.5 * height) ** 2 / 2
    start, drift = rng.uniform(-0.05, 0.05, 2), rng.uniform(-0.02, 0.02, 2)
    images, labels = [], []
    for k in range(frames):
        zoom = 1 + 0.03 * k * rng.uniform(-1, 1)
        turn = 0.05 * k * rng.uniform(-1, 1)
        shift = (start + k * drift) * height
        points = [
            (i * np.cos(turn) - j * np.sin(turn)) / zoom + shift[0] + (scene[0] - 1) / 2,
            (i * np.sin(turn) + j * np.cos(turn)) / zoom + shift[1] + (scene[1] - 1) / 2,
        ]
        frame = np.stack([map_coordinates(c, points, order=1, mode="nearest") for c in colours])
        frame = frame * light * rng.uniform(0.93, 1.07) + rng.normal(0, 3, frame.shape)
        frame[:, corners] = rng.uniform(0, 6, (3, int(corners.sum())))
        seen = map_coordinates(label.astype(np.float32), points, order=1, mode="constant") > 0.5
        images.append(np.clip(np.rint(frame), 0, 255).astype(np.uint8))
        labels.append(np.where(seen & ~corners, 255, 0).astype(np.uint8))
    return np.stack(images, -1), np.stack(labels, -1)[None]


def _check_size(size: Sequence[int], frames: int) -> None:
    check_size(size)
    if frames < 1:
        fail(f"frames must be 1 or more, got {frames}")
