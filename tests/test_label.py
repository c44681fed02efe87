from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import numpy as np
import pytest
import requests
import SimpleITK as sitk  # noqa: N813
import tifffile
import torch
from bundle_runs import ROOT
from monai.bundle import run
from PIL import ExifTags, Image
from tiny_bundles import TINY_BUNDLES
from typer.testing import CliRunner

from segbundles.cli import app
from segbundles.facts import read_facts
from segbundles.label import LabelServer, default_environment, environment, find_bundles, make_environment
from segbundles.label import server as server_module
from segbundles.packing import pack
from segbundles.segmenter import Segmenter

BUNDLES = ROOT / "bundles"
INCHES = 25.4 / 72  # spacing in mm that ITK makes of 72 pixels an inch


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class TestEnvironment:
    @pytest.fixture
    def commands(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The commands that would be run; creating an environment creates a Python."""
        ran: list[str] = []

        def fake(command, root, what):
            ran.append(" ".join(command[1:]))
            if "venv" in command:
                python = root / "bin" / "python"
                python.parent.mkdir()
                python.symlink_to(sys.executable)

        monkeypatch.setattr(environment, "_run", fake)
        monkeypatch.setattr(environment, "_find_python", lambda: sys.executable)
        return ran

    def test_created_once_and_announced(self, commands: list[str], tmp_path: Path) -> None:
        said: list[str] = []
        folder = tmp_path / "a b"
        assert make_environment(folder, said.append) == folder / "bin" / "python"
        assert commands[0] == f"-m venv {folder}"
        assert [line.split("--no-input ")[1].split()[0] for line in commands[1:]] == [
            "torch==2.13.0",
            "torch==2.13.0",
            "--no-deps",
            "pydicom<3",
        ]
        assert commands[3].endswith("--no-deps monailabel==0.8.5 torchvision==0.15.2")
        assert "monai==1.6.1 pydicom<3 " in commands[2]
        assert commands[4].endswith(f"pydicom<3 -e {ROOT}")
        assert str(folder) in said[0]
        assert "once" in said[0]

        commands.clear()
        assert make_environment(folder, said.append) == folder / "bin" / "python"
        assert commands == []

    @pytest.mark.parametrize("failing", ["venv", "torch==2.13.0", "monailabel==0.8.5", "-e"])
    def test_an_incomplete_one_is_created_again(
        self, commands: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
    ) -> None:
        fake = environment._run

        def stopped(command, root, what):
            if failing in command:
                raise KeyboardInterrupt
            fake(command, root, what)

        with monkeypatch.context() as patch:
            patch.setattr(environment, "_run", stopped)
            with pytest.raises(KeyboardInterrupt):
                make_environment(tmp_path / "e", str)
        commands.clear()
        make_environment(tmp_path / "e", str)
        assert commands[0].startswith("-m venv")
        assert len(commands) == 5

    def test_another_checkout_is_installed_alone(
        self, commands: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_environment(tmp_path / "e", str)
        commands.clear()
        monkeypatch.setattr(environment, "_this_library", lambda: (["-e", "/elsewhere"], "/elsewhere 1"))
        make_environment(tmp_path / "e", str)
        assert [line.split()[-2:] for line in commands] == [["-e", "/elsewhere"]]

    def test_other_packages_or_a_missing_python_create_it_again(
        self, commands: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_environment(tmp_path / "e", str)
        (tmp_path / "e" / "bin" / "python").unlink()
        commands.clear()
        make_environment(tmp_path / "e", str)
        assert len(commands) == 5
        monkeypatch.setattr(environment, "_TORCH", "torch==9")
        commands.clear()
        make_environment(tmp_path / "e", str)
        assert len(commands) == 5

    def test_a_folder_with_other_files_is_refused(self, commands: list[str], tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("x")
        with pytest.raises(
            ValueError, match=r"is not an environment made by this command: give --environment an empty"
        ):
            make_environment(tmp_path)
        assert commands == []
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_the_end_of_a_failing_steps_output_is_shown(self, tmp_path: Path) -> None:
        code = "for k in range(40): print('line', k)\nraise SystemExit(3)"
        with pytest.raises(ValueError, match=r"(?s)installing packages in .* failed with status 3.*\nline 25\n"):
            environment._run([sys.executable, "-c", code], tmp_path, "installing packages")
        assert "line 0\n" in (tmp_path / "install.log").read_text()

    @pytest.mark.parametrize(
        ("origin", "expected"),
        [
            (None, "segbundles==0.3.0"),
            ({"url": "file:///w/segbundles-0.3.0-py3-none-any.whl", "archive_info": {}}, "segbundles @ file:///w/segb"),
            ({"url": "https://h/x.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}, "git+https://h/x.git@abc"),
        ],
        ids=["index", "wheel", "git"],
    )
    def test_the_library_is_installed_from_the_same_source(
        self, origin: dict | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        installed = SimpleNamespace(
            version="0.3.0", read_text=lambda name: None if origin is None else json.dumps(origin)
        )
        monkeypatch.setattr(environment.metadata, "distribution", lambda name: installed)
        monkeypatch.setattr(environment, "__file__", str(tmp_path / "site-packages" / "segbundles" / "label" / "e.py"))
        (argument,), version = environment._this_library()
        assert expected in argument
        assert version.startswith("0.3.0")

    def test_a_python_without_torchvision_looks_for_another(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(environment.sys, "version_info", (3, 13, 1))
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ValueError, match=r"needs Python 3\.11 or 3\.10 \(its torchvision has no build for 3\.13\)"):
            environment._find_python()
        (tmp_path / "python3.11").write_text("#!/bin/sh\nexit 1\n")  # such as pyenv leaves
        (tmp_path / "python3.10").write_text("#!/bin/sh\n")
        for name in ("python3.11", "python3.10"):
            (tmp_path / name).chmod(0o755)
        assert environment._find_python() == str(tmp_path / "python3.10")

    def test_the_default_is_in_the_users_cache(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert default_environment() == tmp_path / "segbundles" / "monai_label-0.8.5"


def make_bundle(root: Path, weights: bytes | None = b"weights") -> Path:
    (root / "configs").mkdir(parents=True)
    (root / "configs" / "inference.json").write_text("{}")
    if weights is not None:
        (root / "models").mkdir()
        (root / "models" / "model.pt").write_bytes(weights)
    return root


class TestBundles:
    def test_all_of_the_project_that_have_weights(self) -> None:
        found, without = find_bundles()
        have = {path.parents[1].name for path in BUNDLES.glob("*/models/model.pt")}
        assert {"left_atrium_vnet", "brain_flair_unet"} <= set(found) == have
        assert set(without) == {path.parents[1].name for path in BUNDLES.glob("*/configs/train.json")} - have

    def test_by_name_and_by_folder(self, tmp_path: Path) -> None:
        mine = make_bundle(tmp_path / "mine")
        found, _ = find_bundles(["left_atrium_vnet", str(mine)])
        assert found == {"left_atrium_vnet": BUNDLES / "left_atrium_vnet", "mine": mine}

    def test_what_cannot_be_served_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"no bundle 'left_atrium': give one of .*, or the path of its folder"):
            find_bundles(["left_atrium"])
        bare = make_bundle(tmp_path / "bare", None)
        with pytest.raises(
            ValueError, match=r"bare has no weights, .*models/model.pt: train it \(`python -m monai.bundle"
        ):
            find_bundles([str(bare)])
        twin = make_bundle(tmp_path / "left_atrium_vnet")
        with pytest.raises(ValueError, match="two bundles are named left_atrium_vnet"):
            find_bundles(["left_atrium_vnet", str(twin)])


class TestServer:
    """The server's process, with a stand-in for MONAI Label."""

    @staticmethod
    def python(folder: Path, code: str) -> Path:
        """A 'Python' that runs the code whatever it is asked for."""
        path = folder / "python"
        path.write_text(f"#!{sys.executable}\n{code}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def test_end_of_the_log_when_it_does_not_start(self, tmp_path: Path) -> None:
        python = self.python(tmp_path, "print('KeyError: models'); raise SystemExit(3)")
        (tmp_path / "studies").mkdir()
        with (
            LabelServer(python, tmp_path / "studies", {"b": make_bundle(tmp_path / "b")}, port=free_port()) as server,
            pytest.raises(
                ValueError, match=r"(?s)did not start \(status 3\)\. Its log, .* ends with:\nKeyError: models"
            ),
        ):
            server.wait_until_ready()

    def test_its_processes_end_with_it(self, tmp_path: Path) -> None:
        code = (
            "import signal, subprocess, sys, time\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
            "print(child.pid, flush=True)\n"
            "time.sleep(60)\n"
        )
        (tmp_path / "studies").mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server_module, "_STOP_SECONDS", 0.5)
            with LabelServer(
                self.python(tmp_path, code), tmp_path / "studies", {"b": make_bundle(tmp_path / "b")}, port=free_port()
            ) as server:
                while not (text := server.log.read_text()).strip():
                    time.sleep(0.05)
        child = Path(f"/proc/{int(text)}/stat")
        for _ in range(100):
            if not child.exists() or child.read_text().split()[2] == "Z":
                break
            time.sleep(0.05)
        else:
            pytest.fail("the child still runs")

    def test_weights_are_copied_until_a_training_replaces_them(self, tmp_path: Path) -> None:
        bundle = make_bundle(tmp_path / "b", b"one")
        (tmp_path / "studies").mkdir()

        def served() -> tuple[bytes, list[str]]:
            server = LabelServer("python", tmp_path / "studies", {"b": bundle})
            server.work.mkdir(exist_ok=True)
            server._copy()
            return (server.bundle_root("b") / "models" / "model.pt").read_bytes(), server.trained

        assert served() == (b"one", [])
        (bundle / "models" / "model.pt").write_bytes(b"two")
        (bundle / "configs" / "inference.json").write_text('{"a": 1}')
        assert served() == (b"two", [])
        copy = tmp_path / "studies" / "segbundles_label" / "model" / "b"
        assert not (copy / "models" / "model.json").exists()
        (bundle / "models" / "model.json").write_text("facts")
        assert served() == (b"two", [])
        assert (copy / "models" / "model.json").read_text() == "facts"
        assert (copy / "configs" / "inference.json").read_text() == '{"a": 1}'
        (copy / "models" / "model.pt").write_bytes(b"trained")
        (copy / "models" / "model.json").write_text("facts of the training")
        (bundle / "models" / "model.pt").write_bytes(b"three")
        assert served() == (b"trained", ["b"])
        assert (copy / "models" / "model.json").read_text() == "facts of the training"
        assert (bundle / "models" / "model.pt").read_bytes() == b"three"

    def test_an_ensemble_is_served_from_copies(self, tmp_path: Path) -> None:
        bundle = make_bundle(tmp_path / "b", b"own")
        files = [tmp_path / f"{name}.pt" for name in "xyz"]
        for path in files:
            path.write_bytes(path.stem.encode())
        (tmp_path / "x.json").write_text("facts of x")
        (tmp_path / "z.json").write_text("facts of z")
        (tmp_path / "studies").mkdir()
        copy = tmp_path / "studies" / "segbundles_label" / "model" / "b"

        def serve(weights: list[Path]) -> dict[str, str]:
            server = LabelServer("python", tmp_path / "studies", {"b": bundle}, weights=weights)
            server.work.mkdir(exist_ok=True)
            server._copy()
            assert server.trained == []
            return {path.name: path.read_text() for path in (copy / "models").iterdir()}

        everything = {"model.pt": "x", "member_2.pt": "y", "member_3.pt": "z"}
        assert serve(files) == {**everything, "model.json": "facts of x", "member_3.json": "facts of z"}
        expected = [str(copy / "models" / name) for name in everything]
        assert json.loads((copy / "configs" / "inference.json").read_text()) == {"weights": expected}
        assert serve(files[:1]) == {"model.pt": "x", "model.json": "facts of x"}
        assert serve([]) == {"model.pt": "own"}
        assert json.loads((copy / "configs" / "inference.json").read_text()) == {}
        with pytest.raises(
            ValueError, match=r"weights are given, and there are 2 bundles to serve: give --bundles one"
        ):
            LabelServer("python", tmp_path / "studies", {"b": bundle, "c": bundle}, weights=files)
        with pytest.raises(ValueError, match=r"there are no weights at .*none\.pt: give files that a training wrote"):
            LabelServer("python", tmp_path / "studies", {"b": bundle}, weights=[*files, tmp_path / "none.pt"])

    def test_copies_of_a_read_only_bundle_can_be_replaced(self, tmp_path: Path) -> None:
        bundle = make_bundle(tmp_path / "b")
        (bundle / "configs" / "more").mkdir()
        (bundle / "configs" / "more" / "logging.conf").write_text("")
        read_only = [bundle, *bundle.rglob("*")]
        for path in read_only:
            path.chmod(0o555 if path.is_dir() else 0o444)
        (tmp_path / "studies").mkdir()
        try:
            for _ in range(2):
                server = LabelServer("python", tmp_path / "studies", {"b": bundle})
                server.work.mkdir(exist_ok=True)
                server._copy()
                copies = {
                    path.relative_to(server.bundle_root("b")).as_posix(): path for path in server.work.rglob("b/**/*")
                }
                assert {"configs/inference.json", "configs/more/logging.conf", "models/model.pt"} < set(copies)
                # the owner's right to write, which a root user would not miss
                assert all(path.stat().st_mode & stat.S_IWUSR for path in copies.values())
        finally:
            for path in read_only:
                path.chmod(0o755)

    def test_errors_are_one_message_and_status_1(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("segbundles.label.make_environment", lambda folder, say: Path("python"))

        def message(*arguments: object) -> str:
            result = CliRunner().invoke(app, ["label", *map(str, arguments)])
            assert result.exit_code == 1
            assert "Traceback" not in result.output
            return result.output.splitlines()[-1]

        handler = signal.getsignal(signal.SIGTERM)
        try:
            bundle = make_bundle(tmp_path / "b")
            assert "is not a folder: give --studies one" in message("--studies", tmp_path / "no", "--bundles", bundle)
            with socket.socket() as taken:
                taken.bind(("127.0.0.1", 0))
                taken.listen()
                port = taken.getsockname()[1]
                said = message("--studies", tmp_path, "--bundles", bundle, "--port", port)
                assert f"cannot listen on 127.0.0.1, port {port} (Address already in use): give another --port" in said
        finally:
            signal.signal(signal.SIGTERM, handler)


@dataclass
class Served:
    """A running server and its files."""

    url: str
    studies: Path
    bundles: dict[str, Path]
    process: subprocess.Popen
    output: Path

    def request(self, method: str, path: str, **kwargs: object) -> requests.Response:
        with requests.Session() as session:
            session.trust_env = False
            return session.request(method, f"{self.url}{path}", timeout=600, **kwargs)  # type: ignore[arg-type]

    def infer(self, bundle: str, image: str, suffix: str) -> requests.Response:
        """As 3D Slicer asks, which wants .nrrd."""
        params = json.dumps({"result_extension": suffix, "result_dtype": "uint8"})
        query = {"image": image, "output": "image"}
        return self.request("POST", f"/infer/{bundle}", params=query, data={"params": params})

    def submit(self, image: str, label: Path) -> requests.Response:
        """As 3D Slicer's 'Submit Label'."""
        return self.request(
            "PUT",
            "/datastore/label",
            params={"image": image, "tag": "final"},
            files={"label": ("drawn.nii.gz", label.read_bytes())},
            data={"params": "{}"},
        )

    def forget_labels(self) -> None:
        objects = self.request("GET", "/datastore/", params={"output": "all"}).json()["objects"]
        for image in (name for name, entry in objects.items() if "final" in entry["labels"]):
            self.request("DELETE", "/datastore/label", params={"id": image, "tag": "final"})

    def train(self, bundle: str, **params: object) -> tuple[str, str]:
        """Status and last lines of a training."""
        assert self.request("POST", f"/train/{bundle}", json={"max_epochs": 1, **params}).status_code == 200
        while (task := self.request("GET", "/train/").json())["status"] not in ("DONE", "ERROR"):
            time.sleep(0.5)
        return task["status"], "\n".join(task["details"])

    def copy_of(self, bundle: str) -> Path:
        return self.studies / "segbundles_label" / "model" / bundle

    def image(self, name: str) -> Path:
        (path,) = self.studies.glob(f"{name}.*")
        return path


# settings that make an epoch short with any network
SHORT = {
    "left_atrium_vnet": {"patch_size": [48, 48, 32]},
    "brain_flair_unet": {"patch_size": [64, 64], "window_size": [64, 64], "slices_per_epoch": 16, "batch_size": 8},
    "em_membrane_unet": {"patch_size": [64, 64], "patches_per_section": 2},
    "polyp_fcn8": {"patch_size": [64, 64], "val_interval": 1},
}
WIDE = "wide_fcn"
# id of an image for each bundle and kind of file
CASES = [
    ("left_atrium_vnet", "atrium0"),
    ("brain_flair_unet", "brain0"),
    ("brain_flair_unet", "flair"),
    ("brain_flair_unet", "slice"),
    ("em_membrane_unet", "em0"),
    ("em_membrane_unet", "section"),
    ("em_membrane_unet", "stack"),
    ("polyp_fcn8", "polyp0"),
    ("polyp_fcn8", "polyp1"),
    ("polyp_fcn8", "polyp2"),
    ("polyp_fcn8", "noise"),
    (WIDE, "noise"),
]


def is_shipped(bundle: str) -> bool:
    return (BUNDLES / bundle / "models" / "model.pt").is_file()


def make_studies(folder: Path, truths: Path) -> None:
    """Write images of every kind into one folder, and what a person would draw on three per bundle into another."""
    from segbundles.phantoms.brain import make_patient
    from segbundles.phantoms.em import make_phantom as make_em
    from segbundles.phantoms.left_atrium import make_phantom as make_left_atrium
    from segbundles.phantoms.polyp import make_phantom as make_polyp

    phantoms = truths / "phantoms"
    make_left_atrium(phantoms / "left_atrium", 3, 0, (64, 64, 32), (3.0, 3.0, 3.0))
    for k, case in enumerate(sorted((phantoms / "left_atrium" / "Training Set").iterdir())):
        for name, file in (("lgemri", folder / f"atrium{k}.nrrd"), ("laendo", truths / f"atrium{k}.nii.gz")):
            volume = sitk.ReadImage(str(case / f"{name}.nrrd"))
            volume = volume if name == "lgemri" else sitk.Cast(volume > 0, sitk.sitkUInt8)
            write(volume, file, origin=(10.0, -20.0, 30.0), direction=(0.96, -0.28, 0, 0.28, 0.96, 0, 0, 0, 1))

    place = {
        "spacing": (0.9, 0.9, 5.0),
        "origin": (5.0, 6.0, 7.0),
        "direction": (1, 0, 0, 0, 0.96, 0.28, 0, -0.28, 0.96),
    }
    for k in range(3):
        image, label = make_patient(np.random.default_rng(k), (64, 64), 6)
        channels_last = sitk.GetImageFromArray(image.transpose(3, 2, 1, 0).astype(np.int16), isVector=True)
        write(channels_last, folder / f"brain{k}.nii.gz", **place)
        write(sitk.GetImageFromArray(label[0].T.astype(np.uint8)), truths / f"brain{k}.nii.gz", **place)
    write(sitk.GetImageFromArray(image[1].T.astype(np.int16)), folder / "flair.nii.gz", **place)
    tifffile.imwrite(folder / "slice.tif", np.ascontiguousarray(image[..., 3].T), photometric="rgb")

    make_em(phantoms / "em", 6, 0, (96, 80))
    pixels, labels = (tifffile.imread(phantoms / "em" / f"train-{name}.tif") for name in ("volume", "labels"))
    inch = {"resolution": (72, 72), "resolutionunit": "INCH"}
    for k in range(3):
        tifffile.imwrite(folder / f"em{k}.tif", pixels[k], **inch)
        drawn(labels[k] > 0, truths / f"em{k}.nii.gz", INCHES)
    noise = TINY_BUNDLES[2].write_image(phantoms / "stack")[0].T
    Image.fromarray(noise[0]).save(folder / "section.png")
    tifffile.imwrite(folder / "stack.tiff", noise, photometric="minisblack", **inch)

    TINY_BUNDLES[3].write_image(phantoms / "noise")
    Image.open(phantoms / "noise" / TINY_BUNDLES[3].file).save(folder / "noise.jpeg", quality=95, dpi=(72, 72))
    make_polyp(phantoms / "polyp", 4, 4)
    masks = {path.name: tifffile.imread(path) > 0 for path in (phantoms / "polyp" / "Ground Truth").iterdir()}
    names = sorted(name for name, mask in masks.items() if mask.any())
    for k, (name, suffix) in enumerate(zip(names, (".jpeg", ".png", ".bmp"), strict=False)):
        frame = tifffile.imread(phantoms / "polyp" / "Original" / name)
        Image.fromarray(frame).save(folder / f"polyp{k}{suffix}", dpi=(72, 72))
        drawn(masks[name], truths / f"polyp{k}.nii.gz", INCHES if suffix == ".jpeg" else 1.0)


def write(image: sitk.Image, path: Path, spacing=None, origin=(0.0, 0.0, 0.0), direction=None) -> None:
    if spacing is not None:
        image.SetSpacing(spacing)
    image.SetOrigin(origin)
    if direction is not None:
        image.SetDirection(direction)
    sitk.WriteImage(image, str(path))


def drawn(mask: np.ndarray, path: Path, spacing: float) -> None:
    """Write a map (H, W) as 3D Slicer sends it for a 2D image: a volume of one slice, on ITK's grid."""
    write(sitk.GetImageFromArray(mask[None].astype(np.uint8)), path, spacing=(spacing, spacing, 1.0))


def make_bundles(folder: Path) -> dict[str, Path]:
    """Copy the four bundles, with shipped weights or, if there are none, tiny untrained networks; and one more."""
    copies = {}
    for tiny in TINY_BUNDLES:
        own = BUNDLES / tiny.name
        settings = dict(SHORT[tiny.name])
        if is_shipped(tiny.name):
            root = folder / "bundles" / tiny.name
            for part in ("configs", "models"):
                shutil.copytree(own / part, root / part)
        else:
            root = tiny.make(folder)
            settings = {**tiny.settings, **settings}
        for name in ("inference.json", "train.json"):
            path = root / "configs" / name
            config = json.loads(path.read_text())
            assert name == "inference.json" or set(SHORT[tiny.name]) <= set(config)
            keys = set(config) & set(settings) if name == "train.json" else set(config) & set(tiny.settings)
            path.write_text(json.dumps({**config, **{key: settings[key] for key in keys if key in settings}}))
        copies[tiny.name] = root
    # trained with settings that are not in its JSON files
    tiny = TINY_BUNDLES[3]
    root = tiny.make(folder / "tiny").rename(folder / "bundles" / WIDE)
    tiny.make_weights(root, "network_def", root / "models" / "model.pt", base_channels=3, frame_height=32)
    train = json.loads((root / "configs" / "train.json").read_text()) | {"patch_size": [32, 32], "val_interval": 1}
    (root / "configs" / "train.json").write_text(json.dumps(train))
    # served from a zip, as a colleague gets it
    shutil.copy(BUNDLES / tiny.name / "LICENSE", root)
    with ZipFile(pack(str(root), folder).zip) as archive:
        archive.extractall(folder / "unpacked")
    copies[WIDE] = folder / "unpacked" / WIDE
    return copies


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A real server, as `segbundles label` starts it."""
    chosen = os.environ.get("SEGBUNDLES_LABEL_ENVIRONMENT")
    try:
        make_environment(chosen)
    except ValueError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"MONAI Label's environment cannot be made: {error}")
    out = tmp_path_factory.mktemp("label")
    studies, truths = out / "studies", out / "truths"
    studies.mkdir()
    truths.mkdir()
    make_studies(studies, truths)
    bundles = make_bundles(out)
    port = free_port()
    command = [sys.executable, "-m", "segbundles", "label", "--studies", str(studies), "--port", str(port)]
    command += ["--bundles", ",".join(map(str, bundles.values()))]
    command += ["--environment", chosen] if chosen else []
    output = out / "output.txt"
    with output.open("w") as file:
        # Ctrl-C counts, though a shell that started the tests in the background may have it ignored
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    server = Served(f"http://127.0.0.1:{port}", studies, bundles, process, output)
    try:
        while "Ctrl-C" not in output.read_text():
            assert process.poll() is None, output.read_text()
            time.sleep(0.2)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait()


def grid(path: Path, spatial_dims: int) -> tuple[list[float], ...]:
    """Return size, spacing, origin and direction as ITK and 3D Slicer use them; 2D images are volumes of one slice."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    rank = min(reader.GetDimension(), spatial_dims)
    direction = np.eye(3)
    direction[:rank, :rank] = np.reshape(reader.GetDirection(), (reader.GetDimension(), -1))[:rank, :rank]
    size = [*reader.GetSize()[:rank], 1][:3]
    return size, [*reader.GetSpacing()[:rank], 1][:3], [*reader.GetOrigin()[:rank], 0][:3], direction.flatten().tolist()


@pytest.mark.label
class TestRealServer:
    def test_says_its_address_and_what_to_do(self, served: Served) -> None:
        text = served.output.read_text()
        assert f"MONAI Label 0.8.5 at {served.url}" in text
        assert f"Enter the server {served.url}, press Next Sample" in text
        models = served.request("GET", "/info/").json()["models"]
        labels = {name: model["labels"] for name, model in models.items()}
        assert labels == {
            "left_atrium_vnet": {"left atrium": 1},
            "brain_flair_unet": {"flair abnormality": 1},
            "em_membrane_unet": {"cell": 1},
            "polyp_fcn8": {"polyp": 1},
            WIDE: {"polyp": 1},
        }

    @pytest.mark.parametrize(("bundle", "image"), CASES, ids=[f"{bundle}-{image}" for bundle, image in CASES])
    def test_the_answer_is_the_bundles_mask_on_the_images_grid(
        self, served: Served, bundle: str, image: str, tmp_path: Path
    ) -> None:
        path = served.image(image)
        answer = served.infer(bundle, image, ".nrrd")
        assert answer.status_code == 200, answer.text
        file = tmp_path / "answer.nrrd"
        file.write_bytes(answer.content)
        for mine, its in zip(grid(file, 3), grid(path, 3), strict=True):
            np.testing.assert_allclose(mine, its, atol=1e-5)

        root = served.bundles[bundle]
        run(
            config_file=str(root / "configs" / "inference.json"),
            bundle_root=str(root),
            dataset_dir=str(path),
            output_dir=str(tmp_path / "out"),
            logging_file=False,
        )
        (written,) = (tmp_path / "out").glob("*_seg.*")
        expected = sitk.GetArrayFromImage(sitk.ReadImage(str(written))) > 0
        mask = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        assert set(np.unique(mask)) <= {0, 1}
        # mixed precision on another number of threads rounds differently
        assert (mask.reshape(expected.shape).astype(bool) != expected).mean() < 1e-3
        # a trained network need not find anything in a phantom, an untrained one finds something in noise
        if bundle in ("left_atrium_vnet", WIDE) or (image in ("section", "stack", "noise") and not is_shipped(bundle)):
            assert 0.001 < expected.mean() < 0.999

    @pytest.mark.samples
    @pytest.mark.parametrize(
        ("bundle", "dice"), [("brain_flair_unet", 0.7), ("em_membrane_unet", 0.9), ("polyp_fcn8", 0.5)]
    )
    def test_real_image_sent_along(
        self, served: Served, bundle: str, dice: float, samples: Path, tmp_path: Path
    ) -> None:
        if not is_shipped(bundle):
            pytest.skip(f"{bundle} has no weights yet")
        if bundle == "em_membrane_unet":
            image, truth = (tifffile.imread(samples / "isbi2012" / f"train-{n}.tif")[0] for n in ("volume", "labels"))
        else:
            folder = {"brain_flair_unet": "kaggle_3m", "polyp_fcn8": "CVC-ClinicDB/Ground Truth"}[bundle]
            masks = {path: tifffile.imread(path) for path in sorted((samples / folder).rglob("*.tif"))}
            masks = {path: mask for path, mask in masks.items() if mask.ndim == 2}
            path = max(masks, key=lambda path: np.count_nonzero(masks[path]))
            truth = masks[path]
            image = tifffile.imread(str(path).replace("_mask", "").replace("Ground Truth", "Original"))
        Image.fromarray(image).save(tmp_path / "image.png")
        answer = served.request(
            "POST",
            f"/infer/{bundle}",
            params={"output": "image"},
            files={"file": ("image.png", (tmp_path / "image.png").read_bytes())},
            data={"params": json.dumps({"result_extension": ".png", "result_dtype": "uint8"})},
        )
        (tmp_path / "answer.png").write_bytes(answer.content)
        mask, truth = np.asarray(Image.open(tmp_path / "answer.png")) > 0, truth > 0
        assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > dice

    @pytest.mark.parametrize(
        ("bundle", "image", "suffix"),
        [
            ("brain_flair_unet", "flair", ".nii.gz"),
            ("em_membrane_unet", "em0", ".tif"),
            ("em_membrane_unet", "section", ".png"),
            ("em_membrane_unet", "stack", ".tiff"),
            ("polyp_fcn8", "polyp0", ".png"),
        ],
    )
    def test_answer_in_the_images_own_format(
        self, served: Served, bundle: str, image: str, suffix: str, tmp_path: Path
    ) -> None:
        answer = served.infer(bundle, image, suffix)
        (tmp_path / f"answer{suffix}").write_bytes(answer.content)
        image, mask = (sitk.ReadImage(str(p)) for p in (served.image(image), tmp_path / f"answer{suffix}"))
        assert mask.GetSize() == image.GetSize()

    @pytest.mark.parametrize(("bundle", "image"), [("left_atrium_vnet", "atrium0"), ("em_membrane_unet", "section")])
    def test_the_answers_parameters_have_the_measurements(self, served: Served, bundle: str, image: str) -> None:
        query = {"image": image, "output": "json"}
        answer = served.request("POST", f"/infer/{bundle}", params=query, data={"params": "{}"}).json()
        measured = answer["measurements"]
        assert {"confidence", "confidence_low", "confidence_calibrated", "review"} <= answer.keys()
        pixels = sitk.GetArrayFromImage(sitk.ReadImage(str(served.image(image)))).size
        if bundle == "em_membrane_unet":
            assert measured["cells"] == sum(measured["cells_per_section"])
            assert 0 <= measured["membrane_fraction"] <= 1
            assert "table" not in measured
        else:
            atrium = measured["classes"]["left atrium"]
            assert 0 < atrium["voxels"] <= pixels
            assert atrium["volume_ml"] == pytest.approx(atrium["voxels"] * 0.027)  # of 3 mm

    def test_least_certain_first(self, served: Served) -> None:
        served.forget_labels()
        segment = Segmenter(served.bundles["polyp_fcn8"])
        expected = {name: segment(served.image(name))["confidence"] for name in ("polyp0", "polyp1", "polyp2", "noise")}
        scoring = {"params": {"run_sync": "true"}, "json": {}}
        counts = served.request("POST", "/scoring/polyp_fcn8", **scoring).json()
        images = served.request("GET", "/datastore/", params={"output": "all"}).json()["objects"]
        scores = {name: entry["image"]["info"]["confidence_of"]["polyp_fcn8"] for name, entry in images.items()}
        assert counts["scored"] + counts["failed"] == len(images)
        assert {name: scores[name]["confidence"] for name in expected} == pytest.approx(expected, abs=1e-3)
        assert scores["atrium0"]["confidence"] is None
        assert "atrium0.nrrd" in scores["atrium0"]["reason"]
        again = served.request("POST", "/scoring/polyp_fcn8", **scoring).json()
        assert again == {"scored": 0, "failed": 0, "skipped": len(images)}

        def next_image() -> str:
            return served.request("POST", "/activelearning/least_certain_polyp_fcn8", json={}).json()["id"]

        scored = [name for name, score in scores.items() if score["confidence"] is not None]
        order = sorted(scored, key=lambda name: scores[name]["confidence"])
        # one that a person labels is not served; what was served comes back when all were
        polyps = [name for name in order if name.startswith("polyp")]
        answer = served.submit(polyps[0], served.studies.parent / "truths" / f"{polyps[0]}.nii.gz")
        assert answer.status_code == 200, answer.text
        order.remove(polyps[0])
        assert [next_image() for _ in order] == order
        assert next_image() == order[0]
        served.forget_labels()

    def test_a_bad_image_is_answered_with_the_reason(self, served: Served, tmp_path: Path) -> None:
        answer = served.infer("em_membrane_unet", "polyp1", ".nrrd")
        assert answer.status_code == 500
        assert "polyp1.png has 3 channel(s) but must have 1: convert colour to grey" in answer.json()["detail"]
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 3
        Image.open(served.image("polyp1")).convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
        answer = served.request(
            "POST",
            "/infer/polyp_fcn8",
            params={"output": "image"},
            files={"file": ("turned.jpg", (tmp_path / "turned.jpg").read_bytes())},
        )
        assert answer.status_code == 500
        assert "has an orientation tag, which 3D Slicer ignores" in answer.json()["detail"]

    @pytest.mark.parametrize("bundle", [*(tiny.name for tiny in TINY_BUNDLES), WIDE])
    def test_training_on_what_a_client_drew(self, served: Served, bundle: str) -> None:
        truths = served.studies.parent / "truths"
        stem = {"left": "atrium", "brain": "brain", "em": "em"}.get(bundle.split("_")[0], "polyp")
        served.forget_labels()
        # with few labels MONAI Label's default leaves none for validation
        number, split = (2, 0.2) if bundle == "em_membrane_unet" else (3, 0.34)
        for k in range(number):
            answer = served.submit(f"{stem}{k}", truths / f"{stem}{k}.nii.gz")
            assert answer.status_code == 200, answer.text
        kept = sorted((served.studies / "labels" / "final").glob(f"{stem}?.*"))
        for k, path in enumerate(kept):
            truth = sitk.GetArrayFromImage(sitk.ReadImage(str(truths / f"{stem}{k}.nii.gz")))
            assert truth.any()
            np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))).reshape(truth.shape), truth)

        weights = served.copy_of(bundle) / "models" / "model.pt"
        shipped = (served.bundles[bundle] / "models" / "model.pt").read_bytes()
        assert weights.read_bytes() == shipped
        status, details = served.train(bundle, val_split=split)
        assert status == "DONE", details
        assert hashlib.sha256(weights.read_bytes()).digest() != hashlib.sha256(shipped).digest()
        state = torch.load(weights, weights_only=True)
        assert state.keys() == torch.load(served.bundles[bundle] / "models" / "model.pt", weights_only=True).keys()
        before = read_facts(served.bundles[bundle] / "models" / "model.pt")
        facts = read_facts(weights)
        assert (facts["bundle"], facts["knobs"]) == (bundle, before["knobs"])
        if before.get("shipped"):
            assert read_facts(weights.with_name("model_shipped.pt")) == before
        log = (served.studies / "segbundles_label" / "server.log").read_text().rsplit("COMMAND::", 1)[1]
        assert "Total Records for Training: 2" in log
        assert f"Add Checkpoint Loader for Path: {weights}" in log
        assert "start at random" not in log
        assert (served.bundles[bundle] / "models" / "model.pt").read_bytes() == shipped

        image = served.image(f"{stem}0").name.split(".")[0]
        assert served.infer(bundle, image, ".nrrd").status_code == 200

    def test_weights_of_another_layout_are_refused(self, served: Served) -> None:
        weights = served.copy_of("em_membrane_unet") / "models" / "model.pt"
        good = weights.read_bytes()
        state = torch.load(weights, weights_only=True)
        torch.save({f"net.{name}": value for name, value in state.items()}, weights)
        try:
            answer = served.infer("em_membrane_unet", "em0", ".nrrd")
        finally:
            weights.write_bytes(good)
        assert answer.status_code == 500
        assert "has another architecture than the configured DynUNet" in answer.json()["detail"]
        assert served.infer("em_membrane_unet", "em0", ".nrrd").status_code == 200

    def test_what_was_drawn_is_what_is_read(self, served: Served, tmp_path: Path) -> None:
        served.forget_labels()
        label = np.zeros((80, 96), np.uint8)
        label[3:9, 5:20] = 7
        drawn(label, tmp_path / "label.nii.gz", INCHES)
        assert served.submit("em1", tmp_path / "label.nii.gz").status_code == 200
        status, details = served.train("em_membrane_unet")
        assert status == "ERROR"
        reason = details.splitlines()[-1]
        assert reason.startswith("Training failed: ")
        assert "labels/final/em1.png contains the label values 7; allowed are 0, 1" in reason

    def test_a_label_of_another_size_is_refused(self, served: Served) -> None:
        answer = served.submit("polyp0", served.studies.parent / "truths" / "em0.nii.gz")
        assert answer.status_code == 400
        assert "The label of polyp0 has size (96, 80, 1), its image (96, 72)" in answer.json()["detail"]

    def test_ctrl_c_stops_it(self, served: Served) -> None:
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(60) == 0
        assert served.output.read_text().rstrip().endswith("Stopped.")
        with pytest.raises(requests.ConnectionError):
            served.request("GET", "/info/")
