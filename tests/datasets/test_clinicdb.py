from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from typer.testing import CliRunner

from segbundles.cli import app
from segbundles.datasets import DataFaults, get_data_set, prepare
from segbundles.datasets.clinicdb import find_cases, sequence_of

SAMPLES = Path(__file__).resolve().parents[3] / "shared" / "real_data" / "samples"


def _image(seed: int, shape: tuple[int, ...] = (18, 24, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)


def _mask(seed: int) -> np.ndarray:
    mask = np.zeros((18, 24), np.uint8)
    mask[2 : 5 + seed % 7, 3 : 6 + seed % 11] = 255
    mask.flat[-1 - seed % 40] = 255
    return mask


@pytest.fixture
def clinicdb(tmp_path):
    """Make a good folder of the frames given, 24 x 18 pixels; frames 1-25 are sequence 1, 26-50 are 2, 51-67 are 3."""

    def make(frames=(1, 2, 10, 26, 27, 51), suffix: str = ".tif", root: str = "CVC-ClinicDB") -> Path:
        for folder, content in (("Original", _image), ("Ground Truth", _mask)):
            path = tmp_path / root / folder
            path.mkdir(parents=True)
            for frame in frames:
                if suffix == ".tif":
                    tifffile.imwrite(path / f"{frame}.tif", content(frame), metadata=None)
                else:
                    Image.fromarray(content(frame)).save(path / f"{frame}{suffix}")
        return tmp_path / root

    return make


def _prepare(source: Path, tmp_path: Path, publisher_sequences: bool = True, **options):
    prepared = prepare(
        get_data_set("clinicdb", publisher_sequences=publisher_sequences), source, tmp_path / "out", **options
    )
    # all of these have few groups
    return replace(prepared, notes=[note for note in prepared.notes if not note.startswith("validation has ")])


def test_entries_are_grouped_by_the_publishers_sequences(clinicdb, tmp_path):
    prepared = _prepare(clinicdb(), tmp_path, validation_cases=["sequence_2"])
    training, validation = prepared.datalist["training"], prepared.datalist["validation"]
    assert [(e["case"], e["group"]) for e in training] == [
        ("1", "sequence_1"), ("2", "sequence_1"), ("10", "sequence_1"), ("51", "sequence_3")
    ]  # fmt: skip
    assert validation[0] == {
        "case": "26",
        "image": "../CVC-ClinicDB/Original/26.tif",
        "label": "../CVC-ClinicDB/Ground Truth/26.tif",
        "group": "sequence_2",
    }
    assert prepared.units == ("frames", "sequences")
    assert prepared.notes == []
    assert prepared.facts["size (pixels)"] == "24 x 18"
    assert prepared.facts["masks"] == "exact (6)"
    assert prepared.datalist["labels"] == {"0": "background", "1": "polyp"}


@pytest.mark.parametrize(
    ("frame", "sequence"),
    [(0, None), (1, 1), (25, 1), (26, 2), (67, 3), (68, 4), (206, 11), (227, 11), (228, 12), (612, 29), (613, None)],
)
def test_publishers_sequences(frame, sequence):
    assert sequence_of(frame) == sequence


def test_the_publishers_sequences_are_for_its_frames_only(clinicdb, tmp_path):
    source = clinicdb(range(1, 23))
    message = r"of one video.*CVC-ClinicDB.sequences\.csv with the columns frame and sequence.*--publisher-sequences"
    with pytest.raises(ValueError, match=message):
        _prepare(source, tmp_path, publisher_sequences=False)
    assert not (tmp_path / "out").exists()
    run = ["prepare", "clinicdb", "--publisher-sequences", "--source", str(source), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, run).exit_code == 0
    # all 612 frames of its size are the publisher's
    assert find_groups(clinicdb(range(1, 613), ".bmp", "small")) is None
    complete = clinicdb(range(1, 613), ".bmp", "complete")
    Image.new("RGB", (384, 288)).save(complete / "Original" / "1.bmp")
    assert find_groups(complete) == 29


def find_groups(source: Path) -> int | None:
    """Return the number of sequences that the publisher's list gives, or None if it is not used."""
    try:
        return len({case.group for case in find_cases(source)[0]})
    except ValueError:
        return None


def test_29_sequences_of_the_published_lengths():
    found = [sequence_of(frame) for frame in range(1, 613)]
    lengths = [found.count(number) for number in range(1, 30)]
    assert lengths[:10] == [25, 25, 17, 11, 25, 23, 25, 26, 22, 6]
    assert sum(lengths) == 612


@pytest.mark.parametrize("where", [".", "CVC-ClinicDB"])
def test_a_table_of_sequences_goes_before_the_list(clinicdb, tmp_path, where):
    source = clinicdb(frames=(1, 2, 700), root="top/CVC-ClinicDB")
    for folder in ("Original", "Ground Truth"):
        (source / folder / "2.tif").rename(source / folder / "a b.tif")
    (source.parent / where / "sequences.csv").write_text("\ufeffframe;sequence\n1;7\na b;x\n700;x\n")
    entries = _prepare(source.parent, tmp_path, validation_fraction=0).datalist["training"]
    assert [(e["case"], e["group"]) for e in entries] == [
        ("1", "sequence_7"), ("700", "sequence_x"), ("a b", "sequence_x")
    ]  # fmt: skip


@pytest.mark.parametrize("folder", ["Ground_Truth", "ground truth", "GroundTruth"])
def test_published_copies_in_png(clinicdb, tmp_path, folder):
    source = clinicdb(suffix=".png", root="CVC-ClinicDB/PNG")
    (source / "Ground Truth").rename(source / folder)
    (source / "Original" / "._1.png").write_text("x")
    (source / "Original" / "metadata.csv").write_text("x")
    assert _prepare(source.parent, tmp_path).facts["size (pixels)"] == "24 x 18"


def test_grey_masks_and_frames_without_polyp_or_image_are_noted(clinicdb, tmp_path):
    source = clinicdb()
    smeared = _mask(2).astype(int)
    smeared[smeared == 0] = np.arange((smeared == 0).sum()) % 99
    tifffile.imwrite(source / "Ground Truth" / "2.tif", smeared.astype(np.uint8), metadata=None)
    for frame in (10, 26):
        tifffile.imwrite(source / "Ground Truth" / f"{frame}.tif", np.zeros((18, 24), np.uint8), metadata=None)
    tifffile.imwrite(source / "Original" / "27.tif", np.zeros((18, 24, 3), np.uint8), metadata=None)
    prepared = _prepare(source, tmp_path)
    assert prepared.facts["masks"] == "exact (5), grey, taken above 127 (1)"
    assert prepared.notes == [
        "2 frames have no polyp: 10, 26",  # empty masks join no sequences
        "1 frames are blank, one value throughout: 27",
    ]


def test_identical_frames_join_sequences(clinicdb, tmp_path):
    source = clinicdb()
    shutil.copy(source / "Original" / "1.tif", source / "Original" / "51.tif")
    prepared = _prepare(source, tmp_path, validation_cases=["51"])
    assert prepared.notes == ["identical images: 1, 51 (one group)"]
    assert [e["case"] for e in prepared.datalist["validation"]] == ["1", "2", "10", "51"]


FAULTS = {
    "no mask": ("Ground Truth/2.tif", Path.unlink, "Original/2.tif", "has no mask: Ground Truth/ contains none for it"),
    "no image": ("Original/2.tif", Path.unlink, "Ground Truth/2.tif", "has no image: Original/ contains none for it"),
    "other size": (
        "Ground Truth/2.tif",
        lambda p: tifffile.imwrite(p, _mask(2)[:17], metadata=None),
        "Ground Truth/2.tif",
        r"has size \(24, 17\).* image 2.tif has \(24, 18\)",
    ),
    "values": (
        "Ground Truth/2.tif",
        lambda p: tifffile.imwrite(p, _mask(2) // 100, metadata=None),
        "Ground Truth/2.tif",
        "the values 2.* allowed are the class indices 0, 1, or grey levels",
    ),
    "colour mask": (
        "Ground Truth/2.tif",
        lambda p: tifffile.imwrite(p, _image(3), photometric="rgb", metadata=None),
        "Ground Truth/2.tif",
        "is in colour",
    ),
    "truncated": (
        "Original/2.tif",
        lambda p: p.write_bytes(p.read_bytes()[:-90]),
        "Original/2.tif",
        "cannot be read: it is truncated or damaged",
    ),
    "second file": (
        "Original/2.tif",
        lambda p: Image.fromarray(_image(2)).save(p.with_suffix(".png")),
        "Original/2.tif",
        "is a second file of 2, next to 2.png",
    ),
    "no number": (
        "Original/2.tif",
        lambda p: [
            (p.parents[1] / name / "2.tif").rename(p.parents[1] / name / "613.tif")
            for name in ("Original", "Ground Truth")
        ],
        "Original/613.tif",
        r"is not in the publisher's list of frames, 1 to 612: add a sequences.csv with the columns frame and sequence",
    ),
    "not in the table": (
        "Original/2.tif",
        lambda p: (p.parents[1] / "sequences.csv").write_text("frame,sequence\n1,1\n10,1\n26,2\n27,2\n51,3\n"),
        "Original/2.tif",
        r"is in no row of sequences.csv: add it",
    ),
    "bad table": (
        "Original/2.tif",
        lambda p: (p.parents[1] / "sequences.csv").write_text("image,video\n1,1\n"),
        "sequences.csv",
        r"cannot be read \('frame'\): it needs the columns frame and sequence",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(clinicdb, tmp_path, fault):
    name, change, file, problem = FAULTS[fault]
    source = clinicdb()
    change(source / name)
    with pytest.raises(DataFaults, match=problem) as caught:
        _prepare(source, tmp_path)
    assert [f.file for f in caught.value.faults] == [source / file]
    assert not (tmp_path / "out").exists()


def test_no_case(tmp_path):
    (tmp_path / "in" / "Original").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no case in .*: expected the folders 'Original' and 'Ground Truth'"):
        _prepare(tmp_path / "in", tmp_path)
    (tmp_path / "in" / "Ground Truth").mkdir()
    with pytest.raises(ValueError, match=r"Original and Ground Truth contain no \.tif"):
        _prepare(tmp_path / "in", tmp_path)


@pytest.mark.samples
@pytest.mark.skipif(not (SAMPLES / "CVC-ClinicDB").is_dir(), reason="no sample cases beside the checkout")
def test_samples(tmp_path):
    prepared = _prepare(SAMPLES / "CVC-ClinicDB", tmp_path, validation_cases=["sequence_11"])
    assert (prepared.datalist["numTraining"], prepared.datalist["numValidation"]) == (0, 22)
    assert prepared.facts["size (pixels)"] == "384 x 288"
    assert {e["group"] for e in prepared.datalist["validation"]} == {"sequence_11"}
    (tmp_path / "copy").mkdir()
    for name in ("Original", "Ground Truth"):  # the same by the publisher's list
        shutil.copytree(SAMPLES / "CVC-ClinicDB" / name, tmp_path / "copy" / name)
    again = _prepare(tmp_path / "copy", tmp_path, validation_fraction=1.0)
    assert {e["group"] for e in again.datalist["validation"]} == {"sequence_11"}
