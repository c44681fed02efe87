"""Several processes give the same results as one: with a stand-in, and with torchrun as in docs/scale_out.md."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bundle_runs import ROOT, BundleRuns, table
from ignite.engine import Engine
from monai.data import Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from process_group import Group
from tiny_bundles import TINY_BUNDLES

from segbundles.data import SharedDataLoader, TolerantDataLoader, validation_sampler
from segbundles.engines import ImageReport
from segbundles.errors import InputError
from segbundles.handlers import EpochLog, EvaluationReport, InferenceResults
from segbundles.scorers import SliceScorer

PAGE = (ROOT / "docs" / "scale_out.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_loaders_share_out_and_the_last_may_have_nothing(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, images = Dataset([{"n": k} for k in range(3)]), Dataset([{"image": str(k)} for k in range(3)])
    shared, tolerant, asked = [], [], []
    for _ in Group(monkeypatch, count).each():
        loader = SharedDataLoader(numbers)
        assert not hasattr(loader, "__len__")
        shared.append([int(batch["n"]) for batch in loader])
        loader = TolerantDataLoader(images)
        loader.skip = lambda files: asked.append(files) or files == ("1",)
        tolerant.append([batch["image"][0] for batch in loader])
    assert sorted(chain(*shared)) == [0, 1, 2]
    assert len(shared[0]) == {1: 3, 2: 1, 4: 0}[count]
    assert sorted(chain(*tolerant)) == ["0", "2"]
    assert sorted(asked) == [("0",), ("1",), ("2",)]


def test_validation_without_a_case_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in Group(monkeypatch, 3).each():
        assert len(validation_sampler(Dataset([]))) == 0
        assert len(validation_sampler(Dataset([1] * 5))) in (1, 2)
        with pytest.raises(ValueError, match=r"^2 validation cases cannot be shared by 3 processes: start at most 2 "):
            validation_sampler(Dataset([1, 2]))


def volume(file: str, end: int, **more: str) -> dict[str, Any]:
    """Return a volume whose bright half will be predicted, with a truth of ``end`` planes."""
    image, label = torch.zeros(1, 6, 6, 4), torch.zeros(1, 6, 6, 4)
    image[:, :3], label[:, :end] = 1, 1
    meta = {"filename_or_obj": file}
    return {"image": MetaTensor(image, meta=meta), "label": MetaTensor(label, meta=meta), **more}


# names that clash, also with those of other processes
CASES = [
    *(volume("d/p/a.nii.gz", 3), volume("e/p/a.nii.gz", 2), volume("d/q/b.nii.gz", 0, case="b")),
    *(volume("e/p/a.nii.gz", 4), volume("d/q/c.nii.gz", 5, case="b")),
]


def report(folder: Path, cases: list, figures: bool = True) -> None:
    handler = EvaluationReport(folder, SliceScorer(), figures=figures)
    network = torch.nn.Identity()
    loader = SharedDataLoader(Dataset(cases))
    post = lambda item: {**item, "pred": (item["pred"] > 0.5).float()}  # noqa: E731
    SupervisedEvaluator("cpu", loader, network, postprocessing=post, val_handlers=[handler]).run()


@pytest.mark.parametrize(("count", "figures"), [(2, False), (7, True)])
def test_a_report_is_the_same_from_several_processes(
    count: int, figures: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report(tmp_path / "one", CASES, figures)
    for rank in Group(monkeypatch, count).each():
        report(tmp_path / "several", CASES, figures)
        assert any((tmp_path / "several").iterdir()) == (rank == 0)
    names = ["p/a", "e/p/a.nii.gz", "b", "e/p/a.nii.gz (4)", "d/q/c.nii.gz"]
    assert [row["case"] for row in table(tmp_path / "several" / "metrics.csv")] == names
    assert {row["case"] for row in table(tmp_path / "several" / "slices.csv")} == set(names)
    same_files(tmp_path / "one", tmp_path / "several", 4)


def same_files(one: Path, several: Path, count: int) -> None:
    files, others = (
        sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file() and path.suffix != ".log")
        for out in (one, several)
    )
    assert files == others
    assert len([file for file in files if file.parts[0] != "report"]) == count
    for file in files:
        # these contain times, the command and the folders
        if file.name != "inference.csv" and not file.name.endswith(".config.json"):
            # so do the ends of a report and of a summary
            varying = rb'(?s)Written [^<]+|<section id="settings">.*</section>|"seconds": [\d.]+|[\d.]+ s<|"run": {.*'
            contents = (re.sub(varying, b"", (out / file).read_bytes()) for out in (one, several))
            assert next(contents) == next(contents), file


def fail_to_segment(results: InferenceResults, file: Path) -> None:
    results.add(SimpleNamespace(state=SimpleNamespace(report=ImageReport([str(file)], 0.0, reason="bad"))))


def test_the_table_of_an_inference_has_all_rows_and_the_first_process_reports_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(lambda *_: None)
    engine.data_loader = SimpleNamespace(dataset=[])
    for rank in Group(monkeypatch, 3).each():
        results = InferenceResults(tmp_path)
        results.start(engine)
        if rank:
            fail_to_segment(results, tmp_path / f"{rank}.png")
            results.finish(engine)
            assert not results.path.exists()
    with pytest.raises(ValueError, match=r"^2 of 2 images failed"):
        results.finish(engine)
    assert [row["file"] for row in table(tmp_path / "inference.csv")] == [f"{tmp_path}/1.png", f"{tmp_path}/2.png"]


def test_a_process_that_fails_waits_for_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the stand-in, gathering in the first process alone would be an error of its own."""
    group, engine = Group(monkeypatch, 2), Engine(lambda *_: None)
    engine.data_loader = SimpleNamespace(dataset=[])
    for group.rank in (0, 1):
        results = InferenceResults(tmp_path / str(group.rank))
        results.start(engine)
        fail_to_segment(results, tmp_path / "a.png")
        results.stop(engine, KeyError("stopped"))
        assert results.path.is_file() == (group.rank == 0)


