from __future__ import annotations

import math

import pytest
import torch
from ignite.engine import Engine
from ignite.metrics import IoU, mIoU
from ignite.metrics.confusion_matrix import cmAccuracy
from monai.data import MetaTensor

from segbundles.metrics import PooledConfusion, confusion_counts, pooled_metric, pooled_scores


def outputs() -> list[list[dict[str, torch.Tensor]]]:
    """Two batches of frames of different size, of three classes, with void pixels."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for count, size in ((2, (4, 5)), (1, (3, 7))):
        items = []
        for _ in range(count):
            pred, label = torch.randint(0, 3, (2, 1, *size), generator=generator).to(torch.uint8)
            label[0, 0] = 255
            items.append({"pred": MetaTensor(pred), "label": label})
        batches.append(items)
    return batches


def test_engine_pools_over_frames_and_leaves_void_out_as_ignite_does() -> None:
    engine = Engine(lambda _, batch: batch)
    confusion = PooledConfusion(3)
    names = ("jaccard", "mean_jaccard", "accuracy", "jaccard_2")
    for name in names:
        pooled_metric(confusion, name).attach(engine, name)
    for name, metric in (("iou", IoU), ("miou", mIoU), ("acc", cmAccuracy)):
        metric(confusion).attach(engine, name)
    for _ in range(2):  # the second run starts from nothing
        metrics = engine.run(outputs()).metrics
    assert all(isinstance(metrics[name], float) for name in names)
    assert metrics["mean_jaccard"] == pytest.approx(metrics["miou"])
    assert metrics["accuracy"] == pytest.approx(metrics["acc"])
    assert metrics["jaccard_2"] == pytest.approx(metrics["iou"][2].item())
    assert metrics["jaccard"] == pytest.approx(metrics["iou"][1:].mean().item())
    total = sum(confusion_counts(item["pred"], item["label"], 3) for batch in outputs() for item in batch)
    assert torch.equal(torch.as_tensor(total), confusion.confusion_matrix)
    assert int(total.sum()) == 2 * 15 + 14


def test_scores_by_hand() -> None:
    scores = pooled_scores(torch.tensor([[90, 2], [3, 5]]))
    assert scores["accuracy"] == pytest.approx(0.95)
    assert scores["jaccard_0"] == pytest.approx(90 / 95)
    assert scores["jaccard"] == scores["jaccard_1"] == pytest.approx(0.5)
    assert scores["mean_jaccard"] == pytest.approx((90 / 95 + 0.5) / 2)


def test_a_class_that_does_not_occur_is_in_no_mean() -> None:
    scores = pooled_scores(torch.tensor([[6, 0, 0], [2, 2, 0], [0, 0, 0]]))
    assert math.isnan(scores["jaccard_2"])
    assert scores["jaccard"] == 0.5
    assert scores["mean_jaccard"] == pytest.approx((0.75 + 0.5) / 2)
    nothing = pooled_scores(torch.zeros(2, 2))
    assert all(math.isnan(value) for value in nothing.values())


def test_a_metric_that_is_not_defined_is_0() -> None:
    """So that the best weights can be told, also by a validation without a polyp."""
    engine = Engine(lambda _, batch: batch)
    pooled_metric(PooledConfusion(2)).attach(engine, "jaccard")
    empty = torch.zeros(1, 2, 2, dtype=torch.uint8)
    assert engine.run([[{"pred": empty, "label": empty}]]).metrics["jaccard"] == 0.0
