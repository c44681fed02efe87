from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

from segbundles.data import SuffixReader
from segbundles.datasets import DataFaults, get_data_set, prepare
from segbundles.errors import innermost
from segbundles.transforms import CheckImaged

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
    nib.save(nib.Nifti1Image(np.zeros((6, 5, 4, 2), np.uint8), affine), labels / "la_004.nii.gz")
    nib.save(nib.Nifti1Image(np.full((6, 5, 4), np.nan, np.float32), affine), root / "imagesTs" / "la_900.nii.gz")
    with pytest.raises(DataFaults) as caught:
        prepare(get_data_set("heart"), root, tmp_path / "out")
    found = [(caught.value.shown(fault), fault.problem) for fault in caught.value.faults]
    expected = [
        ("imagesTr/la_000.nii.gz", "has no label: labelsTr contains none for it"),
        ("labelsTr/la_001.nii.gz", "has no image: imagesTr contains none for it"),
        ("imagesTr/la_002.nii.gz", "cannot be read: it is truncated or damaged"),
        ("labelsTr/la_003.nii.gz", "label values 255.* allowed are 0, 1"),
        ("labelsTr/la_003.nii.gz", r"has size \(6, 6, 1\).* image la_003.nii.gz has \(6, 5, 4\)"),
        ("labelsTr/la_004.nii.gz", "has 2 channel"),
        ("imagesTs/la_900.nii.gz", "NaN or infinite values"),
    ]
    assert [file for file, _ in found] == [file for file, _ in expected]
    for (_, problem), (_, pattern) in zip(found, expected, strict=True):
        assert re.search(pattern, problem)
        assert str(root) not in problem
    assert not (tmp_path / "out").exists()


def _shift_label(root: Path) -> None:
    label = nib.load(root / "labelsTr" / "la_001.nii.gz")
    affine = label.affine.copy()
    affine[0, 3] += 0.005 * 1.37  # of a voxel's longest side; spacing and direction are equal
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj), affine), root / "labelsTr" / "la_001.nii.gz")


def _contradict(root: Path) -> None:
    image = nib.load(root / "imagesTr" / "la_001.nii.gz")
    affine = image.affine.copy()
    affine[:3, 3] = 10
    image.set_qform(affine, 1)
    nib.save(image, root / "imagesTr" / "la_001.nii.gz")


@pytest.mark.parametrize(
    ("change", "file", "problem"),
    [
        (_shift_label, "labelsTr/la_001.nii.gz", r"up to 0\.00685 mm .* its image la_001\.nii\.gz"),
        (_contradict, "imagesTr/la_001.nii.gz", r"^cannot be read: its sform puts voxel .*, its qform at "),
    ],
    ids=["label 0.005 voxels off its image", "sform and qform disagree"],
)
def test_what_training_refuses_is_a_fault(heart, tmp_path, change, file, problem):
    root = heart()
    change(root)
    with pytest.raises(DataFaults) as caught:
        prepare(get_data_set("heart"), root, tmp_path / "out")
    (fault,) = caught.value.faults
    assert (fault.case, caught.value.shown(fault)) == ("la_001", file)
    assert re.search(problem, fault.problem)
    pipeline = Compose(
        [
            LoadImaged(["image", "label"], reader=SuffixReader),
            EnsureChannelFirstd(["image", "label"]),
            CheckImaged(["image", "label"]),
        ]
    )
    with pytest.raises(RuntimeError) as refused:
        pipeline({key: root / f"{key}sTr" / "la_001.nii.gz" for key in ("image", "label")})
    assert innermost(refused.value).endswith(fault.problem.split(": ", 1)[-1] + ".")


@pytest.mark.samples
@pytest.mark.skipif(not (SAMPLES / "Task02_Heart").is_dir(), reason="no sample cases beside the checkout")
def test_samples(tmp_path):
    prepared = prepare(get_data_set("heart"), SAMPLES, tmp_path, validation_cases=["la_014"])
    assert [entry["group"] for entry in prepared.datalist["validation"]] == ["la_014"]
    assert prepared.facts["size (voxels)"] == "256 x 256 x 120"
    assert prepared.facts["spacing (mm)"] == "1.25 x 1.25 x 1.37"
