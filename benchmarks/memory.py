"""Measure seconds and peak memory of each command, in a process of its own; also of large EM pages and long stacks.

    python benchmarks/memory.py --data D [--bundle polyp_fcn8 ...] [--quick]
    python benchmarks/memory.py --page 20000 | --stack 300 [--trained]

D has one folder per bundle with its prepared data, of which a few cases are used: an epoch of a training, an evaluation
and an inference, with the settings of the bundle. `--quick` measures the inference only.

`--page` segments one synthetic EM page of so many pixels a side, and `--stack` so many pages of 512 x 512, with the
steps of `inference.json` without mirror images, in blocks of 4096 and of 1024 pixels (`--block_pixels`). A stand-in for
the network takes what is dark for membrane, because the memory does not depend on how long the network takes;
`--trained` runs the shipped weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import tifffile
import torch
from tables import BUNDLES, ROOT, Table, child, images, machine, some_cases

EM = ROOT / "bundles" / "em_membrane_unet"
STACK_SIDE = 512
# cases of each split
COUNTS = {"left_atrium_vnet": 2, "brain_flair_unet": 2, "em_membrane_unet": 2, "polyp_fcn8": 16}
# knobs that make a command shorter without a change of its memory
SHORTER = {
    "brain_flair_unet": {"train": ("--slices_per_epoch", 64)},
    "em_membrane_unet": dict.fromkeys(("segment", "evaluate"), ("--mirror_axes", "[]", "--quarter_turns", "false")),
}


class DarkIsMembrane(torch.nn.Module):
    """Take what is darker than the mean of an EM section for membrane."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = 25 * (x - 0.42)
        return torch.cat([-logits, logits], dim=1)


def of_bundle(name: str, data: Path, quick: bool) -> list[list[str]]:
    """Return a row for each command of a bundle."""
    bundle = ROOT / "bundles" / name
    segbundles = (sys.executable, "-m", "segbundles")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        cases = some_cases(data / name, out / "data", {"training": COUNTS[name], "validation": COUNTS[name]})
        seen = images(cases, out / "images")
        short = ("--max_epochs", 1, "--lr_epochs", 1, "--val_interval", 1, "--ckpt_dir", out / "models")
        commands = {
            "segment": (*segbundles, "segment", bundle, seen, out / "masks"),
            "evaluate": (*segbundles, "evaluate", bundle, cases, out / "evaluation"),
            "train": (*segbundles, "train", bundle, cases, out / "training", *short),
        }
        rows = []
        for command, words in list(commands.items())[: 1 if quick else None]:
            spent, peak = child((*words, *SHORTER.get(name, {}).get(command, ())))
            what = f"{COUNTS[name]} cases" + (" for training, as many for validation, 1 epoch" * (command == "train"))
            rows.append([name, command, what, f"{spent:.0f}", f"{peak:.0f}"])
    return rows


def table(data: Path, bundles: list[str], quick: bool) -> Table:
    """Measure the commands of bundles."""
    found = Table("Memory of each command", ("bundle", "command", "data", "seconds", "peak memory (MiB)"))
    for name in bundles:
        found.rows += of_bundle(name, data, quick)
    return found


def write_pages(path: Path, side: int, pages: int) -> None:
    """Write synthetic EM pages: a phantom section, turned and mirrored, side by side."""
    from segbundles.phantoms.em import make_section

    rng = np.random.default_rng(0)
    tiles = [make_section(rng, (512, 512))[0][0] for _ in range(4)]
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for _ in range(pages):
            page = np.empty((side, side), np.uint8)
            for x in range(0, side, 512):
                for y in range(0, side, 512):
                    tile = np.rot90(tiles[rng.integers(4)], rng.integers(4))
                    page[x : x + 512, y : y + 512] = tile[: side - x, : side - y]
            file.write(page, photometric="minisblack", contiguous=False)


def segment_large(path: Path, out: Path, block_pixels: int, trained: bool) -> None:
    """Segment with inference.json, and say how many seconds it took; runs in a process of its own."""
    from monai.bundle import ConfigParser

    import segbundles.bundle  # noqa: F401

    parser = ConfigParser()
    parser.read_config(str(EM / "configs" / "inference.json"))
    given = {"bundle_root": str(EM), "dataset_dir": str(path), "output_dir": str(out), "block_pixels": block_pixels}
    parser.update({**given, "mirror_axes": [], "quarter_turns": False, "amp": False})
    if not trained:
        parser.update({"handlers::0::_disabled_": True, "network": DarkIsMembrane()})
    parser.get_parsed_content("initialize")
    parser.get_parsed_content("run")


def large(stacks: list[tuple[int, int, int]], trained: bool = False) -> Table:
    """Measure large pages, given as (side, pages, block), in pixels."""
    heads = ("pages", "pixels of a page", "block (pixels)", "network", "seconds", "peak memory (MiB)")
    found = Table("Memory of large EM images, segmented from disk to disk", heads)
    for side, pages, block in stacks:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            path = Path(folder) / "pages.tif"
            write_pages(path, side, pages)
            words = ("--child", path, Path(folder) / "out", block, int(trained))
            spent, peak = child((sys.executable, __file__, *words))
        network = "shipped weights" if trained else "stand-in"
        found.rows.append([str(pages), f"{side} x {side}", str(block), network, f"{spent:.0f}", f"{peak:.0f}"])
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bundle", nargs="+", default=list(BUNDLES), choices=BUNDLES)
    parser.add_argument("--page", type=int, nargs="*", default=[])
    parser.add_argument("--stack", type=int, nargs="*", default=[])
    parser.add_argument("--block_pixels", type=int)
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        path, out, block, trained = options.child
        segment_large(Path(path), Path(out), int(block), bool(int(trained)))
        return
    print(machine())
    if options.data:
        table(options.data, options.bundle, options.quick).show()
    pages = [(side, 1, options.block_pixels or 4096) for side in options.page]
    stacks = [(STACK_SIDE, count, options.block_pixels or 1024) for count in options.stack]
    if pages or stacks:
        large([*pages, *stacks], options.trained).show()


if __name__ == "__main__":
    main()
