"""Find what is wrong with a bundle's configs, and with data for them, without running them: nothing is trained."""

from __future__ import annotations

import io
import json
import logging
import re
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fire
from jsonschema import Draft202012Validator, SchemaError
from monai.bundle import verify_metadata, verify_net_in_out
from monai.utils import ensure_tuple

from segbundles.check_data import CaseCheck, Track
from segbundles.check_rules import RULES, Config, Found, nearest
from segbundles.errors import fail, innermost
from segbundles.jsonfile import parse_json
from segbundles.knobs import SCHEMA_NAME
from segbundles.running import read_configs, setting_keys

__all__ = ["Checked", "Finding", "check_bundle", "read_overrides"]

_LONGEST_EXPRESSION = 160


@dataclass(frozen=True)
class Finding:
    """One thing to fix.

    Args:
        config: in which config; patches are joined by ``+``.
        id: at which entry.
        problem: what is wrong.
        repair: what to do.
        fault: False for what could not be checked, and for what may be intended.
    """

    config: str
    id: str
    problem: str
    repair: str
    fault: bool = True


@dataclass(frozen=True)
class Checked:
    """A config, a summary of what was checked in it, and what was found."""

    config: str
    summary: str
    findings: list[Finding]


def read_overrides(arguments: Sequence[str], bundle: str | Path | None = None) -> dict[str, Any]:
    """Read ``--key value`` as a run does.

    Args:
        arguments: words of the command line.
        bundle: folder of the bundle. Its knobs that are text are taken as typed: ``2024_07`` is no number.

    Raises:
        ValueError: when the words do not have this form.
    """
    settings = None
    try:
        with redirect_stderr(io.StringIO()):
            settings = fire.Fire(lambda **given: given, list(arguments), serialize=lambda _: None)
    except fire.core.FireExit:
        pass
    if not isinstance(settings, dict):
        fail(f"settings are written as --key value, after the bundle; got {' '.join(arguments)!r}.")
    path = Path(bundle or "", "configs", SCHEMA_NAME)
    knobs = ((path.is_file() and parse_json(path)[0]) or {}).get("properties", {})
    for word, following in zip_longest(arguments, arguments[1:]):
        option, joined, value = word.partition("=")
        name = option.lstrip("-").replace("-", "_")
        if type(settings.get(name)) in (int, float) and "string" in ensure_tuple(knobs.get(name, {}).get("type", ())):
            settings[name] = value if joined else following
    return settings


def check_bundle(
    bundle: str | Path,
    configs: Sequence[str | Path] = (),
    args_file: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    schema: str | Path | None = None,
    data: str | Path | None = None,
    track: Track = iter,
) -> list[Checked]:
    """Check a bundle, or one combination of its configs, and the data for it.

    Without ``configs``, ``args_file``, ``overrides`` and ``data``, everything is checked: each config that stands
    alone, patches over the config they belong to, args files over theirs, the schema of the knobs and the metadata.
    Otherwise one combination is checked, as ``monai.bundle run`` would read it, with the facts of the weights that it
    loads. A fault of a file is reported once, even if several combinations have it.

    Args:
        bundle: folder that contains ``configs``.
        configs: names in ``configs``, or paths; later ones patch earlier ones. Default: ``config_file`` of the
            settings, otherwise ``train.json``.
        args_file: settings in JSON, as for ``--args_file``.
        overrides: settings by id.
        schema: JSON schema of the metadata; None downloads the one that the metadata names.
        data: folder of the data, as for ``--dataset_dir``; every case is read and checked as the run does first.
        track: wraps the list of the cases, for a progress bar.

    Raises:
        ValueError: when the folder is not a bundle, or a file named here does not exist.
    """
    root = Path(bundle).resolve()
    files = sorted(p for p in (root / "configs").glob("*.json") if p.name not in ("metadata.json", SCHEMA_NAME))
    if not files:
        fail(f"{bundle} is not a bundle, it has no configs/*.json: give the folder that contains configs.")
    if schema is not None and not Path(schema).is_file():
        fail(f"there is no schema {str(schema)!r}: give --schema a file.")
    if data is not None:
        overrides = {**(overrides or {}), "dataset_dir": str(data)}
    with _quiet(root):
        one = bool(configs or args_file or overrides)
        checker = _Checker(root, files, one)
        if not one:
            return [*checker.check_all(), checker.check_knobs(), checker.check_metadata(schema)]
        checked = checker.check(configs, args_file and _find(root, args_file), overrides)
    if data is None:
        return [checked]
    config = checker.last
    if config is None or any(found.fault for found in checked.findings):
        return [checked, Checked(str(data), "", [])]
    with _quiet(root):
        cases = CaseCheck(config)
    for case in track(cases.cases):
        with _quiet(root):
            cases.check(case)
    return [checked, Checked(str(data), cases.summary(), [Finding(str(data), *it) for it in cases.conclude()])]


