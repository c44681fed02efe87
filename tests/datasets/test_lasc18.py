from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from typer.testing import CliRunner

from segbundles.cli import app
from segbundles.datasets import DataFaults, get_data_set, prepare

SAMPLES = Path(__file__).resolve().parents[3] / "shared" / "real_data" / "samples"


def _read(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("below", ["", "Training Set"])
def test_with_and_without_training_set_above(lasc18, tmp_path, below):
    datalist = prepare(get_data_set("lasc18"), lasc18() / below, tmp_path / "out").datalist
    assert (datalist["numTraining"], datalist["numValidation"], datalist["numTest"]) == (5, 1, 0)


def test_testing_set_with_and_without_labels(lasc18, tmp_path):
    source = lasc18()
    shutil.move(source / "Training Set" / "E", source / "Testing Set" / "E")
    shutil.move(source / "Training Set" / "F", source / "Testing Set" / "F")
    (source / "Testing Set" / "F" / "laendo.nrrd").unlink()
    testing = prepare(get_data_set("lasc18"), source, tmp_path / "out").datalist["testing"]
    assert [sorted(entry) for entry in testing] == [
        ["case", "group", "image", "label", "spacing_mm"],
        ["case", "group", "image", "spacing_mm"],
    ]


@pytest.mark.parametrize(
    ("spacing", "record", "fact"),
    [((1, 1, 1), [0.625] * 3, "0.625 x 0.625 x 0.625"), ((0.625, 0.625, 1.25), None, "0.625 x 0.625 x 1.25")],
)
def test_record_replaces_a_header_of_1_mm_only(lasc18, tmp_path, spacing, record, fact):
    prepared = prepare(get_data_set("lasc18"), lasc18(3, spacing=spacing), tmp_path / "out")
    assert [entry.get("spacing_mm") for entry in prepared.datalist["training"]] == [record, record]
    assert prepared.facts["spacing (mm)"] == fact


def test_only_volumes_like_the_publishers_have_its_spacing(lasc18, tmp_path):
    source = lasc18(3, slices=87)
    prepared = prepare(get_data_set("lasc18"), source, tmp_path / "out")
    assert all("spacing_mm" not in entry for entry in prepared.datalist["training"])
    assert prepared.facts["spacing (mm)"] == "1 x 1 x 1"
    assert prepared.notes == [
        "3 cases have a header of 1 mm and not the 88 slices of the challenge's files, so the header is believed; if "
        "the voxels have another size, give it with --spacing-mm: A, B, C"
    ]
    run = ["prepare", "lasc18", "--source", str(source), "--out", str(tmp_path / "out"), "--spacing-mm"]
    result = CliRunner().invoke(app, [*run, "0.5", "0.5", "2"])
    assert result.exit_code == 0
    assert "spacing (mm): 0.5 x 0.5 x 2" in result.output
    assert "note" not in result.output
    result = CliRunner().invoke(app, [*run, "0", "0.5", "2"])
    assert "spacing_mm must be three numbers above 0 (mm), got 0.0 0.5 2.0" in result.output


def test_facts(lasc18, tmp_path):
    facts = prepare(get_data_set("lasc18"), lasc18(1), tmp_path / "out").facts
    assert facts["size (voxels)"] == "6 x 5 x 88"
    assert facts["orientation"] == "LPS (1)"
    assert facts["label box (voxels)"] == "4 x 3 x 3"  # voxels 1-3, 1-2, 1-2 and voxel (0, 0, 0)
    assert facts["label box (mm)"] == "2.5 x 1.875 x 1.875"
    assert facts["label volume (ml)"] == f"{13 * 0.625**3 / 1000:.4g}"


OBLIQUE = [[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]]

# what is done to case B: (file, change of its array, geometry), and the fault that must be reported
CHANGES = {
    "other size": ("laendo", lambda a: a[:, :, :-1], {}, r"size \(6, 5, 87\).* image lgemri.nrrd has \(6, 5, 88\)"),
    "other spacing": ("laendo", None, {"spacing": (1, 1, 2)}, r"up to 87 mm .* its image lgemri.nrrd"),
    "other origin": ("laendo", None, {"origin": (0, 5, 0)}, r"up to 5 mm .* its image lgemri.nrrd"),
    "other direction": ("laendo", None, {"direction": OBLIQUE}, r"up to 1.81 mm .* its image lgemri.nrrd"),
    "2D": ("lgemri", lambda a: a[:, :, 0], {}, r"has 2 axes \(6, 5\)"),
    "4D": ("lgemri", lambda a: np.stack([a, a], -1), {}, r"has [46] .* but must have"),
    "label values": ("laendo", lambda a: a // 255 * 7, {}, "label values 7.* allowed are 0, 255"),
    "empty label": ("laendo", lambda a: a * 0, {}, "is empty: it has no foreground voxel"),
    "constant": ("lgemri", lambda a: a * 0 + 9, {}, r"is constant \(every value is 9\)"),
    "NaN": ("lgemri", lambda a: np.where(a < np.median(a), np.nan, a), {}, "NaN or infinite values"),
    "infinite": ("lgemri", lambda a: a / np.float32(a != a[0, 0, 0]), {}, "NaN or infinite values"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_fault(lasc18, tmp_path, write_nrrd, change):
    name, array, geometry, problem = CHANGES[change]
    source = lasc18(3)
    path = source / "Training Set" / "B" / f"{name}.nrrd"
    old = _read(path)
    write_nrrd(path, (array(old) if array else old), **geometry)
    with pytest.raises(DataFaults, match=problem) as caught:
        prepare(get_data_set("lasc18"), source, tmp_path / "out")
    assert [(fault.case, fault.file.name) for fault in caught.value.faults] == [("B", path.name)]
    assert f"Training Set/B/{path.name}: " in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_all_faults_at_once(lasc18, tmp_path, write_nrrd, capfd):
    source = lasc18(6)
    cases = source / "Training Set"
    (cases / "A" / "laendo.nrrd").unlink()
    (cases / "B" / "lgemri.nrrd").unlink()
    _truncate(cases / "C" / "lgemri.nrrd")
    _truncate(cases / "D" / "laendo.nrrd")
    (cases / "E" / "lgemri.nrrd").write_bytes(b"")
    write_nrrd(cases / "E" / "laendo.nrrd", np.full((6, 5, 88), 3, np.uint8))
    with pytest.raises(DataFaults, match=r"6 faults in .*lasc18, nothing was written") as caught:
        prepare(get_data_set("lasc18"), source, tmp_path / "out")
    found = {caught.value.shown(fault): fault.problem for fault in caught.value.faults}
    assert found["Training Set/A/lgemri.nrrd"] == "has no label: laendo.nrrd is missing next to it"
    assert found["Training Set/B/laendo.nrrd"] == "has no image: lgemri.nrrd is missing next to it"
    assert found["Training Set/C/lgemri.nrrd"].startswith("cannot be read: ")
    assert "expected 2640 bytes" in found["Training Set/C/lgemri.nrrd"]
    assert found["Training Set/D/laendo.nrrd"].startswith("cannot be read: ")
    assert found["Training Set/E/lgemri.nrrd"].startswith("cannot be read: ")
    assert "label values 3" in found["Training Set/E/laendo.nrrd"]
    assert capfd.readouterr().err == ""


def test_case_in_both_sets(lasc18, tmp_path):
    source = lasc18(3)
    shutil.copytree(source / "Training Set" / "B", source / "Testing Set" / "B")
    with pytest.raises(DataFaults, match=r"B/lgemri.nrrd: is a second case B"):
        prepare(get_data_set("lasc18"), source, tmp_path / "out")


def test_header_without_origin(lasc18, tmp_path):
    source = lasc18(3)
    for path in source.rglob("*.nrrd"):
        path.write_bytes(path.read_bytes().replace(b"space origin: (0,0,0)\n", b""))
    assert prepare(get_data_set("lasc18"), source, tmp_path / "out").datalist["numTraining"] == 2


@pytest.mark.samples
@pytest.mark.skipif(not (SAMPLES / "lasc18").is_dir(), reason="no sample cases beside the checkout")
def test_samples(tmp_path):
    prepared = prepare(get_data_set("lasc18"), SAMPLES / "lasc18", tmp_path, validation_fraction=1)
    groups = [entry["group"] for entry in prepared.datalist["validation"]]
    assert groups == ["45C45I6IXAFGNRO067W9", "IQYKPTWXVV9H0IHB8YXC"]
    assert all(entry["spacing_mm"] == [0.625] * 3 for entry in prepared.datalist["validation"])
    assert prepared.facts["orientation"] == "LPS (2)"
    assert prepared.notes == ["training is empty"]
