from __future__ import annotations

import json
import logging
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from monai.data import CacheDataset, partition_dataset

from segbundles.data import Datalist, FolderImages, file_suffix, image_root


def make(folder, content, files=("a.nrrd", "b.nrrd", "ü 1/c.nrrd")):
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    (folder / "datalist.json").write_text(text, encoding="utf-8")
    return folder


def entry(image="a.nrrd", label="b.nrrd", **more):
    return {"image": image, "label": label, **more}


def test_datalist_gives_absolute_paths_and_keeps_the_rest(tmp_path):
    make(
        tmp_path,
        {
            "training": [entry("ü 1/c.nrrd", group="p1", spacing_mm=[1, 1, 2])],
            "validation": [entry(label="ü 1/c.nrrd")],
        },
    )
    cases = Datalist(tmp_path)
    assert isinstance(cases, Sequence)
    assert list(cases) == [
        {
            "image": str(tmp_path / "ü 1/c.nrrd"),
            "label": str(tmp_path / "b.nrrd"),
            "group": "p1",
            "spacing_mm": [1, 1, 2],
        }
    ]
    assert len(Datalist(tmp_path, "validation")) == 1
    assert Datalist(str(tmp_path), split="testing", required=False).cases == []
    assert Datalist(tmp_path)[0]["group"] == "p1"


def test_an_image_may_be_a_list_of_channels(tmp_path):
    entry = {"image": ["t1.nii", "flair.nii"], "label": "l.nii", "group": "p"}
    (tmp_path / "datalist.json").write_text(json.dumps({"training": [entry]}))
    for name in ("t1.nii", "l.nii"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"training: image flair.nii does not exist"):
        len(Datalist(tmp_path))
    (tmp_path / "flair.nii").touch()
    (case,) = Datalist(tmp_path)
    assert case["image"] == [str(tmp_path / name) for name in entry["image"]]


