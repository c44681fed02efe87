"""Cross-validate a bundle: prepare, train and score each fold with the project's own commands.

    python benchmarks/cross_validation.py --bundle brain_flair_unet --data lgg=kaggle_3m --out O \
        [--folds 4] [--validation-case CASE ...] [--metrics dice slice_dice] [--variant NAME "--key value ..." ...] \
        [--locator] [--csv FILE] [-- --max_epochs 8 ...]

Knobs after `--` apply to training and evaluation; a variant scores the same weights with further knobs. The first table
has one row per fold and variant, the second one the results over all cases, with a 95 % interval of the mean: the cases
of a group are drawn together, 10,000 times (percentile bootstrap). A case that is in the validation split of every fold
(`--validation-case`) counts once, with its mean over the folds. Several `--data` are merged. With `--locator`, a
locator is trained in each fold too. Results that exist in the output folder are not computed again.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median, stdev

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def run(log: Path, *command: str) -> None:
    """Run a Python module; its output goes to a file, whose end is shown if the command fails."""
    with log.open("w", encoding="utf-8") as out:
        args = [sys.executable, "-m", *command]
        code = subprocess.run(args, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        sys.exit(f"{' '.join(args)}\nfailed; the end of {log}:\n{log.read_text(encoding='utf-8')[-2000:]}")


def fold(number: int, options: argparse.Namespace, settings: list[str]) -> dict[str, list[dict[str, str]]]:
    """Train one fold and score its variants; return the rows of metrics.csv by variant."""
    folder = options.out / f"fold{number}"
    forced = [text for case in options.validation_case for text in ("--validation-case", case)]
    data, done = folder / "data", folder / "training.done"
    bundle = ROOT / "bundles" / options.bundle
    train, evaluate = (str(bundle / "configs" / name) for name in ("train.json", "evaluate.json"))
    common = ["--bundle_root", str(bundle), "--dataset_dir", str(data), "--ckpt_dir", str(folder / "models"), *settings]
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        part = ("--folds", str(options.folds), "--fold", str(number))
        prepared = [data] if len(options.data) == 1 else [folder / f"data_{name}" for name, _ in options.data]
        for (name, source), where in zip(options.data, prepared, strict=True):
            given = ("--source", source, "--out", str(where))
            run(folder / f"prepare_{name}.log", "segbundles", "prepare", name, *given, *part, *forced)
        if len(prepared) > 1:
            run(folder / "merge.log", "segbundles", "merge", *map(str, prepared), "--out", str(data))
        out = ("--output_dir", str(folder), "--resume", "true")
        if options.locator:
            # the knobs after -- are the segmenter's
            files = ["--config_file", str(bundle / "configs" / "train_locator.json"), *common[: -len(settings) or None]]
            run(folder / "locator.out", "monai.bundle", "run", "training", *files, *out)
        run(folder / "training.out", "monai.bundle", "run", "training", "--config_file", train, *common, *out)
        done.touch()
    rows = {}
    for name, changes in [("as set", ""), *options.variant]:
        scores = folder / f"evaluation_{name.replace(' ', '_')}"
        if not (scores / "summary.json").is_file():
            both, out = f"['{train}','{evaluate}']", ("--output_dir", str(scores), *changes.split())
            log = folder / f"{scores.name}.log"
            run(log, "monai.bundle", "run", "evaluating", "--config_file", both, *common, *out)
        with (scores / "metrics.csv").open(encoding="utf-8", newline="") as file:
            rows[name] = list(csv.DictReader(file))
    return rows


def values(rows: list[dict[str, str]], metric: str) -> dict[str, float]:
    """Return a metric by case, for the cases that have it."""
    return {row["case"]: float(row[metric]) for row in rows if row.get(metric)}


def group_of(datalist: Path) -> dict[str, str]:
    """Return the group of each case."""
    content = json.loads(datalist.read_text(encoding="utf-8"))
    entries = [entry for split in ("training", "validation", "testing") for entry in content.get(split, [])]
    return {entry["case"]: entry["group"] for entry in entries}


def interval(found: list[float], groups: list[str]) -> tuple[float, float]:
    """Return the 95 % interval of a mean when groups are drawn again, with all their cases."""
    names = sorted(set(groups))
    sums = np.array([sum(v for v, g in zip(found, groups, strict=True) if g == name) for name in names])
    counts = np.array([groups.count(name) for name in names])
    drawn = np.random.default_rng(0).integers(0, len(names), (10_000, len(names)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", required=True)
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        type=lambda text: text.split("=", 1),
        metavar="NAME=SOURCE",
        help="a data set by its name in `segbundles prepare`, and its folder",
    )
    parser.add_argument("--locator", action="store_true", help="train train_locator.json in each fold too")
    parser.add_argument("--csv", type=Path, help="write one row per case and variant")
    parser.add_argument("--out", required=True, type=Path, help="keeps every run")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--validation-case", action="append", default=[])
    parser.add_argument("--metrics", nargs="+", default=["dice"])
    parser.add_argument("--lower_is_better", nargs="*", default=[], help="metrics whose largest value is the worst")
    parser.add_argument("--variant", nargs=2, action="append", default=[], metavar=("NAME", "SETTINGS"))
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, settings = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    if options.folds < 2:
        parser.error(f"--folds must be 2 or more, got {options.folds}")
    folds = []
    for number in range(options.folds):
        print(f"fold {number} ...", file=sys.stderr, flush=True)
        folds.append(fold(number, options, settings))
    variants = list(folds[0])
    missing = [
        metric for metric in options.metrics if not all(values(rows[v], metric) for rows in folds for v in variants)
    ]
    if missing:
        columns = ", ".join(folds[0][variants[0]][0])
        sys.exit(f"no figures of {', '.join(missing)} in a metrics.csv, whose columns are {columns}")

    print(f"| variant | fold | n | {' | '.join(options.metrics)} |")
    print("|---|---|---|" + "---|" * len(options.metrics))
    for variant in variants:
        for number, rows in enumerate(folds):
            means = " | ".join(f"{fmean(values(rows[variant], metric).values()):.4f}" for metric in options.metrics)
            print(f"| {variant} | {number} | {len(rows[variant])} | {means} |")
    columns = ["variant, over all cases", "metric", "n", "mean", "95 % interval", "sd", "median", "worst"]
    print(f"\n| {' | '.join([*columns, 'sd of the means of folds'])} |")
    print("|---" * (len(columns) + 1) + "|")
    groups = group_of(options.out / "fold0" / "data" / "datalist.json")
    for variant in variants:
        for metric in options.metrics:
            each: dict[str, list[float]] = {}
            for rows in folds:
                for case, value in values(rows[variant], metric).items():
                    each.setdefault(case, []).append(value)
            found = [fmean(several) for several in each.values()]
            low, high = interval(found, [groups.get(case, case) for case in each])
            between = stdev(fmean(values(rows[variant], metric).values()) for rows in folds)
            worst = max(found) if metric in options.lower_is_better else min(found)
            mean, *spread = [f"{f:.4f}" for f in (fmean(found), stdev(found), median(found), worst, between)]
            line = " | ".join([variant, metric, str(len(found)), mean, f"{low:.4f} to {high:.4f}", *spread])
            print(f"| {line} |")
    if options.csv is not None:
        with options.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["variant", "fold", "group", "case", *options.metrics])
            for variant in variants:
                for number, rows in enumerate(folds):
                    for row in rows[variant]:
                        figures = [f"{float(row[m]):.4f}" if row.get(m) else "" for m in options.metrics]
                        writer.writerow([variant, number, groups.get(row["case"], ""), row["case"], *figures])


if __name__ == "__main__":
    main()
