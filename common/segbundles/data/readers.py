"""Image readers for the formats that people bring: NRRD and MetaImage, NIfTI, DICOM, TIFF, and what PIL opens."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813
import tifffile
from monai.config import PathLike
from monai.data import ImageReader, NibabelReader, PILReader
from monai.data.utils import orientation_ras_lps
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple

from segbundles.data.dicom import DicomReader, is_dicom_slice
from segbundles.errors import fail
from segbundles.itk import quiet_itk

__all__ = ["NiftiReader", "SimpleITKReader", "StackReader", "SuffixReader", "TiffReader", "file_stem", "file_suffix"]

NIFTI = (".nii", ".nii.gz")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
TIFF = (".tif", ".tiff")
PIL = (".png", ".bmp", ".jpg", ".jpeg")
DICOM = (".dcm",)  # stands for folders of slices, whatever their names
GRID_TOLERANCE = 1e-3  # of a voxel
FLOAT32_EPS = float(np.finfo(np.float32).eps)


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


class NiftiReader(NibabelReader):
    """Read NIfTI with nibabel, on the grid that the header gives.

    The affine is nibabel's: the sform if its code is set, else the qform, else one made of pixdim. Where sform, qform
    and pixdim contradict each other, MONAI's reader settles for one of them; here the file is refused, as other
    programs may settle for another.
    """

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> nib.Nifti1Pair:
        """Read one file.

        Args:
            data: path of the file.
            kwargs: passed to ``nibabel.load``.

        Raises:
            ValueError: when the header contradicts itself by more than float32 rounding explains, or is not in mm.
        """
        path = _one(data)
        self.filenames = (path,)
        image = nib.load(path, **{**self.kwargs, **kwargs})
        fault = _nifti_fault(image)
        if fault:
            raise ValueError(f"cannot read {path}: {fault}")
        return image


def _nifti_fault(image: nib.Nifti1Pair) -> str | None:
    """What makes the header's grid ambiguous, and what to do about it."""
    header = image.header
    unit = {1: "metres", 3: "micrometres"}.get(int(header["xyzt_units"]) % 8)
    if unit:
        return (
            f"its header gives {unit} (xyzt_units), mm are needed: rescale affine and pixdim, and set the unit to mm."
        )
    repair = "correct the header, with nibabel (set_sform, set_qform), ITK-SNAP or fslorient."
    pixdim = np.asarray(header.get_zooms()[:3], dtype=np.float64)
    spacing = nib.affines.voxel_sizes(image.affine)[: len(pixdim)]
    if not (np.abs(spacing - pixdim) <= GRID_TOLERANCE * pixdim).all():
        source = "sform" if header["sform_code"] > 0 else "qform"
        return f"its {source} has spacing {_numbers(spacing)} mm, its pixdim {_numbers(pixdim)} mm: {repair}"
    if header["sform_code"] <= 0 or header["qform_code"] <= 0:
        return None
    size = (*image.shape, 1, 1)[:3]
    corners = np.array(list(product(*((0, n - 1) for n in size))))
    sform, qform = image.get_sform(), image.get_qform()
    by_sform, by_qform = (nib.affines.apply_affine(affine, corners) for affine in (sform, qform))
    reach = np.linalg.norm(by_qform - qform[:3, 3], axis=1)
    rounding = _qform_rounding(header) * reach + FLOAT32_EPS * np.abs(by_qform).max()
    apart = np.linalg.norm(by_sform - by_qform, axis=1)
    far = ~(apart <= GRID_TOLERANCE * pixdim.min() + rounding)
    if not far.any():
        return None
    worst = np.flatnonzero(far)[np.argmax(apart[far])]
    return (
        f"its sform puts voxel {_numbers(corners[worst])} at {_numbers(by_sform[worst])} mm (spacing "
        f"{_numbers(spacing)}), its qform at {_numbers(by_qform[worst])} mm (spacing {_numbers(pixdim)}): {repair}"
    )


