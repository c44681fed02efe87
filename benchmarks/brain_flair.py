"""What reading costs brain_flair_unet, and how fast it segments.

Fills the cache of the training patients as training does, then draws the slices of two epochs from it, without a
network; and segments the validation patients slice by slice with the bundle's network and inferer, reading included
and not. Shipped weights are not needed.

    segbundles prepare lgg --source kaggle_3m --out D
    python benchmarks/brain_flair.py --dataset_dir D [--batch_size 16 ...]
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch
from monai.bundle import ConfigParser

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "brain_flair_unet"


def resident_mib() -> float:
    """Memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    """Measure and print the table."""
    values = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=False))
    if "--dataset_dir" not in values or len(sys.argv) % 2 == 0:
        sys.exit(__doc__)
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs" / "train.json"))
    parser.update({"bundle_root": str(BUNDLE), "validate::dataset::cache_rate": 0})
    parser.update({key.removeprefix("--"): value for key, value in values.items()})
    parser.parse()
    rows = []

    def measured(title: str, since: float, slices: int) -> None:
        spent = time.perf_counter() - since
        rows.append(f"| {title} | {spent:.1f} | {slices / spent:.0f} |")

    before, since = resident_mib(), time.perf_counter()
    slices = parser.get_parsed_content("train::slices")
    count = len(slices)
    measured(f"reading {count} slices into the cache, once", since, count)
    held = resident_mib() - before
    loader = parser.get_parsed_content("train::dataloader")
    for epoch in (1, 2):
        since = time.perf_counter()
        drawn = sum(len(batch["image"]) for batch in loader)
        measured(f"epoch {epoch}: drawing and augmenting {drawn} slices, no network", since, drawn)

    network = parser.get_parsed_content("network").eval()
    inferer = parser.get_parsed_content("validate::inferer")
    patients = parser.get_parsed_content("validate::dataset")
    since, spent, segmented = time.perf_counter(), 0.0, 0
    with torch.no_grad():
        for patient in patients:
            begun = time.perf_counter()
            inferer(patient["image"][None].to(parser.get_parsed_content("device")), network)
            spent += time.perf_counter() - begun
            segmented += patient["image"].shape[-1]
    measured(f"reading and segmenting {segmented} slices", since, segmented)
    rows.append(f"| of that, network and inferer | {spent:.1f} | {segmented / spent:.0f} |")
    print("| what | seconds | slices a second |\n|---|---|---|", *rows, sep="\n")
    print(f"\nThe cache holds {held:.0f} MiB for {count} slices, {held * 3929 / count:.0f} MiB for all 3,929.")


if __name__ == "__main__":
    main()
