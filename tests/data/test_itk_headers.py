from __future__ import annotations

import bz2
import re

import nrrd
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from segbundles.data import SimpleITKReader, SimpleITKWriter

SIZE = (5, 4, 3)
VOLUME = np.arange(60, dtype=np.uint8).reshape(SIZE)
TWO = np.stack([VOLUME, VOLUME[::-1]])
LPS = "space: left-posterior-superior"
STEPS = "space directions: (2,0,0) (0,3,0) (0,0,4)"
MM = "lengths must be in mm"
STEP = "the step along each axis must be a finite length above 0 (mm)"
SPACING = "each must be a finite number above 0 (mm)"
PLANE = "its axes must not be in one plane"
ONE = "a file must contain one volume"


def read(path):
    reader = SimpleITKReader()
    return reader.get_data(reader.read(path))


def write_nrrd(path, *lines, data=VOLUME):
    sizes = " ".join(map(str, data.shape))
    head = ["NRRD0005", "type: uint8", f"dimension: {data.ndim}", f"sizes: {sizes}", "encoding: raw", *lines, "", ""]
    path.write_bytes("\n".join(head).encode() + data.tobytes(order="F"))
    return path


def write_mha(path, *lines, data=VOLUME):
    sizes = " ".join(map(str, data.shape))
    head = ["ObjectType = Image", f"NDims = {data.ndim}", "BinaryData = True", f"DimSize = {sizes}"]
    head += ["ElementType = MET_UCHAR", *lines, "ElementDataFile = LOCAL", ""]
    path.write_bytes("\n".join(head).encode() + data.tobytes(order="F"))
    return path


def refused(path, said, why):
    with pytest.raises(ValueError, match=re.escape(f"cannot read {path}: its header says '{said}', but {why}")):
        read(path)


@pytest.mark.parametrize(
    ("lines", "said", "why"),
    [
        (["spacings: 2 2 nan"], "spacings: 2 2 nan", SPACING),
        (["spacings: 2 0 2"], "spacings: 2 0 2", SPACING),
        (["spacings: -2 2 2"], "spacings: -2 2 2", SPACING),
        (["spacings: 2 inf 2"], "spacings: 2 inf 2", SPACING),
        (["spacings: 2 2"], "spacings: 2 2", "it must have 3 values"),
        (["spacings: 2 2 x"], "spacings: 2 2 x", "'x' is not a number"),
        (["axis mins: 0 0 0", "axis maxs: 9 9 9"], "axis maxs: 9 9 9", "the spacings are missing (mm)"),
        ([LPS, "space directions: (2,0,0) (0,2,0) (0,0,0)"], "space directions: (2,0,0) (0,2,0) (0,0,0)", STEP),
        ([LPS, "space directions: (2,0,0) (0,nan,0) (0,0,3)"], "space directions: (2,0,0) (0,nan,0) (0,0,3)", STEP),
        ([LPS, "space directions: (2,0,0) (0,2,0) (0,0,3e300)"], "space directions: (2,0,0) (0,2,0) (0,0,3e300)", STEP),
        ([LPS, "space directions: (2,0,0) (2,1e-9,0) (0,0,3)"], "space directions: (2,0,0) (2,1e-9,0) (0,0,3)", PLANE),
        (
            [LPS, "space directions: (2,0,0) (0,2,0) none"],
            "space directions: (2,0,0) (0,2,0) none",
            "each of the 3 axes",
        ),
        ([LPS, STEPS, "space origin: (1,nan,3)"], "space origin: (1,nan,3)", "each value must be a finite number"),
        ([LPS, STEPS, 'space units: "cm" "cm" "cm"'], "space units: cm cm cm", MM),
        ([LPS, STEPS, 'space units: "mm" "mm" "m"'], "space units: mm mm m", MM),
        ([LPS, STEPS, 'spaceunits: "cm" "cm" "cm"'], "space units: cm cm cm", MM),
        ([LPS, STEPS, 'SpaceUnits: "m" "m" "m"'], "space units: m m m", MM),
        ([LPS, "spacedirections: (2,0,0) (0,nan,0) (0,0,3)"], "space directions: (2,0,0) (0,nan,0) (0,0,3)", STEP),
        ([LPS, "spacedirections: (2,0,0) (0,2,0) (0,0,0)"], "space directions: (2,0,0) (0,2,0) (0,0,0)", STEP),
        ([LPS, STEPS, "spaceorigin: (1,nan,3)"], "space origin: (1,nan,3)", "each value must be a finite number"),
        (["spacedimension: 4", STEPS], "space dimension: 4", "the file has 3 axes of space"),
        (["Spacings: 1 1 1", 'UNITS: "um" "um" "um"'], "units: um um um", MM),
        (["spacings: 1 1 1", 'units: "mm" "mm" "s"'], "units: mm mm s", MM),
        ([LPS, STEPS, "space units: mm mm mm"], "space units: mm mm mm", "each unit must be in quotes"),
        (["space: RPS", STEPS], "space: RPS", "it must be a space of three dimensions that NRRD defines"),
        (["space: LPST", STEPS], "space: LPST", "it must be a space of three dimensions that NRRD defines"),
        (["space dimension: 4", STEPS], "space dimension: 4", "the file has 3 axes of space"),
        (["kinds: space space time", "spacings: 1 1 1"], "kinds: space space time", ONE),
    ],
)
def test_nrrd_that_itk_would_misread_is_refused(tmp_path, lines, said, why):
    refused(write_nrrd(tmp_path / "a.nrrd", *lines), said, why)


