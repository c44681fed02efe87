from __future__ import annotations

import json
import locale
import logging
import os
import re
import threading
from itertools import permutations, product
from pathlib import Path

import highdicom
import imagecodecs
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from dicom_series import MR, PATIENT, PATIENT_ID, write_enhanced, write_series, write_slice
from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Orientation
from scipy.spatial.transform import Rotation

from segbundles.data import Datalist, DicomReader, FolderImages, StackReader, SuffixReader, is_dicom_slice
from segbundles.itk import quiet_itk
from segbundles.meta import notes_of

VOLUME = np.random.default_rng(0).integers(-500, 500, (5, 6, 4)).astype(np.int16)
# sagittal: columns run to the back, rows down, slices to the left, with spacing 0.7, 1.3 and 3
SAGITTAL = np.array([[0, 0, -3.0, 60], [-0.7, 0, 0, 40], [0, -1.3, 0, 80], [0, 0, 0, 1]])
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", (20, -35, 50), degrees=True).as_matrix() @ np.diag([0.7, 1.3, 2.5])
OBLIQUE[:3, 3] = (3, -20, 7)


def read(folder: Path, notes: str = "") -> tuple[np.ndarray, np.ndarray]:
    reader = DicomReader()
    array, meta = reader.get_data(reader.read(folder))
    grid = {"original_affine", "affine", "space", "spatial_shape", "original_channel_dim"}
    assert meta.keys() - {"notes"} == grid
    assert notes_of(meta) == notes
    return array, meta["affine"]


def refusal(path: Path, series: object = None) -> str:
    reader = DicomReader(series)
    with pytest.raises(ValueError, match=re.escape(f"cannot read {path}: ")) as caught:
        reader.get_data(reader.read(path))
    return str(caught.value)


def test_the_tags_of_a_sagittal_series_give_this_affine(tmp_path: Path) -> None:
    """By hand: in DICOM's axes, left and back are positive, and the first slice lies at x = -60."""
    for k in range(3):
        write_slice(
            tmp_path / f"IM{k}",
            VOLUME[:, :, k].T,
            ImagePositionPatient=[-60.0 + 3 * k, -40.0, 80.0],
            ImageOrientationPatient=[0, 1, 0, 0, 0, -1],
            PixelSpacing=[1.3, 0.7],
        )
    array, affine = read(tmp_path)
    # y cross -z is -x: slices are counted from the left, and the last file comes first
    expected = np.array([[0, 0, 3.0, 54], [-0.7, 0, 0, 40], [0, -1.3, 0, 80], [0, 0, 0, 1]])
    np.testing.assert_allclose(affine, expected, atol=1e-12)
    np.testing.assert_array_equal(array, VOLUME[:, :, 2::-1])
    assert array.dtype == np.float32


@pytest.mark.parametrize(
    "names", [None, ["d.dcm", "b.DCM", "a.dcm", "c.dcm"], ["IM10", "IM9", "IM1", "IM100"], ["1.2.4", "1.2.3", "2", "z"]]
)
def test_an_oblique_series_is_where_itk_puts_it(names: list[str] | None, tmp_path: Path) -> None:
    write_series(tmp_path, VOLUME, OBLIQUE, names)
    array, affine = read(tmp_path)
    np.testing.assert_array_equal(array, VOLUME)
    np.testing.assert_allclose(affine, OBLIQUE, atol=1e-7)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    image = reader.Execute()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, array)
    for index in ((0, 0, 0), (4, 5, 3), (1, 4, 2)):
        x, y, z = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose((affine @ [*index, 1])[:3], (-x, -y, z), atol=1e-6)


@pytest.mark.parametrize("reader", [SuffixReader, StackReader])
def test_monai_loads_a_folder_through_the_other_readers(reader: type, tmp_path: Path) -> None:
    write_series(tmp_path / "t1.3d", VOLUME, SAGITTAL)
    image = LoadImage(reader=reader)(tmp_path / "t1.3d")
    assert image.shape == VOLUME.shape
    assert image.meta["filename_or_obj"] == str(tmp_path / "t1.3d")
    assert image.meta.get("has_spacing", True)
    np.testing.assert_allclose(np.linalg.norm(image.affine[:3, :3], axis=0), (0.7, 1.3, 3.0), atol=1e-6)
    assert not any(secret in repr(image.meta) for secret in (PATIENT, PATIENT_ID))


