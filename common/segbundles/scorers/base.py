"""What a scorer is, and what scorers have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol

import numpy as np
import torch

from segbundles.data.frames import VOID
from segbundles.statistics import ProbabilityCounts
from segbundles.transforms import displayed_case, uncertainty_levels

__all__ = [
    "CaseRecord",
    "Evaluation",
    "Scorer",
    "class_maps",
    "count_probabilities",
    "dice_line",
    "draw",
    "mean_of_defined",
    "sizes",
]


@dataclass
class CaseRecord:
    """What is known about one case of an evaluation: one row of ``metrics.csv`` and one picture of the report.

    Args:
        name: name of the case; the report makes it unique.
        row: the columns after ``case``: ``status``, metrics (NaN where undefined) and ``notes``.
        details: what only the scorer itself reads again, such as the rows of slices; it must be picklable.
        figure: picture for the report, JPEG or PNG; None if it is not drawn.
        slices: what the report shows with a slider, see :func:`draw`; None if it shows nothing.
        file: longer name, used if another case has the same one; the report sets it.
        group: ``group`` of the case in the datalist, such as its patient; the report sets it.
        content: hash of truth and image, see :func:`segbundles.evaluations.content_of`; the report sets it.
    """

    name: str
    row: dict[str, Any]
    details: Any = None
    figure: bytes | None = None
    slices: Mapping[str, Any] | None = None
    file: str = ""
    group: str = ""
    content: str = ""


@dataclass
class Evaluation:
    """What a scorer concludes from the records of all cases.

    Args:
        summary: contents of ``summary.json``; the report adds to it. Entries that are dictionaries with ``mean``
            (``sd``, ``median``, ``worst``, ``n``) are the metrics of the report, in its order.
        log: one line for the screen; nothing is logged if it is empty.
        notes: paragraphs under the heading of the report.
        tables: more tables to write: file name, and its columns and rows.
        shown: tables of the report, which are also written to ``report``: name, and columns and rows. One that is
            named like ``unit`` replaces the means of each group.
        unit: what a group of the datalist is, in the plural, such as patients.
        sort_by: metric that orders the cases of the report.
        outlined_classes: number of foreground classes that the figures outline, for the legend; 0 for figures that
            explain themselves.
    """

    summary: dict[str, Any]
    log: str = ""
    notes: list[str] = field(default_factory=list)
    tables: dict[str, tuple[Sequence[str], Sequence[Mapping[str, Any]]]] = field(default_factory=dict)
    shown: dict[str, tuple[Sequence[str], Sequence[Mapping[str, Any]]]] = field(default_factory=dict)
    unit: str = "groups"
    sort_by: str = "dice"
    outlined_classes: int = 1


class Scorer(Protocol):
    """The part of an evaluation that depends on the task; :class:`segbundles.handlers.EvaluationReport` does the rest.

    A scorer keeps no state between cases: several processes may score the cases, and the first one concludes. This one
    scores volumes or 2D images by overlaps and distances:

    .. code-block:: python

        from segbundles.meta import notes_of, spacing_of
        from segbundles.metrics import segmentation_metrics, summarize
        from segbundles.scorers import CaseRecord, Evaluation, class_maps, dice_line, draw

        class DiceScorer:
            def score(self, name, item, figures):
                truth, prediction = class_maps(item)
                row = segmentation_metrics(prediction, truth, spacing_of(item["label"]))
                row["notes"] = notes_of(item["image"], item["pred"])
                return [CaseRecord(name, row, **(draw(item, (truth, prediction)) if figures else {}))]

            def conclude(self, records):
                summary = summarize([record.row for record in records])
                return Evaluation(summary, dice_line(summary))
    """

    def score(self, name: str, item: Mapping[str, Any], figures: bool) -> list[CaseRecord]:
        """Score one case.

        Args:
            name: name of the case. Names of several records of one case start with it.
            item: all that the engine has of the case: its batch and its output, with ``image`` (C, spatial) and, as
                class indices (1, spatial), ``label`` (the truth) and ``pred``.
            figures: whether to draw the case.

        Returns:
            One record, or several if the case has several parts that are scored apart.
        """

    def conclude(self, records: Sequence[CaseRecord]) -> Evaluation:
        """Summarize all cases.

        Args:
            records: records of all cases in the order of the data set, with unique names and the same columns. Values
                of a row that depend on all cases can be set here.
        """


def class_maps(item: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return truth and prediction of a case as plain tensors on the CPU, class indices with spatial axes only."""
    return tuple(torch.as_tensor(np.asarray(item[key].detach().cpu()))[0] for key in ("label", "pred"))


