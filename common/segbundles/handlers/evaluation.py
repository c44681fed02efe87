"""The handler that evaluates: it collects the records of a scorer and writes tables, summary and report."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ignite.engine import Engine, Events
from monai.config import PathLike

from segbundles.data import file_stem
from segbundles.distributed import gather, process_rank
from segbundles.files import RunLog, atomic_path, check_writable
from segbundles.meta import file_name, join_notes
from segbundles.metrics import METRIC_UNITS, SECTION_UNITS
from segbundles.metrics.segmentation import base_name
from segbundles.scorers import CaseRecord, Scorer

if TYPE_CHECKING:
    from segbundles.bundle import RunSettings

__all__ = ["EvaluationReport"]

logger = logging.getLogger("segbundles")

FEW_GROUPS = 10
_SLICES_BYTES = 10_000_000  # of all cases
_CASE_BYTES = 500_000


class EvaluationReport:
    """Score every case and write ``metrics.csv``, ``summary.json``, ``report.html`` and the scorer's own tables.

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
    ) -> None:
        self.output_dir = Path(output_dir)
        self.scorer = scorer
        self.title = title
        self.settings = settings
        self.figures = figures
        self.image_key, self.label_key, self.pred_key = image_key, label_key, pred_key
        self._run_log = RunLog(self.output_dir / "evaluation.log")
        self._most_bytes = _CASE_BYTES
        self._cases: list[list[CaseRecord]] = []  # of this process; the records of a case stay together

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
        self._cases = []
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
            for record in records:
                if record.slices is not None:
                    from segbundles.report import case_slices

                    record.slices = case_slices(**record.slices, most_bytes=self._most_bytes)
                record.file = file + record.name.removeprefix(name)
                record.group = str(batch.get("group") or "")
                if self.settings and self.settings.notes:
                    record.row["notes"] = join_notes(record.row.get("notes"), *self.settings.notes)
            self._cases.append(records)

    def write(self, engine: Engine) -> None:
        """Write the cases of all processes, in the first process."""
        shares = gather(self._cases)  # the processes take turns
        if process_rank() == 0:
            self._write(list(chain.from_iterable(chain.from_iterable(zip_longest(*shares, fillvalue=[])))))
        self._run_log.release()

    def stop(self, engine: Engine, error: BaseException) -> None:
        """Close the log when an error stops the run."""
        self._run_log.release(error)
        raise error

    def _write(self, records: Sequence[CaseRecord]) -> None:
        from segbundles.report import limit_figures, write_report

        _make_names_unique(records)
        # cases without distances have fewer columns than those with
        longest_first = sorted(records, key=lambda record: len(record.row), reverse=True)
        columns = list(dict.fromkeys(key for record in longest_first for key in record.row))
        for record in records:
            record.row = {key: record.row.get(key, math.nan) for key in columns}
        evaluation = self.scorer.conclude(records)
        few = _few_groups(records)
        rows = [{"case": record.name, **record.row} for record in records]
        tables = {"metrics.csv": (["case", *columns], rows), **evaluation.tables}
        for file, table in tables.items():
            _write_csv(self.output_dir / file, *table)
        with atomic_path(self.output_dir / "summary.json") as part:
            part.write_text(json.dumps(evaluation.summary, indent=1) + "\n", encoding="utf-8")
        metrics = {key: value for key, value in evaluation.summary.items() if isinstance(value, dict)}
        units = METRIC_UNITS | SECTION_UNITS
        classes = self.settings.classes if self.settings else {}
        outlined = range(1, evaluation.outlined_classes + 1)
        drawn = [record for record in records if record.figure]
        write_report(
            self.output_dir / "report.html",
            title=self.title,
            rows=rows,
            figures={r.name: f for r, f in zip(drawn, limit_figures([r.figure for r in drawn]), strict=True)},
            slices={record.name: record.slices for record in records if record.slices},
            summary=metrics,
            units={key: unit for key in metrics if (unit := units.get(base_name(key)))},
            notes=[*evaluation.notes, *few],
            settings=_settings_tables(self.settings),
            sort_by=evaluation.sort_by,
            class_names=[classes.get(str(k), f"class {k}") for k in outlined] if len(outlined) > 1 else None,
            outlines=bool(outlined),
        )
        for line in (evaluation.log, *few):
            if line:
                logger.info(line)
        logger.info(f"Results: {self.output_dir / 'report.html'}, {', '.join([*tables, 'summary.json'])}")


def _make_names_unique(records: Sequence[CaseRecord]) -> None:
    """Name a record after its file if an earlier one has its name."""
    taken: set[str] = set()
    for number, record in enumerate(records, 1):
        names = (record.name, record.file, f"{record.file} ({number})")
        record.name = next(name for name in names if name not in taken)
        taken.add(record.name)


def _few_groups(records: Sequence[CaseRecord]) -> list[str]:
    """Return a note if the cases belong to fewer than ten groups, several cases to one."""
    groups = {record.group for record in records}
    if "" in groups or not len(groups) < min(FEW_GROUPS, len(records)):
        return []
    counted = f"{len(groups)} groups" if len(groups) > 1 else "1 group"
    return [
        f"These {len(records)} cases belong to {counted} of the datalist, such as patients. Several cases of one "
        f"patient are one patient: with fewer than {FEW_GROUPS} groups, the figures say little about other patients."
    ]


def _settings_tables(settings: RunSettings | None) -> dict[str, list[tuple[Any, ...]]]:
    """Return the tables at the end of the report: the run, its knobs, and the facts of each weights file."""
    if settings is None or not settings.bundle:  # not the run of a bundle
        return {}
    tables: dict[str, list[tuple[Any, ...]]] = {
        "Run": [("bundle", f"{settings.bundle} {settings.version}"), ("command", settings.command)],
        "Knobs": [(name, value, settings.sources.get(name, "config")) for name, value in settings.knobs.items()],
    }
    return tables | {f"Facts of {knob}": [*facts.items()] for knob, facts in settings.facts.items()}


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    return value if not isinstance(value, float) else "" if math.isnan(value) else f"{value:.6g}"
