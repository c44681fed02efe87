"""The table, the summary and the report of an evaluation."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.config import PathLike
from monai.data import MetaTensor

from segbundles.data import file_stem
from segbundles.files import atomic_path, check_writable
from segbundles.metrics import METRIC_UNITS, segmentation_metrics, summarize
from segbundles.metrics.segmentation import base_name
from segbundles.transforms.check import file_name, spacing_of

__all__ = ["EvaluationReport"]

logger = logging.getLogger("segbundles")


class EvaluationReport:
    """Score every case and write ``metrics.csv``, ``summary.json`` and ``report.html``.

    Cases bear the name under ``case`` in the datalist, or the image's folder and stem.

    Args:
        output_dir: folder to write to.
        num_classes: number of classes, background included.
        title: heading of the report.
        settings: shown at the report's end.
        figures: whether to draw the cases.
        image_key: image in the engine's batch.
        label_key: class map of the truth in the engine's output.
        pred_key: class map of the prediction in the engine's output.

    Raises:
        ValueError: when the run starts and ``output_dir`` cannot be written to.
    """

    def __init__(
        self,
        output_dir: PathLike,
        num_classes: int = 2,
        title: str = "Evaluation",
        settings: Mapping[str, Any] | None = None,
        figures: bool = True,
        image_key: str = "image",
        label_key: str = "label",
        pred_key: str = "pred",
    ) -> None:
        """See the class."""
        self.output_dir = Path(output_dir)
        self.num_classes = num_classes
        self.title = title
        self.settings = dict(settings or {})
        self.figures = figures
        self.image_key, self.label_key, self.pred_key = image_key, label_key, pred_key
        self._start()

    def _start(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._figures: list[bytes] = []

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose batches and outputs are decollated."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Begin."""
        check_writable(self.output_dir, "output_dir")
        self._start()

    def add(self, engine: Engine) -> None:
        """Score the cases of a batch."""
        for batch, output in zip(engine.state.batch, engine.state.output, strict=True):
            image = batch[self.image_key]
            file = file_name(image)
            short = batch.get("case") or f"{Path(file).parent.name}/{file_stem(file)}".strip("/")
            taken = {row["case"] for row in self.rows}
            name = next(n for n in (str(short), file, f"{file} ({len(taken) + 1})") if n not in taken)
            self.add_case(name, image, output[self.label_key], output[self.pred_key])

    def add_case(self, name: str, image: torch.Tensor, truth: torch.Tensor, pred: torch.Tensor) -> None:
        """Score one case: its name, image (C, spatial), truth and prediction (1, spatial), class indices."""
        spacing = spacing_of(truth)
        meta = getattr(pred, "meta", {})
        plain_truth, plain_pred = (torch.as_tensor(np.asarray(t.detach().cpu()))[0] for t in (truth, pred))
        row: dict[str, Any] = {"case": name}
        row.update(segmentation_metrics(plain_pred, plain_truth, spacing, self.num_classes))
        if "box_start" in meta:
            row["truth_in_box"] = _kept(plain_truth > 0, meta["box_start"], meta["box_end"])
        row["spacing_mm"] = " x ".join(f"{s:.4g}" for s in spacing)
        row["notes"] = str(meta.get("notes", "") or "")
        self.rows.append(row)
        if self.figures:
            from segbundles.report import case_figure

            grey = np.asarray(image.detach().cpu())
            grey = grey if grey.shape[0] == 3 else grey[0]
            affine = np.asarray(truth.affine) if plain_truth.ndim == 3 and isinstance(truth, MetaTensor) else None
            figure = case_figure(grey, plain_truth.numpy(), plain_pred.numpy(), spacing_mm=spacing, affine=affine)
            self._figures.append(figure)

    def write(self, engine: Engine | None = None) -> None:
        """Write the three files."""
        summary = summarize(self.rows)
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        with atomic_path(self.output_dir / "metrics.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({k: _cell(v) for k, v in row.items()} for row in self.rows)
        with atomic_path(self.output_dir / "summary.json") as part:
            part.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        from segbundles.report import write_report

        names = [row["case"] for row in self.rows]
        metrics = {key: value for key, value in summary.items() if isinstance(value, dict)}
        write_report(
            self.output_dir / "report.html",
            title=self.title,
            rows=self.rows,
            figures=dict(zip(names, self._figures, strict=False)),
            summary=metrics,
            units={key: unit for key in metrics if (unit := METRIC_UNITS[base_name(key)])},
            settings=self.settings,
            sort_by="dice",
        )
        dice = summary["dice"]
        if dice["n"]:
            logger.info(
                f"Dice {dice['mean']:.4f} (sd {dice['sd'] or 0:.4f}, worst {dice['worst']:.4f}, n {dice['n']}), "
                f"{summary['missed']} missed"
            )
        logger.info(f"Results: {self.output_dir / 'report.html'}, metrics.csv, summary.json")


def _kept(truth: torch.Tensor, start: Any, end: Any) -> float:
    box = tuple(slice(int(a), int(b)) for a, b in zip(start, end, strict=True))
    total = int(truth.sum())
    return int(truth[box].sum()) / total if total else math.nan


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value