def test_the_line_of_an_epoch_has_the_loss_of_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "segbundles")
    engine = SimpleNamespace(state=SimpleNamespace(epoch=1, max_epochs=1, output=None))
    for rank in Group(monkeypatch, 2).each():
        log = EpochLog(lambda _, loss=rank: {"loss": 1.0 + loss})
        log.begin(SimpleNamespace(state=SimpleNamespace(epoch=0)))
        log.begin_epoch(engine)
        log.after_iteration(engine)
        log.after_epoch(engine)
    (message,) = caplog.messages
    assert "loss 1.5000" in message


SGD = {"_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": 0.01}
# nothing random, and nothing pooled over a batch: two halves of a batch must give the same as the whole
COMMON = {"amp": False, "device": "cpu", "lr_epochs": 30, "optimizer": SGD, "base_channels": 2}


@dataclass(frozen=True)
class Scaled:
    """A bundle made small, without anything that depends on how a batch is divided.

    Args:
        name: folder under ``bundles``.
        phantom: module with its data, under ``segbundles.phantoms``.
        model: settings of the network and its input; evaluation and inference take them from the facts.
        training: other settings of the training.
        batch: number of training items, all in one step of one process.
        metric: metric of validation that is not 0 here.
        files: number of files that an evaluation writes.
    """

    name: str
    phantom: str
    model: dict[str, Any]
    training: dict[str, Any]
    batch: int
    metric: str
    files: int = 5


