"""A data loader that hands over bad images by name instead of stopping at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from monai.data import DataLoader, Dataset, list_data_collate

from segbundles.errors import innermost

__all__ = ["TolerantDataLoader"]


class _Guarded(torch.utils.data.Dataset):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any, str | None]:
        try:
            return index, self.dataset[index], None
        except Exception as error:
            return index, None, innermost(error)


def _as_it_is(batch: list) -> list:
    return batch


class TolerantDataLoader:
    """Iterate over batches of the images that can be read; report the others.

    It has no length: the number of good images is known only at the end, and ignite starts an iterator that
    is shorter than its length again. Images of one shape that follow each other share a batch.

    Args:
        dataset: MONAI dataset over a list of ``{"image": path}``.
        on_failure: called with (path, reason) for each image that cannot be read or prepared.
        batch_size: images a batch at most.
        num_workers: processes that read ahead.
    """

    def __init__(
        self,
        dataset: Dataset,
        on_failure: Callable[[str, str], None],
        batch_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        """See the class."""
        self.dataset = dataset
        self.on_failure = on_failure
        self.batch_size = batch_size
        self.num_workers = num_workers

    def __iter__(self) -> Iterator[Any]:
        loader = DataLoader(_Guarded(self.dataset), batch_size=1, num_workers=self.num_workers, collate_fn=_as_it_is)
        waiting: list[Any] = []
        for [(index, item, reason)] in loader:
            if reason is not None:
                self.on_failure(self.dataset.data[index]["image"], reason)
                continue
            if waiting and item["image"].shape != waiting[0]["image"].shape:
                yield list_data_collate(waiting)
                waiting = []
            waiting.append(item)
            if len(waiting) == self.batch_size:
                yield list_data_collate(waiting)
                waiting = []
        if waiting:
            yield list_data_collate(waiting)
