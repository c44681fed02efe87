from __future__ import annotations

import logging
import os
import random
from collections.abc import Sized

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, Lambdad, RandGaussianNoise
from torch.utils.data import ConcatDataset, SequentialSampler

from segbundles.data import (
    BalancedSampler,
    Failure,
    TolerantDataLoader,
    TrainingDataLoader,
    samplers,
)
from segbundles.errors import fail
from segbundles.handlers.training import EpochSeed
from segbundles.meta import notes_of, set_slice_files, slice_files


def read(path):
    """Names say what is in the files: ``<number>_<size>``, or ``bad``."""
    if "bad" in path:
        fail(f"cannot read {path}: it is damaged.")
    if "odd" in path:
        raise KeyError
    number, size = path.split("_")
    return MetaTensor(torch.full((1, int(size), 2), float(number)), meta={"filename_or_obj": path})


def load(entries, transform=read, **arguments):
    """The batches, and the failures as (file, reason)."""
    found = list(TolerantDataLoader(Dataset(entries, Compose([Lambdad("image", transform)])), **arguments))
    failures = [(file, item.reason) for item in found if isinstance(item, Failure) for file in item.files]
    return [item for item in found if not isinstance(item, Failure)], failures


def names(batches):
    return [[str(file) for file in batch["image"].meta["filename_or_obj"]] for batch in batches]


def images(*paths):
    return [{"image": path} for path in paths]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("batch_size", "expected"),
    [
        (1, [["1_3"], ["2_3"], ["3_4"], ["4_4"], ["5_4"], ["6_3"]]),
        (2, [["1_3", "2_3"], ["3_4", "4_4"], ["5_4"], ["6_3"]]),
        (5, [["1_3", "2_3", "6_3"], ["3_4", "4_4", "5_4"]]),
    ],
)
def test_good_images_come_in_batches_of_one_shape(num_workers, batch_size, expected):
    paths = ["bad1", "1_3", "odd", "2_3", "3_4", "4_4", "5_4", "bad2", "6_3", "bad3"]
    batches, failures = load(images(*paths), batch_size=batch_size, num_workers=num_workers)
    assert names(batches) == expected
    assert failures == [
        ("bad1", "cannot read bad1: it is damaged."),
        ("odd", "KeyError"),
        ("bad2", "cannot read bad2: it is damaged."),
        ("bad3", "cannot read bad3: it is damaged."),
    ]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ("34343434", ["1357", "2468"]),  # two shapes by turns fill their batches
        ("3456785", ["1", "2", "37", "4", "5", "6"]),
        ("345678934", ["18", "29", "3", "4", "5", "6", "7"]),  # the eighth that waits sends the first on its way
    ],
)
def test_images_wait_for_others_of_their_shape(sizes, expected):
    batches, _ = load(images(*(f"{k}_{size}" for k, size in enumerate(sizes, 1))), batch_size=4)
    assert ["".join(name[0] for name in batch) for batch in names(batches)] == expected


def read_stack(paths):
    """A stack of slices of one size, not all black."""
    items = [read(path) for path in paths]
    if len({tuple(item.shape) for item in items}) > 1:
        fail(f"{paths[-1]} and {paths[0]} differ in size.")
    if all("0_" in path for path in paths):
        fail(f"{paths[0]} is constant.")
    meta = {"filename_or_obj": paths[0]}
    set_slice_files(meta, paths)
    return MetaTensor(torch.stack([item.as_tensor() for item in items], -1), meta=meta)


DAMAGED = "cannot read {0}: it is damaged."
LEFT_OUT = "{} of {} slices left out"
APART = "slices that do not fit each other: stacks of their own"


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("files", "stacks", "bad", "notes"),
    [
        (["1_3", "2_3"], [["1_3", "2_3"]], {}, ""),
        (["1_3", "bad", "2_3"], [["1_3", "2_3"]], {"bad": DAMAGED}, LEFT_OUT.format(1, 3)),
        (["bad1", "odd", "2_3"], [["2_3"]], {"bad1": DAMAGED, "odd": "KeyError"}, LEFT_OUT.format(2, 3)),
        # black slices fail alone, and are good ones in a stack; they keep their places
        (
            ["0_3", "1_3", "bad", "00_3", "2_3"],
            [["0_3", "1_3", "00_3", "2_3"]],
            {"bad": DAMAGED},
            LEFT_OUT.format(1, 5),
        ),
        (["1_3", "2_4", "3_3", "0_4"], [["1_3", "3_3"], ["2_4", "0_4"]], {}, APART),
        (["1_3", "bad", "2_4"], [["1_3"], ["2_4"]], {"bad": DAMAGED}, f"{LEFT_OUT.format(1, 3)}; {APART}"),
        (["bad1", "bad2"], [], {"bad1": DAMAGED, "bad2": DAMAGED}, ""),
        (["bad1"], [], {"bad1": DAMAGED}, ""),
        (["0_3", "00_3"], [], {"0_3": "{0} is constant.", "00_3": "{0} is constant."}, ""),
    ],
)
def test_bad_slices_of_a_stack(num_workers, files, stacks, bad, notes):
    entries = [{"image": ["8_5", "9_5"]}, {"image": files}, {"image": ["7_5"]}]
    batches, failures = load(entries, read_stack, num_workers=num_workers)
    found = [batch["image"][0] for batch in batches]
    expected = [["8_5", "9_5"], *stacks, ["7_5"]]
    assert [slice_files(image) for image in found] == expected
    for image, slices in zip(found, expected, strict=True):
        assert image[0, 0, 0].tolist() == [float(name.split("_")[0]) for name in slices]
    assert failures == [(file, reason.format(file)) for file, reason in bad.items()]
    assert [notes_of(image) for image in found] == ["", *[notes] * len(stacks), ""]


def test_other_lists_of_an_entry_are_shortened():
    entry = {
        "image": ["1_3", "bad", "2_3"],
        "label": ["l1", "l2", "l3"],
        "slice": [4, 5, 6],
        "spacing_mm": [1.0, 1.0, 5.0],
        "reader": ["x", "y"],
        "case": "p 1",
    }
    seen = []

    def keep(item):
        seen.append({key: value for key, value in item.items() if key != "image"})
        return item

    dataset = Dataset([entry], Compose([Lambdad("image", read_stack), keep]))
    _, batch = TolerantDataLoader(dataset)
    others = {key: value for key, value in entry.items() if key != "image"}
    assert seen[-1] == {**others, "label": ["l1", "l3"], "slice": [4, 6]}
    assert batch["case"] == ["p 1"]


def test_a_stack_that_fails_although_its_slices_do_not():
    """All its files are reported, with the reason of the whole."""

    def at_most_two(paths):
        if len(paths) > 2:
            fail("out of memory.")
        return read_stack(paths)

    batches, failures = load([{"image": ["1_3", "2_3", "3_3"]}], at_most_two)
    assert batches == []
    assert failures == [(file, "out of memory.") for file in ("1_3", "2_3", "3_3")]


def test_channels_are_not_taken_for_slices():
    """They make one image, which goes by its first file."""

    def differ(_):
        fail("a.nii and b.nii differ in size.")

    batches, failures = load([{"image": ["a.nii", "b.nii", "c.nii"]}], differ)
    assert (batches, failures) == ([], [("a.nii", "a.nii and b.nii differ in size.")])


def test_one_error_is_logged_for_a_stack(caplog):
    load([{"image": ["1_3", "bad", "2_3", "3_4", "4_3"]}], read_stack)
    assert [record.message for record in caplog.records] == ["cannot read bad: it is damaged."]
    assert not logging.getLogger("segbundles").disabled


def test_stacks_and_volumes_share_batches_where_they_can():
    """What only one of a batch knows of itself is not lost to collation."""

    def volume_or_stack(paths):
        if isinstance(paths, list):
            return read_stack(paths)
        return MetaTensor(torch.ones(1, 3, 2, 2), meta={"filename_or_obj": paths, "notes": "a note"})

    entries = [{"image": "v"}, {"image": ["1_3", "2_3"]}, {"image": ["3_3", "4_3"], "case": "p"}]
    batches, _ = load(entries, volume_or_stack, batch_size=3)
    assert [batch["image"].shape[0] for batch in batches] == [2, 1]  # the third has a key that the others have not
    volume, stack = decollate_batch(batches[0]["image"])
    assert (slice_files(volume), notes_of(volume)) == ([], "a note")
    assert (slice_files(stack), notes_of(stack)) == (["1_3", "2_3"], "")
    assert batches[1]["case"] == ["p"]


