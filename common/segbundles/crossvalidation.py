"""Cross-validation: train and score each fold with the short commands, and join the scores of all cases."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segbundles.commands import evaluate_command, find_bundle, setting_pairs, train_commands
from segbundles.datasets.folds import case_of, write_folds
from segbundles.errors import fail
from segbundles.evaluations import PastEvaluation, case_figures, read_evaluation
from segbundles.files import DATALIST_NAME, read_json, write_json, write_table
from segbundles.metrics import METRIC_UNITS, SECTION_UNITS, summarize
from segbundles.metrics.segmentation import base_name
from segbundles.statistics import Interval, group_names, with_intervals

__all__ = ["fold_commands", "join_folds", "start_folds"]

RECORD_NAME = "crossvalidation.json"
_OWN = ("bundle_root", "dataset_dir", "output_dir", "ckpt_dir", "weights", "locator_weights", "split", "resume")


def start_folds(bundle: str, data: str, out: str, folds: int, settings: Sequence[str] = ()) -> list[Path]:
    """Write the lists of all folds, and what the run is; continue a run that has the same data and settings.

    Args:
        bundle: see :func:`segbundles.commands.find_bundle`.
        data: folder with a datalist.json; its cases for training and validation are dealt out.
        out: folder to write to.
        folds: number of folds, 2 or more.
        settings: further words of the command line, ``--knob value``, of training and evaluation.

    Returns:
        The folder of each fold.

    Raises:
        ValueError: when there is no such bundle or data, a setting is one that the folds need, or ``out`` has a
            cross-validation of other data or settings.
    """
    find_bundle(bundle)
    for name, *_ in setting_pairs(settings):
        if name.lstrip("-") in _OWN:
            fail(f"{name} is set by crossvalidate itself, for each fold: leave it out.")
    record = {"bundle": bundle, "data": str(data), "folds": folds, "settings": list(settings)}
    path = Path(out, RECORD_NAME)
    earlier = read_json(path) if path.is_file() else record
    for name in ("bundle", "folds", "settings"):
        if earlier.get(name) != record[name]:
            fail(
                f"{out} has a cross-validation with {name} {_text(earlier.get(name))}, not {_text(record[name])}: give "
                "the same to continue it, or choose another folder."
            )
    folders = [folder.parent for folder in write_folds(data, out, folds)]
    write_json(path, record)
    return folders


def fold_commands(bundle: str, folder: Path, settings: Sequence[str] = ()) -> list[list[str]]:
    """Return the commands that a fold still needs: training (its locator first, where there is one), and evaluation.

    A fold keeps the weights of the last epoch. Training gets all settings but those of evaluation alone; an interrupted
    training continues.

    Args:
        bundle: see :func:`segbundles.commands.find_bundle`.
        folder: folder of the fold, as from :func:`start_folds`.
        settings: further words of the command line.

    Raises:
        ValueError: when there is no such bundle.
    """
    configs = find_bundle(bundle) / "configs"
    data, models = str(folder / "data"), folder / "models"
    train, evaluate = (_keys(configs / name) for name in ("train.json", "evaluate.json"))
    of_training = [
        word for pair in setting_pairs(settings) if pair[0].lstrip("-") not in evaluate - train for word in pair
    ]
    begun = ["--resume", "true"] if any(folder.glob("**/*.ckpt")) else []
    training = train_commands(bundle, data, str(folder), [*of_training, *begun])
    # nothing is validated, so weights appear at the end of a training
    facts = [models / "locator.json", models / "model.json"][-len(training) :]
    commands = [command for command, file in zip(training, facts, strict=True) if not file.is_file()]
    scores = folder / "evaluation"
    if commands or not (scores / "report.html").is_file():  # the last file that an evaluation writes
        where = ["--ckpt_dir", str(models), "--split", "testing"]
        commands.append(evaluate_command(bundle, data, str(scores), [*where, *settings]))
    return commands


def join_folds(bundle: str, out: str, folders: Sequence[Path]) -> dict[str, Any]:
    """Join the evaluations of all folds: ``metrics.csv``, ``summary.json`` and ``report.html`` in ``out``.

    ``out/report`` has the summary as CSV and LaTeX, and a figure of the folds for each metric as SVG.

    Args:
        bundle: name for the heading.
        out: folder to write to.
        folders: folder of each fold, with its evaluation.

    Returns:
        The summary: for each metric what :func:`segbundles.metrics.summarize` returns and the interval of its mean over
        the groups; ``groups``, their number; and the lists ``folds`` and ``data_sets``, with the number of cases and
        groups and the mean of each metric.

    Raises:
        ValueError: when an evaluation is missing.
    """
    from segbundles.report import export, groups_svg, limit_figures, write_report

    past = [read_evaluation(folder / "evaluation") for folder in folders]
    rows, figures = [], {}
    for fold, (folder, evaluation) in enumerate(zip(folders, past, strict=True)):
        entries = _entries(folder / "data" / DATALIST_NAME)
        pictures = case_figures(evaluation.folder)
        for row in evaluation.rows:
            entry, case = _entry(entries, row["case"]), row["case"]
            if any(case == other["case"] for other in rows):  # of another data set
                case = f"{case} (fold {fold})"
            head = {"case": case, "fold": fold, "group": str(entry.get("group", ""))}
            head |= {"data_set": entry["data_set"]} if "data_set" in entry else {}
            rows.append({**row, **head})
            if row["case"] in pictures:
                figures[case] = pictures[row["case"]]
    summary = _summary(rows, past)
    first = [name for name in ("case", "fold", "data_set", "group") if any(name in row for row in rows)]
    columns = dict.fromkeys([*first, *(name for row in rows for name in row)])
    write_table(Path(out, "metrics.csv"), [*columns], rows)
    write_json(Path(out, "summary.json"), summary)
    metrics = {name: entry for name, entry in summary.items() if isinstance(entry, dict)}
    units = METRIC_UNITS | SECTION_UNITS
    means = [{"metric": name, **entry} for name, entry in metrics.items()]
    by_fold = {
        f"folds_{name}": groups_svg([_dot(fold, rows, name) for fold in summary["folds"]], name) for name in metrics
    }
    export(Path(out, "report"), {"summary": ([*means[0]], means)}, by_fold)
    write_report(
        Path(out, "report.html"),
        title=f"Cross-validation of {bundle}, {len(folders)} folds",
        rows=[{name: row.get(name) for name in columns if name != "content"} for row in rows],
        figures=dict(zip(figures, limit_figures([*figures.values()]), strict=True)),
        summary=metrics,
        units={name: unit for name in metrics if (unit := units.get(base_name(name)))},
        notes=_notes(summary, metrics),
        settings=_tables(summary, metrics, past),
        outlines=not any(base_name(name) in SECTION_UNITS for name in metrics),  # pictures of sections say it
    )
    return summary


def _summary(rows: Sequence[Mapping[str, Any]], past: Sequence[PastEvaluation]) -> dict[str, Any]:
    groups = [row["group"] for row in rows]
    summary = with_intervals(summarize(rows), rows, groups)
    summary["groups"] = len({*group_names(groups)})
    weights = [evaluation.record.get("weights", {}).get("weights", {}).get("sha256") for evaluation in past]
    by_fold = [[row for row in rows if row["fold"] == fold] for fold in range(len(past))]
    summary["folds"] = [
        {"fold": fold, **_part(part), "weights_sha256": weights[fold]} for fold, part in enumerate(by_fold)
    ]
    names = dict.fromkeys(row["data_set"] for row in rows if "data_set" in row)
    parts = {name: [row for row in rows if row.get("data_set") == name] for name in names}
    summary["data_sets"] = [{"data_set": name, **_part(part)} for name, part in parts.items()]
    return summary


def _part(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the numbers of cases and groups, and the mean of each metric with its interval."""
    groups = [row["group"] for row in rows]
    found = with_intervals(summarize(rows), rows, groups)
    kept = ("mean", "sd", "low", "high", "n")
    metrics = {k: {key: v[key] for key in kept} for k, v in found.items() if isinstance(v, dict)}
    return {"cases": len(rows), "groups": len({*group_names(groups)}), **metrics}


