from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from urllib.error import URLError

import pytest
from monai.bundle import ConfigParser

from segbundles.check import check_bundle, read_overrides
from segbundles.facts import sha256

ROOT = Path(__file__).resolve().parents[1]
BUNDLES = sorted(path for path in (ROOT / "bundles").iterdir() if path.is_dir())
EVALUATOR = "validate::evaluator"
CROP = "train::preprocessing::transforms::1"
TRAIN = {
    "$schema": "./knobs.schema.json",
    "imports": ["$import segbundles"],
    "_section_1_": "the knobs",
    "bundle_root": ".",
    "dataset_dir": "./data",
    "ckpt_dir": "$@bundle_root + '/models'",
    "device": "cpu",
    "max_epochs": 3,
    "val_interval": 1,
    "learning_rate": 0.1,
    "amp": True,
    "early_stop_patience": None,
    "patch_size": [8, 8],
    "spacing_mm": [1.0, 1.0],
    "kernel_size": 3,
    "initial_weights": None,
    "_section_2_": "the model",
    "cases": {"_target_": "segbundles.data.Datalist", "dataset_dir": "@dataset_dir"},
    "network_def": {
        "_target_": "torch.nn.Conv2d",
        "_requires_": "@settings",
        "in_channels": 1,
        "out_channels": 2,
        "kernel_size": "@kernel_size",
        "padding": "$@kernel_size // 2",
    },
    "network": "$@network_def.to(@device)",
    "loss": {"_target_": "DiceLoss", "_desc_": "any", "sigmoid": True},
    "optimizer": {"_target_": "torch.optim.Adam", "params": "$@network.parameters()", "lr": "@learning_rate"},
    "lr_scheduler": {"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau", "optimizer": "@optimizer"},
    "train": {
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "RandSpatialCropd", "keys": "image", "roi_size": "@patch_size"},
                {"_target_": "Spacingd", "keys": "image", "pixdim": "@spacing_mm"},
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "@cases", "transform": "@train::preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@train::dataset", "batch_size": 1, "shuffle": "$not @amp"},
        "inferer": {"_target_": "SimpleInferer"},
        "handlers": [
            {"_target_": "segbundles.handlers.WeightsLoader", "path": "@initial_weights", "network": "@network"},
            {"_target_": "ValidationHandler", "validator": "@validate::evaluator", "interval": "@val_interval"},
            {
                "_target_": "segbundles.handlers.TrainingRun",
                "output_dir": "@ckpt_dir",
                "ckpt_dir": "@ckpt_dir",
                "network": "@network",
                "optimizer": "@optimizer",
                "loss": "@loss",
                "lr_scheduler": "@lr_scheduler",
                "validator": "@validate::evaluator",
                "early_stop_patience": "@early_stop_patience",
                "settings": "@settings",
            },
        ],
        "trainer": {
            "_target_": "SupervisedTrainer",
            "max_epochs": "@max_epochs",
            "device": "@device",
            "train_data_loader": "@train::dataloader",
            "network": "@network",
            "optimizer": "@optimizer",
            "loss_function": "@loss",
            "train_handlers": "@train::handlers",
        },
    },
    "validate": {
        "handlers": [
            {
                "_target_": "CheckpointSaver",
                "save_dir": "@ckpt_dir",
                "save_dict": {"network": "@network"},
                "save_key_metric": True,
                "key_metric_name": "val_dice",
            }
        ],
        "key_metric": {"val_dice": {"_target_": "MeanDice"}},
        "more_metrics": {"val_accuracy": {"_target_": "ConfusionMatrix", "metric_name": "accuracy"}},
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@train::dataloader",
            "network": "@network",
            "key_val_metric": "@validate::key_metric",
            "additional_metrics": "@validate::more_metrics",
            "val_handlers": "@validate::handlers",
        },
    },
    "settings": "$segbundles.bundle.settle(@bundle_root)",
    "initialize": ["$@settings"],
    "run": ["$@train::trainer.run()"],
    "training": "@run",
}
EVALUATE = {
    "split": "validation",
    "cases::split": "@split",
    "validate::handlers": [
        {"_target_": "CheckpointLoader", "load_path": "$@ckpt_dir + '/model.pt'", "load_dict": {"network": "@network"}}
    ],
    "+initialize": ["$torch.manual_seed(0)"],
    "evaluating": ["$@validate::evaluator.run()"],
}
INFERENCE = {
    "imports": ["$import segbundles"],
    "_section_1_": "the knobs",
    "bundle_root": ".",
    "dataset_dir": "./data",
    "weights": "$@bundle_root + '/models/model.pt'",
    "device": "cpu",
    "spacing_mm": [1.0, 1.0],
    "kernel_size": 3,
    "_section_2_": "the rest",
    "dataset": {
        "_target_": "Dataset",
        "data": {"_target_": "segbundles.data.FolderImages", "dataset_dir": "@dataset_dir"},
        "transform": "@preprocessing",
    },
    "preprocessing": {"_target_": "Spacingd", "keys": "image", "pixdim": "@spacing_mm"},
    "network_def": deepcopy(TRAIN["network_def"]),
    "inferer": {"_target_": "SimpleInferer"},
    "handlers": [{"_target_": "segbundles.handlers.WeightsLoader", "path": "@weights", "network": "@network_def"}],
    "evaluator": {
        "_target_": "SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": {"_target_": "DataLoader", "dataset": "@dataset"},
        "network": "@network_def",
        "val_handlers": "@handlers",
    },
    "settings": "$segbundles.bundle.settle(@bundle_root)",
    "initialize": ["$@settings"],
    "run": ["$@evaluator.run()"],
}
IMAGE = {"num_channels": 1, "spatial_shape": [8, 8], "dtype": "float32", "value_range": []}
TEXT, COUNT, POSITIVE = {"type": "string"}, {"type": "integer", "minimum": 1}, {"type": "number", "minimum": 0}
KNOBS = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        **dict.fromkeys(("bundle_root", "dataset_dir", "ckpt_dir", "device"), TEXT),
        "max_epochs": COUNT | {"unit": "epochs", "description": "Length of the training. Whole epochs."},
        "val_interval": COUNT,
        "learning_rate": POSITIVE,
        "amp": {"type": "boolean"},
        "early_stop_patience": {"type": ["integer", "null"], "formerly": ["patience"]},
        "patch_size": {"type": "array", "items": COUNT, "minItems": 2, "maxItems": 2},
        "spacing_mm": {"type": "array", "items": POSITIVE, "fact": True},
        "kernel_size": COUNT | {"fact": True},
        "initial_weights": {"type": ["string", "null"]},
        "weights": {"anyOf": [TEXT, {"type": "array", "items": TEXT}], "loads": True},
        "split": {"enum": ["training", "validation", "testing"]},
    },
}
METADATA = {
    "schema": "https://example.invalid/schema.json",
    "version": "0.1.0",
    "monai_version": "1.6.1",
    "pytorch_version": "2.13.0",
    "numpy_version": "2.4.6",
    "network_data_format": {
        "inputs": {"image": IMAGE},
        "outputs": {"pred": IMAGE | {"num_channels": 2}},
    },
}


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "fish"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "model.pt").touch()
    files = {
        "train": TRAIN,
        "evaluate": EVALUATE,
        "inference": INFERENCE,
        "metadata": METADATA,
        "knobs.schema": KNOBS,
        "args_quick": {"max_epochs": 1, "device": "cpu", "loss::sigmoid": False, "split": "testing"},
        "args_evaluate": {
            "run_id": "evaluating",
            "config_file": ["configs/train.json", "configs/evaluate.json"],
            "bundle_root": ".",
        },
    }
    for name, tree in files.items():
        write(folder, name, tree)
    return folder


