"""The zip of a bundle, the wheel of the library, and both in an environment without this checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from zipfile import ZipFile

import pytest
from bundle_runs import ROOT, table
from monai.apps.utils import HashCheckError
from monai.bundle import download, download_large_files
from tiny_bundles import TINY_BUNDLES, TinyBundle
from typer.testing import CliRunner

from segbundles import packing
from segbundles.cli import app
from segbundles.facts import sha256

POLYP = next(bundle for bundle in TINY_BUNDLES if bundle.name == "polyp_fcn8")
VERSION = json.loads((ROOT / "bundles/polyp_fcn8/configs/metadata.json").read_text())["version"]
ZIP = f"polyp_fcn8_v{VERSION}.zip"
NAMED = {"monai": "monai", "torch": "pytorch", "numpy": "numpy"}


def make(folder: Path, bundle: TinyBundle = POLYP) -> Path:
    """A bundle with tiny weights, and what a user's runs leave beside it."""
    root = bundle.make(folder)
    shutil.copy(ROOT / "bundles" / bundle.name / "LICENSE", root)
    for name in (
        *(
            "docs/README.md",
            "docs/.hidden",
            "configs/__pycache__/a.pyc",
            "data/patient.png",
            "output/masks/patient.png",
        ),
        *("models/model_previous.pt", "models/model_shipped.pt", "models/model.ts", "models/model.pt2"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"-")
    (root / "docs/README.md").write_text(
        "[a](../../../docs/a.md), ![b](b.jpeg), [c](../configs/c.json), [d](https://d.org)"
    )
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make(tmp_path)


@pytest.fixture
def host(tmp_path: Path) -> str:
    """Address of a web server of the folder that is packed to."""
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=tmp_path / "packed"))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_what_is_in_the_zip(root: Path, tmp_path: Path) -> None:
    packed = packing.pack(str(root), tmp_path / "packed")
    assert (packed.zip, packed.large) == (tmp_path / "packed" / ZIP, ())
    with ZipFile(packed.zip) as archive:
        names = archive.namelist()
        assert archive.read("polyp_fcn8/models/model.pt") == (root / "models/model.pt").read_bytes()
        needed = archive.read("polyp_fcn8/requirements.txt").decode().splitlines()
        # the pages of the project are not in the zip
        card = archive.read("polyp_fcn8/docs/README.md").decode()
    assert card == "a, ![b](b.jpeg), [c](../configs/c.json), [d](https://d.org)"
    metadata = json.loads((root / "configs/metadata.json").read_text())
    assert needed[:3] == [f"{name}=={metadata[f'{key}_version']}" for name, key in NAMED.items()]
    assert needed[3:] == [f"{name}=={version}" for name, version in metadata["required_packages_version"].items()]
    assert len(needed) > 10
    own = [name for name in names if not name.startswith("polyp_fcn8/segbundles/")]
    configs = [f"polyp_fcn8/configs/{path.name}" for path in (root / "configs").glob("*.json")]
    others = ["LICENSE", "docs/README.md", "models/model.json", "models/model.pt", "requirements.txt"]
    assert sorted(own) == sorted([*configs, *(f"polyp_fcn8/{name}" for name in others)])
    library = {name.removeprefix("polyp_fcn8/segbundles/") for name in set(names) - set(own)}
    assert library >= {"__init__.py", "py.typed", "networks/fcn.py"}
    assert {name for name in library if name.endswith(".j2")} == {
        f"report/{path.name}" for path in (ROOT / "common/segbundles/report").glob("*.j2")
    }
    assert not [name for name in library if "__pycache__" in name]


def test_the_same_bundle_gives_the_same_bytes(root: Path, tmp_path: Path) -> None:
    first = packing.pack(str(root), tmp_path / "a").zip.read_bytes()
    os.utime(root / "models/model.pt", (1, 1))
    assert packing.pack(str(root), tmp_path / "b").zip.read_bytes() == first


