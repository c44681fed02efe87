from __future__ import annotations

import json
import logging

import pytest
from bundle_runs import ROOT
from monai.bundle import ConfigParser, ConfigWorkflow, create_workflow, run
from tiny_bundles import command_line

import segbundles.bundle
from segbundles.bundle import RunSettings, settle
from segbundles.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file")

SCHEMA = {
    "properties": {
        "bundle_root": {"type": "string"},
        "output_dir": {"type": "string"},
        "crop_from": {"type": "string"},
        "section": {"type": "string"},
        "max_epochs": {"type": "integer", "minimum": 1, "unit": "epochs", "formerly": ["epochs_max"]},
        "learning_rate": {"type": "number", "exclusiveMinimum": 0},
        "amp": {"type": "boolean"},
        "attention": {"enum": [None, True]},
        "patch_size": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2, "maxItems": 2},
    }
}
TRAIN = {
    "imports": ["$import segbundles"],
    "_section_1_": "the knobs",
    "bundle_root": ".",
    "output_dir": "$@bundle_root + '/output'",
    "max_epochs": 3,
    "learning_rate": 0.1,
    "amp": True,
    "attention": None,
    "patch_size": [8, 8],
    "crop_from": "truth",
    "loss": {"_target_": "DiceLoss", "reduction": "none"},
    "train": {
        "mode": {"flip": True},
        "trainer": {"_target_": "builtins.dict", "max_epochs": "@max_epochs", "amp": "@amp", "verbose": False},
        "handlers": [{"_target_": "builtins.dict", "interval": 1, "quiet": True}],
        "state": {"loss": "@loss"},
    },
    "seen": "$@observed.append(dict(flip=@train::mode::flip, trainer=@train::trainer, handlers=@train::handlers,"
    " amp=@amp, attention=@attention, state=@train::state, reduction=@loss.reduction))",
    "observed": [],
    "settings": "$segbundles.bundle.settle(@bundle_root)",
    "initialize": ["$@settings"],
    "run": ["@seen", "$segbundles.bundle.observed.append(@observed[0])"],
}
EVALUATE = {
    "section": "validation",
    "train::mode::flip": False,
    "train::trainer::section": "@section",
    "+initialize": ["$@max_epochs"],
}


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    monkeypatch.setattr(segbundles.bundle, "observed", [], raising=False)
    configs = tmp_path / "fish" / "configs"
    configs.mkdir(parents=True)
    (configs / "train.json").write_text(json.dumps(TRAIN))
    (configs / "evaluate.json").write_text(json.dumps(EVALUATE))
    (configs / "args_short.json").write_text(json.dumps({"max_epochs": 2, "max_epocs": 2}))
    (configs / "metadata.json").write_text(json.dumps({"version": "0.1.0", "null": "null", "only_in_meta": 1}))
    (configs / "broken.json").write_text("{")
    (configs / "knobs.schema.json").write_text(json.dumps(SCHEMA))
    return tmp_path / "fish"


def start(bundle, *patches, **override):
    """Run it, give what ``seen`` saw, and raise what MONAI wrapped."""
    files = [str(bundle / "configs/train.json"), *map(str, patches)]
    try:
        run(config_file=files, bundle_root=str(bundle), **override)
    except ValueError as error:
        raise root(error) from None
    return segbundles.bundle.observed[-1]


def root(error):
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def test_nothing_is_changed_without_overrides(bundle):
    seen = start(bundle)
    assert seen["trainer"] == {"max_epochs": 3, "amp": True, "verbose": False}
    assert seen["reduction"] == "none"  # a word of MONAI's own


