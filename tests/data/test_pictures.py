from __future__ import annotations

import io
import re
import struct
import warnings
import zlib

import imagecodecs
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import tifffile
from monai.data import DataLoader, decollate_batch
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd
from PIL import Image, ImageOps

from segbundles.data import FrameReader, MaskReader, PictureReader, StackReader, SuffixReader
from segbundles.data.pictures import page_count, read_picture
from segbundles.meta import notes_of, pixel_sizes_nm
from segbundles.transforms import CheckImaged, FillChannelsd

SIZE = (5, 4, 3)
RNG = np.random.default_rng(0)
VOLUME = RNG.integers(0, 255, SIZE, dtype=np.uint8)
GREY = RNG.integers(0, 255, (20, 30), dtype=np.uint8)
SMOOTH = np.kron(RNG.integers(0, 255, (3, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)  # (24, 32, 3)
READERS = (SuffixReader, StackReader, FrameReader, MaskReader)


def get(path, reader=SuffixReader, **kwargs):
    """Array that a reader gives, with rows first."""
    reader = reader(**kwargs)
    array, _ = reader.get_data(reader.read(path))
    return array.swapaxes(0, 1)


def load(path, reader=SuffixReader):
    return EnsureChannelFirstd("image")(LoadImaged("image", reader=reader)({"image": path}))["image"]


# ---------------------------------------------------------------------------------------------------------- TIFF: pages


@pytest.mark.parametrize("suffix", [".tif", ".tiff", ".TIF"])
@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 4, 5), (1, 5, 4)),  # pages, rows, columns -> channels, x, y
        ((3, 4, 5), (1, 5, 4, 3)),
        ((2, 4, 3), (1, 3, 4, 2)),
        ((7, 4, 5), (1, 5, 4, 7)),
    ],
)
def test_tiff_pages(tmp_path, shape, expected, suffix):
    pages = RNG.integers(0, 65535, shape, dtype=np.uint16)
    tifffile.imwrite(tmp_path / f"a{suffix}", pages, photometric="minisblack")
    image = load(tmp_path / f"a{suffix}")
    assert image.shape == expected
    assert tuple(image.meta["spatial_shape"]) == expected[1:]
    np.testing.assert_array_equal(image.numpy().reshape(expected[1:]), pages.T.reshape(expected[1:]))


ZYX = RNG.integers(0, 255, (5, 20, 30), dtype=np.uint8)
ZCYX = RNG.integers(0, 255, (6, 3, 20, 30), dtype=np.uint8)
IMAGEJ = {"imagej": True, "metadata": {"axes": "ZYX"}}


@pytest.mark.parametrize(
    "options",
    [
        {**IMAGEJ, "truncate": True},  # one directory, with the pixels of the other pages behind
        IMAGEJ,
        {**IMAGEJ, "compression": "lzw"},
        {"imagej": True, "metadata": {"axes": "TYX"}},
        {"ome": True, "metadata": {"axes": "ZYX"}},
        {"photometric": "minisblack", "truncate": True},
        {"photometric": "minisblack", "metadata": None},
    ],
)
def test_every_kind_of_stack_gives_all_pages_or_the_one_asked_for(tmp_path, options):
    tifffile.imwrite(path := tmp_path / "a.tif", ZYX, **options)
    assert page_count(path) == 5
    np.testing.assert_array_equal(get(path, PictureReader), ZYX.transpose(1, 2, 0))
    np.testing.assert_array_equal(get(path, StackReader), ZYX.transpose(1, 2, 0))
    for page in (0, 3):
        np.testing.assert_array_equal(get(path, StackReader, page=page)[..., 0], ZYX[page])
    with pytest.raises(ValueError, match="it has 5 pages, so there is no page 5: pages count from 0"):
        StackReader(5).get_data(([path], {}))


@pytest.mark.parametrize(
    ("axes", "options"),
    [
        ("ZCYX", {"imagej": True}),
        ("ZCYX", {"imagej": True, "truncate": True}),
        ("TCYX", {"imagej": True}),
        ("ZYXS", {"imagej": True}),
        ("ZCYX", {"ome": True}),
        ("CZYX", {"ome": True}),
        ("ZCYX", {"photometric": "minisblack"}),
        ("CZYX", {"photometric": "minisblack"}),
        ("ZSYX", {"photometric": "rgb", "planarconfig": "separate"}),
    ],
)
def test_axes_of_channels_are_channels(tmp_path, axes, options):
    source = ["ZCYX".index({"S": "C", "T": "Z"}.get(axis, axis)) for axis in axes]
    stored = np.ascontiguousarray(ZCYX.transpose(source))
    tifffile.imwrite(path := tmp_path / "a.tif", stored, metadata={"axes": axes}, **options)
    assert page_count(path) == 6
    for reader in (PictureReader, StackReader):
        np.testing.assert_array_equal(get(path, reader), ZCYX.transpose(2, 3, 0, 1))
    np.testing.assert_array_equal(get(path, StackReader, page=2)[:, :, 0], ZCYX[2].transpose(1, 2, 0))
    assert load(path, StackReader).shape == (3, 30, 20, 6)


