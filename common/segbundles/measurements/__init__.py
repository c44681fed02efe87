"""Measurements of masks: volumes in ml, extents in mm, pixels, parts and cells."""

from .cells import CELL_COLUMNS, measure_cells
from .frames import measure_frame
from .volumes import extent_mm, measure_volume, sphericity, volume_ml

__all__ = [
    "CELL_COLUMNS",
    "extent_mm",
    "measure_cells",
    "measure_frame",
    "measure_volume",
    "sphericity",
    "volume_ml",
]
