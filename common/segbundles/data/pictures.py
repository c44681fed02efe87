"""Reading of 2D images and of stacks of them: TIFF with tifffile; PNG, BMP and JPEG with PIL."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import tifffile
from monai.config import PathLike
from monai.utils import ensure_tuple
from PIL import BmpImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin
from tifffile import COMPRESSION, PHOTOMETRIC

from segbundles.data.base import PIL, TIFF, FileReader, file_suffix
from segbundles.data.volumes import COMPLEX
from segbundles.errors import InputError
from segbundles.meta import add_note, image_meta, set_pixel_sizes_nm

__all__ = ["Picture", "PictureReader", "is_slice", "page_count", "picture_shape", "read_picture"]

_ORIENTATION = 274
# what an orientation tag asks of rows and columns
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
# opened by the class of the format, because Image.open refuses large images, and takes a JPEG with several pictures for
# an animation
_FORMATS: dict[bytes, type[ImageFile.ImageFile]] = {
    b"\x89PNG": PngImagePlugin.PngImageFile,
    b"\xff\xd8": JpegImagePlugin.JpegImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
    b"II": TiffImagePlugin.TiffImageFile,
    b"MM": TiffImagePlugin.TiffImageFile,
}
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_CONVERTED = {"PA": "RGBA"} | dict.fromkeys(("CMYK", "YCbCr", "LAB", "HSV", "La", "RGBa"), "RGB")

# how many times smaller than its pixels a file can be
_SMALLER = 1100  # deflate reaches 1032, JPEG 1024
_SMALLER_IN_TIFF = {COMPRESSION.NONE: 4} | dict.fromkeys(
    (COMPRESSION.LZW, COMPRESSION.JPEG, COMPRESSION.ADOBE_DEFLATE, COMPRESSION.DEFLATE, COMPRESSION.PACKBITS), 1400
)
_SMALLER_AT_MOST = 2**16
_FAX = (COMPRESSION.CCITTRLE, COMPRESSION.CCITT_T4, COMPRESSION.CCITT_T6)  # a blank row is one bit

# formats of which tifffile knows the axes; for other files, each page is a slice
_WITH_AXES = (
    *("shaped", "lsm", "mmstack", "ome", "imagej", "ndtiff", "fluoview", "stk", "sis", "svs", "scn", "qpi", "ndpi"),
    *("bif", "avs", "philips", "scanimage"),
)
_OF_SLIDES = ("thumbnail", "label", "macro", "map")
_REDUCED_OR_MASK = 0b101
_UNNAMED = dict.fromkeys("IQ", "unnamed")

_NM = {
    **{"nm": 1.0, "nanometer": 1.0, "um": 1e3, "µm": 1e3, "μm": 1e3, "\\u00B5m": 1e3, "micron": 1e3, "microns": 1e3},
    **{"micrometer": 1e3, "mm": 1e6, "millimeter": 1e6, "Å": 0.1, "pm": 1e-3, "m": 1e9, "cm": 1e7, "inch": 25.4e6},
}
_OF_PRINT = ("cm", "inch")  # units that programs write without a person's knowledge
_FINEST_PRINT_NM = 5000.0  # 5080 dpi


class Picture(NamedTuple):
    """The pixels of a file, as viewers turn them.

    Args:
        pixels: (slices, H, W, channels); if there are palettes, the indices.
        palettes: RGBA of each index, (colours, 4), uint8, for each slice; or none.
        alpha: whether the last channel is alpha.
        notes: what a person should know about the reading.
        pixel_nm: width, height and distance of slices in nm, 0 for an unknown distance; None if unknown. Resolutions in
            pixels per inch, cm or m only count where a pixel is smaller than 5 um (above 5080 dpi), because programs
            write those of screens and printers, such as 72 or 300 dpi, without asking. Sizes in nm, um or mm, which
            ImageJ and OME headers contain, always count.
    """

    pixels: np.ndarray
    palettes: Sequence[np.ndarray] = ()
    alpha: bool = False
    notes: Sequence[str] = ()
    pixel_nm: tuple[float, float, float] | None = None

    def expanded(self) -> Picture:
        """Return the picture that its palettes show: grey if all colours are grey, with alpha if some are transparent.

        Colours that no pixel has do not count, unless all pixels have the same: a blank slice of a stack is then like
        the others.
        """
        if not self.palettes:
            return self
        pairs = list(zip(self.pixels[..., 0], self.palettes, strict=True))
        used = np.concatenate([palette[np.unique(plane)] for plane, palette in pairs])
        alpha = bool((used[:, 3] < 255).any())
        used = np.concatenate(self.palettes) if (used == used[0]).all() else used
        grey = bool((used[:, :3] == used[:, :1]).all())
        channels = [*([0] if grey else [0, 1, 2]), *([3] if alpha else [])]
        return self._replace(
            pixels=np.stack([palette[:, channels][plane] for plane, palette in pairs]), palettes=(), alpha=alpha
        )


class PictureReader(FileReader):
    """Read TIFF, PNG, BMP and JPEG as viewers show them: palettes expanded, turned by the orientation tag.

    One 2D image gives (W, H), and a TIFF with several pages (W, H, pages); channels are a last axis. The first
    axis is x. Grey with 0 as white is inverted, 2 to 7 bits are scaled to 8, and other colours, such as CMYK, become
    RGB. Of a JPEG with several pictures (MPO), the first is read. Thumbnails and transparency masks in a TIFF are left
    out.
    """

    suffixes = (*TIFF, *PIL)

    def decode(self, path: Path, page: int | None = None) -> tuple[np.ndarray, dict]:
        """Return array and metadata of one file.

        Args:
            path: the file.
            page: page of a TIFF to read, from 0; None reads all.

        Raises:
            ValueError: as for :func:`read_picture`.
        """
        picture = read_picture(path, page).expanded()
        array = picture.pixels.transpose(2, 1, 0, 3)
        array = array if array.shape[2] > 1 else array[:, :, 0]
        colour = array.shape[-1] > 1
        array = array if colour else array[..., 0]
        # 4 x 4 for 2D images too: they may be in one batch with volumes
        meta = image_meta(np.eye(4), array.shape[: array.ndim - colour], colour)
        add_note(meta, *picture.notes)
        set_pixel_sizes_nm(meta, picture.pixel_nm)
        return array, meta


def read_picture(path: PathLike, page: int | None = None) -> Picture:
    """Read a TIFF, PNG, BMP or JPEG.

    ImageJ, OME and other formats of microscopes name the axes of a TIFF. Its pages are then the entries of the only
    axis besides width, height and channels, such as slices or time, however the file stores them.

    Args:
        path: the file.
        page: page of a TIFF to read, from 0; None reads all.

    Raises:
        ValueError: when there is no such page; when there are two axes of slices or of channels, pages of different
            sizes, or an animation; when pages are missing; when the header claims more pixels than the file can
            contain; or when the pixels are of another kind. The message does not name the file. Any other exception
            means that the file is truncated or damaged.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(32)
    try:
        if file_suffix(path) in TIFF or start[:4] in _TIFF_STARTS:
            return _read_tiff(path, page)
        if page is not None:
            raise InputError(f"it has no page {page!r}: only a TIFF has pages.")
        return _read_other(path, start)
    except Exception as error:
        if "imagecodecs" in str(error):
            raise InputError("its compression needs `pip install imagecodecs`.") from None
        raise


