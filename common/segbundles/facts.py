"""Facts of trained weights, kept in a JSON file with the same stem: ``model.json`` beside ``model.pt``."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segbundles import __version__
from segbundles.errors import fail
from segbundles.files import DATALIST_NAME, read_json, write_json
from segbundles.knobs import fact_knobs

if TYPE_CHECKING:
    from segbundles.bundle import RunSettings

__all__ = ["facts_path", "own_facts", "read_facts", "sha256", "versions", "weights_files", "write_facts"]

logger = logging.getLogger("segbundles")


def facts_path(weights: str | Path) -> Path:
    """Return the path of the facts of some weights."""
    return Path(weights).with_suffix(".json")


def weights_files(weights: Any) -> list[Path]:
    """Return the files that a knob such as ``weights`` names; several are the members of an ensemble.

    Args:
        weights: a path, a list of paths, or None.
    """
    return [Path(path) for path in ([weights] if isinstance(weights, str | Path) else weights or [])]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the software that decides about results."""
    return {"segbundles": __version__, "monai": version("monai"), "torch": version("torch")}


def read_facts(weights: str | Path) -> dict[str, Any] | None:
    """Read the facts of some weights.

    Args:
        weights: file of the weights.

    Returns:
        The facts; None where there are none, or where they belong to another file, which is logged.

    Raises:
        ValueError: when the file of the facts is damaged.
    """
    weights, path = Path(weights), facts_path(weights)
    if not path.is_file():
        return None
    try:
        facts = read_json(path)
        knobs, digest = facts["knobs"], facts["sha256"]
        if not isinstance(knobs, dict):
            raise TypeError("knobs")
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{path} cannot be read as the facts of {weights.name} ({error}): restore it, or remove it.")
    if digest != sha256(weights):
        logger.warning(f"{path} describes other weights (sha256 differs) and is ignored.")
        return None
    return facts


def write_facts(
    weights: str | Path,
    settings: RunSettings | None,
    *,
    dataset: Any = None,
    validation_dataset: Any = None,
    seed: int | None = None,
    epochs: int | None = None,
    validation: Mapping[str, Any] | None = None,
) -> None:
    """Write the facts of weights that were just written.

    Args:
        weights: file of the weights. They have the facts of the knob ``<stem>_weights``, if there is one, such as
            ``locator_weights``; all others have those of ``weights``.
        settings: settings of the training; None leaves out what only they know.
        dataset: training data set.
        validation_dataset: validation data set.
        seed: seed of the training.
        epochs: epochs done.
        validation: key metric, its value, and the epoch it was measured in; None where nothing was validated.

    Raises:
        ValueError: when the file cannot be written.
    """
    weights = Path(weights)
    facts: dict[str, Any] = {"weights": weights.name, "sha256": sha256(weights), "knobs": {}}
    if settings is not None:
        names = own_facts(weights, settings.schema)
        facts = {
            "bundle": settings.bundle,
            "version": settings.version,
            **facts,
            "knobs": {name: settings.knobs[name] for name in names if name in settings.knobs},
            "classes": settings.classes,
        }
    facts["data"] = _data(training=dataset, validation=validation_dataset)
    if len(labels := facts["data"].pop("labels", {})) == facts["knobs"].get("num_classes"):
        facts["classes"] = labels  # the names of the person's own classes
    facts |= {"seed": seed, "epochs": epochs, "validation": validation, "versions": versions()}
    write_json(facts_path(weights), facts)


def own_facts(weights: str | Path, schema: Mapping[str, Any]) -> list[str]:
    """Return the knobs that are facts of the weights in a file: see :func:`write_facts`.

    Args:
        weights: file of the weights.
        schema: see :func:`segbundles.knobs.read_schema`.
    """
    own = f"{Path(weights).stem}_weights"
    return fact_knobs(schema, own if own in schema["properties"] else "weights")


def _data(**datasets: Any) -> dict[str, Any]:
    """Describe the cases of a training: how many, of how many groups, and from which list."""
    found: dict[str, Any] = {}
    for split, dataset in datasets.items():
        chain = list(_sources(dataset))
        if cases := next((one for one in reversed(chain) if isinstance(one, Sequence)), None):
            groups = {str(case.get("group", number)) for number, case in enumerate(cases)}
            found[split] = {"cases": len(cases), "groups": len(groups)}
        lists = (Path(one.dataset_dir) / DATALIST_NAME for one in chain if hasattr(one, "dataset_dir"))
        if path := next(filter(Path.is_file, lists), None):
            head = read_json(path)
            found["name"], found["labels"] = head.get("name", ""), head.get("labels", {})
            found["datalist_sha256"] = sha256(path)
    return found


def _sources(dataset: Any) -> Iterator[Any]:
    """Yield a data set and what it was made from, down to the list of cases."""
    while dataset is not None:
        yield dataset
        dataset = getattr(dataset, "source", None) or getattr(dataset, "data", None)
