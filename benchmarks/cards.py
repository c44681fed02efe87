"""Write the generated parts of the model cards, of README.md and of pages in docs/.

    segbundles crossvalidate B D O --save_predictions true
    python benchmarks/cards.py --bundle B --crossvalidation O

A generated part stands between `<!-- cards: ... -->` and `<!-- /cards -->`. It is made from the files in
`bundles/<bundle>/docs/figures`: `crossvalidation.json`, the summary of a cross-validation and how it was run,
`crossvalidation.csv`, its `metrics.csv`, and tables of the other benchmarks. `--crossvalidation O` takes them over from
the folder of `segbundles crossvalidate`, and writes the pictures of the best, median and worst case of each data set to
the folder of the card (by Dice, or by `--metric`). `--training NAME=O`, which may be given several times, writes
`curves.png` and what the training cost. The part `confidence` is made from `docs/confidence.json` and
`docs/wrong_inputs.json`, which `segbundles calibrate --record` and `wrong_inputs.py --record` write; these files are
deleted if they are of weights that are no longer shipped. Without options, all parts are written again; `--check` only
says what would change.
"""

from __future__ import annotations

import argparse
import base64
import csv
import html
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tables import Table, machine

from segbundles.files import atomic_path, read_json, write_json
from segbundles.knobs import knob_table
from segbundles.report import label

ROOT = Path(__file__).resolve().parents[1]
BUNDLES = sorted(path.parents[1] for path in (ROOT / "bundles").glob("*/docs/README.md"))
OTHER_PAGES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/confidence.md",
    "docs/monai_label.md",
    "docs/scale_out.md",
    "docs/speed.md",
)
PAGES = [*(bundle / "docs/README.md" for bundle in BUNDLES), *(ROOT / name for name in OTHER_PAGES)]
FILES = [*PAGES, *(bundle / "configs/metadata.json" for bundle in BUNDLES)]
BLOCK = re.compile(r"(<!-- cards: ([^\n]*?) -->)(.*?)(<!-- /cards -->)", re.DOTALL)
JOINT = "crossvalidation"
CALIBRATED, WRONG = "confidence.json", "wrong_inputs.json"  # in docs, of `segbundles calibrate` and wrong_inputs.py
NOTHING = "no figure"
PICTURE = re.compile(r'<img src="data:image/(\w+);base64,([^"]+)"[^>]*? alt="([^"]*): image with truth and')
# tables of a bundle by benchmarks/all.py, and their titles
SPEED = {
    "stages": "One image, stage by stage",
    "engines": "The network with each engine",
    "views": "Mirrored and turned views of an image",
    "steps": "Steps of a training",
    "training": "Training of the shipped weights",
    "memory": "Memory of each command",
}
# figures that have no column in metrics.csv
WORDS = {
    "ece": "calibration error (ECE)",
    "ece_without_background": "calibration error (ECE) from a probability of 0.01",
    "average_precision": "average precision",
    "pooled_mean_jaccard": "Jaccard of polyp and background, mean, pooled",
}
# eval_metrics of metadata.json: name, and the metric of the cross-validation, or of one of its data sets
METADATA = {
    "brain_flair_unet": {"mean_dice": "dice"},
    "em_membrane_unet": {"pixel_accuracy_mask": "pixel_accuracy_mask", "v_rand_cells": "v_rand_cells"},
    "left_atrium_vnet": {"mean_dice_lge": "lasc18:dice", "mean_dice_bright_blood": "heart:dice"},
    "polyp_fcn8": {"pooled_jaccard": "pooled_jaccard", "pooled_mean_jaccard": "pooled_mean_jaccard"},
}


# ---- the files of an evaluation


