"""What happens when something goes wrong, with a tiny network: docs/reliability.md has the table."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_runs import ROOT
from forked_runs import KILLED, Fault, ForkedRuns
from PIL import Image
from tiny_trainings import TINY_TRAININGS

TINY = TINY_TRAININGS["polyp_fcn8"]
NETWORK = {"amp": False, "device": "cpu"}  # the rest are facts of the weights
# two steps per epoch; the state contains the name of the curves, which is otherwise the time
TRAINING = {**TINY.settings, "batch_size": 2, "max_epochs": 3, "run_name": "curves"}

pytestmark = pytest.mark.slow


class Runs:
    """The three commands of the bundle, into one folder."""

    def __init__(self, forked: ForkedRuns, data: Path, folder: Path, trained: Path | None = None) -> None:
        self.forked, self.data, self.folder = forked, data, folder
        self.trained = trained or folder / "out"
        self.root = TINY.root
        self.powerless = False
        self.output = folder / "printed.txt"
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, run: str, fault: Fault | None = None, output: Path | None = None, **settings: object) -> int:
        """Start training, evaluating or inferring."""
        configs = self.root / "configs"
        file = {
            "training": configs / "train.json",
            "evaluating": [str(configs / "train.json"), str(configs / "evaluate.json")],
            "inferring": configs / "inference.json",
        }[run]
        common = {
            "config_file": file,
            "bundle_root": self.root,
            "dataset_dir": self.data,
            "ckpt_dir": self.trained / "models",
            "output_dir": self.folder / "out",
        }
        settings = {**common, **(TRAINING if run == "training" else NETWORK), **settings}
        words = [word for key, value in settings.items() if value is not None for word in (f"--{key}", value)]
        return self.forked.start(["run", run, *words], output or self.output, fault, self.powerless)

    def __call__(self, run: str, fault: Fault | None = None, **settings: object) -> int:
        """Exit status of such a run."""
        return self.forked.wait(self.start(run, fault, **settings))

    @property
    def printed(self) -> str:
        """What the last run printed."""
        return self.output.read_text()


@pytest.fixture(scope="module")
def forked() -> Iterator[ForkedRuns]:
    runs = ForkedRuns()
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sequences of two frames: two for training, one each for validation and testing."""
    out = tmp_path_factory.mktemp("phantom")
    TINY.phantom(out, 0)
    return out


