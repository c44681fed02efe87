"""Image writers that MONAI does not have: SimpleITK for NRRD and MetaImage, tifffile for TIFF, imagecodecs for PNG."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
import torch
from monai.config import DtypeLike, NdarrayOrTensor, PathLike
from monai.data import ImageWriter
from monai.data.utils import orientation_ras_lps, to_affine_nd
from monai.utils import convert_data_type

from segbundles.errors import fail

from .on_disk import each_page

__all__ = ["PngWriter", "SimpleITKWriter", "TiffWriter"]

_NM_PER_CM, _NM_PER_M = 1e7, 1e9
_OF_IMAGEJ = (np.uint8, np.uint16, np.float32)
_BUFFER = 2**24  # bytes of pages that are compressed at once
_SMALL = 2**32 - 2**25  # bytes of pixels that fit into a TIFF, with its directories
_PNG_LIMIT = 2**31 - 1


class _ArrayWriter(ImageWriter):
    """Base of these writers: one channel, resampled to the grid of its file as MONAI's ``NibabelWriter`` does."""

    def __init__(self, output_dtype: DtypeLike = np.uint8, factor: int = 1, **kwargs: Any) -> None:
        super().__init__(output_dtype=output_dtype, affine=None, **kwargs)
        self.factor = factor

    def _converted(self, array: np.ndarray) -> np.ndarray:
        """Return an array as it is written; a large one that can be written as it is must not be copied."""
        array = np.ascontiguousarray(array, self.output_dtype)
        return array if self.factor == 1 else array * array.dtype.type(self.factor)

    def set_data_array(self, data_array: NdarrayOrTensor, channel_dim: int | None = 0, **kwargs: Any) -> None:
        """Take an array of one channel.

        Args:
            data_array: (1, spatial) when ``channel_dim`` is 0, or only spatial axes when it is None.
            channel_dim: axis of the channel, or None.
            kwargs: ignored; MONAI's ``SaveImage`` passes its own.

        Raises:
            ValueError: when there is more than one channel.
        """
        array = convert_data_type(data_array, np.ndarray)[0]
        if channel_dim is not None:
            if array.shape[channel_dim] != 1:
                fail(f"a class map must have one channel, got shape {array.shape}: take the argmax beforehand.")
            array = array.squeeze(channel_dim)
        self.data_obj = array

    def set_metadata(self, meta_dict: Mapping | None, resample: bool = True, **options: Any) -> None:
        """Take the ``affine`` (RAS, mm) of the array, and resample the array to the grid of its file.

        Args:
            meta_dict: has ``affine``; for resampling also ``original_affine`` and ``spatial_shape``.
            resample: whether to resample if the array is on another grid.
            options: ``mode``, ``padding_mode``, ``align_corners`` and ``dtype`` of MONAI's ``resample_if_needed``.

        Raises:
            ValueError: when the size is not ``spatial_shape`` and there is no ``original_affine``.
        """
        original, affine, shape = (
            None if value is None else np.asarray(torch.as_tensor(value).cpu(), dtype=np.float64)
            for value in self.get_meta_info(meta_dict)
        )
        self.affine = affine
        size = None if shape is None else tuple(int(n) for n in shape)
        if not resample:
            return
        if original is None:
            if size not in (None, self.data_obj.shape):
                fail(f"the array has size {self.data_obj.shape} but its file {size}: invert spatial transforms first.")
            return
        rank = self.data_obj.ndim
        here = np.eye(rank + 1) if affine is None else to_affine_nd(rank, affine)
        if size in (None, self.data_obj.shape) and np.array_equal(here, to_affine_nd(rank, original)):
            return  # resampling would make float32 of it
        self.data_obj, self.affine = self.resample_if_needed(self.data_obj, affine, original, size, **options)


