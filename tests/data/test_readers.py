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
from dicom_series import write_series
from monai.transforms import EnsureChannelFirstd, LoadImaged
from PIL import Image
from scipy.spatial.transform import Rotation

from segbundles.data import PictureReader, SimpleITKReader, SuffixReader, file_stem, file_suffix
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
    assert image.meta["notes"] == "no spacing in the header: 1 mm assumed"


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


def test_itk_2d_is_read_and_4d_refused(tmp_path):
    flat = sitk.GetImageFromArray(VOLUME[..., 0].T)
    flat.SetSpacing([0.5, 2.0])
    flat.SetOrigin([3.0, 4.0])
    sitk.WriteImage(flat, str(tmp_path / "flat.mha"))
    array, meta = SimpleITKReader().get_data(SimpleITKReader().read(tmp_path / "flat.mha"))
    np.testing.assert_array_equal(array, VOLUME[..., 0])
    np.testing.assert_array_equal(meta["affine"], [[-0.5, 0, -3], [0, -2, -4], [0, 0, 1]])
    series = sitk.JoinSeries([sitk.GetImageFromArray(VOLUME.T)] * 2)
    sitk.WriteImage(series, str(tmp_path / "series.nrrd"))
    with pytest.raises(
        ValueError, match=r"series\.nrrd: its header says 'sizes: 5 4 3 2', but a file must contain one"
    ):
        load_error(tmp_path / "series.nrrd")


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
        (
            None,
            None,
            {"pixdim": (1, np.nan, 2, 3, 1, 1, 1, 1)},
            "its qform has spacing (nan, 2, 3) mm, its pixdim (nan",
        ),
        (
            [[2, 2, 0, 0], [0, 0, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]],
            None,
            {"pixdim": (1, 2, 2, 3, 1, 1, 1, 1)},
            "its affine is (2, 2, 0, 0) (0, 0, 0, 0) (0, 0, 3, 0), but its axes must not be in one plane: correct",
        ),
        (
            [[1, 0, 0, np.inf], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
            None,
            {"pixdim": np.ones(8)},
            "its affine is (1, 0, 0, inf) (0, 1, 0, 0) (0, 0, 1, 0), but each value must be finite: correct",
        ),
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


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (108, b"\0\0\0\0", "its vox_offset is 0, but must be at least 352."),  # nibabel reads the header as values
        (40, b"\7\0\5\0\4\0\3\0\0\0", "its dim is (7, 5, 4, 3, 0, 1, 1, 1), but an image has at least two axes"),
        (40, b"\1\0", "its dim is (1, 5, 4, 3, 1, 1, 1, 1), but an image has at least two axes"),
        (80, b"\0\0\0\0", "its sform has spacing (0.7, 0.8, 1.6) mm, its pixdim (0, 0.8, 1.6) mm: correct the header"),
        (254, b"\x4d", "its sform_code is 77, which NIfTI does not define: correct the header"),
        (344, b"\0", "it is truncated or damaged (Cannot work out file type"),  # Analyze
        (40, b"\3\0" + b"\xff\x7f" * 3, "it "),  # 35 terabytes
    ],
)
def test_nifti_of_odd_layout_is_refused(tmp_path, place, value, message):
    path = nifti(tmp_path / "a.nii", RAS)
    whole = bytearray(path.read_bytes())
    whole[place : place + len(value)] = value
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=f"^{re.escape(f'cannot read {path}: {message}')}"):
        load_error(path)


def test_nifti_with_seven_axes_of_which_three_count(tmp_path):
    image = load(nifti(tmp_path / "a.nii", RAS, data=VOLUME.reshape(*SIZE, 1, 1, 1, 1)))
    np.testing.assert_array_equal(image.numpy(), VOLUME[None])


