"""Run every command of README.md and docs/ with tiny bundles and data, unless it is marked.

What a page shows is compared too: ``text`` blocks with what the command before them prints, and the messages in tables
with those of a run. Files in JSON that a page shows are written first.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import tifffile
import torch
from bundle_runs import ROOT, table
from documentation import PAGES, read_blocks, read_commands
from monai.bundle import ConfigParser
from own_data import write_patients, write_scans
from PIL import Image
from tiny_bundles import TINY_BUNDLES, command_line
from tiny_trainings import TINY_TRAININGS
from typer.testing import CliRunner

from segbundles.cli import app
from segbundles.knobs import former_names, read_schema
from segbundles.phantoms import polyp

BLOCKS = {name: read_blocks(path) for name, path in PAGES.items()}
COMMANDS = {name: list(read_commands(blocks)) for name, blocks in BLOCKS.items()}
# page, start of the command, the test that runs it or what it needs
MARKED = [
    ("README.md", "./quickstart.sh", "needs minutes; a user's first command"),
    ("README.md", "./runtests.sh", "would run itself"),
    ("README.md", "source .venv", "needs the environment that quickstart.sh makes"),
    ("README.md", "torchrun", "tests/test_scale_out.py"),
    ("docs/add_a_bundle.md", "", "tests/test_add_a_bundle.py"),
    ("docs/benchmarks.md", "", "tests/test_cards.py"),
    ("docs/confidence.md", "segbundles", "tests/test_calibration.py, tests/test_crossvalidation.py"),
    ("docs/evaluation.md", "", "tests/test_crossvalidation.py, tests/test_comparison.py, tests/bundles"),
    ("docs/export.md", "", "tests/test_export.py"),
    ("docs/federated.md", "pip install", "needs a network"),
    ("docs/federated.md", "python docs/federated/job.py", "needs NVIDIA FLARE, see tests/test_federated.py"),
    ("docs/monai_label.md", "segbundles label --studies", "starts a server: tests/test_label.py"),
    ("docs/results.md", "segbundles segment brain_flair_unet scans masks --weights", "tests/test_ensemble.py"),
    ("docs/scale_out.md", "torchrun", "tests/test_scale_out.py"),
    ("docs/scale_out.md", "source .venv", "part of the Slurm script"),
    ("docs/scale_out.md", "HEAD=$(", "needs Slurm"),
    ("docs/scale_out.md", "PART", "part of the Slurm script"),
    ("docs/scale_out.md", 'segbundles segment brain_flair_unet "scans/$PART"', "tests/test_scale_out.py"),
    ("docs/scale_out.md", "python benchmarks/scale.py", "needs minutes"),
    ("docs/scale_out.md", "srun", "needs Slurm"),
    ("docs/security.md", "pip", "needs a network"),
    ("docs/share.md", "", "tests/test_packing.py"),
    ("docs/speed.md", "", "needs OpenVINO and data: tests/networks/test_engine.py"),
    ("docs/tracking.md", "tensorboard", "starts a server"),
    ("docs/tracking.md", "pip install", "needs a network"),
    ("docs/tracking.md", "python -m monai.bundle", "needs MLflow, see tests/test_tracking.py"),
    ("docs/tracking.md", "mlflow ui", "starts a server"),
]
# shell commands that only read
LOOKING = ("cat ", "find ", "grep ", "for file in ")
TINY = {bundle.name: bundle for bundle in TINY_BUNDLES}
EDIT, OWN = PAGES["docs/edit_the_json.md"].read_text(), PAGES["docs/own_data.md"].read_text()


@pytest.fixture(autouse=True)
def same_cases_in_two_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a datalist list one case for training and for validation, which keeps these tests small."""
    monkeypatch.setattr("segbundles.data.cases.check_leaks", lambda *_: None)


def is_marked(page: str, command: str) -> bool:
    return any(page == name and command.startswith(start) for name, start, _ in MARKED)