def test_values_are_rescaled_slice_by_slice_and_inverted_where_0_is_white(tmp_path: Path) -> None:
    stored = (VOLUME + 500).astype(np.uint16)
    for k in range(4):
        rescale = {"RescaleSlope": 0.5 + k, "RescaleIntercept": -10.25}
        write_series(tmp_path / "all", stored, OBLIQUE, **rescale)
        write_series(tmp_path / "mixed", stored[:, :, : 4 - k], OBLIQUE, **rescale)
    np.testing.assert_array_equal(read(tmp_path / "all")[0], stored * 3.5 - 10.25)
    np.testing.assert_array_equal(read(tmp_path / "mixed")[0], stored * [3.5, 2.5, 1.5, 0.5] - 10.25)
    write_series(tmp_path / "all", stored, OBLIQUE, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11)
    np.testing.assert_array_equal(read(tmp_path / "all")[0], 4095 - stored.astype(np.float32))


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("syntax", ["", ".1", ".2"], ids=["implicit", "explicit", "big endian"])
@pytest.mark.parametrize(
    ("dtype", "first", "kind"), [(np.uint16, 100, "OW"), (np.int16, -300, "OW"), (np.int16, 5, "US")]
)
def test_a_modality_lut_gives_the_grey_levels(
    dtype: type, first: int, kind: str, syntax: str, inverted: bool, tmp_path: Path
) -> None:
    stored = (VOLUME + (500 if dtype is np.uint16 else 0)).astype(dtype)
    levels = (np.arange(600)[::-1] * 5 + 7).astype(np.uint16)  # 12 bits
    order = ">" if syntax == ".2" else "<"
    for path in write_series(tmp_path, stored, OBLIQUE, PhotometricInterpretation=f"MONOCHROME{1 if inverted else 2}"):
        file = pydicom.dcmread(path)
        table = pydicom.Dataset()
        table.add_new("LUTDescriptor", "SS" if dtype is np.int16 else "US", [600, first, 12])
        data = levels.astype(f"{order}u2").tobytes() if kind == "OW" else levels.tolist()
        table.add_new("LUTData", kind, data)
        file.ModalityLUTSequence = pydicom.Sequence([table])
        file.PixelData = np.frombuffer(file.PixelData, "<u2").astype(f"{order}u2").tobytes()
        save_as(file, path, syntax)
    # values outside the table get its first and last level
    expected = levels[np.clip(stored.astype(int) - first, 0, 599)].astype(int)
    np.testing.assert_array_equal(read(tmp_path)[0], 4095 - expected if inverted else expected)


def save_as(file: pydicom.Dataset, path: Path, syntax: str) -> None:
    file.file_meta.TransferSyntaxUID = f"1.2.840.10008.1.2{syntax}"
    if hasattr(pydicom.Dataset, "original_encoding"):
        pydicom.dcmwrite(path, file, implicit_vr=not syntax, little_endian=syntax != ".2")
    else:  # pydicom 2
        file.is_implicit_VR, file.is_little_endian = not syntax, syntax != ".2"
        file.save_as(path)


@pytest.mark.parametrize("kind", ["OB", "OW"])
@pytest.mark.parametrize("syntax", ["", ".1", ".2"], ids=["implicit", "explicit", "big endian"])
def test_8_bits_in_every_order_of_bytes(kind: str, syntax: str, tmp_path: Path) -> None:
    stored = (VOLUME % 256).astype(np.uint8)
    for path, plane in zip(write_series(tmp_path, stored, OBLIQUE), stored.transpose(2, 1, 0), strict=True):
        file = pydicom.dcmread(path)
        swapped = (syntax, kind) == (".2", "OW")
        data = plane.tobytes()
        file.add_new("PixelData", kind, np.frombuffer(data, "<u2").byteswap().tobytes() if swapped else data)
        save_as(file, path, syntax)
        np.testing.assert_array_equal(pydicom.dcmread(path).pixel_array, plane)
    np.testing.assert_array_equal(read(tmp_path)[0], stored)


@pytest.mark.parametrize(
    ("keyword", "kind", "message"),
    [
        ("FloatPixelData", "f4", "IM0001 has its pixels in FloatPixelData, which is not supported: convert the series"),
        ("DoubleFloatPixelData", "f8", "IM0001 has BitsAllocated 64, BitsStored 64 and HighBit 63, which is not supp"),
    ],
    ids=["32", "64"],
)
def test_floating_point_pixels_are_named(keyword: str, kind: str, message: str, tmp_path: Path) -> None:
    for path in write_series(tmp_path, VOLUME, OBLIQUE):
        file = pydicom.dcmread(path)
        setattr(file, keyword, file.pixel_array.astype(kind).tobytes())
        file.BitsAllocated = 8 * np.dtype(kind).itemsize
        del file.PixelData, file.BitsStored, file.HighBit, file.PixelRepresentation
        file.save_as(path)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize("suffix", ["", ".dcm"])
@pytest.mark.parametrize("start", [0, 128, 132], ids=["whole", "data set", "group 2"])
@pytest.mark.parametrize("syntax", ["", ".1", ".2"], ids=["implicit", "explicit", "big endian"])
def test_files_without_a_preamble_are_read(syntax: str, start: int, suffix: str, tmp_path: Path) -> None:
    for k, path in enumerate(write_series(tmp_path, VOLUME, OBLIQUE)):
        file = pydicom.dcmread(path)
        file.PixelData = VOLUME[:, :, k].T.astype(">i2" if syntax == ".2" else "<i2").tobytes()
        save_as(file, path, syntax)
        data = path.read_bytes()[start:]
        if start == 128:
            data = data[data.index(b"\0\x08\0\x16" if syntax == ".2" else b"\x08\0\x16\0") :]
        path.unlink()
        (tmp_path / f"{k}{suffix}").write_bytes(data)
    np.testing.assert_array_equal(read(tmp_path)[0], VOLUME)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("high_bit", [11, 15])
def test_unused_bits_are_not_part_of_the_image(signed: bool, high_bit: int, tmp_path: Path) -> None:
    """Older scanners draw in the bits above the pixels' own; pydicom is the reference."""
    values = np.random.default_rng(2).integers(-2048 * signed, 2048, VOLUME.shape)
    drawing = np.random.default_rng(3).integers(0, 16, VOLUME.shape)
    own, unused = (values % 4096, drawing) if high_bit == 11 else (drawing, values % 4096)
    stored = (own + (unused << (12 if high_bit == 11 else 4))).astype(np.uint16)
    bits = {"BitsStored": 12, "HighBit": high_bit, "PixelRepresentation": int(signed)}
    write_series(tmp_path, stored, OBLIQUE, **bits)
    np.testing.assert_array_equal(read(tmp_path)[0], values)
    if high_bit == 11:
        np.testing.assert_array_equal(pydicom.dcmread(tmp_path / "IM0003").pixel_array.T, values[:, :, 2])


