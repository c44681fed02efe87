"""Metrics of one case, and their summary over cases."""

from .segmentation import METRIC_UNITS, segmentation_metrics, summarize

__all__ = ["METRIC_UNITS", "segmentation_metrics", "summarize"]
