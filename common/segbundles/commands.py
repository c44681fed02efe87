"""The short commands, and the commands of MONAI that they stand for."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from segbundles.errors import fail

__all__ = [
    "evaluate_command",
    "find_bundle",
    "known_bundles",
    "run_commands",
    "segment_command",
    "setting_pairs",
    "train_commands",
]

_CONFIG = Path("configs", "inference.json")
_PYTHON = ["python", "-m", "monai.bundle", "run"]


def known_bundles() -> dict[str, Path]:
    """Return the bundles of this project, of ./bundles and of MONAI's folder of downloads, by name."""
    ours = Path(__file__).resolve().parents[2] / "bundles"
    # as torch.hub.get_dir() has it, without the seconds that the import takes
    cache = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "torch")
    found: dict[str, Path] = {}
    for folder in (ours, Path.cwd() / "bundles", Path(cache, "hub", "bundle")):
        for path in sorted(folder.glob(f"*/{_CONFIG}")):
            found.setdefault(path.parents[1].name, path.parents[1])
    return found


def find_bundle(bundle: str) -> Path:
    """Return the folder of a bundle.

    Args:
        bundle: its folder, or its name, see :func:`known_bundles`.

    Raises:
        ValueError: when there is no such bundle.
    """
    if (given := Path(bundle).expanduser() / _CONFIG).is_file():
        return given.parents[1]
    known = known_bundles()
    if bundle in known:
        path = known[bundle]
        return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    choice = f"one of {', '.join(known)}, or the path of its folder" if known else "the path of its folder"
    fail(f"there is no bundle {bundle!r}: give {choice}.")


def segment_command(bundle: str, source: str, output: str, settings: Sequence[str] = ()) -> list[str]:
    """Return the command that segments a file or a folder.

    Args:
        bundle: see :func:`find_bundle`.
        source: the image, or a folder of images.
        output: folder to write to.
        settings: further words of the command line, ``--knob value``.

    Raises:
        ValueError: when there is no such bundle or source.
    """
    root = find_bundle(bundle)
    _check_source(source)
    return _command("inferring", root, ["inference.json"], source, output, settings)


def train_commands(bundle: str, data: str, output: str, settings: Sequence[str] = ()) -> list[list[str]]:
    """Return the commands that train a bundle: first its locator, where it has one.

    Weights go to ``output/models``, so that those of the bundle stay as they are. The locator's training gets those
    settings that its config has too.

    Args:
        bundle: see :func:`find_bundle`.
        data: folder with a datalist.json.
        output: folder to write to.
        settings: further words of the command line, ``--knob value``.

    Raises:
        ValueError: when there is no such bundle or data.
    """
    root = find_bundle(bundle)
    _check_source(data)
    models = ["--ckpt_dir", str(Path(output, "models"))]
    commands = []
    if (config := root / "configs" / "train_locator.json").is_file():
        known = json.loads(config.read_text(encoding="utf-8")).keys() - {
            "initial_weights"
        }  # those of the other network
        shared = [word for pair in setting_pairs(settings) if pair[0].lstrip("-") in known for word in pair]
        locator = str(Path(output, "locator"))
        commands.append(_command("training", root, [config.name], data, locator, [*models, *shared]))
    commands.append(_command("training", root, ["train.json"], data, output, [*models, *settings]))
    return commands


def evaluate_command(bundle: str, data: str, output: str, settings: Sequence[str] = ()) -> list[str]:
    """Return the command that evaluates weights on labelled data; arguments as of :func:`train_commands`."""
    root = find_bundle(bundle)
    _check_source(data)
    return _command("evaluating", root, ["train.json", "evaluate.json"], data, output, settings)


def run_commands(commands: Sequence[Sequence[str]], say: Callable[[str], None]) -> int:
    """Run commands one after the other until one fails.

    Args:
        commands: as from the functions above.
        say: called with each command, quoted so that it can be pasted, before it runs.

    Returns:
        Exit status of the last one that ran.
    """
    status = 0
    # MONAI warns at each start that a config can run code; what runs here is shown
    quiet = f"{os.environ.get('PYTHONWARNINGS', '')},ignore:parsing config_file:UserWarning".lstrip(",")
    for command in commands:
        say(f"$ {shlex.join(command)}")
        with subprocess.Popen([sys.executable, *command[1:]], env={**os.environ, "PYTHONWARNINGS": quiet}) as process:
            while True:
                try:
                    status = process.wait()
                    break
                except KeyboardInterrupt:  # the terminal has sent it to the process too, which ends by itself
                    continue
        if status:
            break
    return status


def setting_pairs(settings: Sequence[str]) -> list[list[str]]:
    """Return the words of a command line, each option (``--knob``) with its value."""
    pairs: list[list[str]] = []
    for word in settings:
        if word.startswith("--") or not pairs:
            pairs.append([word])
        else:
            pairs[-1].append(word)
    return [[*pair[0].split("=", 1), *pair[1:]] if "=" in pair[0] else pair for pair in pairs]


def _command(
    run: str, root: Path, configs: Sequence[str], data: str, output: str, settings: Sequence[str]
) -> list[str]:
    paths = [str(root / "configs" / name) for name in configs]
    files = paths[0] if len(paths) == 1 else "[" + ",".join(f"'{path}'" for path in paths) + "]"
    folders = ["--dataset_dir", str(data), "--output_dir", str(output)]
    return [*_PYTHON, run, "--bundle_root", str(root), "--config_file", files, *folders, *settings]


def _check_source(path: str) -> None:
    # a series in a folder of several has a path without suffix that does not exist
    if not Path(path).exists() and (Path(path).suffix or not Path(path).parent.is_dir()):
        fail(f"there is no file or folder {path}: give the path of the images.")
