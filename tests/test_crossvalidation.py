from __future__ import annotations

import csv
import json
import shlex

import pytest
from bundle_runs import table
from tiny_bundles import command_line
from tiny_trainings import TINY_TRAININGS

from segbundles import commands
from segbundles.cli import app
from segbundles.comparison import compare
from segbundles.crossvalidation import fold_commands, join_folds, start_folds
from segbundles.datasets import write_datalist

KNOBS = ["--max_epochs", "4", "--mirror_axes", "[]", "--seed=3"]


def prepared(folder, cases):
    for case in cases:
        for key in ("image", "label"):
            (folder / case[key]).parent.mkdir(parents=True, exist_ok=True)
            (folder / case[key]).touch()
    write_datalist({"name": "lgg", "training": cases}, folder)
    return str(folder)


def entries(number, **more):
    return [
        {"case": f"c{k}", "image": f"c{k}.tif", "label": f"c{k}_seg.tif", "group": f"p{k // 2}", **more}
        for k in range(number)
    ]


def test_commands_of_a_fold_until_it_is_done(tmp_path):
    data = prepared(tmp_path / "data", entries(4))
    fold, _ = start_folds("left_atrium_vnet", data, str(tmp_path / "out"), 2, KNOBS)
    locator, network, evaluation = fold_commands("left_atrium_vnet", fold, KNOBS)
    assert [command[4] for command in (locator, network, evaluation)] == ["training", "training", "evaluating"]
    # what only an evaluation knows does not go to a training
    assert network[-3:] == ["--max_epochs", "4", "--seed=3"] or network[-4:] == ["--max_epochs", "4", "--seed", "3"]
    words = shlex.join(evaluation)
    assert f"--output_dir {fold / 'evaluation'} --ckpt_dir {fold / 'models'} --split testing" in words
    assert "--mirror_axes '[]'" in words
    (fold / "locator").mkdir()
    (fold / "locator/locator.ckpt").touch()
    assert [command[-2:] for command in fold_commands("left_atrium_vnet", fold, KNOBS)[:2]] == [
        ["--resume", "true"]
    ] * 2
    (fold / "models").mkdir()
    (fold / "models/locator.json").touch()
    assert [c[4] for c in fold_commands("left_atrium_vnet", fold, KNOBS)] == ["training", "evaluating"]
    (fold / "models/model.json").touch()
    (fold / "evaluation").mkdir()
    assert [c[4] for c in fold_commands("left_atrium_vnet", fold, KNOBS)] == ["evaluating"]
    (fold / "evaluation/report.html").touch()
    assert fold_commands("left_atrium_vnet", fold, KNOBS) == []


@pytest.mark.parametrize(
    ("folds", "settings", "message"),
    [
        (
            2,
            ["--max_epochs", "5"],
            r'has a cross-validation with settings \["--max_epochs", "4"\], not \["--max_epochs"',
        ),
        (3, ["--max_epochs", "4"], "has a cross-validation with folds 2, not 3: give the same to continue it"),
        (2, ["--split", "testing"], "--split is set by crossvalidate itself, for each fold: leave it out"),
        (2, ["--ckpt_dir=a"], "--ckpt_dir is set by crossvalidate itself"),
    ],
)
def test_a_run_is_continued_only_with_the_same_settings(tmp_path, folds, settings, message):
    data, out = prepared(tmp_path / "data", entries(6)), str(tmp_path / "out")
    for _ in range(2):
        start_folds("brain_flair_unet", data, out, 2, ["--max_epochs", "4"])
    with pytest.raises(ValueError, match=message):
        start_folds("brain_flair_unet", data, out, folds, settings)
    with pytest.raises(ValueError, match="there is no bundle 'brain'"):
        start_folds("brain", data, str(tmp_path / "new"), 2)


PIXELS = ("pixels_0_0", "pixels_0_1", "pixels_1_0", "pixels_1_1")