@pytest.fixture
def schema(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"type": "object", "required": ["version"]}))
    return path


def write(bundle, name, tree):
    path = bundle / "configs" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return path


def edited(tree, edits):
    """A copy in which ids have other values; DROP takes one out."""
    parser = ConfigParser(config=deepcopy(tree))
    for id, value in edits.items():
        if value is DROP:
            section, _, key = id.rpartition("::")
            del parser[section][key]
        else:
            parser[id] = value
    return parser.get()


DROP = object()


def found(bundle, *configs, **options):
    checked = check_bundle(bundle, configs or ["train.json"], **options)
    return [finding for item in checked for finding in item.findings]


def expect(findings, *expected):
    """Check that the findings are those expected (id, part of the problem, part of the repair), in their order."""
    assert [finding.id for finding in findings] == [id for id, _, _ in expected], findings
    for finding, (_, problem, repair) in zip(findings, expected, strict=True):
        assert problem in finding.problem
        assert repair in finding.repair


def test_a_whole_bundle_without_fault(bundle, schema):
    before = sorted(bundle.rglob("*"))
    checked = check_bundle(bundle, schema=schema)
    assert [finding for item in checked for finding in item.findings] == []
    assert [item.config for item in checked] == [
        "train.json",
        "train.json + evaluate.json",
        "inference.json",
        "train.json + evaluate.json + args_evaluate.json",
        "train.json + args_quick.json",
        "inference.json + args_quick.json",
        "knobs.schema.json",
        "metadata.json",
    ]
    assert checked[0].summary == "components: 20, references: 48, expressions: 9"
    assert [item.summary for item in checked[-2:]] == ["knobs: 15", "schema, networks run on random numbers: 1"]
    assert sorted(bundle.rglob("*")) == before


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ({"loss::_target_": "DicLoss"}, [("loss", "DicLoss does not exist", "did you mean 'DiceLoss'?")]),
        ({"loss::_target_": "monai.losses.DiceLos"}, [("loss", "does not exist", "did you mean 'DiceLoss'?")]),
        ({"loss::_target_": "segbundles.losses.NoLoss"}, [("loss", "segbundles.losses.NoLoss does not exist", "")]),
        ({"loss::_target_": "no_such_package.L"}, [("loss", "does not exist", "is its package installed")]),
        (
            {"loss::sigmod": 1},
            [("loss::sigmod", "DiceLoss has no argument 'sigmod'", "did you mean 'sigmoid'?")],
        ),
        ({"loss::softmx": True}, [("loss::softmx", "DiceLoss has no argument 'softmx'", "did you mean 'softmax'?")]),
        (
            {"loss::_wrapper_": "x"},
            [("loss::_wrapper_", "has no argument '_wrapper_'", "its arguments are")],
        ),  # not one of MONAI's
        ({"optimizer::params": DROP}, [("optimizer", "Adam needs params", "add params")]),
        (
            {"network_def::in_channels": DROP, "network_def::out_channels": DROP},
            [("network_def", "needs in_channels, out_channels", "")],
        ),
        (
            {f"{CROP}::roi_size": DROP, f"{CROP}::roi_sizes": "@patch_size"},
            [
                (f"{CROP}::roi_sizes", "RandSpatialCropd has no argument 'roi_sizes'", "did you mean 'roi_size'?"),
                (CROP, "RandSpatialCropd needs roi_size", "add roi_size"),
            ],
        ),
        (
            {"train::handlers::0": {"_target_": "segbundles.handlers.WeightLoader", "path": "@initial_weights"}},
            [("train::handlers::0", "does not exist", "did you mean 'WeightsLoader'?")],
        ),
        ({"loss::_requires_": "@network", "loss::_disabled_": False}, []),
        ({"loss": {"_target_": "DiceLoss", "_mode_": "callable"}}, []),
        (
            {"optimizer": {"_target_": "torch.optim.Adam", "_mode_": "callable"}},
            [("learning_rate", "nothing uses it", "")],
        ),
        ({"train::dataloader::drop_last": True, "loss": {"_target_": "builtins.dict", "a": 1}}, []),
        ({"network": {"_target_": "$@network_def.to", "device": "@device"}}, []),
    ],
)
def test_targets(bundle, edits, expected):
    write(bundle, "train", edited(TRAIN, edits))
    expect(found(bundle), *expected)


