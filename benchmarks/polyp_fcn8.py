"""Compare speed and memory of polyp_fcn8 with the original network of 134 million parameters, with and without batches.

The inferer and the loader of inference.json run with random weights, which does not change the speed. Each row has its
own process. Reading frames and writing masks are not timed.

    python benchmarks/polyp_fcn8.py [--dataset_dir FOLDER] [--frames 16 --batch_size 8 --amp true --device cpu ...]

Without a folder the frames are synthetic: half of them 384 x 288 pixels, like those of CVC-ClinicDB, and half
574 x 500, like those of CVC-300. Other options are knobs of inference.json.
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
    """Return parameters in millions, frames, batches, frames per second and peak memory in MB."""
    import torch
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    parser.update({key: value for key, value in settings.items() if key in parser.config})
    parser.update({"bundle_root": str(CONFIGS.parent), "weights": None, "dataset::data": f"$list(@cases)[:{count}]"})
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
    print(
        "| network | million parameters | frames per batch | frames | batches | frames per second | peak memory (MB) |"
    )
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
                # a new process, so that the peak memory is that of this row
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