@pytest.fixture(scope="module")
def unstopped(forked: ForkedRuns, phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a training that nothing stopped."""
    runs = Runs(forked, phantom, tmp_path_factory.mktemp("unstopped"))
    assert runs("training") == 0, runs.printed
    return runs.folder / "out"


@pytest.fixture
def runs(forked: ForkedRuns, phantom: Path, tmp_path: Path) -> Runs:
    return Runs(forked, phantom, tmp_path)


@pytest.fixture
def trained_runs(forked: ForkedRuns, phantom: Path, tmp_path: Path, unstopped: Path) -> Runs:
    return Runs(forked, phantom, tmp_path, unstopped)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*"))


def table(path: Path) -> dict[str, dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def equal(one: object, other: object) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def assert_same_run(out: Path, unstopped: Path) -> None:
    for name in ("training.ckpt", "models/model.pt"):
        one, other = (torch.load(folder / name, weights_only=True) for folder in (out, unstopped))
        assert equal(one, other), name


class TestKilled:
    @pytest.mark.parametrize(
        ("fault", "left", "epoch"),
        [
            (Fault("torch.optim.Adam.step", 4), {"models/model.pt", "training.ckpt"}, 1),
            (Fault("torch.save", 2, "half", "training.ckpt"), {"models/model.pt", "training.ckpt"}, 1),
            (Fault("torch.save", 1, "half", "model.pt"), set(), None),
        ],
        ids=["in an epoch", "writing the state", "writing the weights"],
    )
    def test_training_goes_on_as_if_never_stopped(
        self, fault: Fault, left: set[str], epoch: int | None, runs: Runs, unstopped: Path
    ) -> None:
        out = runs.folder / "out"
        assert runs("training", fault) == KILLED
        kept = {name for name in files(out) if name.endswith((".pt", ".ckpt")) and "/." not in f"/{name}"}
        assert kept == left
        for name in kept:  # whole
            torch.load(out / name, weights_only=True)
        if epoch is not None:
            assert torch.load(out / "training.ckpt", weights_only=True)["trainer"]["epoch"] == epoch
        parts = [name for name in hidden(out) if ".part." in name]
        assert len(parts) == (fault.do == "half")

        assert runs("training", resume=True) == 0, runs.printed
        assert_same_run(out, unstopped)
        assert hidden(out) == []

    def test_inference_goes_on_and_leaves_no_half_mask(self, trained_runs: Runs) -> None:
        out = trained_runs.folder / "out"
        fault = Fault("segbundles.transforms.SaveSegmentationd._write", 4)
        assert trained_runs("inferring", fault) == KILLED
        assert len([name for name in files(out) if name.endswith("_seg.png")]) == 3
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*_seg.png")}
        assert trained_runs("inferring", skip_finished=True) == 0, trained_runs.printed
        masks = sorted(out.rglob("*_seg.png"))
        assert len(masks) == 8
        for path in masks:
            assert Image.open(path).size == (64, 48)
        assert {path: path.stat().st_mtime_ns for path in before} == before
        rows = table(out / "inference.csv").values()
        assert [row["status"] for row in rows] == ["ok"] * 8
        assert sum("finished before" in row["notes"] for row in rows) == 3

    def test_report_is_the_old_one_or_the_new_one(self, trained_runs: Runs) -> None:
        out = trained_runs.folder / "out"
        assert trained_runs("evaluating") == 0, trained_runs.printed
        before = (out / "report.html").read_bytes()
        fault = Fault("pathlib.Path.write_text", 1, "half", "report.html")
        assert trained_runs("evaluating", fault) == KILLED
        assert (out / "report.html").read_bytes() == before
        assert len(hidden(out)) == 1
        assert trained_runs("evaluating") == 0, trained_runs.printed
        assert hidden(out) == []
        assert (out / "report.html").read_text().rstrip().endswith("</html>")


def test_a_second_run_into_the_folder_is_refused_before_it_changes_anything(runs: Runs, tmp_path: Path) -> None:
    out, paused = runs.folder / "out", tmp_path / "paused"
    first = runs.start("training", Fault("torch.optim.Adam.step", 4, "pause", path=str(paused)))
    for _ in range(6000):
        if paused.exists():
            break
        subprocess.run(["sleep", "0.1"], check=True)
    before = {name: (out / name).read_bytes() for name in ("training.ckpt", "models/model.pt")}
    for settings, message in (
        ({}, f"output_dir '{out}' is in use: another run is writing training.log there."),
        (
            {"output_dir": tmp_path / "else"},
            f"ckpt_dir '{out}/models' is in use: another run is writing model.pt there.",
        ),
    ):
        second = runs.start("training", output=tmp_path / "second.txt", **settings)
        assert runs.forked.wait(second) == 1
        assert f"ERROR: {message} Wait until it ends" in (tmp_path / "second.txt").read_text()
    assert {name: (out / name).read_bytes() for name in before} == before
    assert not (out / "training_previous.ckpt").exists()
    paused.unlink()
    assert runs.forked.wait(first) == 0, runs.printed
    assert runs("training", resume=True) == 0  # once it has ended, another may start


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("not allowed to mount a disk")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def fill(disk: Path, free_kib: int = 0) -> None:
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        with suppress(OSError):
            while file.write(bytes(4096)):
                pass
        file.truncate(path.stat().st_size - 1024 * free_kib)


class TestFullDisk:
    def test_training_names_the_file_and_keeps_what_was_there(
        self, forked: ForkedRuns, phantom: Path, small_disk: Path, unstopped: Path
    ) -> None:
        runs, out = Runs(forked, phantom, small_disk.parent, trained=small_disk / "out"), small_disk / "out"
        assert runs("training", output_dir=out, max_epochs=2) == 0, runs.printed
        before = {name: (out / name).read_bytes() for name in ("training.ckpt", "models/model.pt")}
        for free_kib, written in ((0, r"training\.config\.json"), (24, r"(models/model\.pt|training\.ckpt)")):
            fill(small_disk, free_kib)
            assert runs("training", output_dir=out, resume=True) == 1
            assert re.search(
                rf"ERROR: cannot write {out}/{written} \(No space left on device\): make room", runs.printed
            )
            assert {name: (out / name).read_bytes() for name in before} == before
        (small_disk / "filler").unlink()
        assert runs("training", output_dir=out, resume=True) == 0, runs.printed
        assert torch.load(out / "training.ckpt", weights_only=True)["trainer"]["epoch"] == 3

    def test_inference_names_the_files(self, trained_runs: Runs, small_disk: Path) -> None:
        fill(small_disk, 24)  # enough for the log, the record and some masks
        assert trained_runs("inferring", output_dir=small_disk / "out", batch_size=1) == 1
        failed = set(re.findall(r"(\d)_seg\.png \(No space left on device\): make room", trained_runs.printed))
        masks = list((small_disk / "out").rglob("*.png"))
        assert len(failed) + len(masks) == 8
        assert 0 < len(masks) < 8
        for path in masks:
            Image.open(path).load()
        assert hidden(small_disk) == []


def test_a_thousand_images_take_no_more_memory_than_two_hundred(
    forked: ForkedRuns, tmp_path: Path, unstopped: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    frame = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    for k in range(1000):
        Image.fromarray(np.roll(frame, k, 1)).save(data / f"{k}.png", compress_level=1)
    runs = Runs(forked, data, tmp_path, unstopped)
    fault = Fault("segbundles.handlers.InferenceResults.add", do="memory", path=str(tmp_path / "memory"))
    assert runs("inferring", fault, batch_size=8, frame_height=32) == 0, runs.printed
    kib = [int(line) for line in (tmp_path / "memory").read_text().split()]
    assert len(kib) == 1000
    assert len(table(tmp_path / "out" / "inference.csv")) == 1000
    assert kib[-1] - kib[199] < 30 * 1024


class TestPermissions:
    def test_a_bundle_that_cannot_be_written_needs_other_folders(
        self, runs: Runs, tmp_path: Path, unstopped: Path
    ) -> None:
        runs.root = tmp_path / "site-packages" / "polyp_fcn8"
        shutil.copytree(TINY.root / "configs", runs.root / "configs")
        shutil.copytree(unstopped / "models", runs.root / "models")
        for path in (runs.root.parent, *runs.root.parent.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        runs.powerless = True
        before = {path: path.stat().st_mtime_ns for path in runs.root.rglob("*")}
        assert runs("training", ckpt_dir=None, max_epochs=1) == 1
        message = f"ERROR: ckpt_dir '{runs.root}/models' cannot be written to (Permission denied): give --ckpt_dir"
        assert message in runs.printed
        assert runs("inferring", ckpt_dir=None, output_dir=None) == 1
        assert f"output_dir '{runs.root}/output/inference' cannot be written to" in runs.printed
        assert runs("training", max_epochs=1) == 0, runs.printed
        assert runs("inferring", ckpt_dir=None) == 0, runs.printed
        assert {path: path.stat().st_mtime_ns for path in runs.root.rglob("*")} == before

    def test_files_and_folders_that_cannot_be_read_are_named(self, trained_runs: Runs, tmp_path: Path) -> None:
        trained_runs.data = data = tmp_path / "data"
        (data / "closed").mkdir(parents=True)
        for name in ("a.png", "b.png", "closed/c.png"):
            Image.fromarray(np.arange(64 * 48 * 3, dtype=np.uint8).reshape(48, 64, 3)).save(data / name)
        (data / "a.png").chmod(0)
        (data / "closed").chmod(0)
        trained_runs.powerless = True
        try:
            assert trained_runs("inferring") == 1
        finally:
            (data / "closed").chmod(0o700)
        assert f"WARNING {data}/closed was not searched (Permission denied)" in trained_runs.printed
        rows = table(tmp_path / "out" / "inference.csv")
        assert {name: row["status"] for name, row in rows.items()} == {"a.png": "failed", "b.png": "ok"}
        assert "Permission denied" in rows["a.png"]["notes"]

        (tmp_path / "models").mkdir()
        shutil.copy(trained_runs.trained / "models" / "model.pt", tmp_path / "models")
        (tmp_path / "models" / "model.pt").chmod(0)
        assert trained_runs("inferring", ckpt_dir=tmp_path / "models") == 1
        assert f"ERROR: {tmp_path}/models/model.pt cannot be read (Permission denied)" in trained_runs.printed


def test_unicode_spaces_and_links_in_paths(forked: ForkedRuns, phantom: Path, tmp_path: Path) -> None:
    place = tmp_path / "Ärzte Daten" / "心 房"
    shutil.copytree(phantom, place / "the data")
    (place / "linked data").symlink_to(place / "the data")
    frames = place / "linked data" / "Original"
    (frames / "8.tif").rename(place / "8 elsewhere.tif")
    (frames / "8.tif").symlink_to(place / "8 elsewhere.tif")
    runs = Runs(forked, place / "linked data", place / "läuft")
    assert runs("training") == 0, runs.printed
    assert runs("evaluating") == 0, runs.printed
    assert {"metrics.csv", "report.html", "evaluation.log", "training.log"} <= files(runs.folder / "out")

    runs.data = place / "linked images"
    shutil.copytree(frames, place / "images", symlinks=True)
    runs.data.symlink_to(place / "images")
    (place / "images" / "loop").symlink_to(place / "images")
    (place / "images" / "gone.tif").symlink_to(place / "nowhere.tif")
    (place / "images" / "itself.tif").symlink_to(place / "images" / "itself.tif")
    assert runs("inferring", output_dir=place / "masks") == 1
    assert files(place / "masks") == {
        "inference.csv",
        "inference.log",
        "inferring.config.json",
        "measurements.json",
        "preview.html",
        *(f"{k}_seg.png" for k in range(1, 9)),
    }
    rows = table(place / "masks" / "inference.csv")
    assert {name for name, row in rows.items() if row["status"] == "failed"} == {"gone.tif", "itself.tif"}
    assert "loop was not searched: it is a link to a folder" in runs.printed
    assert "2 of 10 images failed" in (place / "masks" / "inference.log").read_text()


def test_what_a_run_shows(unstopped: Path) -> None:
    lines = (unstopped.parent / "printed.txt").read_text().replace("\r", "\n").splitlines()
    epochs = [line for line in lines if " INFO epoch " in line]
    assert len(epochs) == 3
    assert all(re.search(r"[\d.]+ s, \d+ s left$", line) for line in epochs)
    # of warnings there is one: MONAI's, that a config is code
    warnings = [line for line in lines if "Warning" in line]
    assert [
        re.search(r"Only proceed if this config is from a source you trust", line) is None for line in warnings
    ] == [False]
    log = (unstopped / "training.log").read_text().splitlines()
    assert "INFO Started as process" in log[0]
    assert [line.split(" ", 2)[2].split(",")[0] for line in log if " epoch " in line] == [
        f"INFO epoch {k}/3" for k in (1, 2, 3)
    ]
    assert log[-1].endswith(f"INFO Weights: {unstopped}/models/model.pt")


def test_every_test_that_the_page_names_is_there() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::([\w:]+)`", page)
    assert len(named) > 20
    for file, name in named:
        *classes, function = name.split("::")
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert re.search(rf"^ *def {function}\(", text, re.M), (file, name)
        assert all(re.search(rf"^class {one}\b", text, re.M) for one in classes), (file, name)
