"""What every bundle does around its network: one tiny training per bundle, and what follows from it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import BundleRuns, table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_trainings import TINY_TRAININGS, TinyTraining
from toy_run import assert_equal

from segbundles.errors import InputError
from segbundles.facts import read_facts, sha256
from segbundles.knobs import fact_knobs, read_schema

EPOCHS = {"max_epochs": 2, "lr_epochs": 2}
# random numbers, terms of the loss and counters that a resumed run must continue, and facts that differ from the config
COMMON = {"dropout": 0.1, "early_stop_patience": 9}
OWN: dict[str, dict[str, Any]] = {
    "left_atrium_vnet": {
        "boundary_weight": 0.5,
        "boundary_epochs": 2,
        "attention": "sequential",
        "elastic_probability": 0.5,
    },
    "brain_flair_unet": {"intensity_normalization": "slice"},
}
# a fact of the pre-processing (the EM bundle's only one belongs to another network), and a value that contradicts it
PREPROCESSING = {
    "left_atrium_vnet": ("network_spacing_mm", [7.0, 9.0, 6.0]),
    "brain_flair_unet": ("intensity_normalization", "volume"),
    "polyp_fcn8": ("frame_height", 32),
}
SHIPPED = b"weights that came with the bundle"
SHORT = "the learning rate reaches 0 after 2 epochs, this run takes 3: set lr_epochs to 3, like max_epochs."


@dataclass
class Made:
    """A bundle, its phantom, and a training of two epochs into a folder with shipped weights.

    Args:
        tiny: the bundle and its tiny settings.
        runs: commands of the bundle; evaluation and inference are given no fact of the weights.
        data: prepared phantom.
        out: output of the training, with ``models``.
        pair: folder with the same image twice, ``a/`` and ``b/``.
        facts: values of the knobs that are facts of the weights.
    """

    tiny: TinyTraining
    runs: BundleRuns
    data: Path
    out: Path
    pair: Path
    facts: dict[str, Any]

    @property
    def weights(self) -> Path:
        return self.out / "models/model.pt"


@pytest.fixture(scope="module", params=TINY_TRAININGS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    tiny = TINY_TRAININGS[request.param]
    folder = tmp_path_factory.mktemp(tiny.name)
    tiny.phantom(folder / "data", 0)
    entry = json.loads((folder / "data/datalist.json").read_text())["validation"][0]
    for name in "ab":
        (folder / "pair" / name).mkdir(parents=True)
        shutil.copy(folder / "data" / entry["image"], folder / "pair" / name)
    models = folder / "out/models"
    models.mkdir(parents=True)
    (models / "model.pt").write_bytes(SHIPPED)
    facts = {"shipped": True, "sha256": sha256(models / "model.pt"), "knobs": {}}
    (models / "model.json").write_text(json.dumps(facts))
    training = {**tiny.settings, **COMMON, **OWN.get(tiny.name, {}), **EPOCHS}
    names = fact_knobs(read_schema(tiny.root))
    applied = {name: value for name, value in tiny.settings.items() if name not in names}
    runs = BundleRuns(tiny.name, applied, training)
    config = runs.config("train.json")
    runs.train(folder / "data", folder / "out")
    facts = {name: training.get(name, config.get(name)) for name in names}
    return Made(tiny, runs, folder / "data", folder / "out", folder / "pair", facts)


def state_of(out: Path) -> dict[str, Any]:
    """State of a run, without the name of its folder of curves."""
    state = torch.load(out / "training.ckpt", weights_only=True)
    state["trainer"]["resumable"].pop("curves")
    return state


def assert_same(one: Path, other: Path) -> None:
    """Check that two trainings are equal, bit for bit."""
    assert_equal(state_of(one), state_of(other))
    assert_equal(*(torch.load(out / "models/model.pt", weights_only=True) for out in (one, other)))


def curves(folder: Path) -> tuple[dict[str, list[int]], set[str]]:
    """Steps of each curve in a folder, and the names of its pictures."""
    events = EventAccumulator(str(folder)).Reload()
    scalars = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return scalars, set(events.Tags()["images"])


class TestTraining:
    def test_weights_are_in_half_precision_with_their_facts_and_the_state_is_elsewhere(self, made: Made) -> None:
        weights = torch.load(made.weights, weights_only=True)
        assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float16}
        names = {"training.ckpt", "training.log", "training.config.json", "tensorboard"}
        assert names <= {path.name for path in made.out.iterdir()}
        assert not names & {path.name for path in made.weights.parent.iterdir()}
        facts = read_facts(made.weights)
        assert (facts["bundle"], facts["seed"], facts["knobs"]) == (made.tiny.name, 0, made.facts)
        assert facts["validation"]["metric"] == made.tiny.metric
        assert facts["epochs"] == facts["validation"]["epoch"] in (1, 2)
        assert facts["data"]["datalist_sha256"] == sha256(made.data / "datalist.json")
        record = json.loads((made.out / "training.config.json").read_text())
        given = made.runs.tiny_training
        assert {name: record["knobs"][name] for name in given} == given
        assert record["version"] == facts["version"] == made.runs.config("metadata.json")["version"]

    def test_curves_and_a_picture_are_in_a_folder_of_the_training(self, made: Made) -> None:
        (folder,) = (made.out / "tensorboard").iterdir()
        assert folder.name.startswith("training_20")
        scalars, pictures = curves(folder)
        iterations = torch.load(made.out / "training.ckpt", weights_only=True)["trainer"]["iteration"]
        for name, steps in (
            ("train_loss", [*range(1, iterations + 1)]),
            ("learning_rate", [*range(1, iterations + 1)]),
            ("val_loss", [1, 2]),
            (made.tiny.metric, [1, 2]),
        ):
            assert scalars[name] == steps, name
        assert pictures == {"validation/case_0"}

    def test_stopped_and_resumed_gives_the_same_run_bit_for_bit(self, made: Made, tmp_path: Path) -> None:
        made.runs.train(made.data, tmp_path, max_epochs=1)
        assert state_of(tmp_path)["trainer"]["epoch"] == 1
        made.runs.train(made.data, tmp_path, resume=True)
        assert_same(tmp_path, made.out)

    def test_the_order_of_handlers_does_not_matter(self, made: Made, tmp_path: Path) -> None:
        handlers = made.runs.config("train.json")["train"]["handlers"]
        assert handlers[-1]["_target_"] != handlers[0]["_target_"] == "segbundles.handlers.TrainingRun"
        made.runs.train(made.data, tmp_path, **{"train::handlers": handlers[::-1]})
        assert_same(tmp_path, made.out)

    def test_a_finished_run_is_extended(self, made: Made, tmp_path: Path) -> None:
        shutil.copytree(made.out, tmp_path / "o")
        with pytest.raises(InputError) as caught:
            made.runs.train(made.data, tmp_path / "o", resume=True, max_epochs=3)
        assert str(caught.value) == SHORT
        made.runs.train(made.data, tmp_path / "o", resume=True, max_epochs=3, lr_epochs=3)
        state = state_of(tmp_path / "o")
        assert state["trainer"]["epoch"] == 3
        assert (state["lr_scheduler"]["last_epoch"], state["lr_scheduler"]["total_iters"]) == (3, 3)
        (folder,) = (tmp_path / "o/tensorboard").iterdir()
        assert curves(folder)[0]["val_loss"] == [1, 2, 3]

    def test_a_second_run_keeps_the_state_curves_and_weights_of_the_first(self, made: Made, tmp_path: Path) -> None:
        """And the shipped weights, which the first one has replaced."""
        shutil.copytree(made.out, tmp_path / "o")
        second = {"max_epochs": 1, "run_name": "second"}
        with pytest.raises(InputError) as caught:
            made.runs.train(made.data, tmp_path / "o", initial_weights=tmp_path / "none.pt", **second)
        assert "but there is no such file" in str(caught.value)
        assert (tmp_path / "o/training.ckpt").is_file()  # a run that cannot start leaves it where it is
        made.runs.train(made.data, tmp_path / "o", initial_weights=made.weights, **second)
        assert (tmp_path / "o/training_previous.ckpt").read_bytes() == (made.out / "training.ckpt").read_bytes()
        for folder, names in ((made.out, ("previous", "shipped")), (tmp_path / "o", ("shipped",))):
            for name in names:
                copy = folder / f"models/model_{name}.pt"
                assert copy.read_bytes() == SHIPPED
                assert read_facts(copy)["shipped"] is True
        previous = tmp_path / "o/models/model_previous.pt"
        assert previous.read_bytes() == made.weights.read_bytes()
        assert read_facts(previous) == read_facts(made.weights)
        assert read_facts(tmp_path / "o/models/model.pt")["epochs"] == 1
        first, second = sorted((tmp_path / "o/tensorboard").iterdir())
        assert (first.name[:11], second.name) == ("training_20", "training_second")
        assert [curves(folder)[0]["val_loss"] for folder in (first, second)] == [[1, 2], [1]]

    def test_early_stopping_counts_validations(self, made: Made, tmp_path: Path) -> None:
        settings = {"max_epochs": 9, "lr_epochs": 9, "val_interval": 2, "early_stop_patience": 1}
        # no validation is better by that much
        made.runs.train(made.data, tmp_path, **settings, **{"train::handlers::0::min_delta": 2.0})
        assert state_of(tmp_path)["trainer"]["epoch"] == 4

    @pytest.mark.parametrize("knob", ["output_dir", "ckpt_dir"])
    def test_a_folder_that_cannot_be_written_is_refused_before_training(
        self, knob: str, made: Made, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("in the way")
        folder = tmp_path / "file/x"
        with pytest.raises(InputError) as caught:
            made.runs.train(made.data, tmp_path / "out", **{knob: folder})
        assert str(caught.value).startswith(f"{knob} '{folder}' cannot be written to")
        assert not [*tmp_path.rglob("*.ckpt"), *tmp_path.rglob("*.pt")]

    def test_a_schedule_shorter_than_the_run_is_refused(self, made: Made, tmp_path: Path) -> None:
        with pytest.raises(InputError) as caught:
            made.runs.train(made.data, tmp_path, max_epochs=3)
        assert str(caught.value) == SHORT
        assert not [*tmp_path.rglob("*.ckpt"), *tmp_path.rglob("*.pt")]


class TestFacts:
    def test_weights_are_evaluated_and_applied_with_the_knobs_they_were_trained_with(
        self, made: Made, tmp_path: Path
    ) -> None:
        rows = made.runs.evaluate(made.out, made.data, tmp_path / "e")
        assert rows
        assert {row["notes"] for row in rows} == {""}
        made.runs.infer(made.out, made.pair, tmp_path / "i")
        rows = table(tmp_path / "i/inference.csv")
        note = "pixel size unknown: areas are in pixels only" if made.tiny.name == "em_membrane_unet" else ""
        assert [(Path(row["file"]).parts[0], row["status"], row["notes"]) for row in rows] == [
            ("a", "ok", note),
            ("b", "ok", note),
        ]
        for path in ("e/evaluating.config.json", "i/inferring.config.json"):
            record = json.loads((tmp_path / path).read_text())
            assert {name: record["knobs"][name] for name in made.facts} == made.facts
            assert {record["sources"][name] for name in made.facts} == {"the facts of model.pt"}
            assert record["weights"]["weights"]["sha256"] == sha256(made.weights)

    def test_a_knob_that_contradicts_the_architecture_is_refused(self, made: Made, tmp_path: Path) -> None:
        for command in (made.runs.evaluate, made.runs.infer):
            with pytest.raises(InputError) as caught:
                command(made.out, made.data, tmp_path / "o", base_channels=4)
            assert str(caught.value).startswith(
                f"base_channels is 4, but {made.weights} was trained with base_channels 2: leave out base_channels"
            )
        assert not (tmp_path / "o").exists()

    @pytest.mark.parametrize("made", PREPROCESSING, indirect=True, scope="module")
    def test_one_that_contradicts_the_preprocessing_is_noted(
        self, made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        knob, other = PREPROCESSING[made.tiny.name]
        trained = json.dumps(made.facts[knob])
        note = f"{knob} {json.dumps(other)} differs from {trained}, with which model.pt was trained"
        made.runs.infer(made.out, made.pair, tmp_path / "i", **{knob: other})
        rows = table(tmp_path / "i/inference.csv")
        rows += made.runs.evaluate(made.out, made.data, tmp_path / "e", **{knob: other})
        assert all(note in row["notes"] for row in rows)
        assert [r.levelname for r in caplog.records if r.getMessage() == f"{note}."] == ["WARNING"] * 2

    def test_missing_weights(self, made: Made, tmp_path: Path) -> None:
        for command in (made.runs.evaluate, made.runs.infer):
            with pytest.raises(InputError) as caught:
                command(tmp_path, made.data, tmp_path / "o")
            assert f"there are no weights at {tmp_path / 'models/model.pt'}" in str(caught.value)


class TestInference:
    def test_an_empty_folder_is_an_error(self, made: Made, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        (tmp_path / "d/notes.txt").write_text("not an image")
        with pytest.raises(InputError) as caught:
            made.runs.infer(made.out, tmp_path / "d", tmp_path / "o")
        assert str(caught.value).startswith(f"no image under '{tmp_path / 'd'}': ")

    @pytest.mark.slow
    def test_by_the_command_line_from_another_folder_an_image_that_fails_does_not_stop_the_others(
        self, made: Made, tmp_path: Path
    ) -> None:
        made.runs.infer(made.out, made.pair, tmp_path / "whole")
        (result,) = (tmp_path / "whole/a").glob("*_seg.*")
        shutil.copytree(made.pair, tmp_path / "my data")
        (tmp_path / "2024_07/a" / result.name).mkdir(parents=True)  # in the way of the first mask
        command = [sys.executable, "-m", "monai.bundle", "run", "inferring", "--bundle_root", str(made.tiny.root)]
        command += ["--config_file", str(made.runs.configs / "inference.json"), "--weights", str(made.weights)]
        command += ["--dataset_dir", "my data", "--output_dir", "2024_07"]  # as typed, not the number
        for name, value in made.runs.tiny.items():
            if name in made.runs.config("inference.json"):
                command += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stdout + done.stderr
        rows = table(tmp_path / "2024_07/inference.csv")
        last = (done.stdout + done.stderr).splitlines()[-1]
        assert last.startswith(f"ERROR: 1 of 2 images failed: {rows[0]['file']}. See ")
        assert last.endswith("(traceback: 2024_07/inference.log)")
        assert "Traceback" not in done.stdout + done.stderr
        assert "Traceback" in (tmp_path / "2024_07/inference.log").read_text()
        assert [row["status"] for row in rows] == ["failed", "ok"]
        assert "cannot write" in rows[0]["notes"]
        whole, others = ({path.name for path in (tmp_path / name / "b").iterdir()} for name in ("whole", "2024_07"))
        assert others == whole