def test_a_target_whose_module_fails(bundle):
    (bundle / "own_code.py").write_text("import no_such_package")
    write(bundle, "train", edited(TRAIN, {"loss::_target_": "own_code.Loss"}))
    expect(found(bundle), ("loss", "cannot be imported: No module named 'no_such_package'", "install what it needs"))
    assert not (bundle / "__pycache__").exists()


def test_a_keyword_passed_on_may_be_misspelt(bundle):
    write(bundle, "train", edited(TRAIN, {"train::dataloader::num_worker": 2}))
    findings = found(bundle)
    expect(findings, ("train::dataloader::num_worker", "'num_worker' may be a typo", "did you mean 'num_workers'?"))
    assert not findings[0].fault


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ({"loss::sigmoid": "@ampp"}, [("loss::sigmoid", "@ampp does not exist", "did you mean 'amp'?")]),
        ({"loss::sigmoid": "$not @zzz and @amp"}, [("loss::sigmoid", "@zzz does not exist", "define it")]),
        (
            {"loss::sigmoid": "@train::datasets::data"},
            [("loss::sigmoid", "@train::datasets::data", "'train::dataset::data'")],
        ),
        ({"loss::sigmoid": "@max_epochs + 1"}, [("loss::sigmoid", "'@max_epochs + 1' is not a reference", "with $")]),
        ({"loss::sigmoid": "$1 +"}, [("loss::sigmoid", "'$1 +' is not a Python expression", "what follows the $")]),
        ({"loss::sigmoid": "$x = @amp"}, [("loss::sigmoid", "is not a Python expression", "")]),
        ({"loss::sigmoid": "$bool([n for n in @patch_size if n > @max_epochs])"}, []),
        ({"imports": ["$import segbundles", "$import os.path as p", "$from os import sep"]}, []),
        ({"loss::sigmoid": "@_meta_::version"}, []),
        (
            {"loss::sigmoid": "$@loss.sigmoid"},
            [("loss::sigmoid", "refers to itself: loss::sigmoid -> loss", "remove one")],
        ),
    ],
)
def test_references_and_expressions(bundle, edits, expected):
    write(bundle, "train", edited(TRAIN, edits))
    expect(found(bundle), *expected)


SAVER = "validate::handlers::0"


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        (
            {f"{SAVER}::key_metric_name": "val_dise"},
            [(SAVER, "needs the metric 'val_dise', which is not computed", "did you mean 'val_dice'?")],
        ),
        ({f"{SAVER}::key_metric_name": "xyz"}, [(SAVER, "'xyz'", "the metrics are: val_dice, val_accuracy")]),
        ({f"{SAVER}::key_metric_name": "val_accuracy"}, []),
        (
            {SAVER: {"_target_": "MetricsSaver", "save_dir": ".", "metrics": ["val_dice", "val_acc"]}},
            [(SAVER, "'val_acc'", "")],
        ),
        ({SAVER: {"_target_": "MetricsSaver", "save_dir": ".", "metrics": "*"}}, []),
        ({"validate::key_metric": "$dict(val_dise=1)", f"{SAVER}::key_metric_name": "val_dise"}, []),
        (
            {"validate::more_metrics": {"val_dice": {"_target_": "MeanDice"}}},
            [(EVALUATOR, "two metrics are named 'val_dice'", "rename the additional one")],
        ),
        (
            {f"{EVALUATOR}::key_val_metric": DROP},
            [
                ("train::handlers::2", f"needs the key metric of {EVALUATOR}, which has none", "give validate"),
                (SAVER, "needs the metric 'val_dice'", "the metrics are: val_accuracy"),
            ],
        ),
        (
            {f"{EVALUATOR}::key_val_metric": DROP, f"{SAVER}::key_metric_name": DROP},
            [("train::handlers::2", "needs the key metric", ""), (SAVER, "needs the key metric", "")],
        ),
        ({"train::handlers::1": "@train::handlers::0", "val_interval": DROP}, None),
    ],
)
def test_metrics(bundle, edits, expected):
    write(bundle, "train", edited(TRAIN, edits))
    findings = found(bundle)
    if expected is None:
        assert ("train::handlers::2", f"needs {EVALUATOR}, which no ValidationHandler runs") in [
            (finding.id, finding.problem) for finding in findings
        ]
        return
    expect(findings, *expected)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"max_epoch": 1}, [("max_epoch", "no config of this bundle has this setting", "did you mean 'max_epochs'?")]),
        (
            {"max_epoch": 1, "zzz": 2},
            [("max_epoch", "no config", ""), ("zzz", "no config", "section 1 of the JSON shows")],
        ),
        ({"loss#sigmod": True}, [("loss::sigmod", "DiceLoss has no argument", "")]),
        ({"train#trainr#amp": True}, [("train::trainr::amp", "has no place in the config", "did you mean 'trainer'")]),
        (
            {"max_epochs": "many", "amp": "no"},
            [
                (
                    "max_epochs",
                    "must be a whole number of 1 or more (epochs), got the text 'many'",
                    "Length of the training",
                ),
                ("amp", "must be true or false, got the text 'no'", ""),
            ],
        ),
        ({"amp": "false", "early_stop_patience": "null", "max_epochs": 4, "run_name": "x"}, []),
        ({"patience": 3}, [("patience", "no config of this bundle", "it is now called 'early_stop_patience'.")]),
        ({"split": "testing"}, [("split", "nothing uses it here", "it belongs to evaluate.json")]),
        (
            {"inferer::roi_size": [8, 8]},
            [("inferer::roi_size", "has no place in the config", "it belongs to inference.json")],
        ),
        ({"run_id": "trainin"}, [("run_id", "there is no id 'trainin'", "did you mean 'training'?")]),
        ({"run_id": "training", "logging_file": False, "workflow_type": "train"}, []),
        ({"bundle_root": "nowhere"}, [("bundle_root", "nowhere does not exist", "the folder that contains configs")]),
        ({"config_file": "['train.json', 'configs/evaluate.json']", "split": "testing"}, []),
        ({"network_def::dilation": 2}, []),
    ],
)
def test_overrides(bundle, overrides, expected):
    expect([finding for item in check_bundle(bundle, overrides=overrides) for finding in item.findings], *expected)


