from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from segbundles.datasets import DataFaults, get_data_set, prepare


@pytest.fixture
def polyps912(tmp_path):
    """Make a good polyps_split7 of 4, 2 and 2 frames, 24 x 18 pixels, with masks2 and masks4."""

    def make() -> Path:
        source = tmp_path / "polyps_split7"
        number = 0
        for folder, count in (("train", 4), ("valid", 2), ("test", 2)):
            for name in ("images", "masks2", "masks4"):
                (source / folder / name).mkdir(parents=True)
            for k in range(1, count + 1):
                number += 1
                image = np.random.default_rng(number).integers(0, 255, (18, 24, 3), dtype=np.uint8)
                Image.fromarray(image).save(source / folder / "images" / f"{k}.bmp")
                mask = np.zeros((18, 24), np.uint8)
                mask[2 : 6 + number, 2:9] = 1
                tifffile.imwrite(source / folder / "masks2" / f"{k}.tif", mask)
                mask[-3:] = (2, 3)[k % 2]
                tifffile.imwrite(source / folder / "masks4" / f"{k}.tif", mask)
        return source

    return make


def _prepare(source: Path, tmp_path: Path, masks: str = "masks2", **options):
    return prepare(get_data_set("polyps912", masks=masks), source, tmp_path / "out", **options)


@pytest.mark.parametrize("above", [False, True])
def test_splits_are_the_publishers(polyps912, tmp_path, above):
    source = polyps912()
    prepared = _prepare(source.parent if above else source, tmp_path)
    counts = [prepared.datalist[key] for key in ("numTraining", "numValidation", "numTest")]
    assert counts == [4, 2, 2]
    assert prepared.datalist["testing"][1] == {
        "case": "test/2",
        "image": "../polyps_split7/test/images/2.bmp",
        "label": "../polyps_split7/test/masks2/2.tif",
        "group": "test/2",
    }
    assert prepared.units == ("frames", "groups")
    assert prepared.datalist["labels"] == {"0": "background", "1": "polyp"}
    assert prepared.datalist["void_class"] == 2


def test_masks_of_four_classes(polyps912, tmp_path):
    prepared = _prepare(polyps912(), tmp_path, masks="masks4")
    assert prepared.datalist["labels"] == {"0": "background", "1": "polyp", "2": "class 2"}
    assert prepared.datalist["void_class"] == 3
    assert prepared.facts["classes"] == "0 1 void (4), 0 1 2 (4)"
    assert prepared.datalist["training"][0]["label"].endswith("train/masks4/1.tif")


def test_patients_by_a_table(polyps912, tmp_path):
    source = polyps912()
    rows = ["train/1,A", "train/2,A", "train/3,B", "train/4,B", "valid/1,C", "valid/2,C", "test/1,D", "test/2,E"]
    (source / "patients.csv").write_text("\n".join(["frame,sequence", *rows]))
    datalist = _prepare(source, tmp_path).datalist
    assert [e["group"] for e in datalist["training"]] == ["A", "A", "B", "B"]
    (source / "patients.csv").write_text("\n".join(["frame,sequence", *rows[:-1], "test/2,A"]))
    with pytest.raises(ValueError, match=r"form one group .* cannot be both in"):
        _prepare(source, tmp_path)
    (source / "patients.csv").write_text("\n".join(["frame,sequence", *rows[1:]]))
    with pytest.raises(DataFaults, match=r"is in no row of patients.csv: add it"):
        _prepare(source, tmp_path)


def test_a_frame_in_two_folders_is_named_and_can_be_left_out(polyps912, tmp_path):
    source = polyps912()
    shutil.copy(source / "train" / "images" / "3.bmp", source / "valid" / "images" / "1.bmp")
    message = r"^case valid/1 of validation and train/3 of training form one group .* cannot be both in training and"
    with pytest.raises(ValueError, match=message):
        _prepare(source, tmp_path)
    split = {"training": [f"train/{k}" for k in (1, 2, 4)], "validation": ["valid/1", "valid/2"]}
    assert _prepare(source, tmp_path, split=split).datalist["numTraining"] == 3


def test_of_many_frames_of_one_group_a_few_are_named(polyps912, tmp_path):
    source = polyps912()
    for k in range(5, 30):
        for name in ("images/{}.bmp", "masks2/{}.tif"):
            shutil.copy(source / "train" / name.format(1), source / "train" / name.format(k))
    shutil.copy(source / "train" / "images" / "1.bmp", source / "valid" / "images" / "1.bmp")
    with pytest.raises(ValueError, match=r"and 21 more of training form one group") as caught:
        _prepare(source, tmp_path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("masks2/1.tif", r"images/1.bmp: has no mask: masks2/ contains none"),
        ("images/1.bmp", r"masks2/1.tif: has no image"),
    ],
)
def test_pairs(polyps912, tmp_path, file, problem):
    source = polyps912()
    (source / "train" / file).unlink()
    with pytest.raises(DataFaults, match=problem):
        _prepare(source, tmp_path)


def test_masks_that_are_not_there(polyps912, tmp_path):
    with pytest.raises(ValueError, match=r"there is no masks3 in .*train: choose --masks from masks2, masks4"):
        _prepare(polyps912(), tmp_path, masks="masks3")
    with pytest.raises(ValueError, match=r"masks must be one of masks2, masks3, masks4, got 'masks9'"):
        get_data_set("polyps912", masks="masks9")
    with pytest.raises(ValueError, match=r"isbi2012 has no option 'masks': it has invert_labels"):
        get_data_set("isbi2012", masks="masks2")
    with pytest.raises(ValueError, match=r"no case in .*: expected train/, valid/ and test/"):
        _prepare(tmp_path / "polyps_split7" / "valid", tmp_path)
