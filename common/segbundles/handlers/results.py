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

from segbundles.errors import fail, innermost
from segbundles.files import atomic_path, check_writable
from segbundles.transforms.io import slice_files

__all__ = ["InferenceResults", "join_notes"]

logger = logging.getLogger("segbundles")


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

    Args:
        output_dir: folder of the table.
        dataset_dir: folder that file names are given relative to.
        key: output of the network.

    Raises:
        ValueError: when the run starts and ``output_dir`` cannot be written to.
    """

    def __init__(self, output_dir: PathLike, dataset_dir: PathLike = "", key: str = "pred") -> None:
        """See the class."""
        self.output_dir = Path(output_dir)
        root = Path(dataset_dir).resolve()
        self.root = root.parent if root.is_file() else root
        self.key = key
        self.rows: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._since = time.perf_counter()

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
        self.rows = []
        self._since = time.perf_counter()

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
        """Write what there is."""
        with suppress(ValueError):  # the error to be seen is the one that stopped the run
            self.write(engine)
        raise error

    def write(self, engine: Engine | None = None) -> None:
        """Write the table."""
        with atomic_path(self.path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["file", "status", "seconds", "notes"])
            writer.writeheader()
            writer.writerows(sorted(self.rows, key=lambda row: row["file"]))

    def close(self) -> None:
        """Say how it went; to be called when the run is over.

        Raises:
            ValueError: when an image failed, naming the first ones.
        """
        failed = [row["file"] for row in self.rows if row["status"] == "failed"]
        done = len(self.rows) - len(failed)
        if failed:
            more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
            fail(f"{len(failed)} of {len(self.rows)} images failed: {', '.join(failed[:3])}{more}. See {self.path}.")
        logger.info(f"{done} images segmented. Results: {self.output_dir}")

    def _name(self, file: str) -> str:
        path = Path(file)
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def _lap(self, images: int) -> float:
        now = time.perf_counter()
        seconds, self._since = (now - self._since) / max(images, 1), now
        return round(seconds, 3)
