"""What every config of a bundle calls first: the check of its settings, and the facts of the weights it uses.

    "settings": "$segbundles.bundle.settle(@bundle_root)"

A run evaluates this entry in ``initialize``. Networks name it under ``_requires_``, so that it also comes first where
``initialize`` is not run: in MONAI Label, in export, and in a program that parses the config itself.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from monai.bundle import ConfigParser

from segbundles.distributed import process_rank
from segbundles.errors import fail, show_reason_last
from segbundles.facts import read_facts, versions, weights_files
from segbundles.files import read_json, write_json
from segbundles.knobs import SCHEMA_NAME, fact_knobs, faults, read_schema
from segbundles.rules import broken_rules
from segbundles.running import (
    ABSENT,
    MONAI_KEYS,
    Running,
    read_configs,
    read_words,
    referenced,
    unknown_settings,
)

__all__ = ["RunSettings", "settle"]

logger = logging.getLogger("segbundles")

# knobs that would replace the weights that a federation's server sends
_OWN_WEIGHTS = ("resume", "initial_weights", "vgg16_weights")
# facts that an earlier parse of the same config has written into it, each with the line that it replaced: they were
# not given by a person
_applied: WeakKeyDictionary[ConfigParser, dict[str, tuple[Any, Any]]] = WeakKeyDictionary()


@dataclass
class RunSettings:
    """What a run was started with.

    Args:
        bundle: name of the bundle's folder.
        version: version of the bundle.
        command: what was typed.
        knobs: value of every knob.
        sources: where values that are not the config's come from, by knob.
        facts: facts of the weights, by the knob that names the weights.
        classes: name of each class, by its index.
        notes: what a reader of the results should know, such as a knob that contradicts the weights.
        federated: whether a federated client runs it, whose weights come from a server and go back there.
    """

    bundle: str = ""
    version: str = ""
    command: str = ""
    knobs: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    federated: bool = False
    #: configs of the other members of an ensemble, see :func:`segbundles.ensemble.load_members`
    members: list[dict[str, Any]] = field(default_factory=list, repr=False)
    schema: dict[str, Any] = field(default_factory=lambda: {"properties": {}}, repr=False)

    @property
    def confidence(self) -> dict[str, Any] | None:
        """What the facts of the weights say about confidence; None if they were not calibrated."""
        return self.facts.get("weights", {}).get("confidence")

    def record(self) -> dict[str, Any]:
        """Return all of it as JSON has it, with the versions of the software."""
        weights = {
            knob: {key: facts.get(key) for key in ("file", "sha256", "bundle", "version")}
            for knob, facts in self.facts.items()
        }
        return {
            "bundle": self.bundle,
            "version": self.version,
            "command": self.command,
            "knobs": self.knobs,
            "sources": self.sources,
            "weights": weights,
            "notes": self.notes,
            "versions": versions(),
        }

    def write(self, path: Path) -> None:
        """Write the record, in the first process.

        Args:
            path: JSON file.
        """
        if process_rank() == 0:
            write_json(path, self.record())


def settle(bundle_root: str | Path) -> RunSettings:
    """Check the settings of the run that evaluates this, and give its knobs the values that its weights need.

    MONAI takes any ``--key value`` into a config, so that a misspelt ``--max_epoch 1`` changes nothing without a word,
    and passes ``--amp false`` on as the text ``"false"``, which counts as true. Here the words true, false and null
    become values, and an unknown name is an error. A name is known when a JSON file beside the running config or in
    ``bundle_root/configs`` has it (args files excepted), or when another entry refers to it by ``@name``. Keyword
    arguments of components are left to the components.

    Facts of the weights (:mod:`segbundles.facts`) come before the config's own line, and a value given on the command
    line, in an args file or by a program comes before both. If it contradicts the architecture of the weights, it is an
    error; otherwise the run goes on with a warning and a note in the results.

    In a client of a federation (MONAI's ``MonaiAlgo``) the weights come from the server: knobs that load others are
    refused, and evaluation does not read ``model.pt``.

    Args:
        bundle_root: folder of the bundle.

    Returns:
        The settings of the run.

    Raises:
        ValueError: when a setting is unknown, has a value that ``knobs.schema.json`` does not allow, contradicts
            another one or the weights, or when a federated client is to load weights of its own.
    """
    show_reason_last()
    running = Running.find()
    if running.parser is None or not isinstance(running.parser.config, dict):
        return RunSettings()
    _refuse({"properties": {"bundle_root": {"type": "string"}}}, {"bundle_root": bundle_root})
    workflow = running.workflow
    folders = [Path(bundle_root) / "configs", *([Path(workflow.config_root_path)] if workflow else [])]
    there = [folder for folder in folders if folder.is_dir()]
    described = [folder for folder in there if (folder / SCHEMA_NAME).is_file()]
    root = next(iter(described or there or folders)).resolve().parent
    files, schema = read_configs(set(folders)), read_schema(root)
    if not files:
        return RunSettings()
    for key, hint in unknown_settings(running.parser.config, files, schema):
        fail(f"there is no setting {key!r} in the configs of {root.name}: {hint}")
    _refuse_idle(running, there, schema)
    read_words(running.parser)
    _read_texts(running, schema)
    _read_lists(running, schema)
    items = {name: running.items[name].get_config() for name in schema["properties"] if name in running.items}
    # before anything is computed from them; expressions and references have no value yet
    _refuse(schema, {name: it for name, it in items.items() if not {*"$@%"} & {*str(it)}})
    _set_tracked_file(running.parser)
    metadata = _metadata(root)
    settings = RunSettings(root.name, metadata.get("version", ""), shlex.join(sys.orig_argv), schema=schema)
    outputs = metadata.get("network_data_format", {}).get("outputs", {})
    settings.classes = dict(outputs.get("pred", {}).get("channel_def", {}))
    settings.federated = running.client is not None
    if settings.federated:
        _leave_weights_to_server(running)
    else:
        _apply_facts(running, files, settings)
        settings.classes = settings.facts.get("weights", {}).get("classes") or settings.classes
        _plan_members(running, settings)
        _check_initial_weights(running)
    values = {name: running.value(name) for name in schema["properties"]}
    values = {name: value for name, value in values.items() if value is not ABSENT}
    for name in running.given.keys() & values.keys():
        settings.sources.setdefault(name, running.source(name))
    if isinstance(count := values.get("num_classes"), int):
        settings.classes = {str(k): settings.classes.get(str(k), f"class {k}") for k in range(count)}
    for name, problem in list(faults(schema, values)) or broken_rules(values):
        source = settings.sources.get(name, "")
        source = f" (from {source})" if source.startswith("the facts") else ""
        fail(f"{name} {problem}{source}.")
    settings.knobs = json.loads(json.dumps(values, default=str))
    return settings


def _refuse(schema: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    for name, problem in faults(schema, values):
        fail(f"{name} {problem}.")


def _refuse_idle(running: Running, folders: list[Path], schema: Mapping[str, Any]) -> None:
    """Refuse a knob that was typed for a command that does not use it; an args file may be meant for several."""
    used = referenced(running.parser.config)
    for name in schema["properties"].keys() & running.given.keys() - used - MONAI_KEYS:
        if running.typed(name) is not None:
            homes = {path.name for folder in folders for path in folder.glob("*.json") if path.name != SCHEMA_NAME}
            homes = sorted(home for home in homes if any(_has(folder / home, name) for folder in folders))
            fail(f"{name} has no effect in this command: it is a knob of {', '.join(homes)}.")


def _has(path: Path, name: str) -> bool:
    return path.is_file() and f'"{name}":' in path.read_text(encoding="utf-8", errors="replace")


def _read_texts(running: Running, schema: Mapping[str, Any]) -> None:
    """Take texts such as paths as they were typed: ``2024_07`` is a folder, though the command line reads a number."""
    for name, knob in schema["properties"].items():
        kinds = knob.get("type", ())
        if name not in running.items or "string" not in ([kinds] if isinstance(kinds, str) else kinds):
            continue
        given, now = running.given.get(name), running.items[name].get_config()
        typed = running.typed(name)
        if type(now) in (int, float) and (typed is not None or name.endswith("_dir")):
            running.set(name, str(now) if typed is None else typed)
        if any("#" in str(text) and not str(text).startswith(("$", "@", "%")) for text in (typed, given)):
            fail(
                f"{name} is {typed or given!r}, and MONAI reads '#' in it as '::': rename that file or folder, or give "
                "a link to it that has no '#' in its path."
            )


def _read_lists(running: Running, schema: Mapping[str, Any]) -> None:
    """Take ``[a.pt,b.pt]`` from the command line, which MONAI leaves a text, as a list of weights."""
    for name in (name for name, knob in schema["properties"].items() if knob.get("loads") and name in running.items):
        now = running.items[name].get_config()
        if isinstance(now, str) and now.startswith("[") and now.endswith("]"):
            running.set(name, [word.strip(" '\"") for word in now[1:-1].split(",")])


def _metadata(root: Path) -> dict[str, Any]:
    path = root / "configs" / "metadata.json"
    return read_json(path) if path.is_file() else {}


def _set_tracked_file(parser: ConfigParser) -> None:
    """Make a path of the name of the config's copy that experiment tracking keeps.

    ``--tracking mlflow`` joins ``output_dir`` and that name as an expression, and leaves it text where ``output_dir``
    is a plain path: the copy would not become part of the tracked run.
    """
    item = parser.ref_resolver.items.get("save_execute_config")
    joined = re.fullmatch(r"([^$@%].*) \+ '/(config_\w+\.json)'", str(item and item.get_config()))
    if joined:
        item.update_config(str(Path(joined[1], joined[2])))


def _apply_facts(running: Running, files: list[dict], settings: RunSettings) -> None:
    """Set the knobs that are facts of the weights that this config loads."""
    for knob, entry in settings.schema["properties"].items():
        names = [name for name in fact_knobs(settings.schema, knob) if name in running.items]
        paths = running.weights.get(knob, running.value(knob) if entry.get("loads") else ABSENT)
        chosen = [] if paths is ABSENT else weights_files(paths)
        for missing in (path for path in chosen if knob in running.given and not path.is_file()):
            fail(f"{knob} is {missing}, but there is no such file: give the weights that a training wrote.")
        path = next(iter(chosen), None)
        if not names or path is None or not path.is_file():
            continue
        facts = read_facts(path)
        if facts is None:
            logger.warning(f"{path} has no facts beside it: {', '.join(names)} are taken from the config.")
            continue
        settings.facts[knob] = {**facts, "file": str(path)}
        architecture = running.reached("network_def" if knob == "weights" else knob.replace("_weights", "_def"))
        taken, own = [], []
        for name in (name for name in names if name in facts["knobs"]):
            fact, config = facts["knobs"][name], running.items[name].get_config()
            if _is_given(running, files, name):
                own.append(name)
                settings.sources[name] = running.source(name)
                _compare(running.value(name), fact, name, knob, path, name in architecture, settings)
                continue
            settings.sources[name] = f"the facts of {path.name}"
            if config != fact:
                taken.append(f"{name} {_text(fact)} (config: {_text(config)})")
                running.set(name, fact)
            before = _applied.setdefault(running.parser, {})
            before[name] = (fact, before[name][1] if name in before else config)
        also = f"; given for this run: {', '.join(own)}" if own else ""
        which = f"{path.name}, {facts.get('bundle')} {facts.get('version')}"
        used = f"from their facts: {', '.join(taken)}" if taken else "their facts agree with the config"
        logger.info(f"Weights {which}; {used}{also}.")


def _is_given(running: Running, files: list[dict], name: str) -> bool:
    """Return whether a value was given for this run: it is neither a config's line nor a fact applied before."""
    now = running.items[name].get_config()
    usual = [tree[name] for tree in files if name in tree]
    return name in running.given or now not in [*usual, _applied.get(running.parser, {}).get(name, (ABSENT,))[0]]


def _compare(
    value: Any, fact: Any, name: str, knob: str, path: Path, is_architecture: bool, settings: RunSettings
) -> None:
    """Refuse or note a given value that contradicts a fact."""
    for _, problem in faults({"properties": {name: settings.schema["properties"][name]}}, {name: value}):
        fail(f"{name} {problem}.")
    if json.loads(_text(value)) == fact:
        return
    if is_architecture:
        fail(
            f"{name} is {_text(value)}, but {path} was trained with {name} {_text(fact)}: leave out {name}, or choose "
            f"other weights with --{knob}."
        )
    note = f"{name} {_text(value)} differs from {_text(fact)}, with which {path.name} was trained"
    logger.warning(f"{note}.")
    settings.notes.append(note)


def _plan_members(running: Running, settings: RunSettings) -> None:
    """Make the config of each other member of an ensemble: the running one, with this member's weights.

    Facts of the first member are taken back, so that the check of the member's own config applies those of its weights.
    """
    knobs = [knob for knob, entry in settings.schema["properties"].items() if entry.get("loads")]
    values = {knob: running.value(knob) for knob in knobs if knob not in running.weights}
    files = {knob: weights_files(value) for knob, value in values.items() if value is not ABSENT}
    members = files.get("weights", [])
    for knob, chosen in files.items():
        if len(chosen) not in {0, 1, len(members)}:
            fail(f"{knob} has {len(chosen)} files, and weights {len(members)}: give one for all, or one for each.")
    for number, path in enumerate(members[1:], 2):
        facts = (read_facts(path) if path.is_file() else None) or {}
        if facts:
            settings.facts[f"weights {number}"] = {**facts, "file": str(path)}
        theirs = facts.get("classes") or settings.classes
        if theirs != settings.classes:
            fail(
                f"{members[0]} has the classes {_text(settings.classes)}, and {path} {_text(theirs)}: the members of "
                "an ensemble need the same classes."
            )
        own = {knob: str(chosen[number - 1]) for knob, chosen in files.items() if len(chosen) > 1}
        lines = {name: line for name, (_, line) in _applied.get(running.parser, {}).items()}
        settings.members.append(copy.deepcopy({**running.parser.config, **lines, **own}))


def _check_initial_weights(running: Running) -> None:
    """Refuse a network that the weights to start from do not fit, naming the knob."""
    path = running.value("initial_weights")
    if not isinstance(path, str) or not Path(path).is_file() or not (facts := read_facts(path)):
        return
    architecture = running.reached("network_def")
    for name, fact in facts["knobs"].items():
        if name in architecture and (now := running.value(name)) not in (ABSENT, fact):
            fail(
                f"{name} is {_text(now)}, but initial_weights {path} was trained with {name} {_text(fact)}: give "
                f"--{name} that value, or start from other weights."
            )


def _text(value: Any) -> str:
    return json.dumps(value, default=str)


def _leave_weights_to_server(running: Running) -> None:
    for key in _OWN_WEIGHTS:
        item = running.items.get(key)
        if item is not None and item.get_config():
            fail(
                f"{key} is {item.get_config()!r}, but the weights of a federated client come from the server: leave it "
                "as it is in train.json, and give the server the weights to start from."
            )
    if not running.client.disable_ckpt_loading:
        return
    for handler in running.parser.get("validate::handlers", []):
        # as MonaiAlgo does with MONAI's CheckpointLoader; it parses the config again
        if isinstance(handler, dict) and str(handler.get("_target_")).endswith(".WeightsLoader"):
            handler["_disabled_"] = True