def count_probabilities(item: Mapping[str, Any], key: str) -> ProbabilityCounts | None:
    """Count the pixels of a case by their probability of any foreground class.

    Args:
        item: the case, see :meth:`segbundles.scorers.Scorer.score`.
        key: its probabilities (classes, spatial), the background first.

    Returns:
        The counts, without pixels of unknown class (:data:`segbundles.data.VOID`); None without probabilities.
    """
    if key not in item:
        return None
    probability, truth = (torch.as_tensor(np.asarray(item[name].detach().cpu())) for name in (key, "label"))
    truth, void = truth[0], truth[0] == VOID
    foreground = probability[1] if len(probability) == 2 else (1 - probability[0]).clamp(0, 1)
    return ProbabilityCounts.of(foreground, truth > 0, ~void if void.any() else None)


def draw(
    item: Mapping[str, Any], maps: Sequence[torch.Tensor], slice_axis: int = -1, channel: int | None = None
) -> dict[str, Any]:
    """Draw a case with outlines of truth and prediction, and collect what a slider through its slices shows.

    Args:
        item: the case, see :meth:`segbundles.scorers.Scorer.score`.
        maps: its :func:`class_maps`.
        slice_axis: axis across which a volume is cut into the slices that are shown.
        channel: channel to show; None shows three channels as colours, otherwise the first one.

    Where the case has probabilities (``prob``), a layer of the slices shows where they are uncertain.

    Returns:
        ``figure`` and ``slices`` of a :class:`CaseRecord`: a JPEG picture, and the arguments of
        :func:`segbundles.report.case_slices`.

    Raises:
        ValueError: when the image has no such channel.
    """
    from segbundles.report import case_figure

    shown = displayed_case(item["image"], dict(zip(("truth", "prediction"), maps, strict=True)), channel, slice_axis)
    options = {key: value for key, value in shown.items() if key not in ("image", "overlays")}
    figure = case_figure(shown["image"], *shown["overlays"].values(), **options)
    if "prob" in item:
        levels = {"uncertainty": uncertainty_levels(item["prob"])}
        shown["overlays"] |= displayed_case(item["image"], levels, channel, slice_axis)["overlays"]
    return {"figure": figure, "slices": shown}


def sizes(
    truth: torch.Tensor, prediction: torch.Tensor, num_classes: int, measure: Mapping[str, float]
) -> dict[str, float]:
    """Return the true and the predicted size of a case, as columns of its row.

    Args:
        truth: class indices, spatial axes only.
        prediction: class indices of the same shape.
        num_classes: number of classes, background included.
        measure: quantities, such as ``volume_ml``, and the size of one pixel in each.

    Returns:
        ``true_volume_ml``, ``predicted_volume_ml`` and so on of the foreground; with several foreground classes,
        of each: ``true_volume_ml_1`` and so on.
    """
    counts = [torch.bincount(classes.flatten().long(), minlength=num_classes) for classes in (truth, prediction)]
    single = num_classes == 2
    return {
        f"{kind}_{quantity}{'' if single else f'_{k}'}": int(count[k]) * size
        for k in range(1, num_classes)
        for quantity, size in measure.items()
        for kind, count in zip(("true", "predicted"), counts, strict=True)
    }


def dice_line(summary: Mapping[str, Any]) -> str:
    """Return the line about Dice that is logged; an empty one if no case has a Dice."""
    dice = summary["dice"]
    if not dice["n"]:
        return ""
    spread = f"sd {dice['sd'] or 0:.4f}, worst {dice['worst']:.4f}, n {dice['n']}"
    return f"Dice {dice['mean']:.4f} ({spread}), {summary['missed']} missed"


def mean_of_defined(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    defined = [value for value in values if not math.isnan(value)]
    return fmean(defined) if defined else math.nan
