"""What files from elsewhere can do, and where the library writes: the claims of docs/security.md."""

from __future__ import annotations

import ast
import configparser
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tifffile
import torch
from bundle_runs import ROOT
from ignite.engine import Engine
from PIL import Image
from tiny_trainings import TINY_TRAININGS
from typer.testing import CliRunner

from segbundles.cli import app
from segbundles.data import Datalist
from segbundles.handlers import WeightsLoader
from segbundles.handlers.state import RunState
from segbundles.networks import VGG16FCN, load_exported, load_if_given, load_vgg16_weights, load_weights
from segbundles.transforms import SaveSegmentationd

LIBRARY = ROOT / "common" / "segbundles"


class Code:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = str(made)

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (self.made,)


READERS = {
    "model.pt": lambda path: load_weights(torch.nn.Linear(1, 1), path),
    "initial.pt": lambda path: WeightsLoader(path, torch.nn.Linear(1, 1))(),
    "locator.pt": lambda path: load_if_given(torch.nn.Linear(1, 1), path),
    "training.ckpt": lambda path: RunState(path, {}).load(Engine(lambda *_: None)),
    "vgg16.pth": lambda path: load_vgg16_weights(VGG16FCN(2, 3, 2, base_channels=2, fc_channels=2, norm=None), path),
    "model.ts": lambda path: load_exported(path),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["torch.save", "bare pickle"])
@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
def test_a_pickle_with_code_is_refused_and_not_run(name: str, zipped: bool, tmp_path: Path) -> None:
    path, made = tmp_path / name, tmp_path / "made"
    if zipped:
        torch.save({"weight": Code(made)}, path)
    else:
        path.write_bytes(pickle.dumps({"weight": Code(made)}))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} cannot be (read as (weights|TorchScript)|resumed)"):
        READERS[name](path)
    assert not made.exists()
    with suppress(RuntimeError):
        torch.load(path, weights_only=False)  # it would have
    assert made.exists()