def test_channels_of_one_slice_are_the_colours_of_a_frame(tmp_path):
    tifffile.imwrite(path := tmp_path / "a.tif", ZCYX[0], imagej=True, metadata={"axes": "CYX"})
    for reader in (SuffixReader, FrameReader):
        np.testing.assert_array_equal(get(path, reader), ZCYX[0].transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("shape", "axes", "message"),
    [
        ((2, 6, 3, 20, 30), "TZCYX", "it has 2 axes of slices, T (2) and Z (6): save it as several files"),
        ((2, 6, 20, 30), "TZYX", "it has 2 axes of slices, T (2) and Z (6)"),
        ((6, 3, 20, 30), None, "it has 2 axes of slices, unnamed (6) and unnamed (3)"),
        ((2, 20, 30, 3), "CYXS", "it has 2 axes of channels, C (2) and S (3)"),
    ],
)
def test_two_axes_of_one_kind_are_refused_by_name(tmp_path, shape, axes, message):
    array = np.zeros(shape, np.uint8)
    options = {"imagej": True, "metadata": {"axes": axes}} if axes else {"photometric": "minisblack"}
    tifffile.imwrite(path := tmp_path / "a.tif", array, **options)
    for reader in READERS:
        with pytest.raises(ValueError, match=f"^{re.escape(f'cannot read {path}: {message}')}"):
            get(path, reader)


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_other_numbers_of_channels_are_refused_by_every_bundle(tmp_path, channels):
    stack = RNG.integers(0, 255, (2, channels, 20, 30), dtype=np.uint8)
    tifffile.imwrite(path := tmp_path / "stack.tif", stack, imagej=True, metadata={"axes": "ZCYX"})
    tifffile.imwrite(frame := tmp_path / "frame.tif", stack[0], imagej=True, metadata={"axes": "CYX"})
    image = {"image": load(path, StackReader)}
    with pytest.raises(ValueError, match=rf"stack.tif has {channels} channel\(s\) but must have 1"):
        CheckImaged("image")(image)  # of em_membrane_unet
    with pytest.raises(ValueError, match=rf"stack.tif has {channels} channels but must have 3"):
        FillChannelsd("image")(image)  # of brain_flair_unet
    for reader in (FrameReader, MaskReader):  # of polyp_fcn8
        with pytest.raises(ValueError, match=rf"frame.tif: it has {channels} channels but must have 1 \(grey\) or 3"):
            get(frame, reader)


def test_three_channels_are_refused_where_one_is_expected(tmp_path):
    tifffile.imwrite(path := tmp_path / "a.tif", ZCYX, imagej=True, metadata={"axes": "ZCYX"})
    with pytest.raises(ValueError, match=r"a.tif has 3 channel\(s\) but must have 1: convert colour to grey"):
        CheckImaged("image")({"image": load(path, StackReader)})


def _imagej(images, **options):
    text = f"ImageJ=1.53t\nimages={images}\nslices={images}\n"
    return {"metadata": None, "description": text, "photometric": "minisblack", **options}


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (ZYX, _imagej(12), "it is truncated, or its ImageJ header promises images that it does not contain"),
        (ZYX[0], _imagej(5), "it is truncated, or its ImageJ header promises images"),
        (ZYX, _imagej(12, compression="lzw"), "its header describes 12 pages but it has 5"),
        (ZYX, _imagej(3), "its header describes 3 pages but it has 5"),
        (ZYX, _imagej(3, compression="lzw"), "its header describes 3 pages but it has 5"),
        (
            ZYX[0],
            {"metadata": None, "description": '{"shape": [100000000000, 20, 30]}'},  # of tifffile
            r"it is truncated or damaged \(its header describes 100000000000 page\(s\)\)",
        ),
    ],
)
def test_header_must_fit_the_pages(tmp_path, array, options, message):
    tifffile.imwrite(path := tmp_path / "a.tif", array, **options)
    for reader in READERS:
        with pytest.raises(ValueError, match=f"^cannot read {re.escape(str(path))}: {message}"):
            get(path, reader)


def test_imagej_stack_of_one_directory_must_be_whole(tmp_path):
    tifffile.imwrite(path := tmp_path / "a.tif", ZYX, truncate=True, **IMAGEJ)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"a\.tif: it is truncated, or its ImageJ header promises images"):
        get(path)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_older_imagej_does_not_say_how_many_slices_its_images_are(tmp_path, truncate, channels):
    axes, pages = ("ZYX", ZYX) if channels == 1 else ("ZCYX", ZCYX)
    tifffile.imwrite(path := tmp_path / "a.tif", pages, imagej=True, metadata={"axes": axes}, truncate=truncate)
    line = f"slices={len(pages)}\n".encode()
    path.write_bytes(path.read_bytes().replace(line, b"unit=um \n"))
    assert page_count(path) == len(pages)
    expected = pages.transpose(1, 2, 0) if channels == 1 else pages.transpose(2, 3, 0, 1)
    np.testing.assert_array_equal(get(path, StackReader), expected)
    np.testing.assert_array_equal(get(path, StackReader, page=4)[:, :, 0], expected[:, :, 4])


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ("images=8\n", {}, "its ImageJ header promises 8 images but it contains 5"),
        ("images=8\n", {"truncate": True}, "its ImageJ header promises 8 images but it contains 5"),
        ("images=5\nchannels=2\n", {"truncate": True}, "its ImageJ header promises 5 images but it contains 5"),
        ("images=8\n", {"compression": "lzw"}, "its ImageJ header promises 8 images but it contains 5"),
        ("images=6\nchannels=2\norder=zct\n", {}, "its header describes 2 pages but it has 5"),
    ],
)
def test_older_imagej_header_must_fit_the_pages(tmp_path, header, options, message):
    text = f"ImageJ=1.37v\n{header}"
    tifffile.imwrite(path := tmp_path / "a.tif", ZYX, metadata=None, description=text, **options)
    with pytest.raises(ValueError, match=rf"a\.tif: {message}"):
        get(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'SizeZ="5"', b'SizeZ="9"', "its header describes 9 pages but it has 5: files or pages are missing"),
        (b'SizeZ="5"', b'SizeZ="3"', "its header describes 3 pages but it has 5: save the stack again"),
        (b"<OME", b"<OMX", "it is truncated, or its OME-XML describes pages that it does not contain"),
    ],
)
def test_ome_xml_must_fit_the_pages(tmp_path, old, new, message):
    tifffile.imwrite(path := tmp_path / "a.tif", ZYX, ome=True, metadata={"axes": "ZYX"})
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(ValueError, match=rf"a\.tif: {message}"):
        get(path)


