from __future__ import annotations

import errno
import importlib
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from segbundles.datasets import (
    DATA_SETS,
    Case,
    Checked,
    DataFaults,
    DataSet,
    Fault,
    get_data_set,
    merge,
    prepare,
    split_cases,
    write_datalist,
)

HEAD = {"name": "made", "labels": {"0": "background", "1": "organ"}, "licence": "none"}
SINGLES = {name: name for name in "ABCDEFGHIJ"}


def _names(entries):
    return [entry["image"].split("/")[-2] for entry in entries]


class TestSplitCases:
    @pytest.mark.parametrize(("fraction", "expected"), [(0, 0), (0.01, 1), (0.2, 2), (0.26, 3), (0.5, 5), (1, 10)])
    def test_validation_takes_its_share(self, fraction, expected):
        assert Counter(split_cases(SINGLES, validation_fraction=fraction).values())["validation"] == expected

    def test_same_seed_same_split_whatever_the_order(self):
        reversed_cases = dict(reversed(SINGLES.items()))
        assert split_cases(SINGLES, seed=3) == split_cases(reversed_cases, seed=3)

    def test_seeds_differ(self):
        assert len({tuple(split_cases(SINGLES, seed=seed).items()) for seed in range(5)}) > 1

    @pytest.mark.parametrize("seed", range(8))
    def test_group_stays_together(self, seed):
        groups = {name: "ABBCCCDDDD"[i] for i, name in enumerate(SINGLES)}
        splits = split_cases(groups, validation_fraction=0.4, seed=seed)
        assert len({(groups[name], split) for name, split in splits.items()}) == 4
        assert Counter(splits.values())["validation"] <= 4

    def test_fixed_case_takes_its_group_along_and_counts(self):
        groups = {**SINGLES, "B": "A"}
        for seed in range(8):
            splits = split_cases(groups, {"A": "validation", "J": "testing"}, 0.2, seed)
            assert splits["A"] == splits["B"] == "validation"
            assert splits["J"] == "testing"
            assert Counter(splits.values()) == {"validation": 2, "testing": 1, "training": 7}

    def test_folds_cover_every_case_once(self):
        validation = Counter()
        for fold in range(3):
            splits = split_cases(SINGLES, seed=1, folds=3, fold=fold)
            chosen = [name for name, split in splits.items() if split == "validation"]
            assert len(chosen) in (3, 4)
            validation.update(chosen)
        assert validation == dict.fromkeys(SINGLES, 1)

    def test_fixed_splits_that_tear_a_group(self):
        with pytest.raises(ValueError, match=r"case B of testing and A of validation form one group .* cannot be"):
            split_cases({"A": "A", "B": "A"}, {"A": "validation", "B": "testing"})

    def test_more_folds_than_groups(self):
        with pytest.raises(ValueError, match="5 folds need 5 groups or more, found 2"):
            split_cases({"A": "A", "B": "B"}, folds=5, fold=0)


class TestWriteDatalist:
    def test_one_line_per_entry_with_counts(self, tmp_path):
        entry = {"image": "a.nrrd", "label": "b.nrrd", "group": "a"}
        path = write_datalist({**HEAD, "training": [entry, entry], "testing": [entry]}, tmp_path / "new" / "folder")
        found = json.loads(path.read_text())
        assert (found["numTraining"], found["numValidation"], found["numTest"]) == (2, 0, 1)
        assert found["training"] == [entry, entry]
        assert found["validation"] == []
        assert path.read_text().count('\n  {"image": "a.nrrd"') == 3
        assert [p.name for p in path.parent.iterdir()] == ["datalist.json"]

    def test_monai_reads_it(self, tmp_path):
        from monai.data import load_decathlon_datalist
        from monai.data.decathlon_datalist import load_decathlon_properties

        path = write_datalist({**HEAD, "training": [{"image": "../a", "label": "../b", "group": "g"}]}, tmp_path / "d")
        expected = [{"image": str(tmp_path / "a"), "label": str(tmp_path / "b"), "group": "g"}]
        assert load_decathlon_datalist(path, True, "training") == expected
        assert load_decathlon_properties(path, ["name", "numTraining"]) == {"name": "made", "numTraining": 1}

    def test_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(ValueError, match=r"cannot write .*datalist\.json \(Not a directory\).*choose another"):
            write_datalist(HEAD, tmp_path / "file" / "below")


