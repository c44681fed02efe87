"""Cross-validation of a bundle: every fold prepared, trained and scored by the project's own commands.

    python benchmarks/cross_validation.py --bundle brain_flair_unet --data_set lgg --source kaggle_3m --out O \
        [--folds 4] [--validation-case CASE ...] [--metrics dice slice_dice] [-- --max_epochs 8 ...]

What follows `--` are settings of training and evaluation. Prints a row a fold, and below it the figures over all cases.
Cases that are to be validation in every fold (`--validation-case`) count once, with their mean over the folds. What the
output folder holds already is not done again.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median, stdev

ROOT = Path(__file__).resolve().parents[1]


def run(log: Path, *command: str) -> None:
    """Run a command of Python's; its output goes to a file, and the end of it is shown when it fails."""
    with log.open("w", encoding="utf-8") as out:
        args = [sys.executable, "-m", *command]
        code = subprocess.run(args, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        sys.exit(f"{' '.join(args)}\nfailed; the end of {log}:\n{log.read_text(encoding='utf-8')[-2000:]}")


def fold(number: int, options: argparse.Namespace, settings: list[str]) -> list[dict[str, str]]:
    """Train and score one fold; return the rows of its metrics.csv."""
    folder = options.out / f"fold{number}"
    scores = folder / "evaluation" / "metrics.csv"
    if not (folder / "evaluation" / "summary.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        forced = [text for case in options.validation_case for text in ("--validation-case", case)]
        prepared = folder / "data"
        given = ("--source", str(options.source), "--out", str(prepared))
        part = ("--folds", str(options.folds), "--fold", str(number))
        run(folder / "prepare.log", "segbundles", "prepare", options.data_set, *given, *part, *forced)
        bundle = ROOT / "bundles" / options.bundle
        train, evaluate = (str(bundle / "configs" / name) for name in ("train.json", "evaluate.json"))
        common = ["--bundle_root", str(bundle), "--dataset_dir", str(prepared), "--ckpt_dir", str(folder / "models")]
        bundle_run = ("monai.bundle", "run")
        out = ("--output_dir", str(folder), "--resume", "true")
        run(folder / "training.log", *bundle_run, "training", "--config_file", train, *common, *settings, *out)
        both, out = f"['{train}','{evaluate}']", ("--output_dir", str(folder / "evaluation"))
        run(folder / "evaluation.log", *bundle_run, "evaluating", "--config_file", both, *common, *settings, *out)
    with scores.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def values(rows: list[dict[str, str]], metric: str) -> dict[str, float]:
    """The metric of each case that has one."""
    return {row["case"]: float(row[metric]) for row in rows if row.get(metric)}


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--data_set", required=True, help="as `segbundles prepare` calls it")
    parser.add_argument("--source", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path, help="keeps every run")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--validation-case", action="append", default=[])
    parser.add_argument("--metrics", nargs="+", default=["dice"])
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, settings = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    folds = []
    for number in range(options.folds):
        print(f"fold {number} ...", file=sys.stderr, flush=True)
        folds.append(fold(number, options, settings))

    print(f"| fold | n | {' | '.join(options.metrics)} |")
    print("|---|---|" + "---|" * len(options.metrics))
    for number, rows in enumerate(folds):
        means = " | ".join(f"{fmean(values(rows, metric).values()):.3f}" for metric in options.metrics)
        print(f"| {number} | {len(rows)} | {means} |")
    print("\n| over all cases | n | mean | sd | median | worst | sd of the folds' means |")
    print("|---|---|---|---|---|---|---|")
    for metric in options.metrics:
        each: dict[str, list[float]] = {}
        for rows in folds:
            for case, value in values(rows, metric).items():
                each.setdefault(case, []).append(value)
        found = [fmean(several) for several in each.values()]
        between = stdev(fmean(values(rows, metric).values()) for rows in folds)
        spread = f"{fmean(found):.3f} | {stdev(found):.3f} | {median(found):.3f} | {min(found):.3f} | {between:.3f}"
        print(f"| {metric} | {len(found)} | {spread} |")


if __name__ == "__main__":
    main()
