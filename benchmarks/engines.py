"""Compare what computes a bundle's network on a processor, or how many mirrored and turned views to average.

The inferer of the evaluation runs on the cases of one split, with every variant in turn, several times. A table shows
the median time, how many times as fast as the first row that is, the share of the voxels of the masks that differ from
the first row, and the score of the masks. Reading and post-processing are not timed. The first pass of each variant,
which exports or compiles, is not timed either. ``--cpu_time`` counts the time of the processor instead of the clock's,
for a machine that does other things too.

    python benchmarks/engines.py polyp_fcn8 DATA [--cases 5 --runs 5 --split validation --cpu_time --mirror_axes [] ...]
    python benchmarks/engines.py polyp_fcn8 DATA --views

``DATA`` is a folder with a datalist.json. Other options are knobs of evaluate.json. Variants whose package is missing
are left out: ``pip install openvino onnxruntime``.
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
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import decollate_batch, list_data_collate

from segbundles.commands import find_bundle
from segbundles.handlers import EvaluationReport, WeightsLoader
from segbundles.networks.engine import ENGINES, use_engine


@dataclass
class Variant:
    """One row of the table: knobs, and what else to do to the network."""

    name: str
    knobs: dict[str, Any] = field(default_factory=dict)
    change: Callable[[torch.nn.Module], Any] = lambda network: network
    package: str = "torch"


def onnxruntime(path: Path, half: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Start ONNX Runtime, which has no bfloat16 on processors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"image": x})[0]


def channels_last(network: torch.nn.Module) -> None:
    volumes = any(isinstance(layer, torch.nn.Conv3d) for layer in network.modules())
    network.to(memory_format=torch.channels_last_3d if volumes else torch.channels_last)


def compiled(network: torch.nn.Module) -> None:
    network.forward = torch.compile(network.forward)


ENGINES["onnxruntime"] = onnxruntime
ENGINE_VARIANTS = [
    Variant("torch, as shipped"),
    Variant("torch, amp false", {"amp": False}),
    Variant("torch, channels_last", {}, channels_last),
    Variant("torch.compile", {}, compiled),
    Variant("onnxruntime", {}, lambda network: use_engine(network, "onnxruntime"), "onnxruntime"),
    Variant("openvino", {}, lambda network: use_engine(network, "openvino"), "openvino"),
    Variant("openvino, amp false", {"amp": False}, lambda network: use_engine(network, "openvino"), "openvino"),
]


class Pipeline:
    """The inferer, post-processing and scorer of a bundle's evaluation."""

    def __init__(self, root: Path, data: str, split: str, variant: Variant, knobs: dict[str, Any]) -> None:
        parser = ConfigParser()
        parser.read_config([str(root / "configs" / name) for name in ("train.json", "evaluate.json")])
        parser.update({"bundle_root": str(root), "dataset_dir": data, "split": split, **knobs, **variant.knobs})
        parsed = parser.get_parsed_content
        parsed("settings")
        self.network = parsed("network").eval()
        handlers = parsed("validate::handlers")
        for handler in handlers:
            if isinstance(handler, WeightsLoader):
                handler()
        (self.scorer,) = (handler.scorer for handler in handlers if isinstance(handler, EvaluationReport))
        variant.change(self.network)
        self.inferer, self.postprocessing = parsed("validate::inferer"), parsed("validate::postprocessing")
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


def view_variants(root: Path) -> list[Variant]:
    """Return 1, 2, 4 and 8 views, as far as the bundle has them."""
    config = ConfigParser.load_config_file(root / "configs" / "evaluate.json")
    axes = [[], [0], [0, 1]]
    turns = {"quarter_turns": False} if "quarter_turns" in config else {}
    variants = [
        Variant(f"{2 ** len(a)} view{'s' * bool(a)}: mirror_axes {a}", {"mirror_axes": a, **turns}) for a in axes
    ]
    if turns:
        return [*variants, Variant("8 views: and quarter turns", {"mirror_axes": axes[-1], "quarter_turns": True})]
    volumes = "LocatorCropInferer" in (root / "configs" / "evaluate.json").read_text(encoding="utf-8")
    return [*variants, Variant("8 views: mirror_axes [0, 1, 2]", {"mirror_axes": [0, 1, 2]})] if volumes else variants


def scores(rows: list[dict[str, Any]]) -> str:
    """Return the means of the main scores, over the cases where they are defined."""
    found = []
    for name in ("dice", "v_rand", "assd_mm", "iou"):
        values = [row[name] for row in rows if isinstance(row.get(name), float) and not math.isnan(row[name])]
        if values:
            found.append(f"{name} {fmean(values):.4f}")
    return ", ".join(found[:3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("bundle")
    parser.add_argument("data", help="folder with a datalist.json")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--cases", type=int, default=5, help="cases, spread evenly over the split; 0 takes all")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--views", action="store_true", help="compare numbers of views instead of engines")
    parser.add_argument("--only", default="", help="leave out engines without this in their name, except the first")
    parser.add_argument("--cpu_time", action="store_true")
    args, words = parser.parse_known_args()
    knobs = {name.removeprefix("--"): _value(text) for name, text in zip(words[::2], words[1::2], strict=True)}

    root = find_bundle(args.bundle)
    first, *others = view_variants(root) if args.views else ENGINE_VARIANTS
    variants = [first, *(v for v in others if find_spec(v.package) and args.only in v.name)]
    pipelines = [Pipeline(root, args.data, args.split, variant, knobs) for variant in variants]
    dataset = pipelines[0].parsed("validate::dataset")
    count = min(args.cases or len(dataset), len(dataset))
    clock = time.process_time if args.cpu_time else time.perf_counter
    seconds = np.zeros((len(variants), args.runs))
    differ, voxels = np.zeros(len(variants), dtype=int), 0
    rows: list[list[dict[str, Any]]] = [[] for _ in variants]
    for k in np.linspace(0, len(dataset) - 1, count).astype(int):
        batch = list_data_collate([dataset[int(k)]])
        masks = []
        for v, pipeline in enumerate(pipelines):
            mask, found = pipeline.finish(batch, pipeline.run(batch, clock)[1])
            masks.append(mask)
            rows[v] += found
        differ += [int((mask != masks[0]).sum()) for mask in masks]
        voxels += masks[0].size
        for run in range(args.runs):
            for v, pipeline in enumerate(pipelines):
                seconds[v, run] += pipeline.run(batch, clock)[0]
    print(
        f"\n{root.name}, {count} of {len(dataset)} cases of {args.split}, {torch.get_num_threads()} threads, "
        f"{args.runs} runs in turn, {'processor' if args.cpu_time else 'wall'} time"
    )
    print(f"{'':32}{'s / case':>10}{'faster':>8}{'differ':>10}  scores")
    for v, variant in enumerate(variants):
        time_, base = median(seconds[v]) / count, median(seconds[0]) / count
        print(f"{variant.name:32}{time_:10.3f}{base / time_:8.2f}{differ[v] / voxels:10.1e}  {scores(rows[v])}")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
