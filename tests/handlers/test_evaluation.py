from __future__ import annotations

import csv
import hashlib
import json
import logging
import re
import textwrap

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator

from segbundles import report
from segbundles.bundle import RunSettings
from segbundles.evaluations import read_evaluation
from segbundles.handlers import EvaluationReport
from segbundles.handlers import evaluation as module
from segbundles.inferers import LocatorCropInferer
from segbundles.scorers import FrameScorer, Scorer, VolumeScorer
from segbundles.transforms import LogitsToClassd

AFFINE = torch.diag(torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64))


def case(file, truth, seen=None, meta=True, **more):
    """A volume of 12 x 12 x 12 whose bright box is what will be predicted."""
    label, image = torch.zeros(1, 12, 12, 12), 0.01 * torch.rand(1, 12, 12, 12)
    if truth:
        label[(0, *(slice(a, b) for a, b in truth))] = 1
    if seen:
        image[(0, *(slice(a, b) for a, b in seen))] += 1
    if meta:
        image = MetaTensor(image, affine=AFFINE, meta={"filename_or_obj": file})
        label = MetaTensor(label, affine=AFFINE, meta={"filename_or_obj": file.replace("img", "lab")})
    return {"image": image, "label": label, **more}


BOX, OTHER = ((2, 6),) * 3, ((2, 6), (2, 6), (4, 8))
CASES = [
    case("d/p1/img.nrrd", BOX, BOX),
    case("d/p2/img.nrrd", BOX, OTHER),
    case("d/p3/img.nrrd", BOX),
    case("d/p4/img.nrrd", None, BOX),
]


class Network(torch.nn.Module):
    def forward(self, x):
        return 10 * (x - 0.5)


def evaluate(folder, cases, scorer=None, batch_size=1, locator=False, runs=1, **arguments):
    evaluator = SupervisedEvaluator(
        "cpu",
        DataLoader(Dataset(cases), batch_size=batch_size),
        Network(),
        inferer=LocatorCropInferer(
            16, Network() if locator else None, locator_spacing_mm=[1.0, 2.0, 0.5], margin_mm=0, divisible_k=4
        ),
        postprocessing=LogitsToClassd("pred"),
        val_handlers=[EvaluationReport(folder, scorer or VolumeScorer(), **arguments)],
    )
    for _ in range(runs):
        evaluator.run()


