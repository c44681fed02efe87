"""Metrics of one case, and their summary over cases."""

from .segmentation import METRIC_UNITS, higher_is_better, segmentation_metrics, summarize

__all__ = ["METRIC_UNITS", "higher_is_better", "segmentation_metrics", "summarize"]