@pytest.mark.parametrize("name", ["brain", "em", "left_atrium", "polyp"])
def test_a_full_disk_leaves_no_half_file_of_a_phantom(name, tmp_path, monkeypatch):
    import SimpleITK as sitk  # noqa: N813
    import tifffile

    def full(*args, **kwargs):
        path = next(Path(arg) for arg in args if isinstance(arg, str | Path))
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sitk, "WriteImage", full)
    monkeypatch.setattr(tifffile, "imwrite", full)
    make_phantom = importlib.import_module(f"segbundles.phantoms.{name}").make_phantom
    with pytest.raises(ValueError, match=r"^cannot write .* \(No space left on device\): make room, or choose another"):
        make_phantom(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


class TestPrepare:
    def test_paths_are_relative_to_out(self, lasc18, tmp_path):
        prepared = prepare(get_data_set("lasc18"), lasc18(3), tmp_path / "deep" / "er")
        entry = prepared.datalist["training"][0]
        assert entry["image"].startswith("../../lasc18/Training Set/")
        assert (prepared.path.parent / entry["image"]).is_file()
        assert (prepared.path.parent / entry["label"]).is_file()

    def test_rerun_is_identical_and_leaves_one_file(self, lasc18, tmp_path):
        source, out = lasc18(), tmp_path / "out"
        first = prepare(get_data_set("lasc18"), source, out).path.read_bytes()
        assert prepare(get_data_set("lasc18"), source, out).path.read_bytes() == first
        assert [p.name for p in out.iterdir()] == ["datalist.json"]

    def test_validation_case_is_honoured_for_every_seed(self, lasc18, tmp_path):
        source = lasc18()
        for seed in range(4):
            prepared = prepare(get_data_set("lasc18"), source, tmp_path / "out", seed=seed, validation_cases=["C"])
            assert _names(prepared.datalist["validation"]) == ["C"]

    @pytest.mark.parametrize("kind", ["lgemri", "laendo"])
    def test_identical_files_fall_in_one_group(self, lasc18, tmp_path, kind):
        source = lasc18()
        cases = source / "Training Set"
        shutil.copy(cases / "B" / f"{kind}.nrrd", cases / "E" / f"{kind}.nrrd")
        prepared = prepare(get_data_set("lasc18"), source, tmp_path / "out", validation_cases=["E"])
        assert _names(prepared.datalist["validation"]) == ["B", "E"]
        assert {entry["group"] for entry in prepared.datalist["validation"]} == {"B"}
        assert prepared.notes == [
            f"identical {'images' if kind == 'lgemri' else 'labels'}: B, E (one group)",
            "validation has 2 cases of 1 group: all cases of one group count as one; with fewer than ten groups there, "
            "use --folds to score all cases once",
        ]

    def test_the_same_object_in_another_crop(self, tmp_path, write_nrrd):
        source = tmp_path / "lasc18"
        rng = np.random.default_rng(0)
        inside = (slice(2, 8), slice(3, 8), slice(2, 7))

        def draw(shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            label = np.zeros((16, 16, 12), np.uint8)
            label[inside] = shape
            label[2, 3, 2] = label[7, 7, 6] = 255  # so that the box is the same
            return rng.integers(0, 255, label.shape, dtype=np.uint8), label

        cases = {name: draw(rng.choice([0, 255], (6, 5, 5))) for name in "AC"}
        cases["B"] = (cases["A"][0][1:15, 2:, :11] // 2, cases["A"][1][1:15, 2:, :11])  # its grey levels differ
        image, label = (np.roll(array, 3, 0) for array in cases["C"])
        label[7, 5, 4] = 255 - label[7, 5, 4]
        cases["D"] = image, label  # its label was corrected
        cases |= {name: draw(np.full((6, 5, 5), 255)) for name in "EF"}  # boxes, which are equal by chance
        cases["F"] = cases["F"][0], np.roll(cases["F"][1], 1, 0)
        for name, arrays in cases.items():
            for kind, array in zip(("lgemri", "laendo"), arrays, strict=True):
                write_nrrd(source / name / f"{kind}.nrrd", array, (2.0, 2.0, 2.0))
        prepared = prepare(get_data_set("lasc18"), source, tmp_path / "out", validation_cases=["B"])
        assert _names(prepared.datalist["validation"]) == ["A", "B"]
        groups = {e["case"]: e["group"] for s in ("training", "validation") for e in prepared.datalist[s]}
        assert groups == {"A": "A", "B": "A", "C": "C", "D": "C", "E": "E", "F": "F"}
        assert prepared.notes[:2] == [
            "the same object in another crop: A, B (one group)",
            "the same object in another crop: C, D (one group)",
        ]

    def test_what_belongs_to_no_case_is_named(self, lasc18, tmp_path):
        source = lasc18(3)
        cases = source / "Training Set"
        for name in ("readme.txt", "Training Set/A/wall.nrrd", ".hidden", "p5/a/x.nii.gz", "p5/y.nii.gz", "p10/z.nii"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text("x")
        split = {"training": ["A"], "validation": ["B"]}
        prepared = prepare(get_data_set("lasc18"), source, source / "out", split=split)
        expected = [
            "files left out, because they belong to no case: Training Set/A/wall.nrrd, p5/ (2 files), p10/ (1 file), "
            "readme.txt",
            "cases left out, because no list of the split names them: C",
        ]
        assert prepared.notes == expected
        assert prepare(get_data_set("lasc18"), source, source / "out", split=split).notes == expected
        for index in range(9):
            (cases / f"{index}.png").write_text("x")
        notes = prepare(get_data_set("lasc18"), cases, source / "out", split=split).notes
        names = "0.png, 1.png, 2.png, 3.png, 4.png and 5 more"
        assert notes[0] == f"files left out, because they belong to no case: {names}"

    def test_many_duplicates_of_the_same_groups_are_one_note(self, tmp_path):
        cases = [Case(f"{g}_{i}", tmp_path / "i", tmp_path / "l", g) for g in "BA" for i in (10, 9, 3, 2, 1)]
        cases += [Case("C_1", tmp_path / "i", tmp_path / "l", "C"), Case("C_2", tmp_path / "i", tmp_path / "l", "C")]

        def check(case):  # A and B are one patient's slices twice; those of C equal each other only
            group, _, number = case.name.partition("_")
            return Checked(image_hash="c" if group == "C" else number)

        data_set = DataSet("made", HEAD, find=lambda source: (cases, []), check=check)
        prepared = prepare(data_set, tmp_path, tmp_path / "out", validation_fraction=0)
        entries = prepared.datalist["training"]
        assert [e["case"] for e in entries] == [f"{g}_{i}" for g in "AB" for i in (1, 2, 3, 9, 10)] + ["C_1", "C_2"]
        assert [e["group"] for e in entries] == ["A"] * 10 + ["C"] * 2
        assert prepared.notes[0] == "identical images: A_1, B_1, A_2, B_2, A_3 and 5 more (one group)"
        assert prepared.notes[1:] == ["validation is empty"]

    def test_chain_of_duplicates_is_one_group(self, lasc18, tmp_path):
        source = lasc18()
        cases = source / "Training Set"
        shutil.copy(cases / "A" / "lgemri.nrrd", cases / "B" / "lgemri.nrrd")
        shutil.copy(cases / "B" / "laendo.nrrd", cases / "C" / "laendo.nrrd")
        prepared = prepare(get_data_set("lasc18"), source, tmp_path / "out", validation_cases=["C"])
        assert _names(prepared.datalist["validation"]) == ["A", "B", "C"]

    def test_split_file_is_exact_and_leaves_out_the_rest(self, lasc18, tmp_path):
        split = {"training": ["F", "A"], "validation": ["B"], "testing": ["D"]}
        (tmp_path / "split.json").write_text(json.dumps(split))
        prepared = prepare(get_data_set("lasc18"), lasc18(), tmp_path / "out", split=tmp_path / "split.json")
        assert {s: _names(prepared.datalist[s]) for s in split} == {s: sorted(names) for s, names in split.items()}
        assert prepared.notes == ["cases left out, because no list of the split names them: C, E"]

    def test_split_and_validation_cases_may_name_groups(self, tmp_path):
        cases = [Case(f"{g}{i}", tmp_path / "i", tmp_path / "l", g) for g in ("p", "q", "r") for i in range(3)]
        data_set = DataSet("made", HEAD, find=lambda source: (cases, []), check=lambda case: Checked())
        out = tmp_path / "out"

        def found(**options):
            datalist = prepare(data_set, tmp_path, out, **options).datalist
            return {s: [entry["case"] for entry in datalist[s]] for s in ("training", "validation", "testing")}

        split = {"training": ["q"], "validation": ["p1", "p"], "testing": ["r2"]}
        expected = {"training": ["q0", "q1", "q2"], "validation": ["p0", "p1", "p2"], "testing": ["r2"]}
        assert found(split=split) == expected
        for seed in range(4):
            assert found(seed=seed, validation_cases=["q"])["validation"] == ["q0", "q1", "q2"]
        with pytest.raises(ValueError, match="case 'p1' is twice in the split: in training and in testing"):
            prepare(data_set, tmp_path, out, split={"training": ["p1"], "testing": ["p"]})

    def test_split_by_group_keeps_the_faults_of_its_cases(self, tmp_path):
        faults = [Fault("p1", tmp_path / "p1", "is bad", "p"), Fault("q1", tmp_path / "q1", "is worse", "q")]
        cases = [Case(name, tmp_path / "i", tmp_path / "l", name[0]) for name in ("p0", "q0")]
        data_set = DataSet("made", HEAD, find=lambda source: (cases, faults), check=lambda case: Checked())
        with pytest.raises(DataFaults, match="1 fault in ") as caught:
            prepare(data_set, tmp_path, tmp_path / "out", split={"training": ["p"]})
        assert caught.value.faults == faults[:1]

    def test_review_adds_faults_and_notes(self, tmp_path):
        cases = [Case("A", tmp_path / "i", tmp_path / "l", "A")]
        faults = []

        def review(source, found, checked):
            assert (source, found, list(checked)) == (tmp_path, cases, ["A"])
            return faults, ["a remark"]

        data_set = DataSet(
            "made", HEAD, lambda source: (cases, []), lambda case: Checked(), review, ("frames", "films")
        )
        prepared = prepare(data_set, tmp_path, tmp_path / "out", validation_fraction=0)
        assert prepared.notes == ["a remark", "validation is empty"]
        assert prepared.units == ("frames", "films")
        faults.append(Fault("A", tmp_path / "i", "does not fit the others"))
        with pytest.raises(DataFaults, match="i: does not fit the others"):
            prepare(data_set, tmp_path, tmp_path / "out")

    def test_split_leaves_out_a_faulty_case(self, lasc18, tmp_path):
        source = lasc18(3)
        (source / "Training Set" / "C" / "laendo.nrrd").unlink()
        prepared = prepare(
            get_data_set("lasc18"), source, tmp_path / "out", split={"training": ["A"], "validation": ["B"]}
        )
        assert prepared.datalist["numTraining"] == 1

    def test_split_across_a_group(self, lasc18, tmp_path):
        source = lasc18(3)
        cases = source / "Training Set"
        shutil.copy(cases / "A" / "lgemri.nrrd", cases / "B" / "lgemri.nrrd")
        with pytest.raises(ValueError, match="cross the split: A in training, B in validation"):
            prepare(get_data_set("lasc18"), source, tmp_path / "out", split={"training": ["A"], "validation": ["B"]})
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"validation_fraction": 1.5}, "validation_fraction must be between 0 and 1, got 1.5"),
            ({"folds": 3}, "folds and fold go together, got folds=3 and fold=None"),
            ({"folds": 1, "fold": 0}, "folds must be 2 or more, got 1"),
            ({"folds": 3, "fold": 3}, "fold must be 0 to 2 with 3 folds, got 3"),
            ({"validation_cases": ["CC"]}, "names cases that are not in the source: CC; did you mean 'C'"),
            ({"split": {"training": ["A", "Z"]}}, "the split names cases that are not in the source: Z"),
            ({"split": {"training": ["A"], "validation": ["A"]}}, "'A' is twice in the split: in training and in val"),
            ({"split": {"train": ["A"]}}, r"lists of case names under training, validation, testing, got \['train'\]"),
            ({"split": {"training": "A"}}, "training of the split must be a list of case names, got 'A'"),
            ({"split": {"training": ["A"]}, "validation_cases": ["B"]}, "leave out validation cases and folds"),
            ({"split": "absent.json"}, "cannot read the split absent.json"),
        ],
    )
    def test_bad_options(self, lasc18, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            prepare(get_data_set("lasc18"), lasc18(3), tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    def test_source_that_is_absent(self, tmp_path):
        with pytest.raises(ValueError, match=r"source .*nowhere is not a folder"):
            prepare(get_data_set("heart"), tmp_path / "nowhere", tmp_path / "out")

    @pytest.mark.parametrize("name", [name for name in DATA_SETS if name != "pairs"])
    def test_source_without_cases(self, tmp_path, name):
        with pytest.raises(ValueError, match=r"no case in .*: expected"):
            prepare(get_data_set(name), tmp_path, tmp_path / "out")

    @pytest.mark.parametrize(
        ("text", "message"),
        [("{}", "was not written by segbundles"), ("no json", "was not written"), ('{"name": "heart"}', "'heart'")],
    )
    def test_foreign_datalist_is_kept(self, lasc18, tmp_path, text, message):
        (tmp_path / "datalist.json").write_text(text)
        with pytest.raises(ValueError, match=f"{message}.* is not overwritten"):
            prepare(get_data_set("lasc18"), lasc18(3), tmp_path)
        assert (tmp_path / "datalist.json").read_text() == text

    def test_unknown_data_set(self):
        with pytest.raises(ValueError, match="unknown data set 'lasc': choose one of lasc18, heart"):
            get_data_set("lasc")


class TestMerge:
    @pytest.fixture
    def prepared(self, lasc18, heart, tmp_path):
        prepare(get_data_set("lasc18"), lasc18(), tmp_path / "p" / "lasc18")
        prepare(get_data_set("heart"), heart(tests=1), tmp_path / "p" / "heart")
        return tmp_path / "p"

    def test_splits_paths_groups_and_spacing(self, prepared):
        merged = merge([prepared / "lasc18", prepared / "heart"], prepared / "a" / "b").datalist
        assert merged["name"] == "lasc18+heart"
        assert merged["licence"].endswith("; CC-BY-SA 4.0")
        assert merged["labels"] == {"0": "background", "1": "left atrium"}
        assert (merged["numTraining"], merged["numValidation"], merged["numTest"]) == (8, 2, 1)
        entries = [entry for split in ("training", "validation", "testing") for entry in merged[split]]
        for entry in entries:
            assert (prepared / "a" / "b" / entry["image"]).is_file()
            assert entry.get("spacing_mm") == ([0.625] * 3 if entry["group"].startswith("lasc18/") else None)
        assert merged["testing"] == [
            {
                "data_set": "heart",
                "case": "la_900",
                "image": "../../../Task02_Heart/imagesTs/la_900.nii.gz",
                "group": "heart/la_900",
            }
        ]

    def _copy(self, prepared, change):
        datalist = json.loads((prepared / "lasc18" / "datalist.json").read_text())
        change(datalist)
        return write_datalist(datalist, prepared / "other").parent

    def test_same_image_in_two_splits(self, prepared):
        def move(datalist):
            datalist["name"] = "other"
            datalist["validation"] = datalist.pop("training")[:1]

        with pytest.raises(
            ValueError, match=r"lgemri.nrrd is in training of one data set and in validation of another"
        ):
            merge([prepared / "lasc18", self._copy(prepared, move)], prepared / "out")
        assert not (prepared / "out").exists()

    def test_same_image_in_one_split_is_kept_once(self, prepared):
        other = self._copy(prepared, lambda datalist: None)
        result = merge([prepared / "lasc18", other], prepared / "out")
        assert result.datalist["numTraining"] == 5
        assert len(result.notes) == 6

    def test_group_in_two_splits(self, prepared, lasc18):
        source = lasc18(2, root="again", first=10)
        split = {"training": ["K"], "validation": ["L"]}
        prepare(get_data_set("lasc18"), source, prepared / "again", split=split)
        path = prepared / "again" / "datalist.json"
        validation = json.loads((prepared / "lasc18" / "datalist.json").read_text())["validation"][0]["group"]
        path.write_text(path.read_text().replace('"group": "K"', f'"group": "{validation}"'))
        with pytest.raises(ValueError, match=f"group 'lasc18/{validation}' is in both validation and training"):
            merge([prepared / "lasc18", prepared / "again"], prepared / "out")

    def test_labels_that_differ(self, prepared):
        other = self._copy(prepared, lambda datalist: datalist["labels"].update({"2": "wall"}))
        with pytest.raises(ValueError, match="labels differ"):
            merge([prepared / "heart", other], prepared / "out")

    def test_missing_files(self, prepared, tmp_path):
        (tmp_path / "lasc18" / "Training Set" / "A" / "lgemri.nrrd").unlink()
        with pytest.raises(ValueError, match=r"1 files are missing, .*A/lgemri.nrrd"):
            merge([prepared / "lasc18", prepared / "heart"], prepared / "out")

    @pytest.mark.parametrize(
        ("folders", "out", "message"),
        [
            (["lasc18"], "out", "two folders or more with a datalist.json, got 1"),
            (["lasc18", "heart"], "heart", "is one of the folders to merge"),
            (["lasc18", "absent"], "out", r"absent.datalist.json is missing: make it with `segbundles prepare`"),
        ],
    )
    def test_bad_folders(self, prepared, folders, out, message):
        with pytest.raises(ValueError, match=message):
            merge([prepared / folder for folder in folders], prepared / out)

    def test_file_that_is_no_datalist(self, prepared):
        (prepared / "other").mkdir()
        (prepared / "other" / "datalist.json").write_text('{"training": ["a", "b"]}')
        with pytest.raises(
            ValueError, match="is not a datalist: entry 0 of training is 'a', not a dictionary of files"
        ):
            merge([prepared / "lasc18", prepared / "other"], prepared / "out")

    def _by_hand(self, prepared, head="", **entry):
        """Write a list by hand beside one image and its label."""
        folder = prepared / "by hand"
        folder.mkdir()
        for name in ("scan.nii.gz", "truth.nii.gz"):
            (folder / name).write_text("")
        entry = {"image": "scan.nii.gz", "label": "truth.nii.gz", "group": "p1", **entry}
        entry = {key: value for key, value in entry.items() if value}
        (folder / "datalist.json").write_text(f'{{{head}"training": [{json.dumps(entry)}]}}')
        return folder

    def test_list_by_hand_without_name_and_labels(self, prepared):
        merged = merge([self._by_hand(prepared), prepared / "heart"], prepared / "out")
        assert merged.datalist["name"] == "by hand+heart"
        assert merged.datalist["labels"] == {"0": "background", "1": "left atrium"}
        assert merged.datalist["training"][0] == {
            "data_set": "by hand",
            "image": "../by hand/scan.nii.gz",
            "label": "../by hand/truth.nii.gz",
            "group": "by hand/p1",
        }
        assert 'has no line "labels": taken as' in merged.notes[0]

    def test_other_names_of_the_same_numbers(self, prepared):
        own = self._by_hand(prepared, '"labels": {"0": "nothing", "1": "atrium"}, ')
        merged = merge([prepared / "heart", own], prepared / "out")
        assert merged.datalist["labels"] == {"0": "background", "1": "left atrium"}
        assert "classes are called {'0': 'nothing', '1': 'atrium'} in" in merged.notes[0]

    def test_channels_of_an_image(self, prepared):
        own = self._by_hand(prepared, image=["scan.nii.gz", "truth.nii.gz"])
        merged = merge([own, prepared / "heart"], prepared / "out").datalist
        assert merged["training"][0]["image"] == ["../by hand/scan.nii.gz", "../by hand/truth.nii.gz"]

    def test_what_is_to_be_added(self, prepared):
        own = self._by_hand(prepared, group="")
        with pytest.raises(ValueError, match='entry 0 of training has no group: add it, as in "group": "patient 1"'):
            merge([prepared / "heart", own], prepared / "out")
        for name in ("heart", "lasc18"):
            datalist = json.loads((prepared / name / "datalist.json").read_text())
            del datalist["labels"]
            write_datalist(datalist, prepared / name)
        with pytest.raises(ValueError, match=r'add a line such as "labels": \{"0": "background", "1": "lesion"\} to'):
            merge([prepared / "heart", prepared / "lasc18"], prepared / "out")
