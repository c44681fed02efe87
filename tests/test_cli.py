from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from unittest.mock import patch

import pytest
from rich.console import Console
from typer.testing import CliRunner

from segbundles.cli import app
from segbundles.datasets import DATA_SETS

SMALL = ["--cases", "3", "--size", "48", "48", "24", "--spacing-mm", "3", "3", "3"]


@pytest.fixture
def run():
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture
def phantom(run, tmp_path):
    assert run("phantom", "left_atrium", "--out", tmp_path / "phantom", *SMALL).exit_code == 0
    return tmp_path / "phantom"


def test_knobs_are_a_table_on_a_screen_and_markdown_in_a_pipe(run, monkeypatch):
    row = "| `seed` | `0` | a whole number of 0 or more | Start of all random numbers."
    assert row in run("knobs", "polyp_fcn8").output
    monkeypatch.setattr("segbundles.cli._console", lambda: Console(force_terminal=True, width=200, color_system=None))
    result = run("knobs", "polyp_fcn8")
    assert result.exit_code == 0
    assert "|" not in result.output
    assert " seed " in result.output
    assert "Start of all random numbers." in result.output


def test_phantom_prepare_and_merge(run, phantom, tmp_path):
    case = "phantom0_001"
    result = run("prepare", "lasc18", "--source", phantom, "--out", tmp_path / "a", "--validation-case", case)
    assert result.exit_code == 0, result.output
    assert f"wrote {tmp_path / 'a' / 'datalist.json'}" in result.output
    validation = json.loads((tmp_path / "a" / "datalist.json").read_text())["validation"]
    assert [entry["group"] for entry in validation] == [case]

    (tmp_path / "split.json").write_text(json.dumps({"training": ["phantom0_000"], "validation": [case]}))
    result = run("prepare", "lasc18", "--source", phantom, "--out", tmp_path / "b", "--split", tmp_path / "split.json")
    assert result.exit_code == 0
    assert "note: cases left out, because no list of the split names them: phantom0_002" in result.output

    result = run("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c")
    assert result.exit_code == 0
    assert "kept once" in result.output
    assert json.loads((tmp_path / "c" / "datalist.json").read_text())["numTraining"] == 2


def test_brain_phantom_and_a_patient_in_validation(run, tmp_path):
    result = run("phantom", "brain", "--out", tmp_path / "b", "--cases", 5, "--size", 48, 40, "--slices", 5)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert ["┃", "Split", "┃", "Slices", "┃", "Patients", "┃"] in lines
    assert any(line[:3] == ["│", "training", "│"] and line[5] == "3" for line in lines)
    assert "size (pixels): 48 x 40" in result.output

    arguments = ("--source", tmp_path / "b", "--out", tmp_path / "c", "--validation-case", "phantom0_002")
    assert run("prepare", "lgg", *arguments).exit_code == 0
    validation = json.loads((tmp_path / "c" / "datalist.json").read_text())["validation"]
    assert {entry["group"] for entry in validation} == {"phantom0_002"}
    assert [entry["slice"] for entry in validation] == list(range(1, len(validation) + 1))


