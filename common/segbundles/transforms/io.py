"""Writing segmentations beside where the images came from, in the images' own format."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, PathLike
from monai.data import ImageWriter, NibabelWriter, PILWriter
from monai.transforms import MapTransform, SaveImaged

from segbundles.data import SimpleITKWriter, TiffWriter, file_stem, file_suffix, image_root
from segbundles.data.readers import ITK, NIFTI
from segbundles.errors import fail
from segbundles.files import atomic_path

__all__ = ["SaveSegmentationd", "slice_files"]


def slice_files(meta: Mapping[Hashable, Any]) -> list[str]:
    """Files of the slices of a stack, in the order of its last axis; none for an image of one file.

    Args:
        meta: metadata of one image, as :class:`segbundles.data.StackReader` gives it.
    """
    return [file for file in str(meta.get("slices") or "").split("\n") if file]


class SaveSegmentationd(SaveImaged):
    """Write class maps in the format and on the grid of the image they came from.

    NIfTI, NRRD and MetaImage keep the input's format, size, spacing, origin and direction, with the class index as
    value (in one file: .nhdr gives .nrrd, .mhd gives .mha). A TIFF of several pages gives one of as many pages; any
    other 2D image gives PNG with ``k * (255 // (num_classes - 1))`` for class k, and so does each slice of a stack of
    2D images (``meta["slices"]``). A DICOM series, which is a folder, gives NIfTI. The path is
    ``output_dir/<folder of the image in data_root_dir>/<stem>_<postfix>.<ext>``. A file appears under its name only
    when it is complete.

    Args:
        keys: class maps, (1, spatial), on the grid of the file that ``meta["filename_or_obj"]`` names.
        output_dir: folder to write to.
        data_root_dir: folder (or single image) whose sub-folders are mirrored.
        output_postfix: end of the stem.
        num_classes: number of classes, background included.
        label_image: whether the maps number objects instead of classes. They are then written as they are, uint16, or
            uint32 where there are more than 65,535, and TIFF takes the place of PNG.
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
        """See the class."""
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.output_dir = Path(output_dir)
        self.data_root_dir = image_root(data_root_dir)
        self.output_postfix = output_postfix
        self.num_classes = num_classes
        self.label_image = label_image

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Write every key and return the data as it is, with ``meta["saved_to"]`` set (of a stack, a line a slice)."""
        for key in self.key_iterator(dict(data)):
            self._save(data[key])
        return dict(data)

    def output_path(self, image: PathLike, pages: bool = False) -> Path:
        """Where the segmentation of an image goes; ``pages`` for a stack of 2D images."""
        source = Path(image).parent.resolve() / Path(image).name  # a link keeps its own name
        series = source.is_dir()
        suffix = ".nii.gz" if series else file_suffix(source)
        suffix = {".nhdr": ".nrrd", ".mhd": ".mha"}.get(suffix, suffix)
        if suffix not in (*NIFTI, *ITK):
            suffix = ".tif" if pages or self.label_image else ".png"
        folder = source.parent
        mirrored = folder.relative_to(self.data_root_dir) if folder.is_relative_to(self.data_root_dir) else Path()
        stem = source.name if series else file_stem(source)
        return self.output_dir / mirrored / f"{stem}_{self.output_postfix}{suffix}"

    def _save(self, pred: torch.Tensor) -> None:
        meta = getattr(pred, "meta", {})
        if "filename_or_obj" not in meta:
            fail("the segmentation does not tell its image's file: use LoadImaged, and Invertd or copied metadata.")
        source, grid = meta["filename_or_obj"], tuple(int(n) for n in meta["spatial_shape"])
        size = tuple(pred.shape[1:])
        if size != grid:
            fail(f"the segmentation of {source} has size {size}, the image {grid}: invert spatial transforms first.")
        array = np.asarray(pred.detach().cpu())[0]
        array = array.astype((np.uint16 if array.max() < 2**16 else np.uint32) if self.label_image else np.uint8)
        files = slice_files(meta)
        if files and (array.ndim != 3 or len(files) != array.shape[-1]):
            fail(f"the segmentation of {source} has size {size}, its stack {len(files)} files: one a slice is due.")
        if files:
            parts = [(self.output_path(file), array[..., k]) for k, file in enumerate(files)]
        else:
            pages = array.ndim == 3 and array.shape[-1] > 1
            path = self.output_path(source, pages)
            flat = (
                array.ndim == 3 and not pages and path.suffix in (".png", ".tif")
            )  # a 2D image read as a volume of one slice
            parts = [(path, array[..., 0] if flat else array)]
        # PIL's reader gives none
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
            # set directly: the array is on the file's grid already, and set_data_array would drop axes of size 1
            writer.data_obj, writer.affine = array, affine
            writer.write(part)

    @staticmethod
    def _writer(suffix: str, dtype: np.dtype) -> ImageWriter:
        if suffix in NIFTI:
            return NibabelWriter(output_dtype=dtype)
        if suffix in ITK:
            return SimpleITKWriter(output_dtype=dtype)
        return TiffWriter(output_dtype=dtype) if suffix == ".tif" else PILWriter(output_dtype=dtype, scale=None)
