"""Transforms that MONAI does not have, such as checks that name the file, distance maps and boxes in mm."""

from .channels import FillChannelsd, RandFillChannelsd
from .check import CheckImaged, LabelToClassd, SetSpacingd
from .classmap import LogitsToClassd, ToProbabilitiesd
from .colour import RandColourExchanged
from .component import KeepLargestConnectedComponentd, largest_component
from .confidence import Confidenced, describe_image, foreground, spacing_mm
from .crop import CropBoxd
from .dicom_seg import SaveDicomSegd
from .frames import FrameHeightd, MaskToClassd, RandCropByKnownClassesd
from .io import SaveOutputd, SaveProbabilitiesd, SaveSegmentationd, SaveUncertaintyd
from .measure import MeasureCellsd, MeasureMaskd
from .members import KeepOriginald, MemberInputsd
from .padding import FillPaddingd
from .pages import LoadPaged
from .preview import Previewd, displayed_case
from .resample import ResampleToSpacing, ResampleToSpacingd, resample
from .signed_distance import SignedDistanceMap, SignedDistanceMapd
from .slices import NeighbourSlicesd, NormalizeSlicesd, ScaleSlicesd
from .uncertainty import Uncertaintyd, uncertainty, uncertainty_levels
from .watershed import GreyWatershedd, ProbabilityWatershedd, grey_watershed, probability_watershed

__all__ = [
    "CheckImaged",
    "Confidenced",
    "CropBoxd",
    "FillChannelsd",
    "FillPaddingd",
    "FrameHeightd",
    "GreyWatershedd",
    "KeepLargestConnectedComponentd",
    "KeepOriginald",
    "LabelToClassd",
    "LoadPaged",
    "LogitsToClassd",
    "MaskToClassd",
    "MeasureCellsd",
    "MeasureMaskd",
    "MemberInputsd",
    "NeighbourSlicesd",
    "NormalizeSlicesd",
    "Previewd",
    "ProbabilityWatershedd",
    "RandColourExchanged",
    "RandCropByKnownClassesd",
    "RandFillChannelsd",
    "ResampleToSpacing",
    "ResampleToSpacingd",
    "SaveDicomSegd",
    "SaveOutputd",
    "SaveProbabilitiesd",
    "SaveSegmentationd",
    "SaveUncertaintyd",
    "ScaleSlicesd",
    "SetSpacingd",
    "SignedDistanceMap",
    "SignedDistanceMapd",
    "ToProbabilitiesd",
    "Uncertaintyd",
    "describe_image",
    "displayed_case",
    "foreground",
    "grey_watershed",
    "largest_component",
    "probability_watershed",
    "resample",
    "spacing_mm",
    "uncertainty",
    "uncertainty_levels",
]
