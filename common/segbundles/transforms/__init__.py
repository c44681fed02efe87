"""Transforms that MONAI lacks: checks that name the file, distance maps, resampling by spacing, boxes in mm."""

from .channels import FillChannelsd
from .check import CheckImaged, LabelToClassd, SetSpacingd
from .classmap import LogitsToClassd
from .component import KeepLargestConnectedComponentd
from .crop import CropBoxd
from .io import SaveSegmentationd
from .resample import ResampleToSpacing, ResampleToSpacingd, resample
from .signed_distance import SignedDistanceMap, SignedDistanceMapd
from .slices import ScaleSlicesd

__all__ = [
    "CheckImaged",
    "CropBoxd",
    "FillChannelsd",
    "KeepLargestConnectedComponentd",
    "LabelToClassd",
    "LogitsToClassd",
    "ResampleToSpacing",
    "ResampleToSpacingd",
    "SaveSegmentationd",
    "ScaleSlicesd",
    "SetSpacingd",
    "SignedDistanceMap",
    "SignedDistanceMapd",
    "resample",
]