def test_all_bad_and_none():
    assert load(images("bad1", "bad2"))[0] == []
    assert load([]) == ([], [])


def test_it_has_no_length_and_can_be_gone_through_again():
    loader = TolerantDataLoader(Dataset([{"image": "1_3"}, {"image": "2_3"}], Lambdad("image", read)))
    assert not isinstance(loader, Sized)
    for _ in range(2):
        assert [batch["image"].shape for batch in loader] == [(1, 1, 3, 2)] * 2


def test_an_interruption_is_no_bad_image():
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(TolerantDataLoader(Dataset([{"image": "a"}], Lambdad("image", stop))))


def drawn(epochs, num_workers, repeats=1, sampler=None):
    """The values of each epoch: the number of an item and a random one, which an epoch's seed decides."""
    items = Dataset(list(torch.arange(5.0).reshape(5, 1)), Compose([RandGaussianNoise(prob=1.0)]))
    dataset = ConcatDataset([items] * repeats) if repeats > 1 else items
    loader = TrainingDataLoader(dataset, 2, sampler and sampler(dataset), num_workers)
    engine = Engine(lambda *_: None)
    engine.state.dataloader = loader
    found = []
    for engine.state.epoch in epochs:
        EpochSeed(3, items)(engine)
        found.append(torch.cat([torch.as_tensor(batch) for batch in loader]).flatten().tolist())
    return found


@pytest.mark.parametrize("repeats", [1, 3])
def test_training_draws_the_same_with_any_number_of_workers(repeats):
    epochs = drawn([1, 2, 3], 0, repeats)
    assert [len(epoch) for epoch in epochs] == [5 * repeats] * 3
    values = [value for epoch in epochs for value in epoch]
    assert len(set(values)) == len(values)  # also of an item that is drawn several times
    assert drawn([1, 2, 3], 2, repeats) == epochs
    assert drawn([3], 2, repeats) == epochs[2:]
    assert drawn([3], 1, repeats) == epochs[2:]


def test_training_draws_all_items_or_those_of_its_sampler():
    apart = np.arange(5)
    for sampler, ordered in ((None, False), (SequentialSampler, True)):
        (epoch,) = drawn([1], 0, sampler=sampler)
        nearest = [int(np.abs(apart - value).argmin()) for value in epoch]
        assert (nearest == sorted(nearest)) == ordered, epoch


class Global:
    """An item that takes the random numbers of Python, numpy and torch."""

    def __init__(self):
        self.items = list(range(4))

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor([random.random(), np.random.rand(), torch.rand(1).item(), os.getpid()], dtype=torch.float64)


def test_workers_stay_and_are_seeded_for_each_item():
    """An epoch has the same random numbers in workers that are new and in workers from an epoch before."""
    once, twice = (TrainingDataLoader(Global(), 2, num_workers=2) for _ in range(2))
    torch.manual_seed(1)
    first = torch.cat(list(twice))
    found = []
    for loader in (once, twice):
        torch.manual_seed(2)
        found.append(torch.cat(list(loader)))
    assert torch.equal(found[0][:, :3], found[1][:, :3])
    assert set(first[:, 3].tolist()) == set(found[1][:, 3].tolist())
    assert len(found[0][:, :3].unique()) == 12


def test_processes_draw_another_order_in_each_epoch(monkeypatch):
    monkeypatch.setattr(samplers, "process_count", lambda: 2)
    loader = TrainingDataLoader(Dataset(list(range(10))), 5, BalancedSampler([{}] * 10))
    engine = Engine(lambda *_: None)
    engine.state.dataloader = loader
    orders = []
    for engine.state.epoch in (1, 2, 1):
        EpochSeed(3)(engine)
        orders.append(torch.cat(list(loader)).tolist())
    assert orders[0] == orders[2] != orders[1]