@pytest.mark.parametrize(
    ("override", "look", "expected"),
    [
        ({"amp": "false"}, lambda s: s["amp"], False),
        ({"amp": "FALSE"}, lambda s: s["trainer"]["amp"], False),
        ({"amp": "false", "attention": "true"}, lambda s: s["attention"], True),
        ({"attention": "null"}, lambda s: s["attention"], None),
        ({"max_epochs": 7}, lambda s: s["trainer"]["max_epochs"], 7),
        ({"max_epochs": "$2 + 2"}, lambda s: s["trainer"]["max_epochs"], 4),
        ({"learning_rate": 1}, lambda s: s["trainer"]["max_epochs"], 3),
        ({"crop_from": "locator"}, lambda s: s["amp"], True),
        ({"train#mode#flip": "false"}, lambda s: s["flip"], False),
        ({"train::trainer::verbose": "true"}, lambda s: s["trainer"]["verbose"], True),
        ({"train#trainer#max_epochs": 9}, lambda s: s["trainer"]["max_epochs"], 9),
        ({"train#trainer#new_keyword": "null"}, lambda s: s["trainer"]["new_keyword"], None),
        ({"train::handlers::0::interval": 5}, lambda s: s["handlers"][0]["interval"], 5),
        ({"train::handlers::0::quiet": "false"}, lambda s: s["handlers"][0]["quiet"], False),
        ({"train::state::more": "@amp"}, lambda s: s["state"]["more"], True),  # "@train::state" takes it whole
        ({"section": "testing"}, lambda s: s["amp"], True),  # a knob of evaluate.json beside
        ({"run_name": "x", "tracking_uri": "y"}, lambda s: s["amp"], True),  # MONAI's own
        ({"save_execute_config": "false"}, lambda s: s["amp"], True),
    ],
)
def test_good_overrides(bundle, override, look, expected):
    value = look(start(bundle, **override))
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"max_epoch": 1}, r"^there is no setting 'max_epoch' in the configs of fish: did you mean 'max_epochs'\?$"),
        ({"learning_rat": 1, "max_epochs": 1}, r"'learning_rat' .* did you mean 'learning_rate'\?"),
        ({"train#mode#flp": True}, r"'train::mode::flp' .* did you mean 'train::mode::flip'\?"),
        ({"train#trainr": {"max_epochs": 1}}, r"'train::trainr' .* did you mean 'train::trainer'\?"),
        ({"zzz": 1}, r"no setting 'zzz' in the configs of fish: section 1 of the JSON shows what can be set"),
        ({"max_epocs": 1}, r"'max_epocs' .* did you mean 'max_epochs'\?"),  # though an args file holds it
        ({"only_in_meta": 1}, r"no setting 'only_in_meta'"),
        (
            {"epochs_max": 1},
            r"^there is no setting 'epochs_max' in the configs of fish: it is now called 'max_epochs'\.$",
        ),
        ({"max_epochs": "abc"}, r"^max_epochs must be a whole number of 1 or more \(epochs\), got the text 'abc'\.$"),
        ({"max_epochs": "$1 / 0"}, r"^max_epochs is '\$1 / 0', which cannot be computed: division by zero\.$"),
        ({"max_epochs": 0}, r"^max_epochs must be .*, got 0\.$"),
        ({"max_epochs": 2.0}, r"^max_epochs must be .*, got 2\.0\.$"),
        ({"max_epochs": True}, r"^max_epochs must be .*, got true\.$"),
        ({"max_epochs": "null"}, r"^max_epochs must be .*, got null\.$"),
        ({"learning_rate": "true"}, r"^learning_rate must be a number above 0, got true\.$"),
        ({"learning_rate": float("nan")}, r"^learning_rate must be a number above 0, got nan\.$"),
        ({"amp": "no"}, r"^amp must be true or false, got the text 'no'\.$"),
        ({"amp": 1}, r"^amp must be true or false, got 1\.$"),
        ({"patch_size": 8}, r"^patch_size must be a list of 2 whole numbers of 1 or more, got 8\.$"),
        ({"patch_size": [8]}, r"^patch_size must be .*, got \[8\]\.$"),
        ({"output_dir": "study#2"}, r"^output_dir is 'study#2', and MONAI reads '#' in it as '::': rename that file"),
        ({"attention": "on"}, r"^attention must be null or true, got the text 'on'\.$"),
    ],
)
def test_bad_overrides(bundle, override, message, caplog):
    with caplog.at_level(logging.ERROR, "segbundles"), pytest.raises(ValueError, match=message):
        start(bundle, **override)
    assert [r.name for r in caplog.records].count("segbundles") == 1
    assert segbundles.bundle.observed == []


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"max_epoch": 5}, r"^there is no setting 'max_epoch' in the configs of fish: did you mean 'max_epochs'\?$"),
        # renamed, so that the reference to it leads nowhere
        ({"max_epochs": None, "max_epoch": 5}, r"^there is no setting 'max_epoch' .* did you mean 'max_epochs'\?$"),
        ({"amp": "yes"}, r"^amp must be true or false, got the text 'yes'\.$"),
    ],
)
def test_mistakes_in_the_file(bundle, edit, message):
    path = bundle / "configs/train.json"
    tree = {**json.loads(path.read_text()), **edit}
    path.write_text(json.dumps({name: value for name, value in tree.items() if value is not None or name not in edit}))
    with pytest.raises(InputError, match=message):
        start(bundle)


def test_monai_itself_refuses_a_key_below_a_misspelt_one(bundle):
    with pytest.raises(KeyError, match="trainr"):
        start(bundle, **{"train#trainr#max_epochs": 1})


def test_patch_beside(bundle):
    seen = start(bundle, bundle / "configs/evaluate.json", section="testing", amp="false")
    assert (seen["flip"], seen["trainer"]["section"], seen["amp"]) == (False, "testing", False)


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ({"my_scale": 2, "train::trainer::scale": "@my_scale"}, None),
        ({"my_scale": "false", "train::trainer::scale": "$not @my_scale"}, None),
        ({"+initialize": ["$@my_flag"], "my_flag": True}, None),
        ({"train::state::extra": "@loss"}, None),
        ({"my_scale": 2}, r"no setting 'my_scale'"),
        ({"max_epoch": 2, "train::trainer::scale": "@max_epochs"}, r"'max_epoch'.* did you mean 'max_epochs'"),
    ],
)
def test_patch_from_elsewhere(bundle, tmp_path, patch, message):
    (tmp_path / "patch.json").write_text(json.dumps(patch))
    if message:
        with pytest.raises(ValueError, match=message):
            start(bundle, tmp_path / "patch.json")
        return
    seen = start(bundle, tmp_path / "patch.json")
    if "my_scale" in patch:
        assert seen["trainer"]["scale"] == {2: 2, "false": True}[patch["my_scale"]]


