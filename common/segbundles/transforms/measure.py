"""Measuring masks at the end of an inference."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from segbundles.measurements import measure_cells, measure_frame, measure_volume
from segbundles.meta import add_note, has_spacing, pixel_nm, slice_files

__all__ = ["MeasureCellsd", "MeasureMaskd"]

_FAR_OFF = 1.5  # times larger or smaller than what the network learnt


class MeasureMaskd(MapTransform):
    """Measure the classes of a class map, as ``d["measurements"]``.

    A volume is measured with :func:`segbundles.measurements.measure_volume`, a frame with
    :func:`segbundles.measurements.measure_frame`. Each slice of a stack of 2D images is measured as a frame too, in the
    list ``slices``, because each is a file of its own.

    Args:
        keys: class map, (1, spatial), on the grid of its file; one key.
        classes: name of each class by its index, which may be text, as in JSON. The background (0) is left out.
        shape: whether to measure extent and sphericity of volumes.
        parts: whether to measure each connected part.
        allow_missing_keys: as in MONAI.
    """

    def __init__(
        self,
        keys: KeysCollection,
        classes: Mapping[Any, str] | None = None,
        shape: bool = False,
        parts: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        named = {1: "segmentation"} if classes is None else classes
        self.names = {int(index): name for index, name in named.items() if int(index)}
        self.shape = shape
        self.parts = parts

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with measurements."""
        d = dict(data)
        for key in self.key_iterator(d):
            d["measurements"] = self._measure(d[key])
        return d

    def _measure(self, pred: torch.Tensor) -> dict[str, Any]:
        classes = pred.numpy(force=True)[0].astype(np.uint8)
        if classes.ndim == 2:
            return measure_frame(classes, self.names, self.parts)
        affine = pred.affine.numpy(force=True) if isinstance(pred, MetaTensor) and has_spacing(pred) else None
        measured = measure_volume(classes, affine, self.names, self.shape, self.parts)
        if files := slice_files(pred):
            measured["slices"] = [measure_frame(classes[..., k], self.names) for k in range(len(files))]
        return measured


class MeasureCellsd(MapTransform):
    """Measure numbered cells with :func:`segbundles.measurements.measure_cells`, as ``d["measurements"]``.

    A note on the mask says if the size of a pixel is not known, or far from what the network learnt.

    Args:
        keys: membrane mask, (1, W, H) or (1, W, H, sections), 0 where there is membrane; one key.
        cells_key: numbers of the cells, of the same shape.
        pixel_nm: size of a pixel in nm; None takes the one in the file.
        learnt_nm: size of a pixel in nm that the network learnt.
        allow_missing_keys: as in MONAI.
    """

    def __init__(
        self,
        keys: KeysCollection,
        cells_key: str = "cells",
        pixel_nm: float | None = None,
        learnt_nm: float = 4.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.cells_key = cells_key
        self.pixel_nm = pixel_nm
        self.learnt_nm = learnt_nm

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with measurements; ``measurements["table"]`` has one row per cell."""
        d = dict(data)
        for key in self.key_iterator(d):
            mask, cells = (np.atleast_3d(d[name].numpy(force=True)[0]) for name in (key, self.cells_key))
            size = pixel_nm(d[key]) if self.pixel_nm is None else self.pixel_nm
            measured, rows = measure_cells(cells, mask, size)
            d["measurements"] = {**measured, "pixel_nm": size, "table": rows}
            add_note(d[key], self._note(size))
        return d

    def _note(self, size: float | None) -> str:
        if size is None:
            return "pixel size unknown: areas are in pixels only"
        if self.pixel_nm is None and not 1 / _FAR_OFF <= size / self.learnt_nm <= _FAR_OFF:
            return (
                f"pixel size {size:.4g} nm, but the network learnt {self.learnt_nm:g} nm: segment again with "
                f"--pixel_nm {size:.4g}"
            )
        return ""