@pytest.mark.parametrize(
    ("lines", "said", "why"),
    [
        (["spacings: 1 2 3 4"], "sizes: 2 5 4 3", ONE),
        ([LPS, "space directions: none (2,0,0) (0,2,0) (0,0,3)"], "sizes: 2 5 4 3", ONE),
        (["kinds: complex space space space"], "kinds: complex space space space", "complex numbers"),
        (["kinds: 2D-symmetric-matrix space space space"], "kinds: 2D-symmetric-matrix space space space", "only grey"),
    ],
)
def test_nrrd_with_four_axes_is_refused_unless_one_is_channels(tmp_path, lines, said, why):
    refused(write_nrrd(tmp_path / "a.nrrd", *lines, data=TWO), said, why)


@pytest.mark.parametrize("kind", ["list", "vector", "2-vector"])
@pytest.mark.parametrize("axis", [0, 3])
def test_nrrd_channels_are_the_axis_of_another_kind(tmp_path, kind, axis):
    kinds, steps = ["domain"] * 3, ["(2,0,0)", "(0,3,0)", "(0,0,4)"]
    kinds.insert(axis, kind)
    steps.insert(axis, "none")
    path = write_nrrd(
        tmp_path / "a.nrrd",
        *(LPS, f"kinds: {' '.join(kinds)}", f"space directions: {' '.join(steps)}"),
        data=np.moveaxis(TWO, 0, axis),
    )
    array, meta = read(path)
    np.testing.assert_array_equal(array, np.moveaxis(TWO, 0, -1))
    np.testing.assert_array_equal(array, np.moveaxis(nrrd.read(str(path))[0], axis, -1))
    np.testing.assert_array_equal(meta["affine"], np.diag([-2.0, -3, 4, 1]))
    assert meta["original_channel_dim"] == -1


@pytest.mark.parametrize(
    "line",
    ['space units: "mm" "MM" "millimeters"', 'spaceunits: "mm" "mm" "mm"', 'space units: "" "" ""', "old min: 0"],
)
def test_nrrd_in_mm_is_read(tmp_path, line):
    array, meta = read(write_nrrd(tmp_path / "a.nrrd", LPS, STEPS, line))
    np.testing.assert_array_equal(array, VOLUME)
    np.testing.assert_array_equal(meta["affine"], np.diag([-2.0, -3, 4, 1]))
    assert "notes" not in meta


