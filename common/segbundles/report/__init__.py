"""The evaluation report: figures of each case and one HTML page."""

from __future__ import annotations

from .html import write_report
from .overlay import PREDICTION_COLOURS, TRUTH_COLOURS, case_figure, choose_slices, overlay_rgb
from .plots import distribution_svg

__all__ = [
    "PREDICTION_COLOURS",
    "TRUTH_COLOURS",
    "case_figure",
    "choose_slices",
    "distribution_svg",
    "overlay_rgb",
    "write_report",
]