class SimpleITKWriter(_ArrayWriter):
    """Write NRRD or MetaImage with SimpleITK, with the spacing, origin and direction of the affine.

    Args:
        output_dtype: type of the values.
        channels_last: whether the array has a last axis of channels.
        header: further fields of the header.
    """

    def __init__(
        self,
        output_dtype: DtypeLike = np.uint8,
        channels_last: bool = False,
        header: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(output_dtype, **kwargs)
        self.channels_last = channels_last
        self.header = dict(header or {})

    def write(self, filename: PathLike, verbose: bool = False, **kwargs: Any) -> None:
        """Write the file, compressed."""
        import SimpleITK as sitk  # noqa: N813

        super().write(filename, verbose=verbose)
        rank = self.data_obj.ndim - self.channels_last
        array = self.data_obj.astype(self.output_dtype, copy=False)
        axes = (*reversed(range(rank)), *range(rank, array.ndim))
        image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(axes)), isVector=self.channels_last)
        affine = np.eye(rank + 1) if self.affine is None else orientation_ras_lps(to_affine_nd(rank, self.affine))
        spacing = np.linalg.norm(affine[:rank, :rank], axis=0)
        image.SetSpacing(spacing.tolist())
        image.SetOrigin(affine[:rank, rank].tolist())
        image.SetDirection((affine[:rank, :rank] / spacing).ravel().tolist())
        for name, value in self.header.items():
            image.SetMetaData(name, value)
        sitk.WriteImage(image, str(filename), useCompression=True)


class TiffWriter(_ArrayWriter):
    """Write (W, H) as one page or (W, H, pages) as a stack, with tifffile.

    Channels, and stacks of known pixel size, are written as ImageJ hyperstacks, which name their axes and unit; other
    known pixel sizes as resolution in pixels per cm. What ImageJ's format has no room for (more than 4 GB, uint32) is
    written without it.

    Args:
        output_dtype: type of the values.
        channels_last: whether the array has a last axis of channels.
        pixel_nm: width, height and distance of slices in nm (0 where it is not known), or None.
        factor: what the values are multiplied by.
    """

    def __init__(
        self,
        output_dtype: DtypeLike = np.uint8,
        channels_last: bool = False,
        pixel_nm: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(output_dtype, **kwargs)
        self.channels_last = channels_last
        self.pixel_nm = pixel_nm

    def write(self, filename: PathLike, verbose: bool = False, **kwargs: Any) -> None:
        """Write the file, compressed."""
        super().write(filename, verbose=verbose)
        array, dtype = self.data_obj, np.dtype(self.output_dtype)
        pages, channels = array.ndim - self.channels_last > 2, self.channels_last
        array = array.transpose(*range(2, array.ndim), 1, 0)
        axes = "Z" * pages + "C" * channels + "YX"
        metadata: dict[str, Any] = {"axes": axes}
        imagej = (channels or (pages and self.pixel_nm is not None)) and array.size * dtype.itemsize < _SMALL
        options: dict[str, Any] = {"imagej": True} if imagej and dtype in _OF_IMAGEJ else {}
        if self.pixel_nm is not None:
            *sizes, distance = self.pixel_nm
            options["resolution"] = tuple(1 / size for size in sizes)
            if "imagej" in options:
                metadata |= {"unit": "nm", "spacing": distance} if distance else {"unit": "nm"}
            else:
                options["resolution"] = tuple(_NM_PER_CM / size for size in sizes)
                options["resolutionunit"] = "CENTIMETER"
        options |= {"photometric": "minisblack", "compression": "deflate", "metadata": metadata}
        # one page after the other: a stack may be a file that does not fit into memory
        each = map(self._converted, each_page(array))
        tifffile.imwrite(filename, each, shape=array.shape, dtype=dtype, buffersize=_BUFFER, **options)


class PngWriter(_ArrayWriter):
    """Write (W, H) or (W, H, 1 to 4 channels), of 8 or 16 bits, as PNG with imagecodecs.

    Args:
        output_dtype: type of the values, uint8 or uint16.
        pixel_nm: width and height of a pixel in nm, for the resolution in the file; None leaves it out.
        factor: what the values are multiplied by.
    """

    def __init__(
        self, output_dtype: DtypeLike = np.uint8, pixel_nm: Sequence[float] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(output_dtype, **kwargs)
        self.pixel_nm = pixel_nm

    def write(self, filename: PathLike, verbose: bool = False, **kwargs: Any) -> None:
        """Write the file."""
        super().write(filename, verbose=verbose)
        data = imagecodecs.png_encode(self._converted(self.data_obj.swapaxes(0, 1)))
        per_metre = [] if self.pixel_nm is None else [round(_NM_PER_M / size) for size in self.pixel_nm[:2]]
        if per_metre and max(per_metre) <= _PNG_LIMIT:
            body = b"pHYs" + struct.pack(">IIB", *per_metre, 1)
            after = 33  # the signature and the header
            data = data[:after] + struct.pack(">I", 9) + body + struct.pack(">I", zlib.crc32(body)) + data[after:]
        Path(filename).write_bytes(data)
