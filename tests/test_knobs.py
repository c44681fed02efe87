from __future__ import annotations

import json
import re
from itertools import combinations

import pytest
from bundle_runs import ROOT
from jsonschema import Draft202012Validator

from segbundles.knobs import SCHEMA_NAME, fact_knobs, faults, former_names, knob_table, read_schema, requirement
from segbundles.rules import broken_rules

BUNDLES = sorted((ROOT / "bundles").iterdir())
WIRING = {"train_cases", "validation_cases", "cases", "_section_2_"}
# what may differ between bundles of 2D and 3D images, of other networks, and with another history
OWN = {"minItems", "maxItems", "items", "enum", "formerly", "weights", "maximum"}


def section_1(path):
    """Knobs of a config with their values."""
    knobs = {}
    for name, value in json.loads(path.read_text()).items():
        if name in WIRING:
            break
        if name[0] not in "_$" and name != "imports" and "::" not in name:
            knobs[name] = value
    return knobs


def configs(bundle):
    names = ("train.json", "train_locator.json", "evaluate.json", "inference.json")
    return [path for name in names if (path := bundle / "configs" / name).is_file()]


@pytest.mark.parametrize(
    ("knob", "words"),
    [
        ({"type": "integer", "minimum": 1, "unit": "epochs"}, "a whole number of 1 or more (epochs)"),
        ({"type": ["integer", "null"], "minimum": 1}, "a whole number of 1 or more or null"),
        ({"type": "number", "minimum": 0, "maximum": 1}, "a number from 0 to 1"),
        ({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, "a number from 0 to less than 1"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "a number above 0 and at most 1"),
        ({"type": "number", "exclusiveMinimum": 0, "unit": "mm"}, "a number above 0 (mm)"),
        ({"type": "boolean"}, "true or false"),
        ({"type": ["string", "null"]}, "text or null"),
        ({"enum": [None, "instance", 8]}, 'null, "instance" or 8'),
        (
            {
                "type": ["array", "null"],
                "items": {"type": "number", "exclusiveMinimum": 0},
                "minItems": 3,
                "maxItems": 3,
                "unit": "mm",
            },
            "a list of 3 numbers above 0 (mm) or null",
        ),
        ({"type": "array", "items": {"type": "string"}}, "a list of texts"),
        (
            {"type": "array", "items": {"type": "integer", "multipleOf": 16, "minimum": 16}},
            "a list of whole numbers, a multiple of 16, of 16 or more",
        ),
        ({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}, "text or a list of texts"),
    ],
)
def test_requirement_in_words(knob, words):
    assert requirement(knob) == words


@pytest.mark.parametrize(
    ("knob", "good", "bad"),
    [
        ({"type": "integer"}, [3, -1], [3.0, True, "3", None, [3]]),
        ({"type": "number"}, [3, 0.5], [float("nan"), float("inf"), True, "0.5", None]),
        (
            {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "integer"}},
            [[1, 2], (1, 2)],
            [[1], [1, 2.0], 1],
        ),
        ({"type": "string"}, ["a"], [1, None, ["a"]]),
    ],
)
def test_what_is_allowed(knob, good, bad):
    schema = {"properties": {"it": knob}}
    assert [value for value in (*good, *bad) if list(faults(schema, {"it": value, "other": 0}))] == bad


