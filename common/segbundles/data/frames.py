"""Reading colour frames as 8-bit RGB, and masks as class indices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import PathLike
from monai.utils import ensure_tuple

from segbundles.data.base import PIL, TIFF, FileReader, file_suffix
from segbundles.data.pictures import Picture, read_picture
from segbundles.errors import InputError, fail
from segbundles.meta import add_note, image_meta, set_has_spacing

__all__ = ["VOID", "FrameReader", "MaskReader", "mask_classes", "read_frame", "read_mask"]

#: class index of pixels that training and scores ignore
VOID = 255
_SMALLEST_SIDE = 16  # pixels
_THRESHOLD = 127
_COLOURLESS = 32  # grey levels by which the channels of a JPEG mask may differ
_DEPTHS = (8, 10, 12, 14, 16)  # bits of cameras, stored in 16


def value_tolerance(value: Any) -> Any:
    """Return how much a stored value may differ from a whole number: a file that scales gives 0.99999 for 1."""
    return np.clip(1e-4 * np.abs(value), 1e-3, 0.1)


def read_frame(path: PathLike) -> tuple[np.ndarray, list[str]]:
    """Read a frame (TIFF, PNG, BMP, JPEG) as 8-bit RGB.

    Grey becomes three equal channels, an alpha channel is dropped, and 16 bits are scaled to 8, from the smallest of
    8, 10, 12, 14 and 16 bits that has room for the largest value. Palettes, CMYK, YCbCr and 1-bit images are converted.

    Args:
        path: the file.

    Returns:
        Pixels (H, W, 3), uint8, and notes on the conversions.

    Raises:
        ValueError: as for :func:`segbundles.data.pictures.read_picture`, and when the file is not a single 2D image of
            8 or 16 bits, grey or RGB, with sides of 16 pixels or more.
    """
    pixels, notes = _one_image(read_picture(path).expanded())
    if pixels.dtype == bool:
        pixels = pixels * np.uint8(255)
    elif pixels.dtype == np.uint16:
        pixels, bits = _in_8_bits(pixels)
        notes.append("16 bits: scaled to 8" if bits == 16 else f"{bits} bits stored in 16: scaled to 8")
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, 2)
        notes.append("grey: used for all 3 colours")
    return np.ascontiguousarray(pixels), notes


def read_mask(path: PathLike) -> np.ndarray:
    """Read the stored values of a mask, (H, W), uint8.

    Three equal channels become one, an alpha channel is dropped, and 16 bits are scaled to 8 if a value exceeds 255.
    Other types, such as float, must have whole numbers of up to 16 bits, see :func:`value_tolerance`. A picture of one
    bit gives 0 and 1, and 2 to 7 bits are scaled to 8. A grey palette gives its grey levels. A coloured palette that
    starts with black gives its indices, as in PASCAL VOC; with black and one other colour, black is 0 and the other
    255.

    Args:
        path: the file.

    Raises:
        ValueError: as for :func:`read_frame`, when the mask is in colour, and when a value is not a whole number.
    """
    pixels, _ = _one_image(_whole(_without_colours(read_picture(path))))
    if pixels.dtype == np.uint16:
        pixels, _ = _in_8_bits(pixels)
    pixels = pixels.astype(np.uint8)
    spread = int((pixels.max(2).astype(int) - pixels.min(2)).max())
    if spread > _COLOURLESS:
        raise InputError("it is in colour: a mask must be grey, with one channel.")
    return pixels[..., 0]


def _one_image(picture: Picture) -> tuple[np.ndarray, list[str]]:
    """Return the pixels without alpha, (H, W, 1 or 3), of 1, 8 or 16 bits, and notes."""
    pages, height, width, _ = picture.pixels.shape
    if pages > 1:
        raise InputError(f"it has {pages} pages: give one image per file.")
    pixels = picture.pixels[0]
    if pixels.dtype not in (bool, np.uint8, np.uint16):
        raise InputError(f"it has {pixels.dtype} values but must have 8 or 16 bits without sign: convert it.")
    if min(height, width) < _SMALLEST_SIDE:
        raise InputError(f"it has {width} x {height} pixels but each side must have at least {_SMALLEST_SIDE}.")
    pixels = pixels[..., :-1] if picture.alpha else pixels
    if pixels.shape[2] not in (1, 3):
        raise InputError(f"it has {pixels.shape[2]} channels but must have 1 (grey) or 3 (RGB), and may have alpha.")
    return pixels, ["alpha channel dropped"] if picture.alpha else []


def _whole(picture: Picture) -> Picture:
    """Return the values of a mask as integers without sign, if it has another type."""
    pixels = picture.pixels
    if pixels.dtype in (bool, np.uint8, np.uint16):
        return picture
    whole = np.rint(pixels)
    fine = (abs(pixels - whole) <= value_tolerance(whole)) & (whole >= 0) & (whole < 2**16)
    if not fine.all():
        odd = ", ".join(f"{value:.7g}" for value in np.unique(pixels[~fine])[:5])
        raise InputError(f"it contains the values {odd}, but a mask must have whole numbers from 0 to 255.")
    return picture._replace(pixels=whole.astype(np.uint16))


def _in_8_bits(pixels: np.ndarray) -> tuple[np.ndarray, int]:
    """Scale 16 bits to 8, and return the bits that the values need."""
    bits = next(bits for bits in _DEPTHS if int(pixels.max()) < 2**bits)
    return np.rint(pixels / ((2**bits - 1) / 255)).astype(np.uint8), bits


def _without_colours(picture: Picture) -> Picture:
    """Replace the indices of a mask with a palette by grey levels, or take them as classes."""
    if not picture.palettes or len(picture.pixels) > 1:
        return picture
    (palette,) = picture.palettes
    colours = palette[:, :3]
    if (colours == colours[:, :1]).all():
        return picture._replace(palettes=[np.c_[colours, np.full(len(colours), 255, np.uint8)]]).expanded()
    if not colours[0].any():
        return picture._replace(palettes=())
    used = np.unique(colours[np.unique(picture.pixels)], axis=0)
    if len(used) > 2 or used[0].any():
        raise InputError(
            "it has a coloured palette that does not start with black: save it as class indices, or as black and white."
        )
    return picture._replace(pixels=colours[picture.pixels[..., 0]].any(-1, keepdims=True) * np.uint8(255), palettes=())


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


class FrameReader(FileReader):
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

    def get_data(self, img: tuple[Sequence[Path], dict[str, Any]]) -> tuple[np.ndarray, dict]:
        """Return array and metadata of the file that ``read`` took.

        Raises:
            ValueError: as for :func:`read_frame`, with the name of the file; and when there are several files.
        """
        paths = ensure_tuple(img[0])
        if len(paths) > 1:
            fail(f"{paths[0]} is one of {len(paths)} files of one image: a frame and a mask are one file each.")
        return super().get_data(img)

    def decode(self, path: Path) -> tuple[np.ndarray, dict]:
        """Return array and metadata of one file."""
        if file_suffix(path) not in self.suffixes():
            raise InputError(f"its name must end in one of {', '.join(self.suffixes())}.")
        array, notes = self._pixels(path)
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