RUN_PAGES = [page for page, commands in COMMANDS.items() if not all(is_marked(page, text) for _, text in commands)]


def make_bundle(folder: Path, name: str) -> Path:
    """Copy a bundle with a tiny untrained network; its JSON has tiny settings, so commands need none."""
    root = TINY[name].make(folder)
    settings = TINY_TRAININGS[name].settings | {"lr_epochs": 1}
    settings |= {"locator_spacing_mm": [8.0, 8.0, 8.0], "locator_base_channels": 2}
    for path in root.glob("configs/*.json"):
        config = json.loads(path.read_text())
        if path.name in ("train.json", "train_locator.json", "evaluate.json", "inference.json"):
            config |= {key: value for key, value in settings.items() if key in config}
        elif path.name == "metadata.json":
            for described in (value for key, value in config.items() if key.endswith("_data_format")):
                for end in (described["inputs"]["image"], described["outputs"]["pred"]):
                    end["spatial_shape"] = [32] * len(end["spatial_shape"])
        path.write_text(json.dumps(config))
    return root


@pytest.fixture(autouse=True)
def short_commands_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the short commands of a page run what they print without new processes, which take seconds to start."""

    def run_here(commands: list[list[str]], say: Callable[[str], None]) -> int:
        for command in commands:
            say(f"$ {shlex.join(command)}")
            command_line(command)
        return 0

    monkeypatch.setattr("segbundles.commands.run_commands", run_here)


def run(command: str) -> str:
    """Run a command of a page in this process, at most two epochs and 4 channels; return what ``segbundles`` prints."""
    short = re.sub(r"--(max|lr)_epochs (\d+)", lambda m: f"--{m[1]}_epochs {1 if int(m[2]) < 80 else 2}", command)
    short = short.replace("--base_channels 16", "--base_channels 4")
    if short.startswith("segbundles "):
        result = CliRunner().invoke(app, shlex.split(short)[1:])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return f"{result.output}\nexit status {result.exit_code}"
    if short.startswith(LOOKING):
        return subprocess.run(short, shell=True, check=True, capture_output=True, text=True).stdout
    assert short.startswith("python -m monai.bundle "), (
        f"run it in another test, or say in MARKED what it needs: {short}"
    )
    command_line(short)
    return ""


def flat(text: str) -> str:
    """Return text as one line, without the lines of tables."""
    return " ".join(re.sub("[\u2500-\u257f]", " ", text).split())


def said(pattern: str) -> re.Pattern[str]:
    """Return a pattern of a message on a page, in which ``...`` stands for anything."""
    return re.compile(".*?".join(re.escape(part) for part in pattern.strip().split("...")))


def rows(text: str, heading: str) -> list[list[str]]:
    """Return the rows of the table whose first column has this heading."""
    _, _, rest = text.partition(f"| {heading} |")
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in lines]


def as_heart(volumes: Path, out: Path, name: str = "la") -> None:
    """Write cases of the phantom in the layout of Task02_Heart."""
    for number, folder in enumerate(sorted(volumes.iterdir())):
        for kind, file in (("images", "lgemri.nrrd"), ("labels", "laendo.nrrd")):
            image = sitk.ReadImage(str(folder / file))
            image = image > 0 if kind == "labels" else image
            (out / f"{kind}Tr").mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(image, str(out / f"{kind}Tr" / f"{name}_{number:03d}.nii.gz"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the project's root, in which the commands of a page are run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def three_classes(left_atrium_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the phantom, with the right half of its atrium as a third class."""
    out = tmp_path_factory.mktemp("three") / "data"
    shutil.copytree(left_atrium_phantom, out)
    for path in out.rglob("laendo.nrrd"):
        image = sitk.ReadImage(str(path))
        array = (sitk.GetArrayFromImage(image) > 0).astype(np.uint8)
        array[:, :, int(np.argwhere(array)[:, 2].mean()) :] *= 2
        label = sitk.GetImageFromArray(array)
        label.CopyInformation(image)
        sitk.WriteImage(label, str(path))
    return out


