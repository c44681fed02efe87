"""Image readers for NIfTI, NRRD, MetaImage, DICOM, TIFF, PNG, BMP and JPEG."""

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
from monai.utils import MetaKeys, ensure_tuple

from segbundles.data.dicom import DicomReader, format_numbers, is_dicom_slice
from segbundles.errors import InputError, fail
from segbundles.itk import quiet_itk
from segbundles.meta import image_meta, set_has_spacing, set_slice_files

__all__ = ["NiftiReader", "SimpleITKReader", "StackReader", "SuffixReader", "TiffReader", "file_stem", "file_suffix"]

NIFTI = (".nii", ".nii.gz")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
TIFF = (".tif", ".tiff")
PIL = (".png", ".bmp", ".jpg", ".jpeg")
DICOM = (".dcm",)  # means folders of slices, whatever their names
GRID_TOLERANCE = 1e-3  # of a voxel
FLOAT32_EPS = float(np.finfo(np.float32).eps)


def file_suffix(path: PathLike) -> str:
    """Return the suffix in lower case; ``.nii.gz`` counts as one."""
    name = Path(path).name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def file_stem(path: PathLike) -> str:
    """Return the name of a file without its suffix: ``a.b.nii.gz`` gives ``a.b``."""
    name = Path(path).name
    suffix = file_suffix(path)
    return name[: len(name) - len(suffix)] if suffix else name


def _one(data: Any) -> Any:
    items = ensure_tuple(data)
    if len(items) != 1:
        fail(f"an image must be one file, got {len(items)}: stack the channels beforehand.")
    return items[0]


class NiftiReader(NibabelReader):
    """Read NIfTI with nibabel, on the grid of the header.

    The affine is nibabel's: the sform if its code is set, else the qform, else one made from pixdim. If sform, qform
    and pixdim contradict each other, MONAI's reader silently uses one of them. This reader refuses the file, because
    other programs may use another one.
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
            raise InputError(f"cannot read {path}: {fault}")
        return image


def _nifti_fault(image: nib.Nifti1Pair) -> str | None:
    """Describe what makes the header's grid ambiguous and what to do about it; None if nothing does."""
    header = image.header
    unit = {1: "metres", 3: "micrometres"}.get(int(header["xyzt_units"]) % 8)
    if unit:
        return f"its header is in {unit} (xyzt_units), not mm: rescale affine and pixdim, and set the unit to mm."
    repair = "correct the header, with nibabel (set_sform, set_qform), ITK-SNAP or fslorient."
    pixdim = np.asarray(header.get_zooms()[:3], dtype=np.float64)
    spacing = nib.affines.voxel_sizes(image.affine)[: len(pixdim)]
    if not (np.abs(spacing - pixdim) <= GRID_TOLERANCE * pixdim).all():
        source = "sform" if header["sform_code"] > 0 else "qform"
        return (
            f"its {source} has spacing {format_numbers(spacing)} mm, its pixdim {format_numbers(pixdim)} mm: {repair}"
        )
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
        f"its sform puts voxel {format_numbers(corners[worst])} at {format_numbers(by_sform[worst])} mm (spacing "
        f"{format_numbers(spacing)}), its qform at {format_numbers(by_qform[worst])} mm (spacing "
        f"{format_numbers(pixdim)}): {repair}"
    )


def _qform_rounding(header: nib.Nifti1Header) -> float:
    """Return the angle in radians by which rounding may turn a qform.

    The header stores b, c and d as float32. Near half a turn, where many scanners' axes are, a = sqrt(1 - bb - cc - dd)
    is inaccurate.
    """
    bcd = np.array([header[f"quatern_{name}"] for name in "bcd"], dtype=np.float64)
    square, error = max(1 - bcd @ bcd, 0), 3 * FLOAT32_EPS
    return 2 * (np.sqrt(square + error) - np.sqrt(max(square - error, 0)))


