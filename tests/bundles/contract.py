"""What every bundle promises, as checks of a folder; ``test_contract.py`` runs them on each one under ``bundles/``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bundle_runs import SCHEMA
from monai.bundle import ConfigWorkflow, verify_metadata, verify_net_in_out

# knobs whose default may differ between training and inference
DIFFERENT = {"batch_size", "output_dir", "weights", "locator_weights"}
IDS = {"train.json": "training", "evaluate.json": "evaluating", "inference.json": "inferring"}


def config(root: Path, name: str) -> dict[str, Any]:
    """Contents of a config, unparsed."""
    return json.loads((root / "configs" / name).read_text())


def described_knobs(root: Path) -> set[str]:
    return set(config(root, "knobs.schema.json")["properties"])


def check_files(root: Path) -> None:
    names = [f"{name}.json" for name in ("train", "evaluate", "inference", "metadata", "knobs.schema")]
    names += [f"multi_gpu_{name}.json" for name in ("train", "evaluate", "inference")] + ["logging.conf"]
    assert [name for name in names if not (root / "configs" / name).is_file()] == []
    assert (root / "LICENSE").is_file()
    assert not list(root.rglob("*.py"))


def check_ids(root: Path) -> None:
    for name, run_id in IDS.items():
        tree = config(root, name)
        assert tree[run_id] == "@run", name
    for name in ("train.json", "inference.json"):
        tree = config(root, name)
        assert tree["settings"] == "$segbundles.bundle.settle(@bundle_root)", name
        assert tree["initialize"][0] == "$@settings", name
        for network in ("network_def", "locator_def"):
            assert list(tree.get(network, {"_target_": "", "_requires_": "@settings"}))[:2] == [
                "_target_",
                "_requires_",
            ]


def check_handlers_are_written_out(root: Path) -> None:
    """MONAI Label adds to the list of training, and cannot follow a reference."""
    train, inference = config(root, "train.json"), config(root, "inference.json")
    assert isinstance(train["train"]["handlers"], list)
    assert isinstance(inference["handlers"], list)
    results = [h for h in inference["handlers"] if h["_target_"] == "segbundles.handlers.InferenceResults"]
    assert len(results) == json.dumps(inference).count("InferenceResults") == 1


def check_files_agree(root: Path) -> None:
    """Training, evaluation and inference say the same where they must."""
    train, evaluate, inference = (config(root, name) for name in IDS)
    for key in ("network_def", "locator_def"):
        assert train.get(key) == inference.get(key), key
    engine = f"$segbundles.networks.use_engine({train['network'][1:]}, @engine, @weights)"
    assert evaluate["network"] == inference["network"] == engine
    both = {**train, **evaluate}
    for knob in described_knobs(root) & both.keys() & inference.keys() - DIFFERENT:
        assert both[knob] == inference[knob], knob
    if (root / "configs/train_locator.json").is_file():
        locator = config(root, "train_locator.json")
        assert locator["network_def"] == train["locator_def"]
        assert locator["locator_spacing_mm"] == inference["locator_spacing_mm"]
    prepared = {json.dumps(step) for step in inference["preprocessing"]["transforms"]}
    learnt = train["validate"].get("deterministic_transforms") or train["train"]["deterministic_transforms"]
    # what training does slice by slice is a transform of whole volumes in validation
    whole = [step for step in train["validate"].values() if isinstance(step, dict) and step.get("keys") == "image"]
    missing = prepared - {json.dumps({**step, "keys": "image"}) for step in (*learnt, *whole)}
    # readers differ where cases of a datalist name a page, and labels need no second reader
    assert all('"LoadImaged"' in step for step in missing), missing


def check_properties(root: Path, dataset_dir: Path, settings: dict[str, Any]) -> None:
    for name, kind in (("train.json", "train"), ("inference.json", "infer")):
        given = {k: v for k, v in settings.items() if k in config(root, name)}
        given |= {"dataset_dir": str(dataset_dir), "output_dir": str(dataset_dir / "unused"), "device": "cpu"}
        workflow = ConfigWorkflow(
            str(root / "configs" / name), workflow_type=kind, logging_file=False, bundle_root=str(root), **given
        )
        workflow.initialize()
        assert workflow.check_properties() == [], name


def check_metadata(root: Path) -> None:
    """The schema, and networks that take and give what the metadata says."""
    meta = root / "configs/metadata.json"
    if SCHEMA.is_file():
        digest = "cd64aa8a5904426f6fc6855dabe46af8c742d5bad644b4e9cfb78ebad09ad678"
        verify_metadata(meta_file=str(meta), filepath=str(SCHEMA), hash_val=digest, hash_type="sha256")
    for key, described in config(root, "metadata.json").items():
        if key.endswith("_data_format"):
            verify_net_in_out(
                net_id=key.replace("_data_format", "_def"),
                meta_file=str(meta),
                config_file=str(root / "configs/inference.json"),
                device="cpu",
                extra_forward_args={},
                bundle_root=str(root),
                **{"_meta_::network_data_format": described},
            )


CHECKS: tuple[Callable[[Path], None], ...] = (
    check_files,
    check_ids,
    check_handlers_are_written_out,
    check_files_agree,
    check_metadata,
)