def take(bundle: Path, folder: Path) -> None:
    """Take the record and the cases of a finished cross-validation over into the card's folder.

    Args:
        bundle: folder of the bundle.
        folder: folder of `segbundles crossvalidate`.
    """
    summary = read_json(folder / "summary.json")
    given, folds = read_json(folder / f"{JOINT}.json"), summary.pop("run")["folds"]
    words = ["segbundles", "crossvalidate", "B", "D", "O", "--folds", str(given["folds"]), *given["settings"]]
    names = {one["data"]["name"] for one in folds}
    run = {"command": shlex.join(words), "versions": folds[0]["versions"], "device": folds[0]["device"]}
    run["data"] = {
        "name": " ".join(sorted(names)),
        "scored_sha256": [one["data"]["scored_sha256"] for one in folds],
    }
    figures = bundle / "docs/figures"
    figures.mkdir(exist_ok=True)
    write_json(figures / f"{JOINT}.json", _rounded({"run": run, **summary}))
    shutil.copyfile(folder / "metrics.csv", figures / f"{JOINT}.csv")


def drop_stale(bundle: Path) -> list[str]:
    """Delete the files of weights that the bundle no longer ships, and return their names."""
    dropped = []
    for name in (CALIBRATED, WRONG):
        path = bundle / "docs" / name
        if path.is_file() and read_json(path)["weights_sha256"] != shipped(bundle):
            path.unlink()
            dropped.append(path.stem)
    return dropped


def joint_record(bundle: Path) -> dict[str, Any] | None:
    """Return the record of a bundle's cross-validation, if there is one."""
    path = bundle / "docs/figures" / f"{JOINT}.json"
    return read_json(path) if path.is_file() else None


def shipped(bundle: Path) -> str | None:
    """Return the sha256 of the weights as their facts have it."""
    facts = bundle / "models/model.json"
    return read_json(facts)["sha256"] if facts.is_file() else None


