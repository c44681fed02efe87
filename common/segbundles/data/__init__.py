"""Reading and writing images, lists of cases, volumes slice by slice, and loading images of which some may be bad."""

from .base import file_stem, file_suffix
from .cases import Datalist, FolderImages, image_root, list_images
from .dicom import DicomReader, is_dicom_slice
from .frames import VOID, FrameReader, MaskReader, mask_classes, read_frame, read_mask
from .loader import (
    Failure,
    LargeImage,
    SharedDataLoader,
    TolerantDataLoader,
    TrainingDataLoader,
    validation_sampler,
)
from .on_disk import DiskTensor, each_page, forget
from .pictures import PictureReader, picture_shape
from .readers import StackReader, SuffixReader
from .samplers import BalancedSampler
from .segments import read_segments
from .stacks import SliceDataset, SliceStacks, lesion_weights, slice_sampler
from .volumes import NiftiReader, SimpleITKReader
from .writers import PngWriter, SimpleITKWriter, TiffWriter

__all__ = [
    "VOID",
    "BalancedSampler",
    "Datalist",
    "DicomReader",
    "DiskTensor",
    "Failure",
    "FolderImages",
    "FrameReader",
    "LargeImage",
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
    "TiffWriter",
    "TolerantDataLoader",
    "TrainingDataLoader",
    "each_page",
    "file_stem",
    "file_suffix",
    "forget",
    "image_root",
    "is_dicom_slice",
    "lesion_weights",
    "list_images",
    "mask_classes",
    "picture_shape",
    "read_frame",
    "read_mask",
    "read_segments",
    "slice_sampler",
    "validation_sampler",
]
