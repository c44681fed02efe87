"""The table of a bundle's knobs, ``configs/knobs.schema.json``: what each one means and which values it takes.

Beside the keywords of JSON Schema 2020-12 a knob may have ``unit``; ``fact``, true where it shapes a network or its
input; ``weights``, the knob that names the weights whose fact it is (``weights`` where it is left out); and
``formerly``, its earlier names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.validators import extend

from segbundles.errors import fail
from segbundles.jsonfile import read_json

__all__ = ["SCHEMA_NAME", "fact_knobs", "faults", "former_names", "knob_table", "read_schema", "requirement"]

SCHEMA_NAME = "knobs.schema.json"

_WORDS = {True: "true", False: "false", None: "null"}


@cache
def _validator() -> type[Draft202012Validator]:
    # stricter than JSON Schema: 2.0 is no whole number for Python, and JSON files may hold NaN
    checker = Draft202012Validator.TYPE_CHECKER.redefine_many(
        {
            "integer": lambda _, value: isinstance(value, int) and not isinstance(value, bool),
            "number": lambda _, value: (
                isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            ),
            "array": lambda _, value: isinstance(value, list | tuple),
        }
    )
    return extend(Draft202012Validator, type_checker=checker)


def read_schema(bundle_root: str | Path) -> dict[str, Any]:
    """Return the schema of a bundle's knobs; one without knobs for a bundle that has no such file.

    Args:
        bundle_root: folder of the bundle.

    Raises:
        ValueError: when the file is not valid JSON.
    """
    path = Path(bundle_root) / "configs" / SCHEMA_NAME
    return read_json(path) if path.is_file() else {"properties": {}}


def former_names(schema: Mapping[str, Any]) -> dict[str, str]:
    """Return the earlier names of knobs, each with the name it has now."""
    return {old: name for name, knob in schema["properties"].items() for old in knob.get("formerly", ())}


def fact_knobs(schema: Mapping[str, Any], weights: str = "weights") -> list[str]:
    """Return the knobs that are facts of some weights.

    Args:
        schema: see :func:`read_schema`.
        weights: knob that names the weights.
    """
    knobs = schema["properties"].items()
    return [name for name, knob in knobs if knob.get("fact") and knob.get("weights", "weights") == weights]


def faults(schema: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the knobs whose values the schema does not allow, each with a sentence about it.

    Args:
        schema: see :func:`read_schema`.
        values: values by knob; other names are passed over.
    """
    for name, knob in schema["properties"].items():
        if name in values and not _validator()(knob).is_valid(_plain(values[name])):
            yield name, f"must be {requirement(knob)}, got {_shown(values[name])}"


def _plain(value: Any) -> Any:
    """Return a value as JSON has it; objects such as a device become text."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str | dict) else str(value)


def _shown(value: Any) -> str:
    if not isinstance(value, str):
        return _literal(value)
    point = f", write {value.replace(',', '.')} with a point" if re.fullmatch(r"-?\d+,\d+", value) else ""
    return f"the text {value!r}{point}"


def _literal(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return _WORDS[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(value) if isinstance(value, str) else str(value)


def requirement(knob: Mapping[str, Any]) -> str:
    """Say in words which values a knob takes, as in ``a whole number of 1 or more (epochs)``."""
    if "enum" in knob:
        words = list(map(_literal, knob["enum"]))
    elif "anyOf" in knob:
        words = [_described(option, "") for option in knob["anyOf"]]
    else:
        kinds = knob.get("type", "string")
        kinds = [kinds] if isinstance(kinds, str) else kinds
        words = [_described({**knob, "type": kind}, knob.get("unit", "")) for kind in kinds]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _described(knob: Mapping[str, Any], unit: str) -> str:
    kind = knob.get("type")
    unit = f" ({unit})" if unit else ""
    if "enum" in knob:
        return requirement(knob)
    if kind == "array":
        item = _described(knob.get("items", {}), "").replace("a whole number", "whole numbers")
        item = item.replace("a number", "numbers").replace("text", "texts")
        low, high = knob.get("minItems", 0), knob.get("maxItems")
        count = f"{low} " if low == high else f"at most {high} " if high else ""
        return f"a list of {count}{item}{unit}"
    if kind in ("integer", "number"):
        word = "a whole number" if kind == "integer" else "a number"
        if "multipleOf" in knob:
            word += f", a multiple of {knob['multipleOf']},"
        return f"{word}{_bounds(knob)}{unit}"
    return {"boolean": "true or false", "null": "null", "string": "text"}.get(kind, "any value")


def _bounds(knob: Mapping[str, Any]) -> str:
    low, above = knob.get("minimum"), knob.get("exclusiveMinimum")
    high, below = knob.get("maximum"), knob.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    if low is not None:
        return f" of {low} or more" if below is None else f" from {low} to less than {below}"
    words = [f"above {above}"] if above is not None else []
    words += [f"at most {high}"] if high is not None else [f"below {below}"] if below is not None else []
    return f" {' and '.join(words)}" if words else ""


def knob_table(bundle_root: str | Path) -> str:
    """Return the table of a bundle's knobs for its model card, in Markdown.

    Args:
        bundle_root: folder of the bundle.

    Raises:
        ValueError: when the folder has no schema of knobs.
    """
    schema, configs = read_schema(bundle_root), Path(bundle_root) / "configs"
    if not schema["properties"]:
        fail(f"{bundle_root} has no configs/{SCHEMA_NAME}: give the folder of a bundle, the one that contains configs.")
    # a patch such as evaluate.json says only what it changes, so the files that stand alone come first
    files = sorted(configs.glob("*.json"), key=lambda path: (path.name != "train.json", path.name == "evaluate.json"))
    trees = {path.stem: read_json(path) for path in files if _has_knobs(path)}
    rows = ["| knob | default | allowed | meaning |", "|---|---|---|---|"]
    for name, knob in schema["properties"].items():
        defaults = {stem: tree[name] for stem, tree in trees.items() if name in tree}
        texts: dict[str, list[str]] = {}
        for stem, value in defaults.items():
            texts.setdefault(_default(value), []).append(stem)
        (first, _), *others = texts.items() or [("", [])]
        default = "; ".join([first, *(f"{', '.join(stems)}: {text}" for text, stems in others)])
        meaning = knob["description"] + (" *Fact of the weights.*" if knob.get("fact") else "")
        rows.append(f"| `{name}` | {default} | {requirement(knob)} | {meaning} |".replace("\n", " "))
    return "\n".join(rows) + "\n"


def _has_knobs(path: Path) -> bool:
    other = path.name in ("metadata.json", SCHEMA_NAME)
    return not other and not path.name.startswith(("args_", "multi_gpu_", "inference_"))


def _default(value: Any) -> str:
    return "see the config" if isinstance(value, str) and value[:1] in "$@" else f"`{_literal(value)}`"