def _name(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda path: path.relative_to(LIBRARY).as_posix())
def test_the_library_runs_nothing_that_it_reads(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not modules & {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml", "joblib"}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, arguments = _name(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert name not in {"eval", "exec", "compile", "os.system", "os.popen", "load_state_dict_from_url"}, name
        assert name != "torch.load" or arguments.get("weights_only") == "True"
        assert name != "torch.jit.load" or path.name == "exported.py"
        assert arguments.get("shell", "False") == "False"
        assert arguments.get("allow_pickle", "False") == "False"


def test_the_test_above_finds_calls() -> None:
    names = {_name(node.func) for node in ast.walk(ast.parse("torch.load(x); eval('1')")) if isinstance(node, ast.Call)}
    assert names == {"torch.load", "eval"}
    sources = "".join(path.read_text(encoding="utf-8") for path in LIBRARY.rglob("*.py"))
    assert sources.count("torch.load(") >= 2


# what docs/security.md tells a reader to look for
REFUSED = (
    r"torch\.load|pickle|subprocess|\bsystem\s*\(|popen|\b(open|eval|exec|compile|getattr|globals)\s*\(|urlopen|requests|urllib|"
    r"socket|base64|__"
)
# the schema of the knobs is prose, and MONAI does not read it
CONFIGS = sorted(p for p in ROOT.glob("bundles/*/configs/*.json") if p.name != "knobs.schema.json")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parts[-3]}/{p.stem}")
def test_the_bundles_configs_load_and_start_nothing(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        assert not re.search(REFUSED, line)


def strings(value: Any) -> Iterator[str]:
    """Yield the keys and values of a JSON as MONAI reads them, without escapes."""
    if isinstance(value, dict | list):
        for one in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from strings(one)
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parts[-3]}/{p.stem}")
def test_the_bundles_configs_name_nothing_foreign(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    found = list(strings(config))
    assert [text for text in found if re.search(REFUSED, text)] == []
    programs = [text for text in found if text.startswith("$")]
    assert [text for text in programs if len(text) > 300] == []
    imported = {text for text in programs if re.search(r"\bimport\b", text)}
    trt = {"$from monai.networks import trt_compile"} if path.name == "inference_trt.json" else set()
    assert imported <= {"$import ignite", "$import segbundles", "$import segbundles.bundle"} | trt
    targets = [text for name, text in targets_of(config) if name == "_target_"]
    assert [text for text in targets if not re.match(r"(segbundles|torch|ignite)\.|[A-Za-z]\w*$", text)] == []


def targets_of(value: Any) -> Iterator[tuple[str, Any]]:
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from targets_of(one)
    if isinstance(value, dict):
        yield from value.items()


@pytest.mark.parametrize(
    "text",
    [
        *("$open('x')", "$().__class__", "$getattr(a, 'b')", "$socket.socket()", "$base64.b64decode(x)"),
        *("$urllib.request", "$torch.load(x)", "$eval ('1')", "$exec('1')", "$os.system('x')", "$requests.post(x)"),
    ],
)
def test_refused_expressions_are_found(text: str) -> None:
    assert re.search(REFUSED, text)
    assert list(strings({"a": ["b", {"c": text}, 1, None]})) == ["a", "b", "c", text]


@pytest.mark.parametrize("path", sorted(ROOT.glob("bundles/*/configs/*.conf")), ids=lambda p: p.parts[-3])
def test_the_bundles_logging_writes_to_the_terminal_alone(path: Path) -> None:
    parser = configparser.RawConfigParser()
    parser.read(path, encoding="utf-8")
    keys = [(key, value) for section in parser.sections() for key, value in parser.items(section)]
    assert {value for key, value in keys if key == "args"} == {"(sys.stdout,)"}
    assert {value for key, value in keys if key in ("class", "kwargs")} == {"StreamHandler"}
    assert not re.search(REFUSED, path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", TINY_TRAININGS)
def test_the_bundles_hold_no_program(name: str) -> None:
    suffixes = {path.suffix for part in ("configs", "docs") for path in (ROOT / "bundles" / name / part).rglob("*.*")}
    assert suffixes <= {".csv", ".json", ".conf", ".md", ".txt", ".png", ".jpeg"}
    assert list((ROOT / "bundles" / name).rglob("*.py*")) == []


def snapshot(folder: Path, without: Path) -> dict[Path, tuple[int, int]]:
    paths = (path for path in folder.rglob("*") if path != without and without not in path.parents)
    # a file that was made and removed again changes the time of its folder
    return {path: ((at := path.lstat()).st_size, at.st_mtime_ns) for path in paths}


@pytest.mark.parametrize(
    ("name", "data_set"),
    [
        ("left_atrium_vnet", "lasc18"),
        ("brain_flair_unet", "lgg"),
        ("em_membrane_unet", "isbi2012"),
        ("polyp_fcn8", "clinicdb"),
    ],
)
def test_phantom_and_prepare_write_in_out_alone(
    name: str, data_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    source, out = tmp_path / "source", tmp_path / "out"
    TINY_TRAININGS[name].phantom(source, 0)
    (source / "datalist.json").unlink()
    # a source may contain an image that is a link to elsewhere
    image = max((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    (tmp_path / "elsewhere").mkdir()
    image.rename(tmp_path / "elsewhere" / image.name)
    image.symlink_to(tmp_path / "elsewhere" / image.name)
    out.mkdir()
    before = snapshot(tmp_path, out)
    result = CliRunner().invoke(app, ["prepare", data_set, "--source", str(source), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert [path.name for path in out.iterdir()] == ["datalist.json"]
    assert snapshot(tmp_path, out) == before


def make_heart(source: Path, first: int) -> None:
    for number in range(first, first + 4):
        array = np.random.default_rng(number).integers(0, 99, (8, 8, 6)).astype(np.int16)
        for folder, pixels in (("imagesTr", array), ("labelsTr", (array > 50).astype(np.uint8))):
            (source / folder).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(pixels, np.eye(4)), source / folder / f"la_{number:03d}.nii.gz")


def make_polyps912(source: Path, first: int) -> None:
    for number, folder in enumerate(("train", "train", "valid", "test"), first):
        for part in ("images", "masks2"):
            (source / folder / part).mkdir(parents=True, exist_ok=True)
        frame = np.random.default_rng(number).integers(0, 255, (18, 24, 3), dtype=np.uint8)
        Image.fromarray(frame).save(source / folder / "images" / f"{number}.bmp")
        mask = np.zeros((18, 24), np.uint8)
        mask[2 : 6 + number % 10, 2:9] = 1
        tifffile.imwrite(source / folder / "masks2" / f"{number}.tif", mask)


@pytest.mark.parametrize(
    ("data_set", "make"), [("heart", make_heart), ("polyps912", make_polyps912)], ids=["heart", "polyps912"]
)
def test_prepare_of_the_others_and_merge_write_in_out_alone(
    data_set: str, make: Callable[[Path, int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    sources, prepared = ([tmp_path / f"{name}{k}" for k in range(2)] for name in ("source", "prepared"))
    commands = {tmp_path / "merged": ["merge", *map(str, prepared)]}
    for k, (source, out) in enumerate(zip(sources, prepared, strict=True)):
        make(source, 10 * k)
        commands = {out: ["prepare", data_set, "--source", str(source)], **commands}
    for out, command in commands.items():
        out.mkdir()
        before = snapshot(tmp_path, out)
        result = CliRunner().invoke(app, [*command, "--out", str(out)])
        assert result.exit_code == 0, result.output
        assert [path.name for path in out.iterdir()] == ["datalist.json"]
        assert snapshot(tmp_path, out) == before


def test_a_phantom_is_written_in_out_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for tiny in TINY_TRAININGS.values():
        tiny.phantom(tmp_path / "a" / tiny.name, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == set(TINY_TRAININGS)


@pytest.mark.parametrize("named", ["../x", "/etc/hostname"])
def test_names_in_a_table_of_the_source_lead_nowhere(named: str, tmp_path: Path) -> None:
    source, table = tmp_path / "source", tmp_path / "source" / "sequences.csv"
    TINY_TRAININGS["polyp_fcn8"].phantom(source, 0)
    (source / "datalist.json").unlink()
    head, first, *others = table.read_text().splitlines()
    table.write_text("\n".join([head, first.replace(first.split(",")[0], named, 1), *others]))
    before = snapshot(tmp_path, tmp_path / "out")
    CliRunner().invoke(app, ["prepare", "clinicdb", "--source", str(source), "--out", str(tmp_path / "out")])
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert [path.name for path in written] in ([], ["datalist.json"])
    assert named not in "".join(path.read_text() for path in written)
    after = snapshot(tmp_path, tmp_path / "out")
    assert after.keys() == before.keys()


@pytest.mark.parametrize("image", ["D/../elsewhere/x.png", "D/linked/x.png", "D/link.png", "D/..x/../x.png"])
def test_masks_are_written_in_out_alone(image: str, tmp_path: Path) -> None:
    for folder in ("D/..x", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("D/x.png", "elsewhere/x.png"):
        (tmp_path / name).touch()
    (tmp_path / "D" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "D" / "link.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    path = SaveSegmentationd("pred", tmp_path / "O", tmp_path / "D").output_path(tmp_path / image)
    assert path.resolve().parent == tmp_path / "O"


def test_a_datalist_reads_where_it_points(tmp_path: Path) -> None:
    """It can name any file that the person who runs it can read; docs/security.md says so."""
    for name in ("a.png", "D/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    entries = [{"image": "../a.png"}, {"image": str(tmp_path / "a.png")}, {"image": "b.png"}]
    (tmp_path / "D" / "datalist.json").write_text(json.dumps({"training": entries}))
    cases = Datalist(tmp_path / "D", keys=["image"])
    assert [Path(case["image"]).relative_to(tmp_path).as_posix() for case in cases] == ["a.png", "a.png", "D/b.png"]


def test_check_says_that_it_runs_what_is_in_the_bundle(tmp_path: Path) -> None:
    configs = tmp_path / "stranger" / "configs"
    configs.mkdir(parents=True)
    (configs / "train.json").write_text(json.dumps({"bundle_root": ".", "x": "$1 + 1", "run": ["$print(@x)"]}))
    result = CliRunner().invoke(app, ["check", str(tmp_path / "stranger"), "--config", "train.json"])
    assert "A check runs code that the bundle names" in result.output
