"""Frames a second of polyp_fcn8's network, against the 134 M original, and batched against one frame at a time.

Random weights and frames: the figures are of speed alone. Reading and writing are not counted.

    python benchmarks/polyp_fcn8.py [--width 384 --height 288 --frames 16 --batch_size 8 --amp true ...]

Other options are settings of inference.json, for the bundle's network.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

CONFIGS = Path(__file__).resolve().parents[1] / "bundles" / "polyp_fcn8" / "configs"
OWN = {"width": 384, "height": 288, "frames": 16}


def measure(settings: dict[str, Any], frames: torch.Tensor, batch_size: int) -> tuple[float, float]:
    """Parameters in millions, and frames a second, of the network and inferer of inference.json."""
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    known = {key: value for key, value in settings.items() if key in parser.config}
    parser.update(known)
    parser.parse()
    network, inferer = parser.get_parsed_content("network").eval(), parser.get_parsed_content("inferer")
    device = parser.get_parsed_content("device")
    with torch.no_grad():
        inferer(frames[:batch_size].to(device), network)
        since = time.perf_counter()
        for batch in frames.split(batch_size):
            inferer(batch.to(device), network).cpu()
        spent = time.perf_counter() - since
    return sum(p.numel() for p in network.parameters()) / 1e6, len(frames) / spent


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def main() -> None:
    """Measure and print the table."""
    if len(sys.argv) % 2 == 0:
        sys.exit(__doc__)
    given = {name.removeprefix("--"): _value(text) for name, text in zip(sys.argv[1::2], sys.argv[2::2], strict=True)}
    own = {key: given.pop(key, default) for key, default in OWN.items()}
    many = given.pop("batch_size", 8)
    shape = (own["frames"], 3, own["width"], own["height"])
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    reference = json.loads((CONFIGS / "args_reference.json").read_text())
    print(f"{own['frames']} frames of {own['width']} x {own['height']}, {torch.get_num_threads()} threads\n")
    print("| network | million parameters | frames a batch | frames a second |\n|---|---|---|---|")
    for name, settings in (("this bundle's", given), ("the 134 M original", {**given, **reference})):
        for batch_size in dict.fromkeys((1, many)):
            parameters, speed = measure(settings, frames, batch_size)
            print(f"| {name} | {parameters:.1f} | {batch_size} | {speed:.2f} |", flush=True)


if __name__ == "__main__":
    main()
