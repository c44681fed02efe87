"""How MONAI runs a config: who runs it, what a person gave, which names it has, and what its entries are worth."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import zip_longest
from pathlib import Path
from types import FrameType
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.config_item import ConfigComponent, ConfigExpression
from monai.bundle.reference_resolver import ReferenceResolver
from monai.fl.client import MonaiAlgo

from segbundles.errors import fail, innermost, unwrapped
from segbundles.knobs import SCHEMA_NAME, former_names

__all__ = [
    "ABSENT",
    "MONAI_KEYS",
    "Running",
    "read_configs",
    "read_words",
    "referenced",
    "setting_keys",
    "unknown_settings",
]

_WORDS = {"true": True, "false": False, "null": None}
# keys that MONAI itself puts beside the config: metadata, experiment tracking, federated clients
MONAI_KEYS = {
    "_meta_",
    "tracking_uri",
    "experiment_name",
    "run_name",
    "save_execute_config",
    "is_not_rank0",
    "use_click",
}

# modules whose functions keep what a person gave in a local variable
_RUNNERS = ("monai.bundle.scripts", "segbundles.exporting", "segbundles.segmenter")

# MONAI has no place to say so: the configs import this module before anything else is evaluated
ConfigExpression.evaluate = unwrapped(ConfigExpression.evaluate)
ConfigComponent.instantiate = unwrapped(ConfigComponent.instantiate)

#: the value of an entry that the config does not have, or that is an object still to be made
ABSENT: Any = object()


@dataclass
class Running:
    """The config whose expression is being evaluated.

    Args:
        parser: its parser.
        workflow: the workflow that runs it; None in a program that only parses it.
        client: the federated client that runs the workflow.
        given: what a person or a program gave, by id.
        weights: file of the weights, by the knob that names them, where MONAI names it in another way (``load`` and the
            export commands).
    """

    parser: ConfigParser | None = None
    workflow: ConfigWorkflow | None = None
    client: MonaiAlgo | None = None
    given: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)

    @classmethod
    def find(cls) -> Running:
        """Find the config that evaluates the expression which called us, from the frames of the calls.

        Expressions have no other access to it. Settings given to MONAI's functions, our ``Segmenter`` and
        ``export_bundle`` are in their local variables; without these, a given value that equals the config's line could
        not be told from it.
        """
        found = cls()
        frame = inspect.currentframe()
        while frame is not None:
            owner = frame.f_locals.get("self")
            if found.parser is None and isinstance(owner, ConfigParser):
                found.parser = owner
            if found.workflow is None and isinstance(owner, ConfigWorkflow):
                found.workflow = owner
            if found.client is None and isinstance(owner, MonaiAlgo):
                found.client = owner
            if frame.f_globals.get("__name__") in _RUNNERS:
                found._read(frame)
            frame = frame.f_back
        return found

    def _read(self, frame: FrameType) -> None:
        for name in ("override", "_args", "kwargs"):
            if isinstance(values := frame.f_locals.get(name), dict):
                self.given = {ReferenceResolver.normalize_id(key): value for key, value in values.items()} | self.given
        if weights := frame.f_locals.get("ckpt_file_") or frame.f_locals.get("full_path"):
            network = frame.f_locals.get("net_id_") or "network_def"
            self.weights["weights" if network == "network_def" else network.replace("_def", "_weights")] = str(weights)

    def typed(self, name: str) -> str | None:
        """Return what was typed for a setting on the command line of ``monai.bundle``; None if it was not."""
        spec = getattr(sys.modules.get("__main__"), "__spec__", None)
        words = sys.argv if name in self.given and spec is not None and spec.name == "monai.bundle.__main__" else []
        for word, following in zip_longest(words, words[1:]):
            option, joined, value = word.partition("=")
            if option.lstrip("-").replace("-", "_") == name and option.startswith("-"):
                return value if joined else following
        return None

    def source(self, name: str) -> str:
        """Say where a given value comes from."""
        return "an args file or a program" if self.typed(name) is None else "the command line"

    @property
    def items(self) -> dict[str, Any]:
        """The parsed entries, by id."""
        return self.parser.ref_resolver.items

    def value(self, name: str) -> Any:
        """Return the value of an entry; `ABSENT` also if an object would have to be made for it.

        Raises:
            ValueError: when its expression fails.
        """
        if not self._is_simple(name):
            return ABSENT
        try:
            return self.parser.get_parsed_content(name)
        except Exception as error:
            fail(f"{name} is {self.items[name].get_config()!r}, which cannot be computed: {innermost(error)}.")

    def _is_simple(self, name: str) -> bool:
        if name not in self.items or ConfigComponent.is_instantiable(config := self.items[name].get_config()):
            return False
        return all(map(self._is_simple, ReferenceResolver.find_refs_in_config(config, name)))

    def reached(self, start: str) -> set[str]:
        """Return the ids that an entry refers to, directly or by way of others, and its own."""
        seen: set[str] = set()
        left = [start]
        while left:
            name = left.pop()
            if name in self.items and name not in seen:
                seen.add(name)
                left += ReferenceResolver.find_refs_in_config(self.items[name].get_config(), name)
        return seen

    def set(self, name: str, value: Any) -> None:
        """Set an entry at the top of the config, in the middle of its evaluation."""
        # not parser[name] = ...: that would reset the resolver
        self.items[name].update_config(value)
        self.parser.config[name] = value


def read_configs(folders: set[Path]) -> list[dict]:
    """Return the configs in some folders, without metadata, schema and args files; unreadable files are left out."""
    trees = []
    for path in sorted({p.resolve() for folder in folders for p in folder.glob("*.json")}):
        if path.name in ("metadata.json", SCHEMA_NAME) or path.name.startswith("args_"):
            continue
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(tree, dict) and "config_file" not in tree:  # that one is for --args_file
            trees.append({_plain(key): value for key, value in tree.items()})
    return trees


def _plain(key: str) -> str:
    """A patch file writes ``+key`` to append and ``a#b`` or ``a::b`` to reach inside."""
    return key.lstrip("+~").replace("#", "::")


