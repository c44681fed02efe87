"""Print every table of speed and memory, and write those of the model cards.

    python benchmarks/all.py --data D [--quick] [--only stages training] [--write]

D has one folder per bundle with its prepared data, named like the bundle. It takes about half an hour on two cores
without other work. `--quick` takes fewer images, steps and runs. `--write` writes the tables of a bundle to its
`docs/figures/` as CSV, with the machine in its last row; then write the pages with `python benchmarks/cards.py`.
Benchmarks that train for an hour are not among these: `adapt.py` and `left_atrium_rows.py`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import memory
import scale
import stages
import training
from tables import BUNDLES, ROOT, Table, machine

# (side, pages) of large EM images
LARGE = [(20000, 1), (1024, 30), (1024, 300)]
LARGE_QUICK = [(4096, 1), (1024, 20)]
# benchmarks that print tables of their own, and what makes them quick
OTHERS = {
    "two_stage.py": ["--size", "160", "160", "44", "--extent", "50", "30", "18", "--roi_size", "64", "48", "32"],
    "distance_map.py": ["--repeats", "1"],
    "polyp_fcn8.py": ["--frames", "2"],
}


def every_stages(data: Path, quick: bool) -> dict[str, Table]:
    """Return the stages of each bundle's inference."""
    found = {}
    for name in BUNDLES:
        with tempfile.TemporaryDirectory() as folder:
            image = stages.first_image(name, data, Path(folder))
            table = stages.table(ROOT / "bundles" / name, image, 1 if quick else 3)
            found[f"bundles/{name}/docs/figures/stages.csv"] = table
    return found


def every_training(data: Path, quick: bool) -> dict[str, Table]:
    """Return the steps of each bundle's training."""
    return {f"bundles/{name}/docs/figures/steps.csv": training.table(data, [name], quick) for name in BUNDLES}


def every_memory(data: Path, quick: bool) -> dict[str, Table]:
    """Return the memory of each bundle's commands, and of large images."""
    found = {f"bundles/{name}/docs/figures/memory.csv": memory.table(data, [name], quick) for name in BUNDLES}
    large = memory.large(LARGE_QUICK if quick else LARGE, 4096, trained=False)
    return {**found, "bundles/em_membrane_unet/docs/figures/large.csv": large}


def every_scale(data: Path, quick: bool) -> dict[str, Table]:
    """Return what an image costs in small and large folders."""
    counts = [4, 8] if quick else [10, 100, 1000]
    return {"bundles/polyp_fcn8/docs/figures/scale.csv": scale.table("polyp_fcn8", data, counts, [1, 2])}


KINDS: dict[str, Callable[[Path, bool], dict[str, Table]]] = {
    "stages": every_stages,
    "training": every_training,
    "memory": every_memory,
    "scale": every_scale,
}


def main() -> None:
    """Print, and write, the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=[*KINDS, "others"], default=[*KINDS, "others"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    since = time.perf_counter()
    print(machine())
    for kind, function in KINDS.items():
        if kind not in options.only:
            continue
        for path, table in function(options.data, options.quick).items():
            table.show()
            if options.write:
                table.rows.append([f"measured on {machine()}", *[""] * (len(table.heads) - 1)])
                table.write(ROOT / path)
    if "others" in options.only:
        for script, quick in OTHERS.items():
            print(f"\n{script}\n", flush=True)
            words = [sys.executable, str(Path(__file__).with_name(script)), *(quick if options.quick else [])]
            subprocess.run(words, check=True)
    print(f"\nAll of this took {(time.perf_counter() - since) / 60:.0f} minutes.")


if __name__ == "__main__":
    main()
