"""Writing segmentations in the format of their images."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path

import numpy as np
import torch
from monai.config import KeysCollection, PathLike
from monai.data import ImageWriter, NibabelWriter, PILWriter
from monai.transforms import MapTransform, SaveImaged

from segbundles.data import SimpleITKWriter, TiffWriter, file_stem, file_suffix, image_root
from segbundles.data.base import ITK, NIFTI, PIL, TIFF
from segbundles.errors import fail
from segbundles.files import atomic_path
from segbundles.meta import file_name, slice_files

__all__ = ["SaveSegmentationd"]


class SaveSegmentationd(SaveImaged):
    """Write class maps in the format and on the grid of their images.

    NIfTI, NRRD and MetaImage keep the input's format, size, spacing, origin and direction; the value is the class index
    (as a single file: .nhdr gives .nrrd, .mhd gives .mha). A TIFF with several pages gives a TIFF with as many pages.
    Any other 2D image, and each slice of a stack of 2D images, gives a PNG with ``k * (255 // (num_classes - 1))`` for
    class k. A DICOM series, which is a folder, an enhanced file, or the name of a series in a folder, gives NIfTI. The
    path is ``output_dir/<folder of the image in data_root_dir>/<stem>_<postfix>.<ext>``. A file only gets this name
    when it is complete.

    Args:
        keys: class maps, (1, spatial), on the grid of the file that they were read from.
        output_dir: folder to write to.
        data_root_dir: folder (or single image) whose sub-folders are mirrored.
        output_postfix: end of the stem.
        num_classes: number of classes, background included.
        label_image: whether the maps number objects instead of classes. They are then written unchanged as TIFF instead
            of PNG, uint16, or uint32 if there are more than 65,535 objects.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when the output cannot be written, or a class map is not on the grid of its image.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: PathLike = "./",
        data_root_dir: PathLike = "",
        output_postfix: str = "seg",
        num_classes: int = 2,
        label_image: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.output_dir = Path(output_dir)
        self.data_root_dir = image_root(data_root_dir)
        self.output_postfix = output_postfix
        self.num_classes = num_classes
        self.label_image = label_image

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Write every key and return the data with ``meta["saved_to"]`` set (for a stack, one line per slice)."""
        for key in self.key_iterator(dict(data)):
            self._save(data[key])
        return dict(data)

    def output_path(self, image: PathLike, pages: bool = False) -> Path:
        """Return the path for the segmentation of an image; ``pages`` says whether it has several pages."""
        source = Path(image).parent.resolve() / Path(image).name  # a link keeps its own name
        suffix = "" if source.is_dir() else file_suffix(source)
        if suffix in (*TIFF, *PIL):
            stem, suffix = file_stem(source), ".tif" if pages or self.label_image else ".png"
        elif suffix in (*NIFTI, *ITK):
            stem, suffix = file_stem(source), {".nhdr": ".nrrd", ".mhd": ".mha"}.get(suffix, suffix)
        else:  # a DICOM series, in whose name a dot does not begin a suffix
            stem, suffix = file_stem(source) if suffix == ".dcm" else source.name, ".nii.gz"
        folder = source.parent
        mirrored = folder.relative_to(self.data_root_dir) if folder.is_relative_to(self.data_root_dir) else Path()
        return self.output_dir / mirrored / f"{stem}_{self.output_postfix}{suffix}"

    def _save(self, pred: torch.Tensor) -> None:
        meta = getattr(pred, "meta", {})
        if "spatial_shape" not in meta:
            fail("the file of the segmented image is not known: use LoadImaged, and Invertd or copied metadata.")
        source, grid = file_name(pred), tuple(int(n) for n in meta["spatial_shape"])
        size = tuple(pred.shape[1:])
        if size != grid:
            fail(f"the segmentation of {source} has size {size} but the image {grid}: invert spatial transforms first.")
        array = np.asarray(pred.detach().cpu())[0]
        array = array.astype((np.uint16 if array.max() < 2**16 else np.uint32) if self.label_image else np.uint8)
        files = slice_files(pred)
        if files and (array.ndim != 3 or len(files) != array.shape[-1]):
            fail(
                f"the segmentation of {source} has size {size} but its stack has {len(files)} files, not one per slice."
            )
        if files:
            parts = [(self.output_path(file), array[..., k]) for k, file in enumerate(files)]
        else:
            pages = array.ndim == 3 and array.shape[-1] > 1
            path = self.output_path(source, pages)
            # a 2D image that was read as a volume of one slice
            flat = array.ndim == 3 and not pages and path.suffix in (".png", ".tif")
            parts = [(path, array[..., 0] if flat else array)]
        # PIL's reader gives no affine
        affine = np.asarray(torch.as_tensor(meta.get("original_affine", np.eye(4))).cpu(), dtype=np.float64)
        for path, values in parts:
            self._write(path, values, affine)
        meta["saved_to"] = "\n".join(str(path) for path, _ in parts)

    def _write(self, path: Path, array: np.ndarray, affine: np.ndarray) -> None:
        suffix = file_suffix(path)
        if suffix in (".png", ".tif") and not self.label_image:
            array = array * np.uint8(255 // (self.num_classes - 1))
        with atomic_path(path) as part:
            writer = self._writer(suffix, array.dtype)
            # set directly: the array is already on the file's grid, and set_data_array would drop axes of size 1
            writer.data_obj, writer.affine = array, affine
            writer.write(part)

    @staticmethod
    def _writer(suffix: str, dtype: np.dtype) -> ImageWriter:
        if suffix in NIFTI:
            return NibabelWriter(output_dtype=dtype)
        if suffix in ITK:
            return SimpleITKWriter(output_dtype=dtype)
        return TiffWriter(output_dtype=dtype) if suffix == ".tif" else PILWriter(output_dtype=dtype, scale=None)
