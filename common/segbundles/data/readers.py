"""Readers that choose by suffix: of one image, and of a volume or stack of slices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import PathLike
from monai.utils import MetaKeys, ensure_tuple

from segbundles.data.base import DICOM, ITK, NIFTI, PIL, TIFF, FileReader, file_suffix
from segbundles.data.dicom import DicomReader, is_dicom
from segbundles.data.pictures import PictureReader
from segbundles.data.volumes import NiftiReader, SimpleITKReader
from segbundles.errors import InputError, fail
from segbundles.meta import (
    add_note,
    image_meta,
    notes_of,
    pixel_sizes_nm,
    set_has_spacing,
    set_pixel_sizes_nm,
    set_slice_files,
)

__all__ = ["StackReader", "SuffixReader"]


class SuffixReader(FileReader):
    """Read an image with the reader for its suffix, or a folder as a DICOM series.

    nibabel reads NIfTI, SimpleITK reads NRRD and MetaImage, pydicom reads DICOM, tifffile reads TIFF, and PIL
    reads PNG, BMP and JPEG. MONAI's ``LoadImage`` with several readers tries one after the other, so that one damaged
    file gives a page of unrelated errors.

    Args:
        series: which DICOM series to read, see :class:`segbundles.data.DicomReader`.
    """

    def __init__(self, series: int | str | Sequence[int | str] | None = None) -> None:
        super().__init__()
        readers = (NiftiReader(), SimpleITKReader(), PictureReader())
        self._readers: dict[str, FileReader] = {suffix: reader for reader in readers for suffix in reader.suffixes}
        self._dicom = DicomReader(series)

    @staticmethod
    def suffixes() -> tuple[str, ...]:
        """Return every readable suffix; ``.dcm`` means folders of DICOM slices, whatever their names."""
        return (*NIFTI, *ITK, *TIFF, *PIL, *DICOM)

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Return whether every file has a readable suffix or is a folder."""
        return all(file_suffix(name) in self._readers or is_dicom(name) for name in ensure_tuple(filename))

    def exists(self, path: Path) -> bool:
        """Return whether there is such a file, folder or DICOM series."""
        return self._dicom.exists(path)

    def decode(self, path: Path, **kwargs: Any) -> tuple[np.ndarray, dict]:
        """Return array and metadata of one file, or of the DICOM series in a folder.

        Args:
            path: the file, or the folder of a DICOM series.
            kwargs: passed to the ``decode`` of the reader for this file.

        Raises:
            ValueError: when the suffix is unknown, the file cannot be decoded, its header contradicts itself, or a
                folder is not one complete DICOM series.
        """
        reader = None if path.is_dir() else self._readers.get(file_suffix(path))
        if reader is None and is_dicom(path):
            reader = self._dicom
        if reader is None:
            raise InputError(f"its name must end in one of {', '.join(self._readers)}.")
        return reader.decode(path, **kwargs)


class StackReader(SuffixReader):
    """Read a volume from a volume file, from a folder with a DICOM series, or from a stack of 2D images.

    Arrays have three spatial axes, (W, H, D), and a last axis of channels if there are several. 2D images (TIFF, PNG,
    BMP, JPEG) become slices along the last spatial axis, in the given order; one image gives D = 1. The pages of a TIFF
    become slices too. A picture of one bit has 0 and 255, as viewers show it. Image x points to the patient's left and
    y to the back, as radiologists view slices, so that ``Orientationd("LPS")`` does not change the affine,
    diag(-1, -1, 1, 1). Volume files are read as by :class:`SuffixReader`, and NIfTI vectors, (W, H, D, 1, C), become
    channels.

    The metadata says whether the affine is in mm (volume files) or counts pixels, see
    :func:`segbundles.meta.has_spacing`, lists the files of a stack of 2D images, see
    :func:`segbundles.meta.slice_files`, and has the size of their pixels if the files contain it, see
    :func:`segbundles.meta.pixel_sizes_nm`.

    Args:
        page: page of a TIFF to read, from 0; None reads all.
        series: which DICOM series to read, see :class:`segbundles.data.DicomReader`.
    """

    def __init__(self, page: int | None = None, series: int | str | Sequence[int | str] | None = None) -> None:
        super().__init__(series)
        self.page = page

    def decode(self, path: Path, **kwargs: Any) -> tuple[np.ndarray, dict]:
        """Return array and metadata of one file."""
        array, meta = super().decode(path, **kwargs)
        return (array * np.uint8(255) if array.dtype == bool else array), meta

    def get_data(self, img: tuple[Sequence[Path], dict[str, Any]]) -> tuple[np.ndarray, dict]:
        """Return array and metadata of what ``read`` took.

        Raises:
            ValueError: as for :class:`SuffixReader`, when slices of one stack differ in size or channels, when one of
                several files has more than one slice, and when a file does not have the ``page``.
        """
        given, kwargs = img
        paths = [Path(path) for path in ensure_tuple(given)]
        if self.page is not None:
            if len(paths) > 1 or file_suffix(paths[0]) not in TIFF:
                fail(f"{paths[0]} has no page {self.page!r}: only a single TIFF has pages; leave out the page.")
            kwargs = {**kwargs, "page": self.page}
        if paths[0].is_dir() or file_suffix(paths[0]) not in (*TIFF, *PIL):
            array, meta = super().get_data((paths, kwargs))
            vector = array.ndim == 5 and array.shape[3] == 1
            set_has_spacing(meta, True)
            return (array[:, :, :, 0] if vector else array), meta
        array, first = super().get_data((paths[:1], kwargs))
        notes = [notes_of(first)]
        sizes = {pixel_sizes_nm(first)}
        files: list[Path] = []
        if len(paths) > 1 or len(first[MetaKeys.SPATIAL_SHAPE]) == 2:
            arrays = [_slice(paths[0], array, first)]
            for path in paths[1:]:
                array, meta = super().get_data(([path], kwargs))
                arrays.append(_slice(path, array, meta))
                notes.append(notes_of(meta))
                sizes.add(pixel_sizes_nm(meta))
                if arrays[-1].shape != arrays[0].shape:
                    fail(
                        f"{path} is {_size(arrays[-1])} but {paths[0]} of the same stack is {_size(arrays[0])}: all "
                        "slices of a stack must be equal; correct them, or put other stacks into other folders."
                    )
            array = np.stack(arrays, axis=2)
            files = paths
        meta = image_meta(np.diag([-1.0, -1.0, 1.0, 1.0]), array.shape[:3], array.ndim == 4)
        set_has_spacing(meta, False)
        add_note(meta, *notes)
        if len(sizes) == 1:
            set_pixel_sizes_nm(meta, *sizes)
        else:
            add_note(meta, "the files of the stack contain different pixel sizes: none is used")
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
