from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import tifffile

from segbundles.datasets import get_data_set, prepare
from segbundles.phantoms.brain import make_patient, make_phantom

SMALL = {"cases": 5, "seed": 3, "size": (40, 48), "slices": 6}


def test_layout_and_split(phantom):
    datalist = json.loads((phantom / "datalist.json").read_text())
    assert sorted(p.name for p in phantom.iterdir()) == ["datalist.json", "kaggle_3m"]
    groups = [sorted({e["group"] for e in datalist[s]}) for s in ("training", "validation", "testing")]
    assert groups == [["phantom3_000", "phantom3_001", "phantom3_002"], ["phantom3_003"], ["phantom3_004"]]
    entry = datalist["validation"][1]
    assert entry["image"] == "kaggle_3m/phantom3_003/phantom3_003_2.tif"
    assert entry["label"] == "kaggle_3m/phantom3_003/phantom3_003_2_mask.tif"
    assert entry["slice"] == 2
    image, mask = (tifffile.TiffFile(phantom / entry[key]).pages[0] for key in ("image", "label"))
    assert (image.shape, image.dtype, image.photometric.name) == ((48, 40, 3), np.uint8, "RGB")
    assert (mask.shape, mask.dtype) == ((48, 40), np.uint8)
    assert datalist["name"] == "brain_phantom"
    assert datalist["licence"] == "Apache-2.0"


def test_files_hold_what_make_patient_makes(phantom):
    rng = np.random.default_rng([3, 2])
    image, label = make_patient(rng, (40, 48), int(rng.integers(5, 8)))
    folder = phantom / "kaggle_3m" / "phantom3_002"
    assert len(list(folder.iterdir())) == 2 * image.shape[-1]
    for index in range(image.shape[-1]):
        stem = f"phantom3_002_{index + 1}"
        np.testing.assert_array_equal(tifffile.imread(folder / f"{stem}.tif"), image[..., index].transpose(2, 1, 0))
        np.testing.assert_array_equal(tifffile.imread(folder / f"{stem}_mask.tif"), label[0, ..., index].T)


def test_prepare_lgg_reads_it_and_notes_the_two_special_patients(phantom, tmp_path):
    prepared = prepare(get_data_set("lgg"), phantom, tmp_path, validation_cases=["phantom3_002"])
    assert {e["group"] for e in prepared.datalist["validation"]} == {"phantom3_002"}
    assert prepared.notes[:-1] == [  # the last is on few patients
        "pre-contrast is missing and replaced by FLAIR in 1 patients: phantom3_000",
        "1 patients have no lesion: phantom3_001",
    ]
    assert prepared.facts["size (pixels)"] == "40 x 48"


def test_same_seed_same_bytes_whatever_the_number_of_cases(phantom, tmp_path):
    make_phantom(tmp_path, **{**SMALL, "cases": 4})
    files = sorted(tmp_path.rglob("*.tif"))
    assert len({p.parent for p in files}) == 4
    for path in files:
        assert path.read_bytes() == (phantom / path.relative_to(tmp_path)).read_bytes()


def test_default_size(tmp_path):
    prepared = make_phantom(tmp_path, seed=1)
    counts = [prepared.datalist[key] for key in ("numTraining", "numValidation", "numTest")]
    entries = [e for s in ("training", "validation", "testing") for e in prepared.datalist[s]]
    numbers = [sum(e["group"] == g for e in entries) for g in {e["group"] for e in entries}]
    assert len(numbers) == 12
    assert sum(numbers) == sum(counts)
    assert set(numbers) <= {8, 9, 10, 11, 12}
    assert len(set(numbers)) > 1
    assert prepared.facts["size (pixels)"] == "64 x 64"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("size", "slices"), [((64, 64), 8), ((96, 80), 12), ((32, 40), 4)])
def test_anatomy_and_value_ranges(seed, size, slices):
    image, label = make_patient(np.random.default_rng(seed), size, slices)
    assert (image.shape, image.dtype) == ((3, *size, slices), np.uint8)
    assert (label.shape, label.dtype) == ((1, *size, slices), np.uint8)
    assert set(np.unique(label)) == {0, 255}
    inside = label[0] > 0
    with_lesion = np.flatnonzero(inside.any((0, 1)))
    assert 2 <= len(with_lesion) < slices
    assert all(b - a == 1 for a, b in pairwise(with_lesion))
    assert 0.002 < inside.mean() < 0.1
    assert image[:, 0, 0].max() < 20  # air in the corners
    around = image[1][~inside & (image[1] > 40)]
    assert image[1][inside].mean() > around.mean() + 25  # bright in FLAIR, not in the others
    for channel in (0, 2):
        assert image[channel][inside].mean() < image[channel][~inside & (image[channel] > 60)].mean() + 5


@pytest.mark.parametrize("size", [(64, 64), (96, 96)])
def test_no_threshold_finds_the_lesion(size):
    best = []
    for seed in range(6):
        image, label = make_patient(np.random.default_rng(seed), size)
        inside = label[0] > 0
        masks = [image[1] > level for level in range(60, 200, 5)]
        best.append(max(2 * (mask & inside).sum() / (mask.sum() + inside.sum()) for mask in masks))
    assert np.median(best) < 0.5


def test_patient_without_lesion():
    image, label = make_patient(np.random.default_rng(0), lesion=False)
    assert image.shape == (3, 64, 64, 8)
    assert not label.any()


def test_lesion_fades_at_its_edge():
    image, label = make_patient(np.random.default_rng(4), (96, 96), 8)
    rim = np.zeros(label[0].shape, bool)
    inside = label[0] > 0
    for axis in (0, 1):
        for step in (-2, 2):
            rim |= inside & ~np.roll(inside, step, axis)
    core = inside & ~rim
    assert image[1][rim].mean() < image[1][core].mean() - 10


def test_rerun_leaves_no_older_slices_or_patients_in_the_datalist(tmp_path):
    make_phantom(tmp_path, cases=5, size=(32, 32), slices=15)
    prepared = make_phantom(tmp_path, cases=4, size=(40, 40), slices=5)
    entries = [e for s in ("training", "validation", "testing") for e in prepared.datalist[s]]
    assert {e["group"] for e in entries} == {f"phantom0_{i:03d}" for i in range(4)}
    assert max(e["slice"] for e in entries) <= 6
    assert len(prepared.notes) == 3


@pytest.mark.parametrize("foreign", ["kaggle_3m/TCGA_CS_4941/x_1.tif", "kaggle_3m/data.csv", "datalist.json"])
def test_foreign_files_are_kept(tmp_path, foreign):
    path = tmp_path / foreign
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"choose another --out"):
        make_phantom(tmp_path, **SMALL)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    assert path.read_text() == "mine"


def test_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kaggle_3m").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"kaggle_3m was not written by a phantom"):
        make_phantom(tmp_path / "out", **SMALL)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cases": 3}, "cases must be 4 or more, .*, got 3"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"size": (64, 31)}, r"size must be two numbers of 32 pixels or more, got \(64, 31\)"),
        ({"size": (64, 64, 8)}, r"size must be two numbers of 32 pixels or more, got \(64, 64, 8\)"),
        ({"slices": 3}, "slices must be 4 or more to show a head, got 3"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_phantom(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []
