"""Phantom twin of ISBI 2012: synthetic sections of cells with dark membranes, in the challenge's layout and values.

Cells are the Voronoi regions of points that drift from section to section, seen through a smooth warp: neighbouring
sections look alike, distant ones do not. It contains what makes the real task hard: membranes of different width and
darkness, dark organelles that are not membranes, texture and noise.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from segbundles.datasets import Prepared, isbi2012
from segbundles.datasets.isbi2012 import LABEL_FILE, LABEL_VALUES, VOLUME_FILE
from segbundles.errors import fail

from .common import check_size, finish, is_marked, own, start, twin_of, write_tiff

__all__ = ["DATA_SET", "make_phantom", "make_section", "make_stack"]

_CELL_PIXELS = 26  # typical diameter

DATA_SET = twin_of(isbi2012.DATA_SET, "em", "Synthetic ssTEM sections in the ISBI 2012 challenge's layout")
_MARK = DATA_SET.metadata["reference"]


def make_phantom(
    out: str | os.PathLike, sections: int = 12, seed: int = 0, size: Sequence[int] = (128, 128)
) -> Prepared:
    """Write a phantom stack under ``out`` and prepare it; the last sixth is testing, the sixth before it validation.

    Args:
        out: folder of ``train-volume.tif``, ``train-labels.tif`` and datalist.json.
        sections: number of sections, 3 or more.
        seed: seed of the cells.
        size: pixels (W, H).

    Returns:
        What was written.

    Raises:
        ValueError: when there are too few sections or pixels, or ``out`` contains other files than a phantom's.
    """
    out = start(DATA_SET, out, seed, "sections", sections)
    check_size(size)
    own((out / VOLUME_FILE, out / LABEL_FILE), lambda path: is_marked(path, _MARK))
    image, label = make_stack(np.random.default_rng(seed), size, sections)
    for name, stack in ((VOLUME_FILE, image), (LABEL_FILE, label)):
        write_tiff(out / name, stack[0].T, _MARK)
    return finish(DATA_SET, out, [f"section_{index:02d}" for index in range(sections)], share=6)


def make_section(rng: np.random.Generator, size: Sequence[int] = (128, 128)) -> tuple[np.ndarray, np.ndarray]:
    """Make one phantom section.

    Args:
        rng: source of the cells.
        size: pixels (W, H).

    Returns:
        Image and label (1, W, H), as :func:`make_stack` makes them.

    Raises:
        ValueError: when the size is too small.
    """
    image, label = make_stack(rng, size, 1)
    return image[..., 0], label[..., 0]


def make_stack(
    rng: np.random.Generator, size: Sequence[int] = (128, 128), sections: int = 12
) -> tuple[np.ndarray, np.ndarray]:
    """Make a stack of phantom sections.

    Args:
        rng: source of the cells.
        size: pixels (W, H).
        sections: number of sections D.

    Returns:
        Image (1, W, H, D), uint8, with membranes dark; label (1, W, H, D), uint8: 255 cell, 0 membrane.

    Raises:
        ValueError: when size or sections are too small.
    """
    check_size(size)
    if sections < 1:
        fail(f"sections must be 1 or more, got {sections}")
    from scipy.ndimage import gaussian_filter
    from scipy.spatial import cKDTree

    def smooth(pixels: float) -> np.ndarray:
        """Return a random field of unit standard deviation, smooth over this many pixels."""
        field = gaussian_filter(rng.normal(size=tuple(size)), pixels, mode="wrap")
        return field / field.std()

    margin = 2 * _CELL_PIXELS
    area = (size[0] + 2 * margin) * (size[1] + 2 * margin)
    centres = rng.uniform(-margin, np.array(size) + margin, (round(area / _CELL_PIXELS**2), 2))
    brightness, half_width, darkness = (rng.uniform(a, b, len(centres)) for a, b in ((125, 170), (1.5, 2.5), (55, 100)))
    organelle = rng.uniform(0, 1, len(centres)) < 0.35
    offset = rng.uniform(-0.25, 0.25, centres.shape) * _CELL_PIXELS
    radius = rng.uniform(2.5, 5, len(centres))
    warp = np.stack([smooth(10), smooth(10)])
    pixels = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1).astype(float)

    images, labels = [], []
    for _ in range(sections):
        points = pixels + 3 * np.moveaxis(warp, 0, -1)
        (near, next_near), (cell, other) = (np.moveaxis(a, -1, 0) for a in cKDTree(centres).query(points, k=2))
        apart = np.linalg.norm(centres[cell] - centres[other], axis=-1)
        to_border = (next_near**2 - near**2) / (2 * apart)
        # two cells share one membrane, on whichever side of it a pixel is
        edge = to_border - (half_width[cell] + half_width[other]) / 2
        membrane = np.clip(0.5 - edge / 2, 0, 1)

        image = brightness[cell] + 9 * smooth(1) + 7 * smooth(4)
        from_organelle = np.abs(np.linalg.norm(points - centres[cell] - offset[cell], axis=-1) - radius[cell])
        rim = organelle[cell] * np.clip(1.5 - from_organelle, 0, 1)
        image = image + 0.8 * rim * (85 - image)
        image = image + membrane * ((darkness[cell] + darkness[other]) / 2 - image)
        image = image + 0.6 * 14 * smooth(0.5) + rng.normal(0, 8, image.shape)
        images.append(np.clip(np.round(image), 0, 255).astype(np.uint8))
        labels.append(np.where(edge < 0, *LABEL_VALUES).astype(np.uint8))

        centres = centres + rng.normal(0, 1.5, centres.shape)
        warp = 0.95 * warp + np.sqrt(1 - 0.95**2) * np.stack([smooth(10), smooth(10)])
    return np.stack(images, -1)[None], np.stack(labels, -1)[None]
