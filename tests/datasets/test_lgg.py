from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from segbundles.datasets import DataFaults, get_data_set, prepare

SAMPLES = Path(__file__).resolve().parents[3] / "shared" / "real_data" / "samples"


def _image(seed: int, shape: tuple[int, ...] = (6, 8, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)


def _write(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, array, metadata=None, **options)


@pytest.fixture
def lgg(tmp_path):
    """Make a good kaggle_3m folder of patients A_1, A_2, A_10 with eleven slices each, 8 x 6 pixels.

    The mask of slice n holds n - 1 pixels and, to be unlike the others', one for its patient, but none in slice 1.
    """

    def make(patients: tuple[str, ...] = ("A_10", "A_1", "A_2"), slices: int = 11, root: str = "kaggle_3m") -> Path:
        source = tmp_path / root
        for index, patient in enumerate(patients):
            for number in range(1, slices + 1):
                mask = np.zeros((6, 8), np.uint8)
                if number > 1:
                    mask.flat[: number - 1] = 255
                    mask.flat[47 - index] = 255
                _write(source / patient / f"{patient}_{number}.tif", _image(100 * index + number), photometric="rgb")
                _write(source / patient / f"{patient}_{number}_mask.tif", mask)
        return source

    return make


def _prepare(source: Path, tmp_path: Path, **options):
    prepared = prepare(get_data_set("lgg"), source, tmp_path / "out", **options)
    # all of these have few groups
    return replace(prepared, notes=[note for note in prepared.notes if not note.startswith("validation has ")])


def test_entries_in_numeric_order(lgg, tmp_path):
    prepared = _prepare(lgg(), tmp_path, validation_cases=["A_2"])
    training, validation = prepared.datalist["training"], prepared.datalist["validation"]
    assert [(e["group"], e["slice"]) for e in training] == [(p, n) for p in ("A_1", "A_10") for n in range(1, 12)]
    assert validation[9] == {
        "case": "A_2_10",
        "image": "../kaggle_3m/A_2/A_2_10.tif",
        "label": "../kaggle_3m/A_2/A_2_10_mask.tif",
        "group": "A_2",
        "slice": 10,
        "lesion_area": 10,
    }
    assert [e["lesion_area"] for e in validation] == [0, *range(2, 12)]
    assert prepared.notes == []
    assert prepared.units == ("slices", "patients")
    assert prepared.facts == {
        "size (pixels)": "8 x 6",
        "pre-contrast": "acquired (33)",
        "post-contrast": "acquired (33)",
        "slices": "with lesion (30), without lesion (3)",
        "lesion area (pixels)": "2-11",
    }
    assert prepared.datalist["labels"] == {"0": "background", "1": "FLAIR abnormality"}
    assert prepared.datalist["modality"]["1"] == "MRI FLAIR"
    assert prepared.datalist["tensorImageSize"] == "2D"


def test_folds_are_of_patients(lgg, tmp_path):
    source, found = lgg(slices=2), []
    for fold in range(3):
        entries = _prepare(source, tmp_path, folds=3, fold=fold).datalist["validation"]
        found.append({e["group"] for e in entries})
        assert len(entries) == 2
    assert sorted(map(sorted, found)) == [["A_1"], ["A_10"], ["A_2"]]


@pytest.mark.parametrize("copy", ["lgg-mri-segmentation", "kaggle_3m/lgg-mri-segmentation"])
@pytest.mark.parametrize("inner", ["kaggle_3m", ""])
@pytest.mark.parametrize("below", ["archive", "archive/kaggle_3m"])
def test_second_copy_is_ignored(lgg, tmp_path, copy, inner, below):
    source = lgg(slices=2, root="archive/kaggle_3m")
    shutil.copytree(source, tmp_path / "archive" / "kept")
    shutil.move(tmp_path / "archive" / "kept", tmp_path / "archive" / copy / inner)
    prepared = _prepare(tmp_path / below, tmp_path)
    entries = prepared.datalist["training"] + prepared.datalist["validation"]
    assert len(entries) == 6
    assert all(e["image"].startswith("../archive/kaggle_3m/A_") for e in entries)
    seen = (tmp_path / "archive" / copy).is_relative_to(tmp_path / below)
    expected = [f"{tmp_path / 'archive' / copy} is a second copy of the data and ignored"] if seen else []
    assert prepared.notes == expected


def test_copy_is_read_where_nothing_else_is_there(lgg, tmp_path):
    lgg(slices=2, root="archive/lgg-mri-segmentation/kaggle_3m")
    prepared = _prepare(tmp_path / "archive", tmp_path)
    assert prepared.datalist["numTraining"] + prepared.datalist["numValidation"] == 6
    assert prepared.notes == []


def test_renamed_folders_and_other_files(lgg, tmp_path):
    source = lgg(slices=2)
    (source / "A_1").rename(source / "my patient 7")
    for name in ("data.csv", "A_2/._A_2_1.tif", "A_2/notes_1.txt", "A_2/mean.tif", ".hidden/x_1.tif"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("x")
    entries = _prepare(source, tmp_path, validation_cases=["my patient 7"]).datalist["validation"]
    assert [(e["case"], e["image"], e["group"]) for e in entries] == [
        (f"my patient 7_{n}", f"../kaggle_3m/my patient 7/A_1_{n}.tif", "my patient 7") for n in (1, 2)
    ]


def test_colour_planes_stored_apart(lgg, tmp_path):
    source = lgg(slices=2)
    _write(source / "A_1" / "A_1_1.tif", _image(7, (3, 6, 8)), photometric="rgb", planarconfig="separate")
    assert _prepare(source, tmp_path).facts["size (pixels)"] == "8 x 6"


@pytest.mark.parametrize(
    ("channel", "sequence"), [(0, "pre-contrast"), (2, "post-contrast")], ids=["pre-contrast", "post-contrast"]
)
def test_missing_sequence_is_noted(lgg, tmp_path, channel, sequence):
    source = lgg(slices=3)
    for patient, numbers in (("A_1", (1, 2, 3)), ("A_2", (1, 2))):
        for number in numbers:
            image = _image(ord(patient[-1]) * number)
            image[..., channel] = image[..., 1]
            _write(source / patient / f"{patient}_{number}.tif", image, photometric="rgb")
    black = np.zeros((6, 8, 3), np.uint8)
    _write(source / "A_1" / "A_1_3.tif", black, photometric="rgb")
    prepared = _prepare(source, tmp_path)
    assert prepared.notes == [
        f"{sequence} is missing and replaced by FLAIR in 1 patients: A_1",
        "1 slices are blank, one value throughout: A_1_3",
    ]
    assert prepared.facts[sequence] == "same as FLAIR (4), acquired (4)"


def test_gaps_blank_slices_and_patients_without_lesion(lgg, tmp_path):
    source = lgg()
    for number in (3, 4, 5, 6, 7, 8, 11):  # 11 is the last: no gap
        for suffix in ("", "_mask"):
            (source / "A_2" / f"A_2_{number}{suffix}.tif").unlink()
    for number in range(1, 12):
        _write(source / "A_1" / f"A_1_{number}_mask.tif", np.zeros((6, 8), np.uint8))
    for patient in ("A_1", "A_2"):
        _write(source / patient / f"{patient}_10.tif", np.zeros((6, 8, 3), np.uint8), photometric="rgb")
    prepared = _prepare(source, tmp_path)
    assert prepared.notes == [
        "slice numbers have gaps in 1 patients: A_2 (missing 3, 4, 5, 6, 7 and 1 more)",
        "1 patients have no lesion: A_1",
        "2 slices are blank, one value throughout: A_1_10, A_2_10",
    ]
    groups = {e["group"] for e in prepared.datalist["training"] + prepared.datalist["validation"]}
    assert groups == {"A_1", "A_2", "A_10"}  # blank slices and empty masks join no patients


@pytest.mark.parametrize("suffix", ["", "_mask"], ids=["image", "mask"])
def test_identical_slices_join_patients_but_are_no_news_inside_one(lgg, tmp_path, suffix):
    source = lgg(slices=3)
    shutil.copy(source / "A_1" / f"A_1_3{suffix}.tif", source / "A_1" / f"A_1_2{suffix}.tif")
    assert _prepare(source, tmp_path).notes == []
    shutil.copy(source / "A_1" / f"A_1_3{suffix}.tif", source / "A_10" / f"A_10_2{suffix}.tif")
    prepared = _prepare(source, tmp_path, validation_cases=["A_10"])
    what = "labels" if suffix else "images"
    assert prepared.notes == [f"identical {what}: A_1_2, A_1_3, A_10_2 (one group)"]
    assert prepared.datalist["numValidation"] == 6


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


_MASK = np.full((6, 8), 255, np.uint8)

# what is done to a file of patient A_1, and the fault that must be reported for it
FAULTS = {
    "no mask": ("A_1_2_mask.tif", Path.unlink, "A_1_2.tif", "has no mask: A_1/ contains none for it"),
    "no image": ("A_1_2.tif", Path.unlink, "A_1_2_mask.tif", "has no image: A_1/ contains none for it"),
    "other size": ("A_1_2_mask.tif", lambda p: _write(p, _MASK[:5]), "", r"size \(8, 5, 1\).* has \(8, 6, 1\)"),
    "RGBA": (
        "A_1_2.tif",
        lambda p: _write(p, _image(1, (6, 8, 4)), photometric="rgb", extrasamples=["unassalpha"]),
        "",
        "has 4 channel",
    ),
    "one channel": ("A_1_2.tif", lambda p: _write(p, _image(1)[..., 0]), "", "has 1 channel"),
    "pages": (
        "A_1_2.tif",
        lambda p: _write(p, _image(1, (2, 6, 8, 3)), photometric="rgb"),
        "",
        "has 2 pages, expected one slice per file",
    ),
    "mask of 0 and 1": (
        "A_1_2_mask.tif",
        lambda p: _write(p, _MASK // 255),
        "",
        "label values 1.* allowed are 0, 255",
    ),
    "grey mask": (
        "A_1_2_mask.tif",
        lambda p: _write(p, np.arange(48, dtype=np.uint8).reshape(6, 8)),
        "",
        "label values 1, 2, 3, 4, 5.* allowed are 0, 255",
    ),
    "mask in colour": (
        "A_1_2_mask.tif",
        lambda p: _write(p, _image(1), photometric="rgb"),
        "",
        "has 3 channels but a label must have one, or three with black and one other colour",
    ),
    "float mask": (
        "A_1_2_mask.tif",
        lambda p: _write(p, (_MASK / 255).astype(np.float32)),
        "",
        "label values 1; allowed are 0, 255",
    ),
    "truncated image": ("A_1_2.tif", _truncate, "", "cannot be read: "),
    "truncated mask": ("A_1_2_mask.tif", _truncate, "", "cannot be read: "),
    "empty file": ("A_1_2.tif", lambda p: p.write_bytes(b""), "", "cannot be read: "),
    "not a TIFF": ("A_1_2.tif", lambda p: p.write_text("an apple a day"), "", "cannot be read: .*TIFF"),
    "second image of a number": (
        "A_1_2.tif",
        lambda p: shutil.copy(p, p.with_name("A_1_02.tif")),
        "",
        "is a second file of A_1_2, next to A_1_02.tif",
    ),
    "second mask of a number": (
        "A_1_2_mask.tif",
        lambda p: shutil.copy(p, p.with_name("Other_2_mask.tif")),
        "Other_2_mask.tif",
        "is a second file of A_1_2, next to A_1_2_mask.tif",
    ),
    "pair of other size than the patient": (
        "A_1_2.tif",
        lambda p: (_write(p, _image(1)[:5], photometric="rgb"), _write(p.with_name("A_1_2_mask.tif"), _MASK[:5])),
        "",
        "size 8 x 5 differs from 8 x 6 of the patient",
    ),
}


def _red(mask: np.ndarray, path: Path) -> None:
    image = Image.fromarray(mask // 255, mode="P")
    image.putpalette([0, 0, 0, 128, 0, 0])
    image.save(path)


@pytest.mark.parametrize(
    "write",
    [
        lambda mask, path: Image.fromarray(mask > 0).save(path),
        lambda mask, path: Image.fromarray(mask > 0).save(path, compression="group4"),
        _red,
        lambda mask, path: tifffile.imwrite(path, np.stack([mask] * 3, -1), photometric="rgb"),
        lambda mask, path: tifffile.imwrite(path, mask.astype(np.float32) * np.float32(0.99999)),
    ],
    ids=["one bit", "G4", "red", "RGB", "float"],
)
def test_masks_that_show_the_same_are_the_same(lgg, tmp_path, write):
    expected = _prepare(source := lgg(slices=4), tmp_path).datalist
    (tmp_path / "out").rename(tmp_path / "before")
    for path in source.glob("*/*_mask.tif"):
        write(tifffile.imread(path), path)
    assert _prepare(source, tmp_path).datalist == expected


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(lgg, tmp_path, fault):
    name, change, other, problem = FAULTS[fault]
    file = other or name
    source = lgg(slices=3)
    change(source / "A_1" / name)
    with pytest.raises(DataFaults, match=problem) as caught:
        _prepare(source, tmp_path)
    assert [(f.case, f.file.name) for f in caught.value.faults] == [("A_1_2", file)]
    assert f"A_1/{file}: " in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_all_faults_at_once_in_numeric_order(lgg, tmp_path):
    source = lgg()
    for number in (10, 9):
        (source / "A_1" / f"A_1_{number}_mask.tif").unlink()
    _truncate(source / "A_2" / "A_2_3.tif")
    with pytest.raises(DataFaults, match=r"3 faults in ") as caught:
        _prepare(source, tmp_path)
    assert [f.case for f in caught.value.faults] == ["A_1_9", "A_1_10", "A_2_3"]


def test_patient_left_out_by_the_split_may_be_faulty(lgg, tmp_path):
    source = lgg(slices=2)
    (source / "A_2" / "A_2_1_mask.tif").unlink()
    _truncate(source / "A_2" / "A_2_2.tif")
    split = {"training": ["A_1"], "validation": ["A_10"]}
    prepared = _prepare(source, tmp_path, split=split)
    assert prepared.datalist["numTraining"] == prepared.datalist["numValidation"] == 2
    assert prepared.notes == ["slices left out, because no list of the split names them: A_2_1, A_2_2"]
    with pytest.raises(DataFaults, match="2 faults"):
        _prepare(source, tmp_path, split={**split, "testing": ["A_2"]})


def test_unknown_patient(lgg, tmp_path):
    with pytest.raises(ValueError, match=r"cases that are not in the source: A_20; did you mean 'A_2"):
        _prepare(lgg(slices=1), tmp_path, validation_cases=["A_20"])


@pytest.mark.samples
@pytest.mark.skipif(not (SAMPLES / "kaggle_3m").is_dir(), reason="no sample cases beside the checkout")
def test_samples(tmp_path):
    prepared = prepare(get_data_set("lgg"), SAMPLES, tmp_path, validation_cases=["TCGA_CS_5393_19990606"])
    assert (prepared.datalist["numTraining"], prepared.datalist["numValidation"]) == (20, 20)
    assert {e["group"] for e in prepared.datalist["validation"]} == {"TCGA_CS_5393_19990606"}
    assert prepared.facts["size (pixels)"] == "256 x 256"
    assert prepared.facts["slices"] == "without lesion (23), with lesion (17)"
    assert len(prepared.notes) == 2  # on the patient in validation, and on the other data sets in that folder


def test_a_patient_whose_name_is_not_utf_8_is_left_out_by_name(lgg, tmp_path):
    source = lgg(patients=("A", "B"), slices=2)
    (source / "B").rename(source / os.fsdecode(b"M\xfcller"))
    prepared = _prepare(source, tmp_path)
    assert {entry["group"] for entry in prepared.datalist["training"]} == {"A"}
    left_out = "2 slices are left out, because their names contain bytes that are not UTF-8 (rename them)"
    assert f"{left_out}: M\\xfcller_1, M\\xfcller_2" in prepared.notes
    shutil.rmtree(source / "A")
    with pytest.raises(ValueError, match=r"no case is left in .*rename them\): M\\xfcller_1"):
        _prepare(source, tmp_path)
