"""Scores of frames: one by one, by sequence, and pooled over the set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from segbundles.data.frames import VOID
from segbundles.meta import notes_of
from segbundles.metrics import confusion_counts, pooled_scores, segmentation_metrics, summarize
from segbundles.scorers.base import CaseRecord, Evaluation, class_maps, dice_line, draw, mean_of_defined, sizes
from segbundles.statistics import Interval, bootstrap_interval, count_objects

__all__ = ["FrameScorer"]

SEQUENCE_COLUMNS = ("sequence", "frames", "jaccard", "dice", "missed", "false_positive")


@dataclass
class FrameScorer:
    """Score frames one by one, by sequence (``group`` in the datalist) and pooled; ``sequences.csv`` has the sequences.

    The summary has the scores pooled over all pixels of the set: ``pooled_accuracy``, ``pooled_mean_jaccard``,
    ``pooled_jaccard`` (of the foreground) and one per class. It also has ``sequences``: for each one the number of
    frames, the Jaccard of the foreground pooled over the sequence, the mean Dice of its frames, and how many frames
    were missed or false positive; and ``pooled_intervals``, those of Jaccard and mean Jaccard over the sequences. A
    frame also has its true and predicted share of the image and the counts of
    :func:`segbundles.statistics.count_objects`. Pixels whose truth is :data:`segbundles.data.VOID` are left out of all
    numbers.

    Args:
        num_classes: number of classes, background included.
    """

    num_classes: int = 2

    def score(self, name: str, item: Mapping[str, Any], figures: bool) -> list[CaseRecord]:
        """Score a frame over its pixels of known class, and count them for the pooled scores."""
        truth, prediction = class_maps(item)
        counts = confusion_counts(prediction, truth, self.num_classes)
        void = truth == VOID
        truth, prediction = truth.masked_fill(void, 0), prediction.masked_fill(void, 0)
        row = {
            "sequence": str(item.get("group") or ""),
            **segmentation_metrics(prediction, truth, (), self.num_classes, distances=False),
            **sizes(truth, prediction, self.num_classes, {"fraction": 1 / truth.numel()}),
            **count_objects(prediction, truth),
            "notes": notes_of(item["image"], item["pred"]),
        }
        return [CaseRecord(name, row, counts, **(draw(item, (truth, prediction)) if figures else {}))]

    def conclude(self, records: Sequence[CaseRecord]) -> Evaluation:
        """Return the mean scores of the frames, and the pooled scores of the set and of each sequence."""
        pooled = pooled_scores(sum(record.details for record in records))
        sequences = _sequences(records)
        summary = summarize([record.row for record in records])
        summary |= {f"pooled_{name}": _json(value) for name, value in pooled.items()}
        summary["sequences"] = [{key: _json(value) for key, value in one.items()} for one in sequences]
        intervals = _intervals(records)
        summary["pooled_intervals"] = {name: one.as_dict() for name, one in intervals.items()}
        whole = {"frames": len(records), **pooled, **{f"{name}_interval": one for name, one in intervals.items()}}
        notes = [
            "A frame without any truth has no Dice and does not enter the means if nothing is predicted either (status "
            "empty); if something is, its Dice is 0 and counts (status false positive). Files of frames do not contain "
            "the size of a pixel, so there are no distances.",
        ]
        by_class = (f"jaccard_{k}" for k in range(self.num_classes))
        columns = ("frames", "jaccard_interval", "mean_jaccard_interval", *by_class, "accuracy")
        shown: dict[str, Any] = {"pooled": (columns, [whole])}
        if len(sequences) < len(records):  # otherwise the table of frames says the same
            shown["sequences"] = (SEQUENCE_COLUMNS, sequences)
            notes.append(
                "In the table of sequences, Jaccard is pooled over the pixels of a sequence and Dice is the mean of "
                "its frames."
            )
        log = (
            f"Pooled over {len(records)} frames: Jaccard {pooled['jaccard']:.4f}, mean with background "
            f"{pooled['mean_jaccard']:.4f}, accuracy {pooled['accuracy']:.4f}"
        )
        return Evaluation(
            summary,
            "; ".join(filter(None, (dice_line(summary), log))),
            notes,
            {"sequences.csv": (SEQUENCE_COLUMNS, sequences)},
            shown,
            unit="sequences",
            outlined_classes=self.num_classes - 1,
        )


def _sequences(records: Sequence[CaseRecord]) -> list[dict[str, Any]]:
    """Return the rows of ``sequences.csv``."""
    by_name: dict[str, list[CaseRecord]] = {}
    for record in records:
        by_name.setdefault(record.row["sequence"], []).append(record)
    found = []
    for name, frames in by_name.items():
        dice = mean_of_defined(frame.row["dice"] for frame in frames)
        statuses = [frame.row["status"] for frame in frames]
        pooled = pooled_scores(sum(frame.details for frame in frames))["jaccard"]
        counts = map(statuses.count, ("missed", "false positive"))
        found.append(dict(zip(SEQUENCE_COLUMNS, (name, len(frames), pooled, dice, *counts), strict=True)))
    return found


def _intervals(records: Sequence[CaseRecord]) -> dict[str, Interval]:
    """Return the pooled Jaccard and mean Jaccard of the set with their intervals over the sequences."""
    matrices, groups = [record.details.numpy() for record in records], [record.group for record in records]
    return {
        name: bootstrap_interval(
            matrices, groups, lambda drawn, name=name: pooled_scores(torch.as_tensor(drawn.sum(0)))[name]
        )
        for name in ("jaccard", "mean_jaccard")
    }


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
