from __future__ import annotations

import json

import numpy as np
import pytest
from monai.data import MetaTensor
from scipy.special import expit

from segbundles import calibration
from segbundles.calibration import (
    CANDIDATES,
    Case,
    calibrate,
    evaluation_folders,
    fit,
    fit_probabilities,
    lower_margin,
    out_of_fold,
    parts_of,
    review_limit,
    simplest,
    summary_lines,
    summary_rows,
    usual_ranges,
)
from segbundles.confidence import LOGITS, calibrated, pixel_counts
from segbundles.facts import read_facts, sha256


def made_case(number, temperature=2.0, shift=0.0, seed=None, group=None, pixels=4000):
    """A case whose truths are drawn from its probabilities after a temperature and a shift."""
    rng = np.random.default_rng(number if seed is None else seed)
    doubtful = rng.uniform(0.05, 0.6)
    z = np.where(rng.random(pixels) < doubtful, rng.choice(LOGITS, pixels), rng.choice([-4.375, 7.125], pixels))
    truth = rng.random(pixels) < expit(z / temperature + shift)
    p, mask = expit(z), z > 0
    shape = {"size_percent": 20.0 + number, "parts": 1.0, "border": 0.0}
    return Case(
        name=f"c{number}",
        group=group or f"g{number}",
        fold=0,
        score=2 * (mask & truth).sum() / (mask.sum() + truth.sum()),
        inside=pixel_counts(p, mask),
        outside=pixel_counts(p, ~mask),
        true=pixel_counts(p, truth),
        size=int(truth.sum()),
        pixels=pixels,
        mask=shape,
        truth=shape,
        image={"rough_0": 0.1 + 0.001 * number},
    )


@pytest.mark.parametrize(("temperature", "shift"), [(0.7, 0.0), (1.0, -1.0), (2.5, 0.5)])
def test_temperature_and_shift_are_found_again(temperature, shift):
    cases = [made_case(number, temperature, shift) for number in range(30)]
    assert fit_probabilities(cases) == (pytest.approx(temperature, rel=0.05), pytest.approx(shift, abs=0.05))


@pytest.mark.parametrize(
    ("groups", "margin"),
    [
        (range(8), None),  # a new group is the worst of nine with a probability of 1 / 9, more than 0.1
        (range(9), 8.0),
        (range(19), 17.0),  # 18 of 20 reach 0.9
        # ten groups: the first has ten cases with a weight of 1 / 100 each, the others one with 1 / 10 each
        ([0] * 10 + list(range(1, 10)), 18.0),
    ],
)
def test_margin_of_the_lower_bound(groups, margin):
    assert lower_margin(np.arange(len(groups)), groups) == margin


def test_margin_covers_new_groups():
    """Nine of ten new cases are above the bound, also if the cases of a group resemble each other."""
    rng = np.random.default_rng(0)
    held = []
    for _ in range(300):
        levels = rng.normal(size=21)
        groups = np.repeat(np.arange(20), rng.integers(1, 8, 20))
        margin = lower_margin(levels[groups] + 0.1 * rng.normal(size=len(groups)), list(groups))
        held.append(levels[20] + 0.1 * rng.normal() <= margin)
    assert 0.86 <= np.mean(held) <= 0.96


def test_a_fit_describes_the_cases():
    cases = [made_case(number) for number in range(20)]
    found = fit(cases, "expected score", "dice")
    assert found["temperature"] == pytest.approx(2, rel=0.1)
    assert (found["intercept"], found["coefficients"]) == (0.0, {"expected": 1.0})
    assert found["masks"]["parts"] == [0.0, 1.0]
    assert found["masks"]["border"] == [0.0, 0.0]
    # 20 to 39 and 0.1 to 0.119; the smallest and the largest case need more than the others have seen
    assert found["masks"]["size_percent"][0] < 20 < 39 < found["masks"]["size_percent"][1]
    assert found["images"]["rough_0"] == pytest.approx([0.1 - 0.0011, 0.119 + 0.0011], abs=2e-4)
    assert found["low"] >= 0.7


@pytest.mark.parametrize(
    ("confidence", "score", "limit"),
    [
        # no failure: a mask that is expected to be one
        ([0.9, 0.95], [0.9, 0.8], 0.7),
        # a larger limit would find the failure at 0.85, and flag one of eight other cases
        ([0.75, 0.8, 0.85, *[0.9] * 7], [0.1, 0.9, 0.1, *[0.9] * 7], 0.8),
        # one of ten may be flagged
        ([0.75, 0.8, 0.85, *[0.9] * 9], [0.1, 0.9, 0.1, *[0.9] * 9], np.nextafter(0.85, 1)),
        # the only failure is found without any false alarm
        ([0.75, 0.8, 0.85, *[0.9] * 7], [0.1, 0.9, *[0.9] * 8], np.nextafter(0.75, 1)),
        # never below the limit of a failure
        ([0.2, 0.3, 0.5, 0.9], [0.1, 0.1, 0.2, 0.9], 0.7),
    ],
)
def test_limit_of_a_low_confidence(confidence, score, limit):
    assert review_limit(confidence, score, 0.7) == limit


