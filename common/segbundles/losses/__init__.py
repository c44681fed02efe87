"""Losses that MONAI does not have."""

from .boundary import BoundaryLoss
from .hybrid import HybridLoss
from .probabilities import FromProbabilities
from .void import VoidDiceCELoss

__all__ = ["BoundaryLoss", "FromProbabilities", "HybridLoss", "VoidDiceCELoss"]
