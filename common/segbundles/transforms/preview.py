"""What a preview shows of an image."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from segbundles.errors import fail
from segbundles.meta import file_name, spacing_of

from .uncertainty import uncertainty_levels

__all__ = ["Previewd", "displayed_case"]


def displayed_case(
    image: torch.Tensor, overlays: Mapping[str, torch.Tensor], channel: int | None = None, slice_axis: int = -1
) -> dict[str, Any]:
    """Return the arguments with which :func:`segbundles.report.case_slices` shows an image.

    Slices are in the order of the file, so that their numbers are those of the measurements.

    Args:
        image: (C, spatial).
        overlays: name of each overlay, and its class map (spatial).
        channel: channel to show, the last one is -1; None shows three channels as colours, otherwise the first one.
        slice_axis: spatial axis across which a volume is cut into slices.

    Raises:
        ValueError: when the image has no such channel.
    """
    count = len(image)
    if channel is not None and not -count <= channel < count:
        fail(f"channel is {channel}, but {file_name(image)} has {count}: count from 0, or give None.")
    volume = image.ndim == 4 and isinstance(image, MetaTensor)
    shown = (image if channel is None and count == 3 else image[channel or 0]).numpy(force=True)
    maps = {name: classes.numpy(force=True) for name, classes in overlays.items()}
    if volume and _is_reversed(image.meta.get("original_affine"), image.affine, slice_axis % 3):
        shown = np.flip(shown, slice_axis % 3 - 3)
        maps = {name: np.flip(classes, slice_axis % 3) for name, classes in maps.items()}
    return {
        "image": shown,
        "overlays": maps,
        "spacing_mm": spacing_of(image),
        "slice_axis": slice_axis,
        "affine": image.affine.numpy(force=True) if volume else None,
    }


def _is_reversed(of_file: Any, now: torch.Tensor, axis: int) -> bool:
    """Return whether an axis is the third one of the file, in the other direction."""
    if of_file is None:
        return False
    before, after = (nib.io_orientation(np.asarray(affine)) for affine in (of_file, now.numpy(force=True)))
    (source,) = np.flatnonzero(before[:, 0] == after[axis, 0])
    return bool(source == 2 and before[source, 1] != after[axis, 1])


class Previewd(MapTransform):
    """Keep what :class:`segbundles.handlers.Preview` shows of an image, as ``preview``.

    Use it while the image and its segmentation are on the same grid, that is before ``Invertd``. It does not copy what
    is on the CPU; the handler makes the pictures.

    Args:
        keys: the image, (C, spatial).
        label_keys: class map, (1, spatial), shown as outlines; None if there is none.
        cells_keys: label image (1, spatial) whose cells are numbered section by section, shown in colours; None if
            there is none.
        prob_keys: probabilities (classes, spatial), of which a layer shows where they are uncertain; None shows none.
        channel: channel to show, the last one is -1; None shows three channels as colours, otherwise the first one.
        slice_axis: spatial axis across which a volume is cut into slices.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when the image has no such channel.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        label_keys: Hashable | None = "pred",
        cells_keys: Hashable | None = None,
        prob_keys: Hashable | None = None,
        channel: int | None = None,
        slice_axis: int = -1,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.overlays = {"outlines": label_keys, "cells": cells_keys}
        self.prob_keys = prob_keys
        self.channel = channel
        self.slice_axis = slice_axis

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with ``preview``, the arguments of :func:`segbundles.report.case_slices`."""
        d = dict(data)
        for key in self.key_iterator(d):
            overlays = {name: d[chosen][0] for name, chosen in self.overlays.items() if chosen is not None}
            if self.prob_keys is not None:
                overlays["uncertainty"] = uncertainty_levels(d[self.prob_keys])
            d["preview"] = displayed_case(d[key], overlays, self.channel, self.slice_axis)
        return d
