"""Distribution plots of the report."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

__all__ = ["distribution_svg"]

_BOX, _POINT = "#0072B2", "#56B4E9"


def distribution_svg(values: Sequence[float], label: str) -> bytes:
    """Draw a box plot (quartiles, median, whiskers of 1.5 interquartile ranges) with one point per case.

    Args:
        values: finite values, at least one.
        label: text of the axis, with unit and n.

    Returns:
        An SVG document.
    """
    figure = Figure(figsize=(4.2, 1.7), layout="constrained")
    axes = figure.subplots()
    # the same scatter for the same cases, independent of numpy's global generator
    jitter = np.random.default_rng(0).uniform(-0.3, 0.3, len(values)) if len(values) > 1 else np.zeros(1)
    axes.scatter(
        values, jitter, s=16 if len(values) > 30 else 30, color=_POINT, edgecolor=_BOX, linewidth=0.5, alpha=0.7
    )
    if len(values) > 1:
        line = {"color": _BOX, "linewidth": 1.2}
        axes.boxplot(
            values,
            positions=[0],
            widths=0.7,
            orientation="horizontal",
            showfliers=False,
            manage_ticks=False,
            boxprops=line,
            whiskerprops=line,
            capprops=line,
            medianprops={"color": "black", "linewidth": 2},
        )
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=5)
    axes.set_ylim(-0.6, 0.6)
    axes.set_xlabel(label)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "left", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