BOTH = {"keys": ["image", "label"]}
FLOAT = {"_target_": "CastToTyped", **BOTH, "dtype": "$torch.float32"}
SCALED = (
    Scaled(
        "left_atrium_vnet",
        "left_atrium",
        {"network_spacing_mm": [6.0, 6.0, 6.0]},
        {
            "patch_size": [16, 16, 16],
            "loss::region_loss::batch": False,
            "train::random_transforms": [
                {"_target_": "ResizeWithPadOrCropd", **BOTH, "spatial_size": "@patch_size", "mode": "edge"}
            ],
        },
        4,
        "val_mean_dice",
    ),
    Scaled(
        "brain_flair_unet",
        "brain",
        {"depth": 3, "norm": "instance"},
        {
            "patch_size": [32, 32],
            "weighted_slices": False,
            "loss::batch": False,
            "train::random_transforms": [FLOAT],
        },
        26,
        "val_mean_dice",
        6,
    ),
    Scaled(
        "em_membrane_unet",
        "em",
        {"depth": 3, "border_pixels": 8, "norm": "instance"},
        {
            "patch_size": [32, 32],
            "patches_per_section": 1,
            "train::random_transforms": [
                FLOAT,
                {"_target_": "CenterSpatialCropd", **BOTH, "roi_size": "@patch_size"},
            ],
        },
        4,
        "val_pixel_accuracy",
        6,
    ),
    Scaled(
        "polyp_fcn8",
        "polyp",
        {"fc_channels": 4, "fc_kernel_size": 3, "frame_height": 48, "dropout": 0.0, "norm": None},
        {
            "patch_size": [32, 32],
            "optimizer": {**SGD, "lr": 1e-4},  # without any norm
            "dice_weight": 0.0,
            "train::random_transforms": [
                FLOAT,
                {"_target_": "CenterSpatialCropd", **BOTH, "roi_size": "@patch_size"},
            ],
        },
        4,
        "val_mean_jaccard",
        6,
    ),
)
# of evaluation and inference; window_size also of validation
APPLIED = {
    "left_atrium_vnet": {"use_locator": False, "largest_component": False},
    "brain_flair_unet": {"largest_component": False},
    "em_membrane_unet": {"mirror_axes": [], "quarter_turns": False},
}
WINDOW = {"brain_flair_unet": {"window_size": [32, 32]}, "em_membrane_unet": {"window_size": [32, 32]}}


PHANTOMS: dict[str, tuple[Any, ...]] = {
    "left_atrium": ((64, 64, 32), (3.0, 3.0, 3.0)),
    "brain": ((32, 32), 6),
    "em": ((64, 80),),
    "polyp": ((64, 48),),
}


def make_phantom(name: str, out: Path) -> Path:
    """Write a prepared phantom of eight cases, enough for the splits of :func:`write_datalist`."""
    frames = (1,) if name == "polyp" else ()
    import_module(f"segbundles.phantoms.{name}").make_phantom(out, 8, *frames, 0, *PHANTOMS[name])
    return out


def free_port() -> int:
    """Return a port below those that systems give to other programs, which may need one before this is used."""
    while True:
        with socket.socket() as server, suppress(OSError):
            server.bind(("localhost", random.SystemRandom().randrange(20000, 32000)))
            return server.getsockname()[1]


