from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile

from segbundles.datasets import get_data_set, prepare
from segbundles.phantoms.polyp import make_phantom, make_sequence

SMALL = {"sequences": 5, "frames": 3, "seed": 3, "size": (64, 48)}


def test_layout_and_split(phantom):
    datalist = json.loads((phantom / "datalist.json").read_text())
    assert sorted(p.name for p in phantom.iterdir()) == ["Ground Truth", "Original", "datalist.json", "sequences.csv"]
    groups = [sorted({e["group"] for e in datalist[s]}) for s in ("training", "validation", "testing")]
    assert groups == [["sequence_1", "sequence_2", "sequence_3"], ["sequence_4"], ["sequence_5"]]
    entry = datalist["validation"][0]
    assert (entry["image"], entry["label"]) == ("Original/10.tif", "Ground Truth/10.tif")
    image, mask = (tifffile.TiffFile(phantom / entry[key]).pages[0] for key in ("image", "label"))
    assert (image.shape, image.dtype, image.photometric.name) == ((48, 64, 3), np.uint8, "RGB")
    assert (mask.shape, mask.dtype) == ((48, 64), np.uint8)
    assert (datalist["name"], datalist["licence"]) == ("polyp_phantom", "Apache-2.0")


def test_files_hold_what_make_sequence_makes(phantom):
    image, label = make_sequence(np.random.default_rng([3, 3]), (64, 48), 3)
    for k in range(3):
        np.testing.assert_array_equal(tifffile.imread(phantom / "Original" / f"{7 + k}.tif"), image[..., k].T)
        np.testing.assert_array_equal(tifffile.imread(phantom / "Ground Truth" / f"{7 + k}.tif"), label[0, ..., k].T)


def test_prepare_clinicdb_reads_it(phantom, tmp_path):
    prepared = prepare(get_data_set("clinicdb"), phantom, tmp_path, validation_cases=["sequence_3"])
    assert {e["group"] for e in prepared.datalist["validation"]} == {"sequence_3"}
    assert prepared.notes[:-1] == ["3 frames have no polyp: 4, 5, 6"]  # the last is on few sequences
    assert prepared.facts["size (pixels)"] == "64 x 48"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [(96, 72), (64, 64), (160, 90)])
def test_scene_and_value_ranges(seed, size):
    image, label = make_sequence(np.random.default_rng(seed), size, 4)
    assert (image.shape, image.dtype) == ((3, *size, 4), np.uint8)
    assert (label.shape, label.dtype) == ((1, *size, 4), np.uint8)
    assert set(np.unique(label)) == {0, 255}
    share = (label[0] > 0).mean((0, 1))
    assert share.min() > 0.01
    assert share.max() < 0.35
    assert image[:, 0, 0].max() < 8  # black corners
    middle = image[:, size[0] // 4 : -size[0] // 4, size[1] // 4 : -size[1] // 4]
    assert middle[0].mean() > middle[1].mean() > middle[2].mean() * 0.9  # reddish


def test_frames_of_a_sequence_are_alike_and_those_of_others_are_not():
    one, other = (make_sequence(np.random.default_rng(seed), (64, 48), 4) for seed in (0, 1))
    labels = [label[0] > 0 for _, label in (one, other)]
    union = (labels[0][..., 0] | labels[0][..., 1]).sum()
    assert (labels[0][..., 0] & labels[0][..., 1]).sum() / union > 0.6
    assert not np.array_equal(labels[0][..., 0], labels[0][..., 1])
    near, far = (np.abs(a.astype(int) - one[0][..., 0]).mean() for a in (one[0][..., 1], other[0][..., 0]))
    assert far > 1.5 * near


def test_no_threshold_finds_the_polyp():
    best = []
    for seed in range(6):
        image, label = make_sequence(np.random.default_rng(seed), (96, 72), 1)
        inside = label[0, ..., 0] > 0
        masks = [image[channel, ..., 0] > level for channel in range(3) for level in range(60, 250, 5)]
        best.append(max(2 * (mask & inside).sum() / max(mask.sum() + inside.sum(), 1) for mask in masks))
    assert np.median(best) < 0.75


def test_sequence_without_polyp():
    image, label = make_sequence(np.random.default_rng(0), polyp=False)
    assert image.shape == (3, 96, 72, 5)
    assert not label.any()


def test_rerun_leaves_no_older_frames(tmp_path):
    make_phantom(tmp_path, **SMALL)
    prepared = make_phantom(tmp_path, **{**SMALL, "sequences": 3, "frames": 1})
    assert sorted(p.name for p in (tmp_path / "Original").iterdir()) == ["1.tif", "2.tif", "3.tif"]
    assert prepared.datalist["numTraining"] == 1


@pytest.mark.parametrize("foreign", ["Original/1.tif", "Ground Truth/notes.txt", "datalist.json"])
def test_foreign_files_are_kept(tmp_path, foreign):
    path = tmp_path / foreign
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"choose another --out"):
        make_phantom(tmp_path, **SMALL)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences": 2}, r"sequences must be 3 or more, .*, got 2"),
        ({"frames": 0}, "frames must be 1 or more, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"size": (64, 31)}, r"size must be two numbers of 32 pixels or more, got \(64, 31\)"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_phantom(tmp_path, **{**SMALL, **options})
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_was_writing_keeps_no_one_out(tmp_path):
    make_phantom(tmp_path, sequences=3, frames=3)
    (tmp_path / "Original" / ".host-1.part.4.tif").write_bytes(b"half")
    assert make_phantom(tmp_path, sequences=3, frames=3).datalist["numTraining"] == 3
