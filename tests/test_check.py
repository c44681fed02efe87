from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from urllib.error import URLError

import pytest
from monai.bundle import ConfigParser

from segbundles.check import Finding, check_bundle, read_overrides

ROOT = Path(__file__).resolve().parents[1]
EVALUATOR = "validate::evaluator"
CROP = "train::preprocessing::transforms::1"
TRAIN = {
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
    "patience": None,
    "patch_size": [8, 8],
    "initial_weights": None,
    "_section_2_": "the model",
    "cases": {"_target_": "segbundles.data.Datalist", "dataset_dir": "@dataset_dir"},
    "network_def": {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 2, "kernel_size": 3, "padding": 1},
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
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "@cases", "transform": "@train::preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@train::dataset", "batch_size": 1, "shuffle": "$not @amp"},
        "inferer": {"_target_": "SimpleInferer"},
        "handlers": [
            {"_target_": "segbundles.handlers.WeightsLoader", "path": "@initial_weights", "network": "@network"},
            {"_target_": "ValidationHandler", "validator": "@validate::evaluator", "interval": "@val_interval"},
            {
                "_target_": "segbundles.handlers.LrScheduleHandler",
                "lr_scheduler": "@lr_scheduler",
                "validator": "@validate::evaluator",
            },
            {
                "_target_": "segbundles.handlers.BestWeightsSaver",
                "ckpt_dir": "@ckpt_dir",
                "network": "@network",
                "validator": "@validate::evaluator",
            },
            {
                "_target_": "segbundles.handlers.EarlyStopHandler",
                "patience": "@patience",
                "validator": "@validate::evaluator",
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
    "initialize": ["$segbundles.bundle.check_overrides(@bundle_root)"],
    "run": ["$@train::trainer.run()"],
    "training": "@run",
}
EVALUATE = {
    "section": "validation",
    "cases::section": "@section",
    "validate::handlers": [
        {"_target_": "CheckpointLoader", "load_path": "$@ckpt_dir + '/model.pt'", "load_dict": {"network": "@network"}}
    ],
    "+initialize": ["$torch.manual_seed(0)"],
    "evaluating": ["$@validate::evaluator.run()"],
}
INFERENCE = {
    "bundle_root": ".",
    "dataset_dir": "./data",
    "device": "cpu",
    "dataset": {
        "_target_": "Dataset",
        "data": {"_target_": "segbundles.data.FolderImages", "dataset_dir": "@dataset_dir"},
    },
    "network_def": deepcopy(TRAIN["network_def"]),
    "inferer": {"_target_": "SimpleInferer"},
    "evaluator": {
        "_target_": "SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": {"_target_": "DataLoader", "dataset": "@dataset"},
        "network": "@network_def",
    },
    "run": ["$@evaluator.run()"],
}
IMAGE = {"num_channels": 1, "spatial_shape": [8, 8], "dtype": "float32", "value_range": []}
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
        "args_quick": {"max_epochs": 1, "device": "cpu", "loss::sigmoid": False, "section": "testing"},
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
    """Every finding is one of the expected (id, part of the problem, part of the repair), and none is lacking."""
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
        "metadata.json",
    ]
    assert checked[0].summary == "components: 21, references: 41, expressions: 7"
    assert checked[-1].summary == "schema, networks run on random numbers: 1"
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
            [("loss::sigmod", "DiceLoss takes no 'sigmod'", "did you mean 'sigmoid'?")],
        ),
        ({"loss::softmx": True}, [("loss::softmx", "DiceLoss takes no 'softmx'", "did you mean 'softmax'?")]),
        ({"loss::_wrapper_": "x"}, [("loss::_wrapper_", "takes no '_wrapper_'", "it takes")]),  # not one of MONAI's
        ({"optimizer::params": DROP}, [("optimizer", "Adam needs params", "add params")]),
        (
            {"network_def::in_channels": DROP, "network_def::kernel_size": DROP},
            [("network_def", "in_channels, kernel_", "")],
        ),
        (
            {f"{CROP}::roi_size": DROP, f"{CROP}::roi_sizes": "@patch_size"},
            [
                (f"{CROP}::roi_sizes", "RandSpatialCropd takes no 'roi_sizes'", "did you mean 'roi_size'?"),
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
    expect(found(bundle), ("loss", "cannot be imported: No module named 'no_such_package'", "install what it lacks"))
    assert not (bundle / "__pycache__").exists()


def test_a_keyword_passed_on_may_be_misspelt(bundle):
    write(bundle, "train", edited(TRAIN, {"train::dataloader::num_worker": 2}))
    findings = found(bundle)
    expect(findings, ("train::dataloader::num_worker", "passes 'num_worker' on", "did you mean 'num_workers'?"))
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
        ({"loss::sigmoid": "@max_epochs + 1"}, [("loss::sigmoid", "'@max_epochs + 1' is no reference", "with $")]),
        ({"loss::sigmoid": "$1 +"}, [("loss::sigmoid", "'$1 +' is not a Python expression", "what follows the $")]),
        ({"loss::sigmoid": "$x = @amp"}, [("loss::sigmoid", "is not a Python expression", "")]),
        ({"loss::sigmoid": "$bool([n for n in @patch_size if n > @max_epochs])"}, []),
        ({"imports": ["$import os.path as p", "$from os import sep"]}, []),
        ({"loss::sigmoid": "@_meta_::version"}, []),
        (
            {"loss::sigmoid": "$@loss.sigmoid"},
            [("loss::sigmoid", "refers to itself: loss::sigmoid -> loss", "the circle")],
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
            [(SAVER, "waits for the metric 'val_dise', which nothing computes", "did you mean 'val_dice'?")],
        ),
        ({f"{SAVER}::key_metric_name": "xyz"}, [(SAVER, "'xyz'", "computed are: val_dice, val_accuracy")]),
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
                ("train::handlers::2", f"waits for the key metric of {EVALUATOR}, which has none", "give validate"),
                ("train::handlers::3", f"waits for the key metric of {EVALUATOR}", "a key_val_metric"),
                (SAVER, "waits for the metric 'val_dice'", "computed are: val_accuracy"),
            ],
        ),
        (
            {
                f"{EVALUATOR}::key_val_metric": DROP,
                "patience": 5,
                "lr_scheduler::_target_": "torch.optim.lr_scheduler.ConstantLR",
                f"{SAVER}::key_metric_name": DROP,
            },
            [
                ("train::handlers::3", "waits for the key metric", ""),  # 2: a schedule that waits for nothing
                ("train::handlers::4", "waits for the key metric", ""),
                (SAVER, "waits for the key metric", ""),
            ],
        ),
        (
            {
                "train::handlers::1": "@train::handlers::0",
                "val_interval": DROP,
                "lr_scheduler::_target_": "torch.optim.SGD",
            },
            None,
        ),
    ],
)
def test_metrics(bundle, edits, expected):
    write(bundle, "train", edited(TRAIN, edits))
    findings = found(bundle)
    if expected is None:
        assert ("train::handlers::3", f"waits for {EVALUATOR}, which no ValidationHandler runs") in [
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
        ({"loss#sigmod": True}, [("loss::sigmod", "DiceLoss takes no", "")]),
        ({"train#trainr#amp": True}, [("train::trainr::amp", "has no place in the config", "did you mean 'trainer'")]),
        ({"max_epochs": "many"}, [("max_epochs", "must be a number, got 'many' (str)", "as section 1")]),
        ({"amp": "false", "patience": "null", "max_epochs": 4, "run_name": "x"}, []),
        ({"amp": "no"}, [("amp", "must be true or false, got 'no'", "")]),
        ({"section": "testing"}, [("section", "nothing uses it here", "it is for evaluate.json")]),
        (
            {"inferer::roi_size": [8, 8]},
            [("inferer::roi_size", "has no place in the config", "it is for inference.json")],
        ),
        ({"run_id": "trainin"}, [("run_id", "there is no id 'trainin'", "did you mean 'training'?")]),
        ({"run_id": "training", "logging_file": False, "workflow_type": "train"}, []),
        ({"bundle_root": "nowhere"}, [("bundle_root", "nowhere does not exist", "the folder that holds configs")]),
        ({"config_file": "['train.json', 'configs/evaluate.json']", "section": "testing"}, []),
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
        ("+initialise", "adds to 'initialise', which is not there", "as the config before"),
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
        ("max_epoch", "nothing uses it here", "did you mean 'max_epochs'?"),
    )


