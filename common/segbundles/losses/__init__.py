"""Losses that MONAI lacks."""

from .boundary import BoundaryLoss
from .hybrid import HybridLoss

__all__ = ["BoundaryLoss", "HybridLoss"]