def _rounded(value: Any) -> Any:
    """Return JSON with six digits per number, as tables have them."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


# ---- the generated parts


def _command(record: Mapping[str, Any]) -> str:
    """Return the command of an evaluation, with the quoted variables of the card for its folders."""
    return record["run"]["command"].replace(" B D O", ' "$B" "$D" "$O"', 1)


def knobs(bundle: Path, words: Sequence[str]) -> str:
    """Return the table of all knobs."""
    return knob_table(bundle)


def crossvalidation(bundle: Path, words: Sequence[str]) -> str:
    """Return heading, command and table of the cross-validation, one row per data set and fold: `METRIC ...`."""
    record = joint_record(bundle)
    if record is None:
        return ""
    parts = [("all", record)]
    parts += [(part["data_set"], part) for part in record["data_sets"]]
    parts += [(f"fold {part['fold']}", part) for part in record["folds"]]
    lines = [[name, *_counts(part), *_cells(part, words)] for name, part in parts]
    return (
        "### Cross-validation\n\n"
        f"Each of the {record['cases']} cases was scored once, by a network that was trained without any case of its "
        'group, and whose last epoch counts. Some settings were chosen with these same cases, see "How it was '
        f'trained", so the figures may be slightly too good.\n\n    {_command(record)}\n\n'
        + _table(["scored", "cases", "groups", *_heads(words)], lines)
        + f"\n{_brackets(record)} The scores of all cases are in [figures/{JOINT}.csv](figures/{JOINT}.csv).\n"
    )


def sequences(bundle: Path, words: Sequence[str]) -> str:
    """Return one row per sequence of the cross-validation."""
    record = joint_record(bundle)
    if record is None:
        return ""
    heads = ["sequence", "frames", "Jaccard of polyp, pooled", "Dice per frame, mean", "frames missed"]
    keys = ("sequence", "frames", "jaccard", "dice", "missed")
    return _table(heads, [[_text(row[key]) for key in keys] for row in record["sequences"]])


def confidence(bundle: Path, words: Sequence[str]) -> str:
    """Return heading, table and commands of what a calibration has measured on unseen cases."""
    if not (path := bundle / "docs" / CALIBRATED).is_file():
        return ""
    record = read_json(path)
    got, unseen = record["measured"], f"{record['cases']} unseen cases, {record['groups']} groups"
    bad = f"{record['score'].replace('dice', 'Dice')} below {record['failure_below']}"
    bound = _share(got["coverage"]["value"]) + _interval(got["coverage"], _share)
    rank = got["rank_correlation"]
    rows = [
        ("rank correlation of confidence and score", _text(rank["value"]) + _interval(rank)),
        (f"AUROC for finding failures ({bad}: {got['failures']} cases)", _text(got["auroc_failures"]) or "no failure"),
        ("score at or above the lower bound, 90 % expected", bound or "no bound: it needs 9 groups"),
        ("confidence minus score, mean", _text(got["bias"])),
        ("confidence minus lower bound", _text(record["margin"]) or "no bound"),
        ("flagged for review", _share(got["flagged"])),
        ("failures that are flagged", _share(got["failures_flagged"]) or "no failure"),
    ]
    folders = "`$O` is a cross-validation with `--save_predictions true`"
    commands = ['segbundles calibrate "$B" "$O"']
    if (path := bundle / "docs" / WRONG).is_file():
        wrong = [row for row in read_json(path)["rows"] if not row["right"]]
        passed = [row["input"] for row in wrong if row["outcome"] == "passed"]
        also = f" (missed: {', '.join(passed)})" if passed else ""
        caught = f"{len(wrong) - len(passed)} of {len(wrong)}{also}"
        rows.append(("wrong inputs flagged or refused, one image of each kind", caught))
        folders += ", and `samples` a folder with images of the four data sets"
        commands.append(f"python benchmarks/wrong_inputs.py --samples samples --bundles {bundle.name} --record")
    return (
        f"### Confidence\n\n{_table(['quantity', unseen], rows)}\n"
        "How to read it: a rank correlation of 1 means that confidence sorts the cases exactly by their score, 0 that "
        "it says nothing; AUROC is the probability that a failure has a smaller confidence than another case. The "
        "networks that segmented these cases had not seen them, and what was fitted for a case was fitted without its "
        f"group. [{CALIBRATED}]({CALIBRATED}) has each case. {folders}:\n\n"
        + "".join(f"    {command}\n" for command in commands)
    )


def table(bundle: Path, words: Sequence[str]) -> str:
    """Return a table that a benchmark has written: `NAME`, for `figures/NAME.csv`; nothing without that file.

    A line with a single cell is a note, and follows the table.
    """
    path = bundle / "docs/figures" / f"{words[0]}.csv"
    if not path.is_file():
        return ""
    with path.open(newline="", encoding="utf-8") as file:
        heads, *lines = csv.reader(file)
    notes = [line[0] for line in lines if len(line) == 1 < len(heads)]
    return "\n".join([_table(heads, [line for line in lines if len(line) == len(heads)]), *(f"{n}\n" for n in notes)])


def speed(bundle: Path, words: Sequence[str]) -> str:
    """Return heading and tables of what `benchmarks/all.py` measures for each bundle, as far as it was measured."""
    found = [f"{title}:\n\n{text}" for name, title in SPEED.items() if (text := table(bundle, [name]))]
    start = (
        "### Speed and memory\n\nMeasured with `python benchmarks/all.py --data DATA --write`, where `DATA` has one "
        "folder per bundle, named like it, with its data from `segbundles prepare`, and its cross-validation as "
        "`<bundle>_folds`.\n\n"
    )
    return start + "\n".join(found) if found else ""


def value(bundle: Path, words: Sequence[str]) -> str:
    """Return one number of the cross-validation: `METRIC [KEY]`, or of one of its data sets: `SET:METRIC [KEY]`.

    KEY is a key of the metric, such as `median`, or `interval` for the mean with its interval; without it, it is the
    mean, or the number itself.
    """
    metric, *key = words
    entry = _found(bundle, metric)
    if entry is None:
        return NOTHING
    if key == ["interval"]:
        return _text(entry["mean"]) + _interval(entry)
    return _text(entry.get(key[0] if key else "mean"))


KINDS: dict[str, Callable[[Path, Sequence[str]], str]] = {
    one.__name__: one for one in (knobs, crossvalidation, sequences, confidence, table, speed, value)
}


def write_page(path: Path) -> str:
    """Return the text of a page with its generated parts.

    Args:
        path: a model card, or another page, whose parts then name the bundle first: `polyp_fcn8 value ...`.
    """

    def part(match: re.Match[str]) -> str:
        head, spec, _, end = match.groups()
        words = spec.split()
        bundle = path.parents[1]
        if words[0] not in KINDS and (ROOT / "bundles" / words[0]).is_dir():
            bundle = ROOT / "bundles" / words.pop(0)
        kind, *words = words
        if kind not in KINDS:
            sys.exit(f"{path}: there is no part {kind!r}; choose from {', '.join(KINDS)}")
        text = KINDS[kind](bundle, words)
        return f"{head}{text}{end}" if kind == "value" else f"{head}\n{text}{end}"

    return BLOCK.sub(part, path.read_text(encoding="utf-8"))


def write_metadata(path: Path) -> str:
    """Return the text of a metadata.json with its `eval_metrics`."""
    found = {}
    for name, metric in METADATA.get(path.parents[1].name, {}).items():
        entry = _found(path.parents[1], metric)
        found |= {name: round(entry["mean"], 4)} if entry else {}
    text = path.read_text(encoding="utf-8")
    return re.sub(r'"eval_metrics": \{[^}]*\}', f'"eval_metrics": {json.dumps(found)}', text)


def write(path: Path) -> str:
    """Return the text of a page or a metadata.json with its generated parts."""
    return write_metadata(path) if path.suffix == ".json" else write_page(path)


def _found(bundle: Path, metric: str) -> dict[str, Any] | None:
    """Return a metric of the cross-validation, or of one of its data sets, `SET:METRIC`."""
    *data_set, metric = metric.split(":")
    record = joint_record(bundle)
    if record and data_set:
        record = next((part for part in record["data_sets"] if part["data_set"] == data_set[0]), None)
    return _entry(record, metric) if record else None


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows).replace("| --- ", "|---").replace("|--- |", "|---|")


def _entry(record: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Return a metric of a record as a dictionary with `mean`, wherever the record keeps it."""
    if isinstance(found := record.get(metric), dict):
        return found
    pooled = record.get("pooled_intervals", {}).get(metric.removeprefix("pooled_"))
    probability = record.get("probabilities", {}).get("intervals", {}).get(metric)
    for interval in (pooled if metric.startswith("pooled_") else None, probability):
        if interval:
            return {**interval, "mean": interval["value"]}
    return {"mean": found}


