"""Tables of what a run did, a row a file."""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.config import PathLike
from monai.data import decollate_batch, list_data_collate
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys as Keys
from monai.utils import ensure_tuple

from segbundles.data import image_root
from segbundles.distributed import gather, process_rank
from segbundles.errors import fail, innermost
from segbundles.files import RunLog, atomic_path, check_writable
from segbundles.transforms.io import SaveSegmentationd, slice_files

__all__ = ["InferenceResults", "join_notes"]

logger = logging.getLogger("segbundles")

COLUMNS = ("file", "status", "seconds", "notes")
FINISHED = "finished before"


def join_notes(*notes: Any) -> str:
    """Join the notes on one image, each kept once; what is None or empty is passed over."""
    return "; ".join(dict.fromkeys(part for note in notes if note for part in str(note).split("; ")))


def _files(meta: Mapping[Hashable, Any]) -> list[str]:
    return slice_files(meta) or [str(meta["filename_or_obj"])]


class InferenceResults:
    """Keep a row a file and write ``output_dir/inference.csv``: file, status, seconds, notes.

    A stack of 2D images has a row for each of its slices, with an equal share of the seconds. Notes are those of the
    image's and of the prediction's ``meta["notes"]``. The table is written at the end, also when the run ends with an
    error. ``close`` then makes the exit status tell whether all images came out.

    Where a process group stands, each process keeps the rows of its images, and the first writes those of all and tells
    how it went.

    An image is finished when all its outputs are there, a stack when those of all its slices are, unless the table of
    the earlier run says that it failed. Whether the image or the settings have changed since is not looked at.

    While the run goes on, what is logged goes to ``output_dir/inference.log`` too, and other processes cannot segment
    into the same folder.

    Args:
        output_dir: folder of the table.
        dataset_dir: folder that file names are given relative to.
        key: output of the network.
        skip_finished: whether :meth:`finished` says so of images that an earlier run has finished, and adds their rows.
        postfixes: ends of the stems of an image's outputs, see :class:`segbundles.transforms.SaveSegmentationd`.

    Raises:
        ValueError: when the run starts and ``output_dir`` cannot be written to, or another process segments into it.
    """

    def __init__(
        self,
        output_dir: PathLike,
        dataset_dir: PathLike = "",
        key: str = "pred",
        skip_finished: bool = False,
        postfixes: Sequence[str] = ("seg",),
    ) -> None:
        """See the class."""
        self.output_dir = Path(output_dir)
        self.root = image_root(dataset_dir)
        self.key = key
        self.skip_finished = skip_finished
        self._outputs = [SaveSegmentationd(key, output_dir, dataset_dir, postfix) for postfix in postfixes]
        self._earlier: dict[str, dict[str, str]] = {}
        self.rows: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._since = time.perf_counter()
        self._log = RunLog(self.output_dir / "inference.log")

    @property
    def path(self) -> Path:
        """The table."""
        return self.output_dir / "inference.csv"

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self.take_notes)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        engine.add_event_handler(Events.COMPLETED, self.write)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.stop)

    def start(self, engine: Engine) -> None:
        """Begin a table."""
        check_writable(self.output_dir, "output_dir")
        if process_rank() == 0:
            self._log.take()
        self.rows = []
        self._earlier = self._read() if self.skip_finished else {}
        self._since = time.perf_counter()

    def _read(self) -> dict[str, dict[str, str]]:
        if not self.path.is_file():
            return {}
        with self.path.open(newline="", encoding="utf-8", errors="replace") as file:
            return {row["file"]: row for row in csv.DictReader(file) if row.get("file")}

    def finished(self, files: Sequence[str]) -> bool:
        """Whether these files of one image are to be skipped. If so, their rows are added: those of the earlier run.

        Args:
            files: the image, or the slices of a stack.
        """
        if not self.skip_finished:
            return False
        earlier = {self._name(file): self._earlier.get(self._name(file), {}) for file in files}
        if any(row.get("status") == "failed" for row in earlier.values()) or not all(map(self._written, files)):
            return False
        for name, row in earlier.items():
            notes = join_notes(row.get("notes"), FINISHED)
            self.rows.append({"file": name, "status": "ok", "seconds": row.get("seconds", ""), "notes": notes})
        return True

    def _written(self, file: str) -> bool:
        paths = ([output.output_path(file, pages) for pages in (False, True)] for output in self._outputs)
        return all(any(path.is_file() for path in either) for either in paths)

    def add_failure(self, file: str, reason: str) -> None:
        """Add the row of an image that could not be segmented."""
        self._fail([file], reason)

    def _fail(self, files: Sequence[str], reason: str) -> None:
        seconds = self._lap(len(files))
        for file in files:
            self.rows.append({"file": self._name(file), "status": "failed", "seconds": seconds, "notes": reason})
            logger.warning(f"{self._name(file)} was not segmented: {reason}")

    def guarded(self, engine: Engine, batch: Any) -> list:
        """Segment a batch; images that fail are reported, and the run goes on. The evaluator's ``iteration_update``.

        A batch that fails is done again, image by image, so that one bad image does not take the others with it.
        """
        # read first: postprocessing replaces the batch's items
        meta = batch[Keys.IMAGE].meta
        firsts = ensure_tuple(meta["filename_or_obj"])
        stacks = ensure_tuple(meta.get("slices", ("",) * len(firsts)))
        items = [{"filename_or_obj": one, "slices": stack} for one, stack in zip(firsts, stacks, strict=True)]
        files = [file for item in items for file in _files(item)]
        try:
            return engine._iteration(engine, batch)
        except Exception as error:
            reason = innermost(error)
        # outside the handler, which would keep the memory of the failed batch
        if len(items) > 1:
            logger.warning(f"A batch of {len(items)} failed ({reason}): its images are segmented one by one.")
            return self._one_by_one(engine, batch)
        self._fail(files, reason)
        self._notes, engine.state.batch, engine.state.output = [], [], []
        return []

    def _one_by_one(self, engine: Engine, batch: Any) -> list:
        inputs, outputs, notes = [], [], []
        for item in decollate_batch(batch):
            engine.state.batch = list_data_collate([item])
            outputs += self.guarded(engine, engine.state.batch)
            inputs += engine.state.batch
            notes += self._notes
        self._notes, engine.state.batch, engine.state.output = notes, inputs, outputs
        return outputs

    def take_notes(self, engine: Engine) -> None:
        """Keep the notes on a batch, before postprocessing drops them."""
        output = engine.state.output
        size = len(output[self.key])
        notes = [getattr(output[key], "meta", {}).get("notes") or "" for key in (Keys.IMAGE, self.key)]
        by_source = [[note] * size if isinstance(note, str) else note for note in notes]
        self._notes = [join_notes(*texts) for texts in zip(*by_source, strict=True)]

    def add(self, engine: Engine) -> None:
        """Add the rows of a batch."""
        outputs = engine.state.output
        seconds = self._lap(len(outputs))
        for item, notes in zip(outputs, self._notes, strict=True):
            files = _files(item[self.key].meta)
            for file in files:
                share = round(seconds / len(files), 3)
                self.rows.append({"file": self._name(file), "status": "ok", "seconds": share, "notes": notes})
            more = f" and {len(files) - 1} more of its stack" if len(files) > 1 else ""
            logger.info(f"{self._name(files[0])}{more} segmented in {seconds} s{f' ({notes})' if notes else ''}")

    def stop(self, engine: Engine, error: BaseException) -> None:
        """Write what there is in the first process; the others are not waited for."""
        if process_rank() == 0:
            with suppress(ValueError):  # the error to be seen is the one that stopped the run
                self._write()
        self._log.release(error)
        raise error

    def write(self, engine: Engine | None = None) -> None:
        """Write the table, in the first process, with the rows of all."""
        shares = gather(self.rows)
        if process_rank() == 0:
            self.rows = [row for rows in shares for row in rows]
            self._write()

    def _write(self) -> None:
        with atomic_path(self.path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(sorted(self.rows, key=lambda row: row["file"]))

    def close(self) -> None:
        """Say how it went, in the first process; to be called when the run is over.

        Raises:
            ValueError: in the first process, when an image failed in any, naming the first ones.
        """
        if process_rank() > 0:
            return
        try:
            self._tell()
        finally:
            self._log.release()

    def _tell(self) -> None:
        failed = [row["file"] for row in self.rows if row["status"] == "failed"]
        before = sum(FINISHED in row["notes"] for row in self.rows)
        done = len(self.rows) - len(failed) - before
        if failed:
            more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
            fail(f"{len(failed)} of {len(self.rows)} images failed: {', '.join(failed[:3])}{more}. See {self.path}.")
        also = f", {before} finished before" if before else ""
        logger.info(f"{done} images segmented{also}. Results: {self.output_dir}")

    def _name(self, file: str) -> str:
        path = Path(file)
        if path == self.root:  # a DICOM series
            return path.name
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def _lap(self, images: int) -> float:
        now = time.perf_counter()
        seconds, self._since = (now - self._since) / max(images, 1), now
        return round(seconds, 3)