@pytest.mark.parametrize("colours", ["RGB", "RGBA"])
def test_nifti_colours_are_channels(tmp_path, colours):
    data = np.zeros(SIZE, [(name, "u1") for name in colours])
    for k, name in enumerate(colours):
        data[name] = VOLUME // (k + 1)
    image = load(nifti(tmp_path / "a.nii.gz", RAS, data=data))
    assert image.shape == (len(colours), *SIZE)
    np.testing.assert_array_equal(image.numpy(), [VOLUME // (k + 1) for k in range(len(colours))])
    np.testing.assert_allclose(image.affine, RAS, rtol=0, atol=1e-5)


def test_nifti_of_complex_numbers_is_refused(tmp_path):
    path = nifti(tmp_path / "a.nii", RAS, data=VOLUME.astype(np.complex64))
    with pytest.raises(ValueError, match=r"a\.nii: it contains complex numbers: save the magnitude\.$"):
        load_error(path)


def test_nifti_with_sheared_axes_gets_a_note(tmp_path):
    affine = np.array([[2, 0.5, 0, 0], [0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])
    _, meta = read(nifti(tmp_path / "a.nii", affine, pixdim=(1, 2, np.sqrt(4.25), 3, 1, 1, 1, 1)))
    np.testing.assert_array_equal(meta["affine"], affine)
    assert meta["notes"] == "axes at 76 degrees instead of 90: lengths and volumes are approximate"


@pytest.mark.parametrize(("shape", "channels"), [((*SIZE, 2), 2), ((*SIZE, 1), 1), ((*SIZE, 1, 3), None)])
def test_nifti_channels_are_the_last_axis(tmp_path, shape, channels):
    data = RNG.integers(0, 255, shape, dtype=np.uint8)
    array, meta = read(nifti(tmp_path / "a.nii.gz", RAS, data=data))
    assert meta["original_channel_dim"] == -1
    assert tuple(meta["spatial_shape"]) == SIZE
    np.testing.assert_array_equal(array, data)
    if channels:
        np.testing.assert_array_equal(load(tmp_path / "a.nii.gz").numpy(), np.moveaxis(data, -1, 0))


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
    printed = capfd.readouterr()
    assert printed.err.count("\n") <= 2  # no page of warnings from a library
    assert "MetaImage" not in printed.out + printed.err


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


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
def test_several_files_are_channels(tmp_path, suffix):
    affine = np.diag([2.0, 3, 4, 1])
    paths = []
    for k in range(3):
        paths.append(tmp_path / f"{k}{suffix}")
        data = (VOLUME // (k + 1)).astype([np.uint8, np.int16, np.float32][k])
        if suffix == ".mha":
            written = sitk.GetImageFromArray(data.T)
            written.SetSpacing((2, 3, 4))
            written.SetOrigin((0, 0, 0.1 * k))  # less than a tenth of a voxel
            sitk.WriteImage(written, str(paths[k]))
        else:
            nifti(paths[k], affine, data=data[..., None] if k == 1 else data)
    image = load(paths)
    assert image.shape == (3, *SIZE)
    np.testing.assert_array_equal(image.numpy(), [VOLUME // (k + 1) for k in range(3)])
    np.testing.assert_array_equal(np.abs(image.affine), affine)
    assert tuple(image.meta["spatial_shape"]) == SIZE
    assert image.meta["filename_or_obj"] == str(paths[0])


@pytest.mark.parametrize(
    ("data", "affine", "message"),
    [
        (VOLUME[1:], RAS, "/b.nii and .*/a.nii are channels of one image but differ in size or position: resample"),
        (VOLUME, RAS + np.diag([0, 0, 0.1, 0]), "/b.nii and .*/a.nii are channels of one image but differ in size or"),
        (VOLUME, LAS, "/b.nii and .*/a.nii are channels of one image but differ in size or position"),
        (np.stack([VOLUME] * 2, -1), RAS, "/b.nii has 2 channels but is one of 2 files, one per channel"),
    ],
)
def test_channels_on_different_grids_are_refused(tmp_path, data, affine, message):
    paths = [nifti(tmp_path / "a.nii", RAS), nifti(tmp_path / "b.nii", affine, data=data)]
    reader = SuffixReader()
    with pytest.raises(ValueError, match=message):
        reader.get_data(reader.read(paths))


def test_channels_keep_all_notes(tmp_path):
    paths = [
        write_nrrd(tmp_path / f"{k}.nrrd", f"space: {k}D-right-handed", vectors(np.eye(3).tolist())) for k in (3, 3)
    ]
    write_nrrd(tmp_path / "b.nrrd", "space dimension: 3", vectors(np.eye(3).tolist()))
    reader = SuffixReader()
    _, meta = reader.get_data(reader.read([paths[0], tmp_path / "b.nrrd"]))
    said = "the header does not relate its axes to the patient (space: {}): read as LPS"
    assert meta["notes"] == f"{said.format('3D-right-handed')}; {said.format('none')}"


def damaged_tiff(folder):
    tifffile.imwrite(folder / "a.tif", RNG.integers(0, 255, (40, 50), dtype=np.uint8))
    (folder / "a.tif").write_bytes((folder / "a.tif").read_bytes()[:1500])
    return folder / "a.tif"


def series_with_a_gap(folder):
    write_series(folder / "series", VOLUME.astype(np.int16).repeat(2, axis=2), RAS)
    sorted((folder / "series").iterdir())[2].unlink()
    return folder / "series"


@pytest.mark.parametrize(
    ("reader", "make", "message"),
    [
        ("PictureReader", damaged_tiff, "it"),
        ("DicomReader", series_with_a_gap, "a slice is missing"),
        ("NiftiReader", lambda folder: nifti(folder / "a.nii", RAS, LAS), "its sform puts voxel"),
        ("SimpleITKReader", lambda folder: write_nrrd(folder / "a.nrrd", "spacings: 1 1 nan"), "its header says"),
    ],
)
def test_monais_own_readers_are_not_tried(tmp_path, reader, make, message):
    path = make(tmp_path)
    load = LoadImaged("image", reader=f"segbundles.data.{reader}")
    with pytest.raises(ValueError, match=f"^{re.escape(f'cannot read {path}: ')}.*{message}"):
        load({"image": str(path)})


def test_verify_suffix():
    assert SuffixReader().verify_suffix(["a.NII.GZ", "b.tiff", "c.jpeg"])
    assert not SuffixReader().verify_suffix(["a.nii.gz", "b.dcm"])
    assert SimpleITKReader().verify_suffix("x/a.mhd")
    assert not PictureReader().verify_suffix("a.nii.gz")


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
