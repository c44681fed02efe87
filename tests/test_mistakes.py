"""Mistakes in section 1 of the configs: every knob with every kind of bad value, and a list by hand."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
import pytest
from bundle_runs import ROOT
from monai.bundle import ConfigParser
from typer.testing import CliRunner

import segbundles.bundle
from segbundles.bundle import RunSettings
from segbundles.check import check_bundle, read_overrides
from segbundles.cli import app
from segbundles.jsonfile import read_json
from segbundles.knobs import faults, read_schema, requirement
from segbundles.running import read_configs

BUNDLES = sorted((ROOT / "bundles").iterdir())
CONFIGS = [
    (bundle, config)
    for bundle in BUNDLES
    for config in ("train", "train_locator", "evaluate", "inference")
    if (bundle / "configs" / f"{config}.json").is_file()
]
# a value of each type of JSON
TYPES = {
    "integer": [7],
    "number": [0.5, float("nan"), float("inf")],
    "string": ["2", "1e-3", "some words"],
    "boolean": [True, False],
    "null": [None],
    "array": [[], ["some words"], [[1]]],
    "object": [{}],
}
# values that are taken as text: the command line of MONAI reads the folder 2024_07 as a number
AS_TEXT = ("integer", "number")


def bad_values(name: str, knob: dict[str, Any]) -> Iterator[Any]:
    """Yield values that a knob must not have: other types, out of range, wrong length, wrong words."""
    if "enum" in knob:
        kinds = {_kind(value) for value in knob["enum"]}
        words = ["bach", str(knob["enum"][-1]).upper() + "x"]
        yield from (value for kind, values in TYPES.items() if kind not in kinds for value in values)
        yield from words
        return
    options = knob.get("anyOf") or [{**knob, "type": kind} for kind in _kinds(knob)]
    kinds = {option["type"] for option in options} | ({"integer"} if "number" in _kinds(knob) else set())
    for kind, values in TYPES.items():
        if kind not in kinds and not (name.endswith("_dir") and kind in AS_TEXT):
            yield from values
    for option in options:
        if option["type"] in ("integer", "number"):
            yield from _out_of_range(option)
        elif option["type"] == "array":
            others = {other["items"]["type"] for other in options if other["type"] == "array" and other != option}
            yield from (value for value in _bad_lists(option) if not {_kind_of(part) for part in value} & others)
        elif option["type"] == "string" and option.get("minLength"):
            yield ""
    if "pattern" in knob:
        yield "a/b"
    if "number" in kinds:
        yield from (float("nan"), float("inf"))


def _kinds(knob: dict[str, Any]) -> list[str]:
    kinds = knob.get("type", [option["type"] for option in knob.get("anyOf", ())])
    return [kinds] if isinstance(kinds, str) else kinds


def _kind(value: Any) -> str:
    return {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}[type(value)]


def _kind_of(value: Any) -> str:
    return "array" if isinstance(value, list) else _kind(value)


def _out_of_range(knob: dict[str, Any]) -> Iterator[float]:
    if "minimum" in knob:
        yield from (knob["minimum"] - 1, -5 if knob["minimum"] >= 0 else knob["minimum"] - 5)
    if "exclusiveMinimum" in knob:
        yield from (knob["exclusiveMinimum"], knob["exclusiveMinimum"] - 0.001)
    if "maximum" in knob:
        yield from (knob["maximum"] + 1, 1000 * knob["maximum"])
    if "exclusiveMaximum" in knob:
        yield from (knob["exclusiveMaximum"], 50 * knob["exclusiveMaximum"])
    if "multipleOf" in knob:
        yield knob["multipleOf"] + 1
    if knob["type"] == "integer":
        yield max(knob.get("minimum", 1), 1) + 0.5


def _bad_lists(knob: dict[str, Any]) -> Iterator[list]:
    item, least, most = knob["items"], knob.get("minItems", 0), knob.get("maxItems")
    good = "word" if item["type"] == "string" else item.get("multipleOf", max(item.get("minimum", 1), 1))
    if least:
        yield [good] * (least - 1)
    if most:
        yield [*range(most + 1)] if knob.get("uniqueItems") else [good] * (most + 1)
    if knob.get("uniqueItems"):
        yield [good, good]
    length = max(least, 1)
    wrong = ["some words", True, None, [good]] if item["type"] != "string" else [7, None, [good]]
    if item["type"] != "string":
        wrong += _out_of_range(item)
    for value in wrong:
        yield [value, *[good] * (length - 1)]


@pytest.mark.parametrize(("bundle", "config"), CONFIGS, ids=[f"{bundle.name}-{config}" for bundle, config in CONFIGS])
def test_no_knob_accepts_a_bad_value(
    bundle: Path, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each is a fault of the schema and stops a run, with the knob, the value and what is allowed."""
    schema = read_schema(bundle)
    files = ["train", "evaluate"] if config == "evaluate" else [config]
    tree = ConfigParser.load_config_files([str(bundle / "configs" / f"{name}.json") for name in files])
    # weights that do not exist: facts are not compared
    tree |= {"bundle_root": str(bundle), "ckpt_dir": str(tmp_path / "models"), "output_dir": str(tmp_path / "out")}
    # each value is tried with the knobs alone: reading the rest of the config again would take most of the time
    knobs = {name: tree[name] for name in schema["properties"] if name in tree}
    assert len(knobs) > 15
    wiring = {name: tree[name] for name in ("imports", "settings")}
    files_there = read_configs({bundle / "configs"})
    monkeypatch.setattr(segbundles.bundle, "read_configs", lambda folders: files_there)
    caplog.set_level(logging.CRITICAL)
    assert settled(knobs | wiring).knobs["device"]
    wrong = []
    for name in knobs:
        knob = schema["properties"][name]
        for value in bad_values(name, knob):
            problem = dict(faults(schema, {name: value})).get(name, "")
            if not problem.startswith(f"must be {requirement(knob)}, got "):
                wrong.append((name, value, f"the schema says {problem!r}"))
            try:
                settled(knobs | wiring | {name: value})
            except Exception as error:
                if not isinstance(error, ValueError) or str(error) != f"{name} {problem}.":
                    wrong.append((name, value, str(error)))
            else:
                wrong.append((name, value, "accepted"))
    assert wrong == []


