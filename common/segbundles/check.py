"""What is wrong with a bundle's configs, found without running them: nothing is trained, no image is read."""

from __future__ import annotations

import ast
import inspect
import io
import json
import logging
import re
import socket
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from tempfile import TemporaryDirectory
from typing import Any

import fire
from monai.bundle import ConfigParser, ConfigWorkflow, run, verify_metadata, verify_net_in_out
from monai.bundle.config_item import ComponentLocator, ConfigComponent
from monai.bundle.reference_resolver import ReferenceResolver
from monai.bundle.utils import merge_kv
from monai.bundle.workflows import BundleWorkflow
from monai.utils import BundlePropertyConfig

from segbundles.bundle import MONAI_KEYS, read_configs, read_words, setting_keys, unknown_settings, wrong_types
from segbundles.errors import innermost

__all__ = ["Checked", "Finding", "check_bundle", "read_overrides"]

_LONGEST_EXPRESSION = 160
_NOT_ARGUMENTS = ConfigComponent.non_arg_keys | {"_debug_"}
_RUN_OPTIONS = {*inspect.signature(run).parameters, *inspect.signature(ConfigWorkflow).parameters}
_LOCATOR = ComponentLocator()
_Found = Iterator[tuple]  # id, problem, repair and, for a warning, False


@dataclass(frozen=True)
class Finding:
    """One thing to mend: in which config (files joined by ``+``), at which id, what is wrong, what to do.

    ``fault`` is False for what could not be checked, and for what may be meant.
    """

    config: str
    id: str
    problem: str
    repair: str
    fault: bool = True


@dataclass(frozen=True)
class Checked:
    """A config, what was looked at in it, and what was found."""

    config: str
    summary: str
    findings: list[Finding]


