"""Measurements from the transform at the end of an inference to the table and the JSON file."""

from __future__ import annotations

import csv
import json
import logging

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import tifffile
import torch
from monai.data import Dataset, MetaTensor
from monai.inferers import Inferer
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

from segbundles.data import FolderImages, TolerantDataLoader
from segbundles.engines import TolerantEvaluator
from segbundles.handlers import InferenceMeasurements, InferenceResults
from segbundles.meta import set_pixel_sizes_nm
from segbundles.transforms import MeasureCellsd, MeasureMaskd, SaveSegmentationd


class Above100(Inferer):
    """Class 1 where a grey level is above 100; stops the run when it meets 255."""

    def __call__(self, inputs, network):
        if inputs.max() == 255:
            raise KeyboardInterrupt
        return (inputs[:, :1] > 100).to(torch.uint8)


def evaluator(cases, source, output, measure, reader="SuffixReader", skip_finished=False):
    load = Compose([LoadImaged("image", reader=f"segbundles.data.{reader}"), EnsureChannelFirstd("image")])
    return TolerantEvaluator(
        "cpu",
        TolerantDataLoader(Dataset(cases, load)),
        torch.nn.Identity(),
        inferer=Above100(),
        postprocessing=Compose([measure, SaveSegmentationd("pred", output, source)]),
        val_handlers=[
            InferenceResults(output, source, skip_finished),
            InferenceMeasurements(output, source, skip_finished),
        ],
    )


def volume(path, bright, spacing=(2.0, 3.0, 5.0)):
    values = np.zeros((6, 5, 4), np.uint8)
    for box in bright:
        values[box] = 200
    image = sitk.GetImageFromArray(values.transpose())
    image.SetSpacing(spacing)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def table(output):
    with (output / "inference.csv").open(newline="", encoding="utf-8") as file:
        return {row.pop("file"): row for row in csv.DictReader(file)}


def images(output):
    found = json.loads((output / "measurements.json").read_text())["images"]
    return {image["files"][0]: image for image in found}


def test_volumes_in_table_json_and_log(tmp_path, caplog):
    source, output = tmp_path / "d", tmp_path / "o"
    volume(source / "p/two.nrrd", [np.s_[1:3, 1:3, 1:3], np.s_[4, 3, 3]])
    volume(source / "none.nii.gz", [])
    (source / "cut.nrrd").write_bytes(b"NRRD0004\n")
    measure = MeasureMaskd("pred", {"1": "left atrium"}, shape=True, parts=True)
    run = evaluator(FolderImages(source, output), source, output, measure, skip_finished=True)
    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match="1 of 3 images failed"):
        run.run()
    rows = table(output)
    # 8 and 1 voxels of 30 mm3; the second touches the last slice
    assert {k: v for k, v in rows["p/two.nrrd"].items() if "_left_atrium" in k or k == "touches_border"} == {
        "volume_ml_left_atrium": "0.27",
        "voxels_left_atrium": "9",
        "slices_left_atrium": "2-4",
        "extent_mm_left_atrium": rows["p/two.nrrd"]["extent_mm_left_atrium"],
        "sphericity_left_atrium": rows["p/two.nrrd"]["sphericity_left_atrium"],
        "parts_left_atrium": "2",
        "touches_border": "True",
    }
    assert (rows["none.nii.gz"]["volume_ml_left_atrium"], rows["none.nii.gz"]["slices_left_atrium"]) == ("0", "")
    assert (rows["cut.nrrd"]["status"], rows["cut.nrrd"]["volume_ml_left_atrium"]) == ("failed", "")
    found = images(output)
    assert found["p/two.nrrd"]["classes"]["left atrium"]["part_volumes_ml"] == pytest.approx([0.24, 0.03])
    assert found["cut.nrrd"]["status"] == "failed"
    assert found["cut.nrrd"]["notes"] == rows["cut.nrrd"]["notes"] != ""
    assert any("two.nrrd segmented" in text and "left atrium: 0.3 ml" in text for text in caplog.messages)

    (output / "none_seg.nii.gz").unlink()
    (source / "cut.nrrd").unlink()
    again = evaluator(FolderImages(source, output), source, output, measure, skip_finished=True)
    again.run()
    kept = table(output)["p/two.nrrd"]
    assert kept.pop("notes") == "finished before"
    assert kept == {key: value for key, value in rows["p/two.nrrd"].items() if key != "notes"}
    assert images(output)["p/two.nrrd"] == found["p/two.nrrd"]