def test_ranges_have_room_for_a_new_group():
    # five groups with 0 to 4: without the last, the range is 0 to 3, and it needs a third of it (and 0.004) more
    rows = [{"flat_0": float(k), "size_ml": 10.0} for k in range(5)]
    found = usual_ranges(rows, list("abcde"))
    wider = 1 / 3.003
    assert found["flat_0"] == pytest.approx([-wider * 4.004, 4 + wider * 4.004])
    # sizes that are all the same may differ by as many times 5 %
    assert found["size_ml"] == pytest.approx([10 * np.exp(-0.05 * wider), 10 * np.exp(0.05 * wider)])


def test_ranges_leave_out_what_one_of_twenty_groups_needs():
    rows = [{"flat_0": float(k), "rough_0": 0.0} for k in range(39)] + [{"flat_0": 0.0, "rough_0": 1.0}]
    found = usual_ranges(rows, list(range(40)))
    # 39 groups need at most 1 / 37 of the range; what the one with another texture needs does not count
    assert found["flat_0"] == pytest.approx([-38 / 37, 38 + 38 / 37], rel=1e-3)
    assert found["rough_0"] == pytest.approx([-1 / 37, 1 + 1 / 37], rel=1e-2)


@pytest.mark.parametrize(("sizes", "expected"), [([0.0, 10.0, 20.0], 10.0), ([10.0, 0.0, 20.0], 10.0)])
def test_an_empty_mask_has_no_size(sizes, expected):
    low, high = usual_ranges([{"size_ml": size} for size in sizes], list("abc"))["size_ml"]
    assert 0 < low < expected < 2 * expected < high


def test_a_line_is_fitted_to_the_score():
    cases = [made_case(number) for number in range(40)]
    for case in cases:
        case.score = 0.3 + 0.5 * case.features("dice", calibrated(*fit_probabilities(cases)))["expected"]
    found = fit(cases, "line on the expected score", "dice")
    assert found["intercept"] == pytest.approx(0.3, abs=0.02)
    assert found["coefficients"]["expected"] == pytest.approx(0.5, abs=0.02)


@pytest.fixture
def bundle(tmp_path):
    """A bundle with weights, and an evaluation of twelve cases with predictions."""
    root = tmp_path / "fish"
    (root / "configs").mkdir(parents=True)
    (root / "models").mkdir()
    step = {"_target_": "segbundles.transforms.Confidenced", "score": "dice"}
    (root / "configs/inference.json").write_text(json.dumps({"postprocessing": {"transforms": [step]}}))
    (root / "models/model.pt").write_bytes(b"weights")
    facts = {"sha256": sha256(root / "models/model.pt"), "knobs": {}, "seed": 3}
    (root / "models/model.json").write_text(json.dumps(facts))
    items = [{"case": f"c{k}", "group": f"g{k // 2}", "seed": k} for k in range(24)]
    (root / "configs/train.json").write_text(json.dumps({"split": "", "validate": {"dataset": []}}))
    (root / "configs/evaluate.json").write_text(json.dumps({"validate::dataset": "$[]"}))
    folder = tmp_path / "out"
    (folder / "predictions").mkdir(parents=True)
    (folder / "evaluating.config.json").write_text(json.dumps({"knobs": {"split": "testing"}}))
    for item in items:
        rng = np.random.default_rng(item.pop("seed"))
        z = rng.normal(0, rng.uniform(0.5, 6), (1, 32, 32))
        z[0, :4] = -9
        arrays = {"pred": (z > 0).astype(np.uint8), "label": (rng.random(z.shape) < expit(z)).astype(np.uint8)}
        arrays["label"][0, 0, 0] = 255  # not known, and so not counted
        probability = np.concatenate([expit(-z), expit(z)]).astype(np.float16)
        np.savez(folder / f"predictions/{item['case']}.npz", probability=probability, **arrays)
        item["image"] = MetaTensor(rng.random((1, 32, 32)), meta={"filename_or_obj": f"d/{item['case']}.png"})
    return root, folder, items


