"""Measurements of masks: volumes in ml, extents in mm, pixels, parts and cells."""

from .cells import CELL_COLUMNS, measure_cells
from .frames import measure_frame
from .text import columns, describe, summarize
from .volumes import extent_mm, measure_volume, sphericity, volume_ml

__all__ = [
    "CELL_COLUMNS",
    "columns",
    "describe",
    "extent_mm",
    "measure_cells",
    "measure_frame",
    "measure_volume",
    "sphericity",
    "summarize",
    "volume_ml",
]
