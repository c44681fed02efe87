"""The evaluation report: one HTML page with figures of each case."""

from __future__ import annotations

from .html import write_report
from .overlay import PREDICTION_COLOURS, TRUTH_COLOURS, case_figure, choose_slices, overlay_rgb
from .plots import (
    agreement_svg,
    bland_altman_svg,
    calibration_svg,
    distribution_svg,
    groups_svg,
    precision_recall_svg,
    thresholds_svg,
)
from .sections import CELL_COLOURS, colour_cells, limit_figures, section_figure
from .tables import export, to_latex

__all__ = [
    "CELL_COLOURS",
    "PREDICTION_COLOURS",
    "TRUTH_COLOURS",
    "agreement_svg",
    "bland_altman_svg",
    "calibration_svg",
    "case_figure",
    "choose_slices",
    "colour_cells",
    "distribution_svg",
    "export",
    "groups_svg",
    "limit_figures",
    "overlay_rgb",
    "precision_recall_svg",
    "section_figure",
    "thresholds_svg",
    "to_latex",
    "write_report",
]