def settled(tree: dict[str, Any]) -> RunSettings:
    """What a run would settle for these knobs."""
    parser = ConfigParser(config=dict(tree))
    try:
        return parser.get_parsed_content("settings")
    except RuntimeError as error:
        raise error.__cause__ or error from None


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """Copy the configs of a bundle; its weights are linked."""

    def copy(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(ROOT / "bundles" / name / "configs", folder / "configs")
        (folder / "models").symlink_to(ROOT / "bundles" / name / "models")
        return folder

    return copy


def found(bundle: Path, *configs: str, **settings: Any) -> list[str]:
    """Everything that ``segbundles check`` finds, one line each."""
    checked = check_bundle(bundle, configs or ("train.json",), overrides=settings)
    findings = [finding for item in checked for finding in item.findings]
    return [f"{it.config}: {it.id}: {it.problem}: {it.repair}" for it in findings]


A, B, E = "left_atrium_vnet", "brain_flair_unet", "em_membrane_unet"


@pytest.mark.parametrize(
    ("name", "edits", "message"),
    [
        (A, {"max_epochs": "2"}, "max_epochs: must be a whole number of 1 or more (epochs), got the text '2'"),
        (A, {"max_epochs": -5}, "max_epochs: must be a whole number of 1 or more (epochs), got -5"),
        (A, {"max_epochs": 0}, "max_epochs: must be a whole number of 1 or more (epochs), got 0"),
        (A, {"max_epochs": 2.5}, "max_epochs: must be a whole number of 1 or more (epochs), got 2.5"),
        (A, {"max_epochs": None}, "max_epochs: must be a whole number of 1 or more (epochs), got null"),
        (A, {"learning_rate": "1e-3"}, "learning_rate: must be a number above 0 and at most 1, got the text '1e-3'"),
        (A, {"learning_rate": None}, "learning_rate: must be a number above 0 and at most 1, got null"),
        (A, {"learning_rate": -0.001}, "learning_rate: must be a number above 0 and at most 1, got -0.001"),
        (A, {"learning_rate": 10}, "learning_rate: must be a number above 0 and at most 1, got 10"),
        (B, {"dice_weight": "0.5"}, "dice_weight: must be a number of 0 or more, got the text '0.5'"),
        (B, {"dice_weight": -1}, "dice_weight: must be a number of 0 or more, got -1"),
        (
            E,
            {"patch_size": [256]},
            "patch_size: must be a list of 2 whole numbers of 1 or more (pixels or voxels), got",
        ),
        (B, {"patch_size": [192, 192, 192]}, "patch_size: must be a list of 2 whole numbers of 1 or more"),
        (A, {"num_classes": 1}, "num_classes: must be a whole number from 2 to 127, got 1"),
        (A, {"num_classes": 0}, "num_classes: must be a whole number from 2 to 127, got 0"),
        (A, {"spacing_mm": [1, 1]}, "spacing_mm: must be a list of 3 numbers above 0 (mm) or null, got [1, 1]"),
        (A, {"batch_size": None}, "batch_size: must be a whole number of 1 or more, got null"),
        (A, {"batch_size": 0}, "batch_size: must be a whole number of 1 or more, got 0"),
        (A, {"dropout": 50}, "dropout: must be a number from 0 to less than 1, got 50"),
        (B, {"depth": 2}, "depth: must be a whole number from 3 to 8, got 2"),
        (A, {"base_channels": 8.5}, "base_channels: must be a whole number of 1 or more, got 8.5"),
        (A, {"norm": "bach"}, 'norm: must be null, "instance", "batch" or "group", got the text \'bach\''),
        (A, {"val_interval": 0}, "val_interval: must be a whole number of 1 or more (epochs), got 0"),
        (A, {"max_epochs": 2, "val_interval": 5}, "val_interval: must be at most max_epochs 2"),
        (A, {"device": "gpu"}, "device: must be cpu, cuda, or cuda:1 for the second GPU, got the text 'gpu'"),
        (A, {"device": "cuda"}, "device: is cuda, but this machine has no GPU that PyTorch can use: give cpu"),
        (A, {"amp": "yes"}, "amp: must be true or false, got the text 'yes'"),
        (A, {"cache_rate": 50}, "cache_rate: must be a number from 0 to 1, got 50"),
        (A, {"rotate_degrees": [15]}, "rotate_degrees: must be a number from 0 to 180 (degrees), got [15]"),
        (A, {"max_epoch": 5}, "max_epoch: there is no such knob, and nothing uses it: did you mean 'max_epochs'?"),
        (A, {"initial_weights": "models/modell.pt"}, "initial_weights: is models/modell.pt, but there is no such file"),
        (A, {"ckpt_dir": "LICENSE"}, "ckpt_dir: must be a folder, got the file LICENSE"),
    ],
)
def test_a_wrong_line_in_train_json(
    copied: Callable[[str], Path], name: str, edits: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.chdir(ROOT)
    bundle = copied(name)
    path = bundle / "configs" / "train.json"
    lines = list(read_json(path).items())
    after = [key for key, _ in lines].index("_section_2_")
    tree = dict(lines[:after]) | edits | dict(lines[after:])
    path.write_text(json.dumps(tree))
    findings = found(bundle)
    assert len(findings) == 1
    assert findings[0].startswith(f"train.json: {message}")


def test_weights_with_a_similar_name_are_proposed(copied: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "trained.pt").touch()
    (finding,) = found(copied(A), initial_weights=str(tmp_path / "traned.pt"))
    assert finding.startswith(f"train.json: initial_weights: is {tmp_path / 'traned.pt'}, but there is no such file")
    assert "trained.pt" in finding.partition("no such file")[2]


def test_a_renamed_knob_is_reported_where_it_is_misspelt(copied: Callable[[str], Path]) -> None:
    bundle = copied(A)
    path = bundle / "configs" / "train.json"
    path.write_text(path.read_text().replace('"learning_rate":', '"learning_rat":'))
    (finding,) = found(bundle)
    assert finding == (
        "train.json: learning_rat: there is no such knob, and nothing uses it: did you mean 'learning_rate'?"
    )


def test_evaluate_json_alone(copied: Callable[[str], Path]) -> None:
    (finding,) = found(copied(A), "evaluate.json")
    assert finding == (
        "evaluate.json: : is a patch over train.json, and does not run without: check --config train.json --config "
        "evaluate.json; run --config_file \"['left_atrium_vnet/configs/train.json',"
        "'left_atrium_vnet/configs/evaluate.json']\""
    )
    assert found(copied(B), "train.json", "evaluate.json") == []


LINE = '    "max_epochs": 60,\n'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (LINE, '    "max_epochs": 60, // long\n', "<line>, column 23: JSON has no comments such as //: remove it"),
        (LINE, '    # long\n    "max_epochs": 60,\n', "<line>, column 5: JSON has no comments such as #: remove it"),
        (
            LINE,
            "    “max_epochs”: 60,\n",
            "<line>, column 5: “ is a typographic quotation mark, which JSON does not know",
        ),
        (LINE, '    "max_epochs": 60\n', "<line>, column 21: a comma is missing between this entry and the next"),
        (LINE, '    "max_epochs: 60,\n', '<line>, column 5: the text "max_epochs: 60, has no closing quote'),
        (LINE, '    max_epochs": 60,\n', '<line>, column 5: max_epochs" is not in double quotes: write "max_epochs"'),
        (LINE, '    "max_epochs": 60 epochs,\n', "<line>, column 22: 60 epochs is not a value in JSON"),
        (LINE, '    "max_epochs" 60,\n', "<line>, column 18: a colon or a quote is missing before this"),
        (LINE, '    "max_epochs": ,\n', "<line>, column 19: a value is missing before this ,"),
        (
            LINE,
            LINE + '    "seed": 1,\n',
            "<after>, column 5: 'seed' is already in line <before>: remove one of the two lines",
        ),
        ('"lr": "@learning_rate"},', '"lr": "@learning_rate",', "<line>, column 18: the { here is not closed: write }"),
        ('"optimizer": {', '"optimizer": ', "<line>, column 28: a { or a comma is missing before this entry"),
        ("[128, 112, 128],", "[128, 112, 128,", "<line>, column 19: the [ here is not closed: write ]"),
        ("[128, 112, 128],", "128, 112, 128],", "<line>, column 24: 112 is not the name of an entry"),
        ("[128, 112, 128]", "[128 112, 128]", "<line>, column 23: a comma is missing"),
        ("[128, 112, 128]", "[128, 112, 128,]", "<line>, column 33: there is a comma after the last entry: remove it"),
        (
            '"learning_rate": 0.001',
            '"learning_rate": 0,001',
            "<line>, column 22: 0,001 is not a number, JSON has a decimal",
        ),
        (
            '"learning_rate": 0.001',
            '"learning_rate": .001',
            "<line>, column 22: .001 is not a number in JSON: write 0.001",
        ),
        ('"amp": true', '"amp": True', "<line>, column 12: True is Python, not JSON: write true"),
        ('"resume": false', '"resume": False', "<line>, column 15: False is Python, not JSON: write false"),
        ('"run_name": null', '"run_name": None', "<line>, column 17: None is Python, not JSON: write null"),
        ('"crop_from": "truth"', "\"crop_from\": 'truth'", "<line>, column 18: text is in double quotes in JSON"),
        (
            '"crop_from": "truth"',
            '"crop_from": truth',
            '<line>, column 18: truth is not in double quotes: write "truth"',
        ),
        (
            '"./data"',
            '"C:\\data\\user"',
            r"<line>, column 23: \ has a meaning of its own in JSON: write / or \\ in paths",
        ),
        ('"training": "@run"\n}', '"training": "@run",\n}', "there is a comma after the last entry: remove it"),
        ('"training": "@run"\n}', '"training": "@run"\n', "1, column 1: the { here is not closed: write }"),
        ('"training": "@run"\n}', '"training": "@run"\n}}', "the first { or [ is already closed before this"),
    ],
)
def test_the_text_is_not_valid_json(copied: Callable[[str], Path], old: str, new: str, message: str) -> None:
    path = copied(A) / "configs" / "train.json"
    text = path.read_text()
    assert text.count(old) == 1
    line = text[: text.index(old)].count("\n") + 1
    for name, number in (("<before>", line - 1), ("<line>", line), ("<after>", line + 1)):
        message = message.replace(name, str(number))
    _expect_text(path, text.replace(old, new).encode(), message)


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda text: b"", "1, column 1: the file is empty: write {"),
        (lambda text: b"\n \n", "1, column 1: the file is empty: write {"),
        (lambda text: text.encode("utf-8-sig"), "1, column 1: the file begins with an invisible byte-order mark"),
        (lambda text: text.encode("utf-16"), "1, column 1: the file is written in UTF-16: save it as UTF-8"),
        (lambda text: text.encode("utf-16-le"), "1, column 1: the file is written in UTF-16: save it as UTF-8"),
        (lambda text: text.replace("./data", "./Käfer").encode("latin-1"), "8, column 24: the character here is not"),
    ],
)
def test_the_file_is_not_text_in_utf_8(
    copied: Callable[[str], Path], convert: Callable[[str], bytes], message: str
) -> None:
    path = copied(A) / "configs" / "train.json"
    _expect_text(path, convert(path.read_text()), message)