def test_what_is_measured_before_a_stop_is_written(tmp_path):
    volume(tmp_path / "d/a.nrrd", [np.s_[1, 1, 1]])
    volume(tmp_path / "d/b.nrrd", [])
    image = sitk.ReadImage(str(tmp_path / "d/b.nrrd"))
    sitk.WriteImage(image + 255, str(tmp_path / "d/b.nrrd"))
    run = evaluator(FolderImages(tmp_path / "d"), tmp_path / "d", tmp_path / "o", MeasureMaskd("pred"))
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert images(tmp_path / "o")["a.nrrd"]["classes"]["segmentation"]["voxels"] == 1
    assert table(tmp_path / "o")["a.nrrd"]["voxels_segmentation"] == "1"


def test_each_slice_of_a_stack_is_a_row_and_pixels_are_not_mm(tmp_path):
    files = [tmp_path / "d" / f"p_{number}.tif" for number in (1, 2)]
    (tmp_path / "d").mkdir()
    for number, file in enumerate(files):
        pixels = np.zeros((4, 5), np.uint8)
        pixels[1:3, 1 : 2 + number] = 200
        tifffile.imwrite(file, pixels)
    measure = MeasureMaskd("pred", {"1": "lesion"}, parts=True)
    evaluator([{"image": [*map(str, files)]}], tmp_path / "d", tmp_path / "o", measure, "StackReader").run()
    rows = table(tmp_path / "o")
    assert [(rows[f"p_{k}.tif"]["pixels_lesion"], rows[f"p_{k}.tif"]["fraction_lesion"]) for k in (1, 2)] == [
        ("2", "0.1"),
        ("4", "0.2"),
    ]
    assert "volume_ml_lesion" not in rows["p_1.tif"]
    (stack,) = images(tmp_path / "o").values()
    assert stack["files"] == ["p_1.tif", "p_2.tif"]
    assert stack["classes"]["lesion"] == {
        "pixels": 6,
        "fraction": 0.15,
        "slices": [1, 2],
        "parts": 1,
        "part_pixels": [6],
    }
    assert [(one["file"], one["classes"]["lesion"]["pixels"]) for one in stack["slices"]] == [
        ("p_1.tif", 2),
        ("p_2.tif", 4),
    ]


@pytest.mark.parametrize(
    ("given", "in_file", "size", "note"),
    [
        (None, None, None, "pixel size unknown: areas are in pixels only"),
        (None, 5.0, 5.0, ""),
        (None, 8.0, 8.0, "pixel size 8 nm, but the network learnt 4 nm: segment again with --pixel_nm 8"),
        (8.0, 4.0, 8.0, ""),
    ],
)
def test_cells_have_a_table_and_a_note_on_the_pixel_size(tmp_path, given, in_file, size, note):
    cells = torch.zeros(1, 6, 5, dtype=torch.int32)
    cells[0, 1:3, 1:3] = 1
    mask = MetaTensor((cells > 0).to(torch.uint8))
    set_pixel_sizes_nm(mask, in_file and (in_file, in_file, 0.0))
    item = MeasureCellsd("pred", pixel_nm=given)({"pred": mask, "cells": cells})
    assert item["pred"].meta.get("notes", "") == note
    measured = item["measurements"]
    assert (measured["cells"], measured["pixel_nm"]) == (1, size)
    assert [row["area_nm2"] for row in measured["table"]] == [size and 4 * size**2]