class SimpleITKReader(ImageReader):
    """Read NRRD and MetaImage with SimpleITK.

    Arrays have axes (x, y, z), or (x, y, z, channel) for vector images; the affine is RAS, in mm. A header without an
    origin means origin 0, and a header with only ``spacings`` means axes along the scanner's.
    """

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Return whether every file ends in .nrrd, .nhdr, .mha or .mhd."""
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
            raise InputError(f"cannot read {path}: it is truncated or damaged ({reason}).") from None

    def get_data(self, img: sitk.Image) -> tuple[np.ndarray, dict]:
        """Return array and metadata of an image that ``read`` returned."""
        dims = img.GetDimension()
        array = sitk.GetArrayFromImage(img)
        vector = img.GetNumberOfComponentsPerPixel() > 1
        order = (*reversed(range(dims)), dims) if vector else tuple(reversed(range(dims)))
        rank = min(dims, 3)
        affine = np.eye(rank + 1)
        direction = np.asarray(img.GetDirection()).reshape(dims, dims)[:rank, :rank]
        affine[:rank, :rank] = direction * np.asarray(img.GetSpacing())[:rank]
        affine[:rank, -1] = img.GetOrigin()[:rank]
        return array.transpose(order), image_meta(orientation_ras_lps(affine), img.GetSize(), vector)


def tiff_pixels(page: tifffile.TiffPage) -> np.ndarray:
    """Return the pixels of a page of a TIFF, (H, W) or (H, W, channels), as RGB or as grey with 0 as black.

    Raises:
        ValueError: when the page has another kind of pixels, such as a palette or CMYK.
    """
    if fault := _pixel_fault(page):
        raise InputError(fault)
    array = page.asarray()
    if _photometric(page) == tifffile.PHOTOMETRIC.MINISWHITE:
        array = ~array if array.dtype == bool else array.dtype.type(2**page.bitspersample - 1) - array
    planar = page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
    return np.moveaxis(array, 0, -1) if planar else array


def shows_stored_values(path: PathLike) -> bool:
    """Return whether the first page of a TIFF is grey or RGB, so that :func:`tiff_pixels` can read it."""
    with tifffile.TiffFile(path) as file:
        return _pixel_fault(file.pages[0]) is None


def _photometric(page: tifffile.TiffPage) -> int:
    # tifffile treats a missing tag as grey with 0 as white
    return page.photometric if "PhotometricInterpretation" in page.tags else tifffile.PHOTOMETRIC.MINISBLACK


def _pixel_fault(page: tifffile.TiffPage) -> str | None:
    kinds, kind = tifffile.PHOTOMETRIC, _photometric(page)
    if kind == kinds.MINISWHITE and page.dtype is not None and page.dtype.kind not in "bu":
        return f"it is grey with 0 as white, of type {page.dtype}: convert it to 0 as black"
    if kind == kinds.YCBCR and page.compression == tifffile.COMPRESSION.JPEG:
        return None  # decoded as RGB
    if kind in (kinds.MINISWHITE, kinds.MINISBLACK, kinds.RGB):
        return None
    return f"its pixels are {getattr(kind, 'name', kind)}: convert it to grey or RGB"


class TiffReader(ImageReader):
    """Read all pages of a TIFF, or one of them, with tifffile.

    One page gives (W, H), several give (W, H, pages); colour adds a last axis of channels. The first axis is x, as in
    MONAI's PIL reader. Grey with 0 as white is inverted.
    """

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Return whether every file ends in .tif or .tiff."""
        return all(file_suffix(name) in TIFF for name in ensure_tuple(filename))

    def read(
        self, data: Sequence[PathLike] | PathLike, page: int | None = None, **kwargs: Any
    ) -> tuple[np.ndarray, bool]:
        """Return the array of one file, in file order, and whether the last axis is colour.

        Args:
            data: path of the file.
            page: page to read, from 0; None reads all pages.
            kwargs: passed to ``tifffile.TiffFile``.

        Raises:
            ValueError: when the file cannot be decoded or has no such page, or when the pages differ in size or are
                neither grey nor RGB.
        """
        path = str(_one(data))
        try:
            with tifffile.TiffFile(path, **kwargs) as file:
                if _next_page(file):
                    raise InputError("pages are missing")
                pages = list(file.pages) if page is None else [_page(file, path, page)]
                shapes = {one.shape for one in pages}
                if len(shapes) > 1:
                    raise InputError(
                        f"{path} has pages of different sizes, {sorted(shapes)}: give each size its own file."
                    )
                colour = pages[0].samplesperpixel > 1
                if fault := next(filter(None, map(_pixel_fault, pages)), None):
                    raise InputError(f"cannot read {path}: {fault}.")
                array = np.stack([tiff_pixels(one) for one in pages])
        except Exception as error:
            if path in str(error):
                raise
            if "imagecodecs" in str(error):
                raise InputError(f"cannot read {path}: its compression needs `pip install imagecodecs`.") from None
            raise InputError(f"cannot read {path}: it is truncated or damaged ({error}).") from None
        return (array[0] if len(array) == 1 else array), colour

    def get_data(self, img: tuple[np.ndarray, bool]) -> tuple[np.ndarray, dict]:
        """Return array and metadata of what ``read`` returned."""
        array, colour = img
        pages = array.ndim - colour == 3
        spatial = (2, 1, 0) if pages else (1, 0)
        array = array.transpose((*spatial, array.ndim - 1) if colour else spatial)
        # 4 x 4 for 2D images too, like PILReader: both may be in one batch
        return array, image_meta(np.eye(4), array.shape[: array.ndim - colour], colour)


