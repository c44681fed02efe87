"""Reading and writing images, lists of cases, volumes slice by slice, and loading images of which some may be bad."""

from .base import file_stem, file_suffix
from .cases import Datalist, FolderImages, image_root
from .dicom import DicomReader, is_dicom_slice
from .frames import VOID, FrameReader, MaskReader, mask_classes, read_frame, read_mask
from .loader import Failure, SharedDataLoader, TolerantDataLoader, validation_sampler
from .pictures import PictureReader, TiffReader
from .readers import StackReader, SuffixReader
from .samplers import BalancedSampler
from .stacks import SliceDataset, SliceStacks, lesion_weights, slice_sampler
from .volumes import NiftiReader, SimpleITKReader
from .writers import PngWriter, SimpleITKWriter, TiffWriter

__all__ = [
    "VOID",
    "BalancedSampler",
    "Datalist",
    "DicomReader",
    "Failure",
    "FolderImages",
    "FrameReader",
    "MaskReader",
    "NiftiReader",
    "PictureReader",
    "PngWriter",
    "SharedDataLoader",
    "SimpleITKReader",
    "SimpleITKWriter",
    "SliceDataset",
    "SliceStacks",
    "StackReader",
    "SuffixReader",
    "TiffReader",
    "TiffWriter",
    "TolerantDataLoader",
    "file_stem",
    "file_suffix",
    "image_root",
    "is_dicom_slice",
    "lesion_weights",
    "mask_classes",
    "read_frame",
    "read_mask",
    "slice_sampler",
    "validation_sampler",
]
