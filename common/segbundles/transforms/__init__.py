"""Transforms that MONAI lacks: checks that name the file, distance maps, resampling by spacing, boxes in mm."""

from .check import CheckImaged, LabelToClassd, SetSpacingd
from .classmap import LogitsToClassd
from .crop import CropBoxd
from .io import SaveSegmentationd
from .resample import ResampleToSpacing, ResampleToSpacingd, resample
from .signed_distance import SignedDistanceMap, SignedDistanceMapd

__all__ = [
    "CheckImaged",
    "CropBoxd",
    "LabelToClassd",
    "LogitsToClassd",
    "ResampleToSpacing",
    "ResampleToSpacingd",
    "SaveSegmentationd",
    "SetSpacingd",
    "SignedDistanceMap",
    "SignedDistanceMapd",
    "resample",
]