def test_overrides_over_a_patch_from_elsewhere(bundle, tmp_path, monkeypatch):
    patch = tmp_path / "my_patch.json"
    patch.write_text(json.dumps({"scale": 2, "train::trainer::amp_kwargs": {"n": "@scale"}, "+initialise": ["$1"]}))
    expect(
        found(bundle, "train.json", patch),
        ("+initialise", "adds to 'initialise', which does not exist", "the config that it patches"),
        ("initialise", "no config of this bundle", "did you mean 'initialize'?"),
    )
    patch.write_text(json.dumps({"max_epoch": 2, "validate::handlrs": [], "trian": {"amp": 1}}))
    monkeypatch.chdir(tmp_path)
    expect(
        found(bundle, "train.json", "my_patch.json"),
        ("validate::handlrs", "no config", "did you mean 'validate::handlers'?"),
        ("max_epoch", "no config of this bundle has this setting", "did you mean 'max_epochs'?"),
        ("trian", "no config", "did you mean 'train'?"),
        ("trian::amp", "no config", ""),
    )


def test_a_misspelt_knob_in_a_patch_of_the_bundle(bundle, schema):
    write(bundle, "evaluate", EVALUATE | {"max_epoch": 1})
    expect(
        found(bundle, "train.json", "evaluate.json"),
        ("max_epoch", "no config of this bundle has this setting", "did you mean 'max_epochs'?"),
    )


def test_a_knob_that_nothing_uses(bundle):
    write(bundle, "train", edited(TRAIN, {"train::preprocessing": None, "loss::sigmoid": "@device"}))
    findings = found(bundle)
    expect(
        findings,
        ("patch_size", "nothing uses it here", "refer to it from a component"),
        ("spacing_mm", "nothing uses it here", "refer to it from a component"),
    )
    assert findings[0].fault
    # only a person who sets it is told
    assert found(bundle, overrides={"max_epochs": 2}) == []
    findings = found(bundle, overrides={"patch_size": [9, 9]})
    expect(findings, ("patch_size", "nothing uses it here", ""))
    assert findings[0].fault
    # a file of settings may be meant for another config too
    write(bundle, "args_quick", {"patch_size": [9, 9]})
    findings = found(bundle, args_file="args_quick.json")
    expect(findings, ("patch_size", "nothing uses it here", ""))
    assert not findings[0].fault


