"""The parts of the benchmarks that choose cases and start processes; their tables need minutes."""

from __future__ import annotations

import csv
import importlib
import json
import re
import sys
from pathlib import Path

import left_atrium_rows
import numpy as np
import pytest
import scale
import tables
import tifffile
from tiny_trainings import TINY_TRAININGS

from segbundles.knobs import faults, read_schema

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


def test_rows_of_the_left_atrium_are_knobs_of_the_bundle() -> None:
    schema = read_schema(left_atrium_rows.BUNDLE)
    assert {name: list(faults(schema, own)) for name, own in left_atrium_rows.rows(24).items()} == {
        "V-Net": [],
        "hybrid": [],
        "BAM d3": [],
        "BAM d4": [],
        "BAM d4, hybrid": [],
        "wide": [],
    }


@pytest.mark.slow
def test_a_row_of_the_left_atrium_is_trained_once_and_scored(tmp_path: Path) -> None:
    """The boundary loss begins in the last third of the epochs and reaches half of the loss."""
    tiny = TINY_TRAININGS["left_atrium_vnet"]
    tiny.phantom(tmp_path / "data", 0)
    own = left_atrium_rows.rows(3)["BAM d4, hybrid"] | {
        name: tiny.settings[name] for name in ("base_channels", "patch_size", "device")
    }
    row = tmp_path / "row"
    scores = left_atrium_rows.one(row, str(tmp_path / "data"), 3, 0, [8.0] * 3, own)
    assert 0 <= scores["dice"] <= 1
    assert scores["n"] == 1
    epochs = [line for line in (row / "training.out").read_text().splitlines() if " epoch " in line]
    assert re.findall(r"region_weight ([\d.]+)", "".join(epochs)) == ["1.0000", "1.0000", "0.5000"]
    knobs = json.loads((row / "models/model.json").read_text())["knobs"]
    assert (knobs["attention"], knobs["attention_dilation"]) == ("sequential", 4)
    (row / "training.out").unlink()
    assert left_atrium_rows.one(row, str(tmp_path / "data"), 3, 0, [8.0] * 3, own) == scores
    assert not (row / "training.out").exists()


def test_rows_of_the_left_atrium_are_means_over_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Finished rows are not trained again; a row without any distance has no figure for it."""
    scores = {"jaccard": 0.5, "hd95_mm": 4.0, "assd_mm": 1.0, "dice_sd": 0.04, "n": 16}
    names = ["v_net_seed0", "v_net_seed1", "bam_d4_hybrid_seed0", "bam_d4_hybrid_seed1"]
    for k, name in enumerate([*names, "hybrid_seed0", "bam_d3_seed0", "bam_d4_seed0", "wide_seed0"]):
        (tmp_path / name).mkdir()
        row = {"dice": 0.8 + k / 100, **scores, **({"hd95_mm": None} if name == "wide_seed0" else {})}
        (tmp_path / name / "row.json").write_text(json.dumps(row))
    monkeypatch.setattr(left_atrium_rows, "step_seconds", lambda own: len(own) / 10)
    monkeypatch.setattr(sys, "argv", ["rows", "--dataset_dir", "D", "--out", str(tmp_path), "--seeds", "2"])
    left_atrium_rows.main()
    with (tmp_path / "rows.csv").open(newline="") as file:
        table = {line[0]: line[1:] for line in csv.reader(file)}
    assert table["V-Net"] == ["0.8000, 0.8100", "0.8050", "0.5000", "4.00", "1.00", "0.00"]
    assert table["BAM d4, hybrid"][:2] == ["0.8200, 0.8300", "0.8250"]
    assert table["wide"] == ["0.8700", "0.8700", "0.5000", "nan", "1.00", "0.10"]
    # of 0.80 and 0.81: the difference by the root of two
    assert "over 16 cases 0.0400, over seeds 0.0071" in capsys.readouterr().out