def _heads(metrics: Sequence[str]) -> list[str]:
    words = [WORDS.get(metric) or label(metric) for metric in metrics]
    return [f"{words[0]}, mean", "sd", "median", "worst", *words[1:]]


def _cells(record: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    first = _entry(record, metrics[0])
    return [
        f"**{_text(first['mean'])}**{_interval(first)}",
        *(_text(first.get(key)) for key in ("sd", "median", "worst")),
        *(_text(entry["mean"]) + _interval(entry) for entry in (_entry(record, metric) for metric in metrics[1:])),
    ]


def _interval(entry: Mapping[str, Any], text: Callable[[Any], str] | None = None) -> str:
    text = text or _text
    return "" if entry.get("low") is None else f" ({text(entry['low'])} to {text(entry['high'])})"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}".replace("%", " %")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1.5 else f"{value:.2f}"
    return str(value)


def _counts(record: Mapping[str, Any]) -> list[str]:
    return [str(record["cases"]), str(record["groups"])]


def _brackets(record: Mapping[str, Any]) -> str:
    if record["groups"] == 1:
        return "All cases belong to one group, so there are no intervals."
    kind = "patients" if record["unit"] == "patients" else "groups"
    return f"The numbers in brackets are 95 % intervals: bootstrap over {kind}."


# ---- pictures


