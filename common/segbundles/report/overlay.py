"""Pictures of a case with outlines of truth and prediction."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
from monai.utils import convert_to_numpy
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion, uniform_filter
from skimage.measure import find_contours

from segbundles.errors import fail
from segbundles.segments import PREDICTION_COLOURS

__all__ = ["PREDICTION_COLOURS", "TRUTH_COLOURS", "case_figure", "choose_slices", "overlay_rgb"]

# with PREDICTION_COLOURS a pair of colours per class, cool for truth and warm for prediction: Okabe and Ito's
# colour-blind-safe palette, then two more
TRUTH_COLOURS = ((86, 180, 233), (0, 158, 115), (240, 228, 66), (51, 102, 255), (255, 255, 255))

_SMALLEST_SIDE = 384  # pixels; overlay_rgb enlarges the longer side to at least this
_LINE_WIDTH = 2.5  # pixels of the picture
_SUPERSAMPLING = 3
_RIM = (0, 0, 0, 150)
_DASH_PERIOD = 12.0  # pixels of a dash and its gap
_DASH_SHARE = 0.6
_WINDOW_PERCENTILES = (1.0, 99.0)

_PANEL = 376  # pixels, width of one panel of a case figure
_TALLEST_PANEL = 1.25  # height over width
_PAPER, _INK, _EMPTY = (255, 255, 255), (32, 32, 32), (0, 0, 0)
_FONT_SIZE = 19
_WHOLE_SLICE_SHARE = 0.6  # a crop larger than this share of the slice is not worth cropping
_CROP_MARGIN = 0.25  # of the object's longer side
_SMALLEST_MARGIN = 8  # pixels
_DENSE_OUTLINES = 0.04  # share of the pixels of a 2D image
_THUMBNAIL_SHARE = 0.28  # of the panel's width
_FIGURE_BYTES = 68_000  # 200 of them, base64-encoded, make 18 MB
_QUALITIES = (85, 75, 65, 55, 45, 35)


def overlay_rgb(
    image: Any,
    truth: Any | None = None,
    prediction: Any | None = None,
    *,
    size: tuple[int, int] | None = None,
    window: tuple[float, float] | None = None,
) -> NDArray[np.uint8]:
    """Outline truth (solid, cool colours) and prediction (dashed, warm colours) on one 2D slice.

    Outlines follow the pixel edges and have a dark rim, so that they are visible on any background. Class ``k`` has the
    ``k``-th of ``TRUTH_COLOURS`` and of ``PREDICTION_COLOURS``, which repeat; class 0 is background.

    Args:
        image: slice of shape (H, W) or (H, W, 3), any type. uint8 colours are shown unchanged, other values between
            the 1st and 99th percentile.
        truth: integer class map of shape (H, W), or None.
        prediction: integer class map of shape (H, W), or None.
        size: height and width of the picture in pixels. Defaults to the image's, enlarged by the smallest whole
            factor that makes the longer side 384 pixels or more.
        window: grey values shown as black and white, instead of the percentiles.

    Returns:
        The picture, uint8 of shape (height, width, 3).

    Raises:
        ValueError: when the image is not (H, W) or (H, W, 3), or a class map has another shape or contains fractions.
    """
    pixels = convert_to_numpy(image)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] != 3) or pixels.size == 0:
        fail(f"image must have shape (H, W) or (H, W, 3), got {pixels.shape}: pass one slice.")
    shape = pixels.shape[:2]
    maps = {"truth": _class_map(truth, shape, "truth"), "prediction": _class_map(prediction, shape, "prediction")}
    if size is None:
        factor = max(1, -(-_SMALLEST_SIDE // max(shape)))
        size = (shape[0] * factor, shape[1] * factor)
    if window is None and not (pixels.ndim == 3 and pixels.dtype == np.uint8):
        window = _grey_window(pixels)

    height, width = size
    picture = Image.fromarray(_to_uint8(pixels, window)).convert("RGB")
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    lines = Image.new("RGBA", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    draw = ImageDraw.Draw(lines)
    for name, colours in (("truth", TRUTH_COLOURS), ("prediction", PREDICTION_COLOURS)):
        if (class_map := maps[name]) is not None:
            _draw_outlines(draw, class_map, size, colours, dashed=name == "prediction")
    picture.paste(lines := lines.resize((width, height), Image.Resampling.BOX), mask=lines.getchannel("A"))
    return np.asarray(picture)


def choose_slices(truth: Any | None, prediction: Any | None, max_slices: int = 4) -> list[tuple[int, str]]:
    """Choose the most informative slices of a volume.

    In this order, until there are ``max_slices``:

    1. the slice with the most wrong pixels;
    2. the slice with the largest area of truth (of prediction, if there is no truth), unless it is next to the first;
    3. the first and the last slice of truth and prediction together;
    4. further slices with many wrong pixels, at least a sixth of the object away from the others.

    A slice that is chosen twice is returned once, with both reasons.

    Args:
        truth: class map of shape (W, H, D), or None. Slices lie along the last axis.
        prediction: class map of the same shape, or None.
        max_slices: maximum number of slices.

    Returns:
        Index (from 0) and reason of each slice, in the order of the slices.

    Raises:
        ValueError: when ``max_slices`` is below 1, or both maps are None.
    """
    if max_slices < 1:
        fail(f"max_slices must be at least 1, got {max_slices}.")
    given = {"truth": truth, "prediction": prediction}
    names = [name for name, x in given.items() if x is not None]
    maps = [convert_to_numpy(given[name]) for name in names]
    if not maps:
        fail("truth and prediction are both None: there is nothing to choose slices by.")
    areas = [np.count_nonzero(x, axis=(0, 1)) for x in maps]
    occupied = np.flatnonzero(sum(areas))
    if occupied.size == 0:
        return [(maps[0].shape[-1] // 2, "middle slice, nothing to outline")]
    errors = np.count_nonzero(maps[0] != maps[-1], axis=(0, 1))
    first, last = int(occupied[0]), int(occupied[-1])
    gap = max(1, (last - first + 1) // 6)

    shown = 0 if areas[0].any() else -1
    area = f"largest {names[shown]} area"
    largest, worst = int(np.argmax(areas[shown])), int(np.argmax(errors))
    if worst == largest and errors.any():
        chosen = {worst: f"{area}, most errors"}
    elif abs(worst - largest) < gap and errors.any():
        chosen = {worst: f"most errors, near the {area}"}
    else:
        chosen = {worst: "most errors"} if errors.any() else {}
        if len(chosen) < max_slices:
            chosen[largest] = area
    for index, end in ((first, "first"), (last, "last")):
        if index in chosen:
            chosen[index] += f", {end} slice"
        elif len(chosen) < max_slices:
            there = [name for name, x in zip(names, areas, strict=True) if x[index]]
            chosen[index] = f"{end} slice of the object ({', '.join(there)})"
    elsewhere = errors.copy()
    while len(chosen) < max_slices:
        for index in chosen:
            elsewhere[max(0, index - gap + 1) : index + gap] = 0
        if not elsewhere.any():
            break
        chosen[int(np.argmax(elsewhere))] = "many errors"
    return sorted(chosen.items())


def case_figure(
    image: Any,
    truth: Any | None,
    prediction: Any | None,
    spacing_mm: Sequence[float] | None = None,
    slice_axis: int = -1,
    max_slices: int = 4,
    *,
    affine: Any | None = None,
) -> bytes:
    """Draw a case for the report: its most informative slices with captions and outlines of truth and prediction.

    A volume gives up to ``max_slices`` panels (see :func:`choose_slices`; slices count from 1), all cropped to the same
    box around the object. If the object is small, the first panel has a thumbnail of the whole slice. A 2D image gives
    two panels: the whole image, and the enlarged object (if it fills the image: the window with the most errors, or the
    image without outlines).

    Args:
        image: volume of shape (W, H, D) or (3, W, H, D), or 2D image of shape (W, H) or (3, W, H), in MONAI's axis
            order. For display it is transposed, so that the second axis points down.
        truth: integer class map of the spatial shape, or None.
        prediction: integer class map of the spatial shape, or None.
        spacing_mm: pixel spacing along each spatial axis in mm, for the aspect ratio. Defaults to the affine's, or 1.
        slice_axis: spatial axis along which a volume is cut into slices.
        max_slices: maximum number of slices.
        affine: RAS affine of a volume, such as ``MetaTensor.affine``. If given, slices are shown in radiological
            convention (anterior or superior up, the patient's right on the left).

    Returns:
        A JPEG picture of at most 68 kB.

    Raises:
        ValueError: when the shapes do not match, or a class map contains fractions.
    """
    maps = {"truth": truth, "prediction": prediction}
    given = {name: x for name, x in maps.items() if x is not None}
    pixels, labels, spacing, rank = _displayed(image, given, spacing_mm, slice_axis, affine)
    if rank == 2:
        panels = _image_panels(pixels[:, :, 0], {name: x[:, :, 0] for name, x in labels.items()}, spacing)
    else:
        panels = _volume_panels(pixels, labels, spacing, max_slices)
    return _encode(_compose(panels))


def _displayed(
    image: Any, maps: Mapping[str, Any], spacing_mm: Sequence[float] | None, slice_axis: int, affine: Any | None
) -> tuple[NDArray, dict[str, NDArray], tuple[float, float], int]:
    """Check a case and turn it to how it is shown, see :func:`case_figure`.

    Returns:
        Image (rows, columns, slices) or (rows, columns, slices, 3), class maps (rows, columns, slices), spacing along
        rows and columns, and the number of spatial axes; a 2D image has one slice.
    """
    pixels = _array(image)
    labels = {name: _array(x) for name, x in maps.items()}
    spatial = next(iter(labels.values())).shape if labels else pixels.shape[pixels.shape[0] == 3 :]
    rank = len(spatial)
    if rank not in (2, 3) or pixels.shape not in (spatial, (3, *spatial)) or 0 in spatial:
        fail(
            f"image must have shape (W, H), (3, W, H), (W, H, D) or (3, W, H, D) and the class maps its spatial shape, "
            f"got image {pixels.shape}" + "".join(f", {name} {x.shape}" for name, x in labels.items()) + "."
        )
    labels = {name: _class_map(x, spatial, name) for name, x in labels.items()}
    if spacing_mm is None:
        spacing_mm = (1.0,) * rank if affine is None else np.linalg.norm(_affine(affine)[:3, :3], axis=0)
    spacing = [float(s) for s in spacing_mm]
    if len(spacing) < rank or min(spacing) <= 0:
        fail(f"spacing_mm must be {rank} positive numbers, one per axis, got {list(spacing_mm)}.")
    if pixels.ndim > rank:
        pixels = np.moveaxis(pixels, 0, -1)
    if rank == 2:
        flat = {name: x.T[:, :, None] for name, x in labels.items()}
        return np.swapaxes(pixels, 0, 1)[:, :, None], flat, (spacing[1], spacing[0]), rank
    if not -3 <= slice_axis <= 2:
        fail(f"slice_axis must be from -3 to 2, got {slice_axis}.")
    row, column, flips = _display_axes(slice_axis % 3, affine)

    def turn(x: NDArray) -> NDArray:
        return np.flip(np.moveaxis(x, (row, column, slice_axis % 3), (0, 1, 2)), flips)

    turned = {name: turn(x) for name, x in labels.items()}
    return turn(pixels), turned, (spacing[row], spacing[column]), rank


def _array(values: Any) -> NDArray:
    # MONAI's function copies an array whose axes are not in order
    return values if isinstance(values, np.ndarray) else convert_to_numpy(values)


def _class_map(label: Any | None, shape: tuple[int, ...], name: str) -> NDArray | None:
    if label is None:
        return None
    array = _array(label)
    if array.shape != shape:
        fail(f"{name} has shape {array.shape} but the image has {shape}: they must be equal.")
    if array.dtype.kind == "f" and not np.array_equal(array, np.rint(array)):
        fail(f"{name} must contain whole class numbers, got fractions: threshold or argmax it first.")
    return array


def _affine(affine: Any) -> NDArray:
    array = convert_to_numpy(affine)
    if array.shape != (4, 4):
        fail(f"affine must have shape (4, 4), got {array.shape}.")
    return array


def _display_axes(slice_axis: int, affine: Any | None) -> tuple[int, int, list[int]]:
    """Return the array axes that run down and across a slice, and which of the two (0, 1) to flip."""
    column, row = (axis for axis in range(3) if axis != slice_axis)
    if affine is None:
        return row, column, []
    orientation = nib.io_orientation(_affine(affine))
    if orientation[column, 0] > orientation[row, 0]:
        row, column = column, row
    # every axis points towards left, posterior or inferior
    return row, column, [k for k, axis in enumerate((row, column)) if orientation[axis, 1] > 0]


def _grey_window(pixels: NDArray) -> tuple[float, float]:
    finite = pixels[np.isfinite(pixels)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = (float(x) for x in np.percentile(finite, _WINDOW_PERCENTILES))
    # a few bright pixels on a constant background: both percentiles are equal
    return (low, high) if high > low else (float(finite.min()), float(finite.max()))


def _to_uint8(pixels: NDArray, window: tuple[float, float] | None) -> NDArray[np.uint8]:
    if window is None:
        return np.ascontiguousarray(pixels)
    low, high = window
    scaled = (pixels.astype(np.float32) - low) * np.float32(255 / max(high - low, 1e-12))
    np.fmax(scaled, 0, out=scaled)  # NaN becomes black
    np.fmin(scaled, 255, out=scaled)
    return np.rint(scaled, out=scaled).astype(np.uint8)


def _draw_outlines(
    draw: ImageDraw.ImageDraw,
    class_map: NDArray,
    size: tuple[int, int],
    colours: Sequence[tuple[int, int, int]],
    dashed: bool,
) -> None:
    scale = np.array(size) / class_map.shape
    strokes = []
    for value in np.unique(class_map[class_map > 0]):
        colour = colours[(int(value) - 1) % len(colours)]
        for contour in find_contours(np.pad(class_map == value, 1).astype(np.float32), 0.5):
            # padded pixel centres to edges of the picture's pixels, kept inside by half a line
            path = np.clip((contour - 0.5) * scale, _LINE_WIDTH / 2, np.array(size) - _LINE_WIDTH / 2)
            strokes += [(colour, piece) for piece in (_dashes(path) if dashed else [path])]
    for rim in (True, False):
        for colour, path in strokes:
            points = [(x, y) for y, x in path * _SUPERSAMPLING - 0.5]  # PIL counts from pixel centres
            width = round((_LINE_WIDTH + 1.5 * rim) * _SUPERSAMPLING)
            draw.line(points, fill=_RIM if rim else (*colour, 255), width=width, joint="curve")


def _dashes(path: NDArray) -> list[NDArray]:
    """Cut a closed path of shape (N, 2) into a whole number of dashes, at least four."""
    along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
    count = max(4, round(along[-1] / _DASH_PERIOD))
    period = along[-1] / count
    steps = np.linspace(0, _DASH_SHARE * period, max(2, round(_DASH_SHARE * period / 1.5)))
    positions = np.arange(count)[:, None] * period + steps
    return list(np.stack([np.interp(positions, along, path[:, k]) for k in (0, 1)], axis=-1))


# a caption of two lines, and a picture
_Panel = tuple[str, str, NDArray[np.uint8]]


def _volume_panels(
    pixels: NDArray, labels: dict[str, NDArray], spacing: tuple[float, float], max_slices: int
) -> list[_Panel]:
    depth = pixels.shape[2]
    if labels:
        chosen = choose_slices(labels.get("truth"), labels.get("prediction"), max_slices)
    else:
        chosen = [(depth // 2, "middle slice")]
    indices = [index for index, _ in chosen]
    objects = [labels[name][:, :, indices].any(axis=2) for name in labels]
    box = _crop_box(np.logical_or.reduce(objects) if objects else np.zeros(pixels.shape[:2], bool), spacing)
    crop = box or (slice(0, pixels.shape[0]), slice(0, pixels.shape[1]))
    window = _shared_window(pixels[crop][:, :, indices])

    panels = []
    for index, reason in chosen:
        cut = {name: x[:, :, index] for name, x in labels.items()}
        picture = _picture(pixels[:, :, index], cut, crop, spacing, window)
        if box and not panels:
            picture = _add_thumbnail(picture, pixels[:, :, index], cut, box, spacing, window)
        panels.append((f"slice {index + 1} of {depth}", reason, picture))
    if len(panels) == 1:
        name, _, _ = panels[0]
        panels.append((name, "without outlines", _picture(pixels[:, :, indices[0]], {}, crop, spacing, window)))
    return panels


def _image_panels(pixels: NDArray, labels: dict[str, NDArray], spacing: tuple[float, float]) -> list[_Panel]:
    height, width = pixels.shape[:2]
    whole = (slice(0, height), slice(0, width))
    window = _shared_window(pixels)
    objects = np.logical_or.reduce([x > 0 for x in labels.values()]) if labels else np.zeros((height, width), bool)
    # outlines as dense as those of cell membranes would hide an image of this size
    dense = np.count_nonzero(objects ^ binary_erosion(objects)) > _DENSE_OUTLINES * objects.size
    box, reason = _crop_box(objects, spacing), "the object, enlarged"
    if box is None and len(labels) == 2 and (labels["truth"] != labels["prediction"]).any():
        box, reason = _worst_window(labels["truth"] != labels["prediction"]), "most errors, enlarged"

    first = _picture(pixels, {} if dense else labels, whole, spacing, window)
    if box is None:
        return [
            ("whole image", "with outlines" if objects.any() else "nothing to outline", first),
            ("whole image", "without outlines", _picture(pixels, {}, whole, spacing, window)),
        ]
    first = _add_frame(first, box, (height, width))
    return [
        ("whole image", "frame: enlarged on the right", first),
        (f"columns {_span(box[1])}, rows {_span(box[0])}", reason, _picture(pixels, labels, box, spacing, window)),
    ]


def _span(part: slice) -> str:
    return f"{part.start + 1}-{part.stop}"


def _shared_window(pixels: NDArray) -> tuple[float, float] | None:
    return None if pixels.shape[-1] == 3 and pixels.dtype == np.uint8 else _grey_window(pixels)


def _crop_box(objects: NDArray[np.bool_], spacing: tuple[float, float]) -> tuple[slice, slice] | None:
    """Return a box around the objects, as square as possible, or None if it would contain most of the slice."""
    if not objects.any():
        return None
    spans = [np.flatnonzero(objects.any(axis=1 - axis))[[0, -1]] for axis in (0, 1)]
    longest_mm = max((last - first + 1) * mm for (first, last), mm in zip(spans, spacing, strict=True))
    side_mm = longest_mm + 2 * max(_CROP_MARGIN * longest_mm, _SMALLEST_MARGIN * max(spacing))
    parts = []
    for (first, last), mm, length in zip(spans, spacing, objects.shape, strict=True):
        side = min(length, round(side_mm / mm))
        start = int(np.clip((first + last + 1 - side) // 2, 0, length - side))
        parts.append(slice(start, start + side))
    share = np.prod([part.stop - part.start for part in parts]) / objects.size
    return None if share > _WHOLE_SLICE_SHARE else (parts[0], parts[1])


def _worst_window(errors: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Return the window with the most errors; its sides are a third of the image's."""
    sides = [max(1, length // 3) for length in errors.shape]
    density = uniform_filter(errors.astype(np.float32), sides, mode="constant")
    centre = np.unravel_index(np.argmax(density), errors.shape)
    starts = [int(np.clip(c - s // 2, 0, length - s)) for c, s, length in zip(centre, sides, errors.shape, strict=True)]
    return slice(starts[0], starts[0] + sides[0]), slice(starts[1], starts[1] + sides[1])


def _picture(
    pixels: NDArray,
    labels: dict[str, NDArray],
    crop: tuple[slice, slice],
    spacing: tuple[float, float],
    window: tuple[float, float] | None,
    width: int = _PANEL,
) -> NDArray[np.uint8]:
    """Draw a crop of one slice at the size of a panel."""
    part = pixels[crop]
    height_mm, width_mm = part.shape[0] * spacing[0], part.shape[1] * spacing[1]
    scale = min(width / width_mm, width * _TALLEST_PANEL / height_mm)
    size = (max(1, round(height_mm * scale)), max(1, round(width_mm * scale)))
    cut = {name: x[crop] for name, x in labels.items()}
    return overlay_rgb(part, cut.get("truth"), cut.get("prediction"), size=size, window=window)


def _add_frame(picture: NDArray[np.uint8], box: tuple[slice, slice], shape: tuple[int, int]) -> NDArray[np.uint8]:
    framed = Image.fromarray(picture)
    y, x = picture.shape[0] / shape[0], picture.shape[1] / shape[1]
    corners = [box[1].start * x, box[0].start * y, box[1].stop * x - 1, box[0].stop * y - 1]
    draw = ImageDraw.Draw(framed)
    draw.rectangle(corners, outline=_EMPTY, width=3)
    draw.rectangle([corners[0] + 1, corners[1] + 1, corners[2] - 1, corners[3] - 1], outline=_PAPER, width=1)
    return np.asarray(framed)


def _add_thumbnail(
    picture: NDArray[np.uint8],
    pixels: NDArray,
    labels: dict[str, NDArray],
    box: tuple[slice, slice],
    spacing: tuple[float, float],
    window: tuple[float, float] | None,
) -> NDArray[np.uint8]:
    """Put the whole slice into the corner of the crop where it covers the least of the objects."""
    whole = (slice(0, pixels.shape[0]), slice(0, pixels.shape[1]))
    thumbnail = _picture(pixels, {}, whole, spacing, window, width=round(_THUMBNAIL_SHARE * _PANEL))
    thumbnail = np.pad(_add_frame(thumbnail, box, pixels.shape[:2]), ((2, 2), (2, 2), (0, 0)), constant_values=255)
    height, width = (min(a, b) for a, b in zip(thumbnail.shape[:2], picture.shape[:2], strict=True))
    objects = np.logical_or.reduce([x[box] > 0 for x in labels.values()])
    share = (height / picture.shape[0], width / picture.shape[1])
    rows, columns = (max(1, round(s * n)) for s, n in zip(share, objects.shape, strict=True))
    corners = {
        (0, 1): objects[:rows, -columns:],
        (0, 0): objects[:rows, :columns],
        (1, 1): objects[-rows:, -columns:],
        (1, 0): objects[-rows:, :columns],
    }
    down, right = min(corners, key=lambda corner: corners[corner].sum())
    top, left = down * (picture.shape[0] - height), right * (picture.shape[1] - width)
    result = picture.copy()
    result[top : top + height, left : left + width] = thumbnail[:height, :width]
    return result


def _compose(panels: Sequence[_Panel], panel: int = _PANEL) -> Image.Image:
    gap, line = 8, round(_FONT_SIZE * 1.25)
    caption = 2 * line + 6
    tallest = max(picture.shape[0] for *_, picture in panels)
    rows = -(-len(panels) // 2)
    page = Image.new("RGB", (2 * panel + gap, rows * (caption + tallest) + (rows - 1) * gap), _PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(_FONT_SIZE)
    for k, (name, reason, picture) in enumerate(panels):
        left, top = (k % 2) * (panel + gap), (k // 2) * (caption + tallest + gap)
        draw.text((left + 2, top), name, fill=_INK, font=font)
        draw.text((left + 2, top + line), reason, fill=_INK, font=font)
        draw.rectangle([left, top + caption, left + panel - 1, top + caption + tallest - 1], fill=_EMPTY)
        height, width = picture.shape[:2]
        page.paste(Image.fromarray(picture), (left + (panel - width) // 2, top + caption + (tallest - height) // 2))
    return page


def _encode(page: Image.Image, most: int = _FIGURE_BYTES) -> bytes:
    while True:
        for quality in _QUALITIES:
            buffer = io.BytesIO()
            # JPEG, because a browser puts it into a PDF unchanged (WebP becomes seven times larger); not optimized,
            # because Pillow fails to optimize noise
            page.save(buffer, "JPEG", quality=quality, subsampling=0)
            if buffer.tell() <= most:
                return buffer.getvalue()
        page = page.resize((page.width * 3 // 4, page.height * 3 // 4), Image.Resampling.LANCZOS)
