"""The short commands, and the commands of MONAI that they stand for."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from segbundles.errors import fail
from segbundles.finetuning import SHIPPED, fine_tuning, shipped_weights
from segbundles.jsonfile import read_json

__all__ = [
    "args_file",
    "args_path",
    "before_and_after",
    "evaluate_command",
    "find_bundle",
    "fine_tunes",
    "known_bundles",
    "quoted",
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
        ValueError: when there is no such bundle or source, or when the settings are not pairs of a name and a value.
    """
    root = find_bundle(bundle)
    _check_source(source)
    _check_settings(settings)
    return _command("inferring", root, ["inference.json"], source, output, settings)


def train_commands(bundle: str, data: str, output: str, settings: Sequence[str] = ()) -> list[list[str]]:
    """Return the commands that train a bundle: first its locator, where it has one.

    Weights go to ``output/models``, so that those of the bundle stay as they are. The locator's training gets those
    settings that its config has too, and of an args file ``my.json`` the file ``my_locator.json`` beside it.

    With ``--initial_weights shipped`` both trainings start from the weights that came with the bundle, see
    :func:`segbundles.finetuning.fine_tuning`.

    Args:
        bundle: see :func:`find_bundle`.
        data: folder with a datalist.json.
        output: folder to write to.
        settings: further words of the command line, ``--knob value``.

    Raises:
        ValueError: when there is no such bundle or data, or when the settings are not pairs of a name and a value.
    """
    root = find_bundle(bundle)
    _check_source(data)
    _check_settings(settings)
    models = ["--ckpt_dir", str(Path(output, "models"))]
    commands = []
    pairs = setting_pairs(settings)
    shipped = fine_tunes(settings)
    if (config := root / "configs" / "train_locator.json").is_file():
        # initial_weights are those of the other network
        known = read_json(config).keys() - ({"initial_weights"} if not shipped else set())
        shared = [pair for pair in pairs if pair[0].lstrip("-") in known]
        for name, file in (pair for pair in pairs if pair[0] == "--args_file" and len(pair) == 2):
            if (beside := args_path(Path(file), config.name)).is_file():
                shared.append([name, str(beside)])
        words = _words(fine_tuning(root, config.name, data, shared) if shipped else shared)
        commands.append(
            _command("training", root, [config.name], data, str(Path(output, "locator")), [*models, *words])
        )
    words = _words(fine_tuning(root, "train.json", data, pairs)) if shipped else settings
    commands.append(_command("training", root, ["train.json"], data, output, [*models, *words]))
    return commands


def args_file(settings: Sequence[str]) -> list[str]:
    """Return the option of a command line that names an args file, with its value; none without one."""
    return _words([pair for pair in setting_pairs(settings) if pair[0] == "--args_file"])


def args_path(path: Path, config: str = "train.json") -> Path:
    """Return the args file of a config: ``my_settings_locator.json`` is that of the locator's training."""
    return path.with_name(f"{path.stem}_locator{path.suffix}") if config == "train_locator.json" else path


def fine_tunes(settings: Sequence[str]) -> bool:
    """Return whether a training starts from the weights that came with its bundle."""
    return ["--initial_weights", SHIPPED] in setting_pairs(settings)


def before_and_after(bundle: str, data: str, output: str, settings: Sequence[str] = ()) -> list[list[str]]:
    """Return the commands that evaluate the weights that came with a bundle, and those fine-tuned from them.

    Both have the same settings. They write to ``output/evaluation_before`` and ``output/evaluation``.

    Args:
        bundle: see :func:`find_bundle`.
        data: folder with a datalist.json.
        output: folder of the training.
        settings: further words of the command line of the training.
    """
    root = find_bundle(bundle)
    shared = _words([pair for pair in setting_pairs(settings) if pair[0] != "--initial_weights"])
    weights = ["--weights", str(shipped_weights(root))]
    if (root / "configs" / "train_locator.json").is_file():
        weights += ["--locator_weights", str(shipped_weights(root, "locator"))]
    runs = {"evaluation_before": weights, "evaluation": ["--ckpt_dir", str(Path(output, "models"))]}
    return [evaluate_command(bundle, data, str(Path(output, name)), [*words, *shared]) for name, words in runs.items()]


def evaluate_command(bundle: str, data: str, output: str, settings: Sequence[str] = ()) -> list[str]:
    """Return the command that evaluates weights on labelled data; arguments as of :func:`train_commands`."""
    root = find_bundle(bundle)
    _check_source(data)
    _check_settings(settings)
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
        say(f"$ {quoted(command)}")
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


def quoted(command: Sequence[str]) -> str:
    """Return a command as a line that can be pasted into a shell.

    Like :func:`shlex.join`, but a list of files, ``['a','b']``, gets double quotes, as in the documentation.
    """
    special = set('"$`\\!')
    return " ".join(f'"{word}"' if "'" in word and not special & set(word) else shlex.quote(word) for word in command)


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


def _check_settings(settings: Sequence[str]) -> None:
    """Refuse what MONAI would pass over in silence, or end with a traceback for."""
    for name, *values in setting_pairs(settings):
        if not name.startswith("--"):
            fail(f"{name!r} belongs to no setting: write settings as --knob value.")
        if len(values) > 1:
            items = ",".join(word.strip("[],") for word in values)
            fail(f'{name} has {len(values)} values, {" ".join(values)}: write a list in quotes, {name} "[{items}]".')
        if name == "--args_file" and values and not values[0].endswith((".yaml", ".yml")):
            read_json(values[0])


def _check_source(path: str) -> None:
    # a series in a folder of several has a path without suffix that does not exist
    if not Path(path).exists() and (Path(path).suffix or not Path(path).parent.is_dir()):
        fail(f"there is no file or folder {path}: give the path of the images.")


def _words(pairs: Sequence[Sequence[str]]) -> list[str]:
    return [word for pair in pairs for word in pair]