def _qform_rounding(header: nib.Nifti1Header) -> float:
    """Angle in radians that rounding may turn a qform by.

    It holds b, c and d as float32, and a = sqrt(1 - bb - cc - dd) loses digits near half a turn, where many scanners'
    axes are.
    """
    bcd = np.array([header[f"quatern_{name}"] for name in "bcd"], dtype=np.float64)
    square, error = max(1 - bcd @ bcd, 0), 3 * FLOAT32_EPS
    return 2 * (np.sqrt(square + error) - np.sqrt(max(square - error, 0)))


def _numbers(values: np.ndarray) -> str:
    return f"({', '.join(f'{value:.6g}' for value in values)})"


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
        try:
            with quiet_itk():
                return sitk.ReadImage(path, **kwargs)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"cannot read {path}: it is truncated or damaged ({reason}).") from None

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


def tiff_pixels(page: tifffile.TiffPage) -> np.ndarray:
    """Pixels of a page of a TIFF, (H, W) or (H, W, channels): grey whose 0 is black, or RGB.

    Raises:
        ValueError: when the page holds another kind of pixels, such as a palette or CMYK.
    """
    if fault := _pixel_fault(page):
        raise ValueError(fault)
    array = page.asarray()
    if _photometric(page) == tifffile.PHOTOMETRIC.MINISWHITE:
        array = ~array if array.dtype == bool else array.dtype.type(2**page.bitspersample - 1) - array
    planar = page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
    return np.moveaxis(array, 0, -1) if planar else array


def shows_stored_values(path: PathLike) -> bool:
    """Whether the first page of a TIFF is grey or RGB, which :func:`tiff_pixels` reads."""
    with tifffile.TiffFile(path) as file:
        return _pixel_fault(file.pages[0]) is None


def _photometric(page: tifffile.TiffPage) -> int:
    # tifffile takes a missing tag for grey with 0 as white
    return page.photometric if "PhotometricInterpretation" in page.tags else tifffile.PHOTOMETRIC.MINISBLACK


def _pixel_fault(page: tifffile.TiffPage) -> str | None:
    kinds, kind = tifffile.PHOTOMETRIC, _photometric(page)
    if kind == kinds.MINISWHITE and page.dtype is not None and page.dtype.kind not in "bu":
        return f"it is grey with 0 as white, of {page.dtype}: convert it to 0 as black"
    if kind == kinds.YCBCR and page.compression == tifffile.COMPRESSION.JPEG:
        return None  # decoded as RGB
    if kind in (kinds.MINISWHITE, kinds.MINISBLACK, kinds.RGB):
        return None
    return f"its pixels are {getattr(kind, 'name', kind)}, neither grey nor RGB: convert it"


