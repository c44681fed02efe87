"""Engines that MONAI does not have."""

from .tolerant import ImageReport, InferenceEvents, TolerantEvaluator

__all__ = ["ImageReport", "InferenceEvents", "TolerantEvaluator"]
