"""Finding the cells between membranes by watershed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_numpy, ensure_tuple_rep
from scipy import ndimage
from skimage.filters import sobel, threshold_otsu
from skimage.morphology import h_minima
from skimage.segmentation import relabel_sequential, watershed

from segbundles.errors import fail

__all__ = ["GreyWatershedd", "ProbabilityWatershedd", "grey_watershed", "probability_watershed"]

_SQUARE = np.ones((3, 3), bool)


def grey_watershed(
    image: Any,
    dark_membranes: bool = True,
    threshold: float | None = None,
    closing_size: int = 1,
    dilation_iterations: int = 1,
    foreground_fraction: float = 0.2,
    per_component: bool = False,
    min_cell_area: int = 0,
) -> np.ndarray:
    """Find cells in a grey image by threshold, distance and watershed.

    1. A threshold finds the membrane, which is then closed.
    2. Pixels outside the dilated membrane are certainly cell; each 4-connected part of them is the marker of a cell.
    3. Membrane deeper than a fraction of the largest depth is certainly membrane.
    4. A watershed of the gradient, from the markers, divides the rest, with a line where two regions meet.

    Args:
        image: one section (W, H): an image, or a probability.
        dark_membranes: whether membranes are darker than cells, as in an image or a probability of cell; False for a
            probability of membrane.
        threshold: grey value between membrane and cell; None means Otsu's.
        closing_size: side of the square that closes the membrane, in pixels; 1 closes nothing.
        dilation_iterations: number of 3 x 3 dilations of the membrane, each of one pixel; each closes gaps of up to two
            pixels.
        foreground_fraction: fraction of the largest distance to a cell inside the membrane; what is deeper is certainly
            membrane.
        per_component: whether the largest distance is that of each connected part of the membrane instead of the whole
            image.
        min_cell_area: pixels; smaller cells are given to their neighbours.

    Returns:
        Label image (W, H), int32: cells from 1, membrane and lines 0.

    Raises:
        ValueError: when a setting is out of range, or the image is not one finite section.
    """
    _at_least("closing_size", closing_size, 1)
    _at_least("dilation_iterations", dilation_iterations, 0)
    _at_least("min_cell_area", min_cell_area, 0)
    _between("foreground_fraction", foreground_fraction, 0, 1)
    image = _section(image)
    if image.min() == image.max():
        return np.zeros(image.shape, np.int32)
    level = threshold_otsu(image) if threshold is None else threshold
    membrane = image <= level if dark_membranes else image > level
    if closing_size > 1:
        # padded, because a closing at the edge would erode from outside
        padded = np.pad(membrane, closing_size, mode="edge")
        padded = ndimage.binary_closing(padded, np.ones((closing_size, closing_size), bool))
        membrane = padded[closing_size:-closing_size, closing_size:-closing_size]
    around = ndimage.binary_dilation(membrane, _SQUARE, dilation_iterations) if dilation_iterations else membrane
    depth = ndimage.distance_transform_edt(membrane)
    deepest: Any = depth.max()
    if per_component:
        parts, number = ndimage.label(membrane, _SQUARE)
        deepest = np.concatenate([[0], ndimage.maximum(depth, parts, np.arange(1, number + 1))])[parts]
    sure = membrane & (depth > foreground_fraction * deepest)

    markers, cells = ndimage.label(~around)
    if not cells:
        return np.zeros(image.shape, np.int32)
    markers[sure] = cells + 1
    flooded = _flood(sobel(image), markers, min_cell_area, keep=cells + 1 if sure.any() else None)
    return relabel_sequential(np.where(flooded == cells + 1, 0, flooded))[0].astype(np.int32)


def probability_watershed(
    membrane_probability: Any,
    sigma: float = 1.0,
    marker_threshold: float = 0.3,
    h: float | None = None,
    membrane_threshold: float | None = 0.5,
    min_cell_area: int = 0,
) -> np.ndarray:
    """Find cells by a watershed of the membrane probability, from markers where it is low.

    Args:
        membrane_probability: one section (W, H), 0 to 1.
        sigma: standard deviation of the Gaussian that smooths the probability first, in pixels; 0 smooths nothing.
        marker_threshold: the 4-connected parts where the smoothed probability is lower are the markers.
        h: with a number, the markers are the minima of at least this depth in those parts, so that a part with two
            minima becomes two cells. None makes each part one marker.
        membrane_threshold: a probability of this or more is membrane, however wide; None leaves lines of one pixel.
        min_cell_area: pixels; smaller cells are given to their neighbours, or to the membrane if they have none.

    Returns:
        Label image (W, H), int32: cells from 1, membrane and lines 0.

    Raises:
        ValueError: when a setting is out of range, or the map is not one section of probabilities.
    """
    _at_least("sigma", sigma, 0)
    _at_least("min_cell_area", min_cell_area, 0)
    _between("marker_threshold", marker_threshold, 0, 1)
    if h is not None:
        _between("h", h, 0, 1)
    if membrane_threshold is not None:
        _between("membrane_threshold", membrane_threshold, 0, 1)
    probability = _section(membrane_probability).astype(np.float32)
    low, high = float(probability.min()), float(probability.max())
    if low < 0 or high > 1:
        fail(f"a membrane probability must be between 0 and 1, got {low:g} to {high:g}: apply a sigmoid or softmax.")
    smooth = ndimage.gaussian_filter(probability, sigma) if sigma else probability
    inside = smooth < marker_threshold
    if h is not None:
        inside &= h_minima(smooth, h).astype(bool)
    markers, _ = ndimage.label(inside)
    mask = None
    if membrane_threshold is not None:
        mask = probability < membrane_threshold
        markers[~mask] = 0
    return relabel_sequential(_flood(smooth, markers, min_cell_area, mask))[0].astype(np.int32)


def _flood(
    surface: np.ndarray, markers: np.ndarray, min_area: int, mask: np.ndarray | None = None, keep: int | None = None
) -> np.ndarray:
    """Flood from the markers, then again without the markers of too small regions; region ``keep`` always stays."""
    if not markers.any():
        return markers
    flooded = watershed(surface, markers, mask=mask, watershed_line=True)
    areas = np.bincount(flooded.ravel(), minlength=markers.max() + 1)
    small = (areas > 0) & (areas < min_area)
    small[[0, *([keep] if keep is not None else [])]] = False
    if not small.any():
        return flooded
    markers = np.where(small[markers], 0, markers)
    return watershed(surface, markers, mask=mask, watershed_line=True) if markers.any() else markers


def _section(image: Any) -> np.ndarray:
    array = convert_to_numpy(image)
    if array.ndim != 2 or not array.size:
        fail(f"a section must have two axes (W, H) and at least one pixel, got shape {array.shape}.")
    if not np.isfinite(array).all():
        fail("the section contains NaN or infinite values: correct it, or leave it out.")
    return array


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        fail(f"{name} must be {least} or more (pixels), got {value}.")


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        fail(f"{name} must be between {low} and {high}, got {value}.")


class _Watershedd(MapTransform):
    """Find the cells and the cleaned mask of a map, section by section."""

    def __init__(
        self,
        keys: KeysCollection,
        cells_keys: KeysCollection,
        mask_keys: KeysCollection | None,
        channel: int,
        segment: Callable[[np.ndarray], np.ndarray],
        allow_missing_keys: bool,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.cells_keys = ensure_tuple_rep(cells_keys, len(self.keys))
        self.mask_keys = ensure_tuple_rep(mask_keys, len(self.keys))
        outputs = [key for key in self.cells_keys + self.mask_keys if key is not None]
        if len(set(outputs)) < len(outputs):
            fail(f"every output needs its own key, got {self.cells_keys} and {self.mask_keys}.")
        self.channel = channel
        self.segment = segment
        self.segment(np.zeros((2, 2), np.float32))  # refuses wrong settings before any long work

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with cells, and masks if they have a key."""
        d = dict(data)
        for key, cells_key, mask_key in self.key_iterator(d, self.cells_keys, self.mask_keys):
            image = d[key]
            if image.ndim not in (3, 4) or not -image.shape[0] <= self.channel < image.shape[0]:
                fail(
                    f"{key} has shape {tuple(image.shape)} but must be (C, W, H) or (C, W, H, D) with a channel "
                    f"{self.channel}."
                )
            array = convert_to_numpy(image)[self.channel]
            if array.ndim == 2:
                cells = self.segment(array)
            else:
                cells = np.stack([self.segment(one) for one in np.moveaxis(array, -1, 0)], axis=-1)
            found = torch.from_numpy(cells)[None]
            d[cells_key] = self._like(found, image)
            if mask_key is not None:
                d[mask_key] = self._like((found > 0).to(torch.uint8), image)
        return d

    @staticmethod
    def _like(array: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        array = array.to(image.device)
        return MetaTensor(array).copy_meta_from(image) if isinstance(image, MetaTensor) else array


class GreyWatershedd(_Watershedd):
    """Find cells in a grey image or probability with :func:`grey_watershed`, section by section.

    Args:
        keys: maps (C, W, H), or stacks of sections (C, W, H, D).
        cells_keys: keys of the label images (1, W, H) or (1, W, H, D), int32, membranes 0; in a stack each section is
            numbered from 1.
        mask_keys: keys of the cleaned masks, uint8: 0 membrane, 1 cell. A key may be one of ``keys``. None makes no
            masks.
        channel: channel to segment.
        dark_membranes: as in :func:`grey_watershed`, like the next six.
        threshold: grey value; None means Otsu's.
        closing_size: pixels.
        dilation_iterations: number of dilations of one pixel.
        foreground_fraction: fraction of the largest depth.
        per_component: whether the largest depth is that of each part of the membrane.
        min_cell_area: pixels.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when a setting is out of range, or a map has other axes.
    """

    def __init__(
        self,
        keys: KeysCollection,
        cells_keys: KeysCollection = "cells",
        mask_keys: KeysCollection | None = None,
        channel: int = 0,
        dark_membranes: bool = True,
        threshold: float | None = None,
        closing_size: int = 1,
        dilation_iterations: int = 1,
        foreground_fraction: float = 0.2,
        per_component: bool = False,
        min_cell_area: int = 0,
        allow_missing_keys: bool = False,
    ) -> None:
        segment = partial(
            grey_watershed,
            dark_membranes=dark_membranes,
            threshold=threshold,
            closing_size=closing_size,
            dilation_iterations=dilation_iterations,
            foreground_fraction=foreground_fraction,
            per_component=per_component,
            min_cell_area=min_cell_area,
        )
        super().__init__(keys, cells_keys, mask_keys, channel, segment, allow_missing_keys)


class ProbabilityWatershedd(_Watershedd):
    """Find cells in a probability of membrane with :func:`probability_watershed`, section by section.

    Args:
        keys: probabilities (C, W, H), or stacks of sections (C, W, H, D).
        cells_keys: keys of the label images (1, W, H) or (1, W, H, D), int32, membranes 0; in a stack each section is
            numbered from 1.
        mask_keys: keys of the cleaned masks, uint8: 0 membrane, 1 cell. A key may be one of ``keys``. None makes no
            masks.
        channel: channel of the probability of membrane.
        sigma: pixels; as in :func:`probability_watershed`, like the next four.
        marker_threshold: probability.
        h: probability, or None.
        membrane_threshold: probability, or None.
        min_cell_area: pixels.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when a setting is out of range, or a map has other axes or is not a probability.
    """

    def __init__(
        self,
        keys: KeysCollection,
        cells_keys: KeysCollection = "cells",
        mask_keys: KeysCollection | None = None,
        channel: int = 0,
        sigma: float = 1.0,
        marker_threshold: float = 0.3,
        h: float | None = None,
        membrane_threshold: float | None = 0.5,
        min_cell_area: int = 0,
        allow_missing_keys: bool = False,
    ) -> None:
        segment = partial(
            probability_watershed,
            sigma=sigma,
            marker_threshold=marker_threshold,
            h=h,
            membrane_threshold=membrane_threshold,
            min_cell_area=min_cell_area,
        )
        super().__init__(keys, cells_keys, mask_keys, channel, segment, allow_missing_keys)
