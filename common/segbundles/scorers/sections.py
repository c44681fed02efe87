"""Scores of EM sections: pixels, and the cells between membranes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from segbundles.meta import notes_of
from segbundles.metrics import label_cells, section_metrics, summarize, threshold_scores
from segbundles.metrics.instances import THRESHOLDS
from segbundles.scorers.base import CaseRecord, Evaluation, mean_of_defined

__all__ = ["SectionScorer"]

AT_BEST = ("v_rand", "v_info")  # scores at the threshold that is best over all sections


@dataclass
class SectionScorer:
    """Score EM sections by their pixels and cells; ``thresholds.csv`` has the mean scores at each threshold.

    The engine's output has class maps (0 membrane, 1 cell) of (1, W, H, D), ``probability`` (classes, W, H, D) with the
    membrane first, and the label image ``cells`` (1, W, H, D). Each of the D sections has its own row; if there are
    several, they are named ``<case>_page_00`` and so on. A row has:

    - ``pixel_accuracy`` and ``dice_membrane`` of the class map;
    - ``v_rand`` and ``v_info`` of the cells at one threshold of the membrane probability, the one whose mean over all
      sections is best, as in the ISBI 2012 challenge (each of the two has its own);
    - ``pixel_accuracy_mask``, ``v_rand_cells`` and ``v_info_cells`` of the cells that post-processing made;
    - the number of ``cells`` and of ``true_cells``, and the share of the image that is cell (``true_fraction`` and
      ``predicted_fraction``, of the class map);
    - ``status``: ``one class`` if the truth has no membrane or no cell, otherwise ``ok``.

    Args:
        thresholds: thresholds of the membrane probability, see :func:`segbundles.metrics.threshold_scores`.
        unit: what a group of the datalist is, in the plural.
    """

    thresholds: Sequence[float] = THRESHOLDS
    unit: str = "blocks"

    def score(self, name: str, item: Mapping[str, Any], figures: bool) -> list[CaseRecord]:
        """Score each section of an image; a stack has one record per page."""
        keys = ("image", "label", "pred", "probability", "cells")
        stacks = [np.asarray(item[key].detach().cpu())[0] for key in keys]
        notes = notes_of(item["image"], item["pred"])
        pages = stacks[0].shape[-1]
        names = [name] if pages == 1 else [f"{name}_page_{page:02d}" for page in range(pages)]
        return [
            self._section(section, [stack[..., page] for stack in stacks], notes, figures)
            for page, section in enumerate(names)
        ]

    def _section(self, name: str, maps: Sequence[np.ndarray], notes: str, figures: bool) -> CaseRecord:
        """Score one section: image, truth, prediction, membrane probability and cells, each (W, H)."""
        _, truth, prediction, probability, cells = maps
        scores = section_metrics(prediction, truth, cells=cells)
        true_cells = label_cells(truth)
        row = {
            "status": "ok" if 0 < true_cells.astype(bool).mean() < 1 else "one class",
            **{key: scores[key] for key in ("pixel_accuracy", "dice_membrane", "pixel_accuracy_mask")},
            **dict.fromkeys(AT_BEST, math.nan),  # known once all sections are
            **{key: scores[key] for key in ("v_rand_cells", "v_info_cells")},
            "cells": len(np.unique(cells[cells > 0])),
            "true_cells": int(true_cells.max()),
            "true_fraction": float((truth > 0).mean()),
            "predicted_fraction": float((prediction > 0).mean()),
            "notes": notes,
        }
        figure = None
        if figures:
            from segbundles.report import section_figure

            figure = section_figure(*maps)
        return CaseRecord(name, row, threshold_scores(probability, true_cells, self.thresholds), figure)

    def conclude(self, records: Sequence[CaseRecord]) -> Evaluation:
        """Choose the best thresholds, and return the mean scores of all sections."""
        means = [
            {"threshold": threshold, **{key: mean_of_defined(r.details[n][key] for r in records) for key in AT_BEST}}
            for n, threshold in enumerate(self.thresholds)
        ]
        best: dict[str, float] = {}
        for key in AT_BEST:
            number = max(range(len(means)), key=lambda n: (not math.isnan(means[n][key]), means[n][key]))
            best[key] = self.thresholds[number]
            for record in records:
                record.row[key] = record.details[number][key]
        summary = summarize([record.row for record in records])
        summary |= {f"{key}_threshold": threshold for key, threshold in best.items()}
        log = [
            f"{key} {found['mean']:.4f} (worst {found['worst']:.4f})"
            + (f" at threshold {best[key]:g}" if key in best else "")
            for key, found in summary.items()
            if isinstance(found, dict) and found["n"]
        ]
        notes = [
            "Pixel accuracy and Dice of the membranes score the most probable class of each pixel; pixel accuracy of "
            "the mask scores the mask that inference writes.",
            "V_rand and V_info at the best threshold are the scores of the ISBI 2012 challenge: each at the one "
            f"threshold of the membrane probability that is best over these sections ({best['v_rand']:g} for V_rand, "
            f"{best['v_info']:g} for V_info), with thinned membranes. As the threshold is chosen on the sections that "
            "are scored, these scores are slightly optimistic. V_rand and V_info of the cells score the cells that "
            "inference writes, with its fixed settings.",
            "The first of the four panels is the image. Cells have random colours; neighbours differ. Wrong pixels are "
            "blue where a membrane was missed, orange where there is none.",
        ]
        return Evaluation(
            summary,
            f"{', '.join(log)}, n {summary['cases']}",
            notes,
            {"thresholds.csv": (("threshold", *AT_BEST), means)},
            unit=self.unit,
            sort_by="v_rand_cells",
            outlined_classes=0,
        )
