"""Print every table of speed and memory, and write those of the model cards.

    python benchmarks/all.py --data D [--quick] [--bundle polyp_fcn8] [--only stages training] [--write]

D has one folder per bundle with its prepared data, named like the bundle; `polyp_fcn8_folds` beside it, a folder of
`segbundles crossvalidate`, adds the table of views, which needs cases that were not used for training. All of it takes
about an hour on two cores without other work. `--quick` takes fewer images, steps and runs. `--write` writes the tables
of a bundle to its `docs/figures/` as CSV, with the machine in the last line; then write the pages with `python
benchmarks/cards.py`.
Benchmarks that train for an hour are not among these: `adapt.py` and `left_atrium_rows.py`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import memory
import scale
import stages
import training
from tables import BUNDLES, ROOT, Table, machine

import engines

# (side, pages, block) of large EM images, in pixels
LARGE = [(20000, 1, 4096), (512, 30, 1024), (512, 300, 1024)]
LARGE_QUICK = [(1200, 1, 1024), (512, 6, 1024)]
# pages that the shipped weights segment, one view
TRAINED, TRAINED_QUICK = [(4608, 1, 4096)], [(1100, 1, 1024)]
# one view of a section; the default averages four
PLAIN_SECTION = {"mirror_axes": [], "quarter_turns": False}
# benchmarks that print tables of their own, and what makes them quick
OTHERS = {
    "two_stage.py": ["--size", "160", "160", "44", "--extent", "50", "30", "18", "--roi_size", "64", "48", "32"],
    "distance_map.py": ["--repeats", "1"],
    "polyp_fcn8.py": ["--frames", "2"],
}


def every_stages(name: str, data: Path, quick: bool) -> dict[str, Table]:
    """Return the stages of a bundle's inference."""
    with tempfile.TemporaryDirectory() as folder:
        image = stages.first_image(name, data, Path(folder))
        return {"stages": stages.table(ROOT / "bundles" / name, image, 1 if quick else 2)}


def every_engines(name: str, data: Path, quick: bool) -> dict[str, Table]:
    """Return what each engine takes."""
    knobs = PLAIN_SECTION if name == "em_membrane_unet" else {}
    size = {"runs": 1, "only": "openvino"} if quick else {"runs": 5}
    return {"engines": engines.table(ROOT / "bundles" / name, data / name, cases=1, knobs=knobs, **size)}


def every_views(name: str, data: Path, quick: bool) -> dict[str, Table]:
    """Return what mirrored and turned views take and bring, where there is a cross-validation."""
    folds = data / f"{name}_folds"
    if not engines.unseen(folds):
        print(f"\nNo table of views: {folds} has no cross-validation.")
        return {}
    return {"views": engines.table(ROOT / "bundles" / name, folds, True, cases=1 if quick else 0, runs=0)}


def every_training(name: str, data: Path, quick: bool) -> dict[str, Table]:
    """Return the steps of a bundle's training."""
    return {"steps": training.table(data, [name], quick)}


def every_threads(name: str, data: Path, quick: bool) -> dict[str, Table]:
    """Return what too many threads cost."""
    return {"threads": scale.threads(name, data, 4 if quick else 32)} if name == "polyp_fcn8" else {}


def every_memory(name: str, data: Path, quick: bool) -> dict[str, Table]:
    """Return the memory of a bundle's commands, and of large images."""
    found = {"memory": memory.table(data, [name], quick)}
    if name == "em_membrane_unet":
        found["large"] = memory.large(LARGE_QUICK if quick else LARGE)
        found["large"].rows += memory.large(TRAINED_QUICK if quick else TRAINED, trained=True).rows
    return found


def every_scale(name: str, data: Path, quick: bool) -> dict[str, Table]:
    """Return what an image costs in small and large folders."""
    if name != "polyp_fcn8":
        return {}
    return {"scale": scale.table(name, data, [4, 8] if quick else [10, 100, 1000], [1, 2])}


#: what is measured of each bundle; the tables have the names of files in docs/figures
KINDS: dict[str, Callable[[str, Path, bool], dict[str, Table]]] = {
    "stages": every_stages,
    "engines": every_engines,
    "views": every_views,
    "training": every_training,
    "threads": every_threads,
    "memory": every_memory,
    "scale": every_scale,
}


def measure(names: Sequence[str], kinds: Sequence[str], data: Path, quick: bool, write: bool) -> None:
    """Print, and write, the tables of some kinds."""
    for kind in kinds:
        for name in names:
            for file, table in KINDS[kind](name, data, quick).items():
                table.show()
                if write:
                    figures = ROOT / "bundles" / name / "docs/figures"
                    table.write(figures / f"{file}.csv", f"{table.title}. Measured on {machine()}.")


def main() -> None:
    """Print, and write, the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundle", nargs="+", choices=BUNDLES, default=BUNDLES)
    parser.add_argument("--only", nargs="+", choices=[*KINDS, "others"], default=[*KINDS, "others"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    since = time.perf_counter()
    print(machine())
    measure(
        options.bundle, [kind for kind in KINDS if kind in options.only], options.data, options.quick, options.write
    )
    if "others" in options.only:
        for script, quick in OTHERS.items():
            print(f"\n{script}\n", flush=True)
            words = [sys.executable, str(Path(__file__).with_name(script)), *(quick if options.quick else [])]
            subprocess.run(words, check=True)
    print(f"\nAll of this took {(time.perf_counter() - since) / 60:.0f} minutes.")


if __name__ == "__main__":
    main()