def test_a_knob_that_nothing_uses(bundle):
    write(bundle, "train", edited(TRAIN, {"train::preprocessing": None, "loss::sigmoid": "@device"}))
    findings = found(bundle)
    expect(findings, ("patch_size", "nothing uses it here", "let a component refer to it"))
    assert findings[0].fault
    # whoever sets it is told, and no one else; it may be meant for another config
    assert found(bundle, overrides={"max_epochs": 2}) == []
    findings = found(bundle, overrides={"patch_size": [9, 9]})
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
    expect(checked["train.json + args_evaluate.json"], ("run_id", "there is no id 'evaluatin'", "name another"))
    expect(checked["args_absent.json"], ("config_file", "no config 'configs/trian.json' in fish", "name a config"))
    expect(checked["train_coarse.json + args_x_coarse.json"], ("coarse", "nothing uses it here", ""))


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
        "metadata",
    ]
    assert "train + evaluate + multi_gpu_evaluate + args_multi_gpu_evaluate" in checked


def test_missing_weights_and_data(bundle, tmp_path):
    (bundle / "models" / "model.pt").unlink()
    evaluate = ("train.json", "evaluate.json")
    expect(
        found(bundle, *evaluate), (f"{SAVER}::load_path", "models/model.pt does not exist", "train, which writes it")
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.pt").touch()
    assert found(bundle, *evaluate, overrides={"ckpt_dir": str(tmp_path / "other")}) == []
    write(bundle, "evaluate", edited(EVALUATE, {}) | {f"{SAVER}::_disabled_": True})
    assert found(bundle, *evaluate) == []
    expect(found(bundle, overrides={"initial_weights": "start.pt"}), ("initial_weights", "start.pt does not exist", ""))
    assert found(bundle, overrides={"initial_weights": str(tmp_path / "other" / "model.pt")}) == []
    assert found(bundle, overrides={"initial_weights": "imagenet"}) == []

    expect(found(bundle, overrides={"dataset_dir": "absent"}), ("cases", "dataset_dir 'absent' is not a folder", ""))
    (tmp_path / "data").mkdir()
    data = {"dataset_dir": str(tmp_path / "data")}
    expect(found(bundle, overrides=data), ("cases", "there is no datalist.json", "`segbundles prepare` wrote"))
    (tmp_path / "data" / "datalist.json").write_text(json.dumps({"training": [{"image": "a.nii", "label": "b.nii"}]}))
    expect(found(bundle, overrides=data), ("cases", "image a.nii does not exist", ""))
    expect(found(bundle, "inference.json", overrides=data), ("dataset::data", "no image under", "images to segment"))
    for name in ("a.nii", "b.nii"):
        (tmp_path / "data" / name).touch()
    assert found(bundle, overrides=data) == []
    assert found(bundle, "inference.json", overrides=data) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1,\n "b" 2}', [("line 2, column 6", "not JSON: Expecting ':' delimiter", "or just before")]),
        ("", [("line 1, column 1", "not JSON", "")]),
        ("[1]", [("", "holds no names and values", "begin it with {")]),
        ('{"a": "x # y"}', [("a", "'#' in a string, which MONAI turns into ::", "take it out")]),
        ('{"a": ["$\'#\'"]}', [("a::0", "'#' in a string", "")]),
        ('{"a#b": 1}', [("a#b", "'#' in a name", "write :: instead")]),
        ('{"a": "$@b#c + @d::e"}', []),
        ('{"a": "$' + "1 + " * 40 + '1"}', [("a", "an expression of 162 characters, more than 160", "a function")]),
        ('{"a": "' + "b" * 200 + '"}', []),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', [("c", "is there twice", "take one out")]),
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
    expect(checked["train.json"].findings, ("line 1, column 7", "not JSON", ""))
    assert checked["train.json + evaluate.json"].findings == []
    assert checked["train.json + evaluate.json"].summary == ""
    assert checked["inference.json"].summary == "components: 6, references: 5, expressions: 1"


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        (
            {"train::trainer::max_epochs": DROP},
            [("train::trainer::max_epochs", "lacks 'max_epochs'", "define train::")],
        ),
        ({"train::handlers::1::interval": 1}, [("", "check_properties() fails", "be @ references")]),
        (
            {"train::handlers::1::interval": "@max_epochs"},
            [("val_interval", "lacks 'val_interval'", "be '@val_interval'")],
        ),
        (
            {f"{EVALUATOR}::val_handlers": "@train::handlers"},
            [("validate::handlers", "lacks 'val_handlers'", "'@validate")],
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
    expect(findings(), ("", "'version' is a required property", "as the schema says"))
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
    with pytest.raises(ValueError, match=r"settings are given as --key value, behind the bundle; got '.*stray'"):
        read_overrides(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["left_atrium_vnet", "brain_flair_unet", "em_membrane_unet", "polyp_fcn8"])
def test_the_bundles_have_no_fault_but_weights_to_come(name, schema):
    bundle = ROOT / "bundles" / name
    checked = check_bundle(bundle, schema=schema)
    missing = [finding for item in checked for finding in item.findings if finding.fault]
    absent = [] if (bundle / "models" / "model.pt").is_file() else ["models/model.pt does not exist"] * 2
    assert [finding.problem for finding in missing] == absent
    assert {finding.config for finding in missing} <= {"train.json + evaluate.json", "inference.json"}
    named = [item.config.replace(".json", "") for item in checked]
    assert {"train + evaluate", "train + multi_gpu_train", "train + evaluate + multi_gpu_evaluate"} <= set(named)
    assert {"inference + multi_gpu_inference", "inference + inference_trt"} <= set(named)
    assert not {"train + multi_gpu_inference", "train + inference_trt"} & set(named)


def test_a_finding_is_a_fault_unless_said_otherwise():
    assert Finding("train.json", "loss", "is wrong", "mend it").fault