@pytest.fixture
def sources(
    place: Path, left_atrium_phantom: Path, brain_phantom: Path, em_phantom: Path, three_classes: Path
) -> Callable[[str], None]:
    """Return a function that writes what the commands of a page need, under the names that they use."""

    def make(page: str) -> None:
        volumes = left_atrium_phantom / "Training Set"
        if page == "docs/security.md":
            shutil.copytree(ROOT / "bundles/left_atrium_vnet/configs", place / "bundles/left_atrium_vnet/configs")
            return
        make_bundle(place, "left_atrium_vnet")
        if page == "README.md":
            (place / "Atrial Segmentation Challenge").symlink_to(left_atrium_phantom)
            as_heart(volumes, place / "Task02_Heart")
            copy_scan(volumes, place / "volumes")
            nib.save(nib.load(place / "Task02_Heart/imagesTr/la_000.nii.gz"), place / "scan.nii.gz")
            return
        copy_scan(volumes, place / "scans")
        if page == "docs/edit_the_json.md":
            make_bundle(place, "brain_flair_unet")
            (place / "data").mkdir()
            for name, data in (
                ("left_atrium", left_atrium_phantom),
                ("brain", brain_phantom),
                ("three", three_classes),
            ):
                (place / "data" / name).symlink_to(data)
        else:
            shutil.copytree(left_atrium_phantom, place / "data" / "own")
            (place / "kaggle_3m").symlink_to(brain_phantom)
            (place / "isbi2012").symlink_to(em_phantom)
            polyp.make_phantom(place / "CVC-ClinicDB", 3, 2, 0, (64, 48))
            damage_heart(volumes, place / "Task02_damaged")
            make_bundle(place, "brain_flair_unet")
            write_patients(place)
            (place / "files").rename(place / "new_patients")
            for seed in range(5):
                write_scans(place / "patients" / str(seed), seed, (32, 28, 4), {"lesion": 1})

    return make


def copy_scan(volumes: Path, folder: Path) -> None:
    folder.mkdir()
    shutil.copy(volumes / "phantom0_000" / "lgemri.nrrd", folder)


def damage_heart(volumes: Path, out: Path) -> None:
    """Write seven cases in the layout of Task02_Heart, six of them with a fault."""
    image = np.random.default_rng(0).normal(size=(20, 20, 10)).astype(np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[5:9, 5:9, 3:6] = 1
    (out / "imagesTr").mkdir(parents=True)
    (out / "labelsTr").mkdir()
    for number in range(7):
        pixels, mask, moved = image + number, label.copy(), np.eye(4)
        mask[number, 0, 0] = 1
        if number == 2:
            mask[0, 0, 0] = 7
        if number == 3:
            mask = mask[..., :9]
        if number == 5:
            moved[2, 3] = 3
        if number == 6:
            pixels = np.zeros_like(image)
        name = f"la_{number:03d}.nii.gz"
        nib.save(nib.Nifti1Image(pixels, np.eye(4)), out / "imagesTr" / name)
        nib.save(nib.Nifti1Image(mask, moved), out / "labelsTr" / name)
    (out / "labelsTr" / "la_001.nii.gz").unlink()
    damaged = out / "imagesTr" / "la_004.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:500])


def write_files(page: str) -> None:
    """Write the JSON files of a page; the paragraph before each one names it."""
    for block in BLOCKS[page]:
        names = re.findall(r"`([\w/]+\.json)`", block.before)
        if block.language == "json" and names and "training" not in json.loads(block.text):
            content = json.loads(block.text)
            Path(names[-1]).write_text(json.dumps({k: 1 if k.endswith("_epochs") else v for k, v in content.items()}))


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_PAGES)
def test_commands_of_a_page(page: str, sources: Callable[[str], None]) -> None:
    sources(page)
    write_files(page)
    for block, command in COMMANDS[page]:
        if is_marked(page, command):
            continue
        output = run(command)
        following = BLOCKS[page][BLOCKS[page].index(block) + 1 :][:1]
        last = command == [text for other, text in COMMANDS[page] if other is block][-1]
        if following and following[0].language == "text" and last:
            for line in following[0].text.splitlines():
                assert said(flat(line)).search(flat(output)), f"{line!r} is not in\n{output}"
            assert "exit status 1" in output
        elif command.startswith("segbundles"):
            assert output.endswith("exit status 0"), output
    for folder in ("masks", "results"):
        if any(f"--output_dir {folder}" in command for _, command in COMMANDS[page]):
            assert list(Path(folder).glob("*.csv"))
    if page == "docs/edit_the_json.md":
        assert {"dice_1", "dice_2"} <= table(Path("results_of_three/metrics.csv"))[0].keys()
        assert torch.load("output/long/training.ckpt", weights_only=True)["trainer"]["epoch"] == 2


