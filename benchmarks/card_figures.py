"""Make the pictures of a model card from the files of trainings and evaluations.

    python benchmarks/card_figures.py --training O/tensorboard/RUN --evaluation O/evaluation --out DOCS

RUN is the folder of one training, such as `training_2026-01-31_12-00-00`. Both options may be given several times. It
writes `curves.png`, and the best, median and worst case of each evaluation as `<folder>_best`, `<folder>_median` and
`<folder>_worst` (by Dice, or by `--metric`), and prints which cases they are.
"""

from __future__ import annotations

import argparse
import base64
import csv
import html
import re
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PICTURE = re.compile(r'<img src="data:image/(\w+);base64,([^"]+)"[^>]*? alt="([^"]*): image with truth and')


def curves(folders: list[Path], path: Path) -> None:
    """Draw the training loss and the validation metric, one row per training."""
    figure = Figure(figsize=(9, 2.8 * len(folders)), layout="constrained")
    axes = figure.subplots(len(folders), 2, squeeze=False)
    for (left, right), folder in zip(axes, folders, strict=True):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        tags = events.Tags()["scalars"]
        metric = next((tag for tag in tags if tag.startswith("val_") and tag != "val_loss"), None)
        if "train_loss" not in tags or metric is None:
            sys.exit(f"{folder} has no train_loss or no validation metric: its scalars are {tags}")
        for ax, tag in ((left, "train_loss"), (right, metric)):
            steps, values = zip(*((e.step, e.value) for e in events.Scalars(tag)), strict=True)
            window = max(1, len(values) // 100)
            smooth = np.convolve(values, np.ones(window) / window, mode="valid")
            marker = "o" if len(values) < 50 else None
            ax.plot(steps[window - 1 :], smooth, color="#0072B2", linewidth=1.2, marker=marker, markersize=3)
            mean = f", mean of {window} steps" if window > 1 else ""
            ax.set_title(f"{folder.name}: {tag}{mean}", fontsize=9)
            ax.set_xlabel("step" if tag == "train_loss" else "epoch")
            ax.grid(color="0.9")
            ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def cases(folder: Path, out: Path, metric: str) -> None:
    """Write the pictures of the best, the median and the worst case of an evaluation."""
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        scores = sorted((float(row[metric]), row["case"]) for row in csv.DictReader(file) if row[metric])
    report = (folder / "report.html").read_text(encoding="utf-8")
    pictures = {html.unescape(name): (kind, data) for kind, data, name in PICTURE.findall(report)}
    for which, (value, case) in {"worst": scores[0], "median": scores[len(scores) // 2], "best": scores[-1]}.items():
        kind, data = pictures[case]
        path = out / f"{folder.name}_{which}.{kind}"
        path.write_bytes(base64.b64decode(data))
        print(f"{path.name}: {case}, {metric} {value:.3f}")


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--training", type=Path, action="append", default=[], help="folder of a training's curves")
    parser.add_argument("--evaluation", type=Path, action="append", default=[], help="an output_dir of evaluating")
    parser.add_argument("--metric", default="dice", help="column of metrics.csv; larger must be better")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.training:
        curves(options.training, options.out / "curves.png")
    for folder in options.evaluation:
        cases(folder, options.out, options.metric)


if __name__ == "__main__":
    main()