def write_datalist(source: Path, out: Path) -> None:
    """Write a list of four cases for training, three for validation and one for testing; images stay in place."""
    splits = json.loads((source / "datalist.json").read_text())
    cases: dict[str, list[dict]] = {}
    for number, entry in enumerate(chain(*(splits[s] for s in ("training", "validation", "testing")))):
        # the slices of a patient are one case
        group = str(entry["group"]) if "slice" in entry else str(number)
        files = {key: str(source / entry[key]) for key in ("image", "label")}
        cases.setdefault(group, []).append({**entry, **files, "group": group})
    chosen = {"training": slice(4), "validation": slice(4, 7), "testing": slice(7, 8)}
    out.mkdir(parents=True)
    text = json.dumps({split: [*chain(*[*cases.values()][part])] for split, part in chosen.items()})
    (out / "datalist.json").write_text(text)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Scene:
    """Runs of the four bundles in one process and in two, into ``<bundle>/one`` and ``<bundle>/two``.

    Evaluation and inference use the weights that two processes have trained, with their facts.
    """

    def __init__(self, folder: Path, phantoms: Path) -> None:
        self.folder = folder
        self.jobs: list[dict[str, Any]] = []
        for bundle in SCALED:
            self._write_data(bundle, make_phantom(bundle.phantom, phantoms / bundle.phantom))
            self._write_weights(bundle)
            for run_id, files in PATCHED.items():
                self._add(run_id, bundle, run_id, files, **self.settings(bundle, run_id, "two"))
        atrium, brain, _, polyp = SCALED
        locator = {key: COMMON[key] for key in ("amp", "device", "optimizer")} | {
            "max_epochs": 1,
            "lr_epochs": 1,
            "val_interval": 1,
        }
        locator |= {"locator_base_channels": 2, "locator_spacing_mm": [8.0] * 3, "locator_patch_size": [32, 32, 16]}
        locator |= {"output_dir": str(folder / "locator"), "ckpt_dir": str(folder / "locator")}
        locator["dataset_dir"] = str(folder / atrium.name / "data")
        self._add("locator", atrium, "training", ["train_locator.json", "multi_gpu_train.json"], **locator)
        # with random patches, stopped after one epoch and resumed
        drawn = {**self.settings(brain, "training", "two"), "batch_size": 2, "patch_size": [16, 16]}
        del drawn["train::random_transforms"], drawn["weighted_slices"]
        for name, more in {"unstopped": {}, "first": {"max_epochs": 1}, "resumed": {"resume": True}}.items():
            out = {
                "output_dir": str(folder / ("unstopped" if name == "unstopped" else "stopped")),
                "slices_per_epoch": 8,
            }
            out["ckpt_dir"] = out["output_dir"]
            self._add(name, brain, "training", PATCHED["training"], **{**drawn, **out, **more})
        # one process has no case, and some images are done again
        testing = {**self.settings(polyp, "evaluating", "two"), "split": "testing", "output_dir": str(folder / "few")}
        self._add("few", polyp, "evaluating", PATCHED["evaluating"], **testing)
        again = {**self.settings(polyp, "inferring", "two"), "skip_finished": True, "output_dir": str(folder / "again")}
        for name in ("before", "again"):
            self._add(name, polyp, "inferring", PATCHED["inferring"], **again)
        masks = [path.with_name(f"{path.stem}_seg.png") for path in self.scans(polyp)[:2]]
        self.removed = [folder / "again" / path.relative_to(folder / polyp.name / "scans") for path in masks]
        self.jobs[-1]["remove"] = [str(path) for path in self.removed]
        # the second of three cases is bad: one process fails while the other waits for it
        cases = json.loads((folder / polyp.name / "data" / "datalist.json").read_text())
        cases["validation"][1]["image"] = str(folder / polyp.name / "scans" / "bad" / "bad.tif")
        (folder / "spoilt").mkdir()
        (folder / "spoilt" / "datalist.json").write_text(json.dumps(cases))
        spoilt = {"dataset_dir": str(folder / "spoilt"), "output_dir": str(folder / "fails")}
        spoilt = self.settings(polyp, "evaluating", "two") | spoilt
        self._add("fails", polyp, "evaluating", PATCHED["evaluating"], **spoilt)
        self._run()

    def scans(self, bundle: Scaled) -> list[Path]:
        """Return the good images to segment."""
        root = self.folder / bundle.name / "scans"
        return sorted(path for path in root.rglob("*") if path.is_file() and path.parent.name != "bad")

    def _write_data(self, bundle: Scaled, phantom: Path) -> None:
        root = self.folder / bundle.name
        root.mkdir()
        write_datalist(phantom, root / "data")
        cases = json.loads((root / "data" / "datalist.json").read_text())["training"]
        for path in {Path(case["image"]) for case in cases}:
            target = root / "scans" / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        (root / "scans" / "bad").mkdir()
        (root / "scans" / "bad" / f"bad{path.suffix}").write_bytes(b"no image")

    def _write_weights(self, bundle: Scaled) -> None:
        """Write weights that find foreground in about half of an image, so that there is something to score."""
        (tiny,) = (tiny for tiny in TINY_BUNDLES if tiny.name == bundle.name)
        known = BundleRuns(bundle.name, {}, {}).config("inference.json")
        settings = {key: value for key, value in {**COMMON, **bundle.model}.items() if key in known}
        path = self.folder / bundle.name / "initial.pt"
        tiny.make_weights(ROOT / "bundles" / bundle.name, "network_def", path, **settings)

    def settings(self, bundle: Scaled, run_id: str, to: str) -> dict[str, Any]:
        """Return the settings of a run that writes to ``<bundle>/<to>``."""
        root = self.folder / bundle.name
        known = BundleRuns(bundle.name, {}, {}).config("inference.json" if run_id == "inferring" else "train.json")
        model = bundle.model if run_id == "training" else {}
        settings = {k: v for k, v in {**COMMON, **model, **WINDOW.get(bundle.name, {})}.items() if k in known}
        if run_id != "training":
            del settings["base_channels"]
        settings |= {"output_dir": str(root / to / run_id), "ckpt_dir": str(root / "two" / "models")}
        settings |= {"dataset_dir": str(root / ("scans" if run_id == "inferring" else "data"))}
        if run_id != "training":
            return {**settings, **APPLIED.get(bundle.name, {})}
        batch = bundle.batch // (2 if to == "two" else 1)
        settings |= {**bundle.training, "max_epochs": 2, "val_interval": 1, "batch_size": batch}
        settings["initial_weights"] = str(root / "initial.pt")
        return {**settings, "ckpt_dir": str(root / to / "models")}

    def _add(self, name: str, bundle: Scaled, run_id: str, files: list[str], **settings: Any) -> None:
        root = BundleRuns(bundle.name, {}, {}).root
        words = {key: "null" if value is None else value for key, value in settings.items()}
        job = {"name": f"{bundle.name} {name}", "port": free_port(), "run_id": run_id, "bundle_root": str(root)}
        paths = [str(root / "configs" / file) for file in files]
        self.jobs.append({**job, "config_file": paths, "remove": [], **words})

    def _run(self) -> None:
        (self.folder / "jobs.json").write_text(json.dumps(self.jobs))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += [str(ROOT / "tests" / "bundles" / "processes.py"), str(self.folder / "jobs.json")]
        self.one: dict[str, list[str]] = {}
        with (self.folder / "log").open("w") as log:
            two = subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT)
            try:
                for bundle in SCALED:
                    self.one[bundle.name] = self._run_one(bundle, "training", ["train.json"])
                code = two.wait(timeout=900)
            finally:
                two.kill()
        self.log = (self.folder / "log").read_text()
        self.errors = {path.stem: path.read_text() for path in self.folder.glob("*.error")}
        assert "polyp_fcn8 fails.1" in self.errors, f"{self.errors}\n{self.log[-6000:]}"
        self.code = code
        for bundle in SCALED:
            self._run_one(bundle, "evaluating", ["train.json", "evaluate.json"])
            with pytest.raises(InputError):
                self._run_one(bundle, "inferring", ["inference.json"])

    def _run_one(self, bundle: Scaled, run_id: str, files: list[str]) -> list[str]:
        """Run in this process, and return its log."""
        runs = BundleRuns(bundle.name, {}, {})
        logger, lines = logging.getLogger("segbundles"), Lines()
        logger.addHandler(lines)
        logger.setLevel(logging.INFO)
        try:
            runs.run(run_id, [str(runs.configs / file) for file in files], **self.settings(bundle, run_id, "one"))
        finally:
            logger.removeHandler(lines)
        return lines.messages


