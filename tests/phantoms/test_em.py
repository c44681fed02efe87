from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from segbundles.cli import app
from segbundles.datasets import get_data_set, prepare
from segbundles.metrics import label_cells
from segbundles.phantoms.em import make_phantom, make_section, make_stack

SMALL = {"sections": 6, "seed": 3, "size": (40, 48)}


def test_layout_and_split(phantom):
    assert sorted(p.name for p in phantom.iterdir()) == ["datalist.json", "train-labels.tif", "train-volume.tif"]
    datalist = json.loads((phantom / "datalist.json").read_text())
    pages = [[e["page"] for e in datalist[s]] for s in ("training", "validation", "testing")]
    assert pages == [[0, 1, 2, 3], [4], [5]]
    assert datalist["name"] == "em_phantom"
    assert datalist["validation"][0]["image"] == "train-volume.tif"
    with tifffile.TiffFile(phantom / "train-volume.tif") as file:
        assert len(file.pages) == 6
        assert (file.pages[0].shape, file.pages[0].dtype) == ((48, 40), np.uint8)


def test_files_hold_what_make_stack_makes(phantom):
    image, label = make_stack(np.random.default_rng(3), (40, 48), 6)
    np.testing.assert_array_equal(tifffile.imread(phantom / "train-volume.tif"), image[0].T)
    np.testing.assert_array_equal(tifffile.imread(phantom / "train-labels.tif"), label[0].T)


def test_prepare_isbi2012_reads_it(phantom, tmp_path):
    prepared = prepare(get_data_set("isbi2012"), phantom, tmp_path, folds=3, fold=0)
    assert [e["page"] for e in prepared.datalist["validation"]] == [0, 1]
    assert [note.split(":")[0] for note in prepared.notes] == ["validation has 2 sections of 1 block"]
    assert prepared.facts["size (pixels)"] == "40 x 48"


def test_default_size(tmp_path):
    prepared = make_phantom(tmp_path)
    counts = [prepared.datalist[key] for key in ("numTraining", "numValidation", "numTest")]
    assert counts == [8, 2, 2]
    assert prepared.facts["size (pixels)"] == "128 x 128"


def test_command_line(tmp_path):
    arguments = ["phantom", "em", "--out", str(tmp_path), "--sections", "3", "--size", "40", "32", "--seed", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "size (pixels): 40 x 32" in result.output


@pytest.mark.parametrize("seed", range(4))
def test_anatomy_and_value_ranges(seed):
    image, label = make_section(np.random.default_rng(seed))
    assert image.shape == label.shape == (1, 128, 128)
    assert image.dtype == label.dtype == np.uint8
    assert np.unique(label).tolist() == [0, 255]
    membrane = label == 0
    assert 0.18 < membrane.mean() < 0.33
    assert image[membrane].mean() < image[~membrane].mean() - 40
    assert 15 < label_cells(label[0]).max() < 60
    # no threshold of the image finds the membranes
    accuracy = max(((image < level) == membrane).mean() for level in range(60, 180, 5))
    assert accuracy < 0.95


def test_neighbours_look_alike_and_distant_sections_do_not():
    image, label = (a[0].reshape(-1, 12).astype(float) for a in make_stack(np.random.default_rng(0)))
    for stack, near, far in ((image, 0.35, 0.3), (label, 0.35, 0.3)):
        alike = np.corrcoef(stack.T)
        assert np.diagonal(alike, 1).min() > near
        assert alike[0, 11] < far
        assert np.diagonal(alike, 1).max() < 0.8


def test_other_seed_other_cells():
    one, same, other = (make_section(np.random.default_rng(s), (32, 32))[0] for s in (0, 0, 1))
    assert (one == same).all()
    assert (one != other).mean() > 0.5


def test_rerun_replaces_an_older_phantom(tmp_path):
    make_phantom(tmp_path, **SMALL)
    prepared = make_phantom(tmp_path, sections=3, size=(32, 32))
    assert prepared.datalist["numTraining"] == prepared.datalist["numTest"] == 1
    assert prepared.facts["size (pixels)"] == "32 x 32"


@pytest.mark.parametrize("foreign", ["train-volume.tif", "train-labels.tif", "datalist.json"])
def test_foreign_files_are_kept(tmp_path, foreign):
    path = tmp_path / foreign
    if path.suffix == ".tif":
        tifffile.imwrite(path, np.zeros((3, 40, 40), np.uint8))
    else:
        path.write_text("mine")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"choose another --out"):
        make_phantom(tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sections": 2}, r"sections must be 3 or more, for training, validation and testing, got 2"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"size": (64, 31)}, r"size must be two numbers of 32 pixels or more, got \(64, 31\)"),
        ({"size": (64, 64, 8)}, r"size must be two numbers of 32 pixels or more, got \(64, 64, 8\)"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_phantom(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []
