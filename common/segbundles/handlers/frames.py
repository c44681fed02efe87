"""The report of an evaluation of frames: one by one, by sequence, and pooled over the set."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from ignite.engine import Engine

from segbundles.data.frames import VOID
from segbundles.handlers.evaluation import EvaluationReport, _write_csv
from segbundles.metrics.pooled import confusion_counts, pooled_scores

__all__ = ["FrameReport"]

logger = logging.getLogger("segbundles")

SEQUENCE_COLUMNS = ("sequence", "frames", "jaccard", "dice", "missed", "false_positive")


class FrameReport(EvaluationReport):
    """Score every frame, and write what :class:`EvaluationReport` writes and ``sequences.csv``.

    ``metrics.csv`` has a row a frame, with its sequence (``group`` of the datalist). ``summary.json`` also has the
    scores pooled over all pixels of the set, ``pooled_accuracy``, ``pooled_mean_jaccard``, ``pooled_jaccard`` (of the
    foreground) and one a class, and ``sequences``, a dictionary each: frames, Jaccard of the foreground pooled over
    the sequence, mean Dice of its frames, frames missed and false positive. Pixels of truth
    :data:`segbundles.data.VOID` are in no figure. Arguments are those of :class:`EvaluationReport`.
    """

    by_row = (*EvaluationReport.by_row, "_counts")

    def _start(self) -> None:
        super()._start()
        self._counts: list[torch.Tensor] = []

    def add(self, engine: Engine) -> None:
        """Score the frames of a batch."""
        first = len(self.rows)
        super().add(engine)
        for k, batch in enumerate(engine.state.batch, first):
            row = self.rows[k]
            self.rows[k] = {"case": row.pop("case"), "sequence": str(batch.get("group") or ""), **row}

    def add_case(self, name: str, image: torch.Tensor, truth: torch.Tensor, pred: torch.Tensor) -> None:
        """Score one frame: its name, image (C, W, H), truth and prediction (1, W, H), class indices."""
        void = torch.as_tensor(truth) == VOID
        self._counts.append(confusion_counts(*(torch.as_tensor(t).cpu() for t in (pred, truth)), self.num_classes))
        truth, pred = truth.clone(), pred.clone()
        truth[void], pred[void.to(pred.device)] = 0, 0
        super().add_case(name, image, truth, pred)
        row = self.rows[-1]
        row.pop("spacing_mm", None)
        row["notes"] = row.pop("notes", "")

    def _write(self) -> None:
        super()._write()
        _write_csv(self.output_dir / "sequences.csv", SEQUENCE_COLUMNS, self._sequences())
        scores = self._pooled()
        logger.info(
            f"Pooled over {len(self.rows)} frames: Jaccard {scores['pooled_jaccard']:.4f}, mean with background "
            f"{scores['pooled_mean_jaccard']:.4f}, accuracy {scores['pooled_accuracy']:.4f}"
        )

    def _pooled(self) -> dict[str, float]:
        return {f"pooled_{name}": value for name, value in pooled_scores(sum(self._counts)).items()}

    def _sequences(self) -> list[dict[str, Any]]:
        names = dict.fromkeys(row.get("sequence", "") for row in self.rows)
        found = []
        for name in names:
            chosen = [k for k, row in enumerate(self.rows) if row.get("sequence", "") == name]
            dice = [d for k in chosen if not math.isnan(d := self.rows[k]["dice"])]
            statuses = [self.rows[k]["status"] for k in chosen]
            found.append(
                {
                    "sequence": name,
                    "frames": len(chosen),
                    "jaccard": pooled_scores(sum(self._counts[k] for k in chosen))["jaccard"],
                    "dice": fmean(dice) if dice else math.nan,
                    "missed": statuses.count("missed"),
                    "false_positive": statuses.count("false positive"),
                }
            )
        return found

    def _summary(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        summary = super()._summary(rows)
        summary |= {name: _json(value) for name, value in self._pooled().items()}
        summary["sequences"] = [{key: _json(value) for key, value in row.items()} for row in self._sequences()]
        return summary

    def _notes(self, summary: Mapping[str, Any]) -> list[str]:
        pooled = self._pooled()
        by_class = [f"class {k} {_shown(pooled[f'pooled_jaccard_{k}'])}" for k in range(self.num_classes)]
        rows = [f"{row['sequence'] or 'none'} {_shown(row['jaccard'])} ({row['frames']})" for row in self._sequences()]
        # sequences of one frame each say what the table of frames says
        by_sequence = [f"Pooled over each sequence, Jaccard of the foreground (frames): {', '.join(rows)}."]
        return [
            f"Pooled over all pixels of the set: Jaccard of the foreground {_shown(pooled['pooled_jaccard'])}, "
            f"{', '.join(by_class)} (0 is background), their mean {_shown(pooled['pooled_mean_jaccard'])}; accuracy "
            f"{_shown(pooled['pooled_accuracy'])}. The table below is of frames one by one.",
            *(by_sequence if len(rows) < len(self.rows) else []),
            "A frame with no truth at all has no Dice, and is in no mean of frames, where nothing is predicted (status "
            "empty); where something is, it is 0 and counts (status false positive). Files of frames tell no size of "
            "a pixel, so there are no distances.",
        ]


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _shown(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.4f}"
