from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from monai.transforms import LoadImage
from PIL import Image

from segbundles.data import VOID, FrameReader, MaskReader, mask_classes, read_frame, read_mask

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
GREY = RGB[..., 0]
ALPHA = np.full((20, 30, 1), 9, np.uint8)


@pytest.mark.parametrize(
    ("name", "array", "expected", "notes"),
    [
        ("a.png", RGB, RGB, []),
        ("a.bmp", RGB, RGB, []),
        ("a.tif", RGB, RGB, []),
        ("a.png", np.concatenate([RGB, ALPHA], -1), RGB, ["alpha channel dropped"]),
        ("a.tif", np.concatenate([RGB, ALPHA], -1), RGB, ["alpha channel dropped"]),
        ("a.png", GREY, np.stack([GREY] * 3, -1), ["grey: used for all 3 colours"]),
        ("a.tif", RGB.astype(np.uint16) * 257, RGB, ["16 bits: scaled to 8"]),
        ("a.png", GREY > 99, np.stack([(GREY > 99) * np.uint8(255)] * 3, -1), ["grey: used for all 3 colours"]),
        (
            "a.png",
            np.concatenate([GREY[..., None], ALPHA], -1),
            np.stack([GREY] * 3, -1),
            ["alpha channel dropped", "grey: used for all 3 colours"],
        ),
    ],
)
def test_every_frame_is_read_as_rgb(name: str, array, expected, notes: list[str], tmp_path: Path) -> None:
    if name.endswith("tif"):
        tifffile.imwrite(tmp_path / name, array, photometric="rgb")
    else:
        Image.fromarray(array).save(tmp_path / name)
    pixels, found = read_frame(tmp_path / name)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected)
    assert found == notes


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(("most", "bits"), [(255, 8), (1000, 10), (4095, 12), (4096, 14), (60000, 16)])
def test_bits_of_a_camera_stored_in_16_are_scaled_to_8(suffix: str, most: int, bits: int, tmp_path: Path) -> None:
    wide = np.random.default_rng(1).integers(0, most, (20, 30), np.uint16, endpoint=True)
    wide[3, 4] = most
    path = tmp_path / f"a{suffix}"
    Image.fromarray(wide).save(path)
    pixels, notes = read_frame(path)
    np.testing.assert_array_equal(pixels[..., 1], np.rint(wide * 255.0 / (2**bits - 1)))
    stored = "16 bits" if bits == 16 else f"{bits} bits stored in 16"
    assert notes == [f"{stored}: scaled to 8", "grey: used for all 3 colours"]


@pytest.mark.parametrize(("mode", "suffix"), [("P", "png"), ("P", "tif"), ("CMYK", "jpg"), ("CMYK", "tif")])
def test_palette_and_cmyk_are_converted(mode: str, suffix: str, tmp_path: Path) -> None:
    flat = np.zeros((20, 30, 3), np.uint8)
    flat[:, 10:] = (200, 40, 90)
    path = tmp_path / f"a.{suffix}"
    image = Image.fromarray(flat)
    (image.quantize(2) if mode == "P" else image.convert(mode)).save(path)
    pixels, notes = read_frame(path)
    assert np.abs(pixels.astype(int) - flat)[:, 12:28].max() <= 8
    assert notes == []


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_whose_zero_is_white(dtype, tmp_path: Path) -> None:
    wide = GREY.astype(dtype) * (257 if dtype == np.uint16 else 1)
    tifffile.imwrite(tmp_path / "a.tif", np.iinfo(dtype).max - wide, photometric="miniswhite")
    np.testing.assert_array_equal(read_frame(tmp_path / "a.tif")[0], np.stack([GREY] * 3, -1))
    np.testing.assert_array_equal(read_mask(tmp_path / "a.tif"), GREY)


def test_tiff_of_palettes_must_have_one_page_too(tmp_path: Path) -> None:
    page = Image.fromarray(RGB).quantize(4)
    page.save(tmp_path / "a.tif", save_all=True, append_images=[page, page])
    with pytest.raises(ValueError, match=r"^it has 3 pages: give one image per file"):
        read_frame(tmp_path / "a.tif")


def test_reader_gives_first_axis_x_and_notes(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "a b é.png")
    image = LoadImage(reader="segbundles.data.FrameReader", dtype=np.uint8)(tmp_path / "a b é.png")
    assert image.shape == (30, 20, 3)
    np.testing.assert_array_equal(image.numpy()[..., 1].T, GREY)
    assert image.meta["notes"] == "grey: used for all 3 colours"
    assert image.meta["has_spacing"] is False
    assert tuple(image.meta["spatial_shape"]) == (30, 20)
    Image.fromarray(RGB).save(tmp_path / "c.png")
    assert "notes" not in LoadImage(reader="segbundles.data.FrameReader")(tmp_path / "c.png").meta