def test_nrrd_field_names_may_be_without_blanks(tmp_path):
    lines = [STEPS.replace(" ", "", 1), "spaceorigin: (5,6,7)", 'spaceunits: "mm" "mm" "mm"']
    array, meta = read(write_nrrd(tmp_path / "a.nrrd", LPS, *lines))
    np.testing.assert_array_equal(array, VOLUME)
    np.testing.assert_array_equal(meta["affine"], [[-2, 0, 0, -5], [0, -3, 0, -6], [0, 0, 4, 7], [0, 0, 0, 1]])
    assert "notes" not in meta


@pytest.mark.parametrize(
    ("write", "lines"),
    [
        ("nrrd", []),
        ("nrrd", ["thicknesses: 2 2 2"]),
        ("nrrd", ["axis mins: 0 0 0"]),
        ("mha", []),
        ("mha", ["Offset = 0 0 0"]),
    ],
)
def test_a_spacing_that_is_missing_gets_a_note(tmp_path, write, lines):
    array, meta = read({"nrrd": write_nrrd, "mha": write_mha}[write](tmp_path / f"a.{write}", *lines))
    np.testing.assert_array_equal(array, VOLUME)
    np.testing.assert_array_equal(meta["affine"], np.diag([-1.0, -1, 1, 1]))
    assert meta["notes"] == "no spacing in the header: 1 mm assumed"


@pytest.mark.parametrize("name", ["bzip2", "BZ2"])
def test_nrrd_with_bzip2_is_refused(tmp_path, name):
    path = write_nrrd(tmp_path / "a.nrrd", "spacings: 1 1 1")
    head, _, body = path.read_bytes().partition(b"\n\n")
    path.write_bytes(head.replace(b"encoding: raw", f"encoding: {name}".encode()) + b"\n\n" + bz2.compress(body))
    refused(path, f"encoding: {name}", "bzip2 is not supported: save the file with gzip or raw encoding.")


@pytest.mark.parametrize("space", ["scanner-xyz", "3D-right-handed", None])
def test_nrrd_that_does_not_relate_to_the_patient_gets_a_note(tmp_path, space):
    _, meta = read(write_nrrd(tmp_path / "a.nrrd", f"space: {space}" if space else "space dimension: 3", STEPS))
    np.testing.assert_array_equal(meta["affine"], np.diag([-2.0, -3, 4, 1]))
    assert (
        meta["notes"] == f"the header does not relate its axes to the patient (space: {space or 'none'}): read as LPS"
    )


@pytest.mark.parametrize(
    ("lines", "said", "why"),
    [
        (["ElementSpacing = nan 3 4"], "ElementSpacing = nan 3 4", SPACING),
        (["ElementSpacing = 0 3 4"], "ElementSpacing = 0 3 4", SPACING),
        (["ElementSpacing=-2 3 4"], "ElementSpacing = -2 3 4", SPACING),
        (["ElementSpacing : 2 3"], "ElementSpacing = 2 3", "it must have 3 values"),
        (["ElementSpacing = 2, 3, 4"], "ElementSpacing = 2, 3, 4", "'2,' is not a number"),
        (["ElementSize = 1 1 inf"], "ElementSize = 1 1 inf", SPACING),
        (["TransformMatrix = 1 0 0 0 1 0 0 0 0"], "TransformMatrix = 1 0 0 0 1 0 0 0 0", STEP),
        (["TransformMatrix = 1 0 0 1 0 0 0 0 1"], "TransformMatrix = 1 0 0 1 0 0 0 0 1", PLANE),
        (["Rotation = 2 0 0 0 2 0 0 0 2"], "Rotation = 2 0 0 0 2 0 0 0 2", "each direction must have length 1"),
        (["Offset = 1 nan 3"], "Offset = 1 nan 3", "each value must be a finite number"),
        (["DistanceUnits = cm"], "DistanceUnits = cm", MM),
        (["NDims = 99999"], "NDims = 99999", "DimSize has 3 values"),
        (["DistanceUnits = um"], "DistanceUnits = um", MM),
        (["elementspacing = nan 2 3"], "elementspacing = nan 2 3", "the name of this field must be written ElementSp"),
        (["ELEMENTSIZE = 2 2 3"], "ELEMENTSIZE = 2 2 3", "the name of this field must be written ElementSize"),
        (["offset = 1 2 3"], "offset = 1 2 3", "the name of this field must be written Offset"),
        (["distanceunits = cm"], "distanceunits = cm", "the name of this field must be written DistanceUnits"),
        (["HeaderSize = 4"], "HeaderSize = 4", "the header has 126 bytes, so leave this field out"),
    ],
)
def test_metaimage_that_itk_would_misread_is_refused(tmp_path, capfd, lines, said, why):
    refused(write_mha(tmp_path / "a.mha", *lines), said, why)
    assert not capfd.readouterr().err