@pytest.mark.parametrize(
    ("dtype", "bits", "padding", "limit", "shown"),
    [
        (np.int16, 16, -32768, None, "-32768"),
        (np.int16, 16, 32768, None, "-32768"),  # written as US, although pixels have a sign
        (np.int16, 12, -32768, None, "-32768"),  # more bits than the pixels have
        (np.int16, 16, -2000, -1500, "-2000 to -1500"),
        (np.int16, 16, -1500, -2000, "-2000 to -1500"),
        (np.uint16, 16, 65535, None, "65535"),
        (np.uint16, 12, 4095, 4000, "4000 to 4095"),
    ],
)
@pytest.mark.parametrize("implicit", [False, True])
def test_padding_gets_the_lowest_other_value(
    dtype: type, bits: int, padding: int, limit: int | None, shown: str, implicit: bool, tmp_path: Path
) -> None:
    values = np.random.default_rng(4).integers(100, 1000, VOLUME.shape)
    stored = values.copy()
    stored[:2], stored[3, 2] = padding, padding if limit is None else limit
    expected = np.where((stored >= 100) & (stored < 1000), values, values[(stored >= 100) & (stored < 1000)].min())
    tags = {"PixelPaddingValue": padding, "PixelPaddingRangeLimit": limit, "BitsStored": bits, "HighBit": bits - 1}
    paths = write_series(tmp_path, stored.astype(dtype), OBLIQUE, RescaleSlope=2.0, RescaleIntercept=-5.0, **tags)
    for path in paths if implicit else ():  # where types are not in the file
        file = pydicom.dcmread(path)
        save_as(file, path, "")
    note = f"padding (PixelPaddingValue {shown}) taken as background"
    np.testing.assert_array_equal(read(tmp_path, note)[0], expected * 2 - 5)


def test_padding_that_is_already_background_stays_as_it_is(tmp_path: Path) -> None:
    stored = (VOLUME + 501).astype(np.uint16)
    stored[:2], stored[4, 0, 0] = 0, 1
    write_series(tmp_path, stored, OBLIQUE, PixelPaddingValue=0)
    np.testing.assert_array_equal(read(tmp_path)[0], stored)
    write_series(tmp_path, stored, OBLIQUE, PixelPaddingValue=0, PhotometricInterpretation="MONOCHROME1")
    found = read(tmp_path, "padding (PixelPaddingValue 0) taken as background")[0]  # white otherwise
    np.testing.assert_array_equal(found, np.where(stored > 0, 65535 - stored.astype(np.float32), 65535 - stored.max()))


def test_all_axis_orders_give_one_image(tmp_path: Path) -> None:
    """Slices are sorted along the normal x cross y, so left-handed orders are turned round."""
    chain = Compose([LoadImage(reader=DicomReader), EnsureChannelFirst(), Orientation("RAS", labels=None)])
    whole = nib.Nifti1Image(VOLUME, np.array([[0.7, 0, 0, 3], [0, 1.3, 0, -20], [0, 0, 2.5, 7], [0, 0, 0, 1]]))
    orders = [(order, flips) for order in permutations(range(3)) for flips in product((1, -1), repeat=3)]
    for number, (order, flips) in enumerate(orders):
        stored = whole.as_reoriented(np.array([*zip(order, flips, strict=True)]))
        write_series(tmp_path / str(number), np.asarray(stored.dataobj), stored.affine)
        image = chain(tmp_path / str(number))
        np.testing.assert_array_equal(image[0], VOLUME)
        np.testing.assert_allclose(image.affine, whole.affine, atol=1e-6)
    assert len(orders) == 48