@pytest.mark.parametrize("reader", [FrameReader, MaskReader])
@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("a.png", RGB[:, :1], r"a.png: it has 1 x 20 pixels but each side must have at least 16\."),
        ("a.png", b"", "a.png: it is truncated or damaged"),
        ("a.jpg", b"\xff\xd8\xff\xe0 nothing", "a.jpg: it is truncated or damaged"),
        ("a.tif", b"II*\0", "a.tif: it is truncated or damaged"),
        ("a.nii.gz", b"x", r"cannot read .*: its name must end in one of \.tif, \.tiff, \.png"),
        ("a.tif", np.zeros((3, 20, 30), np.uint8), "a.tif: it has 3 pages: give one image per file"),
        ("a.png", None, "a.png: there is no such file"),
    ],
)
def test_what_is_no_frame_is_refused_by_name(reader, name: str, array, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif name.endswith("tif"):
        tifffile.imwrite(path, array, photometric="minisblack")
    elif array is not None:
        Image.fromarray(array).save(path)
    with pytest.raises(ValueError, match=message):
        reader().get_data(reader().read(path))


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (GREY, GREY),
        (np.stack([GREY] * 3, -1), GREY),
        (np.concatenate([GREY[..., None], ALPHA], -1), GREY),
        (GREY > 99, (GREY > 99).astype(np.uint8)),
    ],
)
def test_masks_are_read_as_stored(array, expected, tmp_path: Path) -> None:
    Image.fromarray(array).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), expected)


def test_mask_of_16_bits_and_of_a_palette(tmp_path: Path) -> None:
    for name, values in (("wide", [0, 65535]), ("indices", [0, 2])):
        stored = np.array(values, np.uint16)[(GREY > 99).astype(int)]
        Image.fromarray(stored).save(tmp_path / f"{name}.png")
    assert set(np.unique(read_mask(tmp_path / "wide.png"))) == {0, 255}
    assert set(np.unique(read_mask(tmp_path / "indices.png"))) == {0, 2}
    palette = Image.fromarray((GREY > 99).astype(np.uint8), mode="P")
    palette.putpalette([0, 0, 0, 0, 255, 0])
    for name in ("p.png", "p.tif"):
        palette.save(tmp_path / name)
        np.testing.assert_array_equal(read_mask(tmp_path / name), GREY > 99)


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0, 0.99999], np.float32, [0, 1]),
        ([-0.0005, 254.99745], np.float64, [0, 255]),
        ([0, 255], np.int16, [0, 255]),
        ([0, 65535], np.float32, [0, 255]),
        ([0, 0.998], np.float32, r"it contains the values 0\.998, but a mask must have whole numbers from 0 to 255"),
        ([-1, 1], np.int16, "it contains the values -1, but"),
        ([0, np.nan], np.float32, "it contains the values nan, but"),
    ],
)
def test_mask_of_other_types_must_have_whole_numbers(values, dtype, expected, tmp_path: Path) -> None:
    lit = (GREY > 99).astype(int)
    tifffile.imwrite(tmp_path / "m.tif", np.array(values, dtype)[lit])
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=rf"m\.tif: {expected}"):
            MaskReader().get_data(([tmp_path / "m.tif"], {}))
        return
    np.testing.assert_array_equal(read_mask(tmp_path / "m.tif"), np.array(expected)[lit])


def test_float_frame_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", GREY.astype(np.float32))
    with pytest.raises(ValueError, match=r"a\.tif: it has float32 values but must have 8 or 16 bits"):
        FrameReader().get_data(([tmp_path / "a.tif"], {}))


def test_a_mask_in_colour_is_refused(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match=r"^it is in colour: a mask must be grey, with one channel"):
        read_mask(tmp_path / "m.png")