class TestPages:
    def test_every_mark_is_of_a_command(self) -> None:
        for page, start, reason in MARKED:
            assert any(text.startswith(start) for _, text in COMMANDS[page]), (page, start)
            for path in re.findall(r"tests/\S+\.py", reason):
                source = (ROOT / path).read_text()
                assert start != "torchrun" or re.search(r"torchrun|torch\.distributed\.run", source), path

    def test_a_command_that_nobody_knows_fails(self) -> None:
        with pytest.raises(AssertionError, match="say in MARKED what it needs: docker run"):
            run("docker run segbundles")

    def test_every_page_is_linked_from_the_readme(self) -> None:
        linked = set(re.findall(r"\]\((docs/\w+\.md)\)", PAGES["README.md"].read_text()))
        assert linked == set(PAGES) - {"README.md"}

    @pytest.mark.parametrize("page", PAGES)
    def test_links_lead_somewhere(self, page: str) -> None:
        for link in re.findall(r"\]\((?!http)([^)#]+)", PAGES[page].read_text()):
            assert (PAGES[page].parent / link).exists(), link
        for path in re.findall(r"`((?:bundles|common|tests|benchmarks)/[\w/]+\.\w+)`", PAGES[page].read_text()):
            assert (ROOT / path).exists(), path


class TestMessages:
    """The tables of messages."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("bundle", "task"),
        [("left_atrium_vnet", "training"), ("left_atrium_vnet", "inference"), ("brain_flair_unet", "training")],
    )
    def test_of_knobs(
        self, bundle: str, task: str, place: Path, left_atrium_phantom: Path, brain_phantom: Path
    ) -> None:
        root = make_bundle(place, bundle).relative_to(place)
        copy_scan(left_atrium_phantom / "Training Set", place / "scans")
        data = {"left_atrium_vnet": left_atrium_phantom, "brain_flair_unet": brain_phantom}[bundle]
        command = f"python -m monai.bundle run training --bundle_root {root} --config_file {root}/configs/train.json"
        if task == "inference":
            command = command.replace("run training", "run inferring").replace("train.json", "inference.json")
            command, data = f"{command} --output_dir masks", "scans"
        told = rows(EDIT, f"`{bundle}`, {task}")
        assert len(told) >= 2
        for option, message in told:
            with pytest.raises(Exception) as caught:  # noqa: PT011 - MONAI's; its cause is compared
                command_line(f"{command} --dataset_dir '{data}' {option.strip('`')}")
            assert said(message).fullmatch(str(caught.value)), f"{option}: {caught.value}"

    def test_of_old_names(self) -> None:
        for bundle, old, new in rows(EDIT, "bundle | old name | new name"):
            bundles = TINY if bundle == "all" else [bundle.strip("`")]
            for name in bundles:
                former = former_names(read_schema(ROOT / "bundles" / name))
                assert new.startswith(f"`{former[old.strip('`')]}`"), (name, old)

    def test_of_a_file_that_is_not_valid_json(self, tmp_path: Path) -> None:
        (tmp_path / "train.json").write_text('{"max_epochs": 1,\n}')
        with pytest.raises(json.JSONDecodeError, match="line 2"):
            ConfigParser().read_config(str(tmp_path / "train.json"))

    @pytest.mark.slow
    def test_of_a_list_by_hand(self, place: Path) -> None:
        make_bundle(place, "left_atrium_vnet")
        root = "bundles/left_atrium_vnet"
        command = f"python -m monai.bundle run training --bundle_root {root} --config_file {root}/configs/train.json"
        for fault, message in rows(OWN, "fault"):
            shutil.rmtree(place / "data", ignore_errors=True)
            self.write_case(fault)
            with pytest.raises(Exception) as caught:  # noqa: PT011 - MONAI's; its cause is compared
                command_line(f"{command} --dataset_dir data")
            assert said(message).fullmatch(str(caught.value)), f"{fault}: {caught.value}"

    @staticmethod
    def write_case(fault: str) -> None:
        image = np.random.default_rng(0).normal(size=(20, 20, 10)).astype(np.float32)
        label = np.zeros((20, 20, 9 if fault == "different sizes" else 10), np.uint8)
        label[5:9, 5:9, 3:6] = 7 if fault == "other label values" else 1
        moved = np.eye(4)
        moved[2, 3] = 3 if fault == "different positions" else 0
        entry = {"image": "images/a.nii.gz", "label": "labels/a.nii.gz"}
        for key, array, affine in (("image", image * (fault != "empty image"), np.eye(4)), ("label", label, moved)):
            path = Path("data", entry[key])
            path.parent.mkdir(parents=True)
            nib.save(nib.Nifti1Image(array, affine), path)
        splits = {"training": [entry]}
        if fault == "missing file":
            Path("data", entry["image"]).unlink()
        if fault == "validation without labels":
            splits["validation"] = [{"image": entry["image"]}]
        Path("data", "datalist.json").write_text(json.dumps(splits))


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_datalist_of_the_page_is_trained_on(name: str, place: Path) -> None:
    (text,) = (
        block.text
        for block in BLOCKS["docs/own_data.md"]
        if block.language == "json" and re.findall(r"`(\w+_\w+)`", block.before)[:1] == [name]
    )
    (place / "data").mkdir()
    (place / "data" / "datalist.json").write_text(text)
    rng = np.random.default_rng(0)
    for entry in (entry for entries in json.loads(text).values() for entry in entries):
        for key in ("image", "label"):
            for file in entry[key] if isinstance(entry[key], list) else [entry[key]]:
                write_synthetic(place / "data" / file, rng, key == "label", entry)
    root = make_bundle(place, name)
    command = f"python -m monai.bundle run training --bundle_root {root} --config_file {root}/configs/train.json"
    run(f"{command} --dataset_dir data")
    assert (root / "output" / "training.ckpt").is_file()


def write_synthetic(path: Path, rng: np.random.Generator, is_label: bool, entry: dict) -> None:
    """Write noise, or a label with a square of foreground, in the format of the file's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = path.suffix in (".gz", ".nrrd")
    shape = (48, 48, 24) if volume else (64, 64)
    label = np.zeros(shape, np.uint8)
    label[16:40, 16:40] = 1
    pixels = label * (1 if volume else 255) if is_label else rng.integers(0, 255, shape).astype(np.uint8)
    if path.suffix == ".gz":
        nib.save(nib.Nifti1Image(pixels, np.diag([4.0, 4, 4, 1])), path)
    elif path.suffix == ".nrrd":
        sitk.WriteImage(sitk.GetImageFromArray(pixels.T), str(path))
    elif "page" in entry:
        tifffile.imwrite(path, np.stack([pixels] * 4), photometric="minisblack")
    elif path.suffix == ".tif":
        colour = pixels if is_label else rng.integers(0, 255, (*shape, 3)).astype(np.uint8)
        tifffile.imwrite(path, colour, photometric="minisblack" if is_label else "rgb")
    else:
        Image.fromarray(pixels).save(path)