def test_metaimage_ignores_other_fields(tmp_path):
    """SimpleITK writes what a person adds to the metadata as fields of any name."""
    image = sitk.GetImageFromArray(VOLUME.T)
    for name in ("offset", "origin", "elementspacing", "Scanner Name"):
        image.SetMetaData(name, "9 9 9")
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    assert b"elementspacing = 9 9 9" in (tmp_path / "a.mha").read_bytes()
    array, meta = read(tmp_path / "a.mha")
    np.testing.assert_array_equal(array, VOLUME)
    np.testing.assert_array_equal(meta["affine"], np.diag([-1.0, -1, 1, 1]))
    assert "notes" not in meta


TRUNCATED = {
    "local": "its header describes 60 bytes of voxels, but it contains 51",
    "raw": "its header describes 60 bytes of voxels, but it contains 51",
    "list": "its header describes 20 bytes of voxels, but 2.raw contains 11",
    "text": "its header describes 60 numbers of voxels, but it contains 51",
    "compressed": "its compressed data ends too early",
    "damaged": "its compressed data cannot be decompressed",
    "type": "its header has no ElementType",
    "letters": "ITK cannot read its header or its voxels",
}


@pytest.mark.parametrize("kind", TRUNCATED)
def test_truncated_metaimage_says_what_is_missing(tmp_path, kind, capfd):
    """ITK reads noise if compressed data is damaged."""
    path = tmp_path / "a.mhd"
    image = sitk.GetImageFromArray(VOLUME.T)
    if kind in ("compressed", "damaged"):
        sitk.WriteImage(image, str(path), True)
        data = bytearray((tmp_path / "a.zraw").read_bytes())
        data[-20:] = b"" if kind == "compressed" else b"\0" * 20
        (tmp_path / "a.zraw").write_bytes(data)
    elif kind in ("local", "text", "type", "letters"):
        path = write_mha(tmp_path / "a.mha")
        head, body = path.read_bytes()[:-60], path.read_bytes()[-60:-9]
        if kind == "text":
            head, body = head.replace(b"BinaryData = True", b"BinaryData = False"), " ".join(map(str, body)).encode()
        if kind == "letters":
            head, body = head.replace(b"BinaryData = True", b"BinaryData = False"), b"x " * 60
        path.write_bytes(head.replace(b"ElementType", b"Type") + body if kind == "type" else head + body)
    else:
        sitk.WriteImage(image, str(path))
        data = (tmp_path / "a.raw").read_bytes()
        (tmp_path / "a.raw").write_bytes(data[:51])
        if kind == "list":
            path.write_text(path.read_text().replace("a.raw", "LIST\n0.raw\n1.raw\n2.raw"))
            for k in range(3):
                (tmp_path / f"{k}.raw").write_bytes(data[20 * k : 20 * k + (11 if k == 2 else 20)])
    with pytest.raises(ValueError, match=re.escape(f"{path}: it is truncated or damaged ({TRUNCATED[kind]}).")):
        read(path)
    if kind != "letters":
        printed = capfd.readouterr()
        assert "MetaImage" not in printed.out + printed.err
        assert "Uncompress" not in printed.out + printed.err


@pytest.mark.parametrize("line", ["DistanceUnits = mm", "DistanceUnits = ?", "ElementSize = 2 3 4"])
def test_metaimage_in_mm_is_read(tmp_path, line):
    array, meta = read(write_mha(tmp_path / "a.mha", line))
    np.testing.assert_array_equal(array, VOLUME)
    steps = (2.0, 3, 4) if "Size" in line else (1.0, 1, 1)
    np.testing.assert_array_equal(meta["affine"], np.diag([-steps[0], -steps[1], steps[2], 1]))


