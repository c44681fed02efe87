"""Cross-validation: train and score each fold with the short commands, and join the scores of all cases."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segbundles.commands import evaluate_command, find_bundle, setting_pairs, train_commands
from segbundles.datasets.folds import case_of, write_folds
from segbundles.errors import fail
from segbundles.evaluations import PastEvaluation, case_figures, read_evaluation
from segbundles.files import DATALIST_NAME, read_json, write_json
from segbundles.metrics import SECTION_UNITS, summarize
from segbundles.metrics.segmentation import base_name
from segbundles.statistics import Interval, add_counts, group_names, with_intervals

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
    train, evaluate = ({*read_json(configs / name)} for name in ("train.json", "evaluate.json"))
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
    """Join the evaluations of all folds: the files of :func:`segbundles.report.write_evaluation` in ``out``.

    Args:
        bundle: name for the heading.
        out: folder to write to.
        folders: folder of each fold, with its evaluation.

    Returns:
        The summary: for each metric what :func:`segbundles.metrics.summarize` returns and the interval of its mean over
        the groups; ``groups``, their number; the lists ``folds`` and ``data_sets``, with the number of cases and
        groups and the mean of each metric; and the other parts of an evaluation.

    Raises:
        ValueError: when an evaluation is missing.
    """
    from segbundles.report import Part, groups_svg, label, write_evaluation

    past = [read_evaluation(folder / "evaluation") for folder in folders]
    rows, figures = [], {}
    for fold, (folder, evaluation) in enumerate(zip(folders, past, strict=True)):
        entries = _entries(folder / "data" / DATALIST_NAME)
        pictures = case_figures(evaluation.folder)
        for row in evaluation.rows:
            entry, case = _entry(entries, row["case"]), row["case"]
            if any(case == other["case"] for other in rows):  # of another data set
                case = f"{case} (fold {fold})"
            head = {"case": case, "fold": fold}
            head |= {"data_set": entry["data_set"]} if "data_set" in entry else {}
            rows.append({**head, "group": "", **row} | head | {"group": str(entry.get("group", ""))})
            if row["case"] in pictures:
                figures[case] = pictures[row["case"]]
    summary = summarize(rows)
    metrics = [name for name, entry in summary.items() if isinstance(entry, dict)]
    weights = [one.record.get("weights", {}).get("weights", {}).get("sha256") for one in past]
    summary["folds"] = [
        {**part, "weights_sha256": digest} for part, digest in zip(_by(rows, "fold"), weights, strict=True)
    ]
    summary["data_sets"] = _by(rows, "data_set")
    classes = past[0].summary.get("run", {}).get("classes", {})
    sections = any(base_name(name) in SECTION_UNITS for name in metrics)
    folds = Part(
        "Folds",
        tables={"folds": _table(summary["folds"])},
        figures={
            f"folds_{m}": groups_svg([_dot(part, rows, m) for part in summary["folds"]], label(m, classes))
            for m in metrics
        },
    )
    sets = Part("Data sets", tables={"data_sets": _table(summary["data_sets"])})
    write_evaluation(
        Path(out),
        title=f"Cross-validation of {bundle}, {len(folders)} folds",
        rows=rows,
        summary=summary,
        unit=_unit(past[0]),
        parts=[folds, *([sets] if summary["data_sets"] else [])],
        notes=[
            f"Each of the {len(rows)} cases was scored once, by a network that was trained without any case of its "
            "group. Every fold kept the weights of its last epoch: no epoch was chosen on the cases that are scored.",
        ],
        figures=figures,
        probabilities=add_counts(one.probabilities for one in past) if all(one.probabilities for one in past) else None,
        run={"folds": [one.summary.get("run") or one.record for one in past]},
        settings={
            "Commands": [(f"fold {fold}", one.record.get("command", "")) for fold, one in enumerate(past)],
            "Knobs of the first evaluation": [*past[0].record.get("knobs", {}).items()],
        },
        classes=classes,
        outlined_classes=0 if sections else max(1, len(classes) - 1),  # pictures of sections explain themselves
    )
    return read_json(Path(out, "summary.json"))


def _unit(evaluation: PastEvaluation) -> str:
    unit = evaluation.summary.get("unit", "groups")
    return "groups" if unit == "cases" else unit


def _by(rows: Sequence[Mapping[str, Any]], column: str) -> list[dict[str, Any]]:
    """Return the numbers of cases and groups, and the mean of each metric with its interval, by a column's values."""
    from segbundles.report import pooled_intervals

    found = []
    for value in dict.fromkeys(row[column] for row in rows if column in row):
        part = [row for row in rows if row.get(column) == value]
        groups = [row["group"] for row in part]
        summary = with_intervals(summarize(part), part, groups)
        kept = ("mean", "sd", "median", "worst", "low", "high", "n")
        metrics = {k: {key: v[key] for key in kept} for k, v in summary.items() if isinstance(v, dict)}
        if "pixels_0_0" in part[0]:
            pooled = pooled_intervals(part)["jaccard"]
            metrics["pooled_jaccard"] = {"mean": pooled.value, "low": pooled.low, "high": pooled.high, "n": pooled.n}
        found.append({column: value, "cases": len(part), "groups": len({*group_names(groups)}), **metrics})
    return found


def _table(parts: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return a table of :func:`_by`, with the means as text."""
    rows = [
        {key: _shown(value) if isinstance(value, Mapping) else value for key, value in part.items()} for part in parts
    ]
    return [*dict.fromkeys(key for part in parts for key in part if key != "weights_sha256")], rows


def _dot(part: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Return a fold as :func:`segbundles.report.groups_svg` draws it."""
    found = part.get(metric, {})
    cases = [row.get(metric, math.nan) for row in rows if row["fold"] == part["fold"]]
    interval = {"value": found.get("mean"), "low": found.get("low"), "high": found.get("high")}
    return {"name": f"fold {part['fold']}", **interval, "cases": cases}


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


def _text(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value