def patients(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


THREE = "*t1.nii.gz,*flair.nii.gz,*t1c.nii.gz"


def test_files_are_joined_as_channels(tmp_path, caplog):
    caplog.set_level("INFO", "segbundles")
    per_patient = [f"{p}/{p}_{name}.nii.gz" for p in ("p1", "p2") for name in ("flair", "t1", "t1c")]
    patients(tmp_path, *per_patient, "p1/t2.nii.gz", "flat_a_t1.nii.gz", "flat_a_flair.nii.gz", "flat_a_t1c.nii.gz")
    cases = FolderImages(tmp_path, channels=THREE)
    found = [[path.removeprefix(f"{tmp_path}/") for path in case["image"]] for case in cases]
    assert found == [
        [f"{stem}_{name}.nii.gz" for name in ("t1", "flair", "t1c")] for stem in ("flat_a", "p1/p1", "p2/p2")
    ]
    assert "1 that no pattern of channels matches (p1/t2.nii.gz)" in caplog.text
    assert [len(case["image"]) for case in FolderImages(tmp_path, channels=THREE.split(","))] == [3, 3, 3]


def test_the_part_that_names_the_case_is_marked(tmp_path):
    patients(tmp_path, "p1/2020_t1.nii", "p1/2021_flair.nii", "x/p1/1_t1.nii", "x/p1/2_flair.nii")
    cases = FolderImages(tmp_path, channels="{case}/*_t1.nii,{case}/*_flair.nii")
    assert [[Path(path).name for path in case["image"]] for case in cases] == [
        ["2020_t1.nii", "2021_flair.nii"],
        ["1_t1.nii", "2_flair.nii"],
    ]


def test_a_missing_channel_has_the_name_of_its_pattern(tmp_path):
    patients(tmp_path, "p1/t1.nii.gz", "p1/t1c.nii.gz")
    (case,) = FolderImages(tmp_path, channels=THREE)
    assert case["image"] == [str(tmp_path / "p1" / name) for name in ("t1.nii.gz", "*flair.nii.gz", "t1c.nii.gz")]


@pytest.mark.parametrize(
    ("names", "channels", "message"),
    [
        (["a_t1.nii"], "*t1.nii,*.nii", r"a_t1.nii matches \*t1.nii and \*.nii: make the patterns more exact"),
        (["p/1_t1.nii", "p/2_t1.nii"], "{case}/*t1.nii", "p/1_t1.nii and p/2_t1.nii match .* and are of one case"),
        (["a.nii"], "*t1.nii", "no image under .*: 1 that no pattern of channels matches"),
        (["a.nii"], "{patient}.nii", r"contains \{patient\}: it may contain \{case\}"),
    ],
)
def test_channels_that_do_not_fit(tmp_path, names, channels, message):
    patients(tmp_path, *names)
    with pytest.raises(ValueError, match=message):
        len(FolderImages(tmp_path, channels=channels))
    with pytest.raises(ValueError, match="is not a folder: give the folder of the patient"):
        len(FolderImages(tmp_path / names[0], channels=channels))


def test_datalist_reads_the_disk_at_first_use_only(tmp_path):
    cases = Datalist(tmp_path / "later")
    (tmp_path / "later").mkdir()
    make(tmp_path / "later", {"training": [entry(), entry()]})
    pickle.loads(pickle.dumps(cases))
    assert len(cases) == 2
    (tmp_path / "later" / "datalist.json").unlink()
    assert len(cases[:1]) == 1
    assert len(CacheDataset(cases, lambda x: x, progress=False)) == 2
    assert [len(part) for part in partition_dataset(cases, num_partitions=2)] == [1, 1]


def test_links_of_a_datalist_keep_their_names(tmp_path):
    """Tools that version data keep it under names without a suffix."""
    make(tmp_path, {"training": [entry("a.nii.gz", "linked/b.nii.gz")]}, files=[])
    (tmp_path / "cache/ab").mkdir(parents=True)
    (tmp_path / "d").mkdir()
    for name in ("a.nii.gz", "d/b.nii.gz"):
        (tmp_path / "cache/ab" / name[-8]).touch()
        (tmp_path / name).symlink_to(tmp_path / "cache/ab" / name[-8])
    (tmp_path / "linked").symlink_to(tmp_path / "d")
    (case,) = Datalist(tmp_path)
    assert case == {"image": str(tmp_path / "a.nii.gz"), "label": str(tmp_path / "d/b.nii.gz")}
    assert file_suffix(case["image"]) == ".nii.gz"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_no_part_of_a_list(tmp_path, encoding):
    (make(tmp_path, "") / "datalist.json").write_text(json.dumps({"training": [entry()]}), encoding=encoding)
    assert len(Datalist(tmp_path)) == 1
    assert found(FolderImages(tmp_path)) == [str(tmp_path / name) for name in ("a.nrrd", "ü 1/c.nrrd")]


def test_datalist_without_labels(tmp_path):
    make(tmp_path, {"testing": [{"image": "a.nrrd"}]})
    assert Datalist(tmp_path, "testing", keys=["image"]).cases == [{"image": str(tmp_path / "a.nrrd")}]


@pytest.mark.parametrize(
    ("content", "split", "message"),
    [
        (
            None,
            "training",
            r"there is no datalist\.json in .*`segbundles prepare DATASET --source FOLDER --out .*phantom",
        ),
        ("{not json", "training", r"datalist\.json is not a datalist in JSON \(.*`segbundles prepare"),
        ([entry()], "training", r"datalist\.json is not a datalist in JSON"),
        (
            {"validation": [entry()]},
            "training",
            r"has no cases under 'training': add cases to the training split, or choose another",
        ),
        ({"training": None}, "training", r"has no cases under 'training'"),
        ({"training": [entry()]}, "train", r"split must be one of training, validation, testing, got 'train'"),
        ({"training": ["a.nrrd"]}, "training", r"training: entry 0 is 'a\.nrrd', not a dictionary of files"),
        (
            {"training": [entry(), {"image": "a.nrrd"}]},
            "training",
            r"entry 1 \(a\.nrrd\) has no label\. Fix it, or run",
        ),
        ({"training": [entry(label="no.nrrd")]}, "training", r"label no\.nrrd does not exist"),
        (
            {"training": [entry(f"{i}.nrrd") for i in range(7)]},
            "training",
            r"image 4\.nrrd does not exist and 2 more\.",
        ),
    ],
)
def test_datalist_faults(tmp_path, content, split, message):
    if content is not None:
        make(tmp_path, content)
    with pytest.raises(ValueError, match=message):
        len(Datalist(tmp_path, split))


@pytest.mark.parametrize("split", ["testing", "validation"])
def test_a_split_without_any_label_has_nothing_to_score(tmp_path, split):
    make(tmp_path, {split: [{"image": "a.nrrd"}, {"image": "b.nrrd", "label": None}]})
    with pytest.raises(ValueError, match="no truth to compare with: choose another split, or add a label") as caught:
        len(Datalist(tmp_path, split))
    assert f"no entry under '{split}' has a label" in str(caught.value)
    assert "prepare" not in str(caught.value)


def test_one_lost_label_of_many_is_named_in_any_split(tmp_path):
    make(tmp_path, {"testing": [entry(), {"image": "a.nrrd"}]})
    with pytest.raises(ValueError, match=r"entry 1 \(a\.nrrd\) has no label\. Fix it, or run"):
        len(Datalist(tmp_path, "testing"))


def test_a_lone_training_case_without_label_is_named(tmp_path):
    make(tmp_path, {"training": [{"image": "a.nrrd"}]})
    with pytest.raises(ValueError, match=r"entry 0 \(a\.nrrd\) has no label\. Fix it, or run"):
        len(Datalist(tmp_path))


def test_datalist_without_its_folder(tmp_path):
    with pytest.raises(
        ValueError, match=r"dataset_dir '.*nowhere' is not a folder: give --dataset_dir one.*segbundles"
    ):
        len(Datalist(tmp_path / "nowhere"))


def tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(cases):
    return [item["image"] for item in cases]


def test_what_is_left_out_is_counted_and_named(tmp_path, caplog):
    tree(
        tmp_path,
        *("p2/a.nrrd", "p1/a.b.nii.gz", "p1/ü x.TIF", "top.PNG", "p1/laendo.nrrd", "labelsTr/la.nii.gz", "notes.txt"),
        *(".hidden/a.nrrd", "p1/.a.nrrd", "p1/a.b_seg.nii.gz", "HeLa_cells.tif", "out/p1/z.nrrd", "p1/labelsTr/b.nii"),
        *(f"out/{k}.nrrd" for k in range(4)),
    )
    skip = ["laendo.nrrd", "labelsTr/*", "*_seg.*", "*_cells.*"]
    cases = FolderImages(tmp_path, output_dir=tmp_path / "out", skip=skip)
    with caplog.at_level(logging.INFO, "segbundles"):
        assert found(cases) == [str(tmp_path / n) for n in ("p1/a.b.nii.gz", "p1/ü x.TIF", "p2/a.nrrd", "top.PNG")]
    assert sorted(caplog.messages) == [
        "Left out: 1 by the pattern '*_cells.*' of skip (HeLa_cells.tif).",
        "Left out: 1 by the pattern '*_seg.*' of skip (p1/a.b_seg.nii.gz).",
        "Left out: 1 by the pattern 'laendo.nrrd' of skip (p1/laendo.nrrd).",
        "Left out: 1 hidden (p1/.a.nrrd).",
        "Left out: 1 with another suffix (notes.txt).",
        "Left out: 2 by the pattern 'labelsTr/*' of skip (labelsTr/la.nii.gz, p1/labelsTr/b.nii).",
        "Left out: 5 in the output folder (out/0.nrrd, out/1.nrrd, out/2.nrrd and 2 more).",
    ]
    assert cases.root == tmp_path
    only = FolderImages(tmp_path, output_dir=tmp_path, skip=["laendo.nrrd", "labelsTr/*", "out/*"], suffixes=[".nrrd"])
    assert found(only) == [str(tmp_path / "p2/a.nrrd")]
    assert len(FolderImages(tmp_path, tmp_path / "out", skip=[])) == 9
    message = r"Left out: 1 by the pattern '\*_CELLS\.\*' .*cells\.tif\); 1 hidden .*; 13 with another .* With --skip"
    (tmp_path / "p1/ü x.TIF").unlink()
    with pytest.raises(ValueError, match=message):
        len(FolderImages(tmp_path, skip=["*_CELLS.*"], suffixes=[".tif"]))


def test_labels_are_not_segmented_silently(tmp_path, caplog):
    """Their names are in a datalist, or are those that 3D Slicer gives."""
    (tmp_path / "study").mkdir()
    make(tmp_path / "study", {"training": [entry("a.nrrd", "ü 1/c.nrrd")], "testing": [{"image": "b.nrrd"}]})
    tree(tmp_path, "x.seg.nrrd")
    with caplog.at_level(logging.INFO, "segbundles"):
        assert found(FolderImages(tmp_path)) == [str(tmp_path / f"study/{n}.nrrd") for n in "ab"]
    assert caplog.messages == [
        "Left out: 2 as labels (study/ü 1/c.nrrd, x.seg.nrrd).",
        "Left out: 1 with another suffix (study/datalist.json).",
    ]
    caplog.clear()
    assert len(FolderImages(tmp_path, skip=[])) == 4
    assert len(FolderImages(tmp_path / "x.seg.nrrd")) == 1
    (tmp_path / "study/datalist.json").write_text("[1]")
    assert len(FolderImages(tmp_path)) == 3
    segmented = "Segmented although their names are those of labels, because"
    assert caplog.messages[:2] == [
        f"{segmented} skip is []: study/ü 1/c.nrrd, x.seg.nrrd.",
        f"{segmented} it was given as dataset_dir: x.seg.nrrd.",
    ]
    assert caplog.messages[2].startswith(f"{tmp_path}/study/datalist.json cannot be read (")


def test_results_of_another_image_with_the_same_name_stay(tmp_path):
    """The later image is refused while the earlier one exists; other names, and the same image, are not."""
    tree(tmp_path, "A/scan.nrrd", "A/bad.nrrd", "B/scan.nrrd", "B/bad.nrrd", "C/other.nrrd", "o/scan_seg.nrrd")
    (tmp_path / "o/inference.csv").write_text("file,status\nscan.nrrd,ok\nbad.nrrd,failed\n")
    (tmp_path / "o/inferring.config.json").write_text(json.dumps({"knobs": {"dataset_dir": str(tmp_path / "A")}}))
    message = r"o has the result of another image of this name, .*A/scan\.nrrd: choose another output_dir for .*B/scan"
    for given in ("B", "B/scan.nrrd"):
        with pytest.raises(ValueError, match=message):
            len(FolderImages(tmp_path / given, tmp_path / "o"))
        assert len(FolderImages(tmp_path / given, tmp_path / "o2")) > 0
    for given in ("A", "A/scan.nrrd", "B/bad.nrrd", "C"):
        assert len(FolderImages(tmp_path / given, tmp_path / "o")) > 0
    (tmp_path / "A/scan.nrrd").unlink()
    assert len(FolderImages(tmp_path / "B", tmp_path / "o")) == 2


def test_a_single_file_in_another_format_is_refused_at_once(tmp_path):
    tree(tmp_path, "scans.zip", "scan.tar.gz", "a.tif", "b.NII")
    formats = "names must end in one of .nii, .nrrd"
    for name, repair in (("scans.zip", "unpack it first"), ("scan.tar.gz", "unpack it"), ("a.tif", "convert it to")):
        with pytest.raises(ValueError, match=rf"{name} is not an image that can be read here: {formats}; {repair}"):
            len(FolderImages(tmp_path / name, suffixes=[".nii", ".nrrd", ".dcm"]))
    assert len(FolderImages(tmp_path / "b.NII", suffixes=[".nii", ".nrrd"])) == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_results_in_the_data_folder_are_no_images(tmp_path, caplog, encoding):
    tree(tmp_path, "p/a.tif", "p/a_seg.png", "p/a_cells.tif", "1.2.3_seg.png", "c.png", "c_seg.png", "inference.log")
    (tmp_path / "inference.csv").write_text("file,status\np/a.tif,ok\n1.2.3,ok\n", encoding=encoding)
    cases = FolderImages(tmp_path, tmp_path, skip=[], postfixes=["seg", "cells"])
    with pytest.raises(
        ValueError, match=r"c_seg\.png would be replaced by a result of this run: choose another output_d"
    ):
        len(cases)
    (tmp_path / "c.png").unlink()
    caplog.clear()
    with caplog.at_level(logging.INFO, "segbundles"):
        assert found(cases) == [str(tmp_path / n) for n in ("c_seg.png", "p/a.tif")]
    assert caplog.messages == [
        "Left out: 3 as results of an earlier run (1.2.3_seg.png, p/a_cells.tif, p/a_seg.png).",
    ]
    assert len(FolderImages(tmp_path, skip=[])) == 5


def test_formats_of_images_that_are_not_read_are_a_warning(tmp_path, caplog):
    tree(tmp_path, "a.png", "b.webp", "p/c.SVS", "p/d.jp2", "p/e.czi", "f.txt")
    with caplog.at_level(logging.INFO, "segbundles"):
        assert found(FolderImages(tmp_path)) == [str(tmp_path / "a.png")]
    formats = "4 in formats that are not read (b.webp, p/c.SVS, p/d.jp2 and 1 more): convert them to"
    assert caplog.record_tuples == [
        ("segbundles", logging.WARNING, f"Left out: {formats} PNG or TIFF or NIfTI."),
        ("segbundles", logging.INFO, "Left out: 1 with another suffix (f.txt)."),
    ]
    with pytest.raises(ValueError, match=re.escape(f"2 with another suffix (a.png, f.txt); {formats} NIfTI.")):
        len(FolderImages(tmp_path, suffixes=[".nii", ".dcm"]))


def test_names_that_are_not_utf8(tmp_path, caplog):
    names = [os.fsdecode(name) for name in (b"caf\xe9.png", b"m\xfcller_seg.png", b"caf\xe9.bmp")]
    tree(tmp_path, *names[:2])
    with caplog.at_level(logging.INFO, "segbundles"):
        assert found(FolderImages(tmp_path)) == [str(tmp_path / names[0])]
    assert caplog.messages == [r"Left out: 1 by the pattern '*_seg.*' of skip (m\xfcller_seg.png)."]
    tree(tmp_path, names[2])
    with pytest.raises(ValueError, match=re.escape(r"caf\xe9.png would both be written as caf\xe9_seg: rename one")):
        len(FolderImages(tmp_path))


def test_patterns_to_skip_are_read_in_capitals_or_not(tmp_path):
    tree(tmp_path, "a.png", "b_MASK.png", "truth/c.png")
    tree(tmp_path, "x/ground truth/a.png", "GROUND_TRUTH/a.png", "groundtruth/a.png")
    cases = FolderImages(tmp_path, skip=["Ground?Truth/*", "GroundTruth/*", "*_mask.*"])
    assert found(cases) == [str(tmp_path / n) for n in ("a.png", "truth/c.png")]


def test_folder_images_relative_to_the_current_folder(tmp_path, monkeypatch):
    tree(tmp_path, "d/a.png")
    monkeypatch.chdir(tmp_path)
    assert found(FolderImages("d", "d/out")) == [str(tmp_path / "d/a.png")]


def test_a_link_keeps_its_own_place(tmp_path):
    tree(tmp_path, "archive/0001.nrrd", "d/p1/x.txt")
    (tmp_path / "d/p1/a.nrrd").symlink_to(tmp_path / "archive/0001.nrrd")
    assert found(FolderImages(tmp_path / "d")) == [str(tmp_path / "d/p1/a.nrrd")]


def test_a_single_link_keeps_its_own_place(tmp_path, monkeypatch):
    tree(tmp_path, "archive/0001.nrrd", "d/x.txt")
    (tmp_path / "d/a.nrrd").symlink_to(tmp_path / "archive/0001.nrrd")
    (tmp_path / "linked").symlink_to(tmp_path / "d")
    monkeypatch.chdir(tmp_path / "d")
    for given in (tmp_path / "d/a.nrrd", "a.nrrd", tmp_path / "linked/a.nrrd"):
        cases = FolderImages(given)
        assert found(cases) == [str(tmp_path / "d/a.nrrd")]
        assert cases.root == image_root(given) == tmp_path / "d"
    assert image_root(tmp_path / "linked") == tmp_path / "d"


def test_single_file(tmp_path):
    tree(tmp_path, "p/a_seg.nrrd", "p/b.nrrd")
    cases = FolderImages(tmp_path / "p/a_seg.nrrd")
    assert found(cases) == [str(tmp_path / "p/a_seg.nrrd")]
    assert cases.root == tmp_path / "p"


@pytest.mark.parametrize(
    ("names", "folder", "message"),
    [
        ((), "", r"no image under '.*': names must end in one of \.nii, \.nii\.gz, \.nrrd.*\.jpeg"),
        (
            ("a_seg.nrrd", "b.txt"),
            "",
            r"no image under .* Left out: 1 by .*'\*_seg\.\*' of skip .*; 1 with another suffix",
        ),
        ((), "nowhere", r"dataset_dir '.*nowhere' is neither a folder nor a file: give the images to segment"),
        (("x/a.tif", "x/a.png"), "", r"x/a\.png and .*x/a\.tif would both be written as a_seg: rename one of them"),
        (("a.nii", "a.nii.gz"), "", r"would both be written as a_seg"),
    ],
)
def test_folder_faults(tmp_path, names, folder, message):
    tree(tmp_path, *names)
    with pytest.raises(ValueError, match=message):
        len(FolderImages(tmp_path / folder))


def test_one_name_in_two_folders_is_no_fault(tmp_path):
    tree(tmp_path, "x/a.tif", "y/a.tif")
    assert len(FolderImages(tmp_path)) == 2


def test_folder_is_read_at_first_use(tmp_path):
    cases = FolderImages(tmp_path)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        cases[0]
    tree(tmp_path, "a.png")
    assert len(cases) == 1
