"""The short commands: what they print is what runs."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from bundle_runs import ROOT
from tiny_trainings import TINY_TRAININGS

from segbundles.commands import (
    evaluate_command,
    find_bundle,
    known_bundles,
    quoted,
    segment_command,
    train_commands,
)

LEFT_ATRIUM = ROOT / "bundles/left_atrium_vnet"
NAMES = sorted(path.name for path in (ROOT / "bundles").iterdir())


def test_bundles_by_name_by_path_and_from_the_folder_of_downloads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for folder, name in ((tmp_path / "bundles", "mine"), (tmp_path / "torch/hub/bundle", "zoo")):
        (folder / name / "configs").mkdir(parents=True)
        (folder / name / "configs/inference.json").write_text("{}")
    assert sorted(known_bundles()) == sorted([*NAMES, "mine", "zoo"])
    assert find_bundle("left_atrium_vnet") == LEFT_ATRIUM
    assert find_bundle("mine") == Path("bundles/mine")
    assert find_bundle(str(tmp_path / "torch/hub/bundle/zoo")) == tmp_path / "torch/hub/bundle/zoo"
    with pytest.raises(ValueError, match="there is no bundle 'left_atrium': give one of brain_flair_unet, em_"):
        find_bundle("left_atrium")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["--window_size", "[160,", "160,", "128]"],
            r"--window_size has 3 values, \[160, 160, 128\]: write a list in ",
        ),
        (["--spacing_mm", "1", "1", "1", "--amp", "false"], r'quotes, --spacing_mm "\[1,1,1\]"'),
        (["false", "--amp"], "'false' belongs to no setting: write settings as --knob value"),
        (["--args_file", "none.json"], "none.json cannot be read"),
        (["--args_file=bad.json"], "bad.json, line 1, column 17: there is a comma after the last entry: remove it"),
    ],
)
def test_settings_that_would_be_passed_over_or_end_in_a_traceback(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('{"max_epochs": 2,}')
    for command in (segment_command, evaluate_command, train_commands):
        with pytest.raises(ValueError, match=message):
            command("left_atrium_vnet", ".", "out", settings)


def test_words_of_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my scans").mkdir()
    root = str(LEFT_ATRIUM)
    run = ["python", "-m", "monai.bundle", "run"]
    where = ["--dataset_dir", "my scans", "--output_dir", "out"]
    assert segment_command("left_atrium_vnet", "my scans", "out", ["--amp", "false"]) == [
        *run,
        "inferring",
        *("--bundle_root", root, "--config_file", f"{root}/configs/inference.json", *where, "--amp", "false"),
    ]
    both = f"['{root}/configs/train.json','{root}/configs/evaluate.json']"
    assert evaluate_command("left_atrium_vnet", "my scans", "out") == [
        *run,
        *("evaluating", "--bundle_root", root, "--config_file", both, *where),
    ]
    settings = ["--max_epochs", "9", "--boundary_weight=.1", "--initial_weights", "a.pt", "--seed=3"]
    locator, network = train_commands("left_atrium_vnet", "my scans", "out", settings)
    assert locator[5:] == [
        *("--bundle_root", root, "--config_file", f"{root}/configs/train_locator.json"),
        *("--dataset_dir", "my scans", "--output_dir", "out/locator", "--ckpt_dir", "out/models"),
        *("--max_epochs", "9", "--seed", "3"),
    ]
    assert network[-len(settings) :] == settings
    assert network[network.index("--ckpt_dir") + 1] == "out/models"
    assert len(train_commands("polyp_fcn8", "my scans", "out")) == 1
    for command in (segment_command, train_commands, evaluate_command):
        with pytest.raises(ValueError, match=r"there is no file or folder scan\.nii: give the path of the images\."):
            command("left_atrium_vnet", "scan.nii", "out")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("plain/a-1.json", "plain/a-1.json"),
        ("my scans", "'my scans'"),
        ("['a b.json','c.json']", '''"['a b.json','c.json']"'''),
        ("it's $HOME", None),
        ("a\\'b", None),
    ],
)
def test_a_printed_command_can_be_pasted(word, expected):
    line = quoted(["printf", "%s", word])
    assert expected is None or line == f"printf %s {expected}"
    assert subprocess.check_output(["bash", "-c", line], text=True) == word


def segbundles(*words: object, status: int = 0) -> tuple[list[str], str]:
    """Run the command; return the MONAI commands that it printed, and its output."""
    done = subprocess.run([sys.executable, "-m", "segbundles", *map(str, words)], capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == status, output
    return [line[2:] for line in output.splitlines() if line.startswith("$ ")], output


@pytest.mark.slow
def test_train_evaluate_and_segment(tmp_path):
    tiny = TINY_TRAININGS["left_atrium_vnet"]
    data, out = tmp_path / "my data", tmp_path / "out"
    tiny.phantom(data, 0)
    settings = {key: value for key, value in tiny.settings.items() if key != "use_locator"}
    options = [word for key, value in settings.items() for word in (f"--{key}", json.dumps(value).strip('"'))]
    printed, output = segbundles("train", "left_atrium_vnet", data, out, *options, "--lr_epochs", 1)
    assert [shlex.split(line)[4] for line in printed] == ["training"] * 2
    assert "UserWarning" not in output
    assert {path.name for path in (out / "models").iterdir()} >= {
        "model.pt",
        "model.json",
        "locator.pt",
        "locator.json",
    }
    assert f"Weights: {out / 'models/model.pt'}" in output
    # the next step is printed as it can be pasted
    following = next(line for line in output.splitlines() if line.startswith("How good they are: "))
    words = shlex.split(following.split(": ", 1)[1])
    segbundles(*words[1:], "--device", "cpu")
    assert (out / "evaluation/report.html").is_file()

    image = next((data).rglob("*.nrrd"))
    (line,), output = segbundles("segment", "left_atrium_vnet", image, out / "masks", "--ckpt_dir", out / "models")
    assert shlex.split(line)[:5] == ["python", "-m", "monai.bundle", "run", "inferring"]
    assert str(image) in shlex.split(line)
    assert (out / "masks/inference.csv").is_file()
    _, output = segbundles("segment", "left_atrium_vnet", image, out / "masks", "--ampp", "true", status=1)
    assert output.strip().splitlines()[-1].startswith("ERROR: there is no setting 'ampp'")
