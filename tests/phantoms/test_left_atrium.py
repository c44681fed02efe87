from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scipy.ndimage import label as components

from segbundles.datasets import get_data_set, prepare
from segbundles.phantoms.left_atrium import make_case, make_phantom

SMALL = {"size": (48, 48, 24), "spacing_mm": (3.0, 3.0, 3.0)}


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantom")
    make_phantom(out, cases=4, seed=5, **SMALL)
    return out


def test_layout_and_split(phantom):
    datalist = json.loads((phantom / "datalist.json").read_text())
    assert sorted(p.name for p in phantom.iterdir()) == ["Training Set", "datalist.json"]
    files = sorted(str(p.relative_to(phantom)) for p in phantom.rglob("*.nrrd"))
    assert files[:2] == [f"Training Set/phantom5_000/{name}.nrrd" for name in ("laendo", "lgemri")]
    assert len(files) == 8
    assert [datalist[key] for key in ("numTraining", "numValidation", "numTest")] == [2, 1, 1]
    assert datalist["validation"] == [
        {
            "image": "Training Set/phantom5_002/lgemri.nrrd",
            "label": "Training Set/phantom5_002/laendo.nrrd",
            "case": "phantom5_002",
            "group": "phantom5_002",
        }
    ]


def test_same_seed_same_bytes_whatever_the_number_of_cases(phantom, tmp_path):
    make_phantom(tmp_path, cases=3, seed=5, **SMALL)
    for path in tmp_path.rglob("*.nrrd"):
        assert path.read_bytes() == (phantom / path.relative_to(tmp_path)).read_bytes()


def test_prepare_lasc18_reads_it_and_believes_its_header(phantom, tmp_path):
    prepared = prepare(get_data_set("lasc18"), phantom, tmp_path, validation_cases=["phantom5_001"])
    assert (prepared.datalist["numTraining"], prepared.datalist["numValidation"]) == (3, 1)
    assert not any("spacing_mm" in entry for entry in prepared.datalist["training"])


def test_no_spacing_record_at_1_mm(tmp_path):
    prepared = make_phantom(tmp_path, cases=3, size=(120, 120, 72), spacing_mm=(1, 1, 1))
    assert not any("spacing_mm" in entry for entry in prepared.datalist["training"])
    assert prepared.facts["spacing (mm)"] == "1 x 1 x 1"


def test_cases_and_seeds_differ():
    labels = [sitk.GetArrayFromImage(make_case(*case, **SMALL)[1]) for case in ((0, 0), (0, 4), (1, 0))]
    assert not np.array_equal(labels[0], labels[1])
    assert not np.array_equal(labels[0], labels[2])


@pytest.mark.parametrize("index", range(8))
def test_anatomy_and_value_ranges(index):
    image, label = make_case(3, index, size=(80, 80, 36), spacing_mm=(3, 3, 2.5))
    values, mask = sitk.GetArrayFromImage(image).T, sitk.GetArrayFromImage(label).T
    spacing = np.array(image.GetSpacing())
    assert values.dtype == mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 255}
    assert values.max() > 150
    assert components(mask)[1] == 1
    where = np.argwhere(mask)
    box = (np.ptp(where, axis=0) + 1) * spacing
    assert 55 <= box[0] <= 125  # body and the stumps of the veins
    assert 25 <= box[1] <= 80
    assert 30 <= box[2] <= 72
    assert 25 < mask.astype(bool).sum() * spacing.prod() / 1000 < 140  # ml
    assert mask.astype(bool).mean() < 0.05  # small against the volume: a locator has work to do
    assert where.min() > 0
    assert (where.max(0) < np.array(mask.shape) - 1).all()
    # as bright as the other chambers: a threshold does not find it
    bright = values > np.percentile(values[mask > 0], 20)
    assert 2 * (bright & (mask > 0)).sum() / (bright.sum() + (mask > 0).sum()) < 0.7


def test_geometry_is_exercised():
    images = [make_case(0, index, **SMALL) for index in range(4)]
    for image, label in images:
        assert image.GetSpacing() == label.GetSpacing()
        assert image.GetOrigin() == label.GetOrigin()
        assert image.GetDirection() == label.GetDirection()
    plain, oblique, reversed_rows, other = (image for image, _ in images)
    assert plain.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    assert plain.GetSpacing() == (3, 3, 3)
    assert np.abs(np.reshape(oblique.GetDirection(), (3, 3)) - np.eye(3)).max() > 0.1
    assert reversed_rows.GetDirection() == (-1, 0, 0, 0, -1, 0, 0, 0, 1)
    assert other.GetSize() == (46, 44, 22)
    assert other.GetSpacing() == pytest.approx((3.3, 3.3, 3.6))


def test_rerun_is_safe_and_ignores_an_older_longer_one(tmp_path):
    make_phantom(tmp_path, cases=4, **SMALL)
    prepared = make_phantom(tmp_path, cases=3, **SMALL)
    assert [prepared.datalist[key] for key in ("numTraining", "numValidation", "numTest")] == [1, 1, 1]
    assert prepared.notes == []


@pytest.mark.parametrize(
    "foreign", ["Training Set/06SR5RBREL16DQ6M8LWS/lgemri.nrrd", "Training Set/notes.txt", "datalist.json"]
)
def test_foreign_files_are_kept(tmp_path, foreign):
    path = tmp_path / foreign
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"choose another --out"):
        make_phantom(tmp_path, cases=3, **SMALL)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    assert path.read_text() == "mine"


def test_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "Training Set").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"Training Set was not written by a phantom"):
        make_phantom(tmp_path / "out", cases=3, **SMALL)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cases": 2}, "cases must be 3 or more, .*, got 2"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"size": (20, 160, 48)}, r"a volume of \(40.0, 320.0, 96.0\) mm is too small for the atrium"),
        ({"spacing_mm": (2, 2, 0)}, r"three positive numbers each, got .* and \(2, 2, 0\)"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_phantom(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []
