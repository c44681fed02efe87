"""Ensembles: several weights files as one, in inference, evaluation and Python."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_bundles import TINY_BUNDLES, TinyBundle, command_line

from segbundles.errors import InputError
from segbundles.facts import facts_path
from segbundles.segmenter import Segmenter

BY_NAME = {bundle.name: bundle for bundle in TINY_BUNDLES}
# facts by which the other member differs, also in what it gets
OTHER = {
    "left_atrium_vnet": {"base_channels": 3, "network_spacing_mm": [4.0, 4.0, 4.0]},
    "brain_flair_unet": {"base_channels": 3, "intensity_normalization": "slice", "context_slices": 1},
    "em_membrane_unet": {"base_channels": 3, "norm": "instance"},
    "polyp_fcn8": {"base_channels": 3, "frame_height": 24},
}


def make(bundle: TinyBundle, folder: Path) -> tuple[Path, Path, Path]:
    """A bundle, its own weights, and others with other facts."""
    root = bundle.make(folder)
    other = root / "models" / "other.pt"
    size = bundle.size
    if bundle.name == "brain_flair_unet":
        size = (size[0], 9, *size[2:])
    wide = TinyBundle(**{**vars(bundle), "size": size})
    wide.make_weights(root, "network_def", other, **OTHER[bundle.name])
    return root, root / "models" / "model.pt", other


@pytest.mark.parametrize("bundle", TINY_BUNDLES, ids=lambda bundle: bundle.name)
def test_mean_of_members_each_with_its_own_facts(bundle: TinyBundle, tmp_path: Path) -> None:
    root, model, other = make(bundle, tmp_path)
    image = bundle.write_image(tmp_path / "in")
    one, two, both, turned, twice = (
        Segmenter(root, weights=weights, save_probabilities=True)(image, bundle.affine)
        for weights in (str(model), str(other), f"[{model},{other}]", [str(other), str(model)], [str(model)] * 3)
    )
    assert np.abs(one["prob"] - two["prob"]).max() > 0.1
    for found in (both, turned):
        np.testing.assert_allclose(found["prob"], (one["prob"] + two["prob"]) / 2, atol=2e-6)
    np.testing.assert_array_equal(twice["pred"], one["pred"])
    if "cells" in one:
        np.testing.assert_array_equal(twice["cells"], one["cells"])


def test_command_line_takes_a_list_and_writes_down_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = BY_NAME["polyp_fcn8"]
    root, model, other = make(bundle, tmp_path)
    bundle.write_image(tmp_path / "in")
    command = f"python -m monai.bundle run inferring --bundle_root {root} --config_file {root}/configs/inference.json"
    command += f" --dataset_dir {tmp_path / 'in'} --output_dir {tmp_path / 'out'} --weights '[{model}, {other}]'"
    with caplog.at_level(logging.INFO, "segbundles"):
        command_line(command)
    record = json.loads((tmp_path / "out" / "inferring.config.json").read_text())
    assert record["knobs"]["weights"] == [str(model), str(other)]
    assert [entry["file"] for entry in record["weights"].values()] == [str(model), str(other)]
    assert "from their facts: base_channels 3" in caplog.text
    assert sum("Loaded weights from" in line for line in caplog.messages) == 2


def test_other_classes_are_refused_and_both_files_named(tmp_path: Path) -> None:
    root, model, other = make(BY_NAME["polyp_fcn8"], tmp_path)
    facts = json.loads(facts_path(other).read_text())
    facts_path(other).write_text(json.dumps({**facts, "classes": {"0": "background", "1": "bleeding"}}))
    with pytest.raises(InputError, match=r"model\.pt has the classes .*polyp.*, and .*other\.pt .*bleeding"):
        Segmenter(root, weights=[str(model), str(other)])
    with pytest.raises(InputError, match=r"weights is .*none\.pt, but there is no such file"):
        Segmenter(root, weights=[str(model), str(tmp_path / "none.pt")])


def test_a_member_of_another_architecture_without_facts_is_named(tmp_path: Path) -> None:
    root, model, other = make(BY_NAME["polyp_fcn8"], tmp_path)
    facts_path(other).unlink()
    with pytest.raises(InputError, match=r"other\.pt has another architecture"):
        Segmenter(root, weights=[str(model), str(other)])


def test_locators_one_for_all_or_one_for_each(tmp_path: Path) -> None:
    root, model, other = make(BY_NAME["left_atrium_vnet"], tmp_path)
    locator = root / "models" / "locator.pt"
    BY_NAME["left_atrium_vnet"].make_weights(root, "locator_def", tmp_path / "l.pt", locator_base_channels=3)
    pair = [str(model), str(other)]
    segment = Segmenter(root, weights=pair, locator_weights=[str(locator), str(tmp_path / "l.pt")])
    widths = [
        next(inferer.inferer.inferer.locator.parameters()).shape[0]
        for inferer in (segment.inferer.inferer, segment.inferer.members[0].inferer)
    ]
    assert widths == [2, 3]
    with pytest.raises(InputError, match="locator_weights has 2 files, and weights 3: give one for all, or one for"):
        Segmenter(root, weights=[*pair, str(model)], locator_weights=[str(locator)] * 2)


# one whose members get inputs of their own, and one whose networks give probabilities
@pytest.mark.parametrize("name", ["brain_flair_unet", "em_membrane_unet"])
def test_evaluation_scores_the_mean(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    bundle, data = BY_NAME[name], request.getfixturevalue(f"{name.split('_')[0]}_phantom")
    root, model, other = make(bundle, tmp_path)
    settings = {**bundle.settings, "amp": "false", "mirror_axes": [], "save_predictions": "true"}
    if bundle.name == "em_membrane_unet":
        settings.pop("smoothing_pixels")
    facts = json.loads(facts_path(model).read_text())["knobs"]

    def evaluate(name: str, weights: str) -> np.ndarray:
        given = {**{k: v for k, v in settings.items() if k not in facts}, "weights": weights, "split": "validation"}
        words = [f"--{key}={value}" for key, value in given.items()]
        config = f"['{root}/configs/train.json','{root}/configs/evaluate.json']"
        command = ["python", "-m", "monai.bundle", "run", "evaluating", "--bundle_root", str(root)]
        command += ["--config_file", config, "--dataset_dir", str(data), "--output_dir", str(tmp_path / name), *words]
        command_line(command)
        files = sorted((tmp_path / name / "predictions").glob("*.npz"))
        return np.concatenate([np.load(file)["probability"].ravel().astype(np.float32) for file in files])

    one, two = evaluate("one", str(model)), evaluate("two", str(other))
    both = evaluate("both", f"[{model},{other}]")
    assert np.abs(one - two).max() > 0.1
    np.testing.assert_allclose(both, (one + two) / 2, atol=2e-3)  # float16
    assert "Facts of weights 2" in (tmp_path / "both" / "report.html").read_text()


def test_an_exported_network_is_refused(tmp_path: Path) -> None:
    root, model, other = make(BY_NAME["polyp_fcn8"], tmp_path)
    exported = {"network": torch.jit.script(torch.nn.Identity()), "handlers::0::_disabled_": True}
    with pytest.raises(InputError, match=r"other\.pt is a member of an ensemble, and an exported network has no other"):
        Segmenter(root, weights=[str(model), str(other)], **exported)