def _page(file: tifffile.TiffFile, path: str, number: int) -> tifffile.TiffPage:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(file.pages):
        raise InputError(f"{path} has {len(file.pages)} pages, so there is no page {number!r}: pages count from 0.")
    return file.pages[number]


def _next_page(file: tifffile.TiffFile) -> int:
    """Return the offset after the last page found; not 0 if the file is truncated, where tifffile skips lost pages."""
    tiff, handle = file.tiff, file.filehandle
    handle.seek(file.pages[-1].offset)
    (tags,) = struct.unpack(tiff.tagnoformat, handle.read(tiff.tagnosize))
    handle.seek(tags * tiff.tagsize, os.SEEK_CUR)
    (offset,) = struct.unpack(tiff.offsetformat, handle.read(tiff.offsetsize))
    return offset


class SuffixReader(ImageReader):
    """Read an image with the reader for its suffix, or a folder as a DICOM series.

    nibabel reads NIfTI, SimpleITK reads NRRD, MetaImage and DICOM, tifffile reads TIFF, and PIL reads PNG, BMP and
    JPEG. MONAI's ``LoadImage`` with several readers tries one after the other, so that one damaged file gives a page
    of unrelated errors.
    """

    def __init__(self) -> None:
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
        """Return every readable suffix; ``.dcm`` means folders of DICOM slices, whatever their names."""
        return (*NIFTI, *ITK, *TIFF, *PIL, *DICOM)

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Return whether every file has a readable suffix or is a folder."""
        return all(Path(name).is_dir() or file_suffix(name) in self._readers for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> tuple[Path, dict[str, Any]]:
        """Take one file; ``get_data`` reads it, because ``LoadImage`` hides the errors of ``read``.

        Args:
            data: path of the file, or of the folder of a DICOM series.
            kwargs: passed to the ``read`` of the reader for this file.
        """
        return Path(_one(data)), kwargs

    def get_data(self, img: tuple[Path, dict[str, Any]]) -> tuple[np.ndarray, dict]:
        """Return array and metadata of what ``read`` took.

        Raises:
            ValueError: when the suffix is unknown, the file does not exist or cannot be decoded, its header
                contradicts itself, or a folder is not one complete DICOM series.
        """
        path, kwargs = img
        reader = self._dicom if path.is_dir() else self._readers.get(file_suffix(path))
        if reader is None and path.is_file() and is_dicom_slice(path):
            fail(f"cannot read {path}: it is one slice of a DICOM series; give the folder with the whole series.")
        if reader is None:
            fail(f"cannot read {path}: its name must end in one of {', '.join(self._readers)}.")
        if not path.exists():
            fail(f"cannot read {path}: there is no such file.")
        try:
            return reader.get_data(reader.read(path, **kwargs))
        except Exception as error:
            known = isinstance(error, InputError)
            fail(str(error) if known else f"cannot read {path}: it is truncated or damaged ({error}).")


class StackReader(SuffixReader):
    """Read a volume from a volume file, from a folder with a DICOM series, or from a stack of 2D images.

    Arrays have three spatial axes, (W, H, D), and a last axis of channels if there are several. 2D images (TIFF, PNG,
    BMP, JPEG) become slices along the last spatial axis, in the given order; one image gives D = 1. The pages of a TIFF
    become slices too. Image x points to the patient's left and y to the back, as radiologists view slices, so that
    ``Orientationd("LPS")`` does not change the affine, diag(-1, -1, 1, 1). Volume files are read as by
    :class:`SuffixReader`, and NIfTI vectors, (W, H, D, 1, C), become channels.

    The metadata says whether the affine is in mm (volume files) or counts pixels, see
    :func:`segbundles.meta.has_spacing`, and lists the files of a stack of 2D images, see
    :func:`segbundles.meta.slice_files`.

    Args:
        page: page of a TIFF to read, from 0; None reads all pages.
    """

    def __init__(self, page: int | None = None) -> None:
        super().__init__()
        self.page = page

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> tuple[list[Path], dict[str, Any]]:
        """Take the files of one volume; ``get_data`` reads them.

        Args:
            data: path of a volume file, of a series' folder or of a 2D image, or paths of 2D images in their order.
            kwargs: passed to the ``read`` of the reader for these files.
        """
        return [Path(path) for path in ensure_tuple(data)], kwargs

    def get_data(self, img: tuple[list[Path], dict[str, Any]]) -> tuple[np.ndarray, dict]:
        """Return array and metadata of what ``read`` took.

        Raises:
            ValueError: as for :class:`SuffixReader`, when slices of one stack differ in size or channels, when one of
                several files has more than one slice, and when a file does not have the ``page``.
        """
        paths, kwargs = img
        if self.page is not None:
            if len(paths) > 1 or file_suffix(paths[0]) not in TIFF:
                fail(f"{paths[0]} has no page {self.page!r}: only a single TIFF has pages; leave out the page.")
            kwargs = {**kwargs, "page": self.page}
        array, meta = super().get_data((paths[0], kwargs))
        if len(paths) == 1 and (paths[0].is_dir() or file_suffix(paths[0]) not in (*TIFF, *PIL)):
            vector = array.ndim == 5 and array.shape[3] == 1
            set_has_spacing(meta, True)
            return (array[:, :, :, 0] if vector else array), meta
        files: list[Path] = []
        if len(paths) > 1 or len(meta[MetaKeys.SPATIAL_SHAPE]) == 2:
            arrays = [_slice(paths[0], array, meta)]
            for path in paths[1:]:
                arrays.append(_slice(path, *super().get_data((path, kwargs))))
                if arrays[-1].shape != arrays[0].shape:
                    fail(
                        f"{path} is {_size(arrays[-1])} but {paths[0]} of the same stack is {_size(arrays[0])}: all "
                        "slices of a stack must be equal; correct them, or put other stacks into other folders."
                    )
            array = np.stack(arrays, axis=2)
            files = paths
        meta = image_meta(np.diag([-1.0, -1.0, 1.0, 1.0]), array.shape[:3], array.ndim == 4)
        set_has_spacing(meta, False)
        if files:
            set_slice_files(meta, files)
        return array, meta


def _slice(path: Path, array: np.ndarray, meta: dict) -> np.ndarray:
    """Return the array of a 2D image, (W, H) or (W, H, channels), and refuse other images."""
    shape = tuple(int(n) for n in meta[MetaKeys.SPATIAL_SHAPE])
    if len(shape) != 2:
        fail(f"{path} has size {shape} but is one of several slices: give it alone, or as 2D images.")
    return array


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]} x {array.shape[1]} with {array.shape[2] if array.ndim == 3 else 1} channel(s)"
