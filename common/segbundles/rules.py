"""Rules between the knobs of one run. What a single knob may be is in the bundle's knobs.schema.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

__all__ = ["RULES", "broken_rules"]

Knobs = Mapping[str, Any]


def sizes_fit_depth(knobs: Knobs) -> Iterator[tuple[str, str]]:
    """Sizes can be halved as often as the network has levels below the first; without padding 4 pixels remain."""
    if "depth" not in knobs:
        return
    step, more = 2 ** (knobs["depth"] - 1), 4 * bool(knobs.get("context_pixels"))
    for name in ("patch_size", "window_size"):
        if any((n - more) % step for n in knobs.get(name, ())):
            also = f" plus {more} (context_pixels is not 0)" if more else ""
            nearest = [max(round((n - more) / step), 1) * step + more for n in knobs[name]]
            yield name, f"must be multiples of 2 ** (depth - 1) = {step}{also}, got {knobs[name]}: try {nearest}"


def patch_within_window(knobs: Knobs) -> Iterator[tuple[str, str]]:
    """A network that sees whole slices at inference is trained on patches that are no larger."""
    if {"slices_per_epoch", "patch_size"} <= knobs.keys() and any(
        p > w for p, w in zip(knobs["patch_size"], knobs["window_size"], strict=True)
    ):
        yield "patch_size", f"must not exceed window_size {knobs['window_size']}, got {knobs['patch_size']}"


def square_patch_to_turn(knobs: Knobs) -> Iterator[tuple[str, str]]:
    """A patch that is turned by a quarter is square."""
    for name, turns in (("patch_size", "rotate90_probability"), ("window_size", "quarter_turns")):
        if knobs.get(turns) and len(set(knobs.get(name, ()))) > 1:
            yield name, f"must be square for {turns} {knobs[turns]}, got {knobs[name]}"


def zoom_range_ascends(knobs: Knobs) -> Iterator[tuple[str, str]]:
    """The smallest factor comes first."""
    if "zoom_range" in knobs and knobs["zoom_range"][0] > knobs["zoom_range"][1]:
        yield "zoom_range", f"must give the smallest factor first, got {knobs['zoom_range']}"


def limits_in_order(knobs: Knobs) -> Iterator[tuple[str, str]]:
    """The smallest plausible object is smaller than the largest."""
    low, high = knobs.get("min_size_mm"), knobs.get("max_size_mm")
    if low is not None and high is not None and low >= high:
        yield "min_size_mm", f"must be below max_size_mm {high}, got {low}"


def some_epoch_is_validated(knobs: Knobs) -> Iterator[tuple[str, str]]:
    """A training that never validates could not tell which weights are the best."""
    epochs, interval = knobs.get("max_epochs"), knobs.get("val_interval")
    if epochs is not None and interval is not None and "split" not in knobs and interval > epochs:
        yield "val_interval", f"must be at most max_epochs {epochs}, otherwise no epoch is validated; got {interval}"


def device_exists(knobs: Knobs) -> Iterator[tuple[str, str]]:
    """The device is one that PyTorch knows, and that this machine has."""
    import torch

    name = str(knobs.get("device", "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        yield "device", f"must be cpu, cuda, or cuda:1 for the second GPU, got the text {name!r}"
        return
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        has = f"has {count} GPU{'s' if count > 1 else ''}" if count else "has no GPU that PyTorch can use"
        yield "device", f"is {name}, but this machine {has}: give {'cuda' if count else 'cpu'}"


def folders_are_no_files(knobs: Knobs) -> Iterator[tuple[str, str]]:
    """Folders that a run writes to are not files."""
    for name in ("ckpt_dir", "output_dir"):
        if name in knobs and Path(str(knobs[name])).is_file():
            yield name, f"must be a folder, got the file {knobs[name]}"


def initial_weights_exist(knobs: Knobs) -> Iterator[tuple[str, str]]:
    """Weights to start from exist; a run that is resumed does not need them."""
    path = knobs.get("initial_weights")
    if path and not knobs.get("resume") and not Path(path).is_file():
        folder = Path(path).parent
        names = sorted(file.name for file in folder.glob("*.pt")) if folder.is_dir() else []
        near = get_close_matches(Path(path).name, names, n=1)
        hint = f"the nearest is {folder / near[0]}" if near else "give the file of the weights to start from, or null"
        yield "initial_weights", f"is {path}, but there is no such file: {hint}"


def locator_has_weights(knobs: Knobs) -> Iterator[tuple[str, str]]:
    """A locator that is used has weights."""
    if knobs.get("use_locator") and "locator_weights" in knobs and knobs["locator_weights"] is None:
        yield "locator_weights", "must name the locator's weights while use_locator is true, got null"


RULES = (
    sizes_fit_depth,
    patch_within_window,
    square_patch_to_turn,
    zoom_range_ascends,
    limits_in_order,
    some_epoch_is_validated,
    device_exists,
    folders_are_no_files,
    initial_weights_exist,
    locator_has_weights,
)


def broken_rules(knobs: Knobs) -> Iterator[tuple[str, str]]:
    """Yield the knobs that contradict each other, each with a sentence about it.

    Args:
        knobs: values that the schema allows, by knob.
    """
    if "split" in knobs:  # an evaluation, which has the knobs of training too, cuts no patches
        knobs = {name: value for name, value in knobs.items() if name != "patch_size"}
    for rule in RULES:
        yield from rule(knobs)