def pictures(folder: Path, docs: Path, metric: str) -> None:
    """Write the pictures of the best, the median and the worst case of each data set of a cross-validation."""
    scores: dict[str, list[tuple[float, str]]] = {}
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row[metric]:
                scores.setdefault(row.get("data_set", ""), []).append((float(row[metric]), row["case"]))
    report = (folder / "report.html").read_text(encoding="utf-8")
    found = {html.unescape(name): (kind, data) for kind, data, name in PICTURE.findall(report)}
    for data_set, cases in scores.items():
        cases.sort()
        for which, (score, case) in {"worst": cases[0], "median": cases[len(cases) // 2], "best": cases[-1]}.items():
            kind, data = found[case]
            path = docs / f"{'_'.join(filter(None, (data_set, which)))}.{kind}"
            path.write_bytes(base64.b64decode(data))
            print(f"{path.name}: {case}, {metric} {score:.3f}")


def trainings(folders: Mapping[str, Path], bundle: Path) -> None:
    """Draw the loss, and the validation metric if there is one, of trainings, and write what they cost."""
    import numpy as np
    from matplotlib.figure import Figure
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    panels: list[tuple[str, list[int], list[float]]] = []
    cost = Table("Trainings of the shipped weights", ("training", "epochs", "seconds per epoch, median", "core-hours"))
    for name, folder in folders.items():
        (run,) = (folder / "tensorboard").iterdir()
        events = EventAccumulator(str(run), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            if tag == "train_loss" or (tag.startswith("val_") and tag != "val_loss"):
                steps, values = zip(*((e.step, e.value) for e in events.Scalars(tag)), strict=True)
                panels.append((f"{name}: {tag}", list(steps), list(values)))
        (file,) = folder.glob("*.log")  # training.log, or locator.log
        log = file.read_text(encoding="utf-8")
        # an epoch that was begun again after a stop counts once
        found = dict(re.findall(r"epoch (\d+)/\d+, .* ([\d.]+) s,", log))
        seconds = [float(text) for text in found.values()]
        threads = re.findall(r"Threads: (\d+)", log) or ["1"]  # older logs, of one thread
        hours = median(seconds) * len(seconds) * int(threads[-1]) / 3600
        cost.rows.append((name, str(len(seconds)), f"{median(seconds):.0f}", f"{hours:.1f}"))
    cost.write(
        bundle / "docs/figures/training.csv",
        f"{cost.title}, {threads[-1]} thread. Core-hours: the median times the epochs. Other work ran on the machine "
        f"at the same time, so a quiet machine is faster. Measured on {machine()}.",
    )
    columns = min(2, len(panels))
    figure = Figure(figsize=(9, 2.8 * -(-len(panels) // columns)), layout="constrained")
    for number, (title, steps, values) in enumerate(panels):
        ax = figure.add_subplot(-(-len(panels) // columns), columns, number + 1)
        window = max(1, len(values) // 100)
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        ax.plot(
            steps[window - 1 :],
            smooth,
            color="#0072B2",
            linewidth=1.2,
            marker="o" if len(values) < 50 else None,
            markersize=3,
        )
        ax.set_title(title + (f", mean of {window} steps" if window > 1 else ""), fontsize=9)
        ax.set_xlabel("step" if "train_loss" in title else "epoch")
        ax.grid(color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(bundle / "docs/curves.png", dpi=110)


def main() -> None:
    """Take evaluations over, and write all generated parts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", help="name of the bundle that the other options are about")
    parser.add_argument("--crossvalidation", type=Path, metavar="O", help="a finished cross-validation")
    parser.add_argument(
        "--metric", default="dice", help="column of metrics.csv for its pictures; larger must be better"
    )
    parser.add_argument("--training", action="append", default=[], metavar="NAME=O", help="a finished training")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if a page would change")
    options = parser.parse_args()
    if (options.crossvalidation or options.training) and not options.bundle:
        parser.error("--crossvalidation and --training need --bundle")
    bundle = ROOT / "bundles" / Path(options.bundle or "").name
    if options.crossvalidation:
        take(bundle, options.crossvalidation)
        pictures(options.crossvalidation, bundle / "docs", options.metric)
    if options.training:
        trainings({name: Path(folder) for name, _, folder in (one.partition("=") for one in options.training)}, bundle)
    if not options.check:
        for one in BUNDLES:
            for name in drop_stale(one):
                print(f"{one.name}: {name} was of other weights, deleted")
    changed = [path for path in FILES if write(path) != path.read_text(encoding="utf-8")]
    for path in changed:
        print(path.relative_to(ROOT))
        if not options.check:
            text = write(path)
            with atomic_path(path) as part:
                part.write_text(text, encoding="utf-8")
    sys.exit(1 if options.check and changed else 0)


if __name__ == "__main__":
    main()
