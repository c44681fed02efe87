"""Plots of the report, as SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from segbundles.statistics import bland_altman, short

__all__ = [
    "agreement_svg",
    "bland_altman_svg",
    "calibration_svg",
    "distribution_svg",
    "groups_svg",
    "precision_recall_svg",
    "thresholds_svg",
]

_BOX, _POINT, _THIRD = "#0072B2", "#56B4E9", "#D55E00"
_SQUARE = (3.4, 3.2)


def distribution_svg(values: Sequence[float], label: str, box: bool = True) -> bytes:
    """Draw one point per case, and a box plot (quartiles, median, whiskers of 1.5 interquartile ranges).

    Args:
        values: finite values, at least one.
        label: text of the axis, with unit and n.
        box: whether to draw the box plot; a few values do not have quartiles worth showing.

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
    if box and len(values) > 1:
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
    return _svg(figure)


def groups_svg(rows: Sequence[Mapping[str, Any]], label: str) -> bytes:
    """Draw one dot per group, with its interval and the points of its cases.

    Args:
        rows: one per group, drawn from the top: ``name``, ``value``, ``low`` and ``high`` (None where there is no
            interval), and optionally ``cases``, the values of its cases.
        label: text of the axis, with unit.

    Returns:
        An SVG document.
    """
    figure, axes = _begin((4.2, 0.9 + 0.26 * len(rows)), label, "")
    for place, row in enumerate(rows):
        cases = [value for value in row.get("cases", ()) if np.isfinite(value)]
        axes.scatter(
            cases, [place] * len(cases), s=12, color=_POINT, edgecolor=_BOX, linewidth=0.3, alpha=0.6, zorder=3
        )
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [place, place], color=_BOX, linewidth=2, solid_capstyle="butt")
        if row["value"] is not None:
            axes.plot(row["value"], place, "o", color=_BOX, markeredgecolor="white")
    axes.set_yticks(range(len(rows)), [str(row["name"]) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return _svg(figure)


def agreement_svg(x: Sequence[float], y: Sequence[float], x_label: str, y_label: str) -> bytes:
    """Draw two values of each case against each other, with the line on which they are equal.

    Args:
        x: one value per case, such as the true volume.
        y: the other value of each case, such as the predicted volume; cases where either is NaN are left out.
        x_label: what ``x`` is, with unit.
        y_label: what ``y`` is, with unit.

    Returns:
        An SVG document.
    """
    figure, axes = _begin(_SQUARE, x_label, y_label)
    known = np.array([x, y], dtype=float)
    known = known[:, ~np.isnan(known).any(0)]
    low, high = (known.min(), known.max()) if known.size else (0, 1)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1
    ends = [low - margin, high + margin]
    axes.plot(ends, ends, color="0.4", linewidth=1, linestyle="--")
    _points(axes, *known)
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    return _svg(figure)


def bland_altman_svg(truth: Sequence[float], predicted: Sequence[float], quantity: str) -> bytes:
    """Draw a Bland-Altman plot: differences against means, with the bias and the 95 % limits of agreement.

    Args:
        truth: true values (cases).
        predicted: predicted values (cases).
        quantity: what they are, with unit, such as "volume (ml)".

    Returns:
        An SVG document.
    """
    figure, axes = _begin((4.2, 3.2), f"mean of true and predicted {quantity}", "predicted - true")
    one, other = np.asarray(truth, dtype=float), np.asarray(predicted, dtype=float)
    _points(axes, (one + other) / 2, other - one)
    found = bland_altman(one, other)
    for name, style in (("bias", "-"), ("lower", "--"), ("upper", "--")):
        if found[name] is not None:
            axes.axhline(found[name], color=_BOX, linewidth=1.2, linestyle=style)
            text = f"{'bias' if name == 'bias' else 'limit'} {short(found[name])}"
            axes.annotate(text, (1, found[name]), xycoords=("axes fraction", "data"), ha="right", va="bottom", size=8)
    axes.axhline(0, color="0.4", linewidth=0.8, linestyle=":")
    axes.margins(y=0.15)
    return _svg(figure)


def calibration_svg(curve: Sequence[Mapping[str, float]]) -> bytes:
    """Draw a calibration curve, with the line of perfect calibration.

    Args:
        curve: rows of :meth:`segbundles.statistics.ProbabilityCounts.calibration`.

    Returns:
        An SVG document.
    """
    figure, axes = _begin(_SQUARE, "predicted probability", "share of pixels that are foreground")
    axes.plot([0, 1], [0, 1], color="0.4", linewidth=1, linestyle="--")
    x, y = ([row[name] for row in curve] for name in ("probability", "foreground"))
    axes.plot(x, y, "o-", color=_BOX, markersize=4)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    return _svg(figure)


def precision_recall_svg(rows: Sequence[Mapping[str, float]]) -> bytes:
    """Draw the precision-recall curve, and where the threshold of the masks, 0.5, is on it.

    Args:
        rows: rows of :meth:`segbundles.statistics.ProbabilityCounts.thresholds`.

    Returns:
        An SVG document.
    """
    figure, axes = _begin(_SQUARE, "recall", "precision")
    axes.plot([row["recall"] for row in rows], [row["precision"] for row in rows], color=_BOX)
    _mark(axes, rows, "recall", "precision")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal")
    return _svg(figure)


def thresholds_svg(rows: Sequence[Mapping[str, float]]) -> bytes:
    """Draw how Dice, precision and recall depend on the threshold, and the Dice at that of the masks, 0.5.

    Args:
        rows: rows of :meth:`segbundles.statistics.ProbabilityCounts.thresholds`.

    Returns:
        An SVG document.
    """
    figure, axes = _begin((4.2, 2.6), "threshold of the probability", "")
    for name, colour, style in (("dice", _BOX, "-"), ("precision", _POINT, "--"), ("recall", _THIRD, ":")):
        values = [row[name] for row in rows]
        axes.plot(
            [row["threshold"] for row in rows],
            values,
            color=colour,
            linestyle=style,
            label=name.replace("dice", "Dice"),
        )
    _mark(axes, rows, "threshold", "dice")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def _begin(size: tuple[float, float], x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.locator_params(nbins=5)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _points(axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    axes.scatter(x, y, s=16 if len(x) > 30 else 30, color=_POINT, edgecolor=_BOX, linewidth=0.5, alpha=0.7)


def _mark(axes: Axes, rows: Sequence[Mapping[str, float]], x: str, y: str) -> None:
    nearest = min(rows, key=lambda row: abs(row["threshold"] - 0.5))
    axes.plot(nearest[x], nearest[y], "o", color="black")
    axes.annotate(f"{nearest['threshold']:.2g}", (nearest[x], nearest[y]), (4, 4), textcoords="offset points", size=8)


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "segbundles"}):  # otherwise ids are random
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
