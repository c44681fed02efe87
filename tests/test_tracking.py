from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
from monai.bundle import ConfigWorkflow, run
from tiny_trainings import TINY_TRAININGS, TinyTraining

from segbundles.errors import InputError

if importlib.util.find_spec("mlflow") is None and os.environ.get("CI") != "true":
    pytest.skip("MLflow is not installed: pip install -e .[tracking]", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file")


def launch(tiny: TinyTraining, run_id: str, *files: str, **settings: object) -> None:
    run(
        run_id=run_id,
        config_file=[str(tiny.root / "configs" / name) for name in files],
        bundle_root=str(tiny.root),
        logging_file=False,
        tracking="mlflow",
        **{key: str(value) if isinstance(value, Path) else value for key, value in settings.items()},
    )


class Store:
    """The runs in an MLflow database."""

    def __init__(self, path: Path) -> None:
        from mlflow import MlflowClient

        self.uri = f"sqlite:///{path}"
        self.client = MlflowClient(tracking_uri=self.uri)

    def runs(self, experiment: str = "monai_experiment") -> list:
        return self.client.search_runs(self.client.get_experiment_by_name(experiment).experiment_id)

    def history(self, run: object, key: str) -> dict[int, float]:
        """Values of a metric by step."""
        return {point.step: point.value for point in self.client.get_metric_history(run.info.run_id, key)}


def common(tiny: TinyTraining, folder: Path) -> dict[str, object]:
    tiny.phantom(folder / "data", 0)
    return {**tiny.settings, "dataset_dir": folder / "data", "ckpt_dir": folder / "models"}


def test_a_run_has_the_values_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny = TINY_TRAININGS["em_membrane_unet"]
    settings = {**common(tiny, tmp_path), "max_epochs": 2, "learning_rate": 0.01}
    caplog.set_level("INFO", "segbundles")
    launch(tiny, "training", "train.json", **settings, output_dir=tmp_path / "out", run_name="first")
    store = Store(tmp_path / "out" / "mlruns.db")
    (tracked,) = store.runs()
    assert (tracked.info.run_name, tracked.info.status) == ("first", "FINISHED")
    assert tracked.data.params == {"max_epochs": "2", "epoch_length": "1"}

    logged = [line for line in caplog.messages if line.startswith("epoch ")]
    loss, score = (
        [float(re.search(f"{name} ([0-9.]+)", line)[1]) for line in logged]
        for name in ("train_loss", "val_pixel_accuracy")
    )
    assert store.history(tracked, "train_loss") == pytest.approx({1: loss[0], 2: loss[1]}, abs=5.1e-5)
    assert store.history(tracked, "val_pixel_accuracy") == pytest.approx({1: score[0], 2: score[1]}, abs=5.1e-5)
    assert store.history(tracked, "lr_group_0")[1] == 0.01

    (kept,) = store.client.list_artifacts(tracked.info.run_id)
    config = json.loads(Path(store.client.download_artifacts(tracked.info.run_id, kept.path)).read_text())
    assert (config["max_epochs"], config["learning_rate"], config["depth"]) == (2, 0.01, 3)
    assert (tmp_path / "out" / kept.path).is_file()

    launch(tiny, "training", "train.json", **settings, output_dir=tmp_path / "out", run_name="second")
    assert {other.info.run_name for other in store.runs()} == {"first", "second"}
    assert {path.name for path in (tmp_path / "out" / "tensorboard").iterdir()} == {"training_first", "training_second"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One database for the runs of all bundles, because creating its tables takes longer than a run."""
    return Store(tmp_path_factory.mktemp("store") / "runs.db")


@pytest.mark.parametrize("tiny", TINY_TRAININGS.values(), ids=TINY_TRAININGS)
def test_every_bundle_trains_and_is_evaluated(tiny: TinyTraining, store: Store, tmp_path: Path) -> None:
    settings = {**common(tiny, tmp_path), "tracking_uri": store.uri, "experiment_name": tiny.name}
    launch(tiny, "training", "train.json", **settings, output_dir=tmp_path / "out", run_name="trained")
    evaluation = {"output_dir": tmp_path / "evaluation", "run_name": "evaluated"}
    launch(tiny, "evaluating", "train.json", "evaluate.json", **settings, **evaluation)
    runs = {tracked.info.run_name: tracked for tracked in store.runs(tiny.name)}
    assert set(runs) == {"trained", "evaluated"}
    assert store.history(runs["trained"], "train_loss")
    assert tiny.metric in runs["trained"].data.metrics
    assert 0 <= runs["evaluated"].data.metrics[tiny.metric] <= 1
    assert (tmp_path / "evaluation" / "summary.json").is_file()


@pytest.mark.parametrize("given", [True, False])
def test_the_copy_of_the_config_exists(given: bool, tmp_path: Path) -> None:
    """MONAI appends to output_dir as if it were an expression."""
    tiny = TINY_TRAININGS["polyp_fcn8"]
    out = {"output_dir": str(tmp_path / "a b")} if given else {"output_dir": f"$'{tmp_path}' + '/a b'"}
    workflow = ConfigWorkflow(
        str(tiny.root / "configs" / "train.json"),
        bundle_root=str(tiny.root),
        logging_file=False,
        tracking="mlflow",
        **out,
    )
    workflow.initialize()
    kept = Path(workflow.parser.get_parsed_content("save_execute_config"))
    assert kept.parent == tmp_path / "a b"
    assert json.loads(kept.read_text())["train"]["handlers"][-1]["_target_"] == "MLFlowHandler"


def test_a_misspelt_setting_stops_a_tracked_run(tmp_path: Path) -> None:
    tiny = TINY_TRAININGS["em_membrane_unet"]
    with pytest.raises(InputError) as caught:
        launch(tiny, "training", "train.json", output_dir=tmp_path, run_nam="x")
    assert "'run_nam' in the configs of em_membrane_unet" in str(caught.value)
