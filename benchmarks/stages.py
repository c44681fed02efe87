"""Seconds of every stage of an inference: start, reading, each transform, the network, each result.

    python benchmarks/stages.py --data D [--bundle polyp_fcn8 ...] [--quick] [-- --amp false ...]
    python benchmarks/stages.py --image scan.nii.gz --bundle left_atrium_vnet [--runs 3]

D has one folder per bundle with its prepared data, of which the first validation image is segmented: a volume, a stack
of slices, a section or a frame. The first rows are processes of their own: what Python needs for torch and MONAI
alone, and what a command needs until it reads the first image. Each stage has the least of its runs; the network is
also timed without mirror images and turns. What follows the network, except for writing the mask, are additional
results: each can be switched off by its knob. `--quick` runs once.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data import decollate_batch, list_data_collate
from tables import BUNDLES, ROOT, Table, child, images, machine, some_cases

import segbundles.bundle  # noqa: F401
from segbundles.check import read_overrides
from segbundles.handlers import WeightsLoader
from segbundles.report import case_slices

HEADS = ("stage", "seconds")
_SHOWN = 0.005  # seconds; shorter stages share a row
PLAIN = {"mirror_axes": [], "quarter_turns": False}
# what a command does until it reads the first image
START = """
import sys
from monai.bundle import ConfigParser
import segbundles.bundle
bundle, image, out = sys.argv[1:]
parser = ConfigParser()
parser.read_config(f"{bundle}/configs/inference.json")
parser.update({"bundle_root": bundle, "dataset_dir": image, "output_dir": out})
for name in ("initialize", "evaluator"):
    parser.get_parsed_content(name)
"""


def parsed(bundle: Path, image: Path, out: str, settings: dict[str, Any]) -> ConfigParser:
    """Read inference.json with settings, and load the weights."""
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "inference.json"))
    known = {name: value for name, value in settings.items() if name in parser.config}
    parser.update({"bundle_root": str(bundle), "dataset_dir": str(image), "output_dir": out, **known})
    parser.get_parsed_content("initialize")
    parser.get_parsed_content("network").eval()
    for handler in parser.get_parsed_content("handlers"):
        if isinstance(handler, WeightsLoader):
            handler()
    return parser


def table(bundle: Path, image: Path, runs: int = 3, settings: dict[str, Any] | None = None) -> Table:
    """Measure the stages of one image."""
    given, seconds = settings or {}, {}
    with tempfile.TemporaryDirectory() as out:
        starts = {
            "importing torch and MONAI alone": ("-c", "import torch, monai"),
            "start of a command, with these": ("-c", START, bundle, image, out),
        }
        for _ in range(runs):
            for stage, words in starts.items():
                seconds[stage] = min(child((sys.executable, *words))[0], seconds.get(stage, math.inf))
        for name, more in (("network", {}), ("network, one view", PLAIN)):
            parser = parsed(bundle, image, out, {**given, **more})
            if more and not PLAIN.keys() & parser.config.keys():
                continue
            before, after = (parser.get_parsed_content(f"{name}processing").transforms for name in ("pre", "post"))
            network, inferer = (parser.get_parsed_content(name) for name in ("network", "inferer"))
            for _ in range(runs):
                spent = run(parser.get_parsed_content("dataset").data[0], before, after, inferer, network)
                spent[name] = spent.pop("network")
                for stage, one in spent.items():
                    if not more or stage == name:
                        seconds[stage] = min(one, seconds.get(stage, one))
    title = f"Stages of {bundle.name}, one {'stack' if image.is_dir() else 'image'}, {image.name}"
    rows = [(name, f"{spent:.3f}") for name, spent in seconds.items() if spent >= _SHOWN]
    rows.append(("all other stages", f"{sum(spent for spent in seconds.values() if spent < _SHOWN):.3f}"))
    return Table(title, HEADS, rows)


def first_image(name: str, data: Path, folder: Path) -> Path:
    """Link the first validation image of a bundle, or all slices of its first patient, and return it."""
    cases = some_cases(data / name, folder / "data", {"validation": 1})
    return sorted(images(cases, folder / "images").iterdir())[0]


def main() -> None:
    """Print the tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path)
    options.add_argument("--bundle", nargs="+", default=list(BUNDLES), choices=BUNDLES)
    options.add_argument("--image", type=Path)
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--quick", action="store_true")
    given, rest = options.parse_known_args()
    if (given.data is None) == (given.image is None):
        options.error("give either --data or --image")
    print(machine())
    for name in given.bundle:
        bundle = ROOT / "bundles" / name
        settings = read_overrides([word for word in rest if word != "--"], bundle)
        with tempfile.TemporaryDirectory() as folder:
            image = given.image or first_image(name, given.data, Path(folder))
            table(bundle, image, 1 if given.quick else given.runs, settings).show()


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
