"""Fine-tuning of the weights that came with a bundle: its settings, and the scores before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from segbundles.errors import fail
from segbundles.files import DATALIST_NAME
from segbundles.jsonfile import read_json

__all__ = ["SHIPPED", "fine_tuning", "has_validation", "scores", "shipped_weights"]

#: value of initial_weights that stands for the weights that came with the bundle
SHIPPED = "shipped"


def shipped_weights(root: Path, name: str = "model") -> Path:
    """Return the weights that came with a bundle, also if a training has replaced them.

    Args:
        root: folder of the bundle.
        name: stem of the weights, ``model`` or ``locator``.

    Raises:
        ValueError: when there are none.
    """
    paths = [root / "models" / f"{stem}.pt" for stem in (f"{name}_shipped", name)]
    for path in paths:
        if path.is_file():
            return path
    fail(f"--initial_weights shipped needs {paths[1]}, which does not exist: get the bundle with its weights.")


def fine_tuning(root: Path, config: str, data: str, pairs: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the settings of a training that starts from the weights that came with the bundle.

    Where the person has not given them, the learning rate is a tenth of the config's, and there are about a tenth of
    the steps of the training that made the weights, but at most the config's epochs.

    Args:
        root: folder of the bundle.
        config: config of the training.
        data: folder with a datalist.json.
        pairs: settings, each option with its value.

    Returns:
        The settings, each option with its value.

    Raises:
        ValueError: when there are no such weights, or an args file cannot be read.
    """
    tree = read_json(root / "configs" / config)
    weights = shipped_weights(root, "locator" if "locator" in config else "model")
    given = {pair[0].lstrip("-"): pair[-1] for pair in pairs}
    if "args_file" in given:
        given = {**read_json(given["args_file"]), **given}
    chosen = {"initial_weights": str(weights)}
    if "learning_rate" not in given:
        chosen["learning_rate"] = f"{tree['learning_rate'] / 10:g}"
    epochs = given.get("max_epochs")
    if epochs is None:
        most, least = tree["max_epochs"], int(given.get("val_interval", tree["val_interval"]))
        epochs = max(min(_tenth_of_steps(weights.with_suffix(".json"), data) or most // 3, most), least)
        chosen["max_epochs"] = str(epochs)
    if "lr_epochs" not in given:
        chosen["lr_epochs"] = str(epochs)
    kept = [list(pair) for pair in pairs if pair[0] != "--initial_weights"]
    return [*kept, *([f"--{name}", value] for name, value in chosen.items())]


def scores(output: str, name: str) -> dict[str, float]:
    """Return the mean of each metric of an evaluation, and what it pooled over all cases.

    Args:
        output: folder of the training.
        name: folder of the evaluation in it.
    """
    found = {}
    for metric, value in read_json(Path(output, name, "summary.json")).items():
        mean = value.get("mean") if isinstance(value, dict) else value if metric.startswith("pooled_") else None
        if isinstance(mean, int | float):
            found[metric] = float(mean)
    return found


def has_validation(data: str) -> bool:
    """Return whether the list of a data set has cases for validation."""
    return bool(read_json(Path(data, DATALIST_NAME)).get("validation"))


def _tenth_of_steps(facts: Path, data: str) -> int | None:
    """Return the epochs of a data set in which there are a tenth of the steps that made some weights."""
    try:
        made, entries = read_json(facts), read_json(Path(data, DATALIST_NAME))["training"]
        return math.ceil(made["epochs"] * made["data"]["training"]["cases"] / 10 / len(entries))
    except (ValueError, KeyError, TypeError, ZeroDivisionError):  # the training says what is wrong
        return None
