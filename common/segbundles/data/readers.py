"""Image readers for the formats that people bring: NRRD and MetaImage, NIfTI, TIFF, and what PIL opens."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
import tifffile
from monai.config import PathLike
from monai.data import ImageReader, NibabelReader, PILReader
from monai.data.utils import orientation_ras_lps
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple

from segbundles.errors import fail

__all__ = ["SimpleITKReader", "SuffixReader", "TiffReader", "file_stem", "file_suffix"]

NIFTI = (".nii", ".nii.gz")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
TIFF = (".tif", ".tiff")
PIL = (".png", ".bmp", ".jpg", ".jpeg")


def file_suffix(path: PathLike) -> str:
    """Suffix in lower case, ``.nii.gz`` as one."""
    name = Path(path).name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def file_stem(path: PathLike) -> str:
    """Name of a file less its suffix: ``a.b.nii.gz`` gives ``a.b``."""
    name = Path(path).name
    suffix = file_suffix(path)
    return name[: len(name) - len(suffix)] if suffix else name


def _one(data: Any) -> Any:
    items = ensure_tuple(data)
    if len(items) != 1:
        raise ValueError(f"one file an image is read here, got {len(items)}: stack the channels beforehand.")
    return items[0]


class SimpleITKReader(ImageReader):
    """Read NRRD and MetaImage with SimpleITK.

    Arrays come with axes (x, y, z), or (x, y, z, channel) for vector images; the affine is RAS, in mm. A header without
    an origin means origin 0, and one with plain ``spacings`` has its axes along the scanner's.
    """

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Whether every file ends in .nrrd, .nhdr, .mha or .mhd."""
        return all(file_suffix(name) in ITK for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> sitk.Image:
        """Read one file.

        Args:
            data: path of the file.
            kwargs: passed to ``SimpleITK.ReadImage``.

        Raises:
            ValueError: when the file cannot be decoded.
        """
        path = str(_one(data))
        level = sitk.ProcessObject.GetGlobalWarningDisplay()
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        try:
            return sitk.ReadImage(path, **kwargs)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"cannot read {path}: it is truncated or damaged ({reason}).") from None
        finally:
            sitk.ProcessObject.SetGlobalWarningDisplay(level)

    def get_data(self, img: sitk.Image) -> tuple[np.ndarray, dict]:
        """Array and metadata of an image that ``read`` gave."""
        dims = img.GetDimension()
        array = sitk.GetArrayFromImage(img)
        vector = img.GetNumberOfComponentsPerPixel() > 1
        order = (*reversed(range(dims)), dims) if vector else tuple(reversed(range(dims)))
        rank = min(dims, 3)
        affine = np.eye(rank + 1)
        direction = np.asarray(img.GetDirection()).reshape(dims, dims)[:rank, :rank]
        affine[:rank, :rank] = direction * np.asarray(img.GetSpacing())[:rank]
        affine[:rank, -1] = img.GetOrigin()[:rank]
        affine = orientation_ras_lps(affine)
        meta = {
            MetaKeys.ORIGINAL_AFFINE: affine.copy(),
            MetaKeys.AFFINE: affine,
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.SPATIAL_SHAPE: np.asarray(img.GetSize()),
            MetaKeys.ORIGINAL_CHANNEL_DIM: -1 if vector else float("nan"),
        }
        return array.transpose(order), meta