@pytest.mark.parametrize("fault", [False, True])
def test_args_file(bundle, tmp_path, fault):
    args = {"config_file": str(bundle / "configs/train.json"), "bundle_root": str(bundle), "amp": "false"}
    (tmp_path / "args.json").write_text(json.dumps(args | ({"max_epoch": 5} if fault else {"max_epochs": 5})))
    try:
        run(args_file=str(tmp_path / "args.json"))
    except ValueError as error:
        assert fault
        assert "did you mean 'max_epochs'" in str(root(error))  # noqa: PT017
        return
    assert not fault
    assert segbundles.bundle.observed[-1]["trainer"] == {"max_epochs": 5, "amp": False, "verbose": False}


def test_args_file_in_the_bundle_makes_no_key_known(bundle):
    with pytest.raises(InputError) as caught:
        run(
            args_file=str(bundle / "configs/args_short.json"),
            config_file=str(bundle / "configs/train.json"),
            bundle_root=str(bundle),
        )
    assert "'max_epocs'" in str(root(caught.value))


def test_config_workflow_twice(bundle):
    """MONAI Label initializes a workflow more than once."""
    workflow = ConfigWorkflow(str(bundle / "configs/train.json"), bundle_root=str(bundle), amp="false")
    for _ in range(2):
        workflow.initialize()
        assert workflow.parser.get_parsed_content("train::trainer")["amp"] is False
    workflow = ConfigWorkflow(str(bundle / "configs/train.json"), bundle_root=str(bundle), ampp="false")
    with pytest.raises(InputError) as caught:
        workflow.initialize()
    assert isinstance(root(caught.value), ValueError)


def test_parser_alone(bundle):
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs/train.json"))
    parser.update({"bundle_root": str(bundle), "amp": "false"})
    parser.get_parsed_content("initialize")
    assert parser.get_parsed_content("train::trainer")["amp"] is False
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs/train.json"))
    parser.update({"bundle_root": str(bundle)})
    parser["amp_"] = True
    with pytest.raises(InputError) as caught:
        parser.get_parsed_content("initialize")
    assert "did you mean 'amp'" in str(root(caught.value))


def test_relative_bundle_root(bundle, monkeypatch):
    monkeypatch.chdir(bundle)
    with pytest.raises(InputError) as caught:
        run(config_file="configs/train.json", max_epoch=1)
    assert "in the configs of fish" in str(root(caught.value))


def test_outside_of_a_config_it_does_nothing(bundle):
    assert settle(bundle) == RunSettings()


def through_command_line(files, settings, tmp_path):
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command_line(["python", "-m", "monai.bundle", "run", "--config_file", str(files), *words])


def through_args_file(files, settings, tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({"config_file": files, **settings}))
    command_line(["python", "-m", "monai.bundle", "run", "--args_file", str(tmp_path / "args.json")])


def through_run(files, settings, tmp_path):
    run(config_file=files, **settings)


def through_create_workflow(files, settings, tmp_path):
    create_workflow(config_file=files, workflow_type="train", **settings)


@pytest.mark.parametrize(
    ("files", "setting", "nearest"),
    [
        (["train.json"], "max_epoch", "max_epochs"),
        (["train.json", "evaluate.json"], "largest_components", None),
        (["train.json", "multi_gpu_train.json"], "learning_rat", "learning_rate"),
        (["inference.json"], "output_dirs", "output_dir"),
    ],
    ids=["train", "evaluate", "multi_gpu_train", "inference"],
)
@pytest.mark.parametrize(
    "door", [through_command_line, through_args_file, through_run, through_create_workflow], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "bundles").iterdir()))
def test_a_misspelt_setting_stops_every_bundle_at_every_door(
    name, door, files, setting, nearest, tmp_path, monkeypatch
):
    monkeypatch.setattr("segbundles.distributed.join", lambda *_, **__: None)  # there is no torchrun here
    root_dir = ROOT / "bundles" / name
    paths = [str(root_dir / "configs" / file) for file in files]
    settings = {"bundle_root": str(root_dir), "logging_file": False, "output_dir": str(tmp_path / "out"), setting: 3}
    with pytest.raises(InputError) as caught:
        door(paths, settings, tmp_path)
    cause = root(caught.value)
    assert isinstance(cause, ValueError)
    assert f"there is no setting {setting!r} in the configs of {name}: " in str(cause)
    assert nearest is None or str(cause).endswith(f"did you mean {nearest!r}?")
    assert not (tmp_path / "out").exists()


def test_the_bundle_is_named_where_its_root_is_given_later(bundle, tmp_path, monkeypatch):
    """As a federated client does."""
    monkeypatch.chdir(tmp_path)
    workflow = ConfigWorkflow(str(bundle / "configs/train.json"), max_epoch=1)
    with pytest.raises(InputError) as caught:
        workflow.initialize()
    assert "in the configs of fish" in str(root(caught.value))
