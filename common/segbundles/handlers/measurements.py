"""The measurements of an inference, nested as JSON, and the tables of cells."""

from __future__ import annotations

from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ignite.engine import Engine
from monai.config import PathLike

from segbundles.confidence import confidence_columns
from segbundles.data import file_stem, image_root
from segbundles.distributed import gather, process_rank
from segbundles.engines import attach_per_image
from segbundles.files import read_json, shown_below, write_json, write_table
from segbundles.measurements import CELL_COLUMNS
from segbundles.transforms import SaveSegmentationd

if TYPE_CHECKING:
    from segbundles.bundle import RunSettings

__all__ = ["InferenceMeasurements"]


class InferenceMeasurements:
    """Write ``output_dir/measurements.json``, and ``<stem>_cells.csv`` beside the results of each image with cells.

    The file has what ``inference.csv`` has and what does not fit into a table, such as the size of each part: one entry
    per image, with its ``files`` (several for a stack), ``status``, ``seconds``, ``notes``, confidence and
    measurements. In a process group the first process writes the entries of all.

    Args:
        output_dir: folder to write to.
        dataset_dir: folder that file names are relative to.
        skip_finished: whether entries of an earlier run stay for images that this run does not segment again.
        settings: settings of the run.
    """

    def __init__(
        self,
        output_dir: PathLike,
        dataset_dir: PathLike = "",
        skip_finished: bool = False,
        settings: RunSettings | None = None,
    ) -> None:
        self.path = Path(output_dir) / "measurements.json"
        self.root = image_root(dataset_dir)
        self._tables = SaveSegmentationd("pred", output_dir, dataset_dir, "cells")
        self.skip_finished = skip_finished
        self.settings = settings
        self.entries: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        """Attach to a :class:`segbundles.engines.TolerantEvaluator`."""
        attach_per_image(engine, self)

    def start(self, engine: Engine) -> None:
        """Forget the images of an earlier run."""
        self.entries = []

    def add(self, engine: Engine) -> None:
        """Add an image."""
        report = engine.state.report
        files = [shown_below(file, self.root) for file in report.files]
        measured = dict(report.item.get("measurements", {}))
        table = measured.pop("table", None)
        if "slices" in measured:
            measured["slices"] = [{"file": file, **one} for file, one in zip(files, measured["slices"], strict=True)]
        entry = {"files": files, "status": "failed" if report.reason else "ok", "seconds": round(report.seconds, 3)}
        about = confidence_columns(report.item)
        self.entries.append({**entry, "notes": report.reason or report.notes, **about, **measured})
        if table is not None:
            path = self._tables.output_path(report.files[0])
            write_table(path.with_name(f"{file_stem(path)}.csv"), CELL_COLUMNS, table)

    def finish(self, engine: Engine) -> None:
        """Write the file, in the first process."""
        shares = gather(self.entries)
        if process_rank() == 0:
            self.entries = list(chain.from_iterable(shares))
            self._write(self.entries)

    def stop(self, engine: Engine, error: BaseException) -> None:
        """Write what there is when an error stops the run."""
        if process_rank() == 0 and self.entries:
            with suppress(ValueError):  # the error that stopped the run is the one to be seen
                self._write(self.entries)

    def _write(self, entries: list[dict[str, Any]]) -> None:
        if self.skip_finished and self.path.is_file():
            with suppress(ValueError, KeyError, TypeError):  # a damaged file cannot be kept
                done = {file for entry in entries for file in entry["files"]}
                entries += [one for one in read_json(self.path)["images"] if not done & set(one["files"])]
        about = {"bundle": self.settings.bundle, "version": self.settings.version} if self.settings else {}
        write_json(self.path, {**about, "images": sorted(entries, key=lambda entry: entry["files"])})