class TiffReader(ImageReader):
    """Read TIFF with tifffile, all pages or one.

    One page gives (W, H), several give (W, H, pages); colour adds a last axis of channels. The first axis is x, as
    MONAI's PIL reader has it. Grey whose 0 is white is inverted.
    """

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Whether every file ends in .tif or .tiff."""
        return all(file_suffix(name) in TIFF for name in ensure_tuple(filename))

    def read(
        self, data: Sequence[PathLike] | PathLike, page: int | None = None, **kwargs: Any
    ) -> tuple[np.ndarray, bool]:
        """Read one file: its array in file order, and whether the last axis is colour.

        Args:
            data: path of the file.
            page: the one page to read, from 0; None reads all.
            kwargs: passed to ``tifffile.TiffFile``.

        Raises:
            ValueError: when the file cannot be decoded, has no such page, or the pages that are read differ in size or
                are neither grey nor RGB.
        """
        path = str(_one(data))
        try:
            with tifffile.TiffFile(path, **kwargs) as file:
                if _next_page(file):
                    raise ValueError("pages are missing")
                pages = list(file.pages) if page is None else [_page(file, path, page)]
                shapes = {one.shape for one in pages}
                if len(shapes) > 1:
                    raise ValueError(f"{path} has pages of different sizes: {sorted(shapes)}.")
                colour = pages[0].samplesperpixel > 1
                if fault := next(filter(None, map(_pixel_fault, pages)), None):
                    raise ValueError(f"cannot read {path}: {fault}.")
                array = np.stack([tiff_pixels(one) for one in pages])
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


def _page(file: tifffile.TiffFile, path: str, number: int) -> tifffile.TiffPage:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(file.pages):
        raise ValueError(f"{path} has {len(file.pages)} pages, page {number!r} is asked for: they count from 0.")
    return file.pages[number]


def _next_page(file: tifffile.TiffFile) -> int:
    """Offset that follows the last page found: not 0 in a truncated file, whose lost pages tifffile passes over."""
    tiff, handle = file.tiff, file.filehandle
    handle.seek(file.pages[-1].offset)
    (tags,) = struct.unpack(tiff.tagnoformat, handle.read(tiff.tagnosize))
    handle.seek(tags * tiff.tagsize, os.SEEK_CUR)
    (offset,) = struct.unpack(tiff.offsetformat, handle.read(tiff.offsetsize))
    return offset


class SuffixReader(ImageReader):
    """Read an image by the reader that fits the file's suffix, or a folder as a DICOM series.

    NIfTI by nibabel, NRRD, MetaImage and DICOM by SimpleITK, TIFF by tifffile, PNG, BMP and JPEG by PIL. MONAI's
    ``LoadImage`` given several readers tries each in turn, which turns one damaged file into a page of unrelated
    errors.
    """

    def __init__(self) -> None:
        """No settings."""
        super().__init__()
        self._readers = {
            **dict.fromkeys(NIFTI, NiftiReader()),
            **dict.fromkeys(ITK, SimpleITKReader()),
            **dict.fromkeys(TIFF, TiffReader()),
            **dict.fromkeys(PIL, PILReader()),
        }
        self._dicom = DicomReader()

    @staticmethod
    def suffixes() -> tuple[str, ...]:
        """Every suffix that can be read; ``.dcm`` stands for folders of DICOM slices, whatever their names."""
        return (*NIFTI, *ITK, *TIFF, *PIL, *DICOM)

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Whether every file has a suffix that can be read, or is a folder."""
        return all(Path(name).is_dir() or file_suffix(name) in self._readers for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> tuple[Path, dict[str, Any]]:
        """Take one file; ``get_data`` reads it, as ``LoadImage`` buries an error raised here in a text of its own.

        Args:
            data: path of the file, or of the folder of a DICOM series.
            kwargs: passed to the ``read`` of the reader that fits.
        """
        return Path(_one(data)), kwargs

    def get_data(self, img: tuple[Path, dict[str, Any]]) -> tuple[np.ndarray, dict]:
        """Array and metadata of what ``read`` took.

        Raises:
            ValueError: when the suffix is unknown, the file does not exist or cannot be decoded, its header
                contradicts itself, or a folder is not one whole DICOM series.
        """
        path, kwargs = img
        reader = self._dicom if path.is_dir() else self._readers.get(file_suffix(path))
        if reader is None and path.is_file() and is_dicom_slice(path):
            fail(f"cannot read {path}: it is a slice of a DICOM series; give the folder that holds the whole series.")
        if reader is None:
            fail(f"cannot read {path}: its name must end in one of {', '.join(self._readers)}.")
        if not path.exists():
            fail(f"cannot read {path}: there is no such file.")
        try:
            return reader.get_data(reader.read(path, **kwargs))
        except Exception as error:
            known = isinstance(error, ValueError) and str(path) in str(error)
            fail(str(error) if known else f"cannot read {path}: it is truncated or damaged ({error}).")


class StackReader(SuffixReader):
    """Read a volume: a file that holds one, a folder with a DICOM series, or 2D images that lie on one another.

    Arrays have three spatial axes, (W, H, D), and a last axis of channels where there are several. 2D images (TIFF,
    PNG, BMP, JPEG) become slices along the last spatial axis in the order given; one image gives D = 1, the pages of a
    TIFF are slices too. Image x runs to the patient's left and y to the back, as radiologists look at slices: the
    affine diag(-1, -1, 1, 1) stays as it is under ``Orientationd("LPS")``. Volume files are read as
    :class:`SuffixReader` reads them, and NIfTI vectors, (W, H, D, 1, C), as channels.

    The metadata gains ``has_spacing``, whether the affine is in mm (of volume files) or counts pixels, and ``slices``,
    the paths of the 2D files joined by newlines (not for volume files and TIFF of several pages).

    Args:
        page: the one page of a TIFF to read, from 0; None reads all.
    """

    def __init__(self, page: int | None = None) -> None:
        """See the class."""
        super().__init__()
        self.page = page

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> tuple[list[Path], dict[str, Any]]:
        """Take the files of one volume; ``get_data`` reads them.

        Args:
            data: path of a volume file, a series' folder or a 2D image, or paths of 2D images in their order.
            kwargs: passed to the ``read`` of the reader that fits.
        """
        return [Path(path) for path in ensure_tuple(data)], kwargs

    def get_data(self, img: tuple[list[Path], dict[str, Any]]) -> tuple[np.ndarray, dict]:
        """Array and metadata of what ``read`` took.

        Raises:
            ValueError: as :class:`SuffixReader`, when slices of one stack differ in size or channels, when one of
                several files holds more than one slice, and when a file has no such ``page``.
        """
        paths, kwargs = img
        if self.page is not None:
            if len(paths) > 1 or file_suffix(paths[0]) not in TIFF:
                fail(f"page {self.page!r} of {paths[0]} is asked for: pages are those of a single TIFF, leave it out.")
            kwargs = {**kwargs, "page": self.page}
        array, meta = super().get_data((paths[0], kwargs))
        if len(paths) == 1 and (paths[0].is_dir() or file_suffix(paths[0]) not in (*TIFF, *PIL)):
            vector = array.ndim == 5 and array.shape[3] == 1
            return (array[:, :, :, 0] if vector else array), {**meta, "has_spacing": True}
        slices = {}
        if len(paths) > 1 or len(meta[MetaKeys.SPATIAL_SHAPE]) == 2:
            arrays = [_slice(paths[0], array, meta)]
            for path in paths[1:]:
                arrays.append(_slice(path, *super().get_data((path, kwargs))))
                if arrays[-1].shape != arrays[0].shape:
                    fail(
                        f"{path} is {_size(arrays[-1])}, {paths[0]} of the same stack is {_size(arrays[0])}: slices of "
                        "one stack must be equal in both; correct the odd ones, or keep other stacks in other folders."
                    )
            array = np.stack(arrays, axis=2)
            slices = {"slices": "\n".join(map(str, paths))}
        affine = np.diag([-1.0, -1.0, 1.0, 1.0])
        return array, {
            MetaKeys.ORIGINAL_AFFINE: affine.copy(),
            MetaKeys.AFFINE: affine,
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.SPATIAL_SHAPE: np.asarray(array.shape[:3]),
            MetaKeys.ORIGINAL_CHANNEL_DIM: -1 if array.ndim == 4 else float("nan"),
            "has_spacing": False,
            **slices,
        }


def _slice(path: Path, array: np.ndarray, meta: dict) -> np.ndarray:
    """Array of a 2D image, (W, H) or (W, H, channels)."""
    shape = tuple(int(n) for n in meta[MetaKeys.SPATIAL_SHAPE])
    if len(shape) != 2:
        fail(f"{path} has size {shape}, and is named as one slice of several: give it alone, or as 2D images.")
    return array


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]} x {array.shape[1]} with {array.shape[2] if array.ndim == 3 else 1} channel(s)"
