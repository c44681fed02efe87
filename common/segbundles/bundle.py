"""What every bundle's configs call by name: the check of what a person typed on the command line."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow
from monai.fl.client import MonaiAlgo

from segbundles.errors import fail

__all__ = ["check_overrides"]

_WORDS = {"true": True, "false": False, "null": None}
# set by MONAI itself beside the config: metadata, experiment tracking, federated clients
MONAI_KEYS = {
    "_meta_",
    "tracking_uri",
    "experiment_name",
    "run_name",
    "save_execute_config",
    "is_not_rank0",
    "use_click",
}
# settings that put other weights in the place of those that a federation's server sends
_OWN_WEIGHTS = ("resume", "initial_weights", "vgg16_weights")


def check_overrides(bundle_root: str | Path) -> None:
    """Refuse settings that no config of the bundle knows, and read the words ``true``, ``false`` and ``null``.

    To be the first entry of ``initialize`` in every config. MONAI takes any ``--key value`` into the config, so that a
    misspelt ``--max_epoch 1`` changes nothing and says nothing, and passes ``--amp false`` on as the string
    ``"false"``, which is true. A key is known when a JSON file beside the running config or in
    ``bundle_root/configs`` holds it (args files apart), or when another entry of the config refers by ``@key`` to it or
    to the whole section it is in. Keyword arguments of components (inside a ``_target_``) are left to the component.

    In a client of a federation (MONAI's ``MonaiAlgo``) the weights come from the server: settings that load others are
    refused, and evaluation does not read ``model.pt``.

    Args:
        bundle_root: folder of the bundle, whose ``configs`` are read.

    Raises:
        ValueError: when a key is unknown (naming the nearest known one), when a setting whose default is a number,
            a boolean or a list is given something else, or when a federated client is to load weights of its own.
    """
    parser, workflow, client = _running_config()
    if parser is None or not isinstance(parser.config, dict):
        return
    folders = [Path(bundle_root) / "configs"]
    if workflow is not None:
        folders.append(Path(workflow.config_root_path))
    files = read_configs(set(folders))
    if not files:
        return
    for key, hint in unknown_settings(parser.config, files):
        name = next(folder for folder in folders if folder.is_dir()).resolve().parent.name
        fail(f"there is no setting {key!r} in the configs of {name}: {hint}")
    read_words(parser)
    for key, problem in wrong_types(parser, files):
        fail(f"setting {key!r} {problem}.")
    mend_tracked_file(parser)
    if client is not None:
        _leave_weights_to_server(parser, client)


def unknown_settings(config: dict, files: list[dict]) -> Iterator[tuple[str, str]]:
    """Keys of a config that neither the bundle's files nor a reference know, each with what to do.

    Args:
        config: the config as it runs, overrides and all.
        files: what :func:`read_configs` gave.
    """
    referenced = set(_references(config))
    known = {key for tree in files for key in setting_keys(tree)} | referenced
    sections = tuple(f"{key}::" for key in _components(files) | referenced)
    for key in setting_keys(config):
        if key in known or key.split("::")[0] in MONAI_KEYS or key.startswith(sections):
            continue
        near = get_close_matches(key, sorted(known), n=1, cutoff=0.6)
        yield key, f"did you mean {near[0]!r}?" if near else "section 1 of the JSON shows what can be set."


def _running_config() -> tuple[ConfigParser | None, ConfigWorkflow | None, MonaiAlgo | None]:
    """The parser and the workflow that are evaluating the expression which called us, and their federated client."""
    parser = workflow = None
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if parser is None and isinstance(owner, ConfigParser):
            parser = owner
        if workflow is None and isinstance(owner, ConfigWorkflow):
            workflow = owner
        if isinstance(owner, MonaiAlgo):
            return parser, workflow, owner
        frame = frame.f_back
    return parser, workflow, None


def read_configs(folders: set[Path]) -> list[dict]:
    """The configs in some folders, without metadata and args files; what cannot be read is left out."""
    trees = []
    for path in sorted({p.resolve() for folder in folders for p in folder.glob("*.json")}):
        if path.name == "metadata.json" or path.name.startswith("args_"):
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


def setting_keys(tree: dict, prefix: str = "") -> Iterator[str]:
    """Ids of a config's entries, down to components."""
    for key, value in tree.items():
        name = prefix + _plain(str(key))
        yield name
        if isinstance(value, dict) and "_target_" not in value:
            yield from setting_keys(value, f"{name}::")


def _components(trees: list[dict]) -> set[str]:
    """Ids of components and lists, into which an override may put anything."""
    found = set()
    for tree in trees:
        stack = [("", tree)]
        while stack:
            prefix, node = stack.pop()
            for key, value in node.items():
                name = prefix + _plain(str(key))
                if isinstance(value, list) or (isinstance(value, dict) and "_target_" in value):
                    found.add(name)
                elif isinstance(value, dict):
                    stack.append((f"{name}::", value))
    return found


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)
    elif isinstance(node, str) and node[:1] in "@$":
        yield from (name.replace("#", "::") for name in re.findall(r"@([A-Za-z_][\w:#]*)", node))


