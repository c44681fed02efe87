"""Phantom twin of LGG: synthetic brain MR slices with a FLAIR abnormality, in kaggle_3m's layout and value ranges.

The head is an ellipsoid cut into slices, drawn in units of its half-axes, so that any size shows the same anatomy. It
contains what makes the real task hard: a scalp as bright as the abnormality, a cortex brighter than the rest, an edge
that fades, one patient without a lesion and one without a pre-contrast sequence.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from segbundles.datasets import Prepared, lgg
from segbundles.datasets.lgg import FOLDER, LABEL_VALUES
from segbundles.errors import fail

from .common import check_size, contents, finish, own, start, twin_of, write_tiff

__all__ = ["DATA_SET", "make_patient", "make_phantom"]

_PATIENT_NAME = re.compile(r"phantom\d+_\d{3,}")
_MIN_SLICES = 4
# patients by number; the first ones are training
_NO_PRE_CONTRAST, _NO_LESION = 0, 1

DATA_SET = twin_of(
    lgg.DATA_SET,
    "brain",
    "Synthetic brain MR slices in kaggle_3m's layout; label files hold 255 for the FLAIR abnormality",
)


def make_phantom(
    out: str | os.PathLike,
    cases: int = 12,
    seed: int = 0,
    size: Sequence[int] = (64, 64),
    slices: int = 10,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Prepared:
    """Write phantom patients under ``out`` and prepare them.

    Validation and testing get a sixth of the patients each. The first patient's pre-contrast channel is FLAIR, the
    second has no lesion; both are training. A patient depends only on the seed and its number.

    Args:
        out: folder of the phantom; patients go to ``kaggle_3m``, next to the datalist.json.
        cases: number of patients, 4 or more.
        seed: seed of the anatomy.
        size: pixels (W, H).
        slices: slices per patient, give or take a fifth.
        track: wraps the patient numbers, for a progress bar.

    Returns:
        What was written.

    Raises:
        ValueError: when there are too few patients, pixels or slices, or ``out`` contains other files than a phantom's.
    """
    out = start(DATA_SET, out, seed, "cases", cases, least=4)
    fewest, most = slices - slices // 5, slices + slices // 5
    _check_size(size, fewest)
    root = out / FOLDER
    own(contents(root), lambda path: path.is_dir() and bool(_PATIENT_NAME.fullmatch(path.name)))

    names = [f"phantom{seed}_{index:03d}" for index in range(cases)]
    for index in track(range(cases)):
        rng = np.random.default_rng([seed, index])
        image, label = make_patient(rng, size, int(rng.integers(fewest, most + 1)), lesion=index != _NO_LESION)
        if index == _NO_PRE_CONTRAST:
            image[0] = image[1]
        _write_patient(root / names[index], image, label)
    return finish(DATA_SET, out, names, share=6)


def make_patient(
    rng: np.random.Generator, size: Sequence[int] = (64, 64), slices: int = 8, lesion: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Make the slices of one phantom patient.

    Args:
        rng: source of the anatomy.
        size: pixels (W, H); the nose points to y = 0.
        slices: number of slices D.
        lesion: whether there is an abnormality, on two or more consecutive slices.

    Returns:
        Image (3, W, H, D), uint8: pre-contrast, FLAIR and post-contrast. Label (1, W, H, D), uint8: 0, and 255 for the
        abnormality.

    Raises:
        ValueError: when size or slices are too small to show a head.
    """
    from scipy.ndimage import gaussian_filter
    from scipy.ndimage import label as components

    _check_size(size, slices)
    axes = [(np.arange(n) - (n - 1) / 2) / (n / 2) for n in (*size, slices)]
    axes[2] = 0.8 * axes[2]  # the head's top and bottom are not imaged
    points = np.stack(np.meshgrid(*axes, indexing="ij"))
    shape = points.shape[1:]
    edge = 2 / min(size)

    def smooth(pixels: float) -> np.ndarray:
        """Return a random field of unit standard deviation, smooth over so many pixels."""
        field = gaussian_filter(rng.normal(size=shape), (pixels, pixels, 0.7))
        return field / field.std()

    def distance(centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
        """Return the approximate signed distance to an ellipsoid."""
        scaled = (points - np.reshape(centre, (3, 1, 1, 1))) / np.reshape(radii, (3, 1, 1, 1))
        return (np.sqrt((scaled**2).sum(0)) - 1) * min(radii[:2])

    def paint(where: np.ndarray, values: Sequence[float | np.ndarray], width: float = edge) -> None:
        """Fill the three channels where the signed distance is negative, with an edge of some width."""
        weight = np.clip(0.5 - where / width, 0, 1)
        for channel, value in zip(volume, values, strict=True):
            channel += weight * (value - channel)

    volume = np.full((3, *shape), 2.0)
    centre = rng.uniform(-0.04, 0.04, 3)
    radii = np.array([0.72, 0.88, 1.1]) * rng.uniform(0.95, 1.05, 3)
    wobble = 0.012 * smooth(min(size) / 8)
    head = distance(centre, radii) + wobble
    brain = distance(centre, 0.84 * radii) + wobble
    coarse, fine = smooth(min(size) / 10), smooth(1.5)
    cortex = np.clip(1 + brain / 0.12, 0, 1)
    paint(head, (130, 155, 140))
    paint(distance(centre, 0.93 * radii) + wobble, (25, 20, 25))
    paint(brain, (95 + 6 * coarse - 12 * cortex, 75 + 6 * coarse + 25 * cortex, 100 + 6 * coarse - 8 * cortex))
    paint(np.abs(points[0] - centre[0]) - 0.008 + np.clip(brain + 0.1, 0, None), (60, 45, 130))
    for side in (-1, 1):
        ventricle = centre + np.array([0.13 * side, rng.uniform(-0.06, 0.06), 0.0])
        paint(distance(ventricle, (0.085, rng.uniform(0.24, 0.32), 0.55)), (35, 22, 38))

    label = np.zeros(shape, bool)
    if lesion:
        # midway between two slices and deep enough for both, whatever their number
        between = (axes[2][:-1] + axes[2][1:]) / 2
        height = between[np.abs(between - rng.uniform(-0.3, 0.3)).argmin()]
        shift = (rng.choice((-1, 1)) * rng.uniform(0.22, 0.34), rng.uniform(-0.4, 0.4))
        position = (*(centre[:2] + shift), height)
        depth = max(rng.uniform(0.25, 0.45), 2.2 * 0.8 / slices)
        blob = distance(position, (rng.uniform(0.17, 0.26), rng.uniform(0.17, 0.3), depth)) + 1.5 * wobble
        blob = np.maximum(blob, brain + 0.03)
        flair = rng.uniform(140, 180) + 8 * coarse
        paint(blob, (75 + 6 * coarse, flair, 85 + 6 * coarse), width=4 * edge)
        parts, _ = components(blob < 0)
        label = parts == np.bincount(parts[parts > 0]).argmax()

    gain = rng.uniform(0.9, 1.1, (3, 1, 1, 1))
    bias = np.exp(0.08 * (points * rng.uniform(-1, 1, (3, 1, 1, 1))).sum(0))
    volume = volume * gain * bias * (1 + 0.05 * fine) + rng.normal(0, 2.5, volume.shape)
    image = np.clip(np.round(volume), 0, 255).astype(np.uint8)
    return image, np.where(label, LABEL_VALUES[1], LABEL_VALUES[0]).astype(np.uint8)[None]


def _check_size(size: Sequence[int], slices: int) -> None:
    check_size(size)
    if slices < _MIN_SLICES:
        fail(f"slices must be {_MIN_SLICES} or more to show a head, got {slices}")


def _write_patient(folder: Path, image: np.ndarray, label: np.ndarray) -> None:
    """Write the slices of a patient, and remove those that an earlier phantom wrote."""
    for path in folder.glob(f"{folder.name}_*.tif"):
        path.unlink()
    for index in range(image.shape[-1]):
        write_tiff(folder / f"{folder.name}_{index + 1}.tif", image[..., index].T)
        write_tiff(folder / f"{folder.name}_{index + 1}_mask.tif", label[0, ..., index].T)