def test_a_calibration_goes_into_the_facts_and_a_record(bundle, monkeypatch):
    root, folder, items = bundle
    monkeypatch.setattr(calibration.cases, "_dataset", lambda *_: items)
    record = calibrate(root, folder, root / "models/model.pt")
    assert record == json.loads((folder / "confidence.json").read_text())
    assert (record["cases"], record["groups"], record["score"]) == (24, 12, "dice")
    with np.load(folder / "predictions/c0.npz") as kept:
        mask, truth = kept["pred"][0].ravel()[1:] > 0, kept["label"][0].ravel()[1:] > 0
    assert record["cases_scored"][0]["score"] == pytest.approx(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))
    # the truths were drawn from the probabilities
    assert record["temperature"] == pytest.approx(1, abs=0.15)
    assert record["measured"]["rank_correlation"]["value"] > 0.9
    assert record["measured"]["auroc_failures"] > 0.9
    assert record["measured"]["error"] < 0.03
    assert record["candidate"] == "expected score, as the network says"  # the simplest one is as good as the others
    assert 0.7 <= record["measured"]["coverage"]["value"] <= 1
    facts = read_facts(root / "models/model.pt")
    assert facts["seed"] == 3
    assert facts["confidence"]["margin"] == record["margin"]
    assert [row[0] for row in summary_rows(record)] == list(record["candidates"]) == list(CANDIDATES)
    assert "Cases: 24 of 12 groups, mean dice" in summary_lines(record)[1]


def without_case(folder):
    (folder / "predictions/c3.npz").unlink()


def without_all(folder):
    for path in (folder / "predictions").glob("*.npz"):
        path.unlink()


def without_probabilities(folder):
    np.savez(folder / "predictions/c0.npz", label=np.zeros((1, 2, 2)), pred=np.zeros((1, 2, 2)))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_case, "c3.npz is missing: evaluate again with --save_predictions true."),
        (without_all, "has no predictions: evaluate again with --save_predictions true."),
        (without_probabilities, "c0.npz has no probabilities: evaluate again with --save_predictions true."),
    ],
)
def test_what_is_missing_is_named(bundle, monkeypatch, spoil, said):
    root, folder, items = bundle
    monkeypatch.setattr(calibration.cases, "_dataset", lambda *_: items)
    spoil(folder)
    with pytest.raises(ValueError, match=said):
        calibrate(root, folder, root / "models/model.pt")


def test_one_group_is_too_few(bundle, monkeypatch):
    root, folder, items = bundle
    monkeypatch.setattr(calibration.cases, "_dataset", lambda *_: items[:2])
    with pytest.raises(ValueError, match=r"has cases of one group only: a confidence needs at least two."):
        calibrate(root, folder, root / "models/model.pt")


def test_weights_need_facts(bundle):
    root, folder, _ = bundle
    (root / "models/model.json").unlink()
    with pytest.raises(ValueError, match=r"has no facts beside it, model.json: confidence is a fact of the weights."):
        calibrate(root, folder, root / "models/model.pt")


def test_folds_of_a_cross_validation(tmp_path):
    for fold in range(2):
        (tmp_path / f"fold{fold}/evaluation/predictions").mkdir(parents=True)
        (tmp_path / f"fold{fold}/evaluation/predictions/a.npz").touch()
    assert evaluation_folders(tmp_path) == [tmp_path / f"fold{fold}/evaluation" for fold in range(2)]


def test_the_simplest_way_within_one_standard_error_is_kept():
    rng = np.random.default_rng(0)
    true = np.linspace(0.5, 1, 60)
    noise = rng.normal(0, 0.02, 60)
    better = noise.copy()
    better[0] /= 2  # one case of 60 says little
    found = {"poor": rng.permutation(true), "good": true + noise, "a little better": true + better}
    assert simplest(found, true, list(range(60)), 0.7) == "good"


def test_a_way_that_finds_failures_is_better():
    # both order the good cases perfectly and have the same error, but the first does not see the failures
    true = np.array([*np.linspace(0.71, 1, 56), 0.1, 0.2, 0.3, 0.4])
    blind, seeing = true.copy(), true.copy()
    blind[-4:] += 0.55
    seeing[:56] += 0.55 * 4 / 56
    assert simplest({"blind": blind, "seeing": seeing}, true, list(range(60)), 0.7) == "seeing"


def test_a_case_is_judged_without_its_group():
    cases = [made_case(number, group=f"g{number // 2}") for number in range(8)]
    before = out_of_fold(cases, "line on the expected score", "dice")
    cases[1].score = 0.0
    after = out_of_fold(cases, "line on the expected score", "dice")
    same = [one == other for one, other in zip(before, after, strict=True)]
    assert same == [True, True, *[False] * 6]  # of the same group as the case that has changed
    assert parts_of([f"g{k}" for k in range(41)]) == [*range(20), *range(20), 0]
