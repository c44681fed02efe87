"""The handler that evaluates: it collects the records of a scorer and writes tables, summary and report."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ignite.engine import Engine, Events
from monai.config import PathLike

from segbundles.confidence import confidence_columns
from segbundles.data import file_stem
from segbundles.distributed import gather, process_rank
from segbundles.evaluations import content_of, splits_of
from segbundles.files import RunLog, check_writable
from segbundles.meta import file_name, join_notes
from segbundles.scorers import CaseRecord, Scorer, count_probabilities
from segbundles.statistics import ProbabilityCounts, add_counts

if TYPE_CHECKING:
    from segbundles.bundle import RunSettings

__all__ = ["EvaluationReport"]

logger = logging.getLogger("segbundles")

_SLICES_BYTES = 10_000_000  # of all cases
_CASE_BYTES = 500_000


class EvaluationReport:
    """Score every case and write ``metrics.csv``, ``summary.json``, ``report.html`` and the scorer's own tables.

    ``report`` has the figures as SVG and the tables as CSV and LaTeX. If the engine's output has probabilities,
    ``probabilities.csv`` has the pixels of each group, counted by their probability. See
    :func:`segbundles.report.write_evaluation`.

    A case is named after ``case`` in the datalist, or after its image's folder and stem. If two cases have the same
    name, the later one is named after its file.

    Several processes can share the work. Each scores the cases that :class:`segbundles.data.SharedDataLoader` gives it,
    and the first one writes the results of all, in the order of the data set. During the run the log also goes to
    ``evaluation.log``, and no other run can evaluate into the same folder.

    Args:
        output_dir: folder to write to.
        scorer: what is specific to the task, see :class:`segbundles.scorers.Scorer`.
        title: heading of the report.
        settings: what the run uses. Its record is written to ``evaluating.config.json`` and shown at the end of the
            report, and its notes are added to the notes on each case. None leaves them out.
        figures: whether to draw the cases, and to add sliders through their slices; these share 10 MB, at most 500 kB
            and at least 30 kB each.
        image_key: image in the engine's batch.
        label_key: truth in the engine's output, class indices.
        pred_key: prediction in the engine's output, class indices.
        probability_key: probabilities in the engine's output, (classes, spatial), the background first; it may be
            missing.

    Raises:
        ValueError: when the run starts and ``output_dir`` cannot be written to, or another run evaluates into it.
    """

    def __init__(
        self,
        output_dir: PathLike,
        scorer: Scorer,
        title: str = "Evaluation",
        settings: RunSettings | None = None,
        figures: bool = True,
        image_key: str = "image",
        label_key: str = "label",
        pred_key: str = "pred",
        probability_key: str = "prob",
    ) -> None:
        self.output_dir = Path(output_dir)
        self.scorer = scorer
        self.title = title
        self.settings = settings
        self.figures = figures
        self.image_key, self.label_key, self.pred_key = image_key, label_key, pred_key
        self.probability_key = probability_key
        self._run_log = RunLog(self.output_dir / "evaluation.log")
        self._most_bytes = _CASE_BYTES
        self._device = ""
        # of this process; the records of a case stay together
        self._cases: list[list[CaseRecord]] = []
        self._counts: dict[str, ProbabilityCounts] = {}  # of each group

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose batches and outputs are decollated."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        engine.add_event_handler(Events.COMPLETED, self.write)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.stop)

    def start(self, engine: Engine) -> None:
        """Check the folder, open the log and forget the cases of an earlier run."""
        check_writable(self.output_dir, "output_dir")
        if process_rank() == 0:
            self._run_log.take()
        if self.settings:
            self.settings.write(self.output_dir / "evaluating.config.json")
        self._cases, self._counts = [], {}
        self._device = _device_name(engine)
        if self.figures:
            from segbundles.report import share_of_page

            data = engine.state.dataloader
            self._most_bytes = share_of_page(_SLICES_BYTES, len(getattr(data, "dataset", data)), _CASE_BYTES)

    def add(self, engine: Engine) -> None:
        """Score the cases of a batch."""
        for batch, output in zip(engine.state.batch, engine.state.output, strict=True):
            item = {**batch, **output, "image": batch[self.image_key]}
            item |= {"label": output[self.label_key], "pred": output[self.pred_key]}
            file = file_name(item["image"])
            name = str(batch.get("case") or f"{Path(file).parent.name}/{file_stem(file)}".strip("/"))
            records = self.scorer.score(name, item, self.figures)
            content = content_of(item)
            counts = count_probabilities(item, self.probability_key)
            for record in records:
                if record.slices is not None:
                    from segbundles.report import case_slices

                    record.slices = case_slices(**record.slices, most_bytes=self._most_bytes)
                record.file = file + record.name.removeprefix(name)
                record.row |= confidence_columns(item)
                record.group, record.content = str(batch.get("group") or ""), content
                if self.settings and self.settings.notes:
                    record.row["notes"] = join_notes(record.row.get("notes"), *self.settings.notes)
            if counts is not None:
                self._counts = add_counts([self._counts, {str(batch.get("group") or name): counts}])
            self._cases.append(records)

    def write(self, engine: Engine) -> None:
        """Write the cases of all processes, in the first process."""
        shares, counts = gather(self._cases), gather(self._counts)
        if process_rank() == 0:  # the processes took turns
            cases = chain.from_iterable(zip_longest(*shares, fillvalue=[]))
            self._write(list(chain.from_iterable(cases)), add_counts(counts))
        self._run_log.release()

    def stop(self, engine: Engine, error: BaseException) -> None:
        """Close the log when an error stops the run."""
        self._run_log.release(error)
        raise error

    def _write(self, records: Sequence[CaseRecord], counts: Mapping[str, ProbabilityCounts]) -> None:
        from segbundles.report import Part, label, write_evaluation

        _make_names_unique(records)
        # cases without distances have fewer columns than those with
        longest_first = sorted(records, key=lambda record: len(record.row), reverse=True)
        columns = list(dict.fromkeys(key for record in longest_first for key in record.row))
        for record in records:
            record.row = {key: record.row.get(key, math.nan) for key in columns}
        evaluation = self.scorer.conclude(records)
        drawn = [record for record in records if record.figure]
        run = self._run_record(records)
        few = write_evaluation(
            self.output_dir,
            title=self.title,
            rows=[{"case": r.name, "group": r.group, "content": r.content, **r.row} for r in records],
            summary=evaluation.summary,
            unit=evaluation.unit,
            tables=evaluation.tables,
            parts=[Part(label(name).capitalize(), tables={name: table}) for name, table in evaluation.shown.items()],
            notes=evaluation.notes,
            figures={record.name: record.figure for record in drawn},
            slices={record.name: record.slices for record in records if record.slices},
            probabilities=counts,
            run=run,
            settings=_settings_tables(run),
            sort_by=evaluation.sort_by,
            classes=self.settings.classes if self.settings else None,
            outlined_classes=evaluation.outlined_classes,
        )
        for line in (evaluation.log, *few):
            if line:
                logger.info(line)
        files = ["metrics.csv", *evaluation.tables, "summary.json"]
        logger.info(f"Results: {self.output_dir / 'report.html'}, {', '.join(files)}")

    def _run_record(self, records: Sequence[CaseRecord]) -> dict[str, Any]:
        """Return what is needed to repeat the evaluation: command, knobs, weights, software, device, and data."""
        record = self.settings.record() if self.settings else {}
        knobs = record.get("knobs", {})
        content = hashlib.sha256("".join(sorted(record.content for record in records)).encode()).hexdigest()
        data = {"split": knobs.get("split"), "scored_sha256": content, **splits_of(knobs.get("dataset_dir"))}
        if self.settings:
            record |= {"weights": self.settings.facts, "classes": self.settings.classes}
        return {**record, "device": self._device, "data": data}


def _make_names_unique(records: Sequence[CaseRecord]) -> None:
    """Name a record after its file if an earlier one has its name."""
    taken: set[str] = set()
    for number, record in enumerate(records, 1):
        names = (record.name, record.file, f"{record.file} ({number})")
        record.name = next(name for name in names if name not in taken)
        taken.add(record.name)


def _settings_tables(run: Mapping[str, Any]) -> dict[str, list[tuple[Any, ...]]]:
    """Return the tables at the end of the report: the run, its data, its knobs, and the facts of each weights file."""
    if not run.get("bundle"):  # not the run of a bundle
        return {}
    data = run["data"]
    splits = [(split, f"cases: {n['cases']}, groups: {n['groups']}") for split, n in data.get("splits", {}).items()]
    tables: dict[str, list[tuple[Any, ...]]] = {
        "Run": [
            ("bundle", f"{run['bundle']} {run['version']}"),
            ("command", run["command"]),
            ("device", run["device"]),
        ],
        "Data": [
            ("split that was scored", data["split"] or ""),
            ("sha256 of the scored images and truths", data["scored_sha256"]),
            ("sha256 of datalist.json", data.get("datalist_sha256", "")),
            *splits,
        ],
        "Knobs": [(name, value, run["sources"].get(name, "config")) for name, value in run["knobs"].items()],
    }
    for knob, facts in run["weights"].items():
        # the ranges of a calibration are for programs
        tables[f"Facts of {knob}"] = [(name, value) for name, value in facts.items() if name != "confidence"]
    return tables


def _device_name(engine: Engine) -> str:
    device = torch.device(getattr(engine.state, "device", None) or "cpu")
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
