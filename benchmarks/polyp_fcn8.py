"""Frames a second and peak memory of polyp_fcn8: its network against the 134 M original, by the batch and one by one.

The inferer and the loader of inference.json run with random weights: the figures are of speed alone. Each row has a
process of its own. Reading is not timed, nor is the writing of masks.

    python benchmarks/polyp_fcn8.py [--dataset_dir FOLDER] [--frames 16 --batch_size 8 --amp true --device cpu ...]

Without a folder, frames are made up: half of them 384 x 288 pixels, as those of CVC-ClinicDB, and half 574 x 500, as
those of CVC-300. Other options are settings of inference.json, for the network of this bundle.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parents[1] / "bundles" / "polyp_fcn8" / "configs"
SIZES = ((384, 288), (574, 500))


def make_frames(folder: Path, count: int) -> None:
    """Write frames of noise, of the two sizes in turn."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for k in range(count):
        width, height = SIZES[k % 2]
        Image.fromarray(rng.integers(40, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{k:04}.bmp")


def measure(settings: dict[str, Any], count: int) -> tuple[float, int, int, float, float]:
    """Parameters in millions, frames, batches, frames a second and peak memory in MB, by inference.json."""
    import torch
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    parser.update({key: value for key, value in settings.items() if key in parser.config})
    # random weights are meant here, so none is looked for by which the network could be told to have been loaded
    parser.update({"dataset::data": f"$list(@cases)[:{count}]", "inferer::inferer::ckpt_dir": None})
    network, inferer = parser.get_parsed_content("network").eval(), parser.get_parsed_content("inferer")
    device = torch.device(parser.get_parsed_content("device"))
    batches = [batch["image"] for batch in parser.get_parsed_content("dataloader")]
    if not batches:
        raise SystemExit(f"no frame of {settings['dataset_dir']} can be read.")
    with torch.no_grad():
        inferer(batches[0].to(device), network)
        since = time.perf_counter()
        for batch in batches:
            inferer(batch.to(device), network).cpu()
        spent = time.perf_counter() - since
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    frames = sum(map(len, batches))
    return sum(p.numel() for p in network.parameters()) / 1e6, frames, len(batches), frames / spent, peak / 1e6


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
    count, most = given.pop("frames", 16), given.pop("batch_size", 8)
    known = json.loads((CONFIGS / "inference.json").read_text())
    if unknown := sorted(set(given) - set(known)):
        sys.exit(f"inference.json has no setting {', '.join(unknown)}.\n{__doc__}")
    reference = json.loads((CONFIGS / "args_reference.json").read_text())
    print("| network | million parameters | frames a batch | frames | batches | frames a second | peak memory (MB) |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if "dataset_dir" not in given:
            make_frames(Path(folder), count)
        common = {"dataset_dir": folder, "output_dir": f"{folder}/output", **given}
        rows = {
            "this bundle's": common,
            "this bundle's, `mirror_axes []`": {**common, "mirror_axes": []},
            "the 134 M original": {**common, **reference},
        }
        for name, settings in rows.items():
            for size in dict.fromkeys((1, most)):
                # a fresh process, so that the memory is that of this row
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    row = pool.apply(measure, ({**settings, "batch_size": size}, count))
                parameters, frames, batches, speed, peak = row
                shown = "1" if size == 1 else f"up to {size}, by size"
                print(
                    f"| {name} | {parameters:.1f} | {shown} | {frames} | {batches} | {speed:.2f} | {peak:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
