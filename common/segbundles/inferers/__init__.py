"""Inferers that MONAI lacks."""

from __future__ import annotations

from .autocast import AutocastInferer
from .locator_crop import LocatorCropInferer

__all__ = ["AutocastInferer", "LocatorCropInferer"]