class Lines(logging.Handler):
    """Keep the messages that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


PATCHED = {
    "training": ["train.json", "multi_gpu_train.json"],
    "evaluating": ["train.json", "evaluate.json", "multi_gpu_evaluate.json"],
    "inferring": ["inference.json", "multi_gpu_inference.json"],
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scale_out"), tmp_path_factory.mktemp("phantoms"))


def numbers(line: str) -> dict[str, float]:
    """Return the values in the line of an epoch."""
    return {name: float(value) for name, value in re.findall(r"(\w+) (\d+\.\d{4})", line)}


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "training.ckpt", weights_only=True)


@pytest.mark.slow
class TestTwoProcesses:
    @pytest.mark.parametrize("bundle", SCALED, ids=lambda bundle: bundle.name)
    def test_they_learn_what_one_learns_from_the_doubled_batch(self, bundle: Scaled, scene: Scene) -> None:
        """Compare loss and validation metric of each epoch, and the weights."""
        root = scene.folder / bundle.name
        of_one = [line for line in scene.one[bundle.name] if line.startswith("epoch ")]
        lines = [line for line in scene.log.splitlines() if " epoch " in line]
        first = 2 * SCALED.index(bundle)
        for epoch, (one, two) in enumerate(zip(of_one, lines[first : first + 2], strict=True), 1):
            assert f"epoch {epoch}/2" in one
            assert f"epoch {epoch}/2" in two
            assert {"train_loss", bundle.metric} <= numbers(one).keys()
            assert numbers(one)[bundle.metric] > 0.01
            for name, value in numbers(one).items():
                assert numbers(two)[name] == pytest.approx(value, rel=2e-3, abs=1.01e-4), name
        assert numbers(of_one[0])["train_loss"] != numbers(of_one[1])["train_loss"]
        one, two = (state(root / to / "training") for to in ("one", "two"))
        assert one["trainer"]["iteration"] == two["trainer"]["iteration"] == 2  # all items are in one step per epoch
        for name, value in one["network"].items():
            torch.testing.assert_close(two["network"][name], value, atol=1e-5, rtol=1e-4, msg=name)
        assert two["evaluator"]["best_metric"] == pytest.approx(one["evaluator"]["best_metric"], abs=1e-3)

    @pytest.mark.parametrize("bundle", SCALED, ids=lambda bundle: bundle.name)
    def test_they_evaluate_to_the_files_of_one(self, bundle: Scaled, scene: Scene) -> None:
        root = scene.folder / bundle.name
        same_files(root / "one" / "evaluating", root / "two" / "evaluating", bundle.files)
        rows = table(root / "two" / "evaluating" / "metrics.csv")
        assert len({row["case"] for row in rows}) == 3
        page = (root / "two" / "evaluating" / "report.html").read_text()
        assert page.count('<img src="data:image/jpeg') == 3

    @pytest.mark.parametrize("bundle", SCALED, ids=lambda bundle: bundle.name)
    def test_they_segment_every_image_once(self, bundle: Scaled, scene: Scene) -> None:
        root = scene.folder / bundle.name
        one, two = ([*map(untimed, table(root / to / "inferring" / "inference.csv"))] for to in ("one", "two"))
        assert one == two
        statuses = [row["status"] for row in two]
        images = len(scene.scans(bundle))
        assert (statuses.count("ok"), statuses.count("failed")) == (images, 1)
        same_files(
            root / "one" / "inferring", root / "two" / "inferring", 4 + images * (1 + 2 * (bundle.name[:2] == "em"))
        )
        assert scene.errors[f"{bundle.name} inferring.0"].startswith(f"1 of {images + 1} images failed: bad/bad.")

    def test_only_the_first_one_reports_failures(self, scene: Scene) -> None:
        names = {f"{bundle.name} inferring.0" for bundle in SCALED}
        names |= {"polyp_fcn8 before.0", "polyp_fcn8 again.0"}
        assert {name for name in scene.errors if " fails." not in name} == names

    def test_all_end_when_one_of_them_fails(self, scene: Scene) -> None:
        assert scene.code != 0
        assert "bad.tif: it is truncated or damaged" in scene.errors["polyp_fcn8 fails.1"]
        assert not (scene.folder / "fails" / "metrics.csv").exists()

    def test_only_the_first_one_logs_epochs(self, scene: Scene) -> None:
        trainings = [job for job in scene.jobs if job["run_id"] == "training"]
        assert sum(" epoch 2/2" in line for line in scene.log.splitlines()) == len(trainings) - 2
        assert (scene.folder / "locator" / "locator.pt").is_file()
        events = list((scene.folder / "polyp_fcn8" / "two" / "training" / "tensorboard").rglob("events*"))
        assert len(events) == 1

    def test_only_the_first_one_tells_what_the_facts_say(self, scene: Scene) -> None:
        runs = [job for job in scene.jobs if job["run_id"] != "training"]
        assert scene.log.count("Weights model.pt, ") == len(runs)

    def test_a_resumed_training_equals_one_that_was_never_stopped(self, scene: Scene) -> None:
        unstopped, resumed = (state(scene.folder / name) for name in ("unstopped", "stopped"))
        assert resumed["trainer"]["iteration"] == unstopped["trainer"]["iteration"] == 4
        for name, value in unstopped["network"].items():
            assert torch.equal(resumed["network"][name], value), name

    def test_there_can_be_fewer_cases_than_processes(self, scene: Scene) -> None:
        (row,) = table(scene.folder / "few" / "metrics.csv")
        entries = json.loads((scene.folder / "polyp_fcn8" / "data" / "datalist.json").read_text())
        assert row["case"] == entries["testing"][0]["case"]

    def test_finished_images_are_skipped(self, scene: Scene) -> None:
        rows = {row["file"]: row for row in table(scene.folder / "again" / "inference.csv")}
        images = [path.relative_to(scene.folder / "polyp_fcn8" / "scans") for path in scene.scans(SCALED[3])]
        assert {file: row["status"] for file, row in rows.items()} == {
            f"bad/bad{images[0].suffix}": "failed",
            **{path.as_posix(): "ok" for path in images},
        }
        notes = [rows[path.as_posix()]["notes"] for path in images]
        assert notes == ["", "", *["finished before"] * (len(images) - 2)]
        assert all(path.is_file() for path in scene.removed)


def untimed(row: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in row.items() if key != "seconds"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a folder in which the commands of the page run, with a small brain bundle, data and scans."""
    small = {"base_channels": 2, "depth": 3, "patch_size": [32, 32], "window_size": [32, 32], "max_epochs": 1}
    small |= {"lr_epochs": 1, "amp": False, "device": "cpu", "slices_per_epoch": 8, "batch_size": 2}
    source = ROOT / "bundles" / "brain_flair_unet"
    shutil.copytree(source / "configs", tmp_path / "bundles" / "brain_flair_unet" / "configs")
    for path in (tmp_path / "bundles" / "brain_flair_unet" / "configs").glob("*.json"):
        config = json.loads(path.read_text())
        if not path.stem.startswith("multi_gpu"):
            path.write_text(json.dumps({key: small.get(key, value) for key, value in config.items()}))
    (tmp_path / "bundles" / "brain_flair_unet" / "models").mkdir()
    write_datalist(make_phantom("brain", tmp_path / "phantom"), tmp_path / "data" / "brain")
    for case in json.loads((tmp_path / "data" / "brain" / "datalist.json").read_text())["validation"]:
        image = Path(case["image"])
        (tmp_path / "scans" / image.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, tmp_path / "scans" / image.parent.name)
    return tmp_path


