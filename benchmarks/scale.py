"""Measure what an image costs in a folder of 10, 100 and 1,000, in one process and in several.

    python benchmarks/scale.py --data D [--bundle polyp_fcn8] [--images 10 100 1000] [--processes 1 2] [--quick]

D has one folder per bundle with its prepared data; its validation images are linked as often as needed. Each run is a
process of its own, or torchrun with several, with the settings of the bundle but without mirror images. `--quick` takes
4 and 8 images.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import cycle
from pathlib import Path

from tables import ROOT, Table, child, images, machine, some_cases

from segbundles.threads import usable_cores

HEADS = ("bundle", "images", "processes", "seconds", "seconds per image", "times as fast as one process")


def folder_of(source: list[Path], count: int, out: Path) -> Path:
    """Link so many images into a folder, each of the given ones in turn."""
    out.mkdir(parents=True)
    for number, path in zip(range(count), cycle(source)):
        name = f"{number:05d}"
        (out / (name if path.is_dir() else f"{name}{path.suffix}")).symlink_to(path.resolve())
    return out


def command(bundle: Path, data: Path, out: Path, processes: int) -> list[object]:
    """Return the command that segments a folder in so many processes."""
    configs = bundle / "configs"
    files = [configs / "inference.json", configs / "multi_gpu_inference.json"][: 1 if processes == 1 else 2]
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    words = [*start, "-m", "monai.bundle", "run", "inferring", "--bundle_root", bundle]
    knobs = ["--dataset_dir", data, "--output_dir", out]
    if "mirror_axes" in (configs / "inference.json").read_text(encoding="utf-8"):
        knobs += ["--mirror_axes", "[]"]
    return [sys.executable, *words, "--config_file", str(list(map(str, files))), *knobs]


def table(name: str, data: Path, counts: list[int], processes: list[int]) -> Table:
    """Measure one bundle."""
    found = Table(f"What an image costs: {name}", HEADS)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        few = some_cases(data / name, out / "data", {"validation": max(counts)})
        source = sorted(images(few, out / "images").iterdir())
        for count in counts:
            given, alone = folder_of(source, count, out / f"given_{count}"), 0.0
            for number in processes:
                spent, _ = child(command(ROOT / "bundles" / name, given, out / f"masks_{count}_{number}", number))
                alone = alone or spent
                cells = f"{spent:.0f}", f"{spent / count:.2f}", f"{alone / spent:.2f}"
                found.rows.append([name, str(count), str(number), *cells])
    return found


def threads(name: str, data: Path, count: int, processes: int = 2) -> Table:
    """Compare processes that each take all cores with processes that share them, as the bundle chooses."""
    heads = ("bundle", "images", "processes", "threads of each process", "milliseconds per image", "times as fast")
    found, first = Table("Threads", heads), 0.0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        few = some_cases(data / name, out / "data", {"validation": count})
        given = folder_of(sorted(images(few, out / "images").iterdir()), count, out / "given")
        for number in (usable_cores(), max(1, usable_cores() // processes)):
            words = command(ROOT / "bundles" / name, given, out / f"masks_{number}", processes)
            spent = child([*words, "--num_threads", number])[0]
            first = first or spent
            cells = f"{1000 * spent / count:.0f}", f"{first / spent:.2f}"
            found.rows.append((name, str(count), str(processes), str(number), *cells))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundle", default="polyp_fcn8")
    parser.add_argument("--images", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    print(machine())
    table(options.bundle, options.data, [4, 8] if options.quick else options.images, options.processes).show()


if __name__ == "__main__":
    main()
