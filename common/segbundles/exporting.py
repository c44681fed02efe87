"""Export the networks of a bundle with torch.export: ``segbundles export``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from segbundles.commands import find_bundle
from segbundles.errors import fail
from segbundles.facts import weights_files
from segbundles.files import read_json
from segbundles.networks import export_network, load_weights

__all__ = ["export_bundle"]

# network of inference.json, and the knob that names its weights
_NETWORKS = {"network_def": "weights", "locator_def": "locator_weights"}


def export_bundle(bundle: str, settings: Mapping[str, Any] | None = None) -> list[Path]:
    """Write each network of a bundle as an exported program beside its weights: ``model.pt2`` beside ``model.pt``.

    Args:
        bundle: its folder or name, see :func:`segbundles.commands.find_bundle`.
        settings: knobs of ``inference.json`` to change, such as ``{"weights": "mine.pt"}``, and ``args_file``, a JSON
            file with more of them.

    Returns:
        The files.

    Raises:
        ValueError: when there are no such bundle or weights, a knob is wrong, or a file cannot be written.
    """
    root = find_bundle(bundle)
    given = dict(settings or {})
    file = given.pop("args_file", None)
    # settle() finds what was given under this name
    override = {**(_read(file) if file else {}), **given, "bundle_root": str(root)}
    parser = ConfigParser()
    parser.read_config(str(root / "configs" / "inference.json"))
    parser.update(override)
    parser.get_parsed_content("settings")  # a network of an args file does not ask for it
    files = []
    for net_id, knob in _NETWORKS.items():
        for weights in weights_files(parser.get_parsed_content(knob) if knob in parser else None):
            network = load_weights(parser.get_parsed_content(net_id), weights)
            files.append(weights.with_suffix(".pt2"))
            export_network(network, files[-1])
    return files


def _read(args_file: str) -> dict[str, Any]:
    try:
        return dict(read_json(args_file))
    except (OSError, TypeError, ValueError) as error:
        fail(f"cannot read {args_file} ({error}): give a JSON file of settings.")
