from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import ROOT
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, FlStatistics, ModelType
from monai.fl.utils.exchange_object import ExchangeObject
from tiny_trainings import TINY_TRAININGS, TinyTraining

from segbundles.errors import InputError
from segbundles.facts import read_facts

pytestmark = [
    pytest.mark.filterwarnings("ignore:executing the bundle config"),
    pytest.mark.filterwarnings("ignore:parsing config_file"),
]

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=TINY_TRAININGS.values(), ids=TINY_TRAININGS)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyTraining, Path]:
    """A bundle, and the data of one site."""
    folder = tmp_path_factory.mktemp("site")
    request.param.phantom(folder, 0)
    return request.param, folder


def settings(tiny: TinyTraining, data: Path, out: Path, **more: Any) -> dict[str, Any]:
    folders = {"dataset_dir": str(data), "output_dir": str(out), "ckpt_dir": str(out / "models")}
    return {**tiny.settings, **folders, **more}


def client(tiny: TinyTraining, data: Path, out: Path, name: str = "site", **more: Any) -> MonaiAlgo:
    """A client that writes everything to ``out``; ``more`` are settings of its training."""
    algo = MonaiAlgo(
        bundle_root=str(tiny.root),
        send_weight_diff=False,
        train_kwargs=settings(tiny, data, out, **more),
        eval_kwargs=settings(tiny, data, out / "evaluation"),
        best_model_filepath=str(out / "models" / "model.pt"),
    )
    algo.initialize({ExtraItems.CLIENT_NAME: name})
    return algo


def weights(algo: MonaiAlgo) -> Weights:
    return algo.get_weights().weights


def in_bundle(tiny: TinyTraining) -> dict[Path, int]:
    """Files that a run without folders of its own would write to, and when each was changed."""
    return {path: path.stat().st_mtime_ns for name in ("models", "output") for path in (tiny.root / name).rglob("*")}


def assert_equal(actual: Weights, expected: Weights) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0, msg=name)


def test_a_round_of_every_bundle(site: tuple[TinyTraining, Path], tmp_path: Path) -> None:
    tiny, data = site
    shipped = in_bundle(tiny)
    algo = client(tiny, data, tmp_path)
    start = weights(algo)
    algo.train(ExchangeObject(weights=start))
    update = algo.get_weights()
    trained = weights(algo)
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    assert_equal(algo.global_weights, start)
    assert update.statistics[FlStatistics.NUM_EXECUTED_ITERATIONS] == algo.trainer.state.epoch_length > 0

    metrics = algo.evaluate(ExchangeObject(weights=trained)).metrics
    validated = algo.train_workflow.evaluator.state.metrics
    assert tiny.metric in metrics
    assert set(metrics) == set(validated)
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    assert summary["cases"] > 0

    best = algo.get_weights({ExtraItems.MODEL_TYPE: ModelType.BEST_MODEL}).weights
    assert_equal(best, trained)
    assert {value.dtype for value in best.values()} <= {torch.float32, torch.int64}
    algo.train(ExchangeObject(weights=best))
    algo.finalize()
    assert in_bundle(tiny) == shipped


def test_two_clients_and_two_rounds_averaged_by_hand(tmp_path: Path) -> None:
    tiny = TINY_TRAININGS["brain_flair_unet"]
    clients = []
    for k in range(2):
        tiny.phantom(tmp_path / f"data{k}", k)
        clients.append(client(tiny, tmp_path / f"data{k}", tmp_path / f"site{k}", name=f"site{k}", seed=k))
    server = weights(clients[0])
    first = dict(server)
    for number in (1, 2):
        updates = []
        for algo in clients:
            algo.train(ExchangeObject(weights=server))
            assert_equal(algo.global_weights, server)
            updates.append(weights(algo))
            assert algo.trainer.state.epoch == number
        means = {name: (updates[0][name] + updates[1][name]) / 2 for name in server}
        assert any(not torch.equal(updates[0][name], updates[1][name]) for name in server)
        server = {name: value.to(server[name].dtype) for name, value in means.items()}
        for algo in clients:
            metrics = algo.evaluate(ExchangeObject(weights=server)).metrics
            assert 0 <= metrics["val_mean_dice"] <= 1
            # the site's model.pt has other weights
            assert_equal(algo.evaluator.network.state_dict(), server)
    assert any(not torch.equal(server[name], first[name]) for name in server)
    for k in range(2):
        files = {path.name for path in (tmp_path / f"site{k}").iterdir()}
        run_files = {"training.ckpt", "training.log", "training.config.json"}
        assert files == {*run_files, "models", "tensorboard", "evaluation"}
        assert {path.name for path in (tmp_path / f"site{k}" / "models").iterdir()} == {"model.json", "model.pt"}
        assert torch.load(tmp_path / f"site{k}" / "training.ckpt", weights_only=True)["trainer"]["epoch"] == 2


