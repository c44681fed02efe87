"""Losses that MONAI does not have."""

from .boundary import BoundaryLoss
from .hybrid import HybridLoss
from .void import VoidDiceCELoss

__all__ = ["BoundaryLoss", "HybridLoss", "VoidDiceCELoss"]