def test_folds_are_joined(tmp_path):
    """Slices are scored as one case per patient; two data sets have a patient of the same name."""
    cases = [{**case, "data_set": "one", "group": f"one/{case['group']}"} for case in entries(4)]
    cases += [{**case, "data_set": "two", "group": f"two/{case['group']}", "page": 0} for case in entries(4)]
    folders = start_folds("brain_flair_unet", prepared(tmp_path / "data", cases), str(tmp_path / "out"), 2)
    scores = iter([0.5, 0.7, 0.6, ""])
    counts = iter([(9, 0, 1, 2), (9, 1, 0, 2), (8, 2, 0, 3), (9, 0, 0, 0)])
    for folder in folders:
        tested = json.loads((folder / "data/datalist.json").read_text())["testing"]
        (folder / "evaluation").mkdir()
        with (folder / "evaluation/metrics.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "status", "dice", "lesion_slices", *PIXELS, "notes"])
            for group in dict.fromkeys(case["group"] for case in tested):
                score = next(scores)
                name = group.partition("/")[2] if folder == folders[0] and group.startswith("two") else group
                writer.writerow([name, "empty" if score == "" else "ok", score, 3, *next(counts), ""])
        (folder / "evaluation/summary.json").write_text(json.dumps({"unit": "patients", "run": {"device": "cpu"}}))
        bins = [f"{group},{k}" for group in (folder.name, "both") for k in ("100,3,0,0.3", "900,1,1,0.9")]
        lines = "\n".join(["group,bin,pixels,foreground,probability_sum", *bins])
        (folder / "evaluation/probabilities.csv").write_text(lines)
    summary = join_folds("brain", str(tmp_path / "out"), folders)
    rows = table(tmp_path / "out/metrics.csv")
    assert [(row["fold"], row["dice"]) for row in rows] == [("0", "0.5"), ("0", "0.7"), ("1", "0.6"), ("1", "")]
    assert [row["data_set"] for row in rows] == ["one", "", "one", "two"]  # a name that is in no list
    assert list(rows[0])[:4] == ["case", "fold", "data_set", "group"]
    assert summary["dice"]["mean"] == pytest.approx(0.6)
    assert (summary["dice"]["n"], summary["dice"]["left_out"], summary["cases"], summary["empty"]) == (3, 1, 4, 1)
    assert summary["lesion_slices"] == 12
    assert (summary["unit"], summary["run"]) == ("cases", {"folds": [{"device": "cpu"}] * 2})
    assert summary["probabilities"]["ece"] == pytest.approx(0.1)  # both bins of both folds
    assert summary["probabilities"]["intervals"]["ece"]["groups"] == 3
    assert [(fold["fold"], fold["cases"], fold["dice"]["mean"]) for fold in summary["folds"]] == [
        (0, 2, pytest.approx(0.6)),
        (1, 2, 0.6),
    ]
    # hits 4 of 6 pixels in fold 0, 3 of 5 in fold 1
    assert summary["pooled_jaccard"] == summary["pooled_intervals"]["jaccard"]["value"] == pytest.approx(7 / 11)
    assert [fold["pooled_jaccard"]["mean"] for fold in summary["folds"]] == pytest.approx([4 / 6, 3 / 5])
    assert [part["data_set"] for part in summary["data_sets"]] == ["one", "two"]
    assert json.loads((tmp_path / "out/summary.json").read_text()) == summary
    assert sorted(path.name for path in (tmp_path / "out/report").iterdir()) == [
        "calibration.svg",
        *("data_sets.csv", "data_sets.tex", "distribution_dice.svg", "folds.csv", "folds.tex", "folds_dice.svg"),
        *(
            "pooled.csv",
            "pooled.tex",
            "precision_recall.svg",
            "probabilities.csv",
            "probabilities.tex",
            "summary.csv",
            "summary.tex",
        ),
        "thresholds.svg",
    ]
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "Cross-validation of brain, 2 folds" in page
    assert "0.6 (0.5 to 0.7)" in page
    assert "0.500 to 0.700" in page
    assert "4 patients, of which 1 is a single case without a group" in page


@pytest.mark.slow
def test_crossvalidate_and_continue(tmp_path, monkeypatch, capsys):
    """The folds run in this process; the second is stopped before its evaluation, and the same command ends it."""
    tiny = TINY_TRAININGS["em_membrane_unet"]
    data, out, ran = tmp_path / "data", tmp_path / "out", []
    tiny.phantom(data, 0, 6)
    stop = ["evaluating", str(out / "fold1")]

    def run(these, say):
        for command in these:
            if stop and command[4] == stop[0] and stop[1] in shlex.join(command):
                return 130
            ran.append(command[4])
            command_line(command)
        return 0

    monkeypatch.setattr(commands, "run_commands", run)
    knobs = [word for key, value in tiny.settings.items() for word in (f"--{key}", json.dumps(value).strip('"'))]
    words = ["crossvalidate", "em_membrane_unet", str(data), str(out), "--folds", "2", *knobs, "--lr_epochs", "1"]
    # not through CliRunner, whose output the log of a run would keep after its end
    assert app(words, standalone_mode=False) == 130
    assert ran == ["training", "evaluating", "training"]
    stop.clear()
    ran.clear()
    app(words, standalone_mode=False)
    assert f"Results: {out / 'report.html'}" in capsys.readouterr().out.replace("\n", "")
    assert ran == ["evaluating"]
    rows = table(out / "metrics.csv")
    tested = [json.loads((out / f"fold{k}/data/datalist.json").read_text())["testing"] for k in (0, 1)]
    assert [row["case"] for row in rows] == [case["case"] for fold in tested for case in fold]
    assert {row["group"] for row in rows} == {case["group"] for fold in tested for case in fold}
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["groups"], summary["v_rand_cells"]["n"]) == (2, len(rows))
    facts = json.loads((out / "fold1/models/model.json").read_text())
    assert summary["folds"][1]["weights_sha256"] == facts["sha256"]
    assert facts["validation"] is None  # the last weights
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == len(rows)
    same = compare([out, out], tmp_path / "compared")
    assert {row["ties"] for row in same["differences"]} == {len(rows)}
