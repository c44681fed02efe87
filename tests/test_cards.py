"""Model cards, README and docs/benchmarks.md show what the files in docs/figures contain, and nothing else."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
from pathlib import Path

import cards
import pytest
from torch.utils.tensorboard import SummaryWriter

from segbundles.evaluations import read_evaluation
from segbundles.metrics import summarize
from segbundles.report import pooled_intervals
from segbundles.statistics import with_intervals

ROOT = Path(__file__).resolve().parents[1]
RECORDS = sorted((ROOT / "bundles").glob("*/docs/figures/*.json"))
QUALITY = re.compile(r"\b(dice|jaccard|accuracy|v_rand|v_info|hd95|assd|precision|recall|ece)\b", re.IGNORECASE)


@pytest.mark.parametrize("page", cards.FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_are_what_the_files_give(page):
    assert cards.write(page) == page.read_text(encoding="utf-8"), "run: python benchmarks/cards.py"
    assert f">{cards.NOTHING}<" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("bundle", cards.BUNDLES, ids=lambda path: path.name)
def test_a_card_has_knobs_and_results(bundle):
    card = (bundle / "docs/README.md").read_text(encoding="utf-8")
    kinds = {match[1].split()[0] for match in cards.BLOCK.findall(card)}
    assert {"knobs", "crossvalidation", "confidence", "speed"} <= kinds
    assert cards.joint_record(bundle)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parents[2].name}-{path.stem}")
def test_a_record_is_of_its_cases(path, tmp_path):
    record = json.loads(path.read_text())
    assert not re.search(
        r"""[\s"',=]/\w""", path.read_text() + path.with_suffix(".csv").read_text()
    )  # no absolute path
    shutil.copyfile(path.with_suffix(".csv"), tmp_path / "metrics.csv")
    rows = read_evaluation(tmp_path).rows
    found = with_intervals(summarize(rows), rows, [row["group"] for row in rows])
    for name, entry in found.items():
        if isinstance(entry, dict):
            expected = {key: value for key, value in record[name].items() if isinstance(value, float)}
            given = {key: entry[key] for key in expected}
            assert given == pytest.approx(expected, rel=1e-4, abs=1e-5), name
        else:
            assert entry == record[name], name
    if "pooled_intervals" in record:
        expected = record["pooled_intervals"]["jaccard"]
        assert pooled_intervals(rows)["jaccard"].as_dict() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("page", cards.PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_has_no_figure_without_a_file(page):
    """Published figures of others have their source in the same line, as a link."""
    for line in cards.BLOCK.sub("", page.read_text(encoding="utf-8")).splitlines():
        if QUALITY.search(line) and "](http" not in line and not line.startswith("    "):
            text = re.sub(r"`[^`]*`", "", line)
            assert not re.search(r"(?<![\d.])0?\.\d\d+\b", text), line


SUMMARY = {
    "dice": {"mean": 0.81234567, "sd": 0.1, "median": 0.8, "worst": 0.5, "low": 0.7, "high": 0.9, "n": 3},
    "pooled_jaccard": 0.75,
    "pooled_intervals": {"jaccard": {"value": 0.75, "low": 0.6, "high": 0.8}},
    "probabilities": {"ece": 0.01, "intervals": {"ece": {"value": 0.01, "low": None, "high": None}}},
    "missed": 1,
    "cases": 3,
    "groups": 2,
    "unit": "sequences",
}


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """Return a bundle whose card has all parts, with a cross-validation in C."""
    folder = tmp_path / "bundles/one"
    (folder / "models").mkdir(parents=True)
    (folder / "docs/figures").mkdir(parents=True)
    (folder / "models/model.json").write_text('{"sha256": "aa"}')
    earlier = {**SUMMARY, "run": {"command": "x"}, "folds": [], "data_sets": []}
    (folder / "docs/figures/crossvalidation.json").write_text(json.dumps(earlier))
    fold = {"versions": {"torch": "2"}, "device": "cpu", "data": {"name": "set", "scored_sha256": "cc"}}
    parts = {"cases": 3, "groups": 2, "dice": SUMMARY["dice"], "pooled_jaccard": {"mean": 0.7, "low": 0.6, "high": 0.8}}
    joint = {"folds": [{"fold": 0, **parts}], "data_sets": [{"data_set": "s", **parts}], "run": {"folds": [fold]}}
    (tmp_path / "C").mkdir()
    (tmp_path / "C/summary.json").write_text(json.dumps({**SUMMARY, **joint}))
    (tmp_path / "C/metrics.csv").write_text("case,data_set,dice\na,s,0.5\nb,s,0.9\nc,s,0.7\nd,s,\ne,t,0.8\n")
    pictures = [(name, base64.b64encode(name.encode()).decode()) for name in "abcde"]
    (tmp_path / "C/report.html").write_text(
        "".join(
            f'<img src="data:image/png;base64,{data}" alt="{name}: image with truth and prediction">'
            for name, data in pictures
        )
    )
    (tmp_path / "C/crossvalidation.json").write_text(json.dumps({"folds": 3, "settings": ["--mirror_axes", "[]"]}))
    (folder / "docs/README.md").write_text(
        "A\n<!-- cards: crossvalidation dice pooled_jaccard ece missed -->\nold\n<!-- /cards -->\n"
        "Dice <!-- cards: value s:dice worst --><!-- /cards -->.\n"
    )
    monkeypatch.setattr(cards, "ROOT", tmp_path)
    monkeypatch.setattr(cards, "BUNDLES", [folder])
    (folder / "configs").mkdir()
    (folder / "configs/metadata.json").write_text('{"eval_metrics": {"mean_dice": 0.1}, "x": 1}')
    monkeypatch.setattr(cards, "METADATA", {"one": {"mean_dice": "s:dice"}})
    monkeypatch.setattr(cards, "FILES", [folder / "docs/README.md", folder / "configs/metadata.json"])
    return folder


def run(monkeypatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["cards.py", *words])
    with pytest.raises(SystemExit) as stop:
        cards.main()
    return stop.value.code


def test_a_crossvalidation_is_taken_over_with_its_pictures(bundle, tmp_path, monkeypatch):
    assert run(monkeypatch, "--check") == 1  # the text of earlier results
    assert run(monkeypatch, "--bundle", "one", "--crossvalidation", str(tmp_path / "C")) == 0
    card = (bundle / "docs/README.md").read_text()
    assert '    segbundles crossvalidate "$B" "$D" "$O" --folds 3 --mirror_axes \'[]\'\n' in card
    for name in ("s", "fold 0"):
        row = f"| {name} | 3 | 2 | **0.812** (0.700 to 0.900) | 0.100 | 0.800 | 0.500 | 0.700 (0.600 to 0.800) |"
        assert row in card, name
    row = "| all | 3 | 2 | **0.812** (0.700 to 0.900) | 0.100 | 0.800 | 0.500 | 0.750 (0.600 to 0.800) | 0.010 | 1 |\n"
    assert row in card
    assert "Dice <!-- cards: value s:dice worst -->0.500<!-- /cards -->." in card
    assert (bundle / "configs/metadata.json").read_text() == '{"eval_metrics": {"mean_dice": 0.8123}, "x": 1}'
    found = {path.stem: path.read_text() for path in (bundle / "docs").glob("*.png")}
    assert found == {"s_worst": "a", "s_median": "c", "s_best": "b", "t_worst": "e", "t_median": "e", "t_best": "e"}
    assert run(monkeypatch, "--check") == 0


def test_tables_of_speed_appear_when_they_are_measured(bundle):
    assert cards.speed(bundle, []) == ""
    (bundle / "docs/figures/memory.csv").write_text("command,peak\nsegment,900\nMeasured on two cores.\n")
    (bundle / "docs/figures/stages.csv").write_text("stage,seconds\nnetwork,0.1\n")
    _, _, text = cards.speed(bundle, []).partition("_folds`.\n\n")
    assert text == (
        "One image, stage by stage:\n\n| stage | seconds |\n|---|---|\n| network | 0.1 |\n\n"
        "Memory of each command:\n\n| command | peak |\n|---|---|\n| segment | 900 |\n\nMeasured on two cores.\n"
    )


CALIBRATED = {
    "weights_sha256": "aa",
    "score": "dice",
    "failure_below": 0.7,
    "cases": 40,
    "groups": 10,
    "margin": 0.21,
    "measured": {
        "bias": 0.03,
        "rank_correlation": {"value": 0.71, "low": 0.6, "high": 0.8},
        "auroc_failures": 0.91,
        "failures": 4,
        "coverage": {"value": 0.925, "low": 0.875, "high": 0.951},
        "flagged": 0.2,
        "failures_flagged": 0.75,
    },
}
WRONG = [
    {"input": "polyp", "right": True, "outcome": "passed"},
    {"input": "knee", "right": False, "outcome": "flagged"},
    {"input": "black", "right": False, "outcome": "refused"},
    {"input": "upside down", "right": False, "outcome": "passed"},
]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            [
                "| quantity | 40 unseen cases, 10 groups |\n|---|---|\n",
                "| rank correlation of confidence and score | 0.710 (0.600 to 0.800) |\n",
                "| AUROC for finding failures (Dice below 0.7: 4 cases) | 0.910 |\n",
                "| score at or above the lower bound, 90 % expected | 92 % (88 % to 95 %) |\n",
                "| confidence minus score, mean | 0.030 |\n| confidence minus lower bound | 0.210 |\n",
                "| flagged for review | 20 % |\n| failures that are flagged | 75 % |\n",
            ],
        ),
        (
            {
                "failures": 0,
                "auroc_failures": None,
                "failures_flagged": None,
                "coverage": {"value": None, "low": None, "high": None},
            },
            [
                "(Dice below 0.7: 0 cases) | no failure |\n",
                "90 % expected | no bound: it needs 9 groups |\n",
                "| failures that are flagged | no failure |\n",
            ],
        ),
    ],
)
def test_confidence_is_what_its_files_say(bundle, changes, expected):
    record = CALIBRATED | {"measured": CALIBRATED["measured"] | changes}
    (bundle / "docs/confidence.json").write_text(json.dumps(record))
    text = cards.confidence(bundle, ())
    for line in [*expected, '\n    segbundles calibrate "$B" "$O"\n']:
        assert line in text, line
    assert "wrong inputs" not in text
    (bundle / "docs/wrong_inputs.json").write_text(json.dumps({"weights_sha256": "aa", "rows": WRONG}))
    text = cards.confidence(bundle, ())
    assert "| wrong inputs flagged or refused, one image of each kind | 2 of 3 (missed: upside down) |\n" in text
    assert "    python benchmarks/wrong_inputs.py --samples samples --bundles one --record\n" in text