def test_args_files(bundle, schema):
    write(bundle, "args_quick", {"max_epocs": 1, "loss::sigmoid": "@amp", "dataset": {"_target_": "nothing.of.this"}})
    write(bundle, "args_evaluate", {"run_id": "evaluatin", "config_file": "configs/train.json"})
    write(bundle, "args_absent", {"config_file": "configs/trian.json"})
    write(bundle, "train_coarse", TRAIN | {"coarse": 1})
    write(bundle, "args_x_coarse", {"coarse": 2})
    checked = {item.config: item.findings for item in check_bundle(bundle, schema=schema)}
    expect(checked["train.json + args_quick.json"], ("max_epocs", "no config", "did you mean 'max_epochs'?"))
    expect(checked["inference.json + args_quick.json"], ("dataset", "nothing.of.this does not exist", ""))
    expect(checked["train.json + args_evaluate.json"], ("run_id", "there is no id 'evaluatin'", "give another"))
    expect(checked["args_absent.json"], ("config_file", "no config 'configs/trian.json' in fish", "give a config that"))
    expect(checked["train_coarse.json + args_x_coarse.json"], ("coarse", "no config of this bundle", ""))


def test_patches_are_laid_over_what_they_are_named_after(bundle, schema):
    for name in ("inference_fast", "train_longer", "multi_gpu_evaluate", "other", "multi_gpu_train_longer"):
        write(bundle, name, {"device": "cpu"})
    write(bundle, "args_multi_gpu_evaluate", {"device": "cpu"})
    write(bundle, "train_coarse", TRAIN)
    write(bundle, "multi_gpu_train_coarse", {"device": "cpu"})
    checked = [item.config.replace(".json", "") for item in check_bundle(bundle, schema=schema)]
    assert [name for name in checked if "args" not in name] == [
        "train",
        "train + evaluate",
        "train + evaluate + multi_gpu_evaluate",
        "train + train_longer + multi_gpu_train_longer",
        "train + other",
        "train + train_longer",
        "inference",
        "inference + inference_fast",
        "train_coarse",
        "train_coarse + multi_gpu_train_coarse",
        "knobs.schema",
        "metadata",
    ]
    assert "train + evaluate + multi_gpu_evaluate + args_multi_gpu_evaluate" in checked


def test_missing_weights_and_data(bundle, tmp_path):
    (bundle / "models" / "model.pt").unlink()
    expect(found(bundle, "inference.json"), ("weights", "models/model.pt does not exist", "train, which writes it"))
    expect(found(bundle, "inference.json", overrides={"weights": ["a.pt"]}), ("weights", "a.pt does not exist", ""))
    evaluate = ("train.json", "evaluate.json")
    expect(
        found(bundle, *evaluate), (f"{SAVER}::load_path", "models/model.pt does not exist", "train, which writes it")
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.pt").touch()
    other = {"weights": str(tmp_path / "other" / "model.pt")}
    assert found(bundle, *evaluate, overrides={"ckpt_dir": str(tmp_path / "other")}) == []
    write(bundle, "evaluate", edited(EVALUATE, {}) | {f"{SAVER}::_disabled_": True})
    assert found(bundle, *evaluate) == []
    expect(
        found(bundle, overrides={"initial_weights": "start.pt"}),
        ("initial_weights", "is start.pt, but there is no such", ""),
    )
    assert found(bundle, overrides={"initial_weights": str(tmp_path / "other" / "model.pt")}) == []

    expect(found(bundle, overrides={"dataset_dir": "absent"}), ("cases", "dataset_dir 'absent' is not a folder", ""))
    (tmp_path / "data").mkdir()
    data = {"dataset_dir": str(tmp_path / "data")}
    expect(found(bundle, overrides=data), ("cases", "there is no datalist.json", "a prepared folder"))
    (tmp_path / "data" / "datalist.json").write_text(json.dumps({"training": [{"image": "a.nii", "label": "b.nii"}]}))
    expect(found(bundle, overrides=data), ("cases", "image a.nii does not exist", ""))
    findings = found(bundle, "inference.json", overrides=data | other)
    expect(findings, ("dataset::data", "no image under", "images to segment"))
    for name in ("a.nii", "b.nii"):
        (tmp_path / "data" / name).touch()
    assert found(bundle, overrides=data) == []
    assert found(bundle, "inference.json", overrides=data | other) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1,\n "b" 2}', [("line 2, column 6", "a colon or a quote is missing", '"name": value')]),
        ("", [("line 1, column 1", "the file is empty", "restore it")]),
        ("[1]", [("", "has no names and values", "begin it with {")]),
        ('{"a": "x # y"}', [("a", "'#' in a string, which MONAI turns into ::", "remove it")]),
        ('{"a": ["$\'#\'"]}', [("a::0", "'#' in a string", "")]),
        ('{"a#b": 1}', [("a#b", "'#' in a name", "write :: instead")]),
        ('{"a": "$@b#c + @d::e"}', []),
        ('{"a": "$' + "1 + " * 40 + '1"}', [("a", "an expression of 162 characters, more than 160", "a function")]),
        ('{"a": "' + "b" * 200 + '"}', []),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', [("line 1, column 24", "'c' is already in line 1", "remove one")]),
    ],
)
def test_text_of_a_file(bundle, schema, text, expected):
    write(bundle, "args_text", text)
    checked = {item.config: item for item in check_bundle(bundle, schema=schema)}
    findings = checked["train.json + args_text.json"].findings
    expect([it for it in findings if it.config == "args_text.json"], *expected)


