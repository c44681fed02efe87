"""What may be wrong in a combination of configs: a rule looks for one kind of fault."""

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
from monai.utils import BundlePropertyConfig

from segbundles.bundle import MONAI_KEYS, read_words, setting_keys, unknown_settings, wrong_types
from segbundles.errors import innermost

__all__ = ["RULES", "Config", "Found", "kind_of", "nearest"]

_NOT_ARGUMENTS = ConfigComponent.non_arg_keys | {"_debug_"}
_RUN_OPTIONS = {*inspect.signature(run).parameters, *inspect.signature(ConfigWorkflow).parameters}
_LOCATOR = ComponentLocator()
Found = Iterator[tuple]  # id, problem, repair and, for a warning, False


class Config:
    """A combination of configs, as MONAI reads it."""

    def __init__(self, root: Path, trees: Sequence[dict], known: list[dict], homes: dict, metadata: dict) -> None:
        self.root, self.trees, self.metadata = root, trees, metadata
        self.homes = homes  # for each setting the names of the bundle's files that have it
        self.known = known  # the configs that the run's own check of overrides looks at
        names = list(trees[0])
        start = names.index("_section_1_") + 1 if "_section_1_" in names else len(names)
        self.knobs = names[start : next((n for n in range(start, len(names)) if names[n][:9] == "_section_"), None)]
        self.given: dict[str, bool] = {}  # what patches and settings bring, and whether it is a setting
        self.items: dict[str, Any] = {}
        self.components: dict[str, dict] = {}
        self.references: dict[str, list[str]] = {}

    def set_up(self, args: dict, overrides: dict) -> Found:
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
                    homes = None if first in self.parser else self.homes.get(first)
                    repair = innermost(error).strip("'\"").splitlines()[0].rstrip(", ")
                    yield id, "has no place in the config", f"it is for {', '.join(homes)}" if homes else repair
        run_id = overrides.get("run_id", args.get("run_id"))
        if run_id and run_id not in self.parser:
            yield "run_id", f"there is no id {run_id!r}", nearest(run_id, self.parser.get()) or "name another"
        if "bundle_root" in self.given and not self.exists(folder := str(self.parser["bundle_root"])):
            yield "bundle_root", f"{folder} does not exist", "give the folder that holds configs"
        if "bundle_root" in self.parser:
            self.parser["bundle_root"] = str(self.root)
        self.parser["_meta_"] = self.metadata
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

    def reached(self, id: str) -> set[str]:
        """An entry and all that it refers to; every entry where it is absent."""
        if id not in self.items:
            return {*self.items}
        found, left = set(), [id]
        while left:
            if (id := left.pop()) not in found and id in self.items:
                found.add(id)
                left += ReferenceResolver.find_refs_in_config(self.items[id], id)
        return found

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


def check_targets(config: Config) -> Found:
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
            hint = nearest(name, names) or "is its package installed, and its path whole?"
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
                yield f"{id}::{key}", f"{name} takes no {key!r}", near or f"it takes {', '.join(named)}"
            elif near := nearest(key, set(named) - set(given), 0.8):
                yield f"{id}::{key}", f"{name} passes {key!r} on, though it may be misspelt", near, False
        required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        lacking = ", ".join(p.name for p in required if p.name not in given)
        if lacking and node.get("_mode_") != "callable":
            yield id, f"{name} needs {lacking}", f"add {lacking}"


def check_references(config: Config) -> Found:
    """Every ``@id`` exists and none leads back to itself; every ``$`` expression is Python."""
    known = config.parser.ref_resolver.items
    for id, references in config.references.items():
        text = config.items[id]
        for reference in references:
            if reference not in known:
                yield id, f"@{reference} does not exist", nearest(reference, known) or "define it, or name another"
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


def check_metrics(config: Config) -> Found:
    """A metric that something waits for is computed, and no two have one name; handlers that do not run wait not."""

    def names(table: Any) -> list[str]:
        table = config.follow(table)
        return list(table) if isinstance(table, dict) and "_target_" not in table else ["*"] * bool(table)

    keys: dict[str, list[str]] = {}
    metrics: dict[str, list[str]] = {}  # with those of an expression as "*"
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
        wanted = node.get("metrics") if kind_of(node) == "MetricsSaver" else node.get("key_metric_name")
        for name in wanted if isinstance(wanted, list) else [wanted]:
            if isinstance(name, str) and name[:1] not in "$@*" and not {name, "*"} & set(available):
                repair = nearest(name, available) or f"computed are: {', '.join(available) or 'none'}"
                yield id, f"waits for the metric {name!r}, which nothing computes", repair
        waits = id in running and _waits(config, node)
        engine = str(node["validator"])[1:] if waits and "validator" in node else engine
        if waits and engine in keys and not keys[engine]:
            yield id, f"waits for the key metric of {engine}, which has none", f"give {engine} a key_val_metric"
        if waits and "validator" in node and node["validator"] not in validated:
            yield id, f"waits for {engine}, which no ValidationHandler runs", "add one to the trainer's handlers"


def _waits(config: Config, node: dict) -> bool:
    """Whether a handler waits for an evaluator's key metric."""
    schedule = config.follow(node.get("lr_scheduler"))
    return {
        "BestWeightsSaver": True,
        "CheckpointSaver": node.get("save_key_metric") is True and not node.get("key_metric_name"),
        "EarlyStopHandler": "validator" in node and config.follow(node.get("patience")) is not None,
        "LrScheduleHandler": isinstance(schedule, dict) and kind_of(schedule) == "ReduceLROnPlateau",
    }.get(kind_of(node), False)


def check_settings(config: Config) -> Found:
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
            homes = [] if any(id in setting_keys(tree) for tree in config.trees) else config.homes.get(id)
            hint = nearest(id, used - config.given.keys(), 0.8) or "take it out, or let a component refer to it"
            yield id, "nothing uses it here", f"it is for {', '.join(homes)}" if homes else hint, not setting


def check_paths(config: Config) -> Found:
    """Weights to be loaded exist, and so do data that are named; what a run writes itself is not missed."""
    ids = [id for id in config.knobs if id.endswith("weights")]
    for id, node in config.components.items():
        loads = ("path", "load_path") if kind_of(node) in ("WeightsLoader", "CheckpointLoader") else ()
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
        if kind_of(node) in ("Datalist", "FolderImages") and not config.disabled(id):
            try:
                len(config.values.get_resolved_content(id))
            except Exception as error:
                if (problem := innermost(error)) not in missing:
                    yield id, problem, "give --dataset_dir what `segbundles prepare` wrote, or images to segment"
                missing.add(problem)


def check_properties(config: Config) -> Found:
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


def kind_of(node: dict) -> str:
    """Name of a component's class."""
    return str(node["_target_"]).rpartition(".")[2]


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The nearest of some names, as a question."""
    near = get_close_matches(name, sorted(names), n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else None