def test_confidence_of_other_weights_is_dropped(bundle):
    assert cards.confidence(bundle, ()) == ""
    for name, digest in (("confidence", "aa"), ("wrong_inputs", "bb")):
        (bundle / f"docs/{name}.json").write_text(json.dumps({"weights_sha256": digest}))
    assert cards.drop_stale(bundle) == ["wrong_inputs"]
    assert [path.name for path in (bundle / "docs").glob("*.json")] == ["confidence.json"]


def test_an_unknown_part_is_refused(bundle):
    (bundle / "docs/README.md").write_text("<!-- cards: figure x -->\n<!-- /cards -->")
    with pytest.raises(SystemExit, match="no part 'figure'; choose from knobs, crossvalidation"):
        cards.write_page(bundle / "docs/README.md")


def test_trainings_are_drawn_and_their_cost_is_the_median_epoch(tmp_path):
    """A stop in the middle of an epoch does not count."""
    out, bundle = tmp_path / "out", tmp_path / "bundle"
    (bundle / "docs/figures").mkdir(parents=True)
    with SummaryWriter(str(out / "tensorboard/training_1")) as writer:
        for step in range(3):
            writer.add_scalar("train_loss", 1 / (1 + step), step)
    lines = ["Threads: 2 (2 cores for this process)."]
    lines += [
        f"epoch {k}/3, train_loss 0.5, learning rate 1e-3, {s} s, 1 min left"
        for k, s in ((1, 36.0), (2, 36.0), (3, 900.0))
    ]
    (out / "training.log").write_text("\n".join(lines))
    cards.trainings({"model": out}, bundle)
    with (bundle / "docs/figures/training.csv").open(newline="") as file:
        heads, row, _ = csv.reader(file)
    assert row == ["model", "3", "36", "0.1"]  # 3 epochs of 36 s on 2 threads are 216 s of a core
    assert heads[-1] == "core-hours"
    assert (bundle / "docs/curves.png").read_bytes()[:4] == b"\x89PNG"
