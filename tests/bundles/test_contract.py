"""The contract of design, for every folder under bundles/, and what their configs share."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bundle_runs import ROOT
from contract import CHECKS, check_properties, config
from monai.bundle import load
from tiny_bundles import TINY_BUNDLES
from tiny_trainings import TINY_TRAININGS

BUNDLES = sorted(path for path in (ROOT / "bundles").iterdir() if path.is_dir())
TINY = {tiny.name: tiny for tiny in TINY_BUNDLES}


def test_every_bundle_has_tiny_settings_for_the_tests() -> None:
    names = {path.name for path in BUNDLES}
    assert len(names) >= 4
    assert TINY.keys() == TINY_TRAININGS.keys() == names


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("root", BUNDLES, ids=lambda root: root.name)
def test_contract(root: Path, check) -> None:
    check(root)


@pytest.mark.parametrize("root", BUNDLES, ids=lambda root: root.name)
def test_check_properties_lacks_nothing(root: Path, tmp_path: Path) -> None:
    tiny = TINY_TRAININGS[root.name]
    tiny.phantom(tmp_path, 0)
    # an empty folder of weights: the shipped ones are of another architecture
    check_properties(root, tmp_path, {**tiny.settings, "ckpt_dir": str(tmp_path / "models")})


@pytest.mark.parametrize("root", BUNDLES, ids=lambda root: root.name)
def test_load_returns_the_network_with_its_weights(root: Path, tmp_path: Path) -> None:
    import torch

    made = TINY[root.name].make(tmp_path)
    network = load(name=root.name, bundle_dir=str(made.parent), source="monaihosting")
    expected = torch.load(made / "models/model.pt", weights_only=True)
    assert all(torch.equal(value.to(expected[key].dtype), expected[key]) for key, value in network.state_dict().items())


# per file: what is written alike in every bundle, and the entries of these blocks that are a bundle's own
SHARED = {
    "train.json": {
        "imports": (),
        "train::trainer": (),
        "train::handlers::0": ("dataset", "lr_every_iteration", "validation_loss", "fresh_start"),
        "validate::handlers": (),
        "validate::evaluator": ("additional_metrics",),
        "settings": (),
        "initialize": (),
        "run": (),
    },
    "inference.json": {
        "imports": (),
        "evaluator": (),
        "settings": (),
        "initialize": (),
    },
    "evaluate.json": {"split": (), "weights": (), "validate::dataset::cache_rate": (), "run": ()},
    "multi_gpu_train.json": {
        "network": ("module",),
        "validate::sampler": (),
        "initialize": (),
    },
    "multi_gpu_evaluate.json": {"": ("$schema", "_desc_")},
    "multi_gpu_inference.json": {"": ("$schema", "_desc_")},
}


def block(tree: dict, place: str):
    for name in place.split("::") if place and place not in tree else [place] if place else []:
        tree = tree[int(name)] if isinstance(tree, list) else tree[name]
    return tree


@pytest.mark.parametrize("name", SHARED)
def test_shared_blocks_are_equal_in_all_bundles(name: str) -> None:
    trees = {root.name: config(root, name) for root in BUNDLES}
    for place, own in SHARED[name].items():
        found = {}
        for bundle, tree in trees.items():
            value = block(tree, place)
            value = {k: v for k, v in value.items() if k not in own} if isinstance(value, dict) else value
            found.setdefault(json.dumps(value), []).append(bundle)
        assert len(found) == 1, f"{name}, {place}: {found}"


def test_logging_is_equal_in_all_bundles() -> None:
    assert len({(root / "configs/logging.conf").read_text() for root in BUNDLES}) == 1


def test_everything_that_a_json_names_can_be_imported_by_itself() -> None:
    """After ``import segbundles`` alone, as the configs have it."""
    text = "".join(path.read_text() for path in ROOT.glob("bundles/*/configs/*.json"))
    names = sorted(set(re.findall(r"\bsegbundles(?:\.\w+)+", text)))
    assert len(names) > 30
    code = f"import segbundles\nfor name in {names}: eval(name)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