def test_fault_names_requirement_and_value():
    schema = {"properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}, "c": {"type": ["array", "null"]}}}
    found = list(faults(schema, {"a": "2", "b": None, "c": [1, None]}))
    assert found == [("a", "must be a whole number, got the text '2'"), ("b", "must be true or false, got null")]
    assert list(faults(schema, {"a": "0,001"})) == [
        ("a", "must be a whole number, got the text '0,001', write 0.001 with a point")
    ]


@pytest.mark.parametrize(
    ("knobs", "found"),
    [
        (
            {"depth": 5, "patch_size": [250, 256]},
            [("patch_size", "2 ** (depth - 1) = 16, got [250, 256]: try [256, 256]")],
        ),
        (
            {"depth": 5, "patch_size": [256, 256], "window_size": [32, 24]},
            [("window_size", "got [32, 24]: try [32, 32]")],
        ),
        ({"depth": 5, "patch_size": [388, 388], "context_pixels": 92}, []),
        (
            {"depth": 5, "patch_size": [384, 388], "context_pixels": 92},
            [("patch_size", "plus 4 (context_pixels is not 0)")],
        ),
        (
            {"slices_per_epoch": None, "patch_size": [64, 96], "window_size": [64, 64]},
            [("patch_size", "not exceed window_size [64, 64]")],
        ),
        (
            {"rotate90_probability": 0.5, "patch_size": [64, 96]},
            [("patch_size", "must be square for rotate90_probability 0.5")],
        ),
        ({"rotate90_probability": 0, "patch_size": [64, 96]}, []),
        ({"quarter_turns": True, "window_size": [64, 96]}, [("window_size", "must be square for quarter_turns True")]),
        ({"zoom_range": [1.2, 0.8]}, [("zoom_range", "smallest factor first, got [1.2, 0.8]")]),
        ({"min_size_mm": 20.0, "max_size_mm": 10.0}, [("min_size_mm", "below max_size_mm 10.0, got 20.0")]),
        ({"min_size_mm": None, "max_size_mm": 10.0}, []),
    ],
)
def test_rules_between_knobs(knobs, found):
    got = list(broken_rules(knobs))
    assert [name for name, _ in got] == [name for name, _ in found]
    assert all(part in sentence for (_, sentence), (_, part) in zip(got, found, strict=True))


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
class TestBundles:
    def test_schema_describes_every_knob_and_allows_what_the_configs_say(self, bundle):
        schema = read_schema(bundle)
        Draft202012Validator.check_schema(schema)
        seen = set()
        for path in configs(bundle):
            tree = json.loads(path.read_text())
            assert next(iter(tree.items())) == ("$schema", f"./{SCHEMA_NAME}"), path.name
            knobs = section_1(path)
            seen |= knobs.keys()
            assert set(knobs) <= set(schema["properties"]), path.name
            plain = {name: value for name, value in knobs.items() if not str(value).startswith(("$", "@"))}
            assert list(faults(schema, plain)) == list(broken_rules(plain)) == [], path.name
        assert seen == set(schema["properties"])
        for name, knob in schema["properties"].items():
            assert knob["description"].endswith("."), name
            assert set(knob) & {"type", "enum", "anyOf"}, name
        assert not former_names(schema).keys() & schema["properties"].keys()

    def test_facts_are_what_shapes_the_network_or_its_input(self, bundle):
        schema = read_schema(bundle)
        inference = json.loads((bundle / "configs/inference.json").read_text())
        facts = {*fact_knobs(schema), *fact_knobs(schema, "locator_weights")}
        network = set(re.findall(r"@(\w+)", json.dumps(inference["network_def"]))) - {"settings"}
        assert network - {"dropout", "bilinear_init"} <= facts  # these two count in training alone
        assert facts <= set(section_1(bundle / "configs/inference.json"))
        names = {"weights", "locator_weights"} & set(schema["properties"])
        assert names == {name for name, knob in schema["properties"].items() if knob.get("loads")}

    def test_args_files_hold_allowed_values(self, bundle):
        schema = read_schema(bundle)
        for path in (bundle / "configs").glob("args_*.json"):
            values = {k: v for k, v in json.loads(path.read_text()).items() if not str(v).startswith(("$", "@"))}
            assert list(faults(schema, values)) == list(broken_rules(values)) == [], path.name
            assert not former_names(schema).keys() & values.keys(), path.name


def test_a_shared_knob_means_the_same_in_all_bundles():
    schemas = {bundle.name: read_schema(bundle)["properties"] for bundle in BUNDLES}
    assert len(schemas) >= 4
    for (one, ours), (other, theirs) in combinations(schemas.items(), 2):
        for name in ours.keys() & theirs.keys():
            mine, yours = ({k: v for k, v in knobs[name].items() if k not in OWN} for knobs in (ours, theirs))
            assert mine == yours, f"{name} in {one} and {other}"


def test_table_of_knobs(tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    knobs = {
        "size": {"type": "integer", "minimum": 1, "unit": "pixels", "fact": True, "description": "How large."},
        "folder": {"type": "string", "description": "Where."},
        "only": {"type": "boolean", "description": "Inference."},
    }
    (folder / SCHEMA_NAME).write_text(json.dumps({"properties": knobs}))
    (folder / "train.json").write_text(json.dumps({"size": 4, "folder": "$@a + 'b'"}))
    (folder / "inference.json").write_text(json.dumps({"size": 2, "only": True}))
    (folder / "args_x.json").write_text(json.dumps({"size": 9}))
    assert knob_table(tmp_path).splitlines() == [
        "| knob | default | allowed | meaning |",
        "|---|---|---|---|",
        "| `size` | `4`; inference: `2` | a whole number of 1 or more (pixels) | How large. *Fact of the weights.* |",
        "| `folder` | see the config | text | Where. |",
        "| `only` | `true` | true or false | Inference. |",
    ]
