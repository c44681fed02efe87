from __future__ import annotations

import gzip
import itertools
import logging
import re

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import tifffile
from monai.data import DataLoader, decollate_batch
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd
from PIL import Image
from scipy.spatial.transform import Rotation

from segbundles.data import SimpleITKReader, StackReader, SuffixReader, TiffReader, file_stem, file_suffix
from segbundles.data.readers import NiftiReader

SIZE = (5, 4, 3)
RNG = np.random.default_rng(0)
VOLUME = RNG.integers(0, 255, SIZE, dtype=np.uint8)
# columns: steps along the axes in mm, as an oblique and a left-handed scanner would give them
OBLIQUE = [(0.6, 0.3, 0.1), (-0.3, 0.5, 0.3), (0.2, -0.6, 1.6)]
LEFT_HANDED = [(0.0, -0.7, 0.0), (-0.8, 0.0, 0.0), (0.0, 0.0, 1.5)]
TO_RAS = {
    "left-posterior-superior": (-1, -1, 1),
    "right-anterior-superior": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
}


def write_nrrd(path, *fields, data=VOLUME, encoding="raw"):
    """A NRRD file written field by field, as other programs do."""
    body = data.tobytes(order="F")
    sizes = " ".join(map(str, data.shape))
    lines = ["NRRD0005", "type: uint8", f"dimension: {data.ndim}", f"sizes: {sizes}", f"encoding: {encoding}", *fields]
    path.write_bytes("\n".join([*lines, "", ""]).encode() + (gzip.compress(body) if encoding == "gzip" else body))
    return path


def vectors(columns):
    return "space directions: " + " ".join(f"({','.join(map(repr, column))})" for column in columns)


def corners(affine, size):
    points = np.array(list(itertools.product(*[(0, n - 1) for n in size], (1,))))
    points[:, : len(size)] = points[:, : len(size)]
    return (points @ np.asarray(affine)[: len(size) + 1, : len(size) + 1].T)[:, : len(size)]


