"""The table, the summary and the report of an evaluation."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.config import PathLike
from monai.data import MetaTensor

from segbundles.data import file_stem
from segbundles.distributed import gather, process_rank
from segbundles.errors import fail
from segbundles.files import RunLog, atomic_path, check_writable
from segbundles.handlers.results import join_notes
from segbundles.metrics import METRIC_UNITS, SECTION_UNITS, segmentation_metrics, summarize
from segbundles.metrics.segmentation import base_name, slice_metrics
from segbundles.transforms.check import file_name, spacing_of
from segbundles.transforms.io import slice_files

__all__ = ["EvaluationReport"]

logger = logging.getLogger("segbundles")

SLICE_COLUMNS = ("case", "slice", "dice", "truth_pixels", "predicted_pixels", "error_pixels")


class EvaluationReport:
    """Score every case and write ``metrics.csv``, ``summary.json`` and ``report.html``.

    Cases bear the name under ``case`` in the datalist, or the image's folder and stem. Distances are left out for
    images whose spacing is not known (``meta["has_spacing"]`` of the truth is False).

    With ``slice_axis``, volumes are scored by slice as well. A case then has ``slice_dice`` (mean over the slices with
    truth), ``lesion_slices`` and ``lesion_free_slices`` (slices with truth and without) and ``false_positive_slices``
    (lesion-free ones with any predicted voxel); the summary also has ``slice_dice_all``, over the slices of all cases,
    and the sums of the counts; and ``slices.csv`` has a row a slice.

    Where a process group stands, each process scores its share of the cases, in turns as
    :class:`segbundles.data.SharedDataLoader` gives them, and the first writes those of all.

    While the run goes on, what is logged goes to ``output_dir/evaluation.log`` too, and other processes cannot evaluate
    into the same folder.

    Args:
        output_dir: folder to write to.
        num_classes: number of classes, background included.
        title: heading of the report.
        settings: shown at the report's end.
        figures: whether to draw the cases.
        image_key: image in the engine's batch.
        label_key: class map of the truth in the engine's output.
        pred_key: class map of the prediction in the engine's output.
        slice_axis: spatial axis across which volumes are cut into slices to be scored; None scores no slices.
        channel: the one channel that figures show; None shows three as colours, else the first.

    Raises:
        ValueError: when the run starts and ``output_dir`` cannot be written to, or another process evaluates into it.
    """

    sort_by = "dice"  # metric that orders the cases of the report
    outlines = True  # whether figures outline truth and prediction
    by_row = ("rows", "_origins", "_slices", "_figures")  # lists with an element a row, or with none

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
        slice_axis: int | None = None,
        channel: int | None = None,
    ) -> None:
        """See the class."""
        self.output_dir = Path(output_dir)
        self.num_classes = num_classes
        self.title = title
        self.settings = dict(settings or {})
        self.figures = figures
        self.image_key, self.label_key, self.pred_key = image_key, label_key, pred_key
        self.slice_axis = slice_axis
        self.channel = channel
        self._run_log = RunLog(self.output_dir / "evaluation.log")
        self._start()

    def _start(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._origins: list[tuple[int, str]] = []  # place of the case among this process's, and a longer name
        self._slices: list[list[dict[str, Any]]] = []
        self._figures: list[bytes] = []
        self._cases = 0

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose batches and outputs are decollated."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        engine.add_event_handler(Events.COMPLETED, self.write)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.stop)

    def start(self, engine: Engine) -> None:
        """Begin."""
        check_writable(self.output_dir, "output_dir")
        if process_rank() == 0:
            self._run_log.take()
        self._start()

    def add(self, engine: Engine) -> None:
        """Score the cases of a batch."""
        for batch, output in zip(engine.state.batch, engine.state.output, strict=True):
            image = batch[self.image_key]
            file = file_name(image)
            name = str(batch.get("case") or f"{Path(file).parent.name}/{file_stem(file)}".strip("/"))
            self.add_output(name, image, output)
            added = self.rows[len(self._origins) :]
            self._origins += [(self._cases, file + row["case"][len(name) :]) for row in added]
            self._cases += 1

    def add_output(self, name: str, image: torch.Tensor, output: Mapping[str, Any]) -> None:
        """Score what the engine gave for one image (C, spatial)."""
        self.add_case(name, image, output[self.label_key], output[self.pred_key])

    def add_case(self, name: str, image: torch.Tensor, truth: torch.Tensor, pred: torch.Tensor) -> None:
        """Score one case: its name, image (C, spatial), truth and prediction (1, spatial), class indices."""
        spacing, has_spacing = spacing_of(truth), bool(_meta(truth).get("has_spacing", True))
        meta = _meta(pred)
        plain_truth, plain_pred = (torch.as_tensor(np.asarray(t.detach().cpu()))[0] for t in (truth, pred))
        row: dict[str, Any] = {"case": name}
        row.update(segmentation_metrics(plain_pred, plain_truth, spacing, self.num_classes, distances=has_spacing))
        if "box_start" in meta:
            row["truth_in_box"] = _kept(plain_truth > 0, meta["box_start"], meta["box_end"])
        if self.slice_axis is not None:
            row.update(self._add_slices(image, plain_truth, plain_pred))
        row["spacing_mm"] = " x ".join(f"{s:.4g}" for s in spacing) if has_spacing else "unknown"
        row["notes"] = join_notes(_meta(image).get("notes"), meta.get("notes"))
        self.rows.append(row)
        if self.figures:
            from segbundles.report import case_figure

            affine = np.asarray(truth.affine) if plain_truth.ndim == 3 and isinstance(truth, MetaTensor) else None
            figure = case_figure(
                self._shown(name, np.asarray(image.detach().cpu())),
                plain_truth.numpy(),
                plain_pred.numpy(),
                spacing_mm=spacing,
                slice_axis=-1 if self.slice_axis is None else self.slice_axis,
                affine=affine,
            )
            self._figures.append(figure)

    def _add_slices(self, image: torch.Tensor, truth: torch.Tensor, pred: torch.Tensor) -> dict[str, Any]:
        """Keep the rows of a case's slices, and return what the case's row says of them."""
        slices = slice_metrics(pred, truth, self.slice_axis, self.num_classes)
        files = slice_files(_meta(image)) if self.slice_axis in (-1, 2) else []
        names = [Path(file).name for file in files] if len(files) == len(slices) else range(1, len(slices) + 1)
        self._slices.append([{"slice": n, **s} for n, s in zip(names, slices, strict=True)])
        defined = [s["dice"] for s in slices if s["truth_pixels"]]
        return {
            "slice_dice": fmean(defined) if defined else math.nan,
            "lesion_slices": len(defined),
            "lesion_free_slices": len(slices) - len(defined),
            "false_positive_slices": sum(s["predicted_pixels"] > 0 for s in slices if not s["truth_pixels"]),
        }

    def _shown(self, name: str, image: np.ndarray) -> np.ndarray:
        if self.channel is None:
            return image if image.shape[0] == 3 else image[0]
        if not 0 <= self.channel < image.shape[0]:
            fail(f"channel {self.channel} is to be shown, {name} has {image.shape[0]}: give one from 0, or None.")
        return image[self.channel]

    def write(self, engine: Engine | None = None) -> None:
        """Write the files, in the first process, with the cases of all."""
        self._gather()
        if process_rank() == 0:
            self._name_rows()
            self._write()
        self._run_log.release()

    def stop(self, engine: Engine, error: BaseException) -> None:
        """Close the log when something else stops the run."""
        self._run_log.release(error)
        raise error

    def _gather(self) -> None:
        """Take over the cases of the other processes, in the order of the data set."""
        shares = gather({name: getattr(self, name) for name in self.by_row})
        if len(shares) < 2:
            return
        order = sorted((case, p, k) for p, one in enumerate(shares) for k, (case, _) in enumerate(one["_origins"]))
        for name in self.by_row:
            lists = [one[name] for one in shares]
            setattr(self, name, [lists[p][k] for _, p, k in order] if any(lists) else [])

    def _name_rows(self) -> None:
        """Give rows of one name the names of their files."""
        taken: set[str] = set()
        for number, (row, (_, longer)) in enumerate(zip(self.rows, self._origins, strict=False), 1):
            names = (row["case"], longer, f"{longer} ({number})")
            row["case"] = next(name for name in names if name not in taken)
            taken.add(row["case"])

    def _write(self) -> None:
        # cases without distances have fewer columns than those with
        columns = list(dict.fromkeys(key for row in sorted(self.rows, key=len, reverse=True) for key in row))
        rows = [{key: row.get(key, math.nan) for key in columns} for row in self.rows]
        summary = self._summary(rows)
        _write_csv(self.output_dir / "metrics.csv", columns, rows)
        if self.slice_axis is not None:
            by_case = zip(self.rows, self._slices, strict=True)
            slices = [{"case": row["case"], **one} for row, found in by_case for one in found]
            _write_csv(self.output_dir / "slices.csv", SLICE_COLUMNS, slices)
        with atomic_path(self.output_dir / "summary.json") as part:
            part.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        from segbundles.report import write_report

        names = [row["case"] for row in rows]
        metrics = {key: value for key, value in summary.items() if isinstance(value, dict)}
        write_report(
            self.output_dir / "report.html",
            title=self.title,
            rows=rows,
            figures=dict(zip(names, self._figures, strict=False)),
            summary=metrics,
            units={key: unit for key in metrics if (unit := (METRIC_UNITS | SECTION_UNITS)[base_name(key)])},
            notes=self._notes(summary),
            settings=self.settings,
            sort_by=self.sort_by,
            outlines=self.outlines,
        )
        self._log(summary)

    def _log(self, summary: Mapping[str, Any]) -> None:
        dice = summary["dice"]
        if dice["n"]:
            logger.info(
                f"Dice {dice['mean']:.4f} (sd {dice['sd'] or 0:.4f}, worst {dice['worst']:.4f}, n {dice['n']}), "
                f"{summary['missed']} missed"
            )
        files = "metrics.csv, " + ("slices.csv, " if self.slice_axis is not None else "") + "summary.json"
        logger.info(f"Results: {self.output_dir / 'report.html'}, {files}")

    def _summary(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        summary: dict[str, Any] = {}
        for key, value in summarize(rows).items():
            summary[key] = value
            if key == "slice_dice":
                pooled = summarize([{"slice_dice_all": s["dice"]} for found in self._slices for s in found])
                summary["slice_dice_all"] = pooled["slice_dice_all"]
        return summary

    def _notes(self, summary: Mapping[str, Any]) -> list[str]:
        notes = []
        unknown = sum(row["spacing_mm"] == "unknown" for row in self.rows)
        if unknown:
            which = f"{unknown} of {len(self.rows)} cases" if unknown < len(self.rows) else "these images"
            notes.append(
                f"Distances are left out for {which}: their files tell no spacing, so lengths in mm are unknown."
            )
        if self._slices:
            notes.append(
                "Dice is over the whole volume of a case. A case with no truth at all has no Dice, and is in no mean, "
                "where nothing is predicted (status empty); where something is, it is 0 and counts (status false "
                "positive)."
            )
            notes.append(
                "slice_dice is the mean over those slices of a case that hold truth, slice_dice_all that over all such "
                f"slices of the set (n counts slices). {summary['lesion_free_slices']} slices hold no truth; in "
                f"{summary['false_positive_slices']} of them something was predicted (false_positive_slices)."
            )
        return notes


def _meta(image: torch.Tensor) -> Mapping[str, Any]:
    return getattr(image, "meta", {})


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def _kept(truth: torch.Tensor, start: Any, end: Any) -> float:
    box = tuple(slice(int(a), int(b)) for a, b in zip(start, end, strict=True))
    total = int(truth.sum())
    return int(truth[box].sum()) / total if total else math.nan


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value