def test_ome_over_several_files_needs_them_all(tmp_path):
    planes = "".join(
        f'<TiffData FirstZ="{k}" IFD="0" PlaneCount="1"><UUID FileName="{name}.tif">urn:uuid:{name}</UUID></TiffData>'
        for k, name in enumerate("ab")
    )
    text = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:a">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" SizeX="30" SizeY="20" SizeZ="2" '
        f'SizeC="1" SizeT="1"><Channel ID="Channel:0" SamplesPerPixel="1"/>{planes}</Pixels></Image></OME>'
    )
    tifffile.imwrite(path := tmp_path / "a.tif", ZYX[0], metadata=None, description=text)
    with pytest.raises(ValueError, match="its header describes 2 pages but it has 1: files or pages are missing"):
        get(path)
    tifffile.imwrite(tmp_path / "b.tif", ZYX[1], metadata=None, description=text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(get(path), ZYX[:2].transpose(1, 2, 0))


def test_separate_images_in_one_ome_file_are_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif", ome=True) as file:
        for _ in range(2):
            file.write(ZYX, metadata={"axes": "ZYX"})
    with pytest.raises(ValueError, match=r"it contains 2 separate images, 5 x 20 x 30, 5 x 20 x 30: give each its own"):
        get(tmp_path / "a.tif")


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", [1, 4, 5])  # reduced, mask, mask of a reduced image
def test_thumbnails_and_transparency_masks_are_left_out(tmp_path, order, kind):
    pages = [(GREY, 0), (GREY[::4, ::4] if kind & 1 else GREY, kind)][::order]
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page, _ in pages:
            file.write(page, subfiletype=1, metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as file:
        for page, (_, subfiletype) in zip(file.pages, pages, strict=True):
            page.tags["NewSubfileType"].overwrite(subfiletype)
    assert page_count(tmp_path / "a.tif") == 1
    np.testing.assert_array_equal(get(tmp_path / "a.tif"), GREY)
    np.testing.assert_array_equal(get(tmp_path / "a.tif", MaskReader), GREY)


@pytest.mark.parametrize("ome", [True, False])
def test_pyramid_levels_are_left_out(tmp_path, ome):
    pages = RNG.integers(0, 255, (3, 32, 48), dtype=np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif", ome=ome) as file:
        options = {"tile": (16, 16), "photometric": "minisblack"}
        file.write(pages, subifds=1, metadata={"axes": "ZYX"}, **options)
        file.write(pages[:, ::2, ::2], subfiletype=1, **options)
    np.testing.assert_array_equal(get(tmp_path / "a.tif"), pages.transpose(1, 2, 0))


def test_tiff_pages_of_different_size(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for rows in (4, 5):
            file.write(np.zeros((rows, 6), np.uint8))
    with pytest.raises(ValueError, match=r"a\.tif: it has pages of different sizes, \[\(4, 6\), \(5, 6\)\]"):
        get(tmp_path / "a.tif")


# --------------------------------------------------------------------------------------------------------- TIFF: pixels


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("pages", [1, 2])
def test_tiff_colour(tmp_path, planar, pages):
    rgb = RNG.integers(0, 255, (pages, 4, 5, 3), dtype=np.uint8)
    stored = rgb if planar == "contig" else np.moveaxis(rgb, -1, 1)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page in stored:
            file.write(page, photometric="rgb", planarconfig=planar)
    image = load(tmp_path / "a.tif").numpy()
    expected = rgb.transpose(3, 2, 1, 0)  # channel, x, y, page
    np.testing.assert_array_equal(image, expected[..., 0] if pages == 1 else expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("pages", [1, 2])
def test_tiff_whose_zero_is_white_is_inverted(tmp_path, dtype, pages):
    grey = RNG.integers(0, 255, (pages, 4, 5), dtype=dtype)
    stored = np.iinfo(dtype).max - grey
    tifffile.imwrite(tmp_path / "a.tif", stored[0] if pages == 1 else stored, photometric="miniswhite")
    image = load(tmp_path / "a.tif").numpy()[0]
    np.testing.assert_array_equal(image, grey[0].T if pages == 1 else grey.T)


def test_tiff_of_one_bit_whose_zero_is_white_is_inverted(tmp_path):
    lit = RNG.integers(0, 2, (4, 16)).astype(bool)
    tifffile.imwrite(tmp_path / "a.tif", ~lit, photometric="miniswhite")
    np.testing.assert_array_equal(get(tmp_path / "a.tif"), lit)


def test_picture_of_one_bit_has_0_and_255_in_a_stack(tmp_path):
    lit = RNG.integers(0, 2, (4, 16)).astype(bool)
    Image.fromarray(lit).save(tmp_path / "a.png")
    Image.fromarray(lit).save(tmp_path / "b.tif", compression="group4")
    Image.fromarray(lit * np.uint8(255)).save(tmp_path / "c.png")
    stack, _ = StackReader().get_data(([tmp_path / name for name in ("a.png", "b.tif", "c.png")], {}))
    np.testing.assert_array_equal(stack, np.stack([lit.T * 255] * 3, -1))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", ["a.png", "a.tif", "white.tif", "rgb.tif"])
def test_2_and_4_bits_are_scaled_to_8(tmp_path, bits, kind):
    values = RNG.integers(0, 2**bits, (20, 32, 3) if kind == "rgb.tif" else (20, 32), dtype=np.uint8)
    stored = 2**bits - 1 - values if kind == "white.tif" else values
    places = np.arange(8 // bits)[::-1] * bits
    packed = (stored.reshape(20, -1, 8 // bits) << places).sum(-1).astype(np.uint8)
    if kind == "a.png":
        (tmp_path / kind).write_bytes(_png(32, 20, bits, [row.tobytes() for row in packed]))
    else:
        tifffile.imwrite(tmp_path / kind, packed, metadata=None)
        with tifffile.TiffFile(tmp_path / kind, mode="r+") as file:
            tags = {"ImageWidth": 32, "BitsPerSample": bits, "PhotometricInterpretation": int(kind != "white.tif")}
            if kind == "rgb.tif":
                tags |= {"BitsPerSample": (bits,) * 3, "PhotometricInterpretation": 2, "SamplesPerPixel": 3}
            for name, value in tags.items():
                file.pages[0].tags[name].overwrite(value)
    expected = values * (255 // (2**bits - 1))
    np.testing.assert_array_equal(get(tmp_path / kind), expected)
    frame = expected if kind == "rgb.tif" else np.stack([expected] * 3, -1)
    np.testing.assert_array_equal(get(tmp_path / kind, FrameReader), frame)
    if kind != "rgb.tif":
        np.testing.assert_array_equal(get(tmp_path / kind, MaskReader), expected)


@pytest.mark.parametrize("reader", READERS)
def test_tiff_of_complex_numbers_is_refused(tmp_path, reader):
    tifffile.imwrite(tmp_path / "a.tif", GREY.astype(np.complex64))
    with pytest.raises(ValueError, match=r"a\.tif: it contains complex numbers: save the magnitude\.$"):
        get(tmp_path / "a.tif", reader)


def test_tiff_that_does_not_say_what_zero_is_has_it_black(tmp_path):
    grey = RNG.integers(0, 255, (4, 5), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", grey, photometric="minisblack")
    stored = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        tag = file.pages[0].tags["PhotometricInterpretation"]
    stored[tag.offset : tag.offset + 2] = (65000).to_bytes(2, "little")  # a private tag takes its place
    (tmp_path / "a.tif").write_bytes(stored)
    np.testing.assert_array_equal(load(tmp_path / "a.tif").numpy()[0].T, grey)


@pytest.mark.parametrize("pages", [1, 2])
def test_tiff_of_cmyk_is_converted(tmp_path, pages):
    images = [Image.new("CMYK", (30, 20), colour) for colour in ((50, 200, 90, 10), (0, 0, 0, 255))][:pages]
    images[0].save(tmp_path / "a.tif", save_all=True, append_images=images[1:])
    expected = np.stack([np.asarray(image.convert("RGB")) for image in images], axis=2)
    np.testing.assert_array_equal(get(tmp_path / "a.tif"), expected if pages > 1 else expected[:, :, 0])


def test_tiff_of_other_colours_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 5), np.uint8), photometric="cfa")
    with pytest.raises(ValueError, match=r"^cannot read .*a\.tif: its pixels are CFA: convert it to grey or RGB"):
        get(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("compression", "photometric"),
    [*((name, "rgb") for name in ("lzw", "zlib", "zstd", "packbits", "jpeg")), ("jpeg", "ycbcr")],
)
def test_compressed_tiff(tmp_path, compression, photometric):
    tifffile.imwrite(path := tmp_path / "a.tif", SMOOTH, photometric=photometric, compression=compression)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(get(path), expected)
    np.testing.assert_array_equal(get(path, FrameReader), expected)
    if compression != "jpeg":
        np.testing.assert_array_equal(expected, SMOOTH)


@pytest.mark.parametrize("compression", ["group3", "group4"])
def test_fax_tiff(tmp_path, compression):
    lit = RNG.integers(0, 2, (20, 30)).astype(bool)
    Image.fromarray(lit).save(tmp_path / "a.tif", compression=compression)
    np.testing.assert_array_equal(get(tmp_path / "a.tif"), lit)
    np.testing.assert_array_equal(get(tmp_path / "a.tif", MaskReader), lit)
    np.testing.assert_array_equal(get(tmp_path / "a.tif", FrameReader)[..., 0], lit * 255)


def test_tiff_of_a_compression_that_is_not_installed_is_not_called_damaged(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", VOLUME[..., 0])

    def asarray(self):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", asarray)
    with pytest.raises(ValueError, match=r"cannot read .*a\.tif: its compression needs `pip install imagecodecs`"):
        get(tmp_path / "a.tif")


@pytest.mark.parametrize("compression", ["lzw", "jpeg"])
@pytest.mark.parametrize("change", ["cut", "sparse"])
def test_compressed_tiff_without_all_its_pixels_is_refused(tmp_path, compression, change):
    tifffile.imwrite(path := tmp_path / "a.tif", GREY, compression=compression, rowsperstrip=8, metadata=None)
    with tifffile.TiffFile(path, mode="r+") as file:
        counts = file.pages[0].tags["StripByteCounts"]
        if change == "sparse":
            counts.overwrite((*counts.value[:-1], 0))
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"a\.tif: it is truncated or damaged \(pixels are missing\)"):
        get(path)


# ------------------------------------------------------------------------------------------------------- PNG, BMP, JPEG


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3)])
def test_one_picture_gives_one_array_in_every_format(tmp_path, shape):
    picture = RNG.integers(0, 255, shape, dtype=np.uint8)
    for name in ("a.png", "a.bmp", "b.tif"):
        Image.fromarray(picture).save(tmp_path / name)
    tifffile.imwrite(tmp_path / "a.tif", picture)
    (tmp_path / "tiff.png").write_bytes((tmp_path / "a.tif").read_bytes())  # what it contains decides
    images = [load(tmp_path / name) for name in ("a.png", "a.bmp", "b.tif", "a.tif", "tiff.png")]
    for image in images:
        assert image.shape == (1 if len(shape) == 2 else 3, 6, 4)
        np.testing.assert_array_equal(image.numpy(), picture[None].T.reshape(image.shape))
        np.testing.assert_array_equal(image.affine.numpy(), images[0].affine.numpy())
        assert tuple(image.meta["spatial_shape"]) == (6, 4)
        assert "notes" not in image.meta


def _with_palette(folder, suffix, indices, colours, bits=8, **options):
    image = Image.frombytes("P", indices.shape[::-1], indices.astype(np.uint8).tobytes())
    image.putpalette(np.asarray(colours, np.uint8).ravel().tolist())
    image.save(folder / f"palette{suffix}", **({"bits": bits} if suffix == ".png" else {}), **options)
    return folder / f"palette{suffix}"


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("coloured", [False, True])
def test_palettes_are_expanded(tmp_path, suffix, bits, coloured):
    indices = RNG.integers(0, 2**bits, (20, 30))
    greys = np.repeat(RNG.permutation(256)[: 2**bits, None], 3, axis=1)
    colours = np.stack([greys[:, 0], 255 - greys[:, 0], np.full(2**bits, 7)], axis=1) if coloured else greys
    path = _with_palette(tmp_path, suffix, indices, colours, bits)
    shown = colours[indices]
    np.testing.assert_array_equal(get(path, FrameReader), shown)
    for reader in (SuffixReader, StackReader):
        expected = shown if coloured else shown[..., 0]
        np.testing.assert_array_equal(get(path, reader).reshape(expected.shape), expected)
    if not coloured:
        np.testing.assert_array_equal(get(path, MaskReader), shown[..., 0])


def test_colours_that_no_pixel_has_do_not_count(tmp_path):
    indices = np.where(GREY > 99, 3, 1)
    path = _with_palette(tmp_path, ".png", indices, [(255, 0, 0), (9, 9, 9), (0, 255, 0), (90, 90, 90)])
    np.testing.assert_array_equal(get(path), np.where(GREY > 99, 90, 9))


def test_blank_picture_with_a_coloured_palette_is_coloured_like_the_others_of_its_stack(tmp_path):
    path = _with_palette(tmp_path, ".png", GREY * 0, [(0, 0, 0), (255, 0, 0)])
    np.testing.assert_array_equal(get(path), np.zeros((20, 30, 3)))


@pytest.mark.parametrize("clear", [bytes([255, 100]), 1])
def test_transparent_colours_give_alpha(tmp_path, clear):
    indices = np.where(GREY > 99, 2, 1)
    path = _with_palette(tmp_path, ".png", indices, [(0, 0, 0), (9, 9, 9), (90, 90, 90)], transparency=clear)
    alpha = np.where(GREY > 99, 255, 0 if clear == 1 else 100)
    np.testing.assert_array_equal(get(path), np.stack([np.where(GREY > 99, 90, 9), alpha], -1))
    path = _with_palette(tmp_path, ".png", indices * 0, [(5, 5, 5), (9, 9, 9), (90, 90, 90)], transparency=clear)
    assert (get(path) == 5).all()  # no transparent pixel
    assert get(path).ndim == 2


@pytest.mark.parametrize("pages", [1, 3])
def test_16_bit_palette_of_a_tiff(tmp_path, pages):
    for kind, colours in {
        "grey": np.stack([np.arange(256)[::-1] * 257] * 3),
        "colour": RNG.integers(0, 65536, (3, 256)),
        "8 bits": RNG.integers(0, 256, (3, 256)),
    }.items():
        path = tmp_path / f"{kind}.tif"
        tifffile.imwrite(path, ZYX[:pages], photometric="palette", colormap=colours.astype(np.uint16))
        shown = (colours if kind == "8 bits" else colours >> 8).T.astype(np.uint8)[ZYX[:pages]]
        expected = shown[..., 0].transpose(1, 2, 0) if kind == "grey" else shown.transpose(1, 2, 0, 3)
        np.testing.assert_array_equal(get(path, StackReader), expected)
        np.testing.assert_array_equal(get(path, StackReader, page=pages - 1)[:, :, 0], expected[:, :, -1])


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "palette.png", "cmyk.jpg", "cmyk.tif", "grey.tif"])
@pytest.mark.parametrize("tag", range(1, 10))  # 9 means nothing
def test_orientation_tag_turns_images_as_viewers_do(tmp_path, name, tag):
    exif = Image.Exif()
    exif[274] = tag
    kind = {"palette": "P", "cmyk": "CMYK", "grey": "L"}.get(name.split(".")[0], "RGB")
    image = Image.fromarray(SMOOTH).convert(kind)
    if name == "grey.tif":
        tifffile.imwrite(tmp_path / name, np.asarray(image), extratags=[(274, 3, 1, tag, True)])
    else:
        image.save(tmp_path / name, exif=exif)
    with (tmp_path / name).open("rb") as file, Image.open(file) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("L" if kind == "L" else "RGB"))
    assert expected.shape[:2] == ((32, 24) if 5 <= tag <= 8 else (24, 32))
    np.testing.assert_array_equal(get(tmp_path / name), expected)
    picture = get(tmp_path / name, FrameReader)
    np.testing.assert_array_equal(picture, expected if kind != "L" else np.stack([expected] * 3, -1))
    array, meta = StackReader().get_data(([tmp_path / name], {}))
    assert tuple(meta["spatial_shape"]) == array.shape[:3] == (*expected.shape[1::-1], 1)


def test_orientation_tag_turns_masks(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    for name in ("m.png", "m.tif"):
        Image.fromarray(GREY).save(tmp_path / name, exif=exif)
        np.testing.assert_array_equal(get(tmp_path / name, MaskReader), np.rot90(GREY, -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_matter(tmp_path):
    Image.fromarray(SMOOTH).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    np.testing.assert_array_equal(get(tmp_path / "a.png"), SMOOTH)


def test_first_picture_of_a_jpeg_with_several(tmp_path):
    images = [Image.fromarray(pixels) for pixels in (SMOOTH, 255 - SMOOTH)]
    images[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=images[1:])
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.n_frames == 2
        expected = np.asarray(image)
    for reader in (SuffixReader, FrameReader):
        np.testing.assert_array_equal(get(tmp_path / "a.jpg", reader), expected)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_animations_are_refused_by_name(tmp_path, reader, kind):
    images = [Image.fromarray(pixels) for pixels in (SMOOTH, 255 - SMOOTH)]
    images[0].save(tmp_path / "a.png", format=kind, save_all=True, append_images=images[1:])
    with pytest.raises(ValueError, match=r"^cannot read .*a\.png: it is an animation of 2 frames: give one image"):
        get(tmp_path / "a.png", reader)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_png_of_16_bits_keeps_them(tmp_path, channels):
    pixels = RNG.integers(0, 65536, (20, 30, channels), dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels))
    np.testing.assert_array_equal(get(tmp_path / "a.png"), pixels)
    reader = StackReader()
    array, meta = reader.get_data(reader.read([tmp_path / "a.png"] * 2))
    assert array.dtype == np.uint16
    assert meta["notes"] == "PNG of 16 bits per channel"
    frame, meta = FrameReader().get_data(([tmp_path / "a.png"], {}))
    colours = pixels[..., :3] if channels > 2 else pixels[..., :1].repeat(3, 2)
    np.testing.assert_array_equal(frame.swapaxes(0, 1), np.rint(colours / 257))
    assert "16 bits: scaled to 8" in meta["notes"]


def test_colour_that_is_transparent_in_a_png_of_16_bits_is_no_channel(tmp_path):
    pixels = RNG.integers(0, 65536, (20, 30, 3), dtype=np.uint16)
    data = imagecodecs.png_encode(pixels)
    chunk = b"tRNS" + struct.pack(">HHH", *pixels[0, 0].tolist())
    (tmp_path / "a.png").write_bytes(
        data[:33] + struct.pack(">I", 6) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    )
    np.testing.assert_array_equal(get(tmp_path / "a.png"), pixels)
    np.testing.assert_array_equal(get(tmp_path / "a.png", FrameReader), np.rint(pixels / 257))


def _png(width, height, bits=8, rows=()):
    """A grey PNG, written row by row."""
    packer, parts = zlib.compressobj(1), []
    parts = [packer.compress(b"\0" + row) for row in rows] + [packer.flush()]
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", b"".join(parts)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def test_large_png_is_read_without_a_warning(tmp_path):
    row = bytes(range(256)) * 40
    (tmp_path / "a.png").write_bytes(_png(10240, 17600, rows=[row] * 17600))  # 180 million pixels: PIL refuses it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = read_picture(tmp_path / "a.png")
    assert picture.pixels.shape == (1, 17600, 10240, 1)
    assert picture.pixels[0, ::17599, :, 0].tobytes() == row * 2


def _jpeg(width, height):
    buffer = io.BytesIO()
    Image.fromarray(SMOOTH).save(buffer, "JPEG")
    head, tail = buffer.getvalue().split(b"\xff\xc0", 1)
    return head + b"\xff\xc0" + tail[:3] + struct.pack(">HH", height, width) + tail[7:]


def _bmp(width, height):
    buffer = io.BytesIO()
    Image.fromarray(SMOOTH).save(buffer, "BMP")
    return buffer.getvalue()[:18] + struct.pack("<ii", width, height) + buffer.getvalue()[26:]


def _tiff(width, height, bits=8, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, GREY, metadata=None, **options)
    buffer.seek(0)
    with tifffile.TiffFile(buffer, mode="r+") as file:
        for name, value in (("ImageWidth", width), ("ImageLength", height), ("BitsPerSample", bits)):
            file.pages[0].tags[name].overwrite(value)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "make", "claim"),
    [
        ("a.png", _png, "60000 x 50000 pixels"),
        ("a.jpg", _jpeg, "60000 x 50000 pixels"),
        ("a.bmp", _bmp, "60000 x 50000 pixels"),
        ("a.tif", _tiff, "50000 x 60000"),
        ("a.tif", lambda *size: _tiff(*size, compression="zlib"), "50000 x 60000"),
        ("a.tif", lambda *size: _tiff(*size, compression="zstd"), "50000 x 60000"),
        ("a.tif", lambda *size: _tiff(*size, bits=(8, 8, 16)), "50000 x 60000"),
    ],
)
def test_size_that_the_file_cannot_contain_is_refused_at_once(tmp_path, name, make, claim):
    (tmp_path / name).write_bytes(data := make(60000, 50000))
    message = f"cannot read {tmp_path / name}: its header claims {claim}, which its {len(data)} bytes cannot contain."
    for reader in READERS:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            get(tmp_path / name, reader)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.jpg", {"quality": 1}),
        ("a.tif", {"compression": "tiff_lzw"}),
        ("g.tif", {"compression": "group4"}),
    ],
)
def test_blank_images_are_read_however_well_they_are_compressed(tmp_path, name, options):
    Image.new("1" if name == "g.tif" else "L", (3000, 4000)).save(tmp_path / name, **options)
    pixels = get(tmp_path / name)
    assert pixels.shape == (4000, 3000)
    assert not (pixels > 1).any()