def load(path):
    return EnsureChannelFirstd("image")(LoadImaged("image", reader="segbundles.data.SuffixReader")({"image": path}))[
        "image"
    ]


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
@pytest.mark.parametrize("space", TO_RAS)
@pytest.mark.parametrize("columns", [OBLIQUE, LEFT_HANDED])
@pytest.mark.parametrize("origin", [(12.5, -30.25, 7.0), None])
def test_nrrd_corners_lie_where_the_header_says(tmp_path, space, columns, origin, encoding):
    fields = [f"space: {space}", vectors(columns)]
    if origin is not None:
        fields.append(f"space origin: ({','.join(map(repr, origin))})")
    image = load(write_nrrd(tmp_path / "a.nrrd", *fields, encoding=encoding))
    said = np.eye(4)
    said[:3, :3] = np.array(columns).T
    said[:3, 3] = origin or (0, 0, 0)
    expected = corners(np.diag([*TO_RAS[space], 1]) @ said, SIZE)
    np.testing.assert_allclose(corners(image.affine, SIZE), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(corners(image.meta["original_affine"], SIZE), expected, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(image[0].numpy(), VOLUME)
    assert tuple(image.meta["spatial_shape"]) == SIZE


def test_nrrd_with_spacings_only_has_its_axes_along_the_scanners(tmp_path):
    image = load(write_nrrd(tmp_path / "a.nrrd", "spacings: 0.5 0.75 2"))
    np.testing.assert_array_equal(image.affine.numpy(), np.diag([-0.5, -0.75, 2, 1]))
    np.testing.assert_array_equal(image[0].numpy(), VOLUME)


def test_nrrd_without_any_geometry(tmp_path):
    image = load(write_nrrd(tmp_path / "a.nrrd"))
    np.testing.assert_array_equal(image.affine.numpy(), np.diag([-1.0, -1, 1, 1]))


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nhdr", ".mhd"])
@pytest.mark.parametrize("channels", [1, 3])
def test_itk_formats_against_simpleitks_own_points(tmp_path, suffix, channels):
    data = RNG.integers(0, 255, (*reversed(SIZE), *([channels] if channels > 1 else [])), dtype=np.int16)
    written = sitk.GetImageFromArray(data, isVector=channels > 1)
    written.SetDirection([0.8, 0.6, 0, 0.6, -0.8, 0, 0, 0, 1])  # left-handed
    written.SetSpacing([0.625, 1.5, 3.0])
    written.SetOrigin([-10.5, 20.25, 1e3])
    sitk.WriteImage(written, str(tmp_path / f"a{suffix}"))
    image = load(tmp_path / f"a{suffix}")
    assert image.shape == (channels, *SIZE)
    for corner, world in zip(itertools.product(*[(0, n - 1) for n in SIZE]), corners(image.affine, SIZE), strict=True):
        x, y, z = written.TransformIndexToPhysicalPoint(corner)
        np.testing.assert_allclose(world, (-x, -y, z), rtol=0, atol=1e-9)
        value = written.GetPixel(corner)
        assert image[(slice(None), *corner)].tolist() == list(value if channels > 1 else (value,))


def test_itk_2d_and_4d(tmp_path):
    flat = sitk.GetImageFromArray(VOLUME[..., 0].T)
    flat.SetSpacing([0.5, 2.0])
    flat.SetOrigin([3.0, 4.0])
    sitk.WriteImage(flat, str(tmp_path / "flat.mha"))
    array, meta = SimpleITKReader().get_data(SimpleITKReader().read(tmp_path / "flat.mha"))
    np.testing.assert_array_equal(array, VOLUME[..., 0])
    np.testing.assert_array_equal(meta["affine"], [[-0.5, 0, -3], [0, -2, -4], [0, 0, 1]])
    series = sitk.JoinSeries([sitk.GetImageFromArray(VOLUME.T)] * 2)
    sitk.WriteImage(series, str(tmp_path / "series.nrrd"))
    assert load(tmp_path / "series.nrrd").shape == (1, *SIZE, 2)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_corners_against_nibabel(tmp_path, suffix):
    affine = np.eye(4)
    affine[:3, :3] = np.array(OBLIQUE).T
    affine[:3, 3] = 3.5, -70.25, 0.1
    written = nib.Nifti1Image(VOLUME, affine)
    nib.save(written, tmp_path / f"a{suffix}")
    image = load(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(image.affine.numpy(), nib.load(tmp_path / f"a{suffix}").affine)
    np.testing.assert_allclose(corners(image.affine, SIZE), corners(affine, SIZE), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(image[0].numpy(), VOLUME)


def turned(degrees, spacing=(0.7, 0.8, 1.6), origin=(3.3, -70.25, 0.1)):
    """Affine of a grid turned about z and then, by a third as much, about x."""
    (c, s), (d, t) = ((np.cos(a), np.sin(a)) for a in np.deg2rad([degrees, degrees / 3]))
    affine = np.eye(4)
    affine[:3, :3] = (
        np.array([[1, 0, 0], [0, d, -t], [0, t, d]]) @ [[c, -s, 0], [s, c, 0], [0, 0, 1]] @ np.diag(spacing)
    )
    affine[:3, 3] = origin
    return affine


RAS = turned(0)
LAS = np.diag([-1.0, 1, 1, 1]) @ RAS


def nifti(path, sform=None, qform=None, data=VOLUME, dtype=None, **fields):
    """A NIfTI file whose header says just this; nibabel's images would make it consistent."""
    header = nib.Nifti1Header()
    header.set_data_shape(data.shape)
    header.set_data_dtype(dtype or data.dtype)
    grid = qform if qform is not None else np.eye(4) if sform is None or "pixdim" in fields else sform
    header.set_qform(grid, 0 if qform is None else 1)  # and pixdim
    header.set_sform(sform, 0 if sform is None else 1)
    for name, value in fields.items():
        header[name] = value
    nib.Nifti1Image(data, None, header).to_filename(path)
    return path


def read(path):
    reader = NiftiReader()
    return reader.get_data(reader.read(path))


@pytest.mark.parametrize("affine", [RAS, LAS, turned(33), turned(-120), turned(179.97), turned(180)])
@pytest.mark.parametrize("forms", [("sform",), ("qform",), ("sform", "qform")])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_lies_where_nibabel_says(tmp_path, affine, forms, suffix):
    data = np.zeros((500, 2, 400), np.uint8)  # so long that rounding of the quaternion shows
    path = nifti(tmp_path / f"a{suffix}", **dict.fromkeys(forms, affine), data=data)
    array, meta = read(path)
    for key in ("affine", "original_affine"):
        assert meta[key].dtype == np.float64
        np.testing.assert_array_equal(meta[key], nib.load(path).affine)
        np.testing.assert_allclose(meta[key], affine, rtol=0, atol=1e-5 if "sform" in forms else 2e-3)
    assert array.shape == tuple(meta["spatial_shape"]) == data.shape


@pytest.mark.parametrize("degrees", [179, 179.9, 179.95, 179.99])
def test_nifti_rounding_of_a_qform_near_half_a_turn_passes(tmp_path, degrees):
    rng = np.random.default_rng(2)
    apart = []
    for number in range(20):
        axis = rng.normal(size=3)
        affine = np.diag([0.7, 0.8, 1.6, 1])
        affine[:3, :3] = Rotation.from_rotvec(degrees * axis / np.linalg.norm(axis), True).as_matrix() * [0.7, 0.8, 1.6]
        path = nifti(tmp_path / f"{number}.nii", affine, affine, np.zeros((500, 2, 2), np.uint8))
        np.testing.assert_array_equal(read(path)[1]["affine"], nib.load(path).affine)
        image = nib.load(path)
        apart.append(np.linalg.norm(499 * (image.get_sform() - image.get_qform())[:3, 0]) / 0.7)
    assert max(apart) > 2e-3  # voxels: beyond the tolerance, by rounding alone


def test_nifti_without_forms(tmp_path):
    path = nifti(tmp_path / "a.nii", pixdim=(1, 0.5, 2, 3, 1, 1, 1, 1))
    expected = [[-0.5, 0, 0, 1], [0, 2, 0, -3], [0, 0, 3, -3], [0, 0, 0, 1]]  # centred, x to the left
    np.testing.assert_array_equal(nib.load(path).affine, expected)
    np.testing.assert_array_equal(read(path)[1]["original_affine"], expected)


def test_nifti_2d(tmp_path):
    path = nifti(tmp_path / "a.nii", RAS, RAS, VOLUME[..., 0], pixdim=(1, 0.7, 0.8, 9, 1, 1, 1, 1))
    np.testing.assert_array_equal(load(path).numpy(), VOLUME[None, ..., 0])


@pytest.mark.parametrize(
    ("sform", "qform", "fields", "message"),
    [
        (
            np.diag([0.5, 0.5, 2, 1]),
            None,
            {"pixdim": (1, 0.5, 0.5, 3, 1, 1, 1, 1)},
            "its sform has spacing (0.5, 0.5, 2) mm, its pixdim (0.5, 0.5, 3) mm: correct the header",
        ),
        (
            np.diag([1, 1, 1.002, 1]),
            None,
            {"pixdim": np.ones(8)},
            "its sform has spacing (1, 1, 1.002) mm, its pixdim (1, 1, 1) mm: correct",
        ),
        (
            np.diag([0.0, 0, 0, 1]),
            None,
            {"pixdim": np.ones(8)},
            "its sform has spacing (0, 0, 0) mm, its pixdim (1, 1, 1) mm: correct",
        ),
        (
            np.diag([np.nan, 1, 1, 1]),
            None,
            {"pixdim": np.ones(8)},
            "its sform has spacing (nan, 1, 1) mm, its pixdim (1, 1, 1) mm: correct",
        ),
        (
            turned(0, (1, 1, 2), (5, 0, 0)),
            turned(0, (1, 1, 2), (0, 0, 0)),
            {},
            "its sform puts voxel (0, 0, 0) at (5, 0, 0) mm (spacing (1, 1, 2)), its qform at (0, 0, 0) mm "
            "(spacing (1, 1, 2)): correct the header, with nibabel (set_sform, set_qform), ITK-SNAP or fslorient.",
        ),
        (
            np.diag([-1.0, 1, 1, 1]),
            np.eye(4),
            {},
            "its sform puts voxel (4, 0, 0) at (-4, 0, 0) mm (spacing (1, 1, 1)), its qform at (4, 0, 0) mm",
        ),
        (turned(33), turned(33.1), {}, "its sform puts voxel (4, 3, 0) at (4.34114, -66.7772, 0.775044) mm"),
        (RAS, RAS, {"xyzt_units": 1}, "its header is in metres (xyzt_units), not mm: rescale affine and pixdim"),
        (RAS, None, {"xyzt_units": 3 + 8}, "its header is in micrometres (xyzt_units), not mm"),
    ],
)
def test_nifti_that_contradicts_itself_is_refused(tmp_path, sform, qform, fields, message, caplog):
    path = nifti(tmp_path / "a.nii.gz", sform, qform, **fields)
    with pytest.raises(ValueError, match=f"^{re.escape(f'cannot read {path}: {message}')}"):
        load_error(path)
    assert sum("cannot read" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("sform", "qform", "fields"),
    [
        (turned(33, origin=(1e3, 0, 0)), turned(33, origin=(1e3 + 6e-4, 0, 0)), {}),  # of 0.7 mm
        (np.diag([1, 1, 1.0009, 1]), None, {"pixdim": np.ones(8)}),
        (RAS, RAS, {"xyzt_units": 0}),
        (RAS, RAS, {"xyzt_units": 2 + 8}),
        (turned(0, (5e-4, 5e-4, 5e-4), (321.123, 0, 0)), turned(0, (5e-4, 5e-4, 5e-4), (321.12302, 0, 0)), {}),
    ],
)
def test_nifti_within_the_tolerance(tmp_path, sform, qform, fields):
    path = nifti(tmp_path / "a.nii", sform, qform, **fields)
    np.testing.assert_array_equal(read(path)[1]["affine"], nib.load(path).affine)


def test_nifti_of_integers_stays_so_unless_it_is_scaled(tmp_path):
    values = VOLUME.astype(np.int16) - 100
    array, _ = read(nifti(tmp_path / "plain.nii.gz", RAS, data=values))
    assert array.dtype == np.int16
    np.testing.assert_array_equal(array, values)
    path = nifti(tmp_path / "scaled.nii.gz", RAS, data=values / 8, dtype=np.int16)
    assert nib.load(path).dataobj.slope != 1
    array, _ = read(path)
    assert array.dtype == np.float64
    np.testing.assert_array_equal(array, nib.load(path).get_fdata())
    np.testing.assert_allclose(array, values / 8, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("shape", "channels"), [((*SIZE, 2), 2), ((*SIZE, 1), 1), ((*SIZE, 1, 3), None)])
def test_nifti_channels_are_the_last_axis(tmp_path, shape, channels):
    data = RNG.integers(0, 255, shape, dtype=np.uint8)
    array, meta = read(nifti(tmp_path / "a.nii.gz", RAS, data=data))
    assert meta["original_channel_dim"] == -1
    assert tuple(meta["spatial_shape"]) == SIZE
    np.testing.assert_array_equal(array, data)
    if channels:
        np.testing.assert_array_equal(load(tmp_path / "a.nii.gz").numpy(), np.moveaxis(data, -1, 0))


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
    np.testing.assert_array_equal(TiffReader().read(tmp_path / "a.tif")[0], lit)


def test_tiff_that_does_not_say_what_zero_is_has_it_black(tmp_path):
    grey = RNG.integers(0, 255, (4, 5), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", grey, photometric="minisblack")
    stored = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        tag = file.pages[0].tags["PhotometricInterpretation"]
    stored[tag.offset : tag.offset + 2] = (65000).to_bytes(2, "little")  # a private tag takes its place
    (tmp_path / "a.tif").write_bytes(stored)
    np.testing.assert_array_equal(load(tmp_path / "a.tif").numpy()[0].T, grey)


@pytest.mark.parametrize("kind", ["PALETTE", "SEPARATED"])
def test_tiff_that_is_neither_grey_nor_rgb_is_refused(tmp_path, kind):
    image = Image.new("RGB", (5, 4), (200, 40, 90))
    (image.quantize(2) if kind == "PALETTE" else image.convert("CMYK")).save(tmp_path / "a.tif")
    message = rf"cannot read .*a\.tif: its pixels are {kind}: convert it to grey or RGB"
    with pytest.raises(ValueError, match=message) as caught:
        load_error(tmp_path / "a.tif")
    assert "damaged" not in str(caught.value)


def test_tiff_pages_of_different_size(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for rows in (4, 5):
            file.write(np.zeros((rows, 6), np.uint8))
    with pytest.raises(ValueError, match=r"a\.tif has pages of different sizes, \[\(4, 6\), \(5, 6\)\]"):
        TiffReader().read(tmp_path / "a.tif")


def test_tiff_of_a_compression_that_is_not_installed_is_not_called_damaged(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", VOLUME[..., 0])

    def asarray(self):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", asarray)
    with pytest.raises(ValueError, match=r"cannot read .*a\.tif: its compression needs `pip install imagecodecs`"):
        load_error(tmp_path / "a.tif")


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3)])
def test_one_picture_gives_one_array_in_every_format(tmp_path, shape):
    picture = RNG.integers(0, 255, shape, dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    Image.fromarray(picture).save(tmp_path / "a.bmp")
    Image.fromarray(picture).save(tmp_path / "b.tif")
    tifffile.imwrite(tmp_path / "a.tif", picture)
    images = [load(tmp_path / name) for name in ("a.png", "a.bmp", "b.tif", "a.tif")]
    for image in images:
        assert image.shape == (1 if len(shape) == 2 else 3, 6, 4)
        np.testing.assert_array_equal(image.numpy(), picture[None].T.reshape(image.shape))
        np.testing.assert_array_equal(image.affine.numpy(), images[0].affine.numpy())
        assert tuple(image.meta["spatial_shape"]) == (6, 4)


def load_error(path):
    """Load, and raise what MONAI wrapped."""
    try:
        LoadImaged("image", reader="segbundles.data.SuffixReader")({"image": str(path)})
    except Exception as error:
        while error.__cause__ is not None and not str(error).startswith("cannot read"):
            error = error.__cause__
        raise error from None


def big(path):
    rng = np.random.default_rng(1)
    volume = rng.integers(0, 255, (40, 30, 20), dtype=np.uint8)
    if path.name.endswith((".nii", ".nii.gz")):
        nib.save(nib.Nifti1Image(volume, np.eye(4)), path)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, volume, photometric="minisblack")
    elif path.suffix in (".png", ".jpg"):
        Image.fromarray(volume[..., 0]).save(path)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(volume), str(path), useCompression="gz" in path.stem)
    return path


@pytest.mark.parametrize(
    "name", ["a.nrrd", "gz.nrrd", "a.mha", "a.nii", "a.nii.gz", "a.tif", "a.png", "a.jpg", "ö [x].nrrd"]
)
@pytest.mark.parametrize("kept", [0.6, 0.0])
def test_truncated_file_is_named(tmp_path, name, kept, capfd):
    path = big(tmp_path / name)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match=f"^cannot read {re.escape(str(path))}: it is truncated or damaged"):
        load_error(path)
    assert capfd.readouterr().err.count("\n") <= 2  # no page of warnings from a library


@pytest.mark.parametrize("name", ["a", "a.npy"])
def test_unknown_suffix(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(
        ValueError, match=rf"^cannot read .*{name}: its name must end in one of \.nii, \.nii\.gz, \.nrrd"
    ):
        load_error(tmp_path / name)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"^cannot read .*a\.nrrd: there is no such file"):
        load_error(tmp_path / "a.nrrd")


def test_several_files_for_one_image(tmp_path):
    with pytest.raises(ValueError, match=r"an image must be one file, got 2: stack the channels"):
        SuffixReader().read([tmp_path / "a.nrrd", tmp_path / "b.nrrd"])


def test_verify_suffix():
    assert SuffixReader().verify_suffix(["a.NII.GZ", "b.tiff", "c.jpeg"])
    assert not SuffixReader().verify_suffix(["a.nii.gz", "b.dcm"])
    assert SimpleITKReader().verify_suffix("x/a.mhd")
    assert not TiffReader().verify_suffix("a.nii.gz")


@pytest.mark.parametrize(
    ("name", "stem", "suffix"),
    [
        ("a.b.nii.gz", "a.b", ".nii.gz"),
        ("A.NII.GZ", "A", ".nii.gz"),
        ("x/é ü.1.NRRD", "é ü.1", ".nrrd"),
        ("a.gz", "a", ".gz"),
        ("plain", "plain", ""),
        (".nii.gz", "", ".nii.gz"),
    ],
)
def test_stem_and_suffix(name, stem, suffix):
    assert (file_stem(name), file_suffix(name)) == (stem, suffix)


def test_loadimage_logs_no_error_for_a_good_file(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load(big(tmp_path / "a.nii.gz"))
    assert not caplog.records


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
        nifti(path, np.diag([-0.5, -0.75, 2, 1]), data=data.reshape(shape))
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
    with pytest.raises(ValueError, match=f"^{re.escape(f'{tmp_path}/v.nii has size')}"):
        reader.get_data(reader.read([tmp_path / "v.nii", first]))