class TiffReader(ImageReader):
    """Read TIFF with tifffile, all pages.

    One page gives (W, H), several give (W, H, pages); colour adds a last axis of channels. The first axis is x, as
    MONAI's PIL reader has it.
    """

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Whether every file ends in .tif or .tiff."""
        return all(file_suffix(name) in TIFF for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> tuple[np.ndarray, bool]:
        """Read one file: its array in file order, and whether the last axis is colour.

        Raises:
            ValueError: when the file cannot be decoded, or its pages differ in size.
        """
        path = str(_one(data))
        try:
            with tifffile.TiffFile(path, **kwargs) as file:
                shapes = {page.shape for page in file.pages}
                if _next_page(file):
                    raise ValueError("pages are missing")
                if len(shapes) > 1:
                    raise ValueError(f"{path} has pages of different sizes: {sorted(shapes)}.")
                colour = file.pages[0].samplesperpixel > 1
                if colour and file.pages[0].planarconfig == 2:
                    array = np.stack([np.moveaxis(page.asarray(), 0, -1) for page in file.pages])
                else:
                    array = np.stack([page.asarray() for page in file.pages])
        except Exception as error:
            if path in str(error):
                raise
            if "imagecodecs" in str(error):
                raise ValueError(f"cannot read {path}: its compression needs `pip install imagecodecs`.") from None
            raise ValueError(f"cannot read {path}: it is truncated or damaged ({error}).") from None
        return (array[0] if len(array) == 1 else array), colour

    def get_data(self, img: tuple[np.ndarray, bool]) -> tuple[np.ndarray, dict]:
        """Array and metadata of what ``read`` gave."""
        array, colour = img
        pages = array.ndim - colour == 3
        spatial = (2, 1, 0) if pages else (1, 0)
        array = array.transpose((*spatial, array.ndim - 1) if colour else spatial)
        affine = np.eye(4)  # of 2D images too, as PILReader has it: both may share a batch
        meta = {
            MetaKeys.ORIGINAL_AFFINE: affine.copy(),
            MetaKeys.AFFINE: affine,
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.SPATIAL_SHAPE: np.asarray(array.shape[: array.ndim - colour]),
            MetaKeys.ORIGINAL_CHANNEL_DIM: -1 if colour else float("nan"),
        }
        return array, meta


def _next_page(file: tifffile.TiffFile) -> int:
    """Offset that follows the last page found: not 0 in a truncated file, whose lost pages tifffile passes over."""
    tiff, handle = file.tiff, file.filehandle
    handle.seek(file.pages[-1].offset)
    (tags,) = struct.unpack(tiff.tagnoformat, handle.read(tiff.tagnosize))
    handle.seek(tags * tiff.tagsize, os.SEEK_CUR)
    (offset,) = struct.unpack(tiff.offsetformat, handle.read(tiff.offsetsize))
    return offset


class SuffixReader(ImageReader):
    """Read an image by the reader that fits the file's suffix.

    NIfTI by nibabel, NRRD and MetaImage by SimpleITK, TIFF by tifffile, PNG, BMP and JPEG by PIL. MONAI's ``LoadImage``
    given several readers tries each in turn, which turns one damaged file into a page of unrelated errors.
    """

    def __init__(self) -> None:
        """No settings."""
        super().__init__()
        self._readers = {
            **dict.fromkeys(NIFTI, NibabelReader()),
            **dict.fromkeys(ITK, SimpleITKReader()),
            **dict.fromkeys(TIFF, TiffReader()),
            **dict.fromkeys(PIL, PILReader()),
        }

    @staticmethod
    def suffixes() -> tuple[str, ...]:
        """Every suffix that can be read."""
        return (*NIFTI, *ITK, *TIFF, *PIL)

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Whether every file has a suffix that can be read."""
        return all(file_suffix(name) in self._readers for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> tuple[Path, dict[str, Any]]:
        """Take one file; ``get_data`` reads it, as ``LoadImage`` buries an error raised here in a text of its own.

        Args:
            data: path of the file.
            kwargs: passed to the ``read`` of the reader that fits.
        """
        return Path(_one(data)), kwargs

    def get_data(self, img: tuple[Path, dict[str, Any]]) -> tuple[np.ndarray, dict]:
        """Array and metadata of what ``read`` took.

        Raises:
            ValueError: when the suffix is unknown, the file does not exist or cannot be decoded.
        """
        path, kwargs = img
        reader = self._readers.get(file_suffix(path))
        if reader is None:
            fail(f"cannot read {path}: its name must end in one of {', '.join(self._readers)}.")
        if not path.is_file():
            fail(f"cannot read {path}: there is no such file.")
        try:
            return reader.get_data(reader.read(path, **kwargs))
        except Exception as error:
            known = isinstance(error, ValueError) and str(path) in str(error)
            fail(str(error) if known else f"cannot read {path}: it is truncated or damaged ({error}).")