# ---------------------------------------------------------------------------------------------------------- StackReader


def load_stack(paths):
    item = LoadImaged("image", reader="segbundles.data.StackReader")({"image": paths})
    item = Compose([EnsureChannelFirstd("image"), Orientationd("image", "LPS")])(item)
    return item["image"]


PICTURES = RNG.integers(0, 255, (3, 4, 5, 3), dtype=np.uint8)  # slices, rows, columns, colours


@pytest.mark.parametrize("suffixes", [(".tif",) * 3, (".png",) * 3, (".bmp", ".tiff", ".png")])
@pytest.mark.parametrize("colour", [True, False])
@pytest.mark.parametrize("number", [3, 1])
def test_stack_of_2d_images(tmp_path, suffixes, colour, number):
    pictures = PICTURES if colour else PICTURES[..., 0]
    paths = [tmp_path / f"ü {10 - i}{suffix}" for i, suffix in enumerate(suffixes)][:number]
    for picture, path in zip(pictures, paths, strict=False):
        Image.fromarray(picture).save(path)
    for given in (paths, *([paths[0], str(paths[0])] if number == 1 else [])):
        image = load_stack(given)
        expected = pictures[:number].reshape(number, 4, 5, -1).transpose(3, 2, 1, 0)  # channel, x, y, slice
        assert image.shape == (3 if colour else 1, 5, 4, number)
        np.testing.assert_array_equal(image.numpy(), expected)
        for affine in (image.affine, image.meta["original_affine"]):
            np.testing.assert_array_equal(affine, np.diag([-1.0, -1, 1, 1]))
        assert tuple(image.meta["spatial_shape"]) == (5, 4, number)
        assert image.meta["slices"] == "\n".join(map(str, paths))
        assert image.meta["filename_or_obj"] == str(paths[0])
        assert image.meta["has_spacing"] is False


