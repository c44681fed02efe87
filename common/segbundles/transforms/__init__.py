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
from .watershed import GreyWatershedd, ProbabilityWatershedd, grey_watershed, probability_watershed

__all__ = [
    "CheckImaged",
    "CropBoxd",
    "FillChannelsd",
    "GreyWatershedd",
    "KeepLargestConnectedComponentd",
    "LabelToClassd",
    "LogitsToClassd",
    "ProbabilityWatershedd",
    "ResampleToSpacing",
    "ResampleToSpacingd",
    "SaveSegmentationd",
    "ScaleSlicesd",
    "SetSpacingd",
    "SignedDistanceMap",
    "SignedDistanceMapd",
    "grey_watershed",
    "probability_watershed",
    "resample",
]