def page_count(path: PathLike) -> int:
    """Return the number of pages of a TIFF, see :func:`read_picture`.

    Raises:
        ValueError: as for :func:`read_picture`.
    """
    with tifffile.TiffFile(path) as file:
        return len(_all_images(file, Path(path)))


def picture_shape(path: PathLike) -> tuple[int, int, int] | None:
    """Return pages, height and width of a picture as its file stores them, without decoding it; None if it has none."""
    path = Path(path)
    with suppress(Exception):  # the reader will say what is wrong
        if file_suffix(path) in TIFF:
            with tifffile.TiffFile(path) as file:
                images = _all_images(file, path)
                return len(images), *images[0].shape[:2]
        if file_suffix(path) in PIL:
            with path.open("rb") as file:
                start = file.read(32)
            with _open(path, start) as image:
                return 1, image.height, image.width
    return None


def is_slice(path: PathLike) -> bool:
    """Return whether a file contains one 2D image."""
    if file_suffix(path) not in TIFF:
        return file_suffix(path) in PIL
    with suppress(Exception):  # StackReader will refuse the file by name later
        return page_count(path) < 2
    return True


# ------------------------------------------------------------------------------------------------------ PNG, BMP, JPEG


class _Plane(NamedTuple):
    pixels: np.ndarray  # (H, W, channels)
    palette: np.ndarray | None = None
    alpha: bool = False


