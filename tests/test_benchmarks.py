"""The parts of the benchmarks that choose cases and start processes; their tables need minutes."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import scale
import tables
import tifffile

ROOT = Path(__file__).resolve().parents[1]


def make_list(folder: Path, cases: list[dict]) -> Path:
    """Write a list whose training and validation cases are these, and their files."""
    folder.mkdir()
    for path in {case["image"] for case in cases}:
        (folder / path).write_text(path)
    (folder / "datalist.json").write_text(json.dumps({"training": cases, "validation": cases, "testing": []}))
    return folder


def test_some_cases_are_whole_patients_and_their_files_are_found(tmp_path: Path) -> None:
    cases = [
        {
            "case": f"{patient}{k}",
            "group": patient,
            "slice": k,
            "image": f"{patient}{k}.tif",
            "label": f"{patient}{k}.tif",
        }
        for patient in "ab"
        for k in range(3)
    ]
    data = make_list(tmp_path / "data", cases)
    few = tables.some_cases(data, tmp_path / "few", {"training": 1, "validation": 2})
    found = json.loads((few / "datalist.json").read_text())
    assert [case["case"] for case in found["training"]] == ["a0", "a1", "a2"]
    assert len(found["validation"]) == 6
    assert found["training"][0]["image"] == str(data / "a0.tif")
    folder = tables.images(few, tmp_path / "images")
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.tif"))[:2] == ["a/a0.tif", "a/a1.tif"]
    assert (folder / "b/b2.tif").read_text() == "b2.tif"


def test_pages_of_a_stack_become_images(tmp_path: Path) -> None:
    cases = [{"case": f"s{k}", "group": "s", "page": k, "image": "stack.tif", "label": "stack.tif"} for k in range(4)]
    data = make_list(tmp_path / "data", cases)
    stack = np.arange(4, dtype=np.uint8)[:, None, None] * np.ones((1, 5, 6), np.uint8)
    tifffile.imwrite(data / "stack.tif", stack, photometric="minisblack")
    few = tables.some_cases(data, tmp_path / "few", {"validation": 3})
    found = tables.images(few, tmp_path / "images")
    pages = {path.name: tifffile.imread(path) for path in found.iterdir()}
    assert {name: (page.shape, page.max()) for name, page in pages.items()} == {
        f"s{k}.tif": ((5, 6), k) for k in range(3)
    }


def test_the_memory_of_a_process_is_its_own() -> None:
    """200 MiB more are seen, and a command that fails ends the benchmark with its output."""
    child = tables.child
    peaks = [child([sys.executable, "-c", f"print(len(b'x' * ({size} << 20)))"])[1] for size in (0, 200)]
    assert 190 < peaks[1] - peaks[0] < 230
    with pytest.raises(SystemExit, match=r"failed with status 3:\nbecause"):
        child([sys.executable, "-c", "print('because'); raise SystemExit(3)"])


def test_a_table_is_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = tables.Table("Title", ("stage", "seconds"), [("network", "0.1")])
    table.show()
    assert capsys.readouterr().out == "\nTitle\n\n| stage | seconds |\n| --- | --- |\n| network | 0.1 |\n"
    table.write(tmp_path / "a" / "speed.csv", "on this machine")
    with (tmp_path / "a" / "speed.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["stage", "seconds"], ["network", "0.1"], ["on this machine"]]


def test_every_benchmark_of_all_can_be_imported() -> None:
    every = importlib.import_module("all")
    assert [name for name in every.OTHERS if not (ROOT / "benchmarks" / name).is_file()] == []
    bundle = ROOT / "bundles" / "polyp_fcn8"
    words = scale.command(bundle, Path("D"), Path("O"), 2)
    assert [*words[1:5]] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert words[-2:] == ["--mirror_axes", "[]"]
