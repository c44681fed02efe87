"""Scores of volumes: whole, or whole and slice by slice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from segbundles.meta import box_of, has_spacing, notes_of, slice_files, spacing_of
from segbundles.metrics import segmentation_metrics, summarize
from segbundles.metrics.segmentation import slice_metrics
from segbundles.scorers.base import CaseRecord, Evaluation, class_maps, dice_line, draw, mean_of_defined, sizes
from segbundles.statistics import count_objects, with_intervals

__all__ = ["SliceScorer", "VolumeScorer"]

SLICE_COLUMNS = ("case", "slice", "dice", "truth_pixels", "predicted_pixels", "error_pixels")


@dataclass
class VolumeScorer:
    """Score volumes whole: overlaps, sizes, and distances in mm if the spacing is known.

    Args:
        num_classes: number of classes, background included.
        tolerance_mm: tolerance of the surface Dice; None leaves it out.
        unit: what a group of the datalist is, in the plural.
    """

    num_classes: int = 2
    tolerance_mm: float | None = None
    unit: str = "patients"

    def score(self, name: str, item: Mapping[str, Any], figures: bool) -> list[CaseRecord]:
        """Score a volume: overlaps, and distances if its spacing is known."""
        maps = class_maps(item)
        drawn = draw(item, maps) if figures else {}
        return [CaseRecord(name, _row(item, maps, self.num_classes, self.tolerance_mm), **drawn)]

    def conclude(self, records: Sequence[CaseRecord]) -> Evaluation:
        """Return the mean scores of all volumes, and say which have no distances."""
        summary = summarize([record.row for record in records])
        notes = _distance_notes(records, self.tolerance_mm)
        return Evaluation(summary, dice_line(summary), notes, unit=self.unit, outlined_classes=self.num_classes - 1)


@dataclass
class SliceScorer:
    """Score volumes whole and slice by slice; ``slices.csv`` has one row per slice.

    A case also has the counts of :func:`segbundles.statistics.count_objects` (an object is a connected part of any
    class), ``slice_dice`` (mean over the slices with truth), ``lesion_slices`` and ``lesion_free_slices`` (slices
    with and without truth) and ``false_positive_slices`` (lesion-free ones with any predicted voxel). The summary has
    ``slice_dice_all`` over the slices of all cases, and the sums of the counts.

    Args:
        num_classes: number of classes, background included.
        channel: channel that the figures show; None shows three channels as colours, otherwise the first one.
        slice_axis: spatial axis across which volumes are cut into slices.
        tolerance_mm: tolerance of the surface Dice; None leaves it out.
        unit: what a group of the datalist is, in the plural.
    """

    num_classes: int = 2
    channel: int | None = None
    slice_axis: int = 2
    tolerance_mm: float | None = None
    unit: str = "patients"

    def score(self, name: str, item: Mapping[str, Any], figures: bool) -> list[CaseRecord]:
        """Score a volume as a whole, and each of its slices."""
        truth, prediction = maps = class_maps(item)
        slices = slice_metrics(prediction, truth, self.slice_axis, self.num_classes)
        files = slice_files(item["image"]) if self.slice_axis in (-1, 2) else []
        names = [Path(file).name for file in files] if len(files) == len(slices) else range(1, len(slices) + 1)
        dice = [one["dice"] for one in slices if one["truth_pixels"]]
        by_slice = {
            "slice_dice": mean_of_defined(dice),
            "lesion_slices": len(dice),
            "lesion_free_slices": len(slices) - len(dice),
            "false_positive_slices": sum(one["predicted_pixels"] > 0 for one in slices if not one["truth_pixels"]),
            **count_objects(prediction, truth),
        }
        drawn = draw(item, maps, self.slice_axis, self.channel) if figures else {}
        details = [{"slice": number, **one} for number, one in zip(names, slices, strict=True)]
        row = _row(item, maps, self.num_classes, self.tolerance_mm, by_slice)
        return [CaseRecord(name, row, details, **drawn)]

    def conclude(self, records: Sequence[CaseRecord]) -> Evaluation:
        """Return the mean scores of all volumes, and the table of all slices."""
        slices = [{"case": record.name, **one} for record in records for one in record.details]
        summary: dict[str, Any] = {}
        for key, value in summarize([record.row for record in records]).items():
            summary[key] = value
            if key == "slice_dice":
                rows = [{"slice_dice_all": one["dice"]} for one in slices]
                groups = [record.group or record.name for record in records for _ in record.details]
                found = {"slice_dice_all": {**summarize(rows)["slice_dice_all"], "counted": "slices"}}
                summary |= with_intervals(found, rows, groups)
        notes = [
            "Dice is computed over the whole volume of a case. A case without any truth has no Dice and does not enter "
            "the means if nothing is predicted either (status empty); if something is, its Dice is 0 and counts "
            "(status false positive).",
            f"{summary['lesion_free_slices']} slices contain no truth; in {summary['false_positive_slices']} of them "
            "something was predicted.",
        ]
        return Evaluation(
            summary,
            dice_line(summary),
            _distance_notes(records, self.tolerance_mm) + notes,
            {"slices.csv": (SLICE_COLUMNS, slices)},
            unit=self.unit,
            outlined_classes=self.num_classes - 1,
        )


def _row(
    item: Mapping[str, Any],
    maps: Sequence[torch.Tensor],
    num_classes: int,
    tolerance_mm: float | None,
    by_slice: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score a whole volume, and put what is known about its slices before the last columns."""
    (truth, prediction), label, box = maps, item["label"], box_of(item["pred"])
    known, spacing = has_spacing(label), spacing_of(label)
    row = segmentation_metrics(prediction, truth, spacing, num_classes, known, tolerance_mm)
    if box is not None:
        total = int((truth > 0).sum())
        inside = truth[tuple(slice(start, end) for start, end in zip(*box, strict=True))]
        row["truth_in_box"] = int((inside > 0).sum()) / total if total else math.nan
    measure = {"pixels": 1}
    if known:
        pixel = math.prod(spacing)
        measure = {"volume_ml": pixel / 1000} if truth.ndim == 3 else {"area_mm2": pixel}
    row |= sizes(truth, prediction, num_classes, measure) | (by_slice or {})
    row["spacing_mm"] = " x ".join(f"{s:.4g}" for s in spacing) if known else "unknown"
    return row | {"notes": notes_of(item["image"], item["pred"])}


def _distance_notes(records: Sequence[CaseRecord], tolerance_mm: float | None) -> list[str]:
    """Say in the report what the tolerance is, and why cases have no distances."""
    unknown = sum(record.row["spacing_mm"] == "unknown" for record in records)
    notes = []
    if unknown:
        which = f"{unknown} of {len(records)} cases" if unknown < len(records) else "these images"
        notes.append(
            f"Distances are left out for {which}: the files do not contain the spacing, so lengths in mm are unknown."
        )
    if tolerance_mm is not None and unknown < len(records):
        notes.append(f"The tolerance of the surface Dice is {tolerance_mm:g} mm.")
    return notes