def test_metaimage_with_a_fourth_axis_must_be_one_volume(tmp_path):
    array, meta = read(write_mha(tmp_path / "a.mha", "ElementSpacing = 2 3 4 1", data=VOLUME[..., None]))
    np.testing.assert_array_equal(array, VOLUME)
    np.testing.assert_array_equal(meta["affine"], np.diag([-2.0, -3, 4, 1]))
    assert tuple(meta["spatial_shape"]) == SIZE
    refused(write_mha(tmp_path / "b.mha", data=np.stack([VOLUME] * 2, -1)), "DimSize = 5 4 3 2", ONE)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_axes_that_are_not_perpendicular_are_kept_and_noted(tmp_path, suffix):
    affine = np.array([[-2, -0.5, 0, 1], [0, -2, 0, 2], [0, 0, 3.0, 3], [0, 0, 0, 1]])
    for name in ("a", "b"):  # a written by hand in the format's own way, b by the writer
        writer = SimpleITKWriter()
        writer.set_data_array(VOLUME, channel_dim=None)
        writer.set_metadata({"affine": affine})
        writer.write(tmp_path / f"{name}{suffix}")
    if suffix == ".nrrd":
        header = {
            "space": "LPS",
            "space directions": [[2, 0, 0], [0.5, 2, 0], [0, 0, 3.0]],
            "space origin": [-1, -2, 3],
        }
        nrrd.write(str(tmp_path / "a.nrrd"), VOLUME, header)
    for name in ("a", "b"):
        array, meta = read(tmp_path / f"{name}{suffix}")
        np.testing.assert_array_equal(array, VOLUME)
        np.testing.assert_allclose(meta["affine"], affine, rtol=0, atol=1e-12)
        assert meta["notes"] == "axes at 76 degrees instead of 90: lengths and volumes are approximate"


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int8, np.float64])
@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd", ".nhdr"])
def test_every_type_of_number_is_read(tmp_path, suffix, dtype):
    sitk.WriteImage(sitk.GetImageFromArray(VOLUME.T.astype(dtype)), str(tmp_path / f"a{suffix}"), True)
    array, _ = read(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(array, VOLUME)


def test_complex_numbers_are_refused(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(VOLUME.T.astype(np.complex64)), str(tmp_path / "a.nrrd"))
    with pytest.raises(ValueError, match=r"complex numbers.*save the magnitude"):
        read(tmp_path / "a.nrrd")


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
@pytest.mark.parametrize("listed", ["single", "LIST", "%d"])
def test_a_missing_data_file_is_named(tmp_path, suffix, listed):
    sizes = ("DimSize = 5 4 3" if suffix == ".mhd" else "sizes: 5 4 3").split(" ", 1)
    lines = ["NRRD0005", "type: uint8", "dimension: 3", " ".join(sizes), "encoding: raw"]
    if suffix == ".mhd":
        lines = ["ObjectType = Image", "NDims = 3", " ".join(sizes), "ElementType = MET_UCHAR"]
    field = "ElementDataFile = " if suffix == ".mhd" else "data file: "
    value = {"single": "s 2.raw", "LIST": "LIST 2\ns 0.raw\ns 1.raw\ns 2.raw", "%d": "s%d.raw 0 2 1"}[listed]
    path = tmp_path / f"a{suffix}"
    path.write_text("\n".join([*lines, field + value, ""]))
    missing = "s2.raw" if listed == "%d" else "s 2.raw"
    for k in range(2):
        (tmp_path / missing.replace("2", str(k))).write_bytes(VOLUME[..., k].tobytes(order="F"))
    shown = value.splitlines()[0]
    refused(path, field + shown, f"there is no such file {tmp_path / missing}.")
    (tmp_path / missing).write_bytes((VOLUME if listed == "single" else VOLUME[..., 2]).tobytes(order="F"))
    np.testing.assert_array_equal(read(path)[0], VOLUME)
