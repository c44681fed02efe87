"""The evaluation report and the preview of an inference: HTML pages with pictures of each case."""

from __future__ import annotations

from .evaluation import write_evaluation
from .html import write_report
from .overlay import PREDICTION_COLOURS, TRUTH_COLOURS, case_figure, choose_slices, overlay_rgb
from .parts import Part, pooled_intervals, pooled_part
from .plots import (
    agreement_svg,
    bland_altman_svg,
    calibration_svg,
    distribution_svg,
    groups_svg,
    precision_recall_svg,
    thresholds_svg,
)
from .preview import read_preview, write_preview
from .sections import CELL_COLOURS, colour_cells, limit_figures, section_figure
from .tables import export, to_latex
from .viewer import case_slices, share_of_page
from .words import glossary, label

__all__ = [
    "CELL_COLOURS",
    "PREDICTION_COLOURS",
    "TRUTH_COLOURS",
    "Part",
    "agreement_svg",
    "bland_altman_svg",
    "calibration_svg",
    "case_figure",
    "case_slices",
    "choose_slices",
    "colour_cells",
    "distribution_svg",
    "export",
    "glossary",
    "groups_svg",
    "label",
    "limit_figures",
    "overlay_rgb",
    "pooled_intervals",
    "pooled_part",
    "precision_recall_svg",
    "read_preview",
    "section_figure",
    "share_of_page",
    "thresholds_svg",
    "to_latex",
    "write_evaluation",
    "write_preview",
    "write_report",
]