def unknown_settings(config: dict, files: list[dict], schema: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the keys of a config that neither the bundle's files nor a reference know, each with what to do.

    Args:
        config: the config as it runs, with everything that was given.
        files: see :func:`read_configs`.
        schema: schema of the knobs.
    """
    used = referenced(config)
    known = {key for tree in files for key in setting_keys(tree)} | used
    if described := schema["properties"].keys():
        # a line of a config that nothing uses and nothing describes is as unknown as a word on the command line
        plain = {key for key, value in config.items() if not isinstance(value, dict) and not _is_wiring(key, value)}
        known -= plain - described - used
    former = former_names(schema)
    sections = tuple(f"{key}::" for key in _components(files) | used)
    for key in setting_keys(config):
        if key in former and key not in known:
            yield key, f"it is now called {former[key]!r}."
        if key in known or key.split("::")[0] in MONAI_KEYS or key.startswith(sections) or key in former:
            continue
        if key[:1] == key[-1:] == "_":  # a remark
            continue
        near = get_close_matches(key, sorted(known), n=1, cutoff=0.6)
        yield key, f"did you mean {near[0]!r}?" if near else "section 1 of the JSON shows what can be set."


def _is_wiring(key: str, value: Any) -> bool:
    """Return whether an entry is a remark, or is there for what its expressions do."""
    values = value if isinstance(value, list) and value else [value]
    return key[:1] in "_$" or all(isinstance(one, str) and one[:1] in ("$", "@", "%") for one in values)


def setting_keys(tree: dict, prefix: str = "") -> Iterator[str]:
    """Yield the ids of a config's entries, down to components."""
    for key, value in tree.items():
        name = prefix + _plain(str(key))
        yield name
        if isinstance(value, dict) and "_target_" not in value:
            yield from setting_keys(value, f"{name}::")


def _components(trees: list[dict]) -> set[str]:
    """Return the ids of components and lists, into which an override may put anything."""
    found = set()
    stack = [("", tree) for tree in trees]
    while stack:
        prefix, node = stack.pop()
        for key, value in node.items():
            name = prefix + _plain(str(key))
            if isinstance(value, list) or (isinstance(value, dict) and "_target_" in value):
                found.add(name)
            elif isinstance(value, dict):
                stack.append((f"{name}::", value))
    return found


def referenced(config: Any) -> set[str]:
    """Return the ids that a config refers to."""
    return set(_references(config))


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _references(value)
    elif isinstance(node, str) and node[:1] in "@$":
        yield from (name.replace("#", "::") for name in re.findall(r"@([A-Za-z_][\w:#]*)", node))


def read_words(parser: ConfigParser) -> None:
    """Turn the words true, false and null of a parsed config into values."""
    for item in parser.ref_resolver.items.values():
        value = item.get_config()
        if _is_word(value):
            item.update_config(_WORDS[value.lower()])
        elif isinstance(value, dict | list):
            # a component takes its plain arguments from its own dictionary, not from their items
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                if _is_word(inner):
                    value[key] = _WORDS[inner.lower()]


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value.lower() in _WORDS