def test_a_file_of_weights_and_its_facts_are_used_only_where_loading_is_not_disabled(tmp_path: Path) -> None:
    tiny = TINY_TRAININGS["em_membrane_unet"]
    tiny.phantom(tmp_path / "data", 0)
    algo = client(tiny, tmp_path / "data", tmp_path / "site")
    sent = {name: torch.zeros_like(value) for name, value in weights(algo).items()}
    algo.train(ExchangeObject(weights=weights(algo)))
    path = tmp_path / "site" / "models" / "model.pt"
    facts = json.loads(path.with_suffix(".json").read_text())
    facts["knobs"]["base_channels"] = 3
    path.with_suffix(".json").write_text(json.dumps(facts))
    (tmp_path / "site" / "evaluation").mkdir()
    path.parent.rename(tmp_path / "site" / "evaluation" / "models")
    saved = torch.load(tmp_path / "site" / "evaluation" / "models" / "model.pt", weights_only=True)
    for disabled in (True, False):
        algo = MonaiAlgo(
            bundle_root=str(tiny.root),
            config_train_filename=None,
            eval_kwargs=settings(tiny, tmp_path / "data", tmp_path / "site" / "evaluation"),
            disable_ckpt_loading=disabled,
        )
        algo.initialize()
        algo.evaluate(ExchangeObject(weights=sent))
        assert_equal(algo.evaluator.network.state_dict(), sent if disabled else saved)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"max_epoch": 3},
            r"^there is no setting 'max_epoch' in the configs of polyp_fcn8: did you mean 'max_epochs'\?$",
        ),
        ({"resume": True}, r"^resume is True, but the weights of a federated client come from the server: leave it"),
        ({"initial_weights": "a.pt"}, r"^initial_weights is 'a.pt', but the weights of a federated client come from"),
        ({"vgg16_weights": "a.pth"}, r"^vgg16_weights is 'a.pth', but the weights of a federated client come from"),
        ({"patch_size": [16]}, r"^patch_size must be a list of 2 whole numbers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_stop_a_client(
    more: dict, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "segbundles"), pytest.raises(InputError) as caught:
        client(TINY_TRAININGS["polyp_fcn8"], tmp_path / "data", tmp_path / "out", **more)
    assert caplog.messages == [str(caught.value)]
    assert re.search(message, str(caught.value))
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_setting_of_the_evaluation_stops_a_client() -> None:
    tiny = TINY_TRAININGS["polyp_fcn8"]
    algo = MonaiAlgo(
        bundle_root=str(tiny.root), config_train_filename=None, eval_kwargs={"splitt": "testing", "device": "cpu"}
    )
    with pytest.raises(InputError) as caught:
        algo.initialize()
    assert "'splitt' in the configs of polyp_fcn8: did you mean 'split'?" in str(caught.value)


def test_the_code_of_the_page_runs(tmp_path: Path) -> None:
    """With other folders and a small network."""
    tiny = TINY_TRAININGS["polyp_fcn8"]
    tiny.phantom(tmp_path / "polyps", 0)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "federated.md").read_text(), re.DOTALL)
    for written, meant in {
        "/data/polyps": str(tmp_path / "polyps"),
        "/data/fl": str(tmp_path / "fl"),
        '"bundles/polyp_fcn8"': repr(str(tiny.root)),
        '"val_interval": 1}': '"val_interval": 1, **tiny}',
    }.items():
        assert written in code
        code = code.replace(written, meant)
    names: dict[str, Any] = {"tiny": tiny.settings}
    exec(compile(code, "docs/federated.md", "exec"), names)
    assert names["site"]["val_interval"] == 1
    assert 0 <= names["scores"][tiny.metric] <= 1
    assert (tmp_path / "fl" / "models" / "model.pt").is_file()
    assert json.loads((tmp_path / "fl" / "evaluation" / "summary.json").read_text())["cases"] > 0