def test_stack_and_volume_survive_a_batch(tmp_path):
    for name in ("a_1.png", "a_2.png"):
        Image.fromarray(PICTURES[0]).save(tmp_path / name)
    nib.save(nib.Nifti1Image(np.zeros((5, 4, 2, 3), np.uint8), np.eye(4)), tmp_path / "b.nii")
    stack = load_stack([tmp_path / "a_1.png", tmp_path / "a_2.png"])
    (batch,) = DataLoader([{"image": stack}, {"image": stack}], batch_size=2)
    assert [item["image"].meta["slices"] for item in decollate_batch(batch)] == [stack.meta["slices"]] * 2
    (batch,) = DataLoader([{"image": stack}, {"image": load_stack(tmp_path / "b.nii")}], batch_size=2)
    assert batch["image"].shape == (2, 3, 5, 4, 2)


@pytest.mark.parametrize("colour", [True, False])
def test_pages_of_a_tiff_are_slices(tmp_path, colour):
    pages = PICTURES if colour else PICTURES[..., 0]
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric="rgb" if colour else "minisblack")
    image = load_stack(tmp_path / "a.tif")
    np.testing.assert_array_equal(image.numpy(), pages.reshape(3, 4, 5, -1).transpose(3, 2, 1, 0))
    np.testing.assert_array_equal(image.meta["original_affine"], np.diag([-1.0, -1, 1, 1]))
    assert tuple(image.meta["spatial_shape"]) == (5, 4, 3)
    assert image.meta["has_spacing"] is False
    assert "slices" not in image.meta