class _Checker:
    """Check combinations of a bundle's configs, and remember what was already found.

    Args:
        root: folder of the bundle.
        files: its configs.
        one: whether one combination is checked as it would run. In a check of all, args files are not compared with the
            facts of the weights: they may be for weights that are still to be trained.
    """

    def __init__(self, root: Path, files: list[Path], one: bool) -> None:
        self.root, self.read, self.one = root, cache(_read), one
        self.schema, self.schema_findings = self._read_schema()
        trees = {path: self.read(path)[0] or {"bundle_root": None} for path in files}
        self.args = [path for path in trees if path.name.startswith("args_") or "config_file" in trees[path]]
        alone = [path for path in trees if path not in self.args and "bundle_root" in trees[path]]
        self.alone = sorted(alone or files, key=lambda path: path.name != "train.json")
        self.patches = [path for path in trees if path not in self.args + self.alone]
        self.homes: dict[str, list[str]] = {}
        for path in (*self.alone, *self.patches):
            for key in setting_keys(trees[path]):
                self.homes.setdefault(key, []).append(path.name)
        self.inference: Config | None = None
        self.last: Config | None = None
        self.faulty: set[str] = set()
        self.seen: set[tuple] = set()

    def check_all(self) -> Iterator[Checked]:
        """Check every combination that the names of the files suggest."""
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
                finding = Finding(path.name, "config_file", str(error), "give a config that exists")
                yield Checked(path.name, "", [finding])
            settings, inference = self.read(path)[0] or {}, self.root / "configs" / "inference.json"
            shared = {key.split("::")[0] for key in settings} & {*(self.read(inference)[0] or {})} - {"_desc_"}
            if shared and "config_file" not in settings and self.below(path)[-1].stem == "train":
                yield self.check([inference], path)

    def below(self, path: Path) -> list[Path]:
        """Return the configs that a patch or an args file belongs to, by its name.

        inference_trt.json patches inference.json, multi_gpu_evaluate.json patches evaluate.json and everything that
        this patches, args_x_locator.json is for train_locator.json, and a name without a config is for train.json.
        """
        named = [other for other in (*self.alone, *self.patches) if f"_{other.stem}_" in f"_{path.stem}_"]
        fits = [other for other in self.alone if path.stem.endswith(other.stem.removeprefix("train"))]
        bases = [other for other in named if other != path] or fits
        base = max(bases, key=lambda other: len(other.stem), default=self.alone[0])
        return [*self.below(base), base] if base in self.patches else [base]

    def check(
        self, configs: Sequence[str | Path] = (), args: Path | None = None, overrides: dict[str, Any] | None = None
    ) -> Checked:
        """Check one combination."""
        settings, given = (self.read(args)[0] or {}) if args else {}, overrides or {}
        default = self.below(args) if args else self.alone[:1]
        named = configs or given.get("config_file") or settings.get("config_file") or default
        # MONAI reads "['a', 'b']" and "a,b" as lists
        named = re.findall(r"[^\[\]'\", ]+", named) if isinstance(named, str) else named
        files = [_find(self.root, name) for name in named]
        used = [*files, args] if args else files
        name = " + ".join(path.name for path in used)
        findings = [found for path in used for found in self.read(path)[1]]
        summary = ""
        known = read_configs({self.root / "configs", files[0].parent})
        if files[0] in self.patches and (base := self.below(files[0])):
            together = [path.name for path in dict.fromkeys([*base, *files])]
            problem = f"is a patch over {' and '.join(path.name for path in base)}, and does not run without"
            check = " ".join(f"--config {it}" for it in together)
            run = ",".join(f"'{self.root.name}/configs/{it}'" for it in together)
            findings.append(Finding(name, "", problem, f'check {check}; run --config_file "[{run}]"'))
        elif all(self.read(path)[0] is not None for path in used):
            trees = [self.read(path)[0] for path in files]
            metadata = self.read(self.root / "configs" / "metadata.json")[0] or {}
            # a run finds its settings beside its first config, which a check does not see elsewhere
            as_run = (self.one or args is None) and files[0].parent == self.root / "configs"
            self.last = config = Config(self.root, trees, known, self.homes, metadata, self.schema, as_run)
            found = [*config.set_up(settings, given), *(found for rule in RULES for found in rule(config))]
            findings += [Finding(name, *it) for it in found]
            summary = config.summary() if config.items else ""
            if name == "inference.json":
                self.inference, self.faulty = config, {id.split("::")[0] for id, *_ in found}
        # a fault of the first file appears in all its combinations, a fault of an args file in each of its own
        owners = [args.name if args and it.id in settings else it.config.split(" + ")[0] for it in findings]
        new = {(owner, it.id, it.problem): it for owner, it in zip(owners, findings, strict=True)}
        new = {key: it for key, it in new.items() if key not in self.seen}
        self.seen |= new.keys()
        return Checked(name, summary, list(new.values()))

    def _read_schema(self) -> tuple[dict, list[Finding]]:
        path = self.root / "configs" / SCHEMA_NAME
        schema, findings = self.read(path) if path.is_file() else ({}, [])
        try:
            Draft202012Validator.check_schema(schema or {})
        except SchemaError as error:
            id, schema = "::".join(map(str, error.absolute_path)), {}
            findings.append(Finding(path.name, id, error.message, "write it as JSON Schema 2020-12 says"))
        return {"properties": {}} | (schema or {}), findings

    def check_knobs(self) -> Checked:
        """Check the schema of the knobs."""
        unused = [name for name in self.schema["properties"] if name not in self.homes]
        findings = [Finding(SCHEMA_NAME, name, "no config has this knob", "remove it here") for name in unused]
        return Checked(SCHEMA_NAME, f"knobs: {len(self.schema['properties'])}", [*self.schema_findings, *findings])

    def check_metadata(self, schema: str | Path | None) -> Checked:
        """Check the metadata, and run the networks that it describes on random numbers."""
        path = self.root / "configs" / "metadata.json"
        metadata, findings = self.read(path)
        networks: dict[str, str] = {}
        if metadata is not None:
            sound = self.inference.components.keys() - self.faulty if self.inference else ()
            networks = {key: key.replace("_data_format", "_def") for key in metadata if key.endswith("_data_format")}
            networks = {key: network for key, network in networks.items() if network in sound}
            found = [*_check_schema(path, schema), *_check_networks(path, networks, self.inference)]
            findings = [*findings, *(Finding(path.name, *it) for it in found)]
        return Checked(path.name, f"schema, networks run on random numbers: {len(networks)}", findings)


