from __future__ import annotations

import json
import logging
from pathlib import Path

import monai
import pytest
import torch
from bundle_runs import ROOT
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, create_workflow, run

import segbundles
from segbundles.data import Datalist
from segbundles.errors import InputError
from segbundles.facts import facts_path, read_facts, sha256, weights_files, write_facts
from segbundles.knobs import fact_knobs, read_schema

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file")

KNOBS = {
    "width": {"type": "integer", "minimum": 1, "fact": True},
    "spacing_mm": {"type": "number", "exclusiveMinimum": 0, "fact": True},
    "batch_size": {"type": "integer"},
    "initial_weights": {"type": ["string", "null"]},
    "weights": {"anyOf": [{"type": "string"}, {"type": "array"}, {"type": "null"}], "loads": True},
}
INFERENCE = {
    "imports": ["$import segbundles"],
    "bundle_root": ".",
    "ckpt_dir": "$@bundle_root + '/models'",
    "weights": "$@ckpt_dir + '/model.pt'",
    "width": 2,
    "spacing_mm": 1.5,
    "batch_size": 1,
    "double": "$2 * @width",
    "network_def": {
        "_target_": "torch.nn.Linear",
        "_requires_": "@settings",
        "in_features": 1,
        "out_features": "@double",
    },
    "preprocessing": {"_target_": "builtins.dict", "spacing_mm": "@spacing_mm"},
    "settings": "$segbundles.bundle.settle(@bundle_root)",
    "initialize": ["$@settings"],
    "run": ["$@network_def"],
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle whose weights were trained with another width and spacing than its config says."""
    root = tmp_path / "fish"
    (root / "configs").mkdir(parents=True)
    (root / "models").mkdir()
    (root / "configs/inference.json").write_text(json.dumps(INFERENCE))
    (root / "configs/knobs.schema.json").write_text(json.dumps({"properties": KNOBS}))
    (root / "configs/metadata.json").write_text(json.dumps({"version": "1.2.3"}))
    write_weights(root / "models/model.pt", 3, spacing_mm=2.0)
    return root


def write_weights(path: Path, width: int, **knobs: object) -> None:
    torch.save({"weight": torch.ones(2 * width, 1), "bias": torch.zeros(2 * width)}, path)
    facts = {"bundle": "fish", "version": "1.0", "sha256": sha256(path), "knobs": {"width": width, **knobs}}
    facts_path(path).write_text(json.dumps(facts))


def config(bundle: Path) -> str:
    return str(bundle / "configs/inference.json")


def workflow(bundle: Path, **override: object) -> ConfigParser:
    made = ConfigWorkflow(
        config(bundle), workflow_type="infer", logging_file=False, bundle_root=str(bundle), **override
    )
    made.initialize()
    return made.parser


def values(parser: ConfigParser) -> tuple[int, float]:
    network, before = (parser.get_parsed_content(name) for name in ("network_def", "preprocessing"))
    return network.out_features // 2, before["spacing_mm"]


def cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    assert isinstance(error, segbundles.errors.InputError)
    return str(error)


def test_facts_come_before_the_config(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "segbundles"):
        parser = workflow(bundle)
    assert values(parser) == (3, 2.0)
    settings = parser.get_parsed_content("settings")
    assert settings.knobs == {**{k: INFERENCE[k] for k in ("batch_size",)}, "width": 3, "spacing_mm": 2.0} | {
        "weights": str(bundle / "models/model.pt")
    }
    assert {name: settings.sources[name] for name in ("width", "spacing_mm")} == dict.fromkeys(
        ("width", "spacing_mm"), "the facts of model.pt"
    )
    assert settings.facts["weights"]["version"] == "1.0"
    (line,) = (r.getMessage() for r in caplog.records if r.name == "segbundles")
    assert line == "Weights model.pt, fish 1.0; from their facts: width 3 (config: 2), spacing_mm 2.0 (config: 1.5)."


@pytest.mark.parametrize("door", ["parser", "initialize twice", "create_workflow", "config edited", "weights", "list"])
def test_every_door_uses_them(bundle: Path, door: str, tmp_path: Path) -> None:
    if door == "parser":  # as MONAI Label reads it: no initialize
        parser = ConfigParser()
        parser.read_config(config(bundle))
        parser.config.update({"bundle_root": str(bundle)})
    elif door == "initialize twice":
        made = ConfigWorkflow(config(bundle), workflow_type="infer", logging_file=False, bundle_root=str(bundle))
        for _ in range(2):
            made.initialize()
        parser = made.parser
    elif door == "create_workflow":
        made = create_workflow(
            config_file=config(bundle), workflow_type="infer", logging_file=False, bundle_root=str(bundle)
        )
        parser = made.parser
    elif door == "config edited":  # the config's line, whatever it is
        tree = {**INFERENCE, "width": 7}
        Path(config(bundle)).write_text(json.dumps(tree))
        parser = workflow(bundle)
    else:
        write_weights(tmp_path / "other.pt", 3, spacing_mm=2.0)
        write_weights(bundle / "models/model.pt", 9)
        named = str(tmp_path / "other.pt")
        parser = workflow(bundle, weights=named if door == "weights" else [named])
    assert values(parser) == (3, 2.0)


def test_export_uses_the_facts_of_the_file_it_exports(bundle: Path, tmp_path: Path) -> None:
    write_weights(tmp_path / "mine.pt", 5)
    out = tmp_path / "mine.ts"
    ckpt_export(
        net_id="network_def",
        filepath=str(out),
        ckpt_file=str(tmp_path / "mine.pt"),
        config_file=config(bundle),
        bundle_root=str(bundle),
        meta_file=str(bundle / "configs/metadata.json"),
    )
    assert torch.jit.load(out)(torch.ones(1, 1)).shape == (1, 10)


def test_a_given_value_comes_before_a_preprocessing_fact_with_a_warning(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parser = workflow(bundle, spacing_mm=4)
    assert values(parser) == (3, 4)
    settings = parser.get_parsed_content("settings")
    note = "spacing_mm 4 differs from 2.0, with which model.pt was trained"
    assert settings.notes == [note]
    assert settings.sources["spacing_mm"] == "an args file or a program"
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and r.name == "segbundles"] == [
        f"{note}."
    ]


@pytest.mark.parametrize("width", [4, 2])
def test_a_given_value_that_contradicts_the_architecture_is_refused(bundle: Path, width: int) -> None:
    """Also one that is the same as the config's line."""
    with pytest.raises(InputError) as caught:
        run(config_file=config(bundle), bundle_root=str(bundle), logging_file=False, width=width)
    path = bundle / "models/model.pt"
    assert cause(caught.value) == (
        f"width is {width}, but {path} was trained with width 3: leave out width, "
        "or choose other weights with --weights."
    )


def test_a_given_value_that_agrees_is_taken(bundle: Path) -> None:
    assert values(workflow(bundle, width=3, spacing_mm=2.0)) == (3, 2.0)


@pytest.mark.parametrize("how", ["none", "of other weights"])
def test_weights_without_facts_of_their_own_warn(bundle: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    if how == "none":
        facts_path(bundle / "models/model.pt").unlink()
    else:
        torch.save({"weight": torch.ones(4, 1), "bias": torch.zeros(4)}, bundle / "models/model.pt")
    assert values(workflow(bundle)) == (2, 1.5)
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and r.name == "segbundles"]
    assert said[-1].endswith("model.pt has no facts beside it: width, spacing_mm are taken from the config.")
    assert (how == "none") or said[0].endswith("model.json describes other weights (sha256 differs) and is ignored.")


def test_absent_weights_are_not_missed_before_they_are_loaded(bundle: Path) -> None:
    (bundle / "models/model.pt").unlink()
    assert values(workflow(bundle)) == (2, 1.5)


def test_damaged_facts_are_refused(bundle: Path) -> None:
    facts_path(bundle / "models/model.pt").write_text("{")
    with pytest.raises(InputError) as caught:
        workflow(bundle)
    assert "model.json cannot be read as the facts of model.pt" in cause(caught.value)


def test_facts_that_the_schema_does_not_allow_are_refused_by_source(bundle: Path) -> None:
    write_weights(bundle / "models/model.pt", 3, spacing_mm="2")
    with pytest.raises(InputError) as caught:
        workflow(bundle)
    said = "spacing_mm must be a number above 0, got the text '2' (from the facts of model.pt)."
    assert cause(caught.value) == said


def test_files_of_one_or_several_weights() -> None:
    assert weights_files(["a.pt"]) == weights_files("a.pt") == [Path("a.pt")]
    assert weights_files(None) == []
    assert weights_files(["a.pt", "b.pt"]) == [Path("a.pt"), Path("b.pt")]


def test_training_refuses_initial_weights_of_another_architecture(bundle: Path) -> None:
    tree = {k: v for k, v in INFERENCE.items() if k != "weights"} | {"initial_weights": None}
    Path(config(bundle)).write_text(json.dumps(tree))
    path = bundle / "models/model.pt"
    with pytest.raises(InputError) as caught:
        workflow(bundle, initial_weights=str(path))
    assert f"width is 2, but initial_weights {path} was trained with width 3: give --width that value" in cause(
        caught.value
    )
    assert values(workflow(bundle, initial_weights=str(path), width=3)) == (3, 1.5)


def test_what_is_written(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    cases = [{"image": "a", "label": "a", "group": "g"}, {"image": "b", "label": "b", "group": "g"}]
    for name in "abc":
        (tmp_path / "d" / name).write_text(name)
    held_out = {"image": "c", "label": "c", "group": "h"}
    listed = {"name": "fishes", "training": cases, "validation": [held_out]}
    (tmp_path / "d/datalist.json").write_text(json.dumps(listed))
    settings = workflow(bundle).get_parsed_content("settings")
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"weights")

    class Cached:
        data = Datalist(tmp_path / "d", "training")

    validation = {"metric": "dice", "value": 0.5, "epoch": 3}
    lists = {"dataset": Cached(), "validation_dataset": Datalist(tmp_path / "d", "validation")}
    write_facts(weights, settings, **lists, seed=1, epochs=4, validation=validation)
    facts = read_facts(weights)
    assert facts == {
        "bundle": "fish",
        "version": "1.2.3",
        "weights": "model.pt",
        "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",  # of b"weights", by sha256sum
        "knobs": {"width": 3, "spacing_mm": 2.0},
        "classes": {},
        "data": {
            "training": {"cases": 2, "groups": 1},
            "name": "fishes",
            "datalist_sha256": sha256(tmp_path / "d/datalist.json"),
            "validation": {"cases": 1, "groups": 1},
        },
        "seed": 1,
        "epochs": 4,
        "validation": validation,
        "versions": {"segbundles": segbundles.__version__, "monai": monai.__version__, "torch": torch.__version__},
    }


def test_settings_are_recorded(bundle: Path, tmp_path: Path) -> None:
    settings = workflow(bundle, spacing_mm=4).get_parsed_content("settings")
    settings.write(tmp_path / "inferring.config.json")
    record = json.loads((tmp_path / "inferring.config.json").read_text())
    assert record["knobs"] == settings.knobs
    assert record["sources"]["spacing_mm"] == "an args file or a program"
    assert record["weights"]["weights"]["sha256"] == sha256(bundle / "models/model.pt")
    assert record["versions"]["segbundles"] == segbundles.__version__


@pytest.mark.parametrize(
    "weights", sorted((ROOT / "bundles").glob("*/models/*.pt")), ids=lambda p: f"{p.parts[-3]}/{p.name}"
)
def test_shipped_weights_have_facts(weights: Path) -> None:
    facts, root = read_facts(weights), weights.parents[1]
    assert facts["shipped"] is True
    assert facts["bundle"] == root.name
    knob = "weights" if weights.stem == "model" else f"{weights.stem}_weights"
    inference = json.loads((root / "configs/inference.json").read_text())
    assert list(facts["knobs"]) == fact_knobs(read_schema(root), knob)
    # the config shows the values of the shipped weights
    assert facts["knobs"] == {name: inference[name] for name in facts["knobs"]}
    assert {"classes", "data", "seed", "epochs", "validation", "versions"} <= facts.keys()