needs_flare = pytest.mark.skipif(
    importlib.util.find_spec("nvflare") is None and os.environ.get("CI") != "true",
    reason="NVIDIA FLARE is not installed: pip install -e .[federated]",
)
JOB = ROOT / "docs" / "federated" / "job.py"


@pytest.mark.slow
@needs_flare
def test_faults_of_the_job(tmp_path: Path) -> None:
    """In a process of its own, since FLARE's imports change logging."""
    out, result = tmp_path / "out", tmp_path / "elsewhere" / "mine"
    for folder, value in ((out / "other job", 1.0), (result, 2.0)):
        folder.mkdir(parents=True)
        torch.save({"model": {"weight": torch.full((1, 1), value)}}, folder / "FL_global_model.pt")
    spaces = ["job.py", "--sites", "a", "--out", str(tmp_path / "none")]
    spaces += ["--settings", str(tmp_path / "my sites" / "{site}.json")]
    code = (
        "import job, pathlib, sys, torch\n"
        "def write(result):\n"
        f"    job.write_models(torch.nn.Linear(1, 1, bias=False), None, result, pathlib.Path({str(out)!r}))\n"
        f"for call in (lambda: write(None), lambda: write({str(tmp_path / 'empty')!r}), job.main):\n"
        f"    sys.argv = {spaces!r}\n"
        "    try:\n"
        "        call()\n"
        "    except SystemExit as error:\n"
        "        print(error, file=sys.stderr)\n"
        f"write({str(result)!r})\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=JOB.parent, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for missing in (None, str(tmp_path / "empty")):
        assert f"the simulation left no model in {missing}" in done.stderr
    assert "my sites/{site}.json' contains spaces" in done.stderr
    assert torch.load(out / "model.pt", weights_only=True)["weight"].item() == 2
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@needs_flare
def test_flare_averages_two_sites_by_their_steps(tmp_path: Path) -> None:
    tiny = TINY_TRAININGS["brain_flair_unet"]
    (tmp_path / "sites").mkdir()
    for k, patients in ((1, 4), (2, 6)):
        tiny.phantom(tmp_path / f"data{k}", k, patients)
        site = settings(tiny, tmp_path / f"data{k}", tmp_path / f"site-{k}", bundle_root=str(tiny.root), seed=k)
        (tmp_path / "sites" / f"site-{k}.json").write_text(json.dumps(site))
    command = [sys.executable, str(JOB), "--sites", "site-1,site-2", "--rounds", "2"]
    command += ["--settings", str(tmp_path / "sites" / "{site}.json"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    sites = [torch.load(tmp_path / f"site-{k}" / "training.ckpt", weights_only=True) for k in (1, 2)]
    steps = [site["trainer"]["iteration"] for site in sites]
    assert [site["trainer"]["epoch"] for site in sites] == [2, 2]
    assert steps[0] < steps[1]
    (saved,) = (tmp_path / "out" / tiny.root.name / "server").rglob("FL_global_model.pt")
    average = torch.load(saved, weights_only=True)["model"]
    final = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    start = torch.load(tmp_path / "out" / "start.pt", weights_only=True)
    assert set(average) == set(final) == set(start)
    for name, value in average.items():
        mean = sum(site["network"][name].double() * n for site, n in zip(sites, steps, strict=True)) / sum(steps)
        torch.testing.assert_close(value.double(), mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(final[name].double(), mean, rtol=1e-3, atol=0.5 if "tracked" in name else 1e-3)
    assert any(not torch.equal(average[name].float(), value.float()) for name, value in start.items())
    best = torch.load(tmp_path / "out" / "best_model.pt", weights_only=True)
    assert {name: value.shape for name, value in best.items()} == {name: value.shape for name, value in final.items()}
    for name in ("model", "best_model"):  # so that they can be used without --base_channels and --depth
        facts = read_facts(tmp_path / "out" / f"{name}.pt")
        assert (facts["bundle"], facts["knobs"]["base_channels"], facts["knobs"]["depth"]) == (tiny.name, 2, 3)