def table(folder):
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("figures", [False, True])
def test_three_files(tmp_path, figures, batch_size, caplog):
    with caplog.at_level(logging.INFO, "segbundles"):
        evaluate(tmp_path, CASES, batch_size=batch_size, figures=figures, title="Fish & chips")
    files = ["evaluation.log", "metrics.csv", "report", "report.html", "summary.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == files
    rows = table(tmp_path)
    assert [row["case"] for row in rows] == ["p1/img", "p2/img", "p3/img", "p4/img"]
    assert [row["status"] for row in rows] == ["ok", "ok", "missed", "false positive"]
    assert [row["dice"] for row in rows] == ["1", "0.5", "0", "0"]
    assert [row["hd_mm"] for row in rows] == ["0", "1", "", ""]  # 2 voxels of 0.5 mm; undefined
    assert [row["recall"] for row in rows] == ["1", "0.5", "0", ""]
    assert {row["spacing_mm"] for row in rows} == {"1 x 2 x 0.5"}
    assert list(rows[0])[-2:] == ["spacing_mm", "notes"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    spread = pytest.approx(np.std([1, 0.5, 0, 0], ddof=1))
    found = {"mean": 0.375, "sd": spread, "median": 0.25, "worst": 0.0, "n": 4, "left_out": 0, "groups": 4}
    assert summary["dice"].items() >= found.items()
    assert 0 <= summary["dice"]["low"] < 0.375 < summary["dice"]["high"] < 1
    assert (summary["hd_mm"]["n"], summary["hd_mm"]["left_out"]) == (2, 2)
    assert (summary["unit"], summary["groups"]) == ("cases", 4)
    assert [(row["true_volume_ml"], row["predicted_volume_ml"]) for row in rows] == [
        *[("0.064", "0.064")] * 2, ("0.064", "0"), ("0", "0.064")
    ]  # fmt: skip
    assert (summary["cases"], summary["missed"], summary["false_positive"]) == (4, 1, 1)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Fish &amp; chips" in page
    assert "p3/img" in page
    assert "2 of 4 (1 missed, 1 false positive)" in page
    assert "each case counts by itself" in page
    # fewer than five cases: no boxes
    assert b'id="line2d' not in (tmp_path / "report/distribution_dice.svg").read_bytes().split(b"matplotlib.axis_")[0]
    assert "Knobs" not in page
    assert page.count('<img src="data:image/jpeg') == (4 if figures else 0)
    sliders = [case["slices"] for case in report.read_preview(tmp_path / "report.html")]
    assert len(sliders) == (4 if figures else 0)
    if figures:  # in the order of the page, the worst first
        found = [[list(one["paths"]) for o in slices["overlays"] for one in o["classes"]] for slices in sliders]
        box, other = list("2345"), list("4567")
        assert sorted(found) == sorted([[box, box], [box, other], [box], [box]])
        assert {(slices["slices"], slices["aspect"]) for slices in sliders} == {(12, 0.5)}
    assert "Dice 0.3750 (sd 0.4787, worst 0.0000, n 4), 1 missed" in caplog.messages
    assert f"Results: {tmp_path / 'report.html'}, metrics.csv, summary.json" in caplog.messages


def test_settings_are_kept_and_shown_and_their_notes_are_in_every_row(tmp_path):
    facts = {"sha256": "c0ffee", "validation": {"metric": "val_mean_dice", "at": {"epoch": 3}}}
    settings = RunSettings("heart", "2.0", "run <b>", {"amp": True, "mode": ""}, {"amp": "args"}, {"weights": facts})
    settings.notes = ["amp differs"]
    evaluate(tmp_path, CASES, settings=settings, locator=True)
    found = "locator found nothing: whole volume segmented; amp differs"
    assert [row["notes"] for row in table(tmp_path)] == ["amp differs", "amp differs", found, "amp differs"]
    assert json.loads((tmp_path / "evaluating.config.json").read_text())["knobs"] == {"amp": True, "mode": ""}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for cells in (
        *(("bundle", "heart 2.0"), ("command", "run &lt;b&gt;"), ("amp", "true", "args"), ("mode", "", "config")),
        *(("sha256", "c0ffee"), ("validation", "metric: val_mean_dice, at: (epoch: 3)")),
    ):
        assert f'<th scope="row">{cells[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in cells[1:]) in page
    assert [caption in page for caption in ("Run<", "Knobs<", "Facts of weights<", "Versions<")] == [True] * 4


def test_units_are_given_for_lengths_alone_and_the_legend_names_all_classes(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(report.evaluation, "write_report", lambda path, **arguments: seen.update(arguments))
    evaluate(tmp_path, CASES[:2], VolumeScorer(3), figures=False, settings=RunSettings(classes={"1": "atrium"}))
    assert set(seen["units"]) == {f"{m}_mm{s}" for m in ("hd", "hd95", "assd") for s in ("", "_1", "_2")}
    assert set(seen["units"].values()) == {"mm"}
    assert {"dice", "dice_1", "hd_mm_2"} < set(seen["summary"])
    assert seen["classes"] == {"1": "atrium"}
    assert (seen["figures"], seen["outlines"], seen["class_names"]) == (None, True, ["atrium", "class 2"])


def test_the_summary_tells_how_to_repeat_the_evaluation(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    splits = {"training": [{"group": "a"}, {"group": "a"}], "testing": [{}, {}, {}]}
    (data / "datalist.json").write_text(json.dumps({"name": "heart", **splits}))
    settings = RunSettings("heart", "2.0", "run", {"dataset_dir": str(data), "split": "testing"})
    settings.facts = {"weights": {"sha256": "c0ffee", "knobs": {"norm": "batch"}}}
    evaluate(tmp_path / "o", CASES, settings=settings, figures=False)
    evaluate(tmp_path / "other", [*CASES[:3], case("d/p4/img.nrrd", BOX, BOX)], settings=settings, figures=False)
    run, other = (json.loads((tmp_path / name / "summary.json").read_text())["run"] for name in ("o", "other"))
    assert (run["command"], run["device"], run["weights"]) == ("run", "cpu", settings.facts)
    assert run["knobs"] == settings.knobs
    assert set(run["versions"]) >= {"segbundles", "monai", "torch"}
    assert run["data"]["splits"] == {
        "training": {"cases": 2, "groups": 1},
        "validation": {"cases": 0, "groups": 0},
        "testing": {"cases": 3, "groups": 3},
    }
    assert run["data"]["datalist_sha256"] == hashlib.sha256((data / "datalist.json").read_bytes()).hexdigest()
    assert run["data"]["scored_sha256"] != other["data"]["scored_sha256"]
    page = (tmp_path / "o/report.html").read_text(encoding="utf-8")
    assert "<td>cases: 2, groups: 1</td>" in page
    assert run["data"]["scored_sha256"] in page
    assert len({row["content"] for row in table(tmp_path / "o")}) == 2  # the same truth in three of the four


def test_probabilities_are_counted_without_pixels_of_unknown_class(tmp_path):
    label = torch.tensor([[[1.0, 0.0, 0.0, 255.0]]])
    prob = torch.tensor([[[0.25, 0.75, 1.0, 0.5]], [[0.75, 0.25, 0.0, 0.5]]])
    item = {"image": label, "label": label, "pred": (label == 1).float(), "prob": prob}

    def step(engine, batch):
        engine.state.batch = [batch]
        return [batch]

    engine = Engine(step)
    EvaluationReport(tmp_path, FrameScorer(), figures=False).attach(engine)
    for _ in range(2):  # a second run starts afresh
        engine.run([item, item])
    found = json.loads((tmp_path / "summary.json").read_text())["probabilities"]
    # three pixels of each case count, with gaps of 0.25, 0.25 and 0
    assert found["ece"] == pytest.approx((0.25 + 0.25) / 3)
    assert found["ece_without_background"] == pytest.approx(0.25)
    assert (found["average_precision"], found["dice"]) == (1.0, 1.0)
    counts = read_evaluation(tmp_path).probabilities
    (table_of_group,) = (one.table for one in counts.values())
    assert table_of_group.sum(1) == pytest.approx([6, 2, 2])
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"calibration.svg", "precision_recall.svg", "thresholds.svg", "probabilities.tex"} < names


def test_kept_truth_and_notes_of_a_locator(tmp_path):
    evaluate(tmp_path, CASES, figures=False, locator=True)
    rows = table(tmp_path)
    assert [row["truth_in_box"] for row in rows] == ["1", "0.5", "1", ""]
    assert [row["notes"] for row in rows] == ["", "", "locator found nothing: whole volume segmented", ""]


def test_names(tmp_path):
    """The datalist's, or the image's folder and stem; the whole path where two would be the same."""
    files = {"d/p1/img.nii.gz": ("patient 1", ""), "e/p1/img.nii.gz": ("", "")}
    evaluate(tmp_path, [case(file, BOX, BOX, case=name) for file, names in files.items() for name in names])
    names = ["patient 1", "p1/img", "e/p1/img.nii.gz", "e/p1/img.nii.gz (4)"]
    assert [row["case"] for row in table(tmp_path)] == names
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count('<img src="data:image/jpeg') == 4


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ("aabb", "4 cases belong to 2 patients"),
        ("aaaa", "4 cases belong to 1 patient:"),
        ("abcd", "All cases belong to 4 patients: the figures say little about others"),
        ("abcde", ""),
        (("a", "a", ""), ""),
    ],
    ids=["few", "one", "one case each", "five", "not all have one"],
)
def test_cases_of_few_groups_are_named_in_log_and_report(tmp_path, groups, said, caplog):
    cases = [case("a.nrrd", BOX, BOX, group=group) for group in groups]
    with caplog.at_level(logging.INFO, "segbundles"):
        evaluate(tmp_path, cases, figures=False)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in (caplog.text, page, (tmp_path / "evaluation.log").read_text()):
        assert ("say little about others" in text) == bool(said)
        assert said in text


def test_plain_tensors(tmp_path):
    evaluate(tmp_path, [case("", BOX, BOX, meta=False), case("", BOX, OTHER, meta=False)], figures=False)
    rows = table(tmp_path)
    assert [row["case"] for row in rows] == ["image", "image (2)"]
    assert [row["hd_mm"] for row in rows] == ["0", "2"]
    assert rows[0]["spacing_mm"] == "1 x 1 x 1"


def test_a_second_run_starts_afresh(tmp_path):
    evaluate(tmp_path, CASES[:2], runs=2, figures=False)
    assert len(table(tmp_path)) == 2


def test_output_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "o").touch()
    with pytest.raises(ValueError, match=re.escape(f"output_dir '{tmp_path}/o' cannot be written to")):
        evaluate(tmp_path / "o", CASES)


def test_the_scorer_in_the_docstring_works(tmp_path):
    names = {}
    exec(textwrap.dedent(Scorer.__doc__.split(".. code-block:: python")[1]), names)
    evaluate(tmp_path, CASES, names["DiceScorer"]())
    assert [row["dice"] for row in table(tmp_path)] == ["1", "0.5", "0", "0"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count('<img src="data:image/jpeg') == 4


@pytest.mark.parametrize(("total", "share"), [(4_000_000, 500_000), (400_000, 100_000)])
def test_sliders_share_the_report(tmp_path, monkeypatch, total, share):
    seen = []
    monkeypatch.setattr(report, "case_slices", lambda *given, most_bytes, **more: seen.append(most_bytes))
    monkeypatch.setattr(module, "_SLICES_BYTES", total)
    evaluate(tmp_path, CASES)
    assert seen == [share] * 4
