"""Writing segmentations and probabilities in the format and on the grid of their images."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import DtypeLike, KeysCollection, PathLike
from monai.data import ImageWriter, NibabelWriter
from monai.transforms import MapTransform, SaveImaged

from segbundles.data import PngWriter, SimpleITKWriter, TiffWriter, each_page, file_stem, file_suffix, image_root
from segbundles.data.base import ITK, NIFTI, PIL, TIFF
from segbundles.data.segments import slicer_header
from segbundles.errors import fail
from segbundles.files import atomic_path
from segbundles.meta import file_name, pixel_sizes_nm, slice_files
from segbundles.segments import segments_of

__all__ = ["SaveOutputd", "SaveProbabilitiesd", "SaveSegmentationd", "SaveUncertaintyd"]

SLICER = "seg.nrrd"
_PNG_CHANNELS = 4
_PNG_LEVELS = 2**16 - 1


class SaveOutputd(SaveImaged):
    """Base of the transforms that write the output of inference, one file for each image or for each slice of a stack.

    Python (:class:`segbundles.segmenter.Segmenter`) and MONAI Label leave all of them out.

    The path is ``output_dir/<folder of the image in data_root_dir>/<stem>_<postfix>.<ext>``. A file only gets this name
    when it is complete.

    Args:
        keys: outputs (channels, spatial), on the grid of the file that the image was read from.
        output_dir: folder to write to.
        data_root_dir: folder (or single image) whose sub-folders are mirrored.
        output_postfix: end of the stem.
        num_classes: number of classes, background included.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when the output cannot be written, or is not on the grid of its image.
    """

    channels_last = False  # whether the array that is written has an axis of channels

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: PathLike = "./",
        data_root_dir: PathLike = "",
        output_postfix: str = "seg",
        num_classes: int = 2,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.output_dir = Path(output_dir)
        self.data_root_dir = image_root(data_root_dir)
        self.output_postfix = output_postfix
        self.num_classes = num_classes

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Write every key and return the data with ``meta["saved_to"]`` set (for a stack, one line per slice)."""
        for key in self.key_iterator(dict(data)):
            self._save(data[key])
        return dict(data)

    def output_path(self, image: PathLike, pages: bool = False) -> Path:
        """Return the path for the output of an image; ``pages`` says whether it has several pages."""
        path, suffix = self._place(image)
        return path.with_name(path.name + self._suffix(suffix, pages))

    def is_written(self, image: PathLike) -> bool:
        """Return whether there is an output of an image."""
        return any(self.output_path(image, pages).is_file() for pages in (False, True))

    def _place(self, image: PathLike) -> tuple[Path, str]:
        """Return the path of the output without its suffix, and the suffix of the image, empty for a DICOM series."""
        source = Path(image).parent.resolve() / Path(image).name  # a link keeps its own name
        suffix = _format(source)
        # in the name of a DICOM series a dot does not begin a suffix
        named = suffix or (file_suffix(source) == ".dcm" and not source.is_dir())
        stem, folder = file_stem(source) if named else source.name, source.parent
        mirrored = folder.relative_to(self.data_root_dir) if folder.is_relative_to(self.data_root_dir) else Path()
        return self.output_dir / mirrored / f"{stem}_{self.output_postfix}", suffix

    def _suffix(self, suffix: str, pages: bool) -> str:
        """Return the suffix of the output for an image with a suffix; of a DICOM series it is empty."""
        return {"": ".nii.gz", ".nhdr": ".nrrd", ".mhd": ".mha"}.get(suffix, suffix)

    @staticmethod
    def _on_grid(output: torch.Tensor) -> np.ndarray:
        """Return an output as array, after a look whether it is on the grid of its file."""
        meta = getattr(output, "meta", {})
        if "spatial_shape" not in meta:
            fail("the file of the segmented image is not known: use LoadImaged, and Invertd or copied metadata.")
        source, size, grid = file_name(output), tuple(output.shape[1:]), tuple(int(n) for n in meta["spatial_shape"])
        if size != grid:
            fail(f"the segmentation of {source} has size {size} but the image {grid}: invert spatial transforms first.")
        return output.numpy(force=True)

    @staticmethod
    def _is_dicom(output: torch.Tensor) -> bool:
        return not slice_files(output) and not _format(Path(file_name(output)))

    def _values(self, output: np.ndarray) -> np.ndarray:
        """Return the values that are written, (channels, spatial)."""
        raise NotImplementedError

    def _stored(self, values: np.ndarray, path: Path) -> np.ndarray:
        """Return the array that a file holds: (spatial) or, with channels, (spatial, channels)."""
        raise NotImplementedError

    def _dtype(self, array: np.ndarray) -> DtypeLike:
        """Return the type that a file holds; writers convert to it, page by page if they can."""
        return array.dtype

    def _factor(self) -> int:
        """Return the factor of the values in a picture."""
        return 1

    def _header(self, array: np.ndarray, path: Path) -> dict[str, str]:
        """Return further fields of the header of a NRRD file."""
        return {}

    def _save(self, output: torch.Tensor) -> None:
        source, array = file_name(output), self._on_grid(output)
        values = self._values(array)
        size = values.shape[1:]
        files = slice_files(output)
        if files and (len(size) != 3 or len(files) != size[-1]):
            fail(
                f"the segmentation of {source} has size {size} but its stack has {len(files)} files, not one per slice."
            )
        if files:
            parts = [(self.output_path(file), values[..., k]) for k, file in enumerate(files)]
        else:
            pages = len(size) == 3 and size[-1] > 1
            path = self.output_path(source, pages)
            # a 2D image that was read as a volume of one slice
            flat = len(size) == 3 and not pages and path.suffix in (".png", ".tif")
            parts = [(path, values[..., 0] if flat else values)]
        # PIL's reader gives no affine
        original = output.meta.get("original_affine", np.eye(4))
        affine = np.asarray(torch.as_tensor(original).cpu(), dtype=np.float64)
        for path, part in parts:
            self._write(path, part, affine, pixel_sizes_nm(output))
        output.meta["saved_to"] = "\n".join(str(path) for path, _ in parts)

    def _write(self, path: Path, values: np.ndarray, affine: np.ndarray, pixel_nm: Sequence[float] | None) -> None:
        array = self._stored(values, path)
        with atomic_path(path) as part:
            writer = self._writer(path, array, pixel_nm)
            # set directly: the array is already on the file's grid, and set_data_array would drop axes of size 1
            writer.data_obj, writer.affine = array, affine
            writer.write(part)

    def _writer(self, path: Path, array: np.ndarray, pixel_nm: Sequence[float] | None) -> ImageWriter:
        suffix, dtype = file_suffix(path), self._dtype(array)
        if suffix in NIFTI:
            return NibabelWriter(output_dtype=dtype)
        if suffix in ITK:
            return SimpleITKWriter(dtype, self.channels_last, self._header(array, path))
        if suffix == ".tif":
            return TiffWriter(dtype, self.channels_last, pixel_nm, factor=self._factor())
        return PngWriter(dtype, pixel_nm, factor=self._factor())


