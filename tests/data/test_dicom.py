from __future__ import annotations

import locale
import logging
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from dicom_series import MR, PATIENT, PATIENT_ID, write_series, write_slice
from monai.transforms import LoadImage
from scipy.spatial.transform import Rotation

from segbundles.data import DicomReader, FolderImages, StackReader, SuffixReader, is_dicom_slice
from segbundles.itk import quiet_itk

VOLUME = np.random.default_rng(0).integers(-500, 500, (5, 6, 4)).astype(np.int16)
# sagittal: columns run to the back, rows down, slices to the left, with spacing 0.7, 1.3 and 3
SAGITTAL = np.array([[0, 0, -3.0, 60], [-0.7, 0, 0, 40], [0, -1.3, 0, 80], [0, 0, 0, 1]])
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", (20, -35, 50), degrees=True).as_matrix() @ np.diag([0.7, 1.3, 2.5])
OBLIQUE[:3, 3] = (3, -20, 7)


def read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    reader = DicomReader()
    array, meta = reader.get_data(reader.read(folder))
    assert meta.keys() == {"original_affine", "affine", "space", "spatial_shape", "original_channel_dim"}
    return array, meta["affine"]


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
        with pytest.raises(ValueError, match=re.escape(f"cannot read {folder} as a DICOM series: ")) as caught:
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
            "it contains 2 series, 't1 fl3d' (number 4) of 4 slices, 'scout' of 1 slice: put each into its own folder"
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
        message = "enhanced.dcm has 4 frames, but multi-frame (enhanced) DICOM is not supported: convert it to NIfTI"
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
    for name, content in {"a.txt": b"DICM", "empty": b"", "long": b"\0" * 2000}.items():
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
