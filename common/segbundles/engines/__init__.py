"""Engines that MONAI does not have."""

from .tolerant import ImageReport, InferenceEvents, TolerantEvaluator, attach_per_image

__all__ = ["ImageReport", "InferenceEvents", "TolerantEvaluator", "attach_per_image"]