def test_a_broken_file_hides_no_other(bundle, schema):
    write(bundle, "train", '{"a": }')
    checked = {item.config: item for item in check_bundle(bundle, schema=schema)}
    expect(checked["train.json"].findings, ("line 1, column 7", "a value is missing before this }", "write it"))
    assert checked["train.json + evaluate.json"].findings == []
    assert checked["train.json + evaluate.json"].summary == ""
    assert checked["inference.json"].summary == "components: 8, references: 16, expressions: 6"


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        (
            {"train::trainer::max_epochs": DROP},
            [("train::trainer::max_epochs", "does not find 'max_epochs'", "define train::")],
        ),
        ({"train::handlers::1::interval": 1}, [("", "check_properties() fails", "use @ references")]),
        (
            {"train::handlers::1::interval": "@max_epochs"},
            [("val_interval", "does not find 'val_interval'", "to '@val_interval'")],
        ),
        (
            {f"{EVALUATOR}::val_handlers": "@train::handlers"},
            [("validate::handlers", "does not find 'val_handlers'", "'@validate")],
        ),
    ],
)
def test_properties(bundle, edits, expected):
    write(bundle, "train", edited(TRAIN, edits))
    found_ = [it for it in found(bundle) if "check_properties" in it.problem]
    expect(found_, *expected)


def test_metadata(bundle, schema, monkeypatch):
    def findings():
        item = check_bundle(bundle, schema=schema)[-1]
        assert item.config == "metadata.json"
        return item.findings

    write(bundle, "metadata", {key: value for key, value in METADATA.items() if key != "version"})
    expect(findings(), ("", "'version' is a required property", "as the schema of the metadata says"))
    fewer = deepcopy(METADATA)
    fewer["network_data_format"]["outputs"]["pred"]["num_channels"] = 3
    write(bundle, "metadata", fewer)
    expect(findings(), ("network_data_format", "network_def of inference.json", "channels"))

    def offline(*args, **kwargs):
        raise URLError("no connection")

    write(bundle, "metadata", METADATA)
    schema = None
    monkeypatch.setattr("monai.bundle.scripts.download_url", offline)
    expect(findings(), ("", "not compared with its schema (<urlopen error no connection>)", "give --schema"))
    assert [it.fault for it in findings()] == [False]
    (bundle / "configs" / "metadata.json").unlink()
    expect(findings(), ("", "cannot be read", ""))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"configs": ["trian.json"]}, r"no config 'trian.json' in fish: did you mean 'train.json'\?"),
        ({"args_file": "args_quik.json"}, r"no config 'args_quik.json' in fish: did you mean 'args_quick.json'\?"),
        ({"schema": "absent.json"}, r"there is no schema 'absent.json': give --schema a file"),
    ],
)
def test_what_does_not_exist_is_an_error(bundle, options, message):
    with pytest.raises(ValueError, match=message):
        check_bundle(bundle, **options)


def test_no_bundle(tmp_path):
    with pytest.raises(ValueError, match=r"is not a bundle, it has no configs/\*\.json: give the folder"):
        check_bundle(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--max_epochs", "5", "--amp", "false"], {"max_epochs": 5, "amp": "false"}),
        (
            ["--patch_size=[8,8]", "--train#x", "1e-3", "--resume"],
            {"patch_size": [8, 8], "train#x": 1e-3, "resume": True},
        ),
        (["--config_file", "['a.json','b.json']", "--n", "-1"], {"config_file": ["a.json", "b.json"], "n": -1}),
    ],
)
def test_read_overrides(arguments, expected):
    assert read_overrides(arguments) == expected


