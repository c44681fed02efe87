"""The table, the summary and the report of an evaluation of cells between membranes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from monai.config import PathLike

from segbundles.handlers.evaluation import EvaluationReport, _meta, _write_csv
from segbundles.handlers.results import join_notes
from segbundles.metrics import label_cells, section_metrics, threshold_scores
from segbundles.metrics.instances import THRESHOLDS

__all__ = ["SectionReport"]

logger = logging.getLogger("segbundles")

SCORES = ("v_rand", "v_info")


class SectionReport(EvaluationReport):
    """Score every section and write ``metrics.csv``, ``thresholds.csv``, ``summary.json`` and ``report.html``.

    A case of several sections gives a row each, ``<case>_page_00`` and so on. A row has ``pixel_accuracy`` and
    ``dice_membrane`` of the class map; ``v_rand`` and ``v_info`` of the cells that one threshold of the membrane
    probability gives, the one whose mean over all sections is best, as in the ISBI 2012 challenge (each of the two has
    its own); ``pixel_accuracy_mask``, ``v_rand_cells`` and ``v_info_cells`` of the cells that post-processing made; and
    the numbers of cells. ``status`` is ``one class`` where the truth has no membrane, or no cell, else ``ok``. The
    summary also tells the thresholds, and ``thresholds.csv`` the means at each.

    Args:
        output_dir: folder to write to.
        title: heading of the report.
        settings: shown at the report's end.
        figures: whether to draw the sections.
        image_key: image in the engine's batch, (C, W, H, D).
        label_key: class map of the truth in the engine's output, (1, W, H, D): 0 membrane, 1 cell.
        pred_key: class map of the prediction in the engine's output.
        probability_key: class probabilities in the engine's output, (classes, W, H, D), membrane first.
        cells_key: label image of the cells in the engine's output, (1, W, H, D).
        thresholds: see :func:`segbundles.metrics.threshold_scores`.

    Raises:
        ValueError: when the run starts and ``output_dir`` cannot be written to.
    """

    sort_by = "v_rand_cells"
    outlines = False
    by_row = (*EvaluationReport.by_row, "_scores")

    def __init__(
        self,
        output_dir: PathLike,
        title: str = "Evaluation",
        settings: Mapping[str, Any] | None = None,
        figures: bool = True,
        image_key: str = "image",
        label_key: str = "label",
        pred_key: str = "pred",
        probability_key: str = "probability",
        cells_key: str = "cells",
        thresholds: Sequence[float] = THRESHOLDS,
    ) -> None:
        """See the class."""
        super().__init__(output_dir, 2, title, settings, figures, image_key, label_key, pred_key)
        self.probability_key = probability_key
        self.cells_key = cells_key
        self.thresholds = tuple(thresholds)

    def _start(self) -> None:
        super()._start()
        self._scores: list[list[dict[str, float]]] = []
        self._best: dict[str, float] = {}

    def add_output(self, name: str, image: torch.Tensor, output: Mapping[str, Any]) -> None:
        """Score the sections of one image (C, W, H, D)."""
        keys = (self.label_key, self.pred_key, self.probability_key, self.cells_key)
        stacks = [np.asarray(stack.detach().cpu())[0] for stack in (image, *(output[key] for key in keys))]
        notes = join_notes(_meta(image).get("notes"), _meta(output[self.pred_key]).get("notes"))
        pages = stacks[0].shape[-1]
        for page in range(pages):
            section = name if pages == 1 else f"{name}_page_{page:02d}"
            self.add_section(section, *(stack[..., page] for stack in stacks), notes=notes)

    def add_section(
        self,
        name: str,
        image: np.ndarray,
        truth: np.ndarray,
        prediction: np.ndarray,
        membrane_probability: np.ndarray,
        cells: np.ndarray,
        notes: str = "",
    ) -> None:
        """Score one section: its name, and image, truth, prediction, probability and cells, each (W, H)."""
        scores = section_metrics(prediction, truth, cells=cells)
        true_cells = label_cells(truth)
        self._scores.append(threshold_scores(membrane_probability, true_cells, self.thresholds))
        self.rows.append(
            {
                "case": name,
                "status": "ok" if 0 < true_cells.astype(bool).mean() < 1 else "one class",
                "pixel_accuracy": scores["pixel_accuracy"],
                "dice_membrane": scores["dice_membrane"],
                "pixel_accuracy_mask": scores["pixel_accuracy_mask"],
                **dict.fromkeys(SCORES, math.nan),
                "v_rand_cells": scores["v_rand_cells"],
                "v_info_cells": scores["v_info_cells"],
                "cells": len(np.unique(cells[cells > 0])),
                "true_cells": int(true_cells.max()),
                "notes": notes,
            }
        )
        if self.figures:
            from segbundles.report import section_figure

            self._figures.append(section_figure(image, truth, prediction, membrane_probability, cells))

    def _write(self) -> None:
        means = []
        for number, threshold in enumerate(self.thresholds):
            found = {key: [scores[number][key] for scores in self._scores] for key in SCORES}
            defined = {key: [v for v in values if not math.isnan(v)] for key, values in found.items()}
            means.append({"threshold": threshold, **{k: fmean(v) if v else math.nan for k, v in defined.items()}})
        for key in SCORES:
            best = max(range(len(means)), key=lambda n: (not math.isnan(means[n][key]), means[n][key]))
            self._best[key] = self.thresholds[best]
            for row, scores in zip(self.rows, self._scores, strict=True):
                row[key] = scores[best][key]
        _write_csv(self.output_dir / "thresholds.csv", ("threshold", *SCORES), means)
        if self._figures:
            from segbundles.report import limit_figures

            self._figures = limit_figures(self._figures)
        super()._write()

    def _summary(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return super()._summary(rows) | {f"{key}_threshold": value for key, value in self._best.items()}

    def _notes(self, summary: Mapping[str, Any]) -> list[str]:
        return [
            "pixel_accuracy and dice_membrane are of the most probable class of each pixel, pixel_accuracy_mask is of "
            "the mask that inference writes.",
            "v_rand and v_info are the ISBI 2012 challenge's scores: each at the one threshold of the membrane "
            f"probability that is best over these sections ({summary['v_rand_threshold']:g} for V_rand, "
            f"{summary['v_info_threshold']:g} for V_info), membranes thinned. Chosen on the sections they are measured "
            "on, they lean to the good side. v_rand_cells and v_info_cells are of the cells that inference writes, at "
            "its fixed settings.",
            "The first of the four panels is the image. Cells have colours at random, neighbours differ. Wrong pixels: "
            "blue where membrane was missed, orange where there is none.",
        ]

    def _log(self, summary: Mapping[str, Any]) -> None:
        parts = []
        for key in ("pixel_accuracy", "dice_membrane", "pixel_accuracy_mask", *SCORES, "v_rand_cells", "v_info_cells"):
            if (found := summary.get(key)) and found["n"]:
                at = f" at threshold {self._best[key]:g}" if key in self._best else ""
                parts.append(f"{key} {found['mean']:.4f} (worst {found['worst']:.4f}){at}")
        logger.info(f"{', '.join(parts)}, n {summary['cases']}")
        logger.info(f"Results: {self.output_dir / 'report.html'}, metrics.csv, thresholds.csv, summary.json")
