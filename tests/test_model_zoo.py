"""The usual unit test of MONAI's model zoo: untrained networks, with the handler that loads weights disabled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from bundle_runs import table
from monai.bundle import ConfigWorkflow
from tiny_bundles import TINY_BUNDLES, TinyBundle
from tiny_trainings import TINY_TRAININGS

# without trained weights there is no locator either
SETTINGS = {"left_atrium_vnet": {"use_locator": False}}


def check_workflow(root: Path, kind: str, *files: str, **override: object) -> None:
    """Do what the function of this name in the model zoo does."""
    workflow = ConfigWorkflow(
        [str(root / "configs" / name) for name in files],
        workflow_type=kind,
        meta_file=str(root / "configs" / "metadata.json"),
        logging_file=False,
        bundle_root=str(root),
        **override,
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    workflow.run()
    workflow.finalize()


@pytest.mark.parametrize("bundle", TINY_BUNDLES, ids=lambda bundle: bundle.name)
def test_untrained_networks_run(bundle: TinyBundle, tmp_path: Path) -> None:
    root, tiny = bundle.make(tmp_path), TINY_TRAININGS[bundle.name]
    shutil.rmtree(root / "models")
    bundle.write_image(tmp_path / "images")
    folders = {"dataset_dir": str(tmp_path / "images"), "output_dir": str(tmp_path / "masks")}
    own = SETTINGS.get(bundle.name, {})
    check_workflow(root, "infer", "inference.json", **folders, **own, **{"handlers#0#_disabled_": True})
    assert [row["status"] for row in table(tmp_path / "masks" / "inference.csv")] == ["ok"]

    tiny.phantom(tmp_path / "data", 0)
    settings = {**tiny.settings, "dataset_dir": str(tmp_path / "data")}
    both = ("train.json", "evaluate.json")
    untrained = {"output_dir": str(tmp_path / "scores"), "validate#handlers#0#_disabled_": True}
    check_workflow(root, "train", *both, **settings, **untrained)
    assert table(tmp_path / "scores" / "metrics.csv")

    check_workflow(root, "train", "train.json", **settings)
    assert (root / "models" / "model.pt").is_file()
