"""The preview of an inference: one page that shows each image with its outlines and measurements."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ignite.engine import Engine
from monai.config import PathLike
from monai.utils import CommonKeys as Keys
from monai.utils import ensure_tuple

from segbundles.confidence import describe_confidence
from segbundles.data import image_root
from segbundles.distributed import gather, process_rank
from segbundles.engines import ImageReport, attach_per_image
from segbundles.errors import innermost
from segbundles.files import shown_below
from segbundles.measurements import describe, summarize
from segbundles.meta import join_notes

if TYPE_CHECKING:
    from segbundles.bundle import RunSettings

__all__ = ["Preview"]

logger = logging.getLogger("segbundles")

_PAGE_BYTES = 24_000_000  # of all images
_IMAGE_BYTES = 1_000_000


class Preview:
    """Write ``output_dir/preview.html``: each image with its slices, outlines, measurements and notes.

    Images that :class:`segbundles.transforms.Previewd` prepared are shown with a slider through their slices. The
    ``measurements`` and the ``review`` (why a person should look at it) of an image's output are shown where it has
    them. Images with a ``confidence`` (expected score, 0 to 1) are in its order, the least certain first. Images share
    24 MB, at most 1 MB and at least 30 kB each, so that 200 images make a page of less than 30 MB.

    The page is written at the end of the run, also when an error ends it. In a process group the first process writes
    the images of all processes. A page that cannot be made is a warning, because the segmentations are there.

    Args:
        output_dir: folder of the page.
        dataset_dir: folder that file names are relative to.
        title: heading of the page; None takes the names of the classes from the settings.
        settings: settings of the run, for the names of the classes and for notes; None leaves them out.
        skip_finished: whether to keep what the page of an earlier run shows of images that are still in the data set
            and are not segmented again.
    """

    def __init__(
        self,
        output_dir: PathLike,
        dataset_dir: PathLike = "",
        title: str | None = None,
        settings: RunSettings | None = None,
        skip_finished: bool = False,
    ) -> None:
        self.path = Path(output_dir) / "preview.html"
        self.root = image_root(dataset_dir)
        self.title = title
        self.settings = settings
        self.skip_finished = skip_finished
        self.cases: list[dict[str, Any]] = []
        self._most_bytes = _IMAGE_BYTES

    def attach(self, engine: Engine) -> None:
        """Attach to a :class:`segbundles.engines.TolerantEvaluator`."""
        attach_per_image(engine, self)

    def start(self, engine: Engine) -> None:
        """Begin a page, and divide its size among the images."""
        from segbundles.report import share_of_page

        self.cases = []
        self._most_bytes = share_of_page(_PAGE_BYTES, len(engine.data_loader.dataset), _IMAGE_BYTES)

    def add(self, engine: Engine) -> None:
        """Add an image."""
        report: ImageReport = engine.state.report
        files = [shown_below(file, self.root) for file in report.files]
        measured = report.item.get("measurements") or {}
        slices, problem = self._slices(report)
        case = {
            "name": files[0] + (f" and {len(files) - 1} more of its stack" if len(files) > 1 else ""),
            "files": files,
            "reason": report.reason,
            "review": report.item.get("review") or "",
            "confidence": report.item.get("confidence"),
            "notes": join_notes(report.notes, problem),
            "seconds": round(report.seconds, 3),
            "found": summarize(measured),
            "measured": [*describe(measured), *describe_confidence(report.item)],
            "slices": slices,
        }
        self.cases.append(case)

    def _classes(self) -> str:
        classes = self.settings.classes if self.settings else {}
        text = ", ".join(name for index, name in classes.items() if index != "0")
        return text[:1].upper() + text[1:]

    def _slices(self, report: ImageReport) -> tuple[dict[str, Any] | None, str]:
        """Return what the slider shows, or None and why there is nothing."""
        from segbundles.report import case_slices

        if "preview" not in report.item:
            return None, ""
        try:
            return case_slices(**report.item["preview"], most_bytes=self._most_bytes), ""
        except Exception as error:
            reason = innermost(error)
            logger.warning(f"{shown_below(report.files[0], self.root)} is not shown in {self.path.name}: {reason}")
            return None, f"no picture: {reason}"

    def stop(self, engine: Engine, error: BaseException) -> None:
        """Write the images of the first process, without waiting for the others."""
        if process_rank() == 0 and self.cases:
            self._write(engine)

    def finish(self, engine: Engine) -> None:
        """Write the page in the first process, with the images of all."""
        shares = gather(self.cases)
        if process_rank() == 0:
            self.cases = [case for cases in shares for case in cases]
            self._write(engine)

    def _write(self, engine: Engine) -> None:
        from segbundles.report import write_preview

        try:
            everything = [*self.cases, *(self._earlier(engine) if self.skip_finished else ())]
            write_preview(
                self.path,
                title=self.title or self._classes() or "Preview",
                cases=sorted(everything, key=lambda case: case["files"][0]),
                notes=self.settings.notes if self.settings else (),
                classes=self.settings.classes if self.settings else None,
            )
        except ValueError as error:
            logger.warning(f"{self.path.name} was not written: {error}")
        else:
            logger.info(f"Open {self.path} in a browser to look at the results.")

    def _earlier(self, engine: Engine) -> list[dict[str, Any]]:
        """Return what an earlier page shows of images that were left out in this run."""
        from segbundles.report import read_preview

        given = (file for item in engine.data_loader.dataset.data for file in ensure_tuple(item[Keys.IMAGE]))
        left = {shown_below(file, self.root) for file in given}
        left -= {file for case in self.cases for file in case["files"]}
        return [case for case in read_preview(self.path) if case["files"][0] in left]
