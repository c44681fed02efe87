"""What MONAI's model zoo asks of a bundle, and its usual unit test.

That test runs untrained networks, with the handler that loads weights disabled.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from zipfile import ZipFile

import pytest
from bundle_runs import ROOT, table
from monai.bundle import ConfigWorkflow
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from tiny_bundles import TINY_BUNDLES, TinyBundle
from tiny_trainings import TINY_TRAININGS

from segbundles.packing import LARGEST, pack

BUNDLES = sorted(path.parents[1] for path in ROOT.glob("bundles/*/configs/metadata.json"))
# the zoo's continuous integration installs what the metadata say in this Python, the oldest that pyproject.toml allows
OLDEST = "3.10"
PROJECT = (ROOT / "pyproject.toml").read_text()

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


def metadata(root: Path) -> dict:
    return json.loads((root / "configs/metadata.json").read_text())


def pins(python: str) -> dict[str, str]:
    """Versions of constraints.txt for a Python."""
    lines = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    chosen = [line for line in lines if line.marker is None or line.marker.evaluate({"python_version": python})]
    return {line.name: str(line.specifier).removeprefix("==") for line in chosen}


def dependencies() -> dict[str, Requirement]:
    (block,) = re.findall(r"^dependencies = (\[.*?^\])", PROJECT, re.DOTALL | re.MULTILINE)
    found = [Requirement(text) for text in re.findall(r'"(.*?)"', block)]
    return {requirement.name: requirement for requirement in found}


def test_pins_are_of_the_oldest_python_and_allowed() -> None:
    assert f'requires-python = ">={OLDEST}"' in PROJECT
    pinned, needed = pins(OLDEST), dependencies()
    for name, requirement in needed.items():
        assert requirement.specifier.contains(pinned[name.lower()]), name
    assert needed["torch"].specifier == SpecifierSet(">=2.8")  # as MONAI 1.6.1


@pytest.mark.parametrize("root", BUNDLES, ids=lambda root: root.name)
def test_what_the_metadata_require_can_be_installed(root: Path) -> None:
    """Packages of an index, with versions that exist for the oldest Python; the zip contains this library."""
    said, pinned = metadata(root), pins(OLDEST)
    needed = {name: pinned[name.lower()] for name in dependencies() if name not in ("torch", "monai")}
    assert said["required_packages_version"] == needed | {"fire": pinned["fire"]}
    versions = [said[f"{name}_version"] for name in ("monai", "pytorch", "numpy")]
    assert versions == [pinned[name] for name in ("monai", "torch", "numpy")]
    assert "monai[fire]" in PROJECT


@pytest.mark.parametrize("root", BUNDLES, ids=lambda root: root.name)
def test_no_file_for_the_zoo_is_too_large(root: Path, tmp_path: Path) -> None:
    packed = pack(str(root), tmp_path, "https://example.org")
    with ZipFile(packed.zip) as archive:
        files = {file.filename.removeprefix(f"{root.name}/"): file.file_size for file in archive.infolist()}
    assert max(files.values()) <= LARGEST <= 25e6
    assert {"LICENSE", "configs/metadata.json", "configs/inference.json", "docs/README.md"} <= files.keys()
    assert "docs/data_license.txt" in files
    assert ("large_files.json" in files) == bool(packed.large) == ("models/model.pt" not in files)


@pytest.mark.parametrize("root", BUNDLES, ids=lambda root: root.name)
def test_the_card_has_the_headings_of_the_zoo(root: Path) -> None:
    card = (root / "docs/README.md").read_text()
    found = re.findall(r"^## (.*)$", card, re.MULTILINE)
    zoo = [
        "Model Description",
        "Data",
        "Performance",
        "System Configuration",
        "Limitations",
        "Citation Info",
        "References",
    ]
    assert set(zoo) <= set(found)
    assert (found[0], found[-1]) == ("Use it", "History")
    assert [name for name in ("Authors", "Tags") if f"### **{name}**" not in card] == []
    assert "not a medical device" in card[: card.index("## Use it")]