def _open(path: Path, start: bytes) -> ImageFile.ImageFile:
    kind = next((kind for magic, kind in _FORMATS.items() if start.startswith(magic)), None)
    return Image.open(path) if kind is None else kind(path)


def _read_other(path: Path, start: bytes) -> Picture:
    notes = []
    with _open(path, start) as image:
        if (frames := getattr(image, "n_frames", 1)) > 1:
            raise InputError(f"it is an animation of {frames} frames: give one image per file.")
        bits = _bits_per_pixel(image, start)
        if image.width * image.height * bits > 8 * _SMALLER * path.stat().st_size:
            _refuse_claim(f"{image.width} x {image.height} pixels", path.stat().st_size)
        if image.format == "PNG" and start[24] == 16 and start[25] in (2, 4, 6):
            import imagecodecs

            # PIL keeps 8 of 16 bits when there are several channels
            pixels, alpha = imagecodecs.png_decode(path.read_bytes()), start[25] != 2
            # a colour that is to be transparent is no channel, as in PIL
            plane = _Plane(pixels if alpha else pixels[..., :3], alpha=alpha)
            notes = ["PNG of 16 bits per channel"]
        else:
            plane = _from_pil(image)
        orientation = _orientation(image)
        dpi = image.info.get("dpi") or (0, 0)
    sizes = _pixel_nm([float(per_inch) for per_inch in dpi], "inch", orientation)
    pixels = _upright(plane.pixels, orientation)
    return Picture(pixels[None], () if plane.palette is None else (plane.palette,), plane.alpha, notes, sizes)


def _pixel_nm(
    per_unit: Sequence[float], unit: str, orientation: Any = 1, distance: float = 0.0
) -> tuple[float, float, float] | None:
    """Return width, height and distance of slices in nm, see :class:`Picture`.

    Args:
        per_unit: pixels per unit along a stored row and column.
        unit: name of the unit.
        orientation: value of the orientation tag.
        distance: distance of slices, in the unit.
    """
    scale = _NM.get(unit)
    if scale is None or not all(np.isfinite([*per_unit, distance])) or min(per_unit) <= 0:
        return None
    width, height = (scale / value for value in per_unit)
    if unit in _OF_PRINT and max(width, height) >= _FINEST_PRINT_NM:
        return None
    width, height = (height, width) if orientation in (5, 6, 7, 8) else (width, height)
    return width, height, abs(distance) * scale


def _bits_per_pixel(image: Image.Image, start: bytes) -> int:
    if image.format == "PNG":
        return start[24] * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[start[25]]
    if image.format == "BMP":
        at = 24 if start[14] == 12 else 28
        return int.from_bytes(start[at : at + 2], "little")
    return 8 * len(image.getbands())


def _refuse_claim(what: str, size: int) -> NoReturn:
    raise InputError(f"its header claims {what}, which its {size} bytes cannot contain.")


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # pixels can be read although other data are damaged
        return image.getexif().get(_ORIENTATION, 1)
    return 1


def _upright(pixels: np.ndarray, orientation: Any) -> np.ndarray:
    return _TURNS[orientation](pixels) if orientation in _TURNS else pixels


def _from_pil(image: Image.Image) -> _Plane:
    palette = None
    if image.mode == "P":
        colours = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        palette = np.tile(np.array([0, 0, 0, 255], np.uint8), (256, 1))
        palette[: len(colours), :3] = colours
        clear = image.info.get("transparency", b"")
        if isinstance(clear, int):
            palette[clear, 3] = 0
        else:
            palette[: len(clear), 3] = np.frombuffer(clear, np.uint8)
    elif image.mode in _CONVERTED:
        image = image.convert(_CONVERTED[image.mode])
    array = np.asarray(image)
    return _Plane(array.reshape(*array.shape[:2], -1), palette, image.mode in ("LA", "RGBA"))


# ---------------------------------------------------------------------------------------------------------------- TIFF

_Page = tifffile.TiffPage | tifffile.TiffFrame


class _Image(NamedTuple):
    shape: tuple[int, ...]  # (H, W), or (H, W, channels)
    read: Callable[[], _Plane]


class _Stack(NamedTuple):
    """Pages of one size; the axes before those of a page count the pages."""

    pages: Sequence[_Page]
    axes: str
    shape: tuple[int, ...]

    @property
    def key(self) -> tifffile.TiffPage:
        return self.pages[0].keyframe

    @property
    def least_bytes(self) -> float:
        """Bytes that this many pixels need at least."""
        smaller = _SMALLER_IN_TIFF.get(self.key.compression, _SMALLER_AT_MOST)
        smaller = self.key.imagewidth if self.key.compression in _FAX else smaller
        return prod(self.shape) * min(ensure_tuple(self.key.bitspersample)) / 8 / smaller


