from __future__ import annotations

import inspect
import logging

import pytest
import torch
from ignite.engine import Events
from monai.data import Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.inferers import SimpleInferer

from segbundles.data import Failure, TolerantDataLoader
from segbundles.engines import ImageReport, InferenceEvents, TolerantEvaluator
from segbundles.engines import tolerant as module
from segbundles.meta import add_note, set_slice_files


def image(name: str, value: float, slices: int = 1) -> dict[str, MetaTensor]:
    data = MetaTensor(torch.full((1, 2, 2, slices), value), meta={"filename_or_obj": name})
    if slices > 1:
        set_slice_files(data.meta, [f"{name}{k}" for k in range(slices)])
    add_note(data, *([f"note on {name}"] if value == 2 else []))
    return {"image": data}


class Negative(torch.nn.Module):
    """A network that fails at a batch with a 9."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x == 9).any()):
            raise RuntimeError("out of memory")
        return -x


def postprocess(item: dict) -> dict:
    if bool((item["pred"] == -8).any()):
        raise KeyError
    return {**item, "pred": MetaTensor(item["pred"].as_tensor())}  # like Invertd, without the metadata


def evaluate(loader, **arguments) -> tuple[list[tuple[str, ImageReport]], list]:
    """What is reported, and the values of the outputs of each iteration."""
    reports, outputs = [], []
    evaluator = TolerantEvaluator("cpu", loader, Negative(), postprocessing=postprocess, **arguments)
    for event in InferenceEvents:
        evaluator.add_event_handler(event, lambda e, name=event.name: reports.append((name, e.state.report)))

    def completed(engine) -> None:
        assert len(engine.state.batch) == len(engine.state.output)
        outputs.append([float(item["pred"].flatten()[0]) for item in engine.state.output])

    evaluator.add_event_handler(Events.ITERATION_COMPLETED, completed)
    evaluator.run()
    return reports, outputs


@pytest.mark.parametrize(
    ("batch_size", "outputs"), [(1, [[-1], [-2], [], [], [-3]]), (2, [[-1, -2], [], [-3]]), (5, [[-1, -2, -3]])]
)
def test_each_image_is_reported_once_and_bad_ones_do_not_take_others_with_them(batch_size, outputs, caplog):
    images = [image(name, value) for name, value in (("a", 1), ("b", 2), ("c", 9), ("d", 8), ("e", 3))]
    reports, found = evaluate(TolerantDataLoader(Dataset(images), batch_size))
    assert found == outputs
    assert [(event, report.files, report.notes, report.reason) for event, report in reports] == [
        ("IMAGE_COMPLETED", ["a"], "", ""),
        ("IMAGE_COMPLETED", ["b"], "note on b", ""),
        ("IMAGE_FAILED", ["c"], "", "out of memory"),
        ("IMAGE_FAILED", ["d"], "", "KeyError"),
        ("IMAGE_COMPLETED", ["e"], "", ""),
    ]
    assert all(0 <= report.seconds < 10 for _, report in reports)
    expected = {1: [], 2: [2], 5: [5]}[batch_size]
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        f"A batch of {n} images failed (out of memory): they are processed one by one." for n in expected
    ]


def test_stacks_and_what_could_not_be_read(monkeypatch):
    """Seconds run from image to image, reading included; a batch shares them."""
    clock = iter([0.0, 6.0, 7.0, 9.0, 10.5])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    stacks = TolerantDataLoader(Dataset([image("s", 1, 4), image("t", 2, 4)]), 2)
    single = TolerantDataLoader(Dataset([image("i", 9)]))
    loader = [*stacks, Failure(["x", "y"], "damaged"), *single, Failure(["z"], "odd")]
    reports, outputs = evaluate(loader)
    assert [report for _, report in reports] == [
        ImageReport(["s0", "s1", "s2", "s3"], 3.0),
        ImageReport(["t0", "t1", "t2", "t3"], 3.0, "note on t"),
        ImageReport(["x", "y"], 1.0, reason="damaged"),
        ImageReport(["i"], 2.0, reason="out of memory"),
        ImageReport(["z"], 1.5, reason="odd"),
    ]
    assert outputs == [[-1, -2], [], [], []]


def test_notes_on_the_prediction_come_after_those_on_the_image():
    class Noting(SimpleInferer):
        def __call__(self, inputs, network, *args, **kwargs):
            out = MetaTensor(network(inputs)).copy_meta_from(inputs)
            out.meta["notes"] = ["small", "large"]
            return out

    images = [image("a", 1), image("b", 2)]
    reports, _ = evaluate(TolerantDataLoader(Dataset(images), 2), inferer=Noting())
    assert [report.notes for _, report in reports] == ["small", "note on b; large"]


def test_postprocessing_may_add_notes():
    def noted(item: dict) -> dict:
        add_note(item["pred"], f"value {float(item['pred'].flatten()[0]):g}")
        return item

    reports = []
    loader = TolerantDataLoader(Dataset([image("a", 1), image("b", 2)]), 2)
    evaluator = TolerantEvaluator("cpu", loader, Negative(), postprocessing=noted)
    evaluator.add_event_handler(InferenceEvents.IMAGE_COMPLETED, lambda e: reports.append(e.state.report.notes))
    evaluator.run()
    assert reports == ["value -1", "note on b; value -2"]


def test_an_interruption_and_an_error_of_a_handler_stop_the_run():
    def stop(_):
        raise KeyError("table")

    evaluator = TolerantEvaluator("cpu", TolerantDataLoader(Dataset([image("a", 1)])), Negative())
    evaluator.add_event_handler(InferenceEvents.IMAGE_COMPLETED, stop)
    with pytest.raises(KeyError, match="table"):
        evaluator.run()

    class Interrupted(torch.nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TolerantEvaluator("cpu", TolerantDataLoader(Dataset([image("a", 1)])), Interrupted()).run()


def test_it_takes_the_arguments_of_monai():
    ours, theirs = (list(inspect.signature(c).parameters) for c in (TolerantEvaluator, SupervisedEvaluator))
    assert ours == theirs
    evaluator = TolerantEvaluator("cpu", [], Negative(), event_names=["more"])
    evaluator.add_event_handler("more", lambda: None)