def read_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Read ``--key value`` as the command line of ``monai.bundle`` does.

    Raises:
        ValueError: when the words are not of that form.
    """
    settings = None
    try:
        with redirect_stderr(io.StringIO()):
            settings = fire.Fire(lambda **given: given, list(arguments), serialize=lambda _: None)
    except fire.core.FireExit:
        pass
    if not isinstance(settings, dict):
        raise ValueError(f"settings are given as --key value, behind the bundle; got {' '.join(arguments)!r}.")
    return settings


def check_bundle(
    bundle: str | Path,
    configs: Sequence[str | Path] = (),
    args_file: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    schema: str | Path | None = None,
) -> list[Checked]:
    """Check a bundle, or one combination of its configs.

    With nothing but ``bundle`` every config is checked: those that stand alone, patches over ``train.json``, args files
    over what they belong to, and the metadata. Else one combination, as ``monai.bundle run`` would read it. A fault of
    a file is given once, though several combinations have it.

    Args:
        bundle: folder that holds ``configs``.
        configs: names in ``configs``, or paths; later ones patch earlier ones. Default: ``config_file`` of the
            settings, else ``train.json``.
        args_file: settings in JSON, as for ``--args_file``.
        overrides: settings by id.
        schema: JSON schema of the metadata; None downloads the one that the metadata names.

    Raises:
        ValueError: when the folder is no bundle, or a file named here does not exist.
    """
    root = Path(bundle).resolve()
    files = sorted(path for path in (root / "configs").glob("*.json") if path.name != "metadata.json")
    if not files:
        raise ValueError(f"{bundle} is not a bundle, it has no configs/*.json: give the folder that holds configs.")
    if schema is not None and not Path(schema).is_file():
        raise ValueError(f"there is no schema {str(schema)!r}: give --schema a file.")
    with _quiet(root):
        checker = _Checker(root, files)
        if configs or args_file or overrides:
            return [checker.check(configs, args_file and _find(root, args_file), overrides)]
        return [*checker.check_all(), checker.check_metadata(schema)]


class _Checker:
    def __init__(self, root: Path, files: list[Path]) -> None:
        self.root, self.read = root, cache(_read)
        trees = {path: self.read(path)[0] or {"bundle_root": None} for path in files}
        self.args = [path for path in trees if path.name.startswith("args_") or "config_file" in trees[path]]
        alone = [path for path in trees if path not in self.args and "bundle_root" in trees[path]]
        self.alone = sorted(alone or files, key=lambda path: path.name != "train.json")
        self.patches = [path for path in trees if path not in self.args + self.alone]
        self.inference: _Config | None = None
        self.faulty: set[str] = set()
        self.seen: set[tuple] = set()

    def check_all(self) -> Iterator[Checked]:
        for path in self.alone:
            yield self.check([path])
            for patch in self.patches:
                below = self.below(patch)
                if below[0] == path:
                    yield self.check([*below, patch])
        for path in self.args:
            try:
                yield self.check(args=path)
            except ValueError as error:
                yield Checked(path.name, "", [Finding(path.name, "config_file", str(error), "name a config there is")])
            settings, inference = self.read(path)[0] or {}, self.root / "configs" / "inference.json"
            shared = {key.split("::")[0] for key in settings} & {*(self.read(inference)[0] or {})} - {"_desc_"}
            if shared and "config_file" not in settings and self.base_of(path).stem == "train":
                yield self.check([inference], path)

    def below(self, patch: Path) -> list[Path]:
        """What a patch is laid over: multi_gpu_x.json over x.json, and that over what x.json is laid over."""
        base = patch.with_name(patch.name.removeprefix("multi_gpu_"))
        if base != patch and base in self.patches:
            return [*self.below(base), base]
        return [base if base != patch and base in self.alone else self.alone[0]]

    def base_of(self, args: Path | None) -> Path:
        """args_x_locator.json belongs to train_locator.json, where there is one."""
        fits = [path for path in self.alone if args and args.stem.endswith(path.stem.removeprefix("train"))]
        return max(fits, key=lambda path: len(path.stem), default=self.alone[0])

    def check(
        self, configs: Sequence[str | Path] = (), args: Path | None = None, overrides: dict[str, Any] | None = None
    ) -> Checked:
        settings, given = (self.read(args)[0] or {}) if args else {}, overrides or {}
        named = configs or given.get("config_file") or settings.get("config_file") or [self.base_of(args)]
        # MONAI takes "['a', 'b']" and "a,b" for several
        named = re.findall(r"[^\[\]'\", ]+", named) if isinstance(named, str) else named
        files = [_find(self.root, name) for name in named]
        used = [*files, args] if args else files
        name = " + ".join(path.name for path in used)
        findings = [found for path in used for found in self.read(path)[1]]
        summary = ""
        known = read_configs({self.root / "configs", files[0].parent})
        if all(self.read(path)[0] is not None for path in used):
            config = _Config(self.root, [self.read(path)[0] for path in files], known)
            found = [*config.set_up(settings, given), *(found for rule in RULES for found in rule(config))]
            findings += [Finding(name, *it) for it in found]
            summary = config.summary() if config.items else ""
            if name == "inference.json":
                self.inference, self.faulty = config, {id.split("::")[0] for id, *_ in found}
        # a fault of the first file shows in all its combinations, one of an args file in each of its own
        owners = [args.name if args and it.id in settings else it.config.split(" + ")[0] for it in findings]
        new = {(owner, it.id, it.problem): it for owner, it in zip(owners, findings, strict=True)}
        new = {key: it for key, it in new.items() if key not in self.seen}
        self.seen |= new.keys()
        return Checked(name, summary, list(new.values()))

    def check_metadata(self, schema: str | Path | None) -> Checked:
        path = self.root / "configs" / "metadata.json"
        metadata, findings = self.read(path)
        networks: dict[str, str] = {}
        if metadata is not None:
            networks = {key: key.replace("_data_format", "_def") for key in metadata if key.endswith("_data_format")}
            sound = self.inference.components.keys() - self.faulty if self.inference else ()
            networks = {key: network for key, network in networks.items() if network in sound}
            found = [*_check_schema(path, schema), *_check_networks(path, networks, self.inference)]
            findings = [*findings, *(Finding(path.name, *it) for it in found)]
        return Checked(path.name, f"schema, networks run on random numbers: {len(networks)}", findings)


class _Config:
    """A combination of configs, as MONAI reads it."""

    def __init__(self, root: Path, trees: Sequence[dict], known: list[dict]) -> None:
        self.root, self.trees = root, trees
        self.known = known  # the configs that the run's own check of overrides looks at
        names = list(trees[0])
        start = names.index("_section_1_") + 1 if "_section_1_" in names else len(names)
        self.knobs = names[start : next((n for n in range(start, len(names)) if names[n][:9] == "_section_"), None)]
        self.given: dict[str, bool] = {}  # what patches and settings bring, and whether it is a setting
        self.items: dict[str, Any] = {}
        self.components: dict[str, dict] = {}
        self.references: dict[str, list[str]] = {}

    def set_up(self, args: dict, overrides: dict) -> _Found:
        self.parser = ConfigParser(config={})
        elsewhere = {key for tree in self.known for key in setting_keys(tree)}
        for tree in (*self.trees, args, overrides):
            for key, value in tree.items():
                id = ReferenceResolver.normalize_id(key.lstrip("+"))
                if key in _RUN_OPTIONS and (tree is args or tree is overrides):
                    continue
                first = id.split("::")[0]
                if tree is args and first in elsewhere and first not in self.parser:
                    continue  # an args file may be meant for several configs
                if key[:1] == "+" and id not in self.parser:
                    yield key, f"adds to {id!r}, which is not there", "write it as the config before has it"
                try:
                    merge_kv(self.parser, key, deepcopy(value))
                    self.given |= {} if tree is self.trees[0] else {id: tree is args or tree is overrides}
                except (KeyError, IndexError, ValueError) as error:
                    yield id, "has no place in the config", innermost(error).strip("'\"").splitlines()[0]
        run_id = overrides.get("run_id", args.get("run_id"))
        if run_id and run_id not in self.parser:
            yield "run_id", f"there is no id {run_id!r}", _nearest(run_id, self.parser.get()) or "name another"
        if "bundle_root" in self.given and not self.exists(folder := str(self.parser["bundle_root"])):
            yield "bundle_root", f"{folder} does not exist", "give the folder that holds configs"
        if "bundle_root" in self.parser:
            self.parser["bundle_root"] = str(self.root)
        self.parser["_meta_"] = _read(self.root / "configs" / "metadata.json")[0] or {}
        try:
            self.parser, self.values = self._parsed(), self._parsed().ref_resolver
        except (OSError, KeyError, IndexError, ValueError) as error:
            yield "", f"cannot be read: {innermost(error)}", "mend the reference that begins with % or @::"
            return
        items = self.parser.ref_resolver.items.items()
        self.items = {id: item.get_config() for id, item in items if id and not id.startswith("_meta_")}
        self.components = {id: node for id, node in self.items.items() if ConfigComponent.is_instantiable(node)}
        texts = {id: node for id, node in self.items.items() if isinstance(node, str)}
        self.references = {id: list(ReferenceResolver.match_refs_pattern(text)) for id, text in texts.items()}

    def _parsed(self) -> ConfigParser:
        parser = ConfigParser(config=deepcopy(self.parser.get()))
        parser.locator = _LOCATOR
        parser.parse()
        read_words(parser)
        return parser

    def exists(self, path: str | Path) -> bool:
        return Path(path).exists() or (self.root / path).exists()

    def follow(self, node: Any) -> Any:
        """What a reference, maybe to a reference, leads to."""
        for _ in range(9):
            node = self.items.get(node[1:].replace("#", "::")) if isinstance(node, str) and node[:1] == "@" else node
        return node

    def value(self, id: str) -> Any:
        """Value of an entry; None where it is absent, or an object would have to be made for it."""
        try:
            return self.values.get_resolved_content(id) if self._simple(id) else None
        except Exception:  # what is wrong there is found by other rules, or by the run
            return None

    def _simple(self, id: str) -> bool:
        if id not in self.items or id in self.components:
            return False
        return all(map(self._simple, ReferenceResolver.find_refs_in_config(self.items[id], id)))

    def disabled(self, id: str) -> bool:
        parts = id.split("::")
        flags = [self.value(f"{'::'.join(parts[:n])}::_disabled_") for n in range(1, len(parts) + 1)]
        return any(flag.lower() == "true" if isinstance(flag, str) else flag for flag in flags)

    def summary(self) -> str:
        expressions = sum(self.items[id][:1] == "$" for id in self.references)
        references = sum(map(len, self.references.values()))
        return f"components: {len(self.components)}, references: {references}, expressions: {expressions}"


def check_targets(config: _Config) -> _Found:
    """Every ``_target_`` exists and takes the keywords given."""
    for id, node in config.components.items():
        target = node["_target_"]
        if not isinstance(target, str) or target[:1] in "$@%":
            continue
        parent, _, name = target.rpartition(".")
        try:
            found = locate(ConfigComponent(node, id, _LOCATOR).resolve_module_name())
        except ErrorDuringImport as error:
            yield id, f"{target} cannot be imported: {error.value}", "mend its module, or install what it lacks"
            continue
        if found is None:
            names = dir(locate(parent)) if parent else _LOCATOR._components_table or ()
            hint = _nearest(name, names) or "is its package installed, and its path whole?"
            yield id, f"{target} does not exist", hint
        try:
            parameters = inspect.signature(found).parameters.values()
        except (TypeError, ValueError):
            continue  # nothing to call, or written in C without a signature
        given = [key for key in node if key not in _NOT_ARGUMENTS]
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        for key in (key for key in given if key not in named):
            if not any(p.kind == p.VAR_KEYWORD for p in parameters):
                near = _nearest(key, set(named) - set(given)) or _nearest(key, named)
                yield f"{id}::{key}", f"{name} takes no {key!r}", near or f"it takes {', '.join(named)}"
            elif near := _nearest(key, set(named) - set(given), 0.8):
                yield f"{id}::{key}", f"{name} passes {key!r} on, though it may be misspelt", near, False
        required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        lacking = ", ".join(p.name for p in required if p.name not in given)
        if lacking and node.get("_mode_") != "callable":
            yield id, f"{name} needs {lacking}", f"add {lacking}"


def check_references(config: _Config) -> _Found:
    """Every ``@id`` exists and none leads back to itself; every ``$`` expression is Python."""
    known = config.parser.ref_resolver.items
    for id, references in config.references.items():
        text = config.items[id]
        for reference in references:
            if reference not in known:
                yield id, f"@{reference} does not exist", _nearest(reference, known) or "define it, or name another"
        if text[:1] == "@" and not references:
            yield id, f"{text!r} is no reference and stays text", "begin an expression with $"
        if text[:1] == "$":
            # as in MONAI, references become look-ups in a dictionary
            code = ReferenceResolver.update_refs_pattern(text, dict.fromkeys(references))[1:]
            try:
                if not any(isinstance(line, (ast.Import, ast.ImportFrom)) for line in ast.parse(code).body):
                    ast.parse(code, mode="eval")
            except SyntaxError as error:
                yield id, f"{text!r} is not a Python expression: {error.msg}", "mend what follows the $"
    links = {id: ReferenceResolver.find_refs_in_config(node, id) for id, node in config.items.items()}
    try:
        TopologicalSorter(links).prepare()
    except CycleError as error:
        yield error.args[1][0], f"refers to itself: {' -> '.join(error.args[1])}", "break the circle"


def check_metrics(config: _Config) -> _Found:
    """A metric that something waits for is computed, and no two have one name."""

    def names(table: Any) -> list[str]:
        table = config.follow(table)
        return list(table) if isinstance(table, dict) and "_target_" not in table else ["*"] * bool(table)

    keys: dict[str, list[str]] = {}
    metrics: dict[str, list[str]] = {}  # with those of an expression as "*"
    handlers: dict[str, str] = {}
    for id, node in config.components.items():
        if _kind(node).endswith(("Evaluator", "Trainer")) or "key_val_metric" in node:
            keys[id] = names(node.get("key_val_metric")) + names(node.get("key_train_metric"))
            metrics[id] = keys[id] + names(node.get("additional_metrics"))
            for name in {name for name in metrics[id] if metrics[id].count(name) > 1} - {"*"}:
                yield id, f"two metrics are named {name!r}, and one replaces the other", "rename the additional one"
            for key in ("val_handlers", "train_handlers"):
                place = str(node.get(key, ""))
                handlers[(place[1:] if place[:1] == "@" else f"{id}::{key}") + "::"] = id
    validated = {node.get("validator") for node in config.components.values() if _kind(node) == "ValidationHandler"}
    for id, node in config.components.items():
        engine = next((engine for prefix, engine in handlers.items() if id.startswith(prefix)), None)
        available = metrics[engine] if engine else [name for names in metrics.values() for name in names]
        wanted = node.get("metrics") if _kind(node) == "MetricsSaver" else node.get("key_metric_name")
        for name in wanted if isinstance(wanted, list) else [wanted]:
            if isinstance(name, str) and name[:1] not in "$@*" and not {name, "*"} & set(available):
                repair = _nearest(name, available) or f"computed are: {', '.join(available) or 'none'}"
                yield id, f"waits for the metric {name!r}, which nothing computes", repair
        waits = _waits(config, node)
        engine = str(node["validator"])[1:] if waits and "validator" in node else engine
        if waits and engine in keys and not keys[engine]:
            yield id, f"waits for the key metric of {engine}, which has none", f"give {engine} a key_val_metric"
        if waits and "validator" in node and node["validator"] not in validated:
            yield id, f"waits for {engine}, which no ValidationHandler runs", "add one to the trainer's handlers"


def _waits(config: _Config, node: dict) -> bool:
    """Whether a handler waits for an evaluator's key metric."""
    schedule = config.follow(node.get("lr_scheduler"))
    return {
        "BestWeightsSaver": True,
        "CheckpointSaver": node.get("save_key_metric") is True and not node.get("key_metric_name"),
        "EarlyStopHandler": "validator" in node and config.follow(node.get("patience")) is not None,
        "LrScheduleHandler": isinstance(schedule, dict) and _kind(schedule) == "ReduceLROnPlateau",
    }.get(_kind(node), False)


