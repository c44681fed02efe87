"""Do what docs/add_a_bundle.md says, with its own commands and JSON, on synthetic volumes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_runs import ROOT, SCHEMA, table
from contract import CHECKS, check_properties
from documentation import PAGES, read_blocks, read_commands
from monai.bundle import load
from monai.networks.nets import SegResNet
from tiny_bundles import command_line

from segbundles.check import check_bundle

PAGE = PAGES["docs/add_a_bundle.md"]
META_SCHEMA = SCHEMA if SCHEMA.is_file() else None
TEXT, BLOCKS = PAGE.read_text(), read_blocks(PAGE)
AFFINE = np.array([[-4.0, 0, 0, 70], [0, 0, 4.5, -60], [0, 4.0, 0, 10], [0, 0, 0, 1]])
# what a person would choose for these volumes: small, and trained in seconds
KNOBS = {
    "max_epochs": 40,
    "lr_epochs": 40,
    "val_interval": 5,
    "learning_rate": 0.01,
    "amp": False,
    "device": "cpu",
    "base_channels": 4,
    "locator_base_channels": 2,
}
OWN = {
    "network_spacing_mm": [6.0, 6.0, 6.0],
    "patch_size": [16, 16, 16],
    "locator_spacing_mm": [5.0, 5.0, 5.0],
    "locator_patch_size": [32, 32, 32],
    "min_size_mm": 10.0,
    "max_size_mm": 200.0,
    "title": "Knobs of kidney_segresnet",
    "use_locator": "Find the kidney first, then segment the part around it.",
    "_desc_": "Of the kidney. Edit section 1; the rest is wiring.",
    "name": "Kidney segmentation by a two-stage SegResNet",
    "task": "Segmentation of a synthetic kidney",
    "description": "A locator V-Net finds the kidney, a SegResNet segments the crop around it.",
    "data_source": "synthetic",
    "data_type": "nifti",
    "image_classes": "single channel",
    "label_classes": "single channel, 0 background, 1 kidney",
    "pred_classes": "single channel logit, above 0 is kidney",
    "references": ["Myronenko A. 3D MRI brain tumor segmentation using autoencoder regularization. 2018"],
    "changelog": {"0.1.0": "first"},
}


def make_data(folder: Path) -> None:
    """Write five volumes with a bright ball, stored with axes in another order, and their datalist."""
    rng = np.random.default_rng(0)
    splits: dict[str, list] = {"training": [], "validation": []}
    grid = np.stack(np.meshgrid(*map(np.arange, (40, 32, 36)), indexing="ij"), -1)
    for number in range(5):
        centre = rng.uniform((14, 12, 14), (26, 20, 22))
        label = (np.linalg.norm(grid - centre, axis=-1) < 6.5).astype(np.uint8)
        image = (100 * label + rng.normal(100, 20, label.shape)).astype(np.int16)
        entry = {"image": f"images/{number}.nii.gz", "label": f"labels/{number}.nii.gz", "group": f"patient {number}"}
        for key, array in (("image", image), ("label", label)):
            (folder / entry[key]).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, AFFINE), folder / entry[key])
        splits["training" if number < 4 else "validation"].append(entry)
    (folder / "datalist.json").write_text(json.dumps(splits))


class Bundle:
    """The configs of the new bundle, edited as the page says."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.trees = {path.name: json.loads(path.read_text()) for path in sorted((root / "configs").glob("*.json"))}

    def write(self) -> None:
        for name, tree in self.trees.items():
            (self.root / "configs" / name).write_text(json.dumps(tree, indent=1))

    def places(self, name: str, key: str) -> Iterator[dict]:
        """Yield the dictionaries of a config that give a key a value that is not a reference."""
        stack: list[Any] = [self.trees[name]]
        while stack:
            node = stack.pop()
            if isinstance(node, dict) and not str(node.get(key, "@")).startswith(("@", "$@")):
                yield node
            stack += node.values() if isinstance(node, dict) else node if isinstance(node, list) else []


