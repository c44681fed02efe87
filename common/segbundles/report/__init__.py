"""The evaluation report: one HTML page with figures of each case."""

from __future__ import annotations

from .html import write_report
from .overlay import PREDICTION_COLOURS, TRUTH_COLOURS, case_figure, choose_slices, overlay_rgb
from .plots import distribution_svg
from .sections import CELL_COLOURS, colour_cells, limit_figures, section_figure

__all__ = [
    "CELL_COLOURS",
    "PREDICTION_COLOURS",
    "TRUTH_COLOURS",
    "case_figure",
    "choose_slices",
    "colour_cells",
    "distribution_svg",
    "limit_figures",
    "overlay_rgb",
    "section_figure",
    "write_report",
]