class TestEnhanced:
    """Many slices in one file, with tags that are written once or per frame; highdicom is the reference."""

    RESCALE = ((1.5, 2.0), (2.0, 3.0), (0.5, -1.0), (3.0, 0.0))

    @pytest.mark.parametrize("shared", [(), ("PlaneOrientationSequence", "PixelMeasuresSequence")])
    def test_it_gives_the_volume_that_its_slices_give(self, shared: tuple, tmp_path: Path) -> None:
        path = write_enhanced(tmp_path / "a" / "IM1", VOLUME, OBLIQUE, shared, self.RESCALE)
        array, affine = read(path.parent)
        np.testing.assert_array_equal(array, VOLUME * [1.5, 2, 0.5, 3] + [2, 3, -1, 0])
        np.testing.assert_allclose(affine, OBLIQUE, atol=1e-7)
        np.testing.assert_array_equal(read(path)[0], array)  # the file itself
        reference = highdicom.imread(path).get_volume()
        np.testing.assert_array_equal(reference.array[::-1].T, array)  # frames from the other end, (rows, columns)
        np.testing.assert_allclose((reference.affine @ [3, 0, 0, 1])[:3], affine[:3, 3] * [-1, -1, 1], atol=1e-6)
        assert FolderImages(tmp_path).cases == [{"image": str(path.parent)}]
        assert FolderImages(path).cases == [{"image": str(path)}]

    def test_bits_padding_and_lossless_compression(self, tmp_path: Path) -> None:
        stored = np.random.default_rng(5).integers(0, 1000, (40, 32, 5)).astype(np.uint16)
        stored[:3] = 4095
        tags = {"BitsStored": 12, "HighBit": 11, "PixelPaddingValue": 4095}
        path = write_enhanced(tmp_path / "a", stored | 1 << 13, OBLIQUE, **tags)
        note = "padding (PixelPaddingValue 4095) taken as background"
        expected = np.where(stored == 4095, 0, stored)
        np.testing.assert_array_equal(read(path, note)[0], expected)
        file = pydicom.dcmread(write_enhanced(path, stored, OBLIQUE, **tags))
        for syntax, encode in {"90": imagecodecs.jpeg2k_encode, "80": imagecodecs.jpegls_encode}.items():
            options = {"level": 0, "codecformat": "j2k"} if syntax == "90" else {}
            file.PixelData = pydicom.encaps.encapsulate([encode(frame, **options) for frame in stored.T])
            file.file_meta.TransferSyntaxUID = f"1.2.840.10008.1.2.4.{syntax}"
            file["PixelData"].is_undefined_length = True
            file.save_as(path)
            np.testing.assert_array_equal(read(path, note)[0], expected)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"lost": 1},
                "a slice is missing between IM1 frame 1 and IM1 frame 2, which are 5 mm apart instead of 2.5",
            ),
            (
                {"double": True},
                "its 8 slices are at 4 positions, for example IM1 frame 1, IM1 frame 5 at the same one: ",
            ),
            ({"count": 5}, "IM1 has 5 frames but describes 4 of them"),
            ({"tilt": 1.0}, "shifted sideways by up to 3 mm (a tilted gantry?)"),
            ({"groups": False}, "IM1 has 4 frames, but not where each of them is: convert it to NIfTI with dcm2niix"),
            ({"place": False}, "the ImagePositionPatient of IM1 frame 2 is missing but must have 3 numbers"),
            ({"cut": True}, "IM1 is truncated or damaged: copy it again."),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_faults(self, change: dict, message: str, tmp_path: Path) -> None:
        volume = np.tile(VOLUME, (1, 1, 2)) if change.get("double") else VOLUME
        path = write_enhanced(tmp_path / "IM1", volume, OBLIQUE)
        file = pydicom.dcmread(path)
        frames = file.PerFrameFunctionalGroupsSequence
        if "lost" in change:
            del frames[change["lost"]]
            file.NumberOfFrames = 3
        for k, frame in enumerate(frames):
            place = frame.PlanePositionSequence[0]
            if "double" in change:
                place.ImagePositionPatient = frames[k % 4].PlanePositionSequence[0].ImagePositionPatient
            if "tilt" in change:
                axis = np.array(
                    file.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient
                )
                place.ImagePositionPatient = list(np.round(np.array(place.ImagePositionPatient) + k * axis[:3], 9))
            if "place" in change and k == 1:
                del place.ImagePositionPatient
        if "count" in change:
            file.NumberOfFrames = 5
        if "groups" in change:
            del file.PerFrameFunctionalGroupsSequence
        file.save_as(path)
        if "cut" in change:
            path.write_bytes(path.read_bytes()[:-20])
        assert message in refusal(path)