def _dot(part: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Return a fold as :func:`segbundles.report.groups_svg` draws it."""
    found = part.get(metric, {})
    cases = [row[metric] for row in rows if row["fold"] == part["fold"]]
    interval = {"value": found.get("mean"), "low": found.get("low"), "high": found.get("high")}
    return {"name": f"fold {part['fold']}", **interval, "cases": cases}


def _notes(summary: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    intervals = [f"{name} {_shown(entry)}" for name, entry in metrics.items()]
    return [
        f"Each of the {summary['cases']} cases was scored once, by a network that was trained without any case of its "
        f"group; there are {summary['groups']} groups, such as patients. Every fold kept the weights of its last "
        "epoch: nothing was chosen on the cases that are scored.",
        f"Means, with 95 % intervals over the groups (percentile bootstrap): {', '.join(intervals)}.",
    ]


def _tables(
    summary: Mapping[str, Any], metrics: Mapping[str, Any], past: Sequence[PastEvaluation]
) -> dict[str, list[tuple[Any, ...]]]:
    tables: dict[str, list[tuple[Any, ...]]] = {}
    for heading, key in (("Data sets", "data_sets"), ("Folds", "folds")):
        for part in summary[key]:
            name, counted = str(next(iter(part.values()))), f"{part['cases']} cases of {part['groups']} groups"
            means = ", ".join(f"{metric} {_shown(part[metric])}" for metric in metrics if metric in part)
            tables.setdefault(heading, []).append((name, means, counted))
    tables["Commands"] = [(f"fold {fold}", one.record.get("command", "")) for fold, one in enumerate(past)]
    knobs = past[0].record.get("knobs", {})
    return tables | {"Knobs of the first evaluation": [*knobs.items()]}


def _shown(entry: Mapping[str, Any]) -> str:
    return str(Interval(entry["mean"], entry.get("low"), entry.get("high"), entry["n"], 0, 0))


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    """Return the entry of each case of a fold, also by its group: slices of one group are scored as one case."""
    entries = read_json(path)["testing"]
    return {str(entry["group"]): entry for entry in entries} | {case_of(entry): entry for entry in entries}


def _entry(entries: Mapping[str, dict[str, Any]], case: str) -> dict[str, Any]:
    # pages of one image are scored apart: <case>_page_00
    names = (case, case.rpartition("_page_")[0])
    return next((entries[name] for name in names if name in entries), {})


def _keys(path: Path) -> set[str]:
    return {*json.loads(path.read_text(encoding="utf-8"))}


def _text(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value