@pytest.mark.parametrize("layout", ["4D", "5D", "3D", "nrrd", "nrrd vector"])
def test_volume_files_through_the_stack_reader(tmp_path, layout):
    channels = 1 if layout in ("3D", "nrrd") else 3
    data = RNG.integers(0, 255, (*SIZE, channels), dtype=np.uint8)
    path = tmp_path / ("a.nrrd" if "nrrd" in layout else "a.nii.gz")
    if "nrrd" in layout:
        picture = sitk.GetImageFromArray(data.transpose(2, 1, 0, 3), isVector=True)
        picture = picture if channels > 1 else sitk.VectorIndexSelectionCast(picture, 0)
        picture.SetSpacing([0.5, 0.75, 2.0])
        sitk.WriteImage(picture, str(path))
    else:
        shape = {"3D": SIZE, "4D": (*SIZE, 3), "5D": (*SIZE, 1, 3)}[layout]
        nib.save(nib.Nifti1Image(data.reshape(shape), np.diag([-0.5, -0.75, 2, 1])), path)
    image = load_stack(path)
    assert image.shape == (channels, *SIZE)
    np.testing.assert_array_equal(image.numpy(), np.moveaxis(data, -1, 0))
    np.testing.assert_array_equal(image.affine.numpy(), np.diag([-0.5, -0.75, 2, 1]))
    np.testing.assert_array_equal(image.meta["original_affine"], np.diag([-0.5, -0.75, 2, 1]))
    assert tuple(image.meta["spatial_shape"]) == SIZE
    assert image.meta["has_spacing"] is True
    assert "slices" not in image.meta