def _read_tiff(path: Path, page: int | None) -> Picture:
    with tifffile.TiffFile(path) as file:
        images = _all_images(file, path)
        if page is not None:
            if isinstance(page, bool) or not isinstance(page, int) or not 0 <= page < len(images):
                raise InputError(f"it has {len(images)} pages, so there is no page {page!r}: pages count from 0.")
            images = [images[page]]
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise InputError(f"it has pages of different sizes, {sorted(shapes)}: give each size its own file.")
        planes = [image.read() for image in images]
        sizes = None
        with suppress(Exception):  # pixels can be read although other data are damaged
            sizes = _tiff_pixel_nm(file)
    palettes = [plane.palette for plane in planes if plane.palette is not None]
    if palettes and len(palettes) < len(planes):
        raise InputError("only some of its pages have a palette: save all as grey or RGB.")
    return Picture(np.stack([plane.pixels for plane in planes]), palettes, planes[0].alpha, pixel_nm=sizes)


def _tiff_pixel_nm(file: tifffile.TiffFile) -> tuple[float, float, float] | None:
    tags = file.pages.first.tags
    orientation = tags.valueof(_ORIENTATION, 1)
    if file.is_ome:
        image = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]
        pixels = (image[0] if isinstance(image, list) else image)["Pixels"]

        def nm(axis: str) -> float:
            return float(pixels.get(f"PhysicalSize{axis}", 0)) * _NM.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"), 0)

        return _pixel_nm([1 / nm(axis) for axis in "XY"], "nm", orientation, nm("Z"))
    per_unit = [upper / lower for upper, lower in (tags.valueof(name) for name in ("XResolution", "YResolution"))]
    if file.is_imagej:
        header = file.imagej_metadata
        return _pixel_nm(per_unit, header.get("unit", ""), orientation, float(header.get("spacing", 0)))
    unit = {2: "inch", 3: "cm"}.get(tags.valueof("ResolutionUnit", 2), "")
    return _pixel_nm(per_unit, unit, orientation)


def _all_images(file: tifffile.TiffFile, path: Path) -> list[_Image]:
    if _next_page(file):
        raise InputError("it is truncated or damaged (pages are missing).")
    stacks = _stacks(file)
    files = {id(page.parent): page.parent.filehandle.size for stack in stacks for page in stack.pages}
    if sum(stack.least_bytes for stack in stacks) > sum(files.values()):
        shape = " x ".join(map(str, stacks[0].shape))
        _refuse_claim(f"{len(stacks)} images of {shape}" if len(stacks) > 1 else shape, sum(files.values()))
    return [image for stack in stacks for image in _cut(stack, path)]


def _next_page(file: tifffile.TiffFile) -> int:
    """Return the offset after the last page found; not 0 if the file is truncated, where tifffile skips lost pages."""
    tiff, handle = file.tiff, file.filehandle
    handle.seek(file.pages[-1].offset)
    (tags,) = struct.unpack(tiff.tagnoformat, handle.read(tiff.tagnosize))
    handle.seek(tags * tiff.tagsize, os.SEEK_CUR)
    (offset,) = struct.unpack(tiff.offsetformat, handle.read(tiff.offsetsize))
    return offset


def _images(items: Sequence[Any]) -> list[Any]:
    """Leave out thumbnails, pyramid levels and transparency masks."""
    return [item for item in items if not item.keyframe.subfiletype & _REDUCED_OR_MASK] or list(items)


