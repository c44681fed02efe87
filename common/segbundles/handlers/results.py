"""The table of an inference: one row per file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ignite.engine import Engine, Events
from monai.config import PathLike

from segbundles.confidence import confidence_columns
from segbundles.data import image_root
from segbundles.distributed import gather, process_rank
from segbundles.engines import InferenceEvents
from segbundles.errors import fail
from segbundles.files import RunLog, check_writable, read_table, shown_below, write_table
from segbundles.measurements import columns, summarize
from segbundles.meta import join_notes
from segbundles.transforms import SaveSegmentationd

if TYPE_CHECKING:
    from segbundles.bundle import RunSettings

__all__ = ["InferenceResults"]

logger = logging.getLogger("segbundles")

COLUMNS = ("file", "status", "seconds", "notes")
FINISHED = "finished before"


class InferenceResults:
    """Write ``output_dir/inference.csv``: one row per file: status, seconds, notes, confidence, measurements.

    A stack of 2D images has one row per slice, with an equal share of the seconds. Measurements are those that a
    transform such as :class:`segbundles.transforms.MeasureMaskd` has left in the evaluator's output. The table is
    written at the end of the run, also when an error ends it after the first image. If an image failed, the run then
    ends with an error, so that its exit status is 1. In a process group the first process writes the rows of all
    processes.

    An image counts as finished when all its outputs exist, unless the table of the earlier run says that it failed.
    Whether the image or the settings have changed since is not checked.

    During the run, log messages also go to ``output_dir/inference.log``, and other processes cannot write to the same
    folder.

    Args:
        output_dir: folder of the table.
        dataset_dir: folder that file names are relative to.
        skip_finished: whether to leave out images that an earlier run finished, and to keep their rows.
        postfixes: ends of the stems of an image's outputs, see :class:`segbundles.transforms.SaveSegmentationd`.
        settings: settings of the run. They are written to ``output_dir/inferring.config.json``, and their notes go into
            the rows of this run.

    Raises:
        ValueError: at the start, when ``output_dir`` cannot be written to or another process is using it; at the end,
            in the first process, when an image failed in any process.
    """

    def __init__(
        self,
        output_dir: PathLike,
        dataset_dir: PathLike = "",
        skip_finished: bool = False,
        postfixes: Sequence[str] = ("seg",),
        settings: RunSettings | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.path = self.output_dir / "inference.csv"
        self.root = image_root(dataset_dir)
        self.skip_finished = skip_finished
        self.settings = settings
        self.rows: list[dict[str, Any]] = []
        self._outputs = [SaveSegmentationd("pred", output_dir, dataset_dir, postfix) for postfix in postfixes]
        self._earlier: dict[str, dict[str, str]] = {}
        self._log = RunLog(self.output_dir / "inference.log")

    def attach(self, engine: Engine) -> None:
        """Attach to a :class:`segbundles.engines.TolerantEvaluator`."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(InferenceEvents.IMAGE_COMPLETED, self.add)
        engine.add_event_handler(InferenceEvents.IMAGE_FAILED, self.add)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.stop)
        if self.skip_finished:
            engine.data_loader.skip = self.finished

    def start(self, engine: Engine) -> None:
        """Begin a table."""
        len(engine.data_loader.dataset)  # finds the images, or fails before anything is written
        check_writable(self.output_dir, "output_dir")
        if process_rank() == 0:
            self._log.take()
            if self.settings is not None:
                self.settings.write(self.output_dir / "inferring.config.json")
        self.rows = []
        self._earlier = self._read() if self.skip_finished else {}
        # added when all handlers are attached, and so called after all others
        if engine.has_event_handler(self.finish, Events.COMPLETED):
            engine.remove_event_handler(self.finish, Events.COMPLETED)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def _read(self) -> dict[str, dict[str, str]]:
        if not self.path.is_file():
            return {}
        return {row["file"]: row for row in read_table(self.path, errors="replace") if row.get("file")}

    def finished(self, files: Sequence[str]) -> bool:
        """Return whether an earlier run finished an image; if so, add its rows of that run.

        Args:
            files: path of the image, or of each slice of a stack.
        """
        earlier = {self._name(file): self._earlier.get(self._name(file), {}) for file in files}
        if any(row.get("status") == "failed" for row in earlier.values()) or not all(map(self._written, files)):
            return False
        for name, row in earlier.items():
            notes = join_notes(row.get("notes"), FINISHED)
            self.rows.append({**row, "file": name, "status": "ok", "seconds": row.get("seconds", ""), "notes": notes})
        return True

    def _written(self, file: str) -> bool:
        return all(output.is_written(file) for output in self._outputs)

    def add(self, engine: Engine) -> None:
        """Add the rows of an image."""
        report = engine.state.report
        names = [self._name(file) for file in report.files]
        notes = join_notes(report.reason or report.notes, *(self.settings.notes if self.settings else ()))
        row = {"status": "failed" if report.reason else "ok", "seconds": round(report.seconds / len(names), 3)}
        row |= {"notes": notes, **confidence_columns(report.item)}
        measured = report.item.get("measurements", {})
        for name, part in zip(names, measured.get("slices") or [measured] * len(names), strict=True):
            self.rows.append({"file": name, **row, **columns(part)})
            if report.reason:
                logger.warning(f"{name} was not segmented: {report.reason}")
        if not report.reason:
            more = f" and {len(names) - 1} more of its stack" if len(names) > 1 else ""
            also = f" ({report.notes})" if report.notes else ""
            found = f": {summarize(measured)}" if measured else ""
            also += f"; look at it: {review}" if (review := row.get("review")) else ""
            logger.info(f"{names[0]}{more} segmented in {report.seconds:.3f} s{found}{also}")

    def stop(self, engine: Engine, error: BaseException) -> None:
        """Write the rows of the first process, without waiting for the others."""
        if process_rank() == 0 and self.rows:
            with suppress(ValueError):  # the error that stopped the run is the one to be seen
                self._write()
        self._log.release(error)

    def finish(self, engine: Engine) -> None:
        """Write the table in the first process, with the rows of all.

        Raises:
            ValueError: in the first process, when an image failed in any; the message names the first ones.
        """
        shares = gather(self.rows)
        if process_rank() > 0:
            return
        self.rows = [row for rows in shares for row in rows]
        self._write()
        try:
            self._summarize()
        except ValueError as error:
            self._log.release(error)
            raise
        self._log.release()

    def _write(self) -> None:
        names = dict.fromkeys(chain(COLUMNS, *self.rows))
        write_table(self.path, [*names], sorted(self.rows, key=lambda row: row["file"]))

    def _summarize(self) -> None:
        failed = [row["file"] for row in self.rows if row["status"] == "failed"]
        before = sum(FINISHED in row["notes"] for row in self.rows)
        if failed and len(self.rows) == 1:
            fail(f"{failed[0]} was not segmented: {self.rows[0]['notes']}")
        if failed:
            more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
            fail(f"{len(failed)} of {len(self.rows)} images failed: {', '.join(failed[:3])}{more}. See {self.path}.")
        also = f", {before} finished before" if before else ""
        count = len(self.rows) - before
        logger.info(f"{count} image{'s'[: count != 1]} segmented{also}. Results: {self.output_dir}")

    def _name(self, file: str) -> str:
        return shown_below(file, self.root)