def test_stack_errors(tmp_path, caplog):
    Image.fromarray(PICTURES[0]).save(tmp_path / "a_1.png")
    Image.fromarray(PICTURES[0][:3]).save(tmp_path / "low.png")
    Image.fromarray(PICTURES[0][..., 0]).save(tmp_path / "grey.tif")
    tifffile.imwrite(tmp_path / "pages.tif", PICTURES[..., 0], photometric="minisblack")
    nib.save(nib.Nifti1Image(VOLUME, np.eye(4)), tmp_path / "v.nii")
    (tmp_path / "bad.png").write_bytes((tmp_path / "a_1.png").read_bytes()[:30])
    first = tmp_path / "a_1.png"
    several = "but is one of several slices: give it alone, or as 2D images."
    with pytest.raises(ValueError, match=r"a_1\.png has 3 channels but is one of 2 files, one per channel"):
        StackReader().get_data(([tmp_path / "v.nii", first], {}))
    for name, message in {
        "low.png": f"{tmp_path}/low.png is 5 x 3 with 3 channel(s) but {first} of the same stack is 5 x 4",
        "grey.tif": f"{tmp_path}/grey.tif is 5 x 4 with 1 channel(s) but {first} of the same stack is 5 x 4 with 3",
        "bad.png": f"cannot read {tmp_path}/bad.png: it is truncated or damaged",
        "no.png": f"cannot read {tmp_path}/no.png: there is no such file.",
        "pages.tif": f"{tmp_path}/pages.tif has size (5, 4, 3) {several}",
        "v.nii": f"{tmp_path}/v.nii has size (5, 4, 3) {several}",
    }.items():
        caplog.clear()
        reader = StackReader()
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            reader.get_data(reader.read([first, tmp_path / name]))
        assert len(caplog.records) == 1