def _stacks(file: tifffile.TiffFile) -> list[_Stack]:
    kind = next((kind for kind in _WITH_AXES if getattr(file, f"is_{kind}", False)), None)
    series = file.series if kind else []
    if not series or series[0].kind in ("generic", "uniform"):
        pages = _images([page.aspage() for page in file.pages])
        if kind == "imagej" or (kind == "ome" and len(pages) > 1):
            what = "ImageJ header promises images" if kind == "imagej" else "OME-XML describes pages"
            raise InputError(f"it is truncated, or its {what} that it does not contain: save the stack again.")
        return [_Stack([page], page.axes, page.shape) for page in pages]
    series = _images([one for one in series if not one.keyframe.is_subifd])
    if series[0].kind not in ("shaped", "ome"):
        series = [one for one in series if one.name.lower() not in _OF_SLIDES] or series
    if len(series) > 1 and series[0].kind != "shaped":
        shapes = ", ".join(" x ".join(map(str, one.shape)) for one in series)
        raise InputError(f"it contains {len(series)} separate images, {shapes}: give each its own file.")
    stacks = [_stack(one, file) for one in series]
    used = len(stacks[0].pages)
    if series[0].kind in ("ome", "imagej") and len(file.pages) > used and not series[0].is_multifile:
        found = len(_images([page.aspage() for page in file.pages]))
        if found > used:
            raise InputError(f"its header describes {used} pages but it has {found}: save the stack again.")
    return stacks


