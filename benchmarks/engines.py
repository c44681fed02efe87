"""Compare what computes a bundle's network on a processor, or how many mirrored and turned views to average.

    python benchmarks/engines.py polyp_fcn8 DATA [--cases 5 --runs 5 --split validation --cpu_time --mirror_axes [] ...]
    python benchmarks/engines.py polyp_fcn8 FOLDS --views --cases 0

DATA is a folder with a datalist.json, FOLDS one of `segbundles crossvalidate`: there each case is segmented with the
weights of the fold that did not see it. Every variant in turn runs the inferer of the evaluation on cases of one split,
several times. The table has the median time, how many times as fast as the first row that is, the share of the mask's
voxels that differ from the first row, and with `--views` the mean scores. Reading and post-processing are not timed.
The first pass of each variant, which exports or compiles, is not timed either, unless there are `--runs 0`, which is
the number for `--views`. `--cpu_time` counts the time of the processor instead of the clock's, for a machine that does
other things too. Other options are knobs of evaluate.json. Variants whose package is missing are left out:
`pip install openvino onnxruntime`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import decollate_batch, list_data_collate
from monai.inferers import Inferer
from tables import Table, machine

from segbundles.commands import find_bundle
from segbundles.crossvalidation import RECORD_NAME
from segbundles.handlers import EvaluationReport, WeightsLoader
from segbundles.inferers import MirrorInferer
from segbundles.inferers.mirror import logits_of, subsets
from segbundles.networks.engine import ENGINES, use_engine
from segbundles.report import label

HEADS = ("variant", "seconds per case", "times as fast", "share of pixels that differ", "scores")


@dataclass
class Variant:
    """One row of the table: knobs, and what else to do to the network and its inferer."""

    name: str
    knobs: dict[str, Any] = field(default_factory=dict)
    change: Callable[[torch.nn.Module, Inferer], Any] = lambda network, inferer: None
    package: str = "torch"


class OneBatch(MirrorInferer):
    """Run the network once, with all views of an input as one batch."""

    def _mean(self, network: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        views = subsets(axis + 2 for axis in self.mirror_axes)
        found = logits_of(network, torch.cat([x.flip(dims) for dims in views]), *args, **kwargs).chunk(len(views))
        return sum(one.flip(dims) for one, dims in zip(found, views, strict=True)) / len(views)


def onnxruntime(path: Path, half: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Start ONNX Runtime, which has no bfloat16 on processors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"image": x})[0]


def channels_last(network: torch.nn.Module, _: Inferer) -> None:
    """Keep the weights in the order of memory that convolutions on a processor prefer."""
    volumes = any(isinstance(layer, torch.nn.Conv3d) for layer in network.modules())
    network.to(memory_format=torch.channels_last_3d if volumes else torch.channels_last)


def compiled(network: torch.nn.Module, _: Inferer) -> None:
    """Let torch compile the network."""
    network.forward = torch.compile(network.forward)


def one_batch(_: torch.nn.Module, inferer: Inferer) -> None:
    """Let every mirroring inferer run its views in one batch."""
    for part in (inferer, *vars(inferer).values()):
        if isinstance(part, MirrorInferer):
            part.__class__ = OneBatch
        if part is not inferer and isinstance(part, Inferer):
            one_batch(_, part)


def engine(name: str) -> Callable[[torch.nn.Module, Inferer], Any]:
    """Return what lets an engine compute the network."""
    return lambda network, _: use_engine(network, name)


ENGINES["onnxruntime"] = onnxruntime
ENGINE_VARIANTS = [
    Variant("torch, as shipped"),
    Variant("torch, amp false", {"amp": False}),
    Variant("torch, channels_last", {}, channels_last),
    Variant("torch, all views in one batch", {}, one_batch),
    Variant("torch.compile", {}, compiled),
    Variant("onnxruntime", {}, engine("onnxruntime"), "onnxruntime"),
    Variant("openvino", {}, engine("openvino"), "openvino"),
    Variant("openvino, amp false", {"amp": False}, engine("openvino"), "openvino"),
]


class Pipeline:
    """The inferer, post-processing and scorer of a bundle's evaluation."""

    def __init__(self, root: Path, variant: Variant, knobs: dict[str, Any]) -> None:
        parser = ConfigParser()
        parser.read_config([str(root / "configs" / name) for name in ("train.json", "evaluate.json")])
        parser.update({"bundle_root": str(root), **knobs, **variant.knobs})
        parsed = parser.get_parsed_content
        parsed("settings")
        self.network = parsed("network").eval()
        handlers = parsed("validate::handlers")
        for handler in handlers:
            if isinstance(handler, WeightsLoader):
                handler()
        (self.scorer,) = (handler.scorer for handler in handlers if isinstance(handler, EvaluationReport))
        self.inferer, self.postprocessing = parsed("validate::inferer"), parsed("validate::postprocessing")
        variant.change(self.network, self.inferer)
        self.parsed = parsed

    @torch.no_grad()
    def run(self, batch: dict[str, Any], clock: Callable[[], float]) -> tuple[float, Any]:
        """Return the seconds that the inferer takes for a batch, and its output."""
        since = clock()
        output = self.inferer(batch["image"], self.network)
        return clock() - since, output

    def finish(self, batch: dict[str, Any], output: Any) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Return the mask of the case of a batch, and the rows of its scores."""
        (item,) = decollate_batch({**batch, "pred": output})
        item = self.postprocessing(item)
        records = self.scorer.score("case", item, False)
        return np.asarray(item["pred"]), [record.row for record in records]


def unseen(data: Path) -> list[dict[str, Any]]:
    """Return the knobs that evaluate the unseen cases of each fold; none if the folder has no cross-validation."""
    folds = sorted(data.glob("fold*")) if (data / RECORD_NAME).is_file() else []
    return [{"dataset_dir": str(fold / "data"), "split": "testing", "ckpt_dir": str(fold / "models")} for fold in folds]


def view_variants(root: Path) -> list[Variant]:
    """Return 1, 2, 4 and 8 views, as far as the bundle has them."""
    config = ConfigParser.load_config_file(root / "configs" / "evaluate.json")
    axes = [[], [0], [0, 1]]
    turns = {"quarter_turns": False} if "quarter_turns" in config else {}
    variants = [
        Variant(f"{2 ** len(a)} view{'s' * bool(a)}: mirror_axes {a}", {"mirror_axes": a, **turns}) for a in axes
    ]
    if turns:
        return [
            *variants,
            Variant("8 views: mirror_axes [0, 1] and quarter turns", {"mirror_axes": axes[-1], "quarter_turns": True}),
        ]
    volumes = "LocatorCropInferer" in (root / "configs" / "evaluate.json").read_text(encoding="utf-8")
    return [*variants, Variant("8 views: mirror_axes [0, 1, 2]", {"mirror_axes": [0, 1, 2]})] if volumes else variants


def scores(rows: list[dict[str, Any]]) -> str:
    """Return the means of the main scores, over the cases where they are defined."""
    found = []
    for name in ("dice", "pixel_accuracy_mask", "v_rand_cells", "assd_mm"):
        values = [row[name] for row in rows if isinstance(row.get(name), float) and not math.isnan(row[name])]
        if values:
            found.append(f"{label(name)} {fmean(values):.4f}")
    return ", ".join(found[:3])


def table(
    root: Path,
    data: Path,
    views: bool = False,
    split: str = "validation",
    cases: int = 5,
    runs: int = 5,
    only: str = "",
    cpu_time: bool = False,
    knobs: dict[str, Any] | None = None,
) -> Table:
    """Measure the variants of one bundle.

    Args:
        root: folder of the bundle.
        data: folder with a datalist.json, or of a cross-validation.
        views: whether to compare numbers of views instead of engines.
        split: split of the cases; those of a cross-validation are the unseen ones of its folds.
        cases: number of cases, spread evenly over each split; 0 takes all.
        runs: timed passes of each variant; 0 times the first pass.
        only: leave out variants without this in their name, except the first.
        cpu_time: whether to count the time of the processor.
        knobs: knobs of evaluate.json.
    """
    first, *others = view_variants(root) if views else ENGINE_VARIANTS
    variants = [first, *(v for v in others if find_spec(v.package) and only in v.name)]
    clock = time.process_time if cpu_time else time.perf_counter
    seconds = np.zeros((len(variants), max(runs, 1)))
    differ, voxels, count = np.zeros(len(variants), dtype=int), 0, 0
    rows: list[list[dict[str, Any]]] = [[] for _ in variants]
    folds = unseen(data)
    for where in folds or [{"dataset_dir": str(data), "split": split}]:
        pipelines = [Pipeline(root, variant, {**(knobs or {}), **where}) for variant in variants]
        dataset = pipelines[0].parsed("validate::dataset")
        for k in np.linspace(0, len(dataset) - 1, min(cases or len(dataset), len(dataset))).astype(int):
            batch = list_data_collate([dataset[int(k)]])
            count += 1
            masks = []
            for v, pipeline in enumerate(pipelines):
                spent, output = pipeline.run(batch, clock)
                seconds[v, 0] += spent if not runs else 0
                mask, found = pipeline.finish(batch, output)
                masks.append(mask)
                rows[v] += found
            differ += [int((mask != masks[0]).sum()) for mask in masks]
            voxels += masks[0].size
            for run in range(runs):
                for v, pipeline in enumerate(pipelines):
                    seconds[v, run] += pipeline.run(batch, clock)[0]
    title = (
        f"{'Views' if views else 'Engines'} of {root.name}, {count} {'unseen ' * bool(folds)}case{'s' * (count > 1)}"
        f"{f' of {len(folds)} fold' + 's' * (len(folds) > 1) + ', with the weights of the fold' if folds else ''}, "
        f"{f'{runs} runs in turn' if runs else 'timed once'}"
        f"{', time of the processor' * cpu_time}{''.join(f', {name} {value}' for name, value in (knobs or {}).items())}"
    )
    times = np.median(seconds, axis=1) / count
    lines = [
        (one.name, f"{spent:.3f}", f"{times[0] / spent:.2f}", f"{100 * many / voxels:.2g} %", scores(found))
        for one, spent, many, found in zip(variants, times, differ, rows, strict=True)
    ]
    shown = len(HEADS) if views else -1  # the scores of a few cases say nothing about an engine
    return Table(title, HEADS[:shown], [line[:shown] for line in lines])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("bundle")
    parser.add_argument("data", type=Path, help="folder with a datalist.json, or of a cross-validation")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--cases", type=int, default=5, help="cases, spread evenly over the split; 0 takes all")
    parser.add_argument("--runs", type=int, default=5, help="timed passes; 0 times the first one")
    parser.add_argument("--views", action="store_true", help="compare numbers of views instead of engines")
    parser.add_argument("--only", default="", help="leave out variants without this in their name, except the first")
    parser.add_argument("--cpu_time", action="store_true")
    args, words = parser.parse_known_args()
    knobs = {name.removeprefix("--"): _value(text) for name, text in zip(words[::2], words[1::2], strict=True)}
    options = vars(args)
    print(machine())
    table(find_bundle(options.pop("bundle")), **options, knobs=knobs).show()


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