def names(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def commands(start: str) -> list[str]:
    found = [command for _, command in read_commands(BLOCKS) if command.startswith(start)]
    assert found
    return found


def unused(root: Path) -> dict[str, set[str]]:
    """Return the knobs that nothing uses, by config."""
    found: dict[str, set[str]] = {}
    with patch("segbundles.check.verify_net_in_out"):  # saves time
        checked = check_bundle(root, schema=META_SCHEMA)
    for item in (it for one in checked for it in one.findings):
        if item.problem in ("nothing uses it here", "no config has this knob"):
            found.setdefault(item.config, set()).add(item.id)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like the project's root in which steps 1 to 4 of the page were done."""
    place = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "bundles/left_atrium_vnet/configs", place / "bundles/left_atrium_vnet/configs")
    shutil.copy(ROOT / "bundles/left_atrium_vnet/LICENSE", place / "bundles/left_atrium_vnet")
    make_data(place / "data/kidney")

    copy = next(block.text for block in BLOCKS if block.language == "bash")
    subprocess.run(["bash", "-ec", copy], cwd=place, check=True)
    root = place / "bundles/kidney_segresnet"
    bundle = Bundle(root)

    (network,) = (block for block in BLOCKS if block.language == "json")
    assert names(network.before) == ["train.json", "inference.json", "@name"]
    for name in names(network.before)[:2]:
        bundle.trees[name] |= json.loads(network.text)
    bundle.write()
    (listed,) = re.findall(r"^Remove the knobs of the old network .*?: (.*?)\.$", TEXT, re.MULTILINE)
    assert unused(root) == {name: set(names(listed)) for name in ("train.json", "inference.json")}
    for name in ("train.json", "inference.json"):
        for knob in names(listed):
            del bundle.trees[name][knob]
    bundle.write()
    assert unused(root) == {"knobs.schema.json": set(names(listed))}
    described = bundle.trees["knobs.schema.json"]["properties"]
    for knob in names(listed):
        del described[knob]
    ((knob, entry),) = re.findall(r"give the items of `(\w+)` in `knobs.schema.json` the entry `(.*?)`", TEXT)
    described[knob]["items"] |= json.loads(f"{{{entry}}}")
    ((entry, name),) = re.findall(r"write `(.*?)` in section 1 of `(.*?)`", TEXT)
    bundle.trees[name] |= json.loads(f"{{{entry}}}")

    rows = re.findall(r"^\| (`.*?) \| (.*?) \| (.*?) \|$", TEXT.partition("| file | entry |")[2], re.MULTILINE)
    assert len(rows) >= 6
    for files, entries, now in rows:
        for entry in names(entries):
            found = [place for name in names(files) for place in bundle.places(name, entry)]
            assert found, f"no {entry} in {files}"
            if entry.endswith("_data_format"):
                described = found[0][entry]
                for end, channels in (("inputs", {"0": "image"}), ("outputs", {"0": "background", "1": "kidney"})):
                    described[end]["image" if end == "inputs" else "pred"].update(
                        modality="CT", spatial_shape=[32, 32, 32], channel_def=channels
                    )
                continue
            if entry == "use_locator":
                found[0][entry]["description"] = OWN[entry]
                continue
            if entry in ("_desc_", "title") and "evaluate.json" not in files:
                found = [bundle.trees[name] for name in names(files)]
            for place_ in found:
                place_[entry] = json.loads(names(now)[0]) if names(now)[:1] else OWN[entry]
    for tree in (bundle.trees[name] for name in ("train.json", "train_locator.json", "inference.json")):
        tree |= {key: value for key, value in KNOBS.items() if key in tree}
    bundle.trees["train_locator.json"]["learning_rate"] = 0.01
    bundle.write()
    return place


@pytest.fixture(scope="module")
def root(made: Path) -> Path:
    return made / shlex.split(commands("segbundles check")[0])[2]


def test_nothing_describes_the_old_data(root: Path) -> None:
    """Except comments on transforms, and names that all bundles share."""
    for path in root.rglob("*.json"):
        text = path.read_text().replace("segbundles.networks.AttentionVNet", "")
        assert not re.findall("atrium|lasc18|laendo|VNet", text), path


def test_check_finds_no_fault_except_missing_weights(root: Path) -> None:
    checked = check_bundle(root, schema=META_SCHEMA)
    faults = {found.problem for item in checked for found in item.findings if found.fault}
    told = re.findall(r"`(models/\S+ does not exist)`", TEXT)
    assert faults == set(told) == {"models/model.pt does not exist", "models/locator.pt does not exist"}
    assert checked[-1].summary == "schema, networks run on random numbers: 2"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract_of_all_bundles(check: Callable[[Path], None], root: Path) -> None:
    check(root)


def test_check_properties_lacks_nothing(made: Path, root: Path) -> None:
    check_properties(root, made / "data/kidney", {})


@pytest.mark.slow
def test_it_trains_evaluates_and_segments(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    Path("bundles/kidney_segresnet/configs/logging.conf").unlink()  # the process of the tests keeps its own
    for command in commands("python -m monai.bundle"):
        command_line(command)
    (row,) = table(Path("results/metrics.csv"))
    assert row["status"] == "ok"
    assert float(row["dice"]) > 0.55  # the whole crop would give 0.44
    rows = table(Path("masks/inference.csv"))
    assert [row["status"] for row in rows] == ["ok"] * 5
    truth, mask = (nib.load(name) for name in ("data/kidney/labels/4.nii.gz", "masks/4_seg.nii.gz"))
    np.testing.assert_allclose(mask.affine, AFFINE)
    found, expected = (np.asarray(image.dataobj) > 0 for image in (mask, truth))
    dice = 2 * (found & expected).sum() / (found.sum() + expected.sum())
    assert dice == pytest.approx(float(row["dice"]), abs=0.02)
    assert Path("results/report.html").read_text().count("Kidney, validation") >= 1

    models = Path("bundles/kidney_segresnet/models")
    facts = {stem: json.loads((models / f"{stem}.json").read_text())["knobs"] for stem in ("model", "locator")}
    assert facts["model"]["base_channels"] == 4
    assert facts["locator"] == {
        "locator_spacing_mm": [5.0, 5.0, 5.0],
        "locator_base_channels": 2,
        "locator_norm": "instance",
    }
    network = load("kidney_segresnet", bundle_dir="bundles", source="monaihosting")
    assert isinstance(network, SegResNet)
    weights = torch.load(models / "model.pt", weights_only=True)
    assert weights.keys() == network.state_dict().keys()
