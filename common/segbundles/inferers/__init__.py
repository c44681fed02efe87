"""Inferers that MONAI does not have."""

from __future__ import annotations

from .autocast import AutocastInferer
from .ensemble import EnsembleInferer, Member
from .frame import FrameInferer
from .large import LargeImages
from .locator_crop import LocatorCropInferer
from .mirror import MirrorInferer
from .scale import ScaleInferer
from .tiles import TileInferer

__all__ = [
    "AutocastInferer",
    "EnsembleInferer",
    "FrameInferer",
    "LargeImages",
    "LocatorCropInferer",
    "Member",
    "MirrorInferer",
    "ScaleInferer",
    "TileInferer",
]