VOC = [(0, 0, 0), (128, 0, 0), (0, 128, 0), *[(224, 224, 192)] * 253]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
@pytest.mark.parametrize(
    ("colours", "stored", "values"),
    [
        (VOC, [0, 1, 2, 255], [0, 1, 2, 255]),  # of PASCAL VOC: the indices are classes
        ([(0, 0, 0), (255, 0, 0)], [0, 1], [0, 1]),
        ([(255, 0, 0), (0, 0, 0)], [0, 1], [255, 0]),
        ([(255, 0, 0), (0, 0, 0), (0, 9, 0)], [1, 2], [0, 255]),
        ([(255, 255, 255), (0, 0, 0)], [0, 1], [255, 0]),
        ([(0, 0, 0), (127, 127, 127), (254, 254, 254)], [0, 1, 2], [0, 127, 254]),
    ],
)
def test_masks_with_a_palette(suffix: str, colours, stored, values, tmp_path: Path) -> None:
    choice = np.random.default_rng(2).integers(0, len(stored), (20, 30))
    mask = Image.fromarray(np.array(stored, np.uint8)[choice], mode="P")
    mask.putpalette(np.array(colours, np.uint8).ravel().tolist())
    mask.save(tmp_path / f"m{suffix}")
    np.testing.assert_array_equal(read_mask(tmp_path / f"m{suffix}"), np.array(values)[choice])


@pytest.mark.parametrize("colours", [[(9, 0, 0), (0, 0, 0), (0, 9, 0)], [(9, 0, 0), (0, 9, 0), (0, 0, 9)]])
def test_other_coloured_palettes_are_refused(colours, tmp_path: Path) -> None:
    mask = Image.fromarray(GREY % 3, mode="P")
    mask.putpalette(np.array(colours, np.uint8).ravel().tolist())
    mask.save(tmp_path / "m.png")
    with pytest.raises(ValueError, match=r"m\.png: it has a coloured palette that does not start with black: save it"):
        MaskReader().get_data(([tmp_path / "m.png"], {}))


@pytest.mark.parametrize("reader", [FrameReader, MaskReader])
def test_a_frame_or_mask_is_one_file(reader, tmp_path: Path) -> None:
    Image.fromarray(GREY).save(path := tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is one of 2 files of one image: a frame and a mask are one file"):
        reader().get_data(reader().read([path, path]))


@pytest.mark.parametrize(
    ("values", "classes", "void", "expected"),
    [
        ([0, 1], 2, None, [0, 1]),
        ([0, 0], 2, None, [0, 0]),
        ([0, 255], 2, None, [0, 1]),
        ([0, 3, 127, 128, 250], 2, None, [0, 0, 0, 1, 1]),
        ([0, 1, 2], 2, 2, [0, 1, VOID]),
        ([0, 255], 2, 2, [0, 1]),
        ([0, 1, 2], 3, None, [0, 1, 2]),
        ([0, 127, 254], 3, None, [0, 1, 2]),
        ([0, 85, 170, 255], 4, None, [0, 1, 2, 3]),
        ([0, 85, 170, 255], 4, 3, [0, 1, 2, VOID]),
        ([0, 1, 2, 3], 3, 3, [0, 1, 2, VOID]),
        ([0, 1, 2, 3], 4, 3, [0, 1, 2, VOID]),
        ([0, 1, 255], 2, 255, [0, 1, VOID]),
        ([0, 255, 255], 2, 255, [0, VOID, VOID]),
        ([0, 1, 3, 254, 255], 2, None, [0, 0, 0, 1, 1]),
        ([0, 2, 255], 2, 2, [0, 0, 1]),
    ],
)
def test_mask_classes(values, classes, void, expected) -> None:
    found = mask_classes(np.array(values, np.uint8), classes, void)
    assert found.dtype == np.uint8
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("values", "classes", "void", "message"),
    [
        (
            [0, 2],
            2,
            None,
            "contains the values 2; allowed are the class indices 0, 1, or grey levels with some above 127",
        ),
        ([0, 100], 2, None, "contains the values 100; "),
        ([0, 3], 3, None, "contains the values 3; allowed are the class indices 0, 1, 2, or multiples of 127"),
        ([0, 84, 170], 4, 4, "contains the values 84, 170; allowed are the class indices 0, 1, 2, 3, 4, or multiples"),
        ([0, 1, 1, 255], 2, None, "contains 0, 1 and 255: set void_class to 255 if 255 should be ignored; otherwise"),
        ([0, 1, 255], 2, 2, "contains 0, 1 and 255: set void_class to 255"),
        ([1, 255], 2, None, "contains 1 and 255: set void_class to 255"),
        ([0, 1, 2, 255], 2, 2, "contains 0, 1, 2 and 255: set void_class to 255"),
        ([0, 1, 2, 255], 2, 255, r"contains the values 2; allowed are the class indices 0, 1, 255: correct the file"),
        ([0, 3, 200], 2, 255, "contains the values 3, 200; "),
        (list(range(2, 12)), 2, None, r"contains the values 2, 3, 4, 5, 6 \.\.\.; "),
    ],
)
def test_other_values_are_refused(values, classes, void, message) -> None:
    with pytest.raises(ValueError, match=message):
        mask_classes(np.array(values, np.uint8), classes, void)
