from __future__ import annotations

from collections.abc import Sized

import pytest
import torch
from monai.data import Dataset, MetaTensor
from monai.transforms import Compose, Lambdad

from segbundles.data import TolerantDataLoader
from segbundles.errors import fail


def read(path):
    """Names tell what is in the files: ``<number>_<size>``, or ``bad``."""
    if "bad" in path:
        fail(f"cannot read {path}: it is damaged.")
    if "odd" in path:
        raise KeyError
    number, size = path.split("_")
    return MetaTensor(torch.full((1, int(size), 2), float(number)), meta={"filename_or_obj": path})


def load(paths, **arguments):
    failures = []
    dataset = Dataset([{"image": path} for path in paths], Compose([Lambdad("image", read)]))
    loader = TolerantDataLoader(dataset, lambda *failure: failures.append(failure), **arguments)
    return [[str(f) for f in batch["image"].meta["filename_or_obj"]] for batch in loader], failures


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("batch_size", "expected"),
    [
        (1, [["1_3"], ["2_3"], ["3_4"], ["4_4"], ["5_4"], ["6_3"]]),
        (2, [["1_3", "2_3"], ["3_4", "4_4"], ["5_4"], ["6_3"]]),
        (5, [["1_3", "2_3"], ["3_4", "4_4", "5_4"], ["6_3"]]),
    ],
)
def test_good_images_come_in_batches_of_one_shape(num_workers, batch_size, expected):
    batches, failures = load(
        ["bad1", "1_3", "odd", "2_3", "3_4", "4_4", "5_4", "bad2", "6_3", "bad3"],
        batch_size=batch_size,
        num_workers=num_workers,
    )
    assert batches == expected
    assert failures == [
        ("bad1", "cannot read bad1: it is damaged."),
        ("odd", "KeyError"),
        ("bad2", "cannot read bad2: it is damaged."),
        ("bad3", "cannot read bad3: it is damaged."),
    ]


def test_all_bad_and_none():
    assert load(["bad1", "bad2"])[0] == []
    assert load([]) == ([], [])


def test_it_has_no_length_and_can_be_gone_through_again():
    loader = TolerantDataLoader(Dataset([{"image": "1_3"}, {"image": "2_3"}], Lambdad("image", read)), print)
    assert not isinstance(loader, Sized)
    for _ in range(2):
        assert [batch["image"].shape for batch in loader] == [(1, 1, 3, 2)] * 2


def test_an_interruption_is_no_bad_image():
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(TolerantDataLoader(Dataset([{"image": "a"}], Lambdad("image", stop)), print))
