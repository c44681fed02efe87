"""Reading colour frames as 8-bit RGB, and masks as class indices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import PathLike
from monai.data import ImageReader
from monai.utils import ensure_tuple
from PIL import Image

from segbundles.data.readers import PIL, TIFF, TiffReader, file_suffix, shows_stored_values
from segbundles.errors import InputError, fail
from segbundles.meta import add_note, image_meta, set_has_spacing

__all__ = ["VOID", "FrameReader", "MaskReader", "mask_classes", "read_frame", "read_mask"]

#: class index of pixels that training and scores ignore
VOID = 255
_SMALLEST_SIDE = 16  # pixels
_THRESHOLD = 127
_COLOURLESS = 32  # grey levels by which the channels of a JPEG mask may differ


def read_frame(path: PathLike) -> tuple[np.ndarray, list[str]]:
    """Read a frame (TIFF, PNG, BMP, JPEG) as 8-bit RGB.

    Grey becomes three equal channels (a TIFF with 0 as white is inverted), an alpha channel is dropped, 16 bits are
    scaled to 8, and palettes, CMYK, YCbCr and 1-bit images are converted.

    Args:
        path: the file.

    Returns:
        Pixels (H, W, 3), uint8, and notes on the conversions.

    Raises:
        ValueError: when the file cannot be decoded, is not a single 2D image of 8 or 16 bits, or has a side shorter
            than 16 pixels.
    """
    array = _open(path, indices=False)
    notes = []
    if array.dtype == np.uint16:
        array = np.rint(array / 257).astype(np.uint8)
        notes.append("16 bits: scaled to 8")
    channels = array.shape[2]
    if channels in (2, 4):
        array = array[..., :-1]
        notes.append("alpha channel dropped")
    if channels in (1, 2):
        array = np.repeat(array, 3, 2)
        notes.append("grey: used for all 3 colours")
    return np.ascontiguousarray(array), notes


def read_mask(path: PathLike) -> np.ndarray:
    """Read the stored values of a mask, (H, W), uint8; for a palette, the indices.

    Three equal channels become one, an alpha channel is dropped, and 16 bits are scaled to 8 if a value exceeds 255.

    Args:
        path: the file.

    Raises:
        ValueError: as for :func:`read_frame`, and when the mask is in colour.
    """
    array = _open(path, indices=True)
    if array.dtype == np.uint16:
        array = (array if array.max() <= 255 else np.rint(array / 257)).astype(np.uint8)
    if array.shape[2] in (2, 4):
        array = array[..., :-1]
    spread = int((array.max(2).astype(int) - array.min(2)).max())
    if spread > _COLOURLESS:
        raise InputError("is in colour: a mask must be grey, with one channel")
    return array[..., 0]


def mask_classes(values: np.ndarray, num_classes: int = 2, void_class: int | None = None) -> np.ndarray:
    """Convert the stored values of a mask to class indices.

    The values may be class indices (0 to ``num_classes`` - 1, and ``void_class``), or grey levels. With two classes,
    any grey level above 127 is class 1, so that the blurred levels of a JPEG are accepted too. With more classes, class
    k must be exactly k * (255 // (num_classes - 1)), as the bundle writes it. With two classes, the values 0, 1 and 255
    (or 0, 1, 2 and 255) alone are ambiguous; they are accepted only as class indices, with a ``void_class`` of 255.

    Args:
        values: stored values, uint8.
        num_classes: number of classes, background included.
        void_class: class index of the pixels to ignore, inside or outside the range of the classes, or None.

    Returns:
        Class indices, uint8; :data:`VOID` for the pixels to ignore.

    Raises:
        ValueError: when there are other values.
    """
    found = np.unique(values)
    indices = set(range(num_classes)) | ({void_class} if void_class is not None else set())
    step = 255 // (num_classes - 1)
    grey = num_classes == 2 and (void_class or 0) <= _THRESHOLD
    if set(found.tolist()) <= indices:
        classes = values.copy()
    elif grey and {1, 255} <= set(found.tolist()) <= {0, 1, 2, 255}:
        *firsts, last = map(str, found)
        raise InputError(
            f"contains {', '.join(firsts)} and {last}: set void_class to 255 if 255 should be ignored; otherwise "
            "correct the file to class indices, or to 0 and 255 only"
        )
    elif grey and found[-1] > _THRESHOLD:
        classes = (values > _THRESHOLD).astype(np.uint8)
    elif num_classes > 2 and set(found.tolist()) <= {k * step for k in range(num_classes)}:
        classes = values // np.uint8(step)
    else:
        odd = [str(v) for v in found if v not in indices]
        more = " ..." if len(odd) > 5 else ""
        others = f", or multiples of {step}" if num_classes > 2 else ""
        others = f", or grey levels with some above {_THRESHOLD}" if grey else others
        raise InputError(
            f"contains the values {', '.join(odd[:5])}{more}; allowed are the class indices "
            f"{', '.join(map(str, sorted(indices)))}{others}: correct the file, or set num_classes and void_class"
        )
    if void_class is not None:
        classes[classes == void_class] = VOID
    return classes


def _open(path: PathLike, indices: bool) -> np.ndarray:
    """Return the pixels (H, W, channels), of 8 or 16 bits."""
    suffix = file_suffix(path)
    if suffix not in FrameReader.suffixes():
        raise InputError(f"cannot be read: its name must end in one of {', '.join(FrameReader.suffixes())}")
    if not Path(path).is_file():
        raise InputError("cannot be read: there is no such file")
    try:
        if suffix in TIFF and shows_stored_values(path):
            array, colour = TiffReader().read(path)
            pages = 1 if array.ndim - colour == 2 else len(array)
        else:
            with Image.open(path) as image:
                pages = getattr(image, "n_frames", 1)
                array = np.asarray(_plain(image, indices))
            colour = array.ndim == 3
    except Exception as error:  # PIL raises anything from SyntaxError to OSError on a broken file
        if "imagecodecs" in str(error):
            raise InputError("cannot be read: its compression needs `pip install imagecodecs`") from None
        raise InputError(f"cannot be read: it is truncated or damaged ({error})") from None
    if pages > 1:
        raise InputError(f"has {pages} pages: give one image per file")
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(1 if indices else 255)
    if array.dtype not in (np.uint8, np.uint16):
        raise InputError(f"has {array.dtype} values but must have 8 or 16 bits without sign: convert it")
    height, width = array.shape[:2]
    if min(height, width) < _SMALLEST_SIDE:
        raise InputError(f"has {width} x {height} pixels but each side must have at least {_SMALLEST_SIDE}")
    array = array if colour else array[..., None]
    if array.shape[2] > 4:
        raise InputError(f"has {array.shape[2]} channels but must have 1 to 4 (grey or RGB, with or without alpha)")
    return array


def _plain(image: Image.Image, indices: bool) -> Image.Image:
    """Return an image whose values are grey levels or RGB (for a palette: the indices, if wanted)."""
    if image.mode == "P":
        transparent = "transparency" in image.info
        return image if indices else image.convert("RGBA" if transparent else "RGB")
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "PA", "La", "RGBa"):
        return image.convert("RGB")
    return image


class FrameReader(ImageReader):
    """Read a frame of any format, depth and number of channels as RGB, (W, H, 3), uint8, see :func:`read_frame`.

    The metadata says that the spacing is not known, and has notes if the file was not 8-bit RGB, see
    :mod:`segbundles.meta`.
    """

    @staticmethod
    def suffixes() -> tuple[str, ...]:
        """Return every readable suffix."""
        return (*TIFF, *PIL)

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Return whether every file has a readable suffix."""
        return all(file_suffix(name) in self.suffixes() for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> Path:
        """Take one file; ``get_data`` reads it, because ``LoadImage`` hides the errors of ``read``."""
        return Path(ensure_tuple(data)[0])

    def get_data(self, img: Path) -> tuple[np.ndarray, dict]:
        """Return array and metadata of the file that ``read`` took.

        Raises:
            ValueError: as for :func:`read_frame`, with the name of the file.
        """
        try:
            array, notes = self._pixels(img)
        except InputError as error:
            fail(f"{img} {error}.")
        array = np.swapaxes(array, 0, 1)
        meta = image_meta(np.eye(4), array.shape[:2], array.ndim == 3)
        set_has_spacing(meta, False)
        add_note(meta, *notes)
        return array, meta

    def _pixels(self, path: Path) -> tuple[np.ndarray, list[str]]:
        return read_frame(path)


class MaskReader(FrameReader):
    """Read the stored values of a mask, (W, H), uint8, see :func:`read_mask`."""

    def _pixels(self, path: Path) -> tuple[np.ndarray, list[str]]:
        return read_mask(path), []