def check_settings(config: _Config) -> _Found:
    """Settings are known, of the right kind and used, and so are the knobs of section 1."""
    unknown = dict(unknown_settings(config.parser.get(), config.known))
    for id, hint in unknown.items():
        yield id, "no config of this bundle has this setting", hint
    for id, problem in wrong_types(config.parser, config.known):
        yield id, problem, "give it as section 1 of the config shows it"
    used = {reference for references in config.references.values() for reference in references}
    knobs = {} if any(config.given.values()) else dict.fromkeys(config.knobs, False)
    for id, setting in (knobs | config.given).items():
        node = config.items.get(id)
        parts = id.split("::")
        above = ["::".join(parts[:n]) for n in range(1, len(parts))]
        taken = used | {it for it in above if it in config.components or isinstance(config.items.get(it), list)}
        lines = node if isinstance(node, list) and node else [node]
        runs = id not in config.knobs and all(isinstance(line, str) and line[:1] in "@$" for line in lines)
        if taken & {*above} or runs or id in unknown or id not in config.items or id[0] == "_" or id in MONAI_KEYS:
            continue
        if not any(f"{name}::".startswith(f"{id}::") for name in used):
            hint = _nearest(id, used - config.given.keys(), 0.8) or "take it out, or let a component refer to it"
            yield id, "nothing uses it here", hint, not setting