class SaveSegmentationd(SaveOutputd):
    """Write class maps in the format and on the grid of their images.

    NIfTI, NRRD and MetaImage keep the input's format, size, spacing, origin and direction; the value is the class index
    (as a single file: .nhdr gives .nrrd, .mhd gives .mha). A TIFF with several pages gives a TIFF with as many pages.
    Any other 2D image, and each slice of a stack of 2D images, gives a PNG with ``k * (255 // (num_classes - 1))`` for
    class k. Both keep the pixel size that the image contains. A DICOM series, which is a folder, an enhanced file, or
    the name of a series in a folder, gives NIfTI. Paths are those of :class:`SaveOutputd`.

    Args:
        keys: class maps, (1, spatial), on the grid of the file that they were read from.
        output_dir: folder to write to.
        data_root_dir: folder (or single image) whose sub-folders are mirrored.
        output_postfix: end of the stem.
        num_classes: number of classes, background included.
        label_image: whether the maps number objects instead of classes. They are then written unchanged as TIFF instead
            of PNG, uint16, or uint32 if there are more than 65,535 objects.
        mask_format: ``"seg.nrrd"`` writes volumes, whatever their format, as segmentations of 3D Slicer with names,
            colours and codes, ``<stem>_<postfix>.seg.nrrd``. None keeps the input's format.
        classes: name of each class by its index, for ``mask_format``; see :func:`segbundles.segments.segments_of`.
        codes: codes of the classes, for ``mask_format``.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when the output cannot be written, a class map is not on the grid of its image, or ``mask_format``
            is unknown or comes without ``classes``.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: PathLike = "./",
        data_root_dir: PathLike = "",
        output_postfix: str = "seg",
        num_classes: int = 2,
        label_image: bool = False,
        mask_format: str | None = None,
        classes: Mapping[Any, str] | None = None,
        codes: Mapping[Any, Mapping[str, Sequence[str]]] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, output_dir, data_root_dir, output_postfix, num_classes, allow_missing_keys)
        if mask_format not in (None, SLICER):
            fail(f"mask_format must be {SLICER!r}, or None for the format of the image, got {mask_format!r}.")
        if mask_format and not classes:
            fail(f"mask_format {mask_format!r} needs classes, the name of each class by its index.")
        self.label_image = label_image
        self.mask_format = mask_format
        self.segments = segments_of(classes, codes) if classes else []

    def is_written(self, image: PathLike) -> bool:
        """Return whether there is an output of an image, in its own format or in that of 3D Slicer."""
        path, _ = self._place(image)
        return super().is_written(image) or path.with_name(f"{path.name}.{SLICER}").is_file()

    def _suffix(self, suffix: str, pages: bool) -> str:
        if suffix in (*TIFF, *PIL):
            return ".tif" if pages or self.label_image else ".png"
        return f".{self.mask_format}" if self.mask_format else super()._suffix(suffix, pages)

    def _values(self, output: np.ndarray) -> np.ndarray:
        if self.label_image:
            return output[:1]
        return output[:1].astype(np.uint8, copy=False)

    def _stored(self, values: np.ndarray, path: Path) -> np.ndarray:
        array = values[0]
        return array[..., None] if self.mask_format and array.ndim == 2 else array

    def _dtype(self, array: np.ndarray) -> DtypeLike:
        if not self.label_image:
            return array.dtype
        return np.uint16 if max(page.max() for page in each_page(array.T)) < 2**16 else np.uint32

    def _factor(self) -> int:
        return 1 if self.label_image else 255 // (self.num_classes - 1)

    def _header(self, array: np.ndarray, path: Path) -> dict[str, str]:
        return slicer_header(array, self.segments) if self.mask_format else {}


class SaveProbabilitiesd(SaveOutputd):
    """Write the probability of every class, on the grid of their images.

    NIfTI, NRRD and MetaImage give float32 files of the same format, with the classes as last axis or as components, and
    a DICOM series gives NIfTI. A TIFF gives a float32 TIFF that ImageJ opens with classes as channels. PNG, BMP and
    JPEG give a PNG of 16 bits with one channel per class, whose channels add up to 65,535; with more than 4 classes, a
    TIFF. Paths are those of :class:`SaveOutputd`.

    Args:
        keys: probabilities, (classes, spatial), see :class:`segbundles.transforms.ToProbabilitiesd`.
        output_dir: folder to write to.
        data_root_dir: folder (or single image) whose sub-folders are mirrored.
        output_postfix: end of the stem.
        num_classes: number of classes, background included.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when the output cannot be written, or is not on the grid of its image.
    """

    channels_last = True

    def __init__(
        self,
        keys: KeysCollection = "prob",
        output_dir: PathLike = "./",
        data_root_dir: PathLike = "",
        output_postfix: str = "prob",
        num_classes: int = 2,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, output_dir, data_root_dir, output_postfix, num_classes, allow_missing_keys)

    def _suffix(self, suffix: str, pages: bool) -> str:
        if suffix in PIL and self.num_classes <= _PNG_CHANNELS:
            return ".png"
        return ".tif" if suffix in (*TIFF, *PIL) else super()._suffix(suffix, pages)

    def _values(self, output: np.ndarray) -> np.ndarray:
        return output.astype(np.float32, copy=False)

    def _stored(self, values: np.ndarray, path: Path) -> np.ndarray:
        array = np.moveaxis(values, 0, -1)
        if path.suffix == ".png":
            return _in_16_bits(array)
        return array[:, :, None] if file_suffix(path) in NIFTI and array.ndim == 3 else array


class SaveUncertaintyd(SaveOutputd):
    """Write the uncertainty, 0 to 1, on the grid of their images.

    NIfTI, NRRD, MetaImage and TIFF give float32 files of the same format, and a DICOM series gives NIfTI. PNG, BMP and
    JPEG give a grey PNG of 16 bits, where 65,535 is 1. Paths are those of :class:`SaveOutputd`.

    Args:
        keys: uncertainty, (1, spatial), see :class:`segbundles.transforms.Uncertaintyd`.
        output_dir: folder to write to.
        data_root_dir: folder (or single image) whose sub-folders are mirrored.
        output_postfix: end of the stem.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when the output cannot be written, or is not on the grid of its image.
    """

    def __init__(
        self,
        keys: KeysCollection = "uncertainty",
        output_dir: PathLike = "./",
        data_root_dir: PathLike = "",
        output_postfix: str = "uncertainty",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, output_dir, data_root_dir, output_postfix, allow_missing_keys=allow_missing_keys)

    def _suffix(self, suffix: str, pages: bool) -> str:
        return ".png" if suffix in PIL else ".tif" if suffix in TIFF else super()._suffix(suffix, pages)

    def _values(self, output: np.ndarray) -> np.ndarray:
        return output[:1].astype(np.float32, copy=False)

    def _stored(self, values: np.ndarray, path: Path) -> np.ndarray:
        array = values[0]
        return np.rint(array * _PNG_LEVELS).astype(np.uint16) if path.suffix == ".png" else array


def _format(source: Path) -> str:
    """Return the suffix of an image, which is its format; empty for a DICOM series."""
    suffix = "" if source.is_dir() else file_suffix(source)
    return suffix if suffix in (*TIFF, *PIL, *NIFTI, *ITK) else ""


def _in_16_bits(probabilities: np.ndarray) -> np.ndarray:
    """Return probabilities (spatial, classes) as whole numbers that add up to 65,535, with the same largest class."""
    # one level less, so that at least one is left for the largest class
    levels = np.floor(probabilities.astype(np.float64) * (_PNG_LEVELS - 1)).astype(np.uint16)
    rest = _PNG_LEVELS - levels.sum(-1, dtype=np.int64)
    winner = probabilities.argmax(-1)[..., None]
    np.put_along_axis(levels, winner, np.take_along_axis(levels, winner, -1) + rest[..., None].astype(np.uint16), -1)
    return levels