def shell(place: Path, *lines: str, at_once: int = 1) -> list[subprocess.CompletedProcess]:
    """Run some lines in bash, several times at once."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # variables that Slurm sets for every process of the one task per node
    env = {**environment(), "PATH": path, "SLURM_JOB_ID": "1", "SLURM_LOCALID": "0"}
    started = [
        subprocess.Popen(["bash", "-c", "\n".join(lines)], cwd=place, env=env, stdout=-1, stderr=-2, text=True)
        for _ in range(at_once)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in started]
    return [
        subprocess.CompletedProcess(p.args, p.returncode, output) for p, output in zip(started, outputs, strict=True)
    ]


@pytest.mark.slow
def test_the_commands_of_the_page_run(place: Path) -> None:
    """Train on one node, evaluate on two (both on this machine), and segment images of which one is bad."""
    one_node, commands, several_nodes, _, _, again = BLOCKS
    train, evaluate, _ = commands.splitlines()
    (done,) = shell(place, one_node, train)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("epoch 1/1") == 1
    assert (place / "bundles/brain_flair_unet/models/model.pt").is_file()

    assert "--nproc_per_node=4" in several_nodes
    assert ":29400" in several_nodes
    nodes = several_nodes.replace("per_node=4", "per_node=1").replace("29400", str(free_port()))
    for done in shell(place, "HEAD=localhost", one_node, nodes, evaluate, at_once=2):
        assert done.returncode == 0, done.stdout[-3000:]
    assert len(table(place / "results" / "metrics.csv")) == 3

    images = sorted((place / "scans").rglob("*.tif"))
    images[-1].write_bytes(b"no image")
    (done,) = shell(place, one_node, again)
    assert done.returncode == 1
    assert f"1 of {len(images)} images failed: " in done.stdout
    rows = table(place / "masks" / "inference.csv")
    assert [row["status"] for row in rows].count("failed") == 1
    assert len(rows) == len(images) == len(list((place / "masks").rglob("*_seg.png"))) + 1


def test_the_slurm_scripts_are_valid_bash() -> None:
    scripts = [block for block in BLOCKS if "#SBATCH" in block]
    assert len(scripts) == 2
    for script in scripts:
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("task", "part"), [(0, "a"), (1, "b c")])
def test_a_task_of_an_array_segments_its_folder(task: int, part: str, tmp_path: Path) -> None:
    """With a ``segbundles`` that only says what it was given."""
    script = next(block for block in BLOCKS if "SLURM_ARRAY_TASK_ID" in block)
    for name in ("a", "b c"):
        (tmp_path / "scans" / name).mkdir(parents=True)
    shown = "segbundles() { printf '%s\\n' \"$@\"; }\nsource() { :; }\n"
    env = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task)}
    done = subprocess.run(
        ["bash", "-c", shown + script], cwd=tmp_path, env=env, text=True, capture_output=True, check=True
    )
    words = ["segment", "brain_flair_unet", f"scans/{part}", f"masks/{part}", "--skip_finished", "true"]
    assert done.stdout.splitlines() == words


def test_results_know_all_outputs_of_an_image() -> None:
    """Otherwise ``skip_finished`` would skip images of which an output is missing."""
    for path in ROOT.glob("bundles/*/configs/inference.json"):
        config = json.loads(path.read_text())
        wanted = ("SaveSegmentationd", "SaveProbabilitiesd")
        saved = [t for t in config["postprocessing"]["transforms"] if t["_target_"].endswith(wanted)]
        (results,) = (h for h in config["handlers"] if h["_target_"].endswith("InferenceResults"))
        postfixes = [transform.get("output_postfix", "seg") for transform in saved[:-1]]
        assert results["postfixes"] == (
            f"${postfixes} + ['prob'] * @save_probabilities + ['uncertainty'] * @save_uncertainty"
        ), path
