"""Own data by patterns: what is found, how it is grouped, and what is refused."""

from __future__ import annotations

from functools import partial

import nibabel as nib
import numpy as np
import pytest
import tifffile
from dicom_series import write_series
from monai.transforms import LoadImage
from own_data import AFFINE, arrays, save, write_segments, write_slices
from PIL import Image

from segbundles.data import FolderImages, StackReader, read_segments
from segbundles.datasets import DataFaults, get_data_set, prepare
from segbundles.patterns import Pattern, case_name

BRAIN = partial(get_data_set, "pairs", bundle="brain_flair_unet")


def entries(prepared) -> dict[str, dict]:
    lists = (prepared.datalist[split] for split in ("training", "validation", "testing"))
    return {entry["case"]: entry for cases in lists for entry in cases}


@pytest.mark.parametrize(
    ("pattern", "path", "key"),
    [
        ("*/t1.nii.gz", "p1/t1.nii.gz", ("p1",)),
        ("*/t1.nii.gz", "a/p1/t1.nii.gz", None),
        ("**/*_t1.nii.gz", "a/p1/x_T1.nii.gz", ("a/p1/", "x")),
        ("**/*_t1.nii.gz", "x_t1.nii.gz", ("", "x")),
        ("img?/*.png", "img1/a.png", ("a",)),
        ("img[12]/*.png", "img3/a.png", None),
        ("{case}/*_t1.nii", "p1/2024_t1.nii", ("p1",)),
        ("scan_{case}_[0-9].nii", "scan_p_1_2.nii", ("p_1",)),
        ("a.b/*", "axb/c", None),
    ],
)
def test_what_wildcards_stand_for(pattern, path, key):
    assert Pattern(pattern).key(path) == key


def test_names_of_cases():
    assert [case_name(key) for key in (("p1", "p1_"), ("a/p1/", "x"), ("p1", "p1_12"))] == ["p1", "a/p1/x", "p1/p1_12"]
    with pytest.raises(ValueError, match=r"'\{patient\}/a' contains \{patient\}: it may contain \{case\}, once"):
        Pattern("{patient}/a")


