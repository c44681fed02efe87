"""Rules between the knobs of one run. What a single knob may be is in the bundle's knobs.schema.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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


RULES = (sizes_fit_depth, patch_within_window, square_patch_to_turn, zoom_range_ascends, limits_in_order)


def broken_rules(knobs: Knobs) -> Iterator[tuple[str, str]]:
    """Yield the knobs that contradict each other, each with a sentence about it.

    Args:
        knobs: values that the schema allows, by knob.
    """
    if "split" in knobs:  # an evaluation, which has the knobs of training too, cuts no patches
        knobs = {name: value for name, value in knobs.items() if name != "patch_size"}
    for rule in RULES:
        yield from rule(knobs)