def check_paths(config: _Config) -> _Found:
    """Weights to be loaded exist, and so do data that are named; what a run writes itself is not missed."""
    ids = [id for id in config.knobs if id.endswith("weights")]
    for id, node in config.components.items():
        loads = ("path", "load_path") if _kind(node) in ("WeightsLoader", "CheckpointLoader") else ()
        ids += [f"{id}::{key}" for key in node if (key in loads or key.endswith("weights")) and not config.disabled(id)]
    missing = set()
    for id in ids:
        path = config.value(id)
        # a word such as 'imagenet' is no path
        if isinstance(path, str) and (Path(path).suffix or "/" in path) and not config.exists(path):
            shown = Path(path).relative_to(config.root) if Path(path).is_relative_to(config.root) else path
            if shown not in missing:
                yield id, f"{shown} does not exist", "train, which writes it; or name a folder or file that is there"
            missing.add(shown)
    for id, node in config.components.items() if "dataset_dir" in config.given else ():
        if _kind(node) in ("Datalist", "FolderImages") and not config.disabled(id):
            try:
                len(config.values.get_resolved_content(id))
            except Exception as error:
                if (problem := innermost(error)) not in missing:
                    yield id, problem, "give --dataset_dir what `segbundles prepare` wrote, or images to segment"
                missing.add(problem)