def test_faults_beyond_a_hundred_are_counted(run, tmp_path):
    folder = tmp_path / "p"
    folder.mkdir()
    for number in range(1, 104):
        (folder / f"p_{number}.tif").touch()
    result = run("prepare", "lgg", "--source", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.output.count("has no mask") == 100
    assert "p_100.tif" in result.output
    assert "p_101.tif" not in result.output
    assert "and 3 more" in result.output
    assert "103 faults in" in result.output


def test_folds(run, phantom, tmp_path):
    found = []
    for fold in range(3):
        out = tmp_path / f"fold{fold}"
        assert run("prepare", "lasc18", "--source", phantom, "--out", out, "--folds", 3, "--fold", fold).exit_code == 0
        found += [e["group"] for e in json.loads((out / "datalist.json").read_text())["validation"]]
    assert sorted(found) == ["phantom0_000", "phantom0_001", "phantom0_002"]


def test_faults_are_one_table_without_traceback(run, phantom, tmp_path):
    cases = phantom / "Training Set"
    (cases / "phantom0_000" / "laendo.nrrd").unlink()
    path = cases / "phantom0_001" / "lgemri.nrrd"
    path.write_bytes(path.read_bytes()[:-100])
    result = run("prepare", "lasc18", "--source", phantom, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    lines = result.output.splitlines()
    assert any("Training Set/phantom0_000/lgemri.nrrd" in line and "has no label" in line for line in lines)
    assert any("Training Set/phantom0_001/lgemri.nrrd" in line and "cannot be read" in line for line in lines)
    assert any("2 faults in" in line for line in lines)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "lasc18", "--source", "{tmp}/absent", "--out", "{tmp}/out"], "absent is not a folder"),
        (["prepare", "heart", "--source", "{tmp}", "--out", "{tmp}/out"], "expected Task02_Heart with imagesTr"),
        (["merge", "{tmp}/a", "{tmp}/b", "--out", "{tmp}/out"], "make it with `segbundles prepare`"),
        (["phantom", "left_atrium", "--out", "{tmp}/out", "--cases", "1"], "cases must be 3 or more"),
        (["phantom", "brain", "--out", "{tmp}/out", "--slices", "3"], "slices must be 4 or more to show a head, got 3"),
        (["prepare", "lasc18", "--source", "{tmp}", "--out", "{tmp}/[bold]/f/x"], "[bold]/f is not a writable folder"),
    ],
)
def test_error_is_one_message_and_status_1(run, tmp_path, arguments, message):
    (tmp_path / "[bold]").mkdir()
    (tmp_path / "[bold]" / "f").write_text("")
    result = run(*(a.format(tmp=tmp_path) for a in arguments))
    assert result.exit_code == 1
    assert message in "".join(line.strip("│ ") + " " for line in result.output.splitlines())
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_check_is_one_table_and_status_1_when_something_is_wrong(run, tmp_path):
    configs = tmp_path / "fish" / "configs"
    configs.mkdir(parents=True)
    train = {
        "bundle_root": ".",
        "max_epochs": 3,
        "loss": {"_target_": "DiceLoss"},
        "run": ["$print(@loss, @max_epochs)"],
    }
    (configs / "inference.json").write_text(json.dumps(train))
    result = run("check", tmp_path / "fish", "--config", "inference.json", "--max_epoch", "5", "--loss::sigmod=[true]")
    assert result.exit_code == 1
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines()]
    rows = {cell[2]: cell for cell in cells if len(cell) == 5}
    assert rows["loss::sigmod"][:2] == ["fault", "inference.json"]
    assert rows["loss::sigmod"][3] == "DiceLoss has no argument 'sigmod'"
    assert rows["max_epoch"][4] == "did you mean 'max_epochs'?"
    assert result.output.splitlines()[-2].startswith("fish, checked: 1, faults: ")
    assert result.output.splitlines()[-1].startswith("ERROR: inference.json, ")

    with patch("segbundles.cli._console", partial(Console, width=100)):
        result = run("check", tmp_path / "fish", "--config", "inference.json", "--max_epoch", "5")
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines()]
    line = cells.index(["", "max_epoch", "did you mean 'max_epochs'?"])
    assert cells[line - 1] == ["fault", "inference.json", "no config of this bundle has this setting"]
    assert max(map(len, result.output.splitlines()[:-1])) <= 100

    (configs / "train.json").write_text("{")
    result = run("check", tmp_path / "fish", "--config", "train.json")
    assert result.exit_code == 1
    assert "train.json, line 1, column 1: the { here is not closed" in result.output

    result = run("check", tmp_path)
    assert result.exit_code == 1
    assert "is not a bundle" in result.output
    assert "Traceback" not in result.output


def test_misspelt_option_is_refused(run, tmp_path):
    result = run("prepare", "heart", "--source", tmp_path, "--out", tmp_path, "--seeds", "1")
    assert result.exit_code == 2
    assert "--seed" in result.output


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_data_set_has_a_command(run, name):
    result = run("prepare", name, "--help")
    assert result.exit_code == 0
    assert "--validation-case" in result.output


@pytest.mark.parametrize(("option", "owner"), [("--invert-labels", "isbi2012"), ("--masks", "polyps912")])
def test_an_option_of_one_data_set_is_in_its_command_only(run, tmp_path, option, owner):
    assert [name for name in DATA_SETS if option in run("prepare", name, "--help").output] == [owner]
    result = run("prepare", "lasc18", "--source", tmp_path, "--out", tmp_path / "out", option, "masks2")
    assert result.exit_code == 2
    assert "No such option" in result.output


def test_the_reason_is_printed_once_and_last(tmp_path):
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    (tmp_path / "imagesTr" / "a.nii").write_text("x")
    (tmp_path / "labelsTr" / "a.nii").write_text("x")
    command = [sys.executable, "-m", "segbundles", "prepare", "heart", "--source", tmp_path, "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("cannot be read") == 2  # a row for each file
    assert done.stderr.count("faults in") == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ERROR: ")
    assert "--split" in last


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom segbundles.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "heavy = {'torch', 'monai', 'matplotlib', 'SimpleITK', 'nibabel', 'numpy', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "prepare" in done.stdout


def test_a_run_imports_only_what_it_uses():
    code = (
        "import sys, torch, monai.bundle\nbefore = set(sys.modules)\n"
        "import segbundles.bundle, segbundles.data, segbundles.engines, segbundles.handlers, segbundles.inferers\n"
        "import segbundles.networks, segbundles.threads, segbundles.transforms\n"
        "late = {'SimpleITK', 'highdicom', 'matplotlib', 'tensorboard', 'pandas', 'typer', 'rich', 'openvino'}\n"
        "late &= set(sys.modules) - before\nsys.exit(f'imported {late}' if late else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
