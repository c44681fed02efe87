"""Reading and writing images, lists of cases, and loading a folder of images of which some may be bad."""

from .cases import Datalist, FolderImages
from .loader import TolerantDataLoader
from .readers import SimpleITKReader, SuffixReader, TiffReader, file_stem, file_suffix
from .writers import SimpleITKWriter, TiffWriter

__all__ = [
    "Datalist",
    "FolderImages",
    "SimpleITKReader",
    "SimpleITKWriter",
    "SuffixReader",
    "TiffReader",
    "TiffWriter",
    "TolerantDataLoader",
    "file_stem",
    "file_suffix",
]