def forget_version(root: Path) -> None:
    path = root / "configs/metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": "9.9.9"}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "LICENSE").unlink(), "LICENSE does not exist: add it"),
        (lambda root: (root / "models/model.pt").unlink(), r"models/model\.pt does not exist: add it"),
        (forget_version, r"changelog of \S+metadata\.json does not mention version 9\.9\.9: add what is new"),
        (lambda root: (root / "configs/metadata.json").write_text("{"), "cannot read the version and the changelog"),
        (lambda root: (root / "models/model.json").unlink(), r"model\.json does not describe model\.pt: restore"),
        (lambda root: (root / "models/model.pt").write_bytes(b"-"), r"model\.json does not describe model\.pt"),
    ],
)
def test_a_bundle_that_cannot_be_packed(
    spoil: Callable[[Path], object], message: str, root: Path, tmp_path: Path
) -> None:
    spoil(root)
    with pytest.raises(ValueError, match=message):
        packing.pack(str(root), tmp_path / "packed")
    assert list((tmp_path / "packed").glob("*")) == []


def test_monai_downloads_the_zip_and_the_large_files(
    root: Path, tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "LARGEST", (root / "models/model.pt").stat().st_size - 1)
    words = ["pack", str(root), "--out", str(tmp_path / "packed"), "--large-files", f"{host}/"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    large = tmp_path / "packed" / f"polyp_fcn8_v{VERSION}_model.pt"
    assert sha256(large) == sha256(root / "models/model.pt")
    assert f"Upload {large.name} to {host}/." in result.output

    got = tmp_path / "got" / "polyp_fcn8"
    download(name="polyp_fcn8", url=f"{host}/{ZIP}", bundle_dir=str(got.parent), progress=False)
    assert (got / "models/model.json").is_file()
    assert not (got / "models/model.pt").exists()
    download_large_files(bundle_path=str(got))
    assert sha256(got / "models/model.pt") == sha256(large)

    large.write_bytes(b"something else")
    (got / "models/model.pt").unlink()
    with pytest.raises(HashCheckError, match="sha256"):
        download_large_files(bundle_path=str(got))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy."""
    source = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "common", source / "common", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", source, source]
    subprocess.run(command, check=True)
    return next(source.glob("*.whl"))


def environment(folder: Path) -> Path:
    """An environment with the packages of this one, but without this checkout; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    own = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    # the .pth files in a folder that a .pth file names are not read, so an editable install stays behind
    Path(own.strip(), "outer.pth").write_text(sysconfig.get_path("purelib"))
    return python


def run(python: Path, *words: object, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=clean, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_a_zip_runs_without_an_installed_library(tmp_path: Path) -> None:
    bundle = next(bundle for bundle in TINY_BUNDLES if bundle.name == "left_atrium_vnet")
    zipped = packing.pack(str(make(tmp_path / "here", bundle)), tmp_path).zip
    ZipFile(zipped).extractall(tmp_path / "there")
    root = tmp_path / "there" / bundle.name
    bundle.write_image(root / "scans")
    python = environment(tmp_path / "environment")
    run(
        python,
        "-m",
        "monai.bundle",
        "run",
        "--args_file",
        "configs/args_inference.json",
        "--dataset_dir",
        "scans",
        cwd=root,
    )
    (row,) = table(root / "output/inference/inference.csv")
    assert row["status"] == "ok"
    where = run(python, "-c", "import segbundles; print(segbundles.__file__)", cwd=root)
    assert Path(where.strip()) == root / "segbundles/__init__.py"


@pytest.mark.slow
def test_the_wheel_segments_with_a_bundle_from_a_zip(wheel: Path, root: Path, tmp_path: Path) -> None:
    zipped = packing.pack(str(root), tmp_path).zip
    with ZipFile(zipped) as archive:  # the library of the wheel is used
        members = [name for name in archive.namelist() if not name.startswith("polyp_fcn8/segbundles/")]
        archive.extractall(tmp_path / "there" / "bundles", members)
    POLYP.write_image(tmp_path / "there" / "scans")
    python = environment(tmp_path / "environment")
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    with ZipFile(wheel) as archive:
        archive.extractall(own)
    there = tmp_path / "there"
    run(python, "-m", "segbundles", "segment", "polyp_fcn8", "scans", "out", cwd=there)
    (row,) = table(there / "out/inference.csv")
    assert row["status"] == "ok"
    where = run(python, "-c", "import segbundles; print(segbundles.__file__)", cwd=there)
    assert Path(where.strip()) == Path(own, "segbundles/__init__.py")
