"""The masks and probabilities of an evaluation, kept for later questions such as calibration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from ignite.engine import Engine, Events
from monai.config import PathLike

from segbundles.data import file_stem
from segbundles.files import atomic_path
from segbundles.meta import file_name

__all__ = ["SavePredictions", "prediction_name"]


def prediction_name(case: Mapping[str, Any], taken: set[str]) -> str:
    """Return the stem of the file of a case, and add it to those that are taken.

    Args:
        case: item of the data set, with its ``image``.
        taken: stems of the cases before it.
    """
    file = file_name(case["image"])
    name = quote(str(case.get("case") or f"{Path(file).parent.name}/{file_stem(file)}".strip("/")), " ,()=+@")
    if name in taken:
        name = f"{name} ({len(taken)})"
    taken.add(name)
    return name


class SavePredictions:
    """Write each case of an evaluation as ``output_dir/predictions/<case>.npz``, compressed.

    A file has the class maps ``label`` (the truth) and ``pred`` (1, spatial), uint8, and ``probability`` (C, spatial),
    float16, if the engine's output has it: all as they were scored, on the grid of the evaluation. Characters that a
    file name cannot have are escaped as in a URL. If two cases have one name, the later one gets a number.

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
            name = prediction_name(batch, self._written)
            kept = {"label": (output["label"], np.uint8), "pred": (output["pred"], np.uint8)}
            if self.probability_key in output:
                kept["probability"] = (output[self.probability_key], np.float16)
            with atomic_path(self.folder / f"{name}.npz") as part:
                np.savez_compressed(part, **{k: v.detach().cpu().numpy().astype(kind) for k, (v, kind) in kept.items()})