def check_properties(config: _Config) -> _Found:
    """What MONAI's ``check_properties`` says of the ids, without making any object."""
    workflow = _Unbuilt(config.parser, "infer" if "evaluator" in config.items else "train")
    try:
        names = workflow.check_properties()
    except Exception as error:
        repair = "let transforms, handlers, metrics and interval be @ references, and each handler a dictionary"
        yield "", f"check_properties() fails: {type(error).__name__}: {error}", repair
        return
    for name in names:
        details = workflow.properties[name]
        id, user = details[BundlePropertyConfig.ID], details.get(BundlePropertyConfig.REF_ID)
        yield id, f"check_properties() lacks {name!r}", f"let {user} be '@{id}'" if user else f"define {id}"


class _Unbuilt(ConfigWorkflow):
    """A workflow whose properties are looked up and not made."""

    def __init__(self, parser: ConfigParser, workflow_type: str) -> None:
        BundleWorkflow.__init__(self, workflow_type=workflow_type)
        self.parser = parser

    def _get_property(self, name: str, property: dict) -> None:
        if property[BundlePropertyConfig.ID] not in self.parser:
            raise AttributeError(name)


RULES = (check_targets, check_references, check_metrics, check_settings, check_paths, check_properties)


def _check_schema(path: Path, schema: str | Path | None) -> _Found:
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        with TemporaryDirectory() as folder:
            verify_metadata(meta_file=str(path), filepath=str(schema or Path(folder) / "schema.json"))
    except Exception as error:
        message = str(error).splitlines()[0]
        if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
            yield "", message, "write it as the schema says"
        else:
            repair = "give --schema a file, or try again with a connection and jsonschema installed"
            yield "", f"not compared with its schema ({message})", repair, False
    finally:
        socket.setdefaulttimeout(timeout)


