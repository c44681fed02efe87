from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segbundles.data import Datalist
from segbundles.errors import InputError
from segbundles.leaks import check_leaks


def write(path: Path, seed: int | None, size: tuple[int, int] = (8, 6)) -> str:
    """Write an image, the same for one seed and black for None; return its name."""
    pixels = np.zeros(size, np.uint8) if seed is None else np.random.default_rng(seed).integers(0, 255, size, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path.name


@pytest.fixture
def data(tmp_path):
    """Write a list of cases; ``training=["a", "b"]`` are cases with files of those names, unlike each other."""

    def make(**splits: list[str | dict]) -> Path:
        number = 0
        datalist: dict[str, list] = {}
        for split, cases in splits.items():
            datalist[split] = []
            for case in cases:
                entry = case if isinstance(case, dict) else {"case": case, "group": f"patient {case}"}
                name = entry.get("case", "x")
                entry = {"image": f"{name}.bmp", "label": f"{name}_mask.bmp", **entry}
                for key in ("image", "label"):
                    number += 1
                    if not (tmp_path / entry[key]).exists():
                        write(tmp_path / entry[key], number)
                datalist[split].append(entry)
        (tmp_path / "datalist.json").write_text(json.dumps(datalist))
        return tmp_path

    return make


def refused(folder: Path, split: str = "training") -> str:
    with pytest.raises(InputError) as error:
        len(Datalist(folder, split))
    return str(error.value).removeprefix(f"{folder / 'datalist.json'}: ")


END = (
    ". What a network has seen in training says nothing about new cases: keep these cases in one split, or remove one "
    "of each two."
)


def test_splits_without_a_leak(data):
    folder = data(
        training=["a", "b", {"image": "c.bmp"}], validation=["d"], testing=["e", {"image": "f.bmp", "label": "g.bmp"}]
    )
    assert [len(Datalist(folder, split)) for split in ("training", "validation", "testing")] == [3, 1, 2]


def test_group_in_two_splits(data):
    both = {"case": "c", "group": 7}
    folder = data(training=["a", {"case": "b", "group": "7"}], validation=[both], testing=["d"])
    expected = "group '7' is in training (case b) and in validation (case c)" + END
    for split in ("training", "validation", "testing"):  # whichever is read
        assert refused(folder, split) == expected
    assert refused(data(training=["a"], testing=["a"])) == (
        "group 'patient a' is in training (case a) and in testing (case a)" + END
    )


@pytest.mark.parametrize("key", ["image", "label"])
def test_file_in_two_splits(data, tmp_path, key):
    write(tmp_path / "a.bmp", 1)
    write(tmp_path / "a_mask.bmp", 2)
    name = {"image": "a.bmp", "label": "a_mask.bmp"}[key]
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    for path in (name, f"./link/{name}"):
        folder = data(training=["a"], validation=[{"case": "b", key: path}])
        assert refused(folder) == f"{key} {name} is in training (case a) and in validation (case b)" + END


def test_a_channel_in_two_splits(tmp_path):
    names = [write(tmp_path / f"{name}.bmp", seed) for seed, name in enumerate(("t1", "flair", "other", "m1", "m2"))]
    shutil.copy(tmp_path / "t1.bmp", tmp_path / "copy.bmp")
    for twin, said in (
        ("t1.bmp", "image t1.bmp is in"),
        ("copy.bmp", "image t1.bmp of training (case a) and copy.bmp"),
    ):
        splits = {
            "training": [{"case": "a", "image": names[:2], "label": "m1.bmp"}],
            "validation": [{"case": "b", "image": [twin, "other.bmp"], "label": "m2.bmp"}],
        }
        (tmp_path / "datalist.json").write_text(json.dumps(splits))
        assert refused(tmp_path).startswith(said)


def test_pages_of_one_file(data, tmp_path):
    files = {"image": "stack.bmp", "label": "stack_mask.bmp"}
    pages = [{**files, "case": str(page), "page": page} for page in range(4)]
    folder = data(training=pages[:3], validation=pages[3:])
    assert len(Datalist(folder)) == 3
    for name in files.values():  # a copy of the stack, and another page of it, is not the same
        shutil.copy(tmp_path / name, tmp_path / f"copy_{name}")
    copies = [{**page, **{key: f"copy_{name}" for key, name in files.items()}} for page in pages]
    assert len(Datalist(data(training=pages[:3], validation=copies[3:]))) == 3
    assert refused(data(training=pages[:3], validation=pages[2:])) == (
        "image stack.bmp, page 2, is in training (case 2) and in validation (case 2)" + END
    )
    assert refused(data(training=pages[:3], validation=copies[2:])) == (
        "image stack.bmp of training (case 2) and copy_stack.bmp of validation (case 2) have the same content" + END
    )


def test_same_content(data, tmp_path):
    write(tmp_path / "a.bmp", 5)
    write(tmp_path / "c.bmp", 5)
    write(tmp_path / "a_mask.bmp", 6)
    write(tmp_path / "c_mask.bmp", 6)  # the pair is reported once
    write(tmp_path / "b_mask.bmp", 7)
    write(tmp_path / "d_mask.bmp", 7)
    folder = data(training=["a", "b"], validation=["c", "e"], testing=["d"])
    assert refused(folder) == (
        "image a.bmp of training (case a) and c.bmp of validation (case c) have the same content; "
        "label b_mask.bmp of training (case b) and d_mask.bmp of testing (case d) have the same content" + END
    )
    assert len(Datalist(data(training=["a", "c"], validation=["e"], testing=["b", "d"]))) == 2


def test_a_slice_that_differs_in_one_byte_is_another(data, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.bmp", 5, (300, 300))
    content = bytearray((tmp_path / "b.bmp").read_bytes())
    content[-10] ^= 1
    (tmp_path / "b.bmp").write_bytes(content)
    assert len(Datalist(data(training=["a"], validation=["b"]))) == 1


def test_blank_images_and_masks_are_alike(data, tmp_path):
    for name in ("a", "b", "a_mask", "b_mask", "empty"):
        write(tmp_path / f"{name}.bmp", None)
    empty = [{"case": case, "label": "empty.bmp"} for case in "cd"]
    assert len(Datalist(data(training=["a", empty[0]], validation=["b", empty[1]]))) == 2


def test_folders_of_slices(data, tmp_path):
    for folder, seeds in (("p", (1, 2)), ("q", (1, 2)), ("r", (1, 3))):
        for seed in seeds:
            write(tmp_path / folder / f"{seed + 10 * (folder == 'q')}.bmp", seed)
    cases = {name: {"image": name, "case": name} for name in "pqr"}
    assert len(Datalist(data(training=[cases["p"]], validation=[cases["r"]]))) == 1
    assert refused(data(training=[cases["p"]], validation=[cases["q"], cases["r"]])) == (
        "image p of training (case p) and q of validation (case q) have the same content" + END
    )


def test_many_leaks_are_three_and_a_number(data):
    message = refused(data(training=[*"abcdef"], validation=[*"bcdef"]))
    assert message.count("group 'patient") == 3
    assert "; and 2 more. What" in message


def test_files_that_are_missing_are_left_to_their_split(data, tmp_path):
    folder = data(training=["a"], validation=["b"])
    (tmp_path / "b.bmp").unlink()
    (tmp_path / "a_mask.bmp").write_bytes(b"")
    (tmp_path / "b_mask.bmp").write_bytes(b"")  # nothing to compare, and no reader takes them
    assert len(Datalist(folder)) == 1
    assert "image b.bmp does not exist" in refused(folder, "validation")


def test_a_list_is_compared_once_until_it_changes(data, tmp_path, monkeypatch):
    folder = data(training=["a"], validation=["b"])
    check_leaks(folder / "datalist.json", ("image", "label"), lambda path: False)
    monkeypatch.setattr("segbundles.leaks._read", None)
    check_leaks(folder / "datalist.json", ("image", "label"), lambda path: False)
    os.utime(folder / "datalist.json", (1, 1))
    with pytest.raises(TypeError):
        check_leaks(folder / "datalist.json", ("image", "label"), lambda path: False)


def test_four_thousand_slices_take_seconds(tmp_path):
    for kind in ("image", "label"):
        (tmp_path / kind).mkdir()
    entries = []
    for number in range(4000):
        content = np.random.default_rng(number).bytes(1000) * 20
        (tmp_path / "image" / f"{number}").write_bytes(content)
        (tmp_path / "label" / f"{number}").write_bytes(bytes(20000) if number % 2 else content[::-1])
        entries.append({"image": f"image/{number}", "label": f"label/{number}", "group": number // 40})
    (tmp_path / "datalist.json").write_text(json.dumps({"training": entries[:3000], "validation": entries[3000:]}))
    start = time.monotonic()
    check_leaks(tmp_path / "datalist.json", ("image", "label"), lambda path: True)
    assert time.monotonic() - start < 20