def _check_schema(path: Path, schema: str | Path | None) -> Found:
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        with TemporaryDirectory() as folder:
            verify_metadata(meta_file=str(path), filepath=str(schema or Path(folder) / "schema.json"))
    except Exception as error:
        message = str(error).splitlines()[0]
        if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
            yield "", message, "write it as the schema of the metadata says"
        else:
            repair = "give --schema a file, or try again with a connection and jsonschema installed"
            yield "", f"not compared with its schema ({message})", repair, False
    finally:
        socket.setdefaulttimeout(timeout)


def _check_networks(path: Path, networks: dict[str, str], config: Config | None) -> Found:
    for key, network in networks.items():
        described = {"_meta_::network_data_format": config.parser["_meta_"][key]}
        try:
            verify_net_in_out(network, str(path), config.parser.get(), "cpu", extra_forward_args={}, **described)
        except Exception as error:
            problem = f"{network} of inference.json does not accept or return this: {innermost(error).splitlines()[0]}"
            yield key, problem, "make the two agree: channels, type, and a size that the network can halve"


def _read(path: Path) -> tuple[dict | None, list[Finding]]:
    """Return the content of a file, None if it is not a JSON object, and what is wrong with its text."""
    try:
        tree, faults = parse_json(path)
    except OSError as error:
        return None, [Finding(path.name, "", f"cannot be read: {error.strerror or error}", "write it as JSON in UTF-8")]
    found: list[tuple] = [(fault.place, fault.problem, fault.repair) for fault in faults]
    if isinstance(tree, dict):
        found += _check_strings(tree)
    elif not found:
        found = [("", "has no names and values", "begin it with {")]
    return tree if isinstance(tree, dict) else None, [Finding(path.name, *it) for it in found]


def _check_strings(node: dict | list, above: str = "") -> Found:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        id = f"{above}::{key}" if above else str(key)
        if "#" in str(key):
            yield id, "'#' in a name", "write :: instead"
        if isinstance(value, (dict, list)):
            yield from _check_strings(value, id)
        elif isinstance(value, str):
            if "#" in re.sub(r"[@%][\w#:]*", "", value):
                yield id, "'#' in a string, which MONAI turns into ::", "remove it"
            if value[:1] == "$" and len(value) > _LONGEST_EXPRESSION:
                problem = f"an expression of {len(value)} characters, more than {_LONGEST_EXPRESSION}"
                yield id, problem, "move it into a function of a library"


def _find(root: Path, name: str | Path) -> Path:
    for path in (root / "configs" / name, root / name, Path(name)):
        if path.is_file():
            return path.resolve()
    names = sorted(path.name for path in (root / "configs").glob("*.json"))
    fail(f"there is no config {str(name)!r} in {root.name}: {nearest(str(name), names) or ', '.join(names)}")


@contextmanager
def _quiet(root: Path) -> Iterator[None]:
    """Import modules from the bundle's folder, as a run does, without messages of MONAI and without compiled files."""
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
