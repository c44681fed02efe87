from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segbundles.datasets import DataFaults, get_data_set, prepare

SAMPLES = Path(__file__).resolve().parents[3] / "shared" / "real_data" / "samples"


@pytest.mark.parametrize("below", ["", ".."])
def test_folder_itself_or_the_one_above(heart, tmp_path, below):
    prepared = prepare(get_data_set("heart"), heart(tests=2) / below, tmp_path / "out")
    datalist = prepared.datalist
    assert (datalist["numTraining"], datalist["numValidation"], datalist["numTest"]) == (3, 1, 2)
    assert datalist["testing"][0] == {
        "case": "la_900",
        "image": "../Task02_Heart/imagesTs/la_900.nii.gz",
        "group": "la_900",
    }
    assert datalist["licence"] == "CC-BY-SA 4.0"
    assert all("spacing_mm" not in entry for entry in datalist["training"])
    assert prepared.facts["spacing (mm)"] == "1.25 x 1.25 x 1.37"
    assert prepared.facts["orientation"] == "RAS (6)"


def test_hidden_twins_of_the_archive_are_skipped(heart, tmp_path):
    root = heart()
    (root / "imagesTr" / "._la_000.nii.gz").write_bytes(b"x")
    assert prepare(get_data_set("heart"), root, tmp_path / "out").datalist["numTraining"] == 3


def test_test_case_stays_in_testing(heart, tmp_path):
    root = heart(tests=1)
    with pytest.raises(ValueError, match="'la_900' cannot go to validation: the publisher's layout says testing"):
        prepare(get_data_set("heart"), root, tmp_path / "out", validation_cases=["la_900"])
    with pytest.raises(ValueError, match="'la_900' has no label and cannot go to training: list it in testing"):
        prepare(get_data_set("heart"), root, tmp_path / "out", split={"training": ["la_900"]})
    assert not (tmp_path / "out").exists()


def test_all_faults_at_once(heart, tmp_path):
    root = heart(7, tests=1)
    images, labels = root / "imagesTr", root / "labelsTr"
    (labels / "la_000.nii.gz").unlink()
    (images / "la_001.nii.gz").unlink()
    path = images / "la_002.nii.gz"
    path.write_bytes(path.read_bytes()[:-30])
    affine = nib.load(labels / "la_003.nii.gz").affine
    nib.save(nib.Nifti1Image(np.eye(6, dtype=np.uint8)[..., None] * np.uint8(255), affine), labels / "la_003.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((6, 5, 4, 1), np.uint8), affine), labels / "la_004.nii.gz")
    shifted = affine.copy()
    shifted[:3, 3] = 1
    nib.save(nib.Nifti1Image(np.asarray(nib.load(labels / "la_005.nii.gz").dataobj), shifted), labels / "la_005.nii.gz")
    nib.save(nib.Nifti1Image(np.full((6, 5, 4), np.nan, np.float32), affine), root / "imagesTs" / "la_900.nii.gz")
    with pytest.raises(DataFaults) as caught:
        prepare(get_data_set("heart"), root, tmp_path / "out")
    found = [(caught.value.shown(fault), fault.problem) for fault in caught.value.faults]
    assert [found[i] for i in (0, 1, 3, 4, 5, 6, 7)] == [
        ("imagesTr/la_000.nii.gz", "has no label: labelsTr lacks it"),
        ("labelsTr/la_001.nii.gz", "has no image: imagesTr lacks it"),
        ("labelsTr/la_003.nii.gz", "holds the values 255 where only 0, 1 are due"),
        ("labelsTr/la_003.nii.gz", "size (6, 6, 1) differs from the image's (6, 5, 4)"),
        ("labelsTr/la_004.nii.gz", "has 4 dimensions (6, 5, 4, 1), not 3"),
        ("labelsTr/la_005.nii.gz", "origin (1, 1, 1) differs from the image's (0, 0, 0)"),
        ("imagesTs/la_900.nii.gz", "holds 120 voxels that are NaN or infinite"),
    ]
    assert found[2][0] == "imagesTr/la_002.nii.gz"
    assert found[2][1].startswith("cannot be read: ")
    assert len(found) == 8
    assert not (tmp_path / "out").exists()


@pytest.mark.samples
@pytest.mark.skipif(not (SAMPLES / "Task02_Heart").is_dir(), reason="no sample cases beside the checkout")
def test_samples(tmp_path):
    prepared = prepare(get_data_set("heart"), SAMPLES, tmp_path, validation_cases=["la_014"])
    assert [entry["group"] for entry in prepared.datalist["validation"]] == ["la_014"]
    assert prepared.facts["size (voxels)"] == "256 x 256 x 120"
    assert prepared.facts["spacing (mm)"] == "1.25 x 1.25 x 1.37"
