"""The preview of an inference: one self-contained HTML page with a slider through the slices of each image."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segbundles.report.html import write_page
from segbundles.report.overlay import PREDICTION_COLOURS

__all__ = ["read_preview", "write_preview"]

FAILED, CHECK, OK = "failed", "please check", "ok"

_BEGIN, _END = '<script type="application/json" class="case">', "</script>"  # as in viewer.html.j2


def write_preview(
    path: str | os.PathLike[str],
    *,
    title: str,
    cases: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
    classes: Mapping[str, str] | None = None,
) -> Path:
    """Write the preview of an inference as one HTML page that needs no other file and no network.

    Failed images come first, then those with a ``review``, then all others; within each of these the least certain
    first, and those without a confidence in their order.

    Args:
        path: file to write; missing folders are created, an existing file is replaced.
        title: heading of the page.
        cases: one dict per image, all of it as JSON has it: ``name``; ``files`` (names of its files); ``reason`` (why
            it failed) and ``review`` (why a person should look at it), empty if there is none; ``notes``; ``seconds``
            or None; ``confidence`` (the expected score, 0 to 1), which may be None or missing; ``found`` (what was
            found, in a few words); ``measured`` (pairs of a label and a text); and ``slices``, as from
            :func:`segbundles.report.case_slices`, or None.
        notes: paragraphs below the heading.
        classes: name of each class by its index, for the legend; None for a single foreground class.

    Returns:
        The path written.

    Raises:
        ValueError: when the file cannot be written.
    """
    shown = [{**case, "status": FAILED if case["reason"] else CHECK if case["review"] else OK} for case in cases]
    shown.sort(key=_urgency)
    sorted_by_confidence = any(case.get("confidence") is not None for case in shown)
    legend = [
        {"name": name, "colour": f"rgb{PREDICTION_COLOURS[(int(index) - 1) % len(PREDICTION_COLOURS)]}"}
        for index, name in (classes or {}).items()
        if int(index) > 0
    ]
    return write_page(
        path,
        "preview.html.j2",
        "viewer.js.j2",
        title=title,
        cases=shown,
        statuses=[*Counter(case["status"] for case in shown).items()],  # in the order of the page
        notes=list(notes),
        least_certain_first=sorted_by_confidence,
        class_names=legend,
    )


def _urgency(case: Mapping[str, Any]) -> tuple[int, float]:
    confidence = case.get("confidence")
    return (FAILED, CHECK, OK).index(case["status"]), math.inf if confidence is None else confidence


def read_preview(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the cases of a preview that :func:`write_preview` wrote; none if there is no such page."""
    cases = []
    if Path(path).is_file():
        with Path(path).open(encoding="utf-8", errors="replace") as page:
            for line in map(str.strip, page):
                if line.startswith(_BEGIN) and line.endswith(_END):
                    cases.append(json.loads(line.removeprefix(_BEGIN).removesuffix(_END)))
    return cases
