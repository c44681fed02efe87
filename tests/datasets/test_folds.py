from __future__ import annotations

import json

import pytest

from segbundles.datasets import merge, split_cases, write_datalist
from segbundles.datasets.folds import write_folds


def entry(case, group, folder="d", **more):
    return {"case": case, "image": f"{folder}/{case}.tif", "label": f"{folder}/{case}_seg.tif", "group": group, **more}


def prepared(folder, training, validation=(), testing=(), name="heart"):
    splits = {"training": list(training), "validation": list(validation), "testing": list(testing)}
    for case in (case for cases in splits.values() for case in cases):
        for key in ("image", "label"):
            (folder / case[key]).parent.mkdir(parents=True, exist_ok=True)
            (folder / case[key]).touch()
    write_datalist({"name": name, "labels": {"1": "atrium"}, **splits}, folder)
    return folder


def read(folders):
    return [json.loads((folder / "datalist.json").read_text()) for folder in folders]


def names(entries):
    return [entry["case"] for entry in entries]


def test_every_case_is_tested_once_and_groups_stay_together(tmp_path):
    """Nine slices of six patients, of which p0 has four; the one for testing is left out."""
    slices = [entry(f"p0_{k}", "p0") for k in range(4)] + [entry(f"p{k}", f"p{k}") for k in range(1, 6)]
    data = prepared(tmp_path / "data", slices[:6], slices[6:], [entry("held_out", "p9")])
    lists = read(write_folds(data, tmp_path / "out", 3))
    tested = [names(one["testing"]) for one in lists]
    assert sorted(name for fold in tested for name in fold) == sorted(names(slices))
    for one in lists:
        assert one["validation"] == []
        assert sorted(names(one["training"] + one["testing"])) == sorted(names(slices))
        assert not {case["group"] for case in one["training"]} & {case["group"] for case in one["testing"]}
    assert sorted(len({case["group"] for case in one["testing"]}) for one in lists) == [2, 2, 2]
    for case in lists[0]["training"]:
        assert (tmp_path / "out/fold0/data" / case["image"]).resolve() == data / "d" / f"{case['case']}.tif"
    assert lists == read(write_folds(data, tmp_path / "out", 3))
    for fold, one in enumerate(lists):  # the same folds as of `prepare --folds`
        splits = split_cases({case["case"]: case["group"] for case in slices}, folds=3, fold=fold)
        assert {*names(one["testing"])} == {case for case, split in splits.items() if split == "validation"}


def test_each_data_set_of_a_merged_list_is_in_every_fold_and_names_may_repeat(tmp_path):
    for name, number in (("one", 6), ("two", 3)):
        prepared(tmp_path / name, [entry(f"case{k}", f"case{k}") for k in range(number)], name=name)
    merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    for one in read(write_folds(tmp_path / "both", tmp_path / "out", 3)):
        assert sorted(case["data_set"] for case in one["testing"]) == ["one", "one", "two"]
        assert len(one["training"]) == 6


@pytest.mark.parametrize("prefix", ["", "stack/"])
def test_sections_become_runs_of_neighbours(tmp_path, prefix):
    """The groups of prepare are the runs of its split: sections 0 to 7, and 8 to 9."""
    more = {"data_set": "stack"} if prefix else {}
    sections = [entry(f"s{k}", prefix + ("s0..s7" if k < 8 else "s8..s9"), **more) for k in range(10)]
    data = prepared(tmp_path / "data", sections[:8], sections[8:])
    lists = read(write_folds(data, tmp_path / "out", 3))
    assert [names(one["testing"]) for one in lists] == [
        ["s0", "s1", "s2"],
        ["s3", "s4", "s5"],
        ["s6", "s7", "s8", "s9"],
    ]
    assert {case["group"] for case in lists[1]["testing"]} == {f"{prefix}s3..s5"}
    assert {case["group"] for case in lists[1]["training"]} == {f"{prefix}s0..s2", f"{prefix}s6..s9"}


def test_refuses(tmp_path):
    cases = [entry(f"c{k}", f"c{k // 2}") for k in range(6)]
    data = prepared(tmp_path / "data", cases)
    with pytest.raises(ValueError, match="folds must be 2 or more, got 1"):
        write_folds(data, tmp_path / "out", 1)
    with pytest.raises(ValueError, match="4 folds need 4 groups or more, found 3"):
        write_folds(data, tmp_path / "out", 4)
    write_folds(data, tmp_path / "out", 3)
    with pytest.raises(ValueError, match=r"fold0/data/datalist\.json was made from other data or for another number"):
        write_folds(data, tmp_path / "out", 2)
    del cases[2]["label"]
    write_datalist({"name": "heart", "training": cases}, data)
    with pytest.raises(ValueError, match="case 'c2' has no label and cannot be scored"):
        write_folds(data, tmp_path / "other", 2)
