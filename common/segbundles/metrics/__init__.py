"""Metrics of one case, and their summary over cases."""

from .instances import label_cells, section_metrics, threshold_scores, v_info, v_rand
from .pooled import PooledConfusion, confusion_columns, confusion_counts, confusion_of, pooled_metric, pooled_scores
from .segmentation import METRIC_UNITS, SECTION_UNITS, higher_is_better, segmentation_metrics, summarize

__all__ = [
    "METRIC_UNITS",
    "SECTION_UNITS",
    "PooledConfusion",
    "confusion_columns",
    "confusion_counts",
    "confusion_of",
    "higher_is_better",
    "label_cells",
    "pooled_metric",
    "pooled_scores",
    "section_metrics",
    "segmentation_metrics",
    "summarize",
    "threshold_scores",
    "v_info",
    "v_rand",
]
