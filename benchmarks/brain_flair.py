"""Measure how long brain_flair_unet takes to read and augment slices, and to segment them.

First it fills the cache with the training patients, as training does, and draws the slices of two epochs without a
network. Then it segments the validation patients with the bundle's inferer, with and without mirror images. The network
has random weights, which does not change the speed.

    segbundles prepare lgg --source kaggle_3m --out D
    python benchmarks/brain_flair.py --dataset_dir D [--batch_size 16 ...]
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch
from monai.bundle import ConfigParser

from segbundles.inferers import AutocastInferer

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "brain_flair_unet"


def resident_mib() -> float:
    """Return the memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def setting(text: str) -> object:
    """Return a number, a list or null if the text is one in JSON, otherwise the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def main() -> None:
    """Measure and print the table."""
    values = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=False))
    if "--dataset_dir" not in values or len(sys.argv) % 2 == 0:
        sys.exit(__doc__)
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / "configs" / name) for name in ("train.json", "evaluate.json")])
    parser.update({"bundle_root": str(BUNDLE), "weights": None, "validate::dataset::cache_rate": 0})
    parser.update({key.removeprefix("--"): setting(value) for key, value in values.items()})
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
    mirrored = parser.get_parsed_content("validate::inferer")
    plain = AutocastInferer(mirrored.inferer.inferer, mirrored.enabled)
    inferers = {"with": mirrored, "without": plain}
    spent = dict.fromkeys(inferers, 0.0)
    device = parser.get_parsed_content("device")
    since, segmented = time.perf_counter(), 0
    with torch.no_grad():
        for patient in parser.get_parsed_content("validate::dataset"):
            image = patient["image"][None].to(device)
            segmented += image.shape[-1]
            for name, inferer in inferers.items():
                begun = time.perf_counter()
                inferer(image, network)
                spent[name] += time.perf_counter() - begun
    reading = time.perf_counter() - since - sum(spent.values())
    rows.append(f"| reading and normalising {segmented} slices | {reading:.1f} | {segmented / reading:.0f} |")
    for name, seconds in spent.items():
        rows.append(f"| segmenting them {name} mirror images | {seconds:.1f} | {segmented / seconds:.0f} |")
    print("| what | seconds | slices per second |\n|---|---|---|", *rows, sep="\n")
    print(f"\nThe cache holds {held:.0f} MiB for {count} slices, {held * 3929 / count:.0f} MiB for all 3,929.")


if __name__ == "__main__":
    main()
