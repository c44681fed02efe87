"""Time the steps of a training with and without loading, with the loader of the bundles and with MONAI's.

    python benchmarks/training.py --data D [--bundle polyp_fcn8 ...] [--quick] [--num_workers N] [-- --knob value ...]

D has one folder per bundle with its prepared data. The loaders take turns, an epoch each, and after each epoch as many
steps follow on batches that are there already: these take what the network needs. MONAI's loader starts its workers
again in each epoch. On a CPU no worker is used by default, so there is a second pair of rows with two workers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader
from tables import BUNDLES, ROOT, Table, machine, some_cases

import segbundles.bundle  # noqa: F401
from segbundles.check import read_overrides

HEADS = ("bundle", "loader", "workers", "steps", "network (ms per step)", "with loading (ms per step)", "ratio")


class Measured:
    """The parts of a training that is measured."""

    def __init__(self, bundle: Path, data: Path, steps: int, settings: dict[str, Any]) -> None:
        parser = ConfigParser()
        parser.read_config(str(bundle / "configs" / "train.json"))
        given = {"bundle_root": str(bundle), "dataset_dir": str(data), "train::dataset::progress": False, **settings}
        batch = given.get("batch_size", parser["batch_size"])
        if "slices_per_epoch" in parser.config:
            given.setdefault("slices_per_epoch", steps * batch)
        parser.update(given)
        parser.get_parsed_content("initialize")
        parts = ("network", "loss", "optimizer", "device", "num_workers")
        self.network, self.loss, self.optimizer, self.device, self.workers = map(parser.get_parsed_content, parts)
        self.inferer = parser.get_parsed_content("train::inferer")
        self.ours = parser.get_parsed_content("train::dataloader")
        sampler = self.ours.sampler.sampler
        self.theirs = DataLoader(
            self.ours.dataset.dataset, batch_size=self.ours.batch_size, sampler=sampler, num_workers=self.workers
        )
        self.network.train()

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """Take a step, as MONAI's trainer does."""
        image, label = batch["image"].to(self.device), batch["label"].to(self.device)
        self.optimizer.zero_grad()
        loss = self.loss(self.inferer(image, self.network), label)
        loss.backward()
        self.optimizer.step()
        loss.item()  # the log of each step waits for the device

    def epoch(self, loader: DataLoader) -> tuple[float, float, int]:
        """Return the seconds of an epoch, those of as many steps on batches that are there, and the steps."""
        since, kept, count = time.perf_counter(), [], 0
        for batch in loader:
            self.step(batch)
            kept = [*kept[-3:], batch]
            count += 1
        spent, since = time.perf_counter() - since, time.perf_counter()
        for number in range(count):
            self.step(kept[number % len(kept)])
        return spent, time.perf_counter() - since, count


def few_cases(name: str, data: Path, out: Path, quick: bool) -> tuple[Path, int, int]:
    """Return a folder with a list of a few cases, the steps of an epoch, and the number of epochs."""
    steps, epochs = (2, 1) if quick else (24, 3) if torch.cuda.is_available() else (4, 2)
    counts = {"brain_flair_unet": 2, "em_membrane_unet": max(1, steps // 2), "polyp_fcn8": 8 * steps}
    return some_cases(data / name, out, {"training": counts.get(name, steps)}), steps, epochs


def measure(name: str, data: Path, quick: bool, settings: dict[str, Any]) -> list[list[str]]:
    """Return the rows of one bundle."""
    with tempfile.TemporaryDirectory() as folder:
        cases, steps, epochs = few_cases(name, data, Path(folder), quick)
        measured = Measured(ROOT / "bundles" / name, cases, steps, settings)
        loaders = {"MONAI's": measured.theirs, "the bundle's": measured.ours}
        found: dict[str, list[tuple[float, float]]] = {which: [] for which in loaders}
        for number in range(epochs + 1):
            for which, loader in loaders.items():
                spent, network, count = measured.epoch(loader)
                if number:  # the first one warms up
                    found[which].append((spent / count, network / count))
    rows = []
    network = median(one for values in found.values() for _, one in values)
    for which, values in found.items():
        loading = median(one for one, _ in values)
        cells = f"{1000 * network:.1f}", f"{1000 * loading:.1f}", f"{loading / network:.2f}"
        rows.append([name, which, str(measured.workers), str(count), *cells])
    return rows


def table(data: Path, bundles: list[str], quick: bool, settings: dict[str, Any] | None = None) -> Table:
    """Measure bundles and return the table."""
    device = "GPU" if torch.cuda.is_available() else "CPU"
    found = Table(f"Steps of a training on a {device}", HEADS)
    more = [{}] if torch.cuda.is_available() or "num_workers" in (settings or {}) else [{}, {"num_workers": 2}]
    for name in bundles:
        found.rows += [row for one in more for row in measure(name, data, quick, {**(settings or {}), **one})]
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundle", nargs="+", default=list(BUNDLES), choices=BUNDLES)
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    options, rest = parser.parse_known_args()
    knobs = read_overrides([word for word in rest if word != "--"], ROOT / "bundles" / options.bundle[0])
    print(machine())
    table(options.data, options.bundle, options.quick, knobs).show()


if __name__ == "__main__":
    main()