def _check_networks(path: Path, networks: dict[str, str], config: _Config | None) -> _Found:
    for key, network in networks.items():
        described = {"_meta_::network_data_format": config.parser["_meta_"][key]}
        try:
            verify_net_in_out(network, str(path), config.parser.get(), "cpu", extra_forward_args={}, **described)
        except Exception as error:
            problem = f"{network} of inference.json does not take or give it: {innermost(error).splitlines()[0]}"
            yield key, problem, "make the two agree: channels, type, a size that the strides divide"


def _read(path: Path) -> tuple[dict | None, list[Finding]]:
    """A file's content, None when it is no JSON, and what is wrong with its text."""
    found: list[tuple] = []

    def pairs(items: list[tuple[str, Any]]) -> dict:
        keys = [key for key, _ in items]
        found.extend(
            (key, "is there twice, and only the last counts", "take one out") for key in {*keys} if keys.count(key) > 1
        )
        return dict(items)

    tree = None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=pairs)
        found += (
            _check_strings(tree) if isinstance(tree, dict) else [("", "holds no names and values", "begin it with {")]
        )
    except json.JSONDecodeError as error:
        found = [
            (f"line {error.lineno}, column {error.colno}", f"not JSON: {error.msg}", "mend it there, or just before")
        ]
    except (OSError, ValueError) as error:
        found = [("", f"cannot be read: {error}", "write it as JSON in UTF-8")]
    return tree if isinstance(tree, dict) else None, [Finding(path.name, *it) for it in found]


def _check_strings(node: dict | list, above: str = "") -> _Found:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        id = f"{above}::{key}" if above else str(key)
        if "#" in str(key):
            yield id, "'#' in a name", "write :: instead"
        if isinstance(value, (dict, list)):
            yield from _check_strings(value, id)
        elif isinstance(value, str):
            if "#" in re.sub(r"[@%][\w#:]*", "", value):
                yield id, "'#' in a string, which MONAI turns into ::", "take it out"
            if value[:1] == "$" and len(value) > _LONGEST_EXPRESSION:
                problem = f"an expression of {len(value)} characters, more than {_LONGEST_EXPRESSION}"
                yield id, problem, "make it a function of a library"


def _find(root: Path, name: str | Path) -> Path:
    for path in (root / "configs" / name, root / name, Path(name)):
        if path.is_file():
            return path.resolve()
    names = sorted(path.name for path in (root / "configs").glob("*.json"))
    raise ValueError(
        f"there is no config {str(name)!r} in {root.name}: {_nearest(str(name), names) or ', '.join(names)}"
    )


def _kind(node: dict) -> str:
    return str(node["_target_"]).rpartition(".")[2]


def _nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    near = get_close_matches(name, sorted(names), n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else None


@contextmanager
def _quiet(root: Path) -> Iterator[None]:
    """Let a bundle's own modules be found, as a run does, and keep MONAI's messages and compiled files away."""
    before = logging.root.manager.disable, sys.dont_write_bytecode, list(sys.path)
    logging.disable(logging.CRITICAL)
    sys.dont_write_bytecode = True
    sys.path.insert(1, str(root))
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before[0])
        sys.dont_write_bytecode, sys.path[:] = before[1:]
