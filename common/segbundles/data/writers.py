"""Image writers that MONAI does not have: SimpleITK for NRRD and MetaImage, tifffile for TIFF stacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
import tifffile
from monai.config import DtypeLike, NdarrayOrTensor, PathLike
from monai.data import ImageWriter
from monai.data.utils import orientation_ras_lps, to_affine_nd
from monai.utils import MetaKeys, convert_data_type

from segbundles.errors import fail

__all__ = ["SimpleITKWriter", "TiffWriter"]


class _ArrayWriter(ImageWriter):
    """Base of the two writers: one channel, no resampling."""

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
        self.data_obj = array.astype(self.output_dtype)

    def set_metadata(self, meta_dict: Mapping | None, **options: Any) -> None:
        """Take the ``affine`` (RAS, mm) of the array."""
        affine = (meta_dict or {}).get(MetaKeys.AFFINE)
        if affine is not None:
            self.affine = convert_data_type(affine, np.ndarray, dtype=np.float64)[0]


class SimpleITKWriter(_ArrayWriter):
    """Write NRRD or MetaImage with SimpleITK, with the spacing, origin and direction of the affine."""

    def write(self, filename: PathLike, verbose: bool = False, **kwargs: Any) -> None:
        """Write the file, compressed."""
        super().write(filename, verbose=verbose)
        rank = self.data_obj.ndim
        image = sitk.GetImageFromArray(np.ascontiguousarray(self.data_obj.transpose()))
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
        tifffile.imwrite(filename, self.data_obj.transpose(), photometric="minisblack", compression="deflate")
