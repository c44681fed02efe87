"""Seconds of every stage of an inference: reading, each transform, the network, each result.

    python benchmarks/stages.py bundles/left_atrium_vnet scan.nii.gz [--runs 3] [-- --amp false ...]

Each stage has the least of its runs, and its share of the network's time. What follows the network, except for writing
the mask, are the additional results: each can be switched off by its knob.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from monai.data import decollate_batch, list_data_collate

import segbundles.bundle  # noqa: F401
from segbundles.check import read_overrides
from segbundles.handlers import WeightsLoader
from segbundles.report import case_slices


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path)
    options.add_argument("image")
    options.add_argument("--runs", type=int, default=3)
    given, rest = options.parse_known_args()
    parser = ConfigParser()
    parser.read_config(str(given.bundle / "configs" / "inference.json"))
    settings = read_overrides([word for word in rest if word != "--"], given.bundle)
    with tempfile.TemporaryDirectory() as out:
        places = {"bundle_root": str(given.bundle), "dataset_dir": given.image, "output_dir": out}
        parser.update({**places, **settings})
        parser.get_parsed_content("initialize")
        network = parser.get_parsed_content("network").eval()
        for handler in parser.get_parsed_content("handlers"):
            if isinstance(handler, WeightsLoader):
                handler()
        before, after = (parser.get_parsed_content(f"{name}processing").transforms for name in ("pre", "post"))
        inferer, cases = parser.get_parsed_content("inferer"), parser.get_parsed_content("cases")
        seconds: dict[str, float] = {}
        for _ in range(given.runs):
            for name, spent in run(cases[0], before, after, inferer, network).items():
                seconds[name] = min(spent, seconds.get(name, spent))
    print(f"{given.bundle.name}, {given.image}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| stage | seconds | share of the network's |\n|---|---|---|")
    for name, spent in seconds.items():
        print(f"| {name} | {spent:.3f} | {spent / seconds['network']:.1%} |")


def run(case: dict, before: tuple, after: tuple, inferer: object, network: torch.nn.Module) -> dict[str, float]:
    """Segment one image; return the seconds of each stage."""
    seconds: dict[str, float] = {}
    item = case

    def stage(name: str, do: object, *args: object) -> object:
        start = time.perf_counter()
        result = do(*args)
        seconds[name] = seconds.get(name, 0) + time.perf_counter() - start
        return result

    with torch.no_grad():
        for transform in before:
            item = stage(type(transform).__name__, transform, item)
        batch = list_data_collate([item])
        batch["pred"] = stage("network", inferer, batch["image"], network)
        (item,) = decollate_batch(batch)
        for transform in after:
            item = stage(type(transform).__name__, transform, item)
        if "preview" in item:
            stage("pictures of the preview", lambda: case_slices(**item["preview"]))
    return seconds


if __name__ == "__main__":
    main()