def read_words(parser: ConfigParser) -> None:
    """Turn the words true, false and null of a parsed config into values."""
    # not parser[id] = ...: that would reset the resolver in the middle of its work
    for item in parser.ref_resolver.items.values():
        value = item.get_config()
        if _is_word(value):
            item.update_config(_WORDS[value.lower()])
        elif item.get_id().endswith("_dir") and isinstance(value, int):
            item.update_config(str(value))  # a folder named 2018
        elif isinstance(value, (dict, list)):
            # a component takes its plain arguments from its own dictionary, not from their items
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                if _is_word(inner):
                    value[key] = _WORDS[inner.lower()]


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value.lower() in _WORDS


def mend_tracked_file(parser: ConfigParser) -> None:
    """Make a path of the name of the config's copy that experiment tracking keeps.

    ``--tracking mlflow`` joins ``output_dir`` and that name as an expression, and leaves it text where ``output_dir``
    is a plain path: the copy would not become part of the tracked run.
    """
    item = parser.ref_resolver.items.get("save_execute_config")
    joined = re.fullmatch(r"([^$@%].*) \+ '/(config_\w+\.json)'", str(item and item.get_config()))
    if joined:
        item.update_config(str(Path(joined[1], joined[2])))


def _leave_weights_to_server(parser: ConfigParser, client: MonaiAlgo) -> None:
    for key in _OWN_WEIGHTS:
        item = parser.ref_resolver.items.get(key)
        if item is not None and item.get_config():
            fail(
                f"setting {key!r} is {item.get_config()!r}, but the weights of a federated client come from the "
                "server: leave it as it is in train.json, and give the server the weights to start from."
            )
    if not client.disable_ckpt_loading:
        return
    for handler in parser.get("validate::handlers", []):
        # as MonaiAlgo does with MONAI's CheckpointLoader; it parses the config again
        if isinstance(handler, dict) and str(handler.get("_target_")).endswith(".WeightsLoader"):
            handler["_disabled_"] = True


def wrong_types(parser: ConfigParser, files: list[dict]) -> Iterator[tuple[str, str]]:
    """Settings of a parsed config that are of another kind than in the bundle's files, each with what is wrong."""
    defaults: dict[str, list[Any]] = {}
    for tree in files:
        for key, value in tree.items():
            defaults.setdefault(key, []).append(value)
    for key, values in defaults.items():
        item = parser.ref_resolver.items.get(key)
        value = None if item is None else item.get_config()
        if value is None or (isinstance(value, str) and value[:1] in ("$", "@", "%")):
            continue
        kinds = list(map(_kind, values))
        if None in kinds or _kind(value) in kinds:
            continue
        yield key, f"must be {kinds[0]}, got {value!r} ({type(value).__name__})"


def _kind(value: Any) -> str | None:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, list):
        return "a list"
    return None  # text, null, expressions and sections are not judged
