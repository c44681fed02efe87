"""Scores of frames: one by one, by sequence, and pooled over the set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segbundles.data.frames import VOID
from segbundles.meta import notes_of
from segbundles.metrics import (
    confusion_columns,
    confusion_counts,
    confusion_of,
    pooled_scores,
    segmentation_metrics,
    summarize,
)
from segbundles.scorers.base import CaseRecord, Evaluation, class_maps, dice_line, draw, sizes
from segbundles.statistics import count_objects

__all__ = ["FrameScorer"]


@dataclass
class FrameScorer:
    """Score frames one by one, and count their pixels.

    The report pools the counts over the set and over each sequence (``group`` in the datalist), see
    :func:`segbundles.report.pooled_part`. A frame also has its true and predicted share of the image and the counts of
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
            **confusion_columns(counts),
            "notes": notes_of(item["image"], item["pred"]),
        }
        return [CaseRecord(name, row, **(draw(item, (truth, prediction)) if figures else {}))]

    def conclude(self, records: Sequence[CaseRecord]) -> Evaluation:
        """Return the mean scores of the frames; the report pools their counts, over the set and each sequence."""
        summary = summarize([record.row for record in records])
        notes = [
            "A frame without any truth has no Dice and does not enter the means if nothing is predicted either (status "
            "empty); if something is, its Dice is 0 and counts (status false positive). Files of frames do not contain "
            "the size of a pixel, so there are no distances.",
        ]
        pooled = pooled_scores(sum(confusion_of(record.row) for record in records))
        log = (
            f"Pooled over {len(records)} frames: Jaccard {pooled['jaccard']:.4f}, mean with background "
            f"{pooled['mean_jaccard']:.4f}, accuracy {pooled['accuracy']:.4f}"
        )
        return Evaluation(
            summary,
            "; ".join(filter(None, (dice_line(summary), log))),
            notes,
            unit="sequences",
            outlined_classes=self.num_classes - 1,
        )
