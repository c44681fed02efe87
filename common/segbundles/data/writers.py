"""Image writers that MONAI does not have: SimpleITK for NRRD and MetaImage, tifffile for TIFF stacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
import tifffile
import torch
from monai.config import DtypeLike, NdarrayOrTensor, PathLike
from monai.data import ImageWriter
from monai.data.utils import orientation_ras_lps, to_affine_nd
from monai.utils import convert_data_type

from segbundles.errors import fail

__all__ = ["SimpleITKWriter", "TiffWriter"]


class _ArrayWriter(ImageWriter):
    """Base of the two writers: one channel, resampled to the grid of its file as MONAI's ``NibabelWriter`` does."""

    def __init__(self, output_dtype: DtypeLike = np.uint8, **kwargs: Any) -> None:
        super().__init__(output_dtype=output_dtype, affine=None, **kwargs)

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
    """Write NRRD or MetaImage with SimpleITK, with the spacing, origin and direction of the affine."""

    def write(self, filename: PathLike, verbose: bool = False, **kwargs: Any) -> None:
        """Write the file, compressed."""
        super().write(filename, verbose=verbose)
        rank = self.data_obj.ndim
        array = self.data_obj.astype(self.output_dtype, copy=False)
        image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose()))
        affine = np.eye(rank + 1) if self.affine is None else orientation_ras_lps(to_affine_nd(rank, self.affine))
        spacing = np.linalg.norm(affine[:rank, :rank], axis=0)
        image.SetSpacing(spacing.tolist())
        image.SetOrigin(affine[:rank, rank].tolist())
        image.SetDirection((affine[:rank, :rank] / spacing).ravel().tolist())
        sitk.WriteImage(image, str(filename), useCompression=True)


class TiffWriter(_ArrayWriter):
    """Write (W, H) as one page or (W, H, pages) as a stack, with tifffile."""

    def write(self, filename: PathLike, verbose: bool = False, **kwargs: Any) -> None:
        """Write the file, compressed."""
        super().write(filename, verbose=verbose)
        array = self.data_obj.astype(self.output_dtype, copy=False)
        tifffile.imwrite(filename, array.transpose(), photometric="minisblack", compression="deflate")