def _expect_text(path: Path, content: bytes, message: str) -> None:
    """The reader and the check say the same, with the name of the file, line and column."""
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.json, line") as error:
        read_json(path)
    assert message in str(error.value)
    (finding,) = found(path.parents[1])
    assert finding.startswith("train.json: line ")
    assert message.replace(": ", "; ") in finding.replace(": ", "; ")


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": {"b": 1, "c": "\\"b\\": {"}, "b": [{"b": 1}, {"b": "“ä”"}]}', encoding="utf-8")
    assert read_json(path) == {"a": {"b": 1, "c": '"b": {'}, "b": [{"b": 1}, {"b": "“ä”"}]}
    with pytest.raises(ValueError, match=r"b\.json cannot be read \(No such file or directory\)"):
        read_json(tmp_path / "b.json")


def test_paths_on_the_command_line_are_taken_as_typed(copied: Callable[[str], Path]) -> None:
    bundle = copied(A)
    (finding,) = found(bundle, dataset_dir="study#2")
    assert finding.startswith("train.json: dataset_dir: is 'study#2', and MONAI reads '#' in it as '::': rename that")
    given = read_overrides(["--output_dir", "2024_07", "--run_name=1e3", "--max_epochs", "1_0"], bundle)
    assert given == {"output_dir": "2024_07", "run_name": "1e3", "max_epochs": 10}


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from segbundles.phantoms.left_atrium import make_phantom

    out = tmp_path_factory.mktemp("data")
    make_phantom(out, 5, 0, (32, 32, 20), (4.0, 4.0, 4.0))
    return out


def checked_data(bundle: Path, data: Path, *configs: str) -> tuple[str, list[str]]:
    """What was looked at in the data, and what was found in it."""
    config, checked = check_bundle(bundle, configs, data=data)
    assert config.findings == []
    assert checked.config == str(data)
    return checked.summary, [f"{it.id}: {it.problem}: {it.repair}" for it in checked.findings]


def test_sound_data(phantom: Path) -> None:
    bundle = ROOT / "bundles" / A
    looked_at = "training: 3 cases in 3 groups; validation: 1 case in 1 group; labels 0, 1"
    seen: list[list] = []
    _, checked = check_bundle(bundle, data=phantom, track=lambda cases: seen.append(cases) or cases)
    assert (checked.summary, checked.findings, [len(cases) for cases in seen]) == (looked_at, [], [4])
    assert checked_data(bundle, phantom, "train_locator.json") == (looked_at, [])
    evaluation = checked_data(bundle, phantom, "train.json", "evaluate.json")
    assert evaluation == ("validation: 1 case in 1 group; labels 0, 1", [])
    assert checked_data(bundle, phantom, "inference.json") == ("5 images", [])


def test_every_fault_of_the_data_is_named(phantom: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(phantom, data)
    datalist = json.loads((data / "datalist.json").read_text())
    first, second, third = (entry["image"] for entry in datalist["training"])
    image = nrrd.read(str(data / first))
    nrrd.write(str(data / first), np.zeros_like(image[0]), image[1])
    (data / second).write_bytes((data / second).read_bytes()[:2000])
    label = data / datalist["training"][2]["label"]
    values, header = nrrd.read(str(label))
    values[0, 0, 0] = 7
    nrrd.write(str(label), values, header)
    looked_at, findings = checked_data(ROOT / "bundles" / A, data)
    assert looked_at == "training: 3 cases in 3 groups; validation: 1 case in 1 group; labels 0, 1"
    assert len(findings) == 3
    assert findings[0] == f"{first}: {data / first} is constant (every value is 0): leave it out."
    assert findings[1].startswith(f"{second}: ")
    assert findings[2].startswith(f"{third}: {label} contains the label values 7; allowed are 0, 255: correct the file")


def test_a_class_that_no_label_has(phantom: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(phantom, data)
    for entry in json.loads((data / "datalist.json").read_text())["training"]:
        values, header = nrrd.read(str(data / entry["label"]))
        nrrd.write(str(data / entry["label"]), (values > 0).astype(np.uint8), header)
    settings = {"num_classes": 3, "validation_cases::split": "training"}
    _, checked = check_bundle(ROOT / "bundles" / A, overrides=settings, data=data)
    (finding,) = checked.findings
    assert (finding.id, finding.problem, finding.fault) == ("num_classes", "no label has the class 2", False)


def test_data_are_not_read_if_the_settings_have_a_fault(phantom: Path) -> None:
    bundle = ROOT / "bundles" / A
    _, checked = check_bundle(bundle, overrides={"max_epochs": 0}, data=phantom)
    assert (checked.summary, checked.findings) == ("", [])
    config, _ = check_bundle(bundle, data=phantom / "absent")
    assert "is not a folder" in config.findings[0].problem


def test_the_command_ends_with_the_first_fault(phantom: Path, copied: Callable[[str], Path]) -> None:
    bundle = copied(A)
    done = CliRunner().invoke(app, ["check", str(bundle), "--data", str(phantom)])
    assert done.exit_code == 0
    assert "training: 3 cases in 3 groups; validation: 1 case in 1 group; labels 0, 1" in done.output
    path = bundle / "configs" / "train.json"
    path.write_text(path.read_text().replace('"amp": true', '"amp": True'))
    done = CliRunner().invoke(app, ["check", str(bundle), "--config", "train.json"])
    assert done.exit_code == 1
    last = done.output.splitlines()[-1]
    assert re.fullmatch(r"ERROR: train\.json, line \d+, column 12: True is Python, not JSON: write true", last)
