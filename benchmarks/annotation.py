"""Simulate annotation: does a model get better when a person labels the images first of which it is least certain?

    python benchmarks/annotation.py brain_flair_unet D --out O [--pool 40] [--steps 250] [--seeds 0 1 2]
    python benchmarks/annotation.py polyp_fcn8 --out O --quick

A training starts with 2 labels drawn at random. Then a person labels as many more as there are, until 16: either those
of which the model is the least certain (column `confidence` of metrics.csv), or others at random. Both ways share the
first model. Each model is trained anew, without validation, for about `--steps` steps, and scored on the validation
split of D, without mirror images. A label is one patient (`brain_flair_unet`) or
one frame; candidates are the training split, or `--pool` of them, drawn at random for each seed.

Results are kept in O/results.json: a run that was stopped goes on where it was, and the same command gives the same
results. The table at the end is in O/annotation.csv, too. Words after `--` are knobs of the training, such as
`-- --base_channels 8`. `--quick` draws a small phantom and trains a few steps with 2 and 4 labels, to see that
everything works.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from tables import Table, machine

from segbundles.commands import find_bundle
from segbundles.files import DATALIST_NAME, read_json, read_table, write_json
from segbundles.phantoms.brain import make_phantom as make_brains
from segbundles.phantoms.polyp import make_phantom as make_polyps

# what a person labels at once: the entry of the datalist, and its name
UNIT = {"brain_flair_unet": ("group", "patient"), "polyp_fcn8": ("case", "frame")}
STRATEGIES = ("least certain first", "random")


def segbundles(log: Path, *words: object) -> None:
    """Run the command; its output goes to a file, whose end is shown if it fails."""
    with log.open("w", encoding="utf-8") as out:
        command = [sys.executable, "-m", "segbundles", *map(str, words)]
        if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode:
            sys.exit(f"{' '.join(command)}\nfailed; the end of {log}:\n{log.read_text(encoding='utf-8')[-2000:]}")


class Simulation:
    """One bundle, one data set, and everything that was computed so far.

    Args:
        bundle: name or folder of the bundle.
        data: prepared data set.
        out: folder of the results.
        labels: numbers of labels to train with, ascending.
        steps: steps of each training, which are filled up to whole epochs.
        batch_size: images per step.
        pool: number of candidates; None for all.
        knobs: further knobs, as words.
    """

    def __init__(
        self,
        bundle: str,
        data: Path,
        out: Path,
        labels: list[int],
        steps: int,
        batch_size: int,
        pool: int | None,
        knobs: list[str],
    ) -> None:
        self.bundle, self.out, self.labels, self.knobs = bundle, out, labels, knobs
        self.steps, self.batch_size, self.pool = steps, batch_size, pool
        self.list = read_json(data / DATALIST_NAME)
        self.unit, self.unit_name = UNIT[find_bundle(bundle).name]
        for split in ("training", "validation"):
            for entry in self.list[split]:
                entry |= {key: str((data / entry[key]).resolve()) for key in ("image", "label")}
        self.units = sorted({str(entry[self.unit]) for entry in self.list["training"]})
        self.results: dict[str, dict[str, Any]] = {}
        self.record = out / "results.json"
        out.mkdir(parents=True, exist_ok=True)
        self.settings = {"bundle": bundle, "labels": labels, "steps": steps, "batch_size": batch_size}
        self.settings |= {"pool": pool, "knobs": knobs}
        if self.record.is_file():
            kept = read_json(self.record)
            if kept["settings"] != self.settings:
                sys.exit(f"{self.record} has other settings, {kept['settings']}: give another --out.")
            self.results = kept["results"]

    def run(self, seed: int, strategy: str) -> None:
        """Label, train and score, step by step."""
        random = np.random.default_rng(seed)
        candidates = random.permutation(self.units)[: self.pool].tolist()
        chosen = candidates[: self.labels[0]]
        for number, following in zip(self.labels, [*self.labels[1:], None], strict=True):
            first = number == self.labels[0]  # the same for both strategies
            key = f"{'start' if first else strategy}, seed {seed}, {number} labels"
            found = self.results.get(key)
            certain = strategy == STRATEGIES[0] and following is not None
            if found is None or found["labels"] != chosen or (certain and not found["confidence"]):
                found = {"labels": chosen, **self._trained(seed, chosen, candidates if certain else [])}
                self.results[key] = found
                write_json(self.record, {"settings": self.settings, "results": self.results})
                print(f"{key}: Dice {found['dice']:.4f}", flush=True)
            if following is None:
                return
            left = [unit for unit in candidates if unit not in chosen]
            if certain:
                left.sort(key=found["confidence"].__getitem__)
            else:
                left = random.permutation(left).tolist()
            chosen = chosen + left[: following - number]

    def _trained(self, seed: int, chosen: list[str], candidates: list[str]) -> dict[str, Any]:
        """Train with some labels; return the score and, of the other candidates, the confidence."""
        work = self.out / "work"
        shutil.rmtree(work, ignore_errors=True)
        chosen_entries = [entry for entry in self.list["training"] if str(entry[self.unit]) in chosen]
        asked = [entry for entry in self.list["training"] if str(entry[self.unit]) in {*candidates} - {*chosen}]
        # two lists: frames of a sequence that is in training are among the candidates
        lists = {"training": chosen_entries, "testing": [*self.list["validation"], *asked]}
        for split, entries in lists.items():
            (work / split).mkdir(parents=True)
            empty = {"training": [], "validation": [], "testing": []}
            write_json(work / split / DATALIST_NAME, {**self.list, **empty, split: entries})
        epochs = math.ceil(self.steps / math.ceil(len(chosen_entries) / self.batch_size))
        words = ["--seed", seed, "--max_epochs", epochs, "--lr_epochs", epochs, "--val_interval", epochs]
        words += ["--batch_size", self.batch_size, *self.knobs]
        segbundles(work / "train.txt", "train", self.bundle, work / "training", work / "model", *words)
        words = ["--ckpt_dir", work / "model" / "models", "--split", "testing", "--mirror_axes", "[]"]
        segbundles(work / "evaluate.txt", "evaluate", self.bundle, work / "testing", work / "evaluation", *words)
        scored = {str(entry[self.unit]) for entry in self.list["validation"]}
        rows = {row[self.unit]: row for row in read_table(work / "evaluation" / "metrics.csv")}
        shutil.rmtree(work)
        return {
            "dice": fmean(float(row["dice"]) for unit, row in rows.items() if unit in scored),
            "confidence": {unit: float(row["confidence"]) for unit, row in rows.items() if unit not in scored},
        }

    def table(self, seeds: list[int]) -> Table:
        """Return the scores: mean and deviation of the seeds."""
        table = Table(f"Simulated annotation, {self.unit_name}s", ("labels", *STRATEGIES, "difference, per seed"))
        for number in self.labels:
            names = ["start"] * 2 if number == self.labels[0] else STRATEGIES
            dice = [[self.results[f"{name}, seed {seed}, {number} labels"]["dice"] for seed in seeds] for name in names]
            cells = [f"{fmean(one):.3f}" + (f" (sd {stdev(one):.3f})" if len(one) > 1 else "") for one in dice]
            gains = ", ".join(f"{a - b:+.3f}" for a, b in zip(*dice, strict=True))
            table.rows.append((str(number), *cells, gains))
        return table

    def note(self, seeds: list[int]) -> str:
        """Say what was measured, in one line."""
        scored = len({entry[self.unit] for entry in self.list["validation"]})
        knobs = "".join(f" {Path(word).name if Path(word).is_file() else word}" for word in self.knobs)
        return (
            f"Mean Dice of {scored} unseen {self.unit_name}s, {len(seeds)} seeds, {self.bundle}: networks trained anew "
            f"for about {self.steps} steps of {self.batch_size}, {self.pool or len(self.units)} candidates, "
            f"no mirror images{',' * bool(knobs)}{knobs}. Measured on {machine()}."
        )


def main() -> None:
    """Read the command line."""
    words = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", choices=list(UNIT))
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--labels", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--steps", type=int, default=250, help="of each training")
    parser.add_argument("--batch_size", type=int, default=8, help="images per step")
    parser.add_argument("--pool", type=int, help="number of candidates; without it, all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(sys.argv[1 : len(sys.argv) - len(words) - bool(words)])
    if options.quick:
        options.data, options.labels, options.steps, options.seeds = options.out / "phantom", [2, 4], 4, [0]
        if not (options.data / DATALIST_NAME).is_file():
            make = {"brain_flair_unet": (make_brains, 12, 0, (32, 32), 6), "polyp_fcn8": (make_polyps, 10, 4)}
            function, *arguments = make[options.bundle]
            function(options.data, *arguments)
        args = read_json(find_bundle(options.bundle) / "configs" / "args_quickstart.json")
        short = {
            key: value for key, value in args.items() if not key.endswith(("_", "_epochs", "_interval", "batch_size"))
        }
        words = [word for key, value in short.items() for word in (f"--{key}", json.dumps(value))] + words
    if options.data is None:
        parser.error("give the folder of a prepared data set, or --quick")
    budget = (options.labels, options.steps, options.batch_size, options.pool)
    simulation = Simulation(options.bundle, options.data, options.out, *budget, words)
    for seed in options.seeds:
        for strategy in STRATEGIES:
            simulation.run(seed, strategy)
    table = simulation.table(options.seeds)
    table.show()
    table.write(options.out / "annotation.csv", simulation.note(options.seeds))


if __name__ == "__main__":
    main()