class TestSeveralSeries:
    """A folder as a scanner's archive exports it: all series of a study together."""

    @pytest.fixture
    def study(self, tmp_path: Path) -> Path:
        folder = tmp_path / "data" / "study"
        series = [(3, "t1 fl3d", VOLUME), (4, "t1 fl3d + Gd", VOLUME + 1), (5, "FLAIR.3D", VOLUME + 2)]
        for number, description, volume in series:
            names = [f"{number}-{k}" for k in range(4)]
            tags = {"SeriesInstanceUID": f"1.{number}", "SeriesNumber": number, "SeriesDescription": description}
            write_series(folder, volume, OBLIQUE, names, **tags)
        for axes in (OBLIQUE, SAGITTAL):
            name = "a" if axes is SAGITTAL else "b"
            tags = {"SeriesInstanceUID": "1.1", "SeriesNumber": 1, "SeriesDescription": "localizer"}
            write_series(folder, VOLUME[:, :, :2], axes, [f"l{name}1", f"l{name}2"], **tags)
        screen = {"SeriesInstanceUID": "1.99", "ImagePositionPatient": None, "SeriesDescription": "screen"}
        write_series(folder, VOLUME[:, :, :2], OBLIQUE, ["s1", "s2"], **screen)
        return folder

    NAMES = ("3_t1_fl3d", "4_t1_fl3d_+_Gd", "5_FLAIR_3D")

    @pytest.mark.parametrize(
        ("series", "expected"),
        [
            (None, NAMES),
            (3, NAMES[:1]),
            ("4", NAMES[1:2]),
            ("T1 FL3D", NAMES[:1]),  # the whole description comes before a part of others
            ("3d", NAMES),
            ("gd", NAMES[1:2]),
            (1, ["1_localizer"]),
        ],
    )
    def test_each_is_an_image_or_the_chosen_ones(
        self, series: object, expected: list, study: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        root = study.parent
        with caplog.at_level(logging.INFO, "segbundles"):
            found = [case["image"] for case in FolderImages(root, series=series)]
        assert found == [str(study / name) for name in expected]
        every = ["screen", "1_localizer", *self.NAMES]  # without a number comes first
        lost = [f"study/{name}" for name in every if name not in expected]
        names = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        why = "DICOM series that cannot be volumes" if series is None else f"by series {series!r}"
        assert caplog.messages == [f"Left out: {len(lost)} {why} ({names})."]
        for path in found if series != 1 else ():
            name = Path(path).name
            np.testing.assert_array_equal(read(Path(path))[0], VOLUME + int(name[0]) - 3)
            assert FolderImages(path).cases == [{"image": path}]
        if series == 1:
            assert "differ in orientation (is one a localiser?)" in refusal(study / "1_localizer")

    def test_none_chosen_says_what_there_is(self, study: Path) -> None:
        with pytest.raises(
            ValueError, match=r"series is 7, but no DICOM series under '.*' has this number or"
        ) as caught:
            len(FolderImages(study, series=7))
        assert "there are 'screen' of 2 slices, 'localizer' (number 1) of 4 slices, 't1 fl3d' (" in str(caught.value)
        assert refusal(study / "9_none").endswith("'FLAIR.3D' (number 5) of 4 slices.")
        assert "there is no series 'T2': the folder contains 'screen'" in refusal(study, "T2")

    def test_the_reader_chooses_in_a_folder(self, study: Path) -> None:
        reader = DicomReader("flair")
        np.testing.assert_array_equal(reader.get_data(reader.read(study))[0], VOLUME + 2)
        message = refusal(study)
        assert "it contains 5 series, 'screen' of 2 slices, 'localizer' (number 1) of 4 slices" in message
        assert message.endswith(f"choose one with --series, or give its path, for example {study / 'screen'}.")

    def test_a_broken_series_is_not_left_out(self, study: Path) -> None:
        (study / "3-1").unlink()
        assert [Path(case["image"]).name for case in FolderImages(study)] == list(self.NAMES)
        assert "a slice is missing between 3-0 and 3-2" in refusal(study / "3_t1_fl3d")
        (study / "3-2").write_bytes((study / "3-2").read_bytes()[:500])
        assert FolderImages(study).cases == [{"image": str(study)}]  # nothing says which series it is of
        assert "3-2 is truncated or damaged" in refusal(study)

    def test_a_datalist_may_name_one(self, study: Path) -> None:
        path = study.parent / "datalist.json"
        path.write_text(json.dumps({"training": [{"image": f"study/{self.NAMES[0]}"}]}))
        assert Datalist(path.parent, keys=["image"]).cases == [{"image": str(study / self.NAMES[0])}]

    def test_one_name_for_two(self, study: Path) -> None:
        tags = {"SeriesInstanceUID": "1.31", "SeriesNumber": 3, "SeriesDescription": "t1/fl3d"}
        write_series(study, VOLUME, OBLIQUE, list("abcd"), **tags)
        (study / "5_FLAIR_3D").mkdir()
        names = [Path(case["image"]).name for case in FolderImages(study)]
        assert names == ["3_t1_fl3d", "3_t1_fl3d_2", "4_t1_fl3d_+_Gd", "5_FLAIR_3D_2"]


class TestChannels:
    """Three series of one study as one image."""

    def write(self, folder: Path, series: dict[str, np.ndarray], apart: bool, affine: np.ndarray = OBLIQUE) -> None:
        for number, (description, volume) in enumerate(series.items()):
            tags = {"SeriesInstanceUID": f"2.{number}", "SeriesDescription": description, "SeriesNumber": number}
            names = [f"{number}-{k}" for k in range(4)]
            write_series(folder / f"S{number}" if apart else folder, volume, affine, names, **tags)

    @pytest.mark.parametrize("apart", [False, True])
    @pytest.mark.parametrize("root", [".", "p1"])
    @pytest.mark.parametrize("selectors", [["T1", "FLAIR", "T1 Gd"], [2, 1, 3], ["flair", "flair", "Gd"]])
    def test_in_one_folder_or_in_several(
        self, selectors: list, root: str, apart: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        series = {"T2": VOLUME, "ax FLAIR": VOLUME + 1, "ax T1": VOLUME + 2, "ax T1 Gd": VOLUME + 3}
        self.write(tmp_path / "p1", series, apart)
        with caplog.at_level(logging.INFO, "segbundles"):
            assert FolderImages(tmp_path / root, series=selectors).cases == [{"image": str(tmp_path / "p1")}]
        assert "Left out: " in caplog.messages[0]
        assert "0_T2" in caplog.messages[0] or "S0" in caplog.messages[0]
        image = LoadImage(reader=DicomReader, series=selectors)(tmp_path / "p1")
        assert image.meta["original_channel_dim"] == -1
        np.testing.assert_allclose(image.affine, OBLIQUE, atol=1e-6)
        first = 1 if selectors[0] == "flair" else 2
        np.testing.assert_array_equal(image, np.stack([VOLUME + first, VOLUME + 1, VOLUME + 3], -1))

    @pytest.mark.parametrize(
        ("series", "message"),
        [
            (
                {"T1": VOLUME, "FLAIR": VOLUME},
                "'T1 Gd' of series fits no series of this study, which has 'T1' (number 0)",
            ),
            (
                {"ax T1": VOLUME, "cor T1": VOLUME, "FLAIR": VOLUME, "T1 Gd": VOLUME},
                "'T1' of series fits 2 series of this study, which has 'ax T1' (number 0) of 4 slices, 'cor T1'",
            ),
            (
                {"T1": VOLUME, "FLAIR": VOLUME[:4], "T1 Gd": VOLUME},
                "its series 'T1' (number 0) of 4 slices and 'FLAIR' (number 1) of 4 slices are channels of one image",
            ),
        ],
    )
    def test_faults_are_of_one_study(self, series: dict, message: str, tmp_path: Path) -> None:
        good = {"T1": VOLUME, "FLAIR": VOLUME, "T1 Gd": VOLUME}
        self.write(tmp_path / "good", good, apart=True)
        self.write(tmp_path / "bad", series, apart=False)
        selectors = ["T1", "FLAIR", "T1 Gd"]
        given = [str(tmp_path / name) for name in ("bad", "good")]
        assert [case["image"] for case in FolderImages(tmp_path, series=selectors)] == given
        assert message in refusal(tmp_path / "bad", selectors)
        assert DicomReader(selectors).get_data((tmp_path / "good", {}))[0].shape == (5, 6, 4, 3)

    @pytest.mark.parametrize(
        ("tags", "shift", "message"),
        [({}, 0.2, "differ in size or position: resample them"), ({"PatientID": "x"}, 0, "are of different patients")],
    )
    def test_other_positions_and_other_patients(self, tags: dict, shift: float, message: str, tmp_path: Path) -> None:
        affine = OBLIQUE.copy()
        affine[0, 3] += shift
        self.write(tmp_path, {"T1": VOLUME}, apart=False)
        write_series(tmp_path, VOLUME, affine, list("abcd"), SeriesInstanceUID="3", SeriesDescription="FLAIR", **tags)
        assert message in refusal(tmp_path, ["T1", "FLAIR"])


@pytest.mark.parametrize(("compressor", "syntax"), [("JPEG", "4.70"), ("JPEG2000", "4.90")])
def test_lossless_compression_is_read(compressor: str, syntax: str, tmp_path: Path) -> None:
    stored = np.random.default_rng(1).integers(0, 4000, (3, 64, 48)).astype(np.uint16)
    before = locale.setlocale(locale.LC_ALL)
    writer = sitk.ImageFileWriter()
    writer.SetUseCompression(True)
    writer.SetCompressor(compressor)
    writer.KeepOriginalImageUIDOn()
    for k, plane in enumerate(stored):
        image = sitk.GetImageFromArray(plane[None])
        image.SetSpacing((0.5, 0.8, 2.0))
        tags = {"0008|0016": MR, "0008|0060": "MR", "0020|000e": "1.2.3.4", "0020|0037": "1\\0\\0\\0\\1\\0"}
        for tag, value in {**tags, "0020|0032": f"0\\0\\{2 * k}"}.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(tmp_path / f"{k}.dcm"))
        writer.Execute(image)
        assert f"1.2.840.10008.1.2.{syntax}".encode() in (tmp_path / f"{k}.dcm").read_bytes()[:1024]
    locale.setlocale(locale.LC_ALL, before)
    array, affine = read(tmp_path)
    assert locale.setlocale(locale.LC_ALL) == before  # GDCM changes it
    np.testing.assert_array_equal(array, stored.transpose(2, 1, 0))
    np.testing.assert_allclose(affine, np.diag([-0.5, -0.8, 2, 1]), atol=1e-12)


def test_threads_put_back_what_the_first_one_found() -> None:
    """One is let in while another is reading, and stays longer."""
    before, inside, leave = locale.setlocale(locale.LC_ALL), threading.Event(), threading.Event()

    def second() -> None:
        with quiet_itk():
            inside.set()
            leave.wait(10)

    warns = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(True)
    thread = threading.Thread(target=second)
    other = "C.UTF-8" if before == "C" else "C"
    try:
        with quiet_itk():
            locale.setlocale(locale.LC_ALL, other)  # as GDCM does
            thread.start()
            assert inside.wait(10)
        assert not sitk.ProcessObject.GetGlobalWarningDisplay()
        leave.set()
        thread.join()
        assert sitk.ProcessObject.GetGlobalWarningDisplay()
        assert locale.setlocale(locale.LC_ALL) == before
    finally:
        leave.set()
        locale.setlocale(locale.LC_ALL, before)
        sitk.ProcessObject.SetGlobalWarningDisplay(warns)


def test_reading_a_volume_leaves_warnings_as_they_are(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(VOLUME), str(tmp_path / "a.nrrd"))
    warns = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(True)
    try:
        SuffixReader().get_data((tmp_path / "a.nrrd", {}))
        assert sitk.ProcessObject.GetGlobalWarningDisplay()
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(warns)


class TestFaults:
    """Each makes the volume something else than what was scanned, and is refused by the folder's name."""

    def refused(self, folder: Path, caplog: pytest.LogCaptureFixture) -> str:
        with pytest.raises(ValueError, match=re.escape(f"cannot read {folder}: ")) as caught:
            SuffixReader().get_data((folder, {}))
        message = str(caught.value)
        assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [message]
        assert PATIENT not in message
        assert PATIENT_ID not in message
        return message

    def test_several_series(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_series(tmp_path, VOLUME, OBLIQUE, SeriesDescription="t1 fl3d", SeriesNumber=4)
        write_series(tmp_path, VOLUME[:, :, :1], SAGITTAL, ["loc"], SeriesInstanceUID="1.9", SeriesDescription="scout")
        message = self.refused(tmp_path, caplog)
        assert (
            "it contains 2 series, 'scout' of 1 slice, 't1 fl3d' (number 4) of 4 slices: choose one with --series"
            in message
        )

    @pytest.mark.parametrize("lost", [[1], [2], [1, 3]])
    def test_a_missing_slice(self, lost: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        paths = write_series(tmp_path, np.tile(VOLUME, (1, 1, 2)), OBLIQUE)
        for k in lost:
            paths[k].unlink()
        more = f", and at {len(lost) - 1} more places" if len(lost) > 1 else ""
        gap = f"between IM{lost[0]:04} and IM{lost[0] + 2:04}, which are 5 mm apart instead of 2.5{more}: copy"
        assert f"a slice is missing {gap}" in self.refused(tmp_path, caplog)

    def test_every_third_slice_missing_differs_from_another_spacing(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_series(tmp_path, VOLUME, OBLIQUE)[1].unlink()
        assert "between IM0001 and IM0003, which are 5 mm apart instead of 2.5" in self.refused(tmp_path, caplog)

    @pytest.mark.parametrize(
        ("tags", "message"),
        [
            (
                {"EchoTime": 9.2},
                "they differ in EchoTime (4.6, 9.2); put each phase, echo or repeat into its own folder",
            ),
            ({"ImageType": ["DERIVED", "PHASE"]}, "they differ in ImageType (none, DERIVED\\PHASE); put each"),
            ({}, "remove copies"),
        ],
        ids=["echoes", "magnitude and phase", "copies"],
    )
    def test_several_slices_at_one_place(
        self, tags: dict, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        first = {"EchoTime": 4.6} if "EchoTime" in tags else {}
        write_series(tmp_path, VOLUME, OBLIQUE, **first)
        write_series(tmp_path, VOLUME, OBLIQUE, ["a", "b", "c", "d"], **tags)
        start = "its 8 slices are at 4 positions, for example IM0001, a at the same one: "
        assert f"{start}{message}" in self.refused(tmp_path, caplog)

    @pytest.mark.parametrize(
        ("tags", "message"),
        [
            ({"PixelSpacing": [1.3, 0.8]}, "IM0001 and IM0002 differ in spacing, (0.7, 1.3) and (0.8, 1.3) mm: sort"),
            (
                {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]},
                "IM0001 and IM0002 differ in orientation (is one a localiser",
            ),
            ({"ImageOrientationPatient": [1, 0, 0, 1, 1, 0]}, "IM0002 has axes (1, 0, 0, 1, 1, 0), which are not perp"),
            (
                {"ImageOrientationPatient": None},
                "the ImageOrientationPatient of IM0002 is missing but must have 6 numbers",
            ),
            ({"ImagePositionPatient": [1, 2]}, "the ImagePositionPatient of IM0002 is 1\\2 but must have 3 numbers"),
            (
                {"PixelSpacing": None},
                "the PixelSpacing of IM0002 is missing but must have 2 numbers: the file is not a slice of a volume",
            ),
            ({"PixelSpacing": [0, 1]}, "the PixelSpacing of IM0002 is (0, 1) but must be two positive numbers (mm)"),
            ({"ImagePositionPatient": [-57, -40, 83.4]}, "shifted sideways by up to 3.4 mm (a tilted gantry?)"),
            (
                {"ImagePositionPatient": [-57.6, -40, 80]},
                "its slices are 2.4 to 3.6 mm apart but must be evenly spaced",
            ),
            (
                {"syntax": "1.2.840.10008.1.2.4.102"},
                "IM0002 has an unsupported compression (transfer syntax 1.2.840.10008.1.2.4.102)",
            ),
        ],
    )
    def test_an_odd_slice(self, tags: dict, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_series(tmp_path, VOLUME, SAGITTAL)
        place = {
            "ImagePositionPatient": [-57, -40, 80],
            "ImageOrientationPatient": [0, 1, 0, 0, 0, -1],
            "PixelSpacing": [1.3, 0.7],
        }
        write_slice(tmp_path / "IM0002", VOLUME[:, :, 1].T, **{**place, **tags})
        assert message in self.refused(tmp_path, caplog)

    @pytest.mark.parametrize(
        ("bytes_left", "message"),
        [
            (-20, "IM0003 is truncated or damaged: copy it again."),
            (600, "IM0003 is truncated or damaged: copy it again."),
            (0, "IM0003 is empty: copy it again."),
        ],
    )
    def test_a_truncated_slice(
        self, bytes_left: int, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = write_series(tmp_path, VOLUME, OBLIQUE)[2]
        path.write_bytes(path.read_bytes()[:bytes_left])
        assert self.refused(tmp_path, caplog).endswith(message)

    def test_a_slice_of_another_size(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_series(tmp_path, VOLUME, SAGITTAL)
        write_series(tmp_path, VOLUME[:4, :, :2], SAGITTAL)
        assert "IM0001 and IM0003 differ in size, 4 x 6 and 5 x 6 pixels: sort them" in self.refused(tmp_path, caplog)

    def test_colour(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0, "Columns": 5}
        write_series(tmp_path, np.zeros((15, 6, 3), np.uint8), SAGITTAL, **colour)
        assert "IM0001 is in colour but must be grey: leave it out." in self.refused(tmp_path, caplog)

    def test_several_frames_a_file(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_slice(tmp_path / "enhanced.dcm", VOLUME.T, SOPClassUID=f"{MR}.1")
        message = "enhanced.dcm has 4 frames, but not where each of them is: convert it to NIfTI with dcm2niix"
        assert message in self.refused(tmp_path, caplog)

    def test_one_slice(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_series(tmp_path, VOLUME[:, :, :1], SAGITTAL)
        assert "it contains only one slice, IM0001: give the whole" in self.refused(tmp_path, caplog)

    def test_a_folder_without_dicom(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "notes.txt").write_text("none")
        assert "it contains no DICOM image: give the folder that contains the slices" in self.refused(tmp_path, caplog)

    def test_a_single_slice_by_name(self, tmp_path: Path) -> None:
        path = write_series(tmp_path, VOLUME, SAGITTAL)[0]
        with pytest.raises(ValueError, match=r"it is one slice of a DICOM series; give the folder with the whole"):
            SuffixReader().get_data((path, {}))


def test_names_of_slices_that_are_not_utf8(tmp_path: Path) -> None:
    paths = write_series(tmp_path, VOLUME, OBLIQUE)
    paths[2] = paths[2].rename(tmp_path / os.fsdecode(b"\xe9.dcm"))
    np.testing.assert_array_equal(read(tmp_path)[0], VOLUME)
    paths[2].write_bytes(paths[2].read_bytes()[:-20])
    assert r": \xe9.dcm is truncated or damaged: copy it again." in refusal(tmp_path)


def test_positions_written_with_one_decimal_are_even_enough(tmp_path: Path) -> None:
    places = [0, 1.7, 3.3, 5.0, 6.7]  # every 5/3 mm
    for k, place in enumerate(places):
        write_slice(
            tmp_path / f"{k}.dcm",
            VOLUME[:, :, 0].T,
            ImagePositionPatient=[0.0, 0.0, place],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            PixelSpacing=[1, 1],
        )
    np.testing.assert_allclose(read(tmp_path)[1], np.diag([-1, -1, 6.7 / 4, 1]), atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "is_slice"),
    [
        (MR, True),
        ("1.2.840.10008.5.1.4.1.1.2", True),
        (f"{MR}.1", True),
        (f"{MR}.2", False),
        ("1.2.840.10008.1.3.10", False),
        ("1.2.840.10008.5.1.4.1.1.88.22", False),
        ("1.2.840.10008.5.1.4.1.1.11.1", False),
        ("1.2.840.10008.5.1.4.1.1.66.4", False),
        ("1.3.46.670589.11.0.0.12.1", False),
    ],
    ids=["MR", "CT", "enhanced MR", "spectrum", "DICOMDIR", "report", "presentation", "segmentation", "private"],
)
def test_what_is_a_slice(kind: str, is_slice: bool, tmp_path: Path) -> None:
    path = write_slice(tmp_path / "IM0001", VOLUME[:, :, 0].T, SOPClassUID=kind)
    assert is_dicom_slice(path) is is_slice
    bare = write_slice(tmp_path / "bare", VOLUME[:, :, 0].T, preamble=False, SOPClassUID=kind)
    assert is_dicom_slice(bare) is is_slice
    others = {"a.txt": b"DICM", "empty": b"", "long": b"\0" * 2000, "zip": b"PK" + bare.read_bytes()}
    others["group"] = b"\x08\0\x05\0CS\x0a\0ISO_IR 100" + b"1.2.840.10008.5.1.4.1.1.2 " * 40
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
        assert not is_dicom_slice(tmp_path / name)


class TestFolderImages:
    def test_an_export_of_a_scanner_with_files_of_all_kinds(self, tmp_path: Path) -> None:
        study = tmp_path / "DICOM" / "PA1" / "ST 1"
        write_series(study / "SE1", VOLUME, SAGITTAL)
        write_series(study / "SE2", VOLUME, SAGITTAL, ["a.dcm", "b.dcm", "c.dcm", "d.dcm"])
        report = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11"}
        write_slice(study / "SE3" / "SR0001", VOLUME[:, :, 0].T, **report)
        write_slice(tmp_path / "DICOMDIR", VOLUME[:, :, 0].T, SOPClassUID="1.2.840.10008.1.3.10")
        for name in ("LOCKFILE", "VERSION", "README.txt", "scan.nii.gz"):
            (tmp_path / name).touch()
        for name in ("picture.jpg", "._IM0001", "SR0001", "list.csv"):
            (study / "SE1" / name).touch()
        write_slice(study / "SE1" / "SR0001", VOLUME[:, :, 0].T, **report)
        given = [str(study / "SE1"), str(study / "SE2"), str(tmp_path / "scan.nii.gz")]
        suffixes = [".nii.gz", ".dcm"]
        assert [case["image"] for case in FolderImages(tmp_path, suffixes=suffixes)] == given
        assert [case["image"] for case in FolderImages(tmp_path, suffixes=suffixes[:1])] == given[2:]
        assert [case["image"] for case in FolderImages(tmp_path, tmp_path / "DICOM", suffixes=suffixes)] == given[2:]
        assert [case["image"] for case in FolderImages(tmp_path, skip=["*/SE1/*", "*.jpg"])] == given[1:]
        np.testing.assert_array_equal(read(study / "SE1")[0], VOLUME[:, :, ::-1])  # the report is passed over

    def test_the_folder_itself_may_be_the_series(self, tmp_path: Path) -> None:
        write_series(tmp_path / "SE1", VOLUME, SAGITTAL)
        assert FolderImages(tmp_path / "SE1").cases == [{"image": str(tmp_path / "SE1")}]

    @pytest.mark.parametrize("other", ["SE1.nii.gz", "SE1/SE1/IM0001"])
    def test_two_of_one_output_name(self, other: str, tmp_path: Path) -> None:
        write_series(tmp_path / "SE1", VOLUME, SAGITTAL)
        write_slice(tmp_path / other, VOLUME[:, :, 0].T)
        dataset_dir = tmp_path / "SE1" if "IM" in other else tmp_path
        with pytest.raises(ValueError, match=r"SE1 and .*SE1.* would both be written as SE1_seg: rename one of them"):
            len(FolderImages(dataset_dir))

    def test_nothing_found_says_that_dicom_was_looked_for(self, tmp_path: Path) -> None:
        (tmp_path / "IM0001").write_bytes(b"no DICOM")
        message = r"names must end in one of \.nii, or files must be slices of a DICOM series\."
        with pytest.raises(ValueError, match=message):
            len(FolderImages(tmp_path, suffixes=[".nii", ".dcm"]))
        with pytest.raises(ValueError, match=r"names must end in one of \.nii\."):
            len(FolderImages(tmp_path, suffixes=[".nii"]))