@pytest.mark.parametrize("arguments", [["stray"], ["--a", "1", "stray"]])
def test_a_stray_word_is_refused(arguments):
    with pytest.raises(ValueError, match=r"settings are written as --key value, after the bundle; got '.*stray'"):
        read_overrides(arguments)


def test_the_schema_of_the_knobs(bundle, schema):
    def findings():
        (item,) = (item for item in check_bundle(bundle, schema=schema) if item.config == "knobs.schema.json")
        return item.findings

    properties = {key: knob for key, knob in KNOBS["properties"].items() if key != "learning_rate"}
    write(bundle, "knobs.schema", KNOBS | {"properties": properties | {"amp": {"type": "boolen"}}})
    expect(findings(), ("properties::amp::type", "'boolen' is not", "JSON Schema"))
    write(bundle, "knobs.schema", KNOBS | {"properties": properties | {"levels": COUNT}})
    expect(findings(), ("levels", "no config has this knob", "remove it here"))
    warnings = found(bundle)
    expect(warnings, ("learning_rate", "knobs.schema.json does not describe it", "add it to the properties there"))
    assert not warnings[0].fault
    write(bundle, "knobs.schema", "{")
    expect(findings(), ("line 1, column 1", "the { here is not closed", "write }"))
    (bundle / "configs" / "knobs.schema.json").unlink()
    assert found(bundle) == []


def test_settings_that_contradict_the_facts_of_the_weights(bundle, schema):
    """As the run would do, with the facts of the weights; a config's own line, and other weights, may differ."""
    weights = bundle / "models" / "model.pt"
    knobs = {"kernel_size": 5, "spacing_mm": [2.0, 2.0]}
    weights.with_suffix(".json").write_text(json.dumps({"sha256": sha256(weights), "knobs": knobs}))
    write(bundle, "args_quick", {"kernel_size": 3})
    assert [finding for item in check_bundle(bundle, schema=schema) for finding in item.findings] == []
    assert found(bundle, "inference.json") == []
    assert found(bundle, overrides={"kernel_size": 7}) == []
    message = ("kernel_size", f"is 7, but {weights} was trained with kernel_size 5", "leave out kernel_size, or choose")
    expect(found(bundle, "inference.json", overrides={"kernel_size": 7}), message)
    write(bundle, "args_quick", {"kernel_size": 7})
    expect(found(bundle, "inference.json", args_file="args_quick.json"), message)
    warnings = found(bundle, "inference.json", overrides={"spacing_mm": [7.0, 7.0]})
    expect(warnings, ("spacing_mm", "[7.0, 7.0] differs from [2.0, 2.0], with which model.pt", "leave it out"))
    assert not warnings[0].fault
    expect(
        found(bundle, "inference.json", overrides={"device": "$1 / 0"}),
        ("device", "is '$1 / 0', which cannot be computed", "division by zero"),
    )
    weights.with_suffix(".json").write_text("{}")
    expect(
        found(bundle, "inference.json"), ("settings", "model.json cannot be read as the facts of", "stops with this")
    )


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        (
            "left_atrium_vnet",
            {"min_size_mm": 300},
            ("min_size_mm", "must be below max_size_mm 200.0, got 300", "Small"),
        ),
        (
            "brain_flair_unet",
            {"patch_size": [100, 96]},
            ("patch_size", "must be multiples of 2 ** (depth", "Size of a"),
        ),
    ],
)
def test_knobs_that_contradict_each_other(name, overrides, expected):
    expect(found(ROOT / "bundles" / name, overrides=overrides), expected)


@pytest.mark.slow
@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_the_bundles_have_no_fault(bundle, schema):
    checked = check_bundle(bundle, schema=schema)
    assert [finding for item in checked for finding in item.findings] == []
    named = [item.config.replace(".json", "") for item in checked]
    assert {"train + evaluate", "train + multi_gpu_train", "train + evaluate + multi_gpu_evaluate"} <= set(named)
    assert {"inference + multi_gpu_inference", "inference + inference_trt"} <= set(named)
    assert not {"train + multi_gpu_inference", "train + inference_trt"} & set(named)