def _stack(series: tifffile.TiffPageSeries, file: tifffile.TiffFile) -> _Stack:
    axes, shape, key = series.get_axes(squeeze=True), series.get_shape(squeeze=True), series.keyframe
    count = prod(shape) // max(prod(key.shape), 1)
    offset = None if series.is_multifile else series.dataoffset
    if (promised := _uncounted(series, file)) > count:
        alone = offset is not None and len(file.pages) == 1
        there = (file.filehandle.size - offset) // key.nbytes if alone else len(file.pages)
        if promised % count or there < promised:
            raise InputError(f"its ImageJ header promises {promised} images but it contains {there}: save it again.")
        shape, axes, count = (promised // count, *shape), f"I{axes}", promised
        series, offset = (series, offset) if alone else (file.pages, None)
    if offset is not None and offset + count * key.nbytes > file.filehandle.size:
        raise InputError(f"it is truncated or damaged (its header describes {count} page(s)).")
    if offset is not None and count > 1:
        # one after the other, whether or not each has a directory of its own
        pages: list[Any] = [
            tifffile.TiffFrame(
                file, k, keyframe=key, dataoffsets=(offset + k * key.nbytes,), databytecounts=(key.nbytes,)
            )
            for k in range(count)
        ]
    else:
        pages = list(series)
    there = sum(page is not None for page in pages)
    if there != count or there != len(pages):
        raise InputError(f"its header describes {count} pages but it has {there}: files or pages are missing.")
    return _Stack(pages, axes, shape)


def _uncounted(series: tifffile.TiffPageSeries, file: tifffile.TiffFile) -> int:
    """Return the number of images in the header of an older ImageJ, which does not say how many slices they are."""
    header = (series.kind == "imagej" and file.imagej_metadata) or {}
    images = header.get("images")
    by_channel = str(header.get("order", "czt")).lower() in ("czt", "ctz", "default")
    known = {"slices", "frames"} & set(header) or series.keyframe.shaped[0] > 1 or not by_channel
    return images if type(images) is int and not known else 0


def _cut(stack: _Stack, path: Path) -> list[_Image]:
    pages, axes, shape = stack
    key = stack.key
    outer = len(shape) - len(key.shape)
    sliced, coloured = (
        [k for k, n in enumerate(shape) if n > 1 and axes[k] not in "YX" and (axes[k] in "CS") == colour]
        for colour in (False, True)
    )
    for what, found in (("slices", sliced), ("channels", coloured)):
        if len(found) > 1:
            names = " and ".join(f"{_UNNAMED.get(axes[k], axes[k])} ({shape[k]})" for k in found)
            raise InputError(f"it has {len(found)} axes of {what}, {names}: save it as several files with one each.")
    if prod(shape[outer:]) != prod(key.shape) or not {"Y", "X"} <= set(axes[outer:]):
        raise InputError(f"its axes {axes} are not pages of rows and columns: save the stack again.")
    by_pil = _goes_through_pil(key)
    if fault := _pixel_fault(key):
        raise InputError(fault)
    if by_pil and any(k < outer for k in coloured):
        raise InputError(f"its pixels are {_name(key)} in several channels: convert it to grey or RGB.")
    numbers = np.arange(prod(shape[:outer])).reshape(shape[:outer])
    axis = sliced[0] if sliced else -1
    channels = [shape[k] for k in coloured]
    size = (shape[axes.index("Y")], shape[axes.index("X")], *([3] if by_pil else channels))

    def image(k: int) -> _Image:
        chosen = numbers.take(k, axis) if 0 <= axis < outer else numbers
        within = k if axis >= outer else None

        def read() -> _Plane:
            parts = [pages[number] for number in chosen.ravel()]
            if by_pil:
                return _page_by_pil(path, parts[0].index)
            arrays = [_page_pixels(part).reshape(shape[outer:]) for part in parts]
            names = axes[outer:]
            if within is not None:
                arrays = [array.take(within, axis - outer) for array in arrays]
                names = names.replace(axes[axis], "")
            arrays = [np.moveaxis(array, (names.index("Y"), names.index("X")), (0, 1)) for array in arrays]
            array = np.concatenate([array.reshape(*array.shape[:2], -1) for array in arrays], axis=-1)
            tag = key.tags.get(_ORIENTATION)
            return _Plane(_upright(array, tag and tag.value), _colormap(key), _has_alpha(key))

        return _Image(size, read)

    return [image(k) for k in range(shape[axis] if sliced else 1)]


def _page_pixels(page: _Page) -> np.ndarray:
    """Return the pixels of a page, with 0 as black."""
    key = page.keyframe
    if not key.is_contiguous and key.jpegheader is None:
        end = page.parent.filehandle.size
        parts = list(zip(page.dataoffsets, page.databytecounts, strict=False))
        if len(parts) < prod(key.chunked) or not all(0 < at < at + size <= end for at, size in parts):
            raise InputError("it is truncated or damaged (pixels are missing).")
    handle = page.parent.filehandle
    with ExitStack() as opened:
        if handle.closed:  # another file of the same stack
            handle.open()
            opened.callback(handle.close)
        array = page.asarray()
    if _photometric(key) == PHOTOMETRIC.MINISWHITE:
        array = ~array if array.dtype == bool else array.dtype.type(2**key.bitspersample - 1) - array
    if array.dtype == np.uint8 and key.bitspersample in range(2, 8) and key.photometric != PHOTOMETRIC.PALETTE:
        array = np.rint(array * (255 / (2**key.bitspersample - 1))).astype(np.uint8)  # as in PNG
    return array.astype(np.uint8) if array.dtype == bool and key.photometric == PHOTOMETRIC.PALETTE else array


def _page_by_pil(path: Path, number: int) -> _Plane:
    # given a path, PIL garbles pixels that it has to turn
    with path.open("rb") as file, TiffImagePlugin.TiffImageFile(file) as image:
        image.seek(number)
        image.load()  # turns it
        return _from_pil(image)


def _photometric(page: tifffile.TiffPage) -> int:
    # tifffile treats a missing tag as grey with 0 as white
    return page.photometric if "PhotometricInterpretation" in page.tags else PHOTOMETRIC.MINISBLACK


def _name(page: tifffile.TiffPage) -> str:
    kind = _photometric(page)
    return str(getattr(kind, "name", kind))


def _goes_through_pil(page: tifffile.TiffPage) -> bool:
    kind = _photometric(page)
    jpeg = kind == PHOTOMETRIC.YCBCR and page.compression == COMPRESSION.JPEG  # tifffile converts it to RGB
    plain = (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB)
    return not (jpeg or kind in plain or _colormap(page) is not None)


def _pixel_fault(page: tifffile.TiffPage) -> str | None:
    if page.dtype is not None and page.dtype.kind == "c":
        return COMPLEX
    if _photometric(page) == PHOTOMETRIC.MINISWHITE and page.dtype is not None and page.dtype.kind not in "bu":
        return f"it is grey with 0 as white, of type {page.dtype}: convert it to 0 as black."
    of_pil = (PHOTOMETRIC.SEPARATED, PHOTOMETRIC.YCBCR, PHOTOMETRIC.CIELAB, PHOTOMETRIC.PALETTE)
    if _goes_through_pil(page) and _photometric(page) not in of_pil:
        return f"its pixels are {_name(page)}: convert it to grey or RGB."
    return None


def _has_alpha(page: tifffile.TiffPage) -> bool:
    if page.photometric == PHOTOMETRIC.RGB:
        return page.samplesperpixel == 4
    return page.samplesperpixel == 2 and any(kind > 0 for kind in page.extrasamples)


def _colormap(page: tifffile.TiffPage) -> np.ndarray | None:
    if page.photometric != PHOTOMETRIC.PALETTE or page.samplesperpixel > 1 or page.colormap is None:
        return None
    colours = page.colormap.T
    colours = colours >> 8 if colours.max() > 255 else colours  # some programs store 8 bits of 16
    return np.concatenate([colours, np.full((len(colours), 1), 255)], axis=1).astype(np.uint8)
