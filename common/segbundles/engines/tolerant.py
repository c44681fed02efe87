"""An evaluator that goes on when an image fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from ignite.engine import Engine, EventEnum, Events
from monai.data import decollate_batch, list_data_collate
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys as Keys

from segbundles.data import Failure, LargeImage
from segbundles.errors import innermost
from segbundles.meta import batch_notes, files_of, join_notes, notes_of

__all__ = ["ImageReport", "InferenceEvents", "TolerantEvaluator", "attach_per_image"]

logger = logging.getLogger("segbundles")


class InferenceEvents(EventEnum):
    """Fired once per image; ``engine.state.report`` is then its :class:`ImageReport`."""

    IMAGE_COMPLETED = "image_completed"
    IMAGE_FAILED = "image_failed"


@dataclass(frozen=True)
class ImageReport:
    """What became of one image.

    Args:
        files: path of the image, or of each slice of a stack.
        seconds: time since the images before it, shared equally by the images of a batch.
        notes: notes on the image and on the prediction.
        reason: why it failed; empty if it did not.
        item: the evaluator's output of this image, after postprocessing; empty if it failed.
    """

    files: list[str]
    seconds: float
    notes: str = ""
    reason: str = ""
    item: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


class TolerantEvaluator(SupervisedEvaluator):
    """Evaluate all images that can be evaluated, and report each image by an event of :class:`InferenceEvents`.

    A batch that fails is evaluated again, image by image, so that one bad image does not take the others with it. After
    a failure ``engine.state.batch`` and ``engine.state.output`` have only the images that are left, possibly none.
    Notes are taken from the metadata right after the network, because postprocessing may drop them, and once more at
    the end, because it may add some.

    An error that stops the run is raised after the ``EXCEPTION_RAISED`` handlers of ``val_handlers``, so that all of
    them can write what there is; they need not raise it.

    Args:
        val_data_loader: usually a :class:`segbundles.data.TolerantDataLoader`, whose
            :class:`segbundles.data.Failure` items are reported too.

    The other arguments are those of :py:class:`monai.engines.SupervisedEvaluator`.
    """

    @wraps(SupervisedEvaluator.__init__)
    def __init__(self, *args: Any, event_names: Sequence[Any] | None = None, **kwargs: Any) -> None:
        self._since = 0.0
        self._notes: list[str] = []
        super().__init__(*args, event_names=[*(event_names or ()), InferenceEvents], **kwargs)
        self.add_event_handler(Events.EPOCH_STARTED, lambda _: self._lap())
        self.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._take_notes)
        self.add_event_handler(Events.EXCEPTION_RAISED, _raise)

    def _iteration(self, engine: Engine, batchdata: Any) -> list[Any]:
        if isinstance(batchdata, Failure):
            return self._failed(batchdata.files, batchdata.reason)
        if isinstance(batchdata, LargeImage):
            return self._large(batchdata.files)
        images = [files_of(image) for image in decollate_batch(batchdata[Keys.IMAGE])]
        try:
            outputs = super()._iteration(engine, batchdata)
        except Exception as error:
            reason = innermost(error)
        else:
            seconds = self._lap() / len(images)
            for files, notes, item in zip(images, self._notes, outputs, strict=True):
                notes = join_notes(notes, notes_of(*item.values()))
                self._report(InferenceEvents.IMAGE_COMPLETED, ImageReport(files, seconds, notes, item=item))
            return outputs
        # outside the handler, which would keep the memory of the failed batch
        if len(images) == 1:
            return self._failed(images[0], reason)
        logger.warning(f"A batch of {len(images)} images failed ({reason}): they are processed one by one.")
        batch, outputs = [], []
        for item in decollate_batch(batchdata):
            self.state.batch = list_data_collate([item])
            outputs += self._iteration(engine, self.state.batch)
            batch += self.state.batch
        self.state.batch, self.state.output = batch, outputs
        return outputs

    def _large(self, files: list[str]) -> list[Any]:
        try:
            item = self.data_loader.large_images(files[0])
        except Exception as error:
            return self._failed(files, innermost(error))
        self.state.batch, self.state.output = [], []
        report = ImageReport(files, self._lap(), notes_of(*item.values()), item=item)
        self._report(InferenceEvents.IMAGE_COMPLETED, report)
        return []

    def _failed(self, files: list[str], reason: str) -> list[Any]:
        self.state.batch, self.state.output = [], []
        self._report(InferenceEvents.IMAGE_FAILED, ImageReport(files, self._lap(), reason=reason))
        return []

    def _report(self, event: InferenceEvents, report: ImageReport) -> None:
        self.state.report = report
        self.fire_event(event)

    def _take_notes(self, engine: Engine) -> None:
        output = self.state.output
        notes = [batch_notes(output[key], len(output[Keys.PRED])) for key in (Keys.IMAGE, Keys.PRED)]
        self._notes = [join_notes(*both) for both in zip(*notes, strict=True)]

    def _lap(self) -> float:
        since, self._since = self._since, time.perf_counter()
        return self._since - since


def attach_per_image(engine: Engine, handler: Any) -> None:
    """Attach a handler's ``start``, ``add`` (once per image), ``finish`` and ``stop`` (after an error).

    Args:
        engine: a :class:`TolerantEvaluator`.
        handler: what has these methods; ``stop`` also gets the error.
    """
    engine.add_event_handler(Events.STARTED, handler.start)
    engine.add_event_handler(InferenceEvents.IMAGE_COMPLETED, handler.add)
    engine.add_event_handler(InferenceEvents.IMAGE_FAILED, handler.add)
    engine.add_event_handler(Events.COMPLETED, handler.finish)
    engine.add_event_handler(Events.EXCEPTION_RAISED, handler.stop)


def _raise(engine: Engine, error: BaseException) -> None:
    raise error
