"""The masks and probabilities of an evaluation, kept for later questions such as calibration."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote

import numpy as np
from ignite.engine import Engine, Events
from monai.config import PathLike

from segbundles.data import file_stem
from segbundles.files import atomic_path
from segbundles.meta import file_name
from segbundles.transforms import describe_image, spacing_mm

__all__ = ["SavePredictions"]


class SavePredictions:
    """Write each case of an evaluation as ``output_dir/predictions/<case>.npz``, compressed.

    A file has the class maps ``label`` (the truth) and ``pred`` (1, spatial), uint8, and ``probability`` (C, spatial),
    float16, if the engine's output has it: all as they were scored, on the grid of the evaluation. ``about`` is JSON
    text with the ``group`` of the case, its ``spacing_mm`` (null if unknown) and, as ``image``, what
    :func:`segbundles.confidence.image_features` says. Characters that a file name cannot have are escaped as in a URL.
    If two cases have one name, the later one gets a number.

    Args:
        output_dir: folder of the evaluation.
        probability_key: probabilities in the engine's output.

    Raises:
        ValueError: when a file cannot be written.
    """

    def __init__(self, output_dir: PathLike, probability_key: str = "probability") -> None:
        self.folder = Path(output_dir) / "predictions"
        self.probability_key = probability_key
        self._written: set[str] = set()

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose batches and outputs are decollated."""
        engine.add_event_handler(Events.STARTED, lambda _: self._written.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.save)

    def save(self, engine: Engine) -> None:
        """Write the cases of a batch."""
        for batch, output in zip(engine.state.batch, engine.state.output, strict=True):
            file = file_name(batch["image"])
            name = quote(str(batch.get("case") or f"{Path(file).parent.name}/{file_stem(file)}".strip("/")), " ,()=+@")
            if name in self._written:
                name = f"{name} ({len(self._written)})"
            self._written.add(name)
            kept = {"label": (output["label"], np.uint8), "pred": (output["pred"], np.uint8)}
            if self.probability_key in output:
                kept["probability"] = (output[self.probability_key], np.float16)
            image = batch["image"]
            about = {"group": str(batch.get("group") or ""), "spacing_mm": spacing_mm(image)}
            about = json.dumps(about | {"image": describe_image(image)})
            with atomic_path(self.folder / f"{name}.npz") as part:
                arrays = {k: v.detach().cpu().numpy().astype(kind) for k, (v, kind) in kept.items()}
                np.savez_compressed(part, about=np.array(about), **arrays)
