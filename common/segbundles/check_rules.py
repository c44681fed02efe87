"""What can be wrong in a combination of configs; each rule finds one kind of fault."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from difflib import get_close_matches
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow, run
from monai.bundle.config_item import ComponentLocator, ConfigComponent
from monai.bundle.reference_resolver import ReferenceResolver
from monai.bundle.utils import merge_kv
from monai.bundle.workflows import BundleWorkflow
from monai.utils import BundlePropertyConfig, ensure_tuple

from segbundles.errors import innermost
from segbundles.knobs import SCHEMA_NAME, faults
from segbundles.rules import broken_rules
from segbundles.running import MONAI_KEYS, read_words, setting_keys, unknown_settings

__all__ = ["RULES", "Config", "Found", "kind_of", "nearest"]

_NOT_ARGUMENTS = ConfigComponent.non_arg_keys | {"_debug_"}
_RUN_OPTIONS = {*inspect.signature(run).parameters, *inspect.signature(ConfigWorkflow).parameters}
_LOCATOR = ComponentLocator()
_UNKNOWN = "no config of this bundle has this setting"
Found = Iterator[tuple]  # id, problem, repair and, for a warning, False


class Config:
    """A combination of configs, as MONAI reads it.

    Args:
        root: folder of the bundle.
        trees: contents of the configs; later ones patch earlier ones.
        known: configs whose names count as known settings, see :func:`segbundles.running.read_configs`.
        homes: for each setting, the names of the bundle's files that have it.
        metadata: contents of metadata.json.
        schema: schema of the knobs.
        as_run: whether to compare the settings with the facts of the weights that the bundle has now.
    """

    def __init__(
        self,
        root: Path,
        trees: Sequence[dict],
        known: list[dict],
        homes: dict,
        metadata: dict,
        schema: dict,
        as_run: bool,
    ) -> None:
        self.root, self.trees, self.metadata, self.schema = root, trees, metadata, schema
        self.homes, self.known, self.as_run = homes, known, as_run
        names = list(trees[0])
        start = names.index("_section_1_") + 1 if "_section_1_" in names else len(names)
        self.knobs = names[start : next((n for n in range(start, len(names)) if names[n][:9] == "_section_"), None)]
        self.given: dict[str, bool] = {}  # ids set by patches and settings; True for a setting
        self.typed: set[str] = set()  # those of the command line: a run refuses one without effect
        self.items: dict[str, Any] = {}
        self.components: dict[str, dict] = {}
        self.references: dict[str, list[str]] = {}
        self.unknown: dict[str, str] = {}  # settings that nothing knows, with what to do
        self.wrong: set[str] = set()  # knobs that another rule has reported

    def set_up(self, args: dict, overrides: dict) -> Found:
        """Merge the configs and settings, and yield what does not fit."""
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
                if tree is overrides and "#" in str(value) and str(value)[:1] not in ("$", "@", "%"):
                    repair = "rename that file or folder, or give a link to it without '#' in its path"
                    yield id, f"is {value!r}, and MONAI reads '#' in it as '::'", repair
                    continue
                if key[:1] == "+" and id not in self.parser:
                    yield key, f"adds to {id!r}, which does not exist", "use the name in the config that it patches"
                self.typed |= {id} if tree is overrides else set()
                try:
                    merge_kv(self.parser, key, deepcopy(value))
                    self.given |= {} if tree is self.trees[0] else {id: tree is args or tree is overrides}
                except (KeyError, IndexError, ValueError) as error:
                    homes = None if first in self.parser else self.homes.get(first)
                    repair = innermost(error).strip("'\"").splitlines()[0].rstrip(", ")
                    yield id, "has no place in the config", f"it belongs to {', '.join(homes)}" if homes else repair
        run_id = overrides.get("run_id", args.get("run_id"))
        if run_id and run_id not in self.parser:
            yield "run_id", f"there is no id {run_id!r}", nearest(run_id, self.parser.get()) or "give another"
        if "bundle_root" in self.given and not self.exists(folder := str(self.parser["bundle_root"])):
            yield "bundle_root", f"{folder} does not exist", "give the folder that contains configs"
        if "bundle_root" in self.parser:
            self.parser["bundle_root"] = str(self.root)
        self.parser["_meta_"] = self.metadata
        try:
            self.parser, self.values = self.parsed(), self.parsed().ref_resolver
        except (OSError, KeyError, IndexError, ValueError) as error:
            yield "", f"cannot be read: {innermost(error)}", "fix the reference that begins with % or @::"
            return
        items = self.parser.ref_resolver.items.items()
        self.items = {id: item.get_config() for id, item in items if id and not id.startswith("_meta_")}
        self.components = {id: node for id, node in self.items.items() if ConfigComponent.is_instantiable(node)}
        texts = {id: node for id, node in self.items.items() if isinstance(node, str)}
        self.references = {id: list(ReferenceResolver.match_refs_pattern(text)) for id, text in texts.items()}
        self.unknown = dict(unknown_settings(self.parser.get(), self.known, self.schema))

    def parsed(self) -> ConfigParser:
        """Return a parser of its own, in which nothing is evaluated yet."""
        parser = ConfigParser(config=deepcopy(self.parser.get()))
        parser.locator = _LOCATOR
        parser.parse()
        read_words(parser)
        return parser

    def exists(self, path: str | Path) -> bool:
        """Return whether a path exists, from here or from the bundle."""
        return Path(path).exists() or (self.root / path).exists()

    def follow(self, node: Any) -> Any:
        """Return what a reference leads to, by way of other references."""
        for _ in range(9):
            node = self.items.get(node[1:].replace("#", "::")) if isinstance(node, str) and node[:1] == "@" else node
        return node

    def reached(self, id: str) -> set[str]:
        """Return an entry and everything it refers to; all entries if it does not exist."""
        if id not in self.items:
            return {*self.items}
        found, left = set(), [id]
        while left:
            if (id := left.pop()) not in found and id in self.items:
                found.add(id)
                left += ReferenceResolver.find_refs_in_config(self.items[id], id)
        return found

    def value(self, id: str, default: Any = None) -> Any:
        """Return the value of an entry, or the default if it does not exist or needs an object to be made."""
        try:
            return self.values.get_resolved_content(id) if self._simple(id) else default
        except Exception:  # other rules, or the run's own check, say what is wrong there
            return default

    def _simple(self, id: str) -> bool:
        if id not in self.items or id in self.components:
            return False
        return all(map(self._simple, ReferenceResolver.find_refs_in_config(self.items[id], id)))

    def disabled(self, id: str) -> bool:
        """Return whether an entry, or one that contains it, has ``_disabled_``."""
        parts = id.split("::")
        flags = [self.value(f"{'::'.join(parts[:n])}::_disabled_") for n in range(1, len(parts) + 1)]
        return any(flag.lower() == "true" if isinstance(flag, str) else flag for flag in flags)

    def summary(self) -> str:
        """Count what was checked."""
        expressions = sum(self.items[id][:1] == "$" for id in self.references)
        references = sum(map(len, self.references.values()))
        return f"components: {len(self.components)}, references: {references}, expressions: {expressions}"


def check_targets(config: Config) -> Found:
    """Check that every ``_target_`` exists and has the arguments it is given."""
    for id, node in config.components.items():
        target = node["_target_"]
        if not isinstance(target, str) or target[:1] in "$@%":
            continue
        parent, _, name = target.rpartition(".")
        try:
            found = locate(ConfigComponent(node, id, _LOCATOR).resolve_module_name())
        except ErrorDuringImport as error:
            yield id, f"{target} cannot be imported: {error.value}", "fix the module, or install what it needs"
            continue
        if found is None:
            names = dir(locate(parent)) if parent else _LOCATOR._components_table or ()
            hint = nearest(name, names) or "is its package installed, and the name complete?"
            yield id, f"{target} does not exist", hint
        try:
            parameters = inspect.signature(found).parameters.values()
        except (TypeError, ValueError):
            continue  # nothing to call, or written in C without a signature
        given = [key for key in node if key not in _NOT_ARGUMENTS]
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        for key in (key for key in given if key not in named):
            if not any(p.kind == p.VAR_KEYWORD for p in parameters):
                near = nearest(key, set(named) - set(given)) or nearest(key, named)
                yield f"{id}::{key}", f"{name} has no argument {key!r}", near or f"its arguments are {', '.join(named)}"
            elif near := nearest(key, set(named) - set(given), 0.8):
                yield f"{id}::{key}", f"{name} accepts any argument, but {key!r} may be a typo", near, False
        required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        missing = ", ".join(p.name for p in required if p.name not in given)
        if missing and node.get("_mode_") != "callable":
            yield id, f"{name} needs {missing}", f"add {missing}"


def check_references(config: Config) -> Found:
    """Check that every ``@id`` exists, that none leads back to itself, and that every ``$`` expression is Python."""
    known = config.parser.ref_resolver.items
    misspelt = " ".join(config.unknown.values())  # the name is reported where it is misspelt
    for id, references in config.references.items():
        text = config.items[id]
        for reference in references:
            if reference not in known and f"{reference!r}" not in misspelt:
                yield id, f"@{reference} does not exist", nearest(reference, known) or "define it, or use another name"
        if text[:1] == "@" and not references:
            yield id, f"{text!r} is not a reference and stays text", "begin an expression with $"
        if text[:1] == "$":
            # as in MONAI, references become look-ups in a dictionary
            code = ReferenceResolver.update_refs_pattern(text, dict.fromkeys(references))[1:]
            try:
                if not any(isinstance(line, (ast.Import, ast.ImportFrom)) for line in ast.parse(code).body):
                    ast.parse(code, mode="eval")
            except SyntaxError as error:
                yield id, f"{text!r} is not a Python expression: {error.msg}", "fix what follows the $"
    links = {id: ReferenceResolver.find_refs_in_config(node, id) for id, node in config.items.items()}
    try:
        TopologicalSorter(links).prepare()
    except CycleError as error:
        yield error.args[1][0], f"refers to itself: {' -> '.join(error.args[1])}", "remove one of these references"


def check_metrics(config: Config) -> Found:
    """Check that each metric that a running handler needs is computed, and that names of metrics are unique."""

    def names(table: Any) -> list[str]:
        table = config.follow(table)
        return list(table) if isinstance(table, dict) and "_target_" not in table else ["*"] * bool(table)

    keys: dict[str, list[str]] = {}
    metrics: dict[str, list[str]] = {}  # "*" stands for those of an expression
    handlers: dict[str, str] = {}
    for id, node in config.components.items():
        if kind_of(node).endswith(("Evaluator", "Trainer")) or "key_val_metric" in node:
            keys[id] = names(node.get("key_val_metric")) + names(node.get("key_train_metric"))
            metrics[id] = keys[id] + names(node.get("additional_metrics"))
            for name in {name for name in metrics[id] if metrics[id].count(name) > 1} - {"*"}:
                yield id, f"two metrics are named {name!r}, and one replaces the other", "rename the additional one"
            for key in ("val_handlers", "train_handlers"):
                place = str(node.get(key, ""))
                handlers[(place[1:] if place[:1] == "@" else f"{id}::{key}") + "::"] = id
    running = config.reached("run")
    validated = {node.get("validator") for node in config.components.values() if kind_of(node) == "ValidationHandler"}
    for id, node in config.components.items():
        engine = next((engine for prefix, engine in handlers.items() if id.startswith(prefix)), None)
        available = metrics[engine] if engine else [name for names in metrics.values() for name in names]
        kind = kind_of(node)
        wanted = node.get("metrics") if kind == "MetricsSaver" else node.get("key_metric_name")
        for name in wanted if isinstance(wanted, list) else [wanted]:
            if isinstance(name, str) and name[:1] not in "$@*" and not {name, "*"} & set(available):
                repair = nearest(name, available) or f"the metrics are: {', '.join(available) or 'none'}"
                yield id, f"needs the metric {name!r}, which is not computed", repair
        saves_best = node.get("save_key_metric") is True and not node.get("key_metric_name")
        if id not in running or not (kind == "TrainingRun" or (kind == "CheckpointSaver" and saves_best)):
            continue
        if kind == "TrainingRun":
            engine = str(node.get("validator"))[1:]
            if node.get("validator") not in validated:
                yield id, f"needs {engine}, which no ValidationHandler runs", "add one to the trainer's handlers"
        if engine in keys and not keys[engine]:
            yield id, f"needs the key metric of {engine}, which has none", f"give {engine} a key_val_metric"


def check_settings(config: Config) -> Found:
    """Check that settings and knobs are known, described, allowed and used, and fit each other and the weights."""
    unknown = config.unknown
    for id, hint in unknown.items():
        given = id.split("::")[0] in config.given or id in config.given
        yield id, _UNKNOWN if given else "there is no such knob, and nothing uses it", hint
    described, absent = config.schema["properties"], object()
    values = {name: config.value(name, absent) for name in described}
    knobs = {name: value for name, value in values.items() if value is not absent}
    wrong = list(faults(config.schema, knobs)) or list(broken_rules(knobs))
    config.wrong |= {id for id, _ in wrong}
    for id, problem in wrong:
        yield id, problem, described[id].get("description", "").partition(". ")[0].rstrip(".")
    if config.as_run and not unknown and not wrong:
        yield from _check_run(config)
    for id in config.knobs:
        if described and id not in described and id not in unknown:
            yield id, f"{SCHEMA_NAME} does not describe it", "add it to the properties there", False
    used = {reference for references in config.references.values() for reference in references}
    knobs = {} if any(config.given.values()) else dict.fromkeys(config.knobs, False)
    for id, setting in (knobs | config.given).items():
        node = config.items.get(id)
        parts = id.split("::")
        above = ["::".join(parts[:n]) for n in range(1, len(parts))]
        taken = used | {it for it in above if it in config.components or isinstance(config.items.get(it), list)}
        lines = node if isinstance(node, list) and node else [node]
        runs = id not in config.knobs and all(isinstance(line, str) and line[:1] in "@$" for line in lines)
        if taken & {*above} or runs or id in unknown or id not in config.items or id[0] in "_$" or id in MONAI_KEYS:
            continue
        if not any(f"{name}::".startswith(f"{id}::") for name in used):
            homes = [] if any(id in setting_keys(tree) for tree in config.trees) else config.homes.get(id)
            hint = nearest(id, used - config.given.keys(), 0.8) or "remove it, or refer to it from a component"
            fault = not setting or (id in config.typed and id in described)
            yield id, "nothing uses it here", f"it belongs to {', '.join(homes)}" if homes else hint, fault


def _check_run(config: Config) -> Found:
    """Evaluate ``settings`` as a run does first, with the facts of the weights."""
    try:
        notes = config.parsed().get_parsed_content("settings").notes if "settings" in config.items else ()
    except Exception as error:
        message = innermost(error)
        problem, _, repair = message.rpartition(": ")
        name, _, rest = problem.partition(" ")
        known = name in config.schema["properties"]
        config.wrong |= {name} if known else set()
        yield (name, rest, repair) if known else ("settings", message, "the run stops with this message")
        return
    for note in notes:
        name, _, rest = note.partition(" ")
        yield name, rest, "leave it out, unless you want this; the results will have this note", False


def check_paths(config: Config) -> Found:
    """Check that the weights to load exist, and the data if they are given; a run writes everything else itself."""
    ids = [id for id in config.knobs if id.endswith("weights")]
    for id, node in config.components.items():
        loads = ("path", "load_path") if kind_of(node) in ("WeightsLoader", "CheckpointLoader") else ()
        ids += [f"{id}::{key}" for key in node if (key in loads or key.endswith("weights")) and not config.disabled(id)]
    missing = {str(path) for id in config.wrong for path in ensure_tuple(config.value(id))}
    for id in ids:
        knob = config.schema["properties"].get(id, {"loads": True})
        for path in ensure_tuple(config.value(id)):
            # a word such as 'imagenet' is not a path
            if isinstance(path, str) and (Path(path).suffix or "/" in path) and not config.exists(path):
                shown = Path(path).relative_to(config.root) if Path(path).is_relative_to(config.root) else path
                written = "train, which writes it; or give a file that exists"
                if path not in missing:
                    yield id, f"{shown} does not exist", written if knob.get("loads") else _nearest_file(path)
                missing.add(path)
    for id, node in config.components.items() if "dataset_dir" in config.given else ():
        if kind_of(node) in ("Datalist", "FolderImages") and not config.disabled(id):
            try:
                len(config.values.get_resolved_content(id))
            except Exception as error:
                if (problem := innermost(error)) not in missing:
                    yield id, problem, "give --dataset_dir a prepared folder, or one with images to segment"
                missing.add(problem)


def _nearest_file(path: str) -> str:
    folder = Path(path).parent
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return nearest(Path(path).name, names) or "give a file that exists, or null"


def check_properties(config: Config) -> Found:
    """Check the ids with MONAI's ``check_properties``, without making any object."""
    workflow = _Unbuilt(config.parser, "infer" if "evaluator" in config.items else "train")
    try:
        names = workflow.check_properties()
    except Exception as error:
        repair = "use @ references for transforms, handlers, metrics and interval, and a dictionary for each handler"
        yield "", f"check_properties() fails: {type(error).__name__}: {error}", repair
        return
    for name in names:
        details = workflow.properties[name]
        id, user = details[BundlePropertyConfig.ID], details.get(BundlePropertyConfig.REF_ID)
        yield id, f"check_properties() does not find {name!r}", f"set {user} to '@{id}'" if user else f"define {id}"


class _Unbuilt(ConfigWorkflow):
    """Look up the properties of a workflow without making them."""

    def __init__(self, parser: ConfigParser, workflow_type: str) -> None:
        BundleWorkflow.__init__(self, workflow_type=workflow_type)
        self.parser = parser

    def _get_property(self, name: str, property: dict) -> None:
        if property[BundlePropertyConfig.ID] not in self.parser:
            raise AttributeError(name)


RULES = (check_targets, check_references, check_metrics, check_settings, check_paths, check_properties)


def kind_of(node: dict) -> str:
    """Return the name of a component's class."""
    return str(node["_target_"]).rpartition(".")[2]


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the most similar of some names, as a question; None if none is similar."""
    near = get_close_matches(name, sorted(names), n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else None