# ---------------------------------------------------------------------------------------------------------- pixel sizes

PLANE = np.zeros((20, 30), np.uint8)
STACK = np.zeros((3, 20, 30), np.uint8)


def sizes_of(path, reader=StackReader):
    reader = reader()
    _, meta = reader.get_data(reader.read(path))
    return pixel_sizes_nm(meta), notes_of(meta)


@pytest.mark.parametrize(
    ("pixels", "options", "expected"),
    [
        (PLANE, {"resolution": (2.5e6, 2e6), "resolutionunit": "CENTIMETER"}, (4, 5, 0)),
        (PLANE, {"resolution": (6.35e6, 6.35e6), "resolutionunit": "INCH"}, (4, 4, 0)),
        (PLANE, {"resolution": (2e6, 2.5e6), "resolutionunit": "CENTIMETER", "extratags": [(274, 3, 1, 6)]}, (4, 5, 0)),
        (PLANE, {"resolution": (2.5e6, 2.5e6), "resolutionunit": "NONE"}, None),
        (PLANE, {"resolution": (72, 72), "resolutionunit": "INCH"}, None),
        (PLANE, {"resolution": (118.11, 118.11), "resolutionunit": "CENTIMETER"}, None),
        (PLANE, {}, None),
        (STACK, {"imagej": True, "resolution": (0.25, 0.25), "metadata": {"unit": "nm", "spacing": 50}}, (4, 4, 50)),
        (STACK, {"imagej": True, "resolution": (250, 250), "metadata": {"unit": "\\u00B5m"}}, (4, 4, 0)),
        (STACK, {"imagej": True, "resolution": (2, 2), "metadata": {"unit": "mm", "spacing": 3}}, (5e5, 5e5, 3e6)),
        (STACK, {"imagej": True, "resolution": (2, 2), "metadata": {"unit": "pixel", "spacing": 3}}, None),
        (STACK, {"imagej": True, "resolution": (72, 72), "metadata": {"unit": "inch"}}, None),
        (
            STACK,
            {"ome": True, "metadata": {"PhysicalSizeX": 0.004, "PhysicalSizeY": 0.004, "PhysicalSizeZ": 0.05}},
            (4, 4, 50),
        ),
        (
            STACK,
            {
                "ome": True,
                "metadata": {
                    **{"PhysicalSizeX": 40, "PhysicalSizeXUnit": "Å"},
                    **{"PhysicalSizeY": 4, "PhysicalSizeYUnit": "nm"},
                },
            },
            (4, 4, 0),
        ),
        (STACK, {"ome": True, "metadata": {"PhysicalSizeX": 2, "PhysicalSizeXUnit": "pixel"}}, None),
        (STACK, {"ome": True}, None),
    ],
)
def test_the_pixel_size_of_a_tiff(tmp_path, pixels, options, expected):
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", **options)
    sizes, note = sizes_of(tmp_path / "a.tif")
    assert sizes == (expected and pytest.approx(expected))
    square = not expected or expected[0] == expected[1]
    assert note == ("" if square else "pixels of 4 x 5 nm are not square: their size is not used")
    assert sizes_of(tmp_path / "a.tif", SuffixReader)[0] == sizes


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp"])
@pytest.mark.parametrize(("dpi", "expected"), [(50_000, 508), (300, None), (72, None)])
def test_the_pixel_size_of_a_picture(tmp_path, name, dpi, expected):
    Image.fromarray(PLANE).save(tmp_path / name, dpi=(dpi, dpi))
    assert sizes_of(tmp_path / name)[0] == (expected and pytest.approx((expected, expected, 0), rel=1e-4))


def test_a_stack_of_files_has_one_pixel_size(tmp_path):
    for name, per_cm in (("a", 2.5e6), ("b", 2.5e6), ("c", 2e6)):
        tifffile.imwrite(tmp_path / f"{name}.tif", PLANE, resolution=(per_cm, per_cm), resolutionunit="CENTIMETER")
    assert sizes_of([tmp_path / "a.tif", tmp_path / "b.tif"]) == (pytest.approx((4, 4, 0)), "")
    why = "the files of the stack contain different pixel sizes: none is used"
    assert sizes_of([tmp_path / "a.tif", tmp_path / "c.tif"]) == (None, why)


def test_damaged_headers_of_sizes_do_not_stop_the_reading(tmp_path):
    description = '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"></OME>'
    tifffile.imwrite(tmp_path / "a.tif", PLANE, description=description, metadata=None)
    assert sizes_of(tmp_path / "a.tif")[0] is None