class TestFormats:
    def test_three_files_per_patient_are_channels(self, tmp_path):
        for number in range(4):
            image, label = arrays(number)
            for channel, name in enumerate(("t1", "flair", "t1c")):
                save(tmp_path / f"in/p{number}/p{number}_{name}.nii.gz", image[..., channel])
            save(tmp_path / f"in/p{number}/lesion.nii.gz", label)
        data = BRAIN(
            images=["{case}/*_t1.nii.gz", "{case}/*_flair.nii.gz", "{case}/*_t1c.nii.gz"],
            labels="{case}/lesion.nii.gz",
            name="mine",
            licence="CC0",
        )
        prepared = prepare(data, tmp_path / "in", tmp_path / "out")
        assert entries(prepared)["p2"] == {
            "case": "p2",
            "image": [f"../in/p2/p2_{name}.nii.gz" for name in ("t1", "flair", "t1c")],
            "label": "../in/p2/lesion.nii.gz",
            "group": "p2",
        }
        head = {key: prepared.datalist[key] for key in ("name", "licence", "reference", "labels")}
        assert head == {
            "name": "mine",
            "licence": "CC0",
            "reference": "not given",
            "labels": {"0": "background", "1": "FLAIR abnormality"},
        }
        # 8 voxels of 0.9 x 0.9 x 5 mm
        assert prepared.facts["label volume (ml)"] == "0.0324"
        assert prepared.facts["spacing (mm)"] == "0.9 x 0.9 x 5"

    def test_slices_of_folders(self, tmp_path):
        for patient in "abc":
            write_slices(tmp_path / "in" / patient, ord(patient))
        data = BRAIN(images=["*/*.tif"], labels="*/*_mask.tif", group="folder")
        prepared = prepare(data, tmp_path / "in", tmp_path / "out", validation_cases=["b"])
        assert {entry["group"] for entry in prepared.datalist["validation"]} == {"b"}
        assert entries(prepared)["a/a_2"] == {
            "case": "a/a_2",
            "image": "../in/a/a_2.tif",
            "label": "../in/a/a_2_mask.tif",
            "group": "a",
            "slice": 2,
            "lesion_area": 4,
        }
        together = BRAIN(images=["**/*.tif"], labels="**/*_mask.tif", group="{group}/*/*")
        with pytest.raises(DataFaults, match=r"b_2.tif: is slice 2 of in, as in/a/a_2 is: give each stack a group"):
            prepare(together, tmp_path, tmp_path / "other")
        with pytest.raises(ValueError, match="nothing says which slices are of one patient"):
            prepare(BRAIN(images=["*/*.tif"], labels="*/*_mask.tif"), tmp_path / "in", tmp_path / "other")

    def test_frames_of_videos_and_class_indices(self, tmp_path):
        rng = np.random.default_rng(0)
        for name in ("v1_01", "v1_02", "v2_01", "v3_01"):
            for folder, array in (
                ("in/frames", rng.integers(0, 255, (20, 24, 3), np.uint8)),
                ("in/gt", (rng.random((20, 24)) > 0.7).astype(np.uint8) * 2),
            ):
                (tmp_path / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(tmp_path / folder / f"{name}.png")
        options = {"bundle": "polyp_fcn8", "images": ["frames/*.png"], "labels": "gt/*.png", "group": "{group}_*"}
        data = get_data_set("pairs", **options, classes="background, polyp, tool")
        prepared = prepare(data, tmp_path / "in", tmp_path / "out", validation_cases=["v1"])
        assert [entry["case"] for entry in prepared.datalist["validation"]] == ["v1_01", "v1_02"]
        assert prepared.datalist["labels"] == {"0": "background", "1": "polyp", "2": "tool"}
        with pytest.raises(DataFaults, match="contains the values 2; allowed are the class indices 0, 1"):
            prepare(get_data_set("pairs", **options), tmp_path / "in", tmp_path / "two")

    def test_pages_of_stacks_are_sections(self, tmp_path):
        rng = np.random.default_rng(0)
        image = rng.integers(0, 255, (5, 20, 24), np.uint8)
        (tmp_path / "in").mkdir()
        tifffile.imwrite(tmp_path / "in/block_raw.tif", image)
        tifffile.imwrite(tmp_path / "in/block_membranes.tif", np.where(image < 60, 255, 0).astype(np.uint8))
        options = {"bundle": "em_membrane_unet", "images": ["*_raw.tif"], "labels": "*_membranes.tif"}
        with pytest.raises(DataFaults, match=r"looks inverted.*use --label-values 255,0"):
            prepare(get_data_set("pairs", **options), tmp_path / "in", tmp_path / "out")
        prepared = prepare(get_data_set("pairs", **options, label_values="255,0"), tmp_path / "in", tmp_path / "out")
        last = prepared.datalist["validation"][0]
        assert {key: last[key] for key in ("case", "page", "group", "label_values")} == {
            "case": "block_04",
            "page": 4,
            "group": "block_04",
            "label_values": [255, 0],
        }

    def test_volumes_in_two_folders_with_other_values(self, tmp_path, write_nrrd):
        for number in range(3):
            image, label = arrays(number, 1)
            write_nrrd(tmp_path / f"in/scans/{number}.nrrd", image[..., 0])
            save(tmp_path / f"in/truth/{number}_atrium.nii.gz", label * np.uint8(4), np.diag([-1, -1, 1, 1.0]))
        options = {"bundle": "left_atrium_vnet", "images": ["scans/*.nrrd"], "labels": "truth/*_atrium.nii.gz"}
        prepared = prepare(get_data_set("pairs", **options, label_values="0,4"), tmp_path / "in", tmp_path / "out")
        assert entries(prepared)["1"]["label_values"] == [0, 4]
        assert prepared.notes[0].startswith("each case is a group: give --group if a patient has several")
        with pytest.raises(DataFaults, match=r"contains the label values 4; allowed are 0, 1"):
            prepare(get_data_set("pairs", **options), tmp_path / "in", tmp_path / "two")

    def test_dicom_series_as_channels(self, tmp_path):
        for number in range(3):
            image, label = arrays(number)
            for channel, name in enumerate(("t1", "flair", "t1c")):
                # two folders with a series each, and two series in one
                series = {
                    "SeriesNumber": channel,
                    "SeriesDescription": name,
                    "SeriesInstanceUID": f"1.{number}.{channel}",
                }
                folder = tmp_path / f"in/{number}" / ("t1" if name == "t1" else "both")
                folder.mkdir(parents=True, exist_ok=True)
                names = [f"{name}{k}" for k in range(4)]
                write_series(folder, image[..., channel].astype(np.uint16), AFFINE, names, **series)
            save(tmp_path / f"in/{number}/lesion.nii.gz", label)
        data = BRAIN(images=["*/t1", "*/both/1_flair", "*/both/2_t1c"], labels="*/lesion.nii.gz")
        prepared = prepare(data, tmp_path / "in", tmp_path / "out")
        assert entries(prepared)["1"]["image"] == ["../in/1/t1", "../in/1/both/1_flair", "../in/1/both/2_t1c"]
        assert not any("left out" in note for note in prepared.notes)
        cases = list(FolderImages(tmp_path / "in", channels="*t1,both/*1_flair,both/*2_t1c", skip=["lesion*"]))
        assert len(cases) == 3
        read = LoadImage(StackReader, ensure_channel_first=True)(cases[1]["image"])
        assert (read.numpy() == arrays(1)[0].transpose(3, 0, 1, 2)).all()


class TestSegments:
    @pytest.fixture
    def scan(self, tmp_path):
        image, _ = arrays(1, 1)
        save(tmp_path / "in/p1/flair.nii.gz", image[..., 0])
        label = np.zeros((12, 10, 4), np.uint8)
        label[3:6, 2:4, 1:3], label[6:8, 5, 2] = 3, 7
        return tmp_path / "in/p1/flair.nii.gz", tmp_path / "in/p1/s.seg.nrrd", label

    @pytest.mark.parametrize(("names", "classes"), [(["Core", "edema"], (1, 2)), (["2"], (1, 0)), (["1"], (0, 1))])
    def test_by_name_and_number_on_the_grid_of_the_image(self, scan, names, classes):
        image, path, label = scan
        write_segments(path, label, {"Edema": 3, "core": 7})
        found, affine = read_segments(path, image, names)
        assert np.allclose(affine, AFFINE)
        core, edema = classes
        assert (found == np.where(label == 7, core, np.where(label == 3, edema, 0))).all()
        assert found.shape == (12, 10, 4)

    def test_axes_in_another_order(self, scan):
        image, path, label = scan
        flip = np.array([[0, -1, 0, 11], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])  # voxel (i, j) is (11 - j, i)
        write_segments(path, label.swapaxes(0, 1)[:, ::-1], {"a": 3}, AFFINE @ flip)
        assert (read_segments(path, image)[0] == (label == 3)).all()

    @pytest.mark.parametrize(
        ("segments", "names", "message"),
        [
            ({"a": 3, "b": 7}, [], "has the segments 1 a, 2 b: give the segment of class 1, 2 and so on"),
            ({"a": 3}, ["c"], "has no segment 'c', it has 1 a"),
            ({}, [], "has no segments"),
        ],
    )
    def test_that_are_not_there(self, scan, segments, names, message):
        image, path, label = scan
        write_segments(path, label, segments)
        with pytest.raises(ValueError, match=message):
            read_segments(path, image, names)

    def test_on_another_grid_and_of_another_image(self, scan):
        image, path, label = scan
        half = np.diag([0.5, 1, 1, 1])
        write_segments(path, label, {"a": 3}, AFFINE @ half)
        with pytest.raises(ValueError, match=r"has other voxels than its image flair.nii.gz"):
            read_segments(path, image)
        away = AFFINE.copy()
        away[0, 3] += 9
        write_segments(path, label, {"a": 3}, away)
        with pytest.raises(ValueError, match="has segments outside its image"):
            read_segments(path, image)

    def test_are_written_as_labels_below_out(self, scan, tmp_path):
        _, path, label = scan
        write_segments(path, label, {"lesion": 3})
        other, truth = arrays(9, 1)
        save(tmp_path / "in/p2/flair.nii.gz", other[..., 0])
        write_segments(tmp_path / "in/p2/s.seg.nrrd", truth, {"lesion": 1})
        data = BRAIN(images=["*/flair.nii.gz"], labels="*/s.seg.nrrd", segments="lesion")
        prepared = prepare(data, tmp_path / "in", tmp_path / "out", validation_cases=["p2"])
        assert prepared.datalist["labels"] == {"0": "background", "1": "lesion"}
        (entry,) = prepared.datalist["training"]
        assert entry["label"] == "converted_labels/p1.nii.gz"
        written = nib.load(tmp_path / "out" / entry["label"])
        assert (np.asarray(written.dataobj) == (label == 3)).all()
        assert np.allclose(written.affine, AFFINE)
        with pytest.raises(DataFaults, match=r"s.seg.nrrd: has no segment 'tumour', it has 1 lesion"):
            prepare(
                BRAIN(images=["*/flair.nii.gz"], labels="*/s.seg.nrrd", segments="tumour"),
                tmp_path / "in",
                tmp_path / "b",
            )
        assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": ["*/a.nii.gz"]}, r"no file under .* matches --images \*/a.nii.gz; files there: p1/flair.nii.gz"),
        ({"labels": "*/truth.nii"}, r"matches --labels \*/truth.nii"),
        ({"images": ["*/flair.nii.gz", "*/t1.nii.gz"]}, "given 2 times, but brain_flair_unet takes one, or 3"),
        ({"images": ["*/*.nii.gz"]}, r"are of one case: make the pattern more exact"),
        ({"group": "patient"}, r"--group must be folder, or a pattern with \{group\}"),
        ({"label_values": "0,1,2"}, "has 3 values, but there are 2 classes"),
        ({"label_values": "0,one"}, "must be numbers with commas"),
        (
            {"segments": "a,b", "classes": "x,y", "labels": "*/l.seg.nrrd"},
            "--segments has 2 names, but there are 1 classes beside x",
        ),
        ({"segments": "a"}, "--segments applies to labels that end in .seg.nrrd"),
        ({"void_class": 2}, "--void-class applies to frames only"),
        ({"bundle": "nothing"}, "there is no bundle 'nothing'"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, message):
    for number in (1, 2):
        image, label = arrays(number, 2)
        save(tmp_path / f"in/p{number}/flair.nii.gz", image[..., 0])
        save(tmp_path / f"in/p{number}/second.nii.gz", image[..., 1])
        save(tmp_path / f"in/p{number}/lesion.nii.gz", label)
    if options.get("images") == ["*/*.nii.gz"]:
        options = {"images": ["{case}/*.nii.gz"], "labels": "{case}/lesion.nii.gz"}
    given = {"bundle": "brain_flair_unet", "images": ["*/flair.nii.gz"], "labels": "*/lesion.nii.gz"} | options
    with pytest.raises(ValueError, match=message):
        prepare(get_data_set("pairs", **given), tmp_path / "in", tmp_path / "out")


def test_patterns_of_which_nothing_fits(tmp_path):
    """The files are fine, so they are not what is named as wrong."""
    for name in ("ü 1/t1", "ü 1/label", "b/t1", "b/label"):
        image, label = arrays(ord(name[0]), 1)
        save(tmp_path / "in" / f"{name}.nii.gz", label if "label" in name else image[..., 0])
    data = get_data_set("pairs", bundle="left_atrium_vnet", images=["*/*.nii.gz"], labels="*/label.nii.gz")
    message = (
        r"no label of --labels \*/label.nii.gz fits an image of --images \*/\*.nii.gz: their wildcards must stand for "
        r"the same text, as in b/t1.nii.gz and b/label.nii.gz they do not; write {case} for the part that names the"
    )
    with pytest.raises(ValueError, match=message):
        prepare(data, tmp_path / "in", tmp_path / "out")
    data = get_data_set("pairs", bundle="left_atrium_vnet", images=["{case}/*.nii.gz"], labels="{case}/label.nii.gz")
    assert len(prepare(data, tmp_path / "in", tmp_path / "out").datalist["training"]) == 1


def test_incomplete_cases_are_faults(tmp_path):
    for name in ("a/1", "b/1", "b/2", "c/2", "d/1", "d/3"):
        save(tmp_path / "in" / f"{name}.nii.gz", arrays(ord(name[0]), 1)[0][..., 0])
    data = get_data_set("pairs", bundle="left_atrium_vnet", images=["*/1.nii.gz"], labels="*/2.nii.gz")
    with pytest.raises(DataFaults) as caught:
        prepare(data, tmp_path / "in", tmp_path / "out")
    found = {fault.case: fault.problem.split(":")[0] for fault in caught.value.faults if fault.case != "b"}
    assert found == {"a": "has no label", "c": "has no image", "d": "has no label"}
