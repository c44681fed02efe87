"""Data loaders: one that hands over bad images by name instead of stopping at them, and shares of processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from monai.data import DataLoader, Dataset, list_data_collate
from monai.utils import ensure_tuple

from segbundles.distributed import process_count, share
from segbundles.errors import fail, innermost

__all__ = ["SharedDataLoader", "TolerantDataLoader", "validation_sampler"]

IMAGE = "image"
# metadata that only some images have; MONAI's collation drops what is not in all of a batch
DEFAULTS = {"slices": "", "notes": "", "has_spacing": True}

# an item that is good, or why it is not
_Tried = tuple[Any, "str | None"]
_Failure = tuple[str, str]


class _Guarded(torch.utils.data.Dataset):
    """Good items of each entry (none, or several where a stack had to be parted), and (path, reason) of the rest."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[list[Any], list[_Failure]]:
        try:
            return [self.dataset[index]], []
        except Exception as error:
            entry, reason = self.dataset.data[index], innermost(error)
        files = entry[IMAGE]
        if not isinstance(files, list | tuple):
            return [], [(files, reason)]
        if len(files) == 1:
            return [], [(files[0], reason)]
        with _quiet():  # what is tried may fail: the reasons that count are handed over
            return self._parted(entry)

    def _parted(self, entry: Mapping[str, Any]) -> tuple[list[Any], list[_Failure]]:
        """Leave out the slices that fail, and make a stack of each set of the others that go together."""
        files = entry[IMAGE]
        alone = [self._try(entry, [k])[1] for k in range(len(files))]
        stacks: list[list[int]] = []
        for k in sorted(range(len(files)), key=lambda k: alone[k] is not None):
            # also those that fail alone: a black slice is no image, and yet a good slice
            fitting = next((stack for stack in stacks if self._try(entry, [stack[0], k])[1] is None), None)
            if fitting is not None:
                fitting.append(k)
            elif alone[k] is None:
                stacks.append([k])
        found = {k for stack in stacks for k in stack}
        failures = [(str(files[k]), alone[k]) for k in range(len(files)) if k not in found]
        notes = [f"{len(failures)} of {len(files)} slices left out"] if failures else []
        notes += ["slices that do not fit each other: stacks of their own"] if len(stacks) > 1 else []
        items = []
        for stack in stacks:
            item, reason = self._try(entry, sorted(stack))
            if reason is not None:
                failures += [(str(files[k]), reason) for k in sorted(stack)]
                continue
            if hasattr(item[IMAGE], "meta"):
                item[IMAGE].meta["notes"] = "; ".join(filter(None, [item[IMAGE].meta.get("notes"), *notes]))
            items.append(item)
        return items, failures

    def _try(self, entry: Mapping[str, Any], slices: Sequence[int]) -> _Tried:
        try:
            return Dataset([_part(entry, slices)], self.dataset.transform)[0], None
        except Exception as error:
            return None, innermost(error)


def _part(entry: Mapping[str, Any], slices: Sequence[int]) -> dict[str, Any]:
    """The entry of some slices of a stack: every list of one value a slice is shortened."""
    count = len(entry[IMAGE])
    part = dict(entry)
    for key, values in entry.items():
        if key != "spacing_mm" and isinstance(values, list | tuple) and len(values) == count:
            part[key] = [values[k] for k in slices]
    return part


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("segbundles")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one[IMAGE].shape == other[IMAGE].shape and one.keys() == other.keys()


def _collate(items: list[Any]) -> Any:
    metas = [getattr(item[IMAGE], "meta", {}) for item in items]
    for key in {key for meta in metas for key in meta}.intersection(DEFAULTS):
        for meta in metas:
            meta.setdefault(key, DEFAULTS[key])
    return list_data_collate(items)


def _as_it_is(batch: list) -> list:
    return batch


class TolerantDataLoader:
    """Iterate over batches of the images that can be read; report the others.

    Of a stack of 2D images that fails, the slices that can be read come as a stack without the others; where they do
    not fit each other (in size, say) as several. ``meta["notes"]`` says so.

    It has no length: the number of good images is known only at the end, and ignite starts an iterator that
    is shorter than its length again. Images of one shape share a batch: up to twice ``batch_size`` of them wait for
    others of theirs, so batches may come in another order than the images.

    Where a process group stands, each process has its share of the images (:func:`segbundles.distributed.share`).

    Args:
        dataset: MONAI dataset over a list of ``{"image": path}``; the path of a stack is a list, and so are other
            values with one element a slice.
        on_failure: called with (path, reason) for each file that cannot be read or prepared.
        batch_size: images a batch at most.
        num_workers: processes that read ahead.
        skip: called with the files of each image of this process before any is read; one for which it gives True is
            left out.
    """

    def __init__(
        self,
        dataset: Dataset,
        on_failure: Callable[[str, str], None],
        batch_size: int = 1,
        num_workers: int = 0,
        skip: Callable[[Sequence[str]], bool] | None = None,
    ) -> None:
        """See the class."""
        self.dataset = dataset
        self.on_failure = on_failure
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.skip = skip

    def _chosen(self) -> list[int]:
        mine = share(len(self.dataset))
        if self.skip is None:
            return list(mine)
        return [index for index in mine if not self.skip(ensure_tuple(self.dataset.data[index][IMAGE]))]

    def __iter__(self) -> Iterator[Any]:
        loader = DataLoader(
            _Guarded(self.dataset),
            batch_size=1,
            sampler=self._chosen(),
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
        )
        waiting: list[list[Any]] = []  # what may share a batch, the longest waiting first
        for [(items, failures)] in loader:
            for failure in failures:
                self.on_failure(*failure)
            for item in items:
                batch = next((batch for batch in waiting if _alike(item, batch[0])), None)
                if batch is None:
                    waiting.append(batch := [])
                batch.append(item)
                if len(batch) == self.batch_size:
                    waiting.remove(batch)
                    yield _collate(batch)
                elif sum(map(len, waiting)) == 2 * self.batch_size:
                    yield _collate(waiting.pop(0))
        yield from map(_collate, waiting)


class SharedDataLoader:
    """Iterate over this process's share of a data set; over all of it where no process group stands.

    Item k is that of process ``k % processes``. It has no length: MONAI's engines do not even start at a loader of
    length 0, and the other processes would wait for the one that has no item.

    Args:
        dataset: data set, the same in all processes.
        batch_size: items a batch.
        num_workers: processes that read ahead.
    """

    def __init__(self, dataset: torch.utils.data.Dataset, batch_size: int = 1, num_workers: int = 0) -> None:
        """See the class."""
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = num_workers

    def __iter__(self) -> Iterator[Any]:
        mine = share(len(self.dataset))
        yield from DataLoader(self.dataset, batch_size=self.batch_size, sampler=mine, num_workers=self.num_workers)


def validation_sampler(dataset: torch.utils.data.Dataset) -> range:
    """This process's share of the validation cases: each case is that of one process, so that means are over all once.

    Args:
        dataset: data set of the cases, the same in all processes; it may be empty.

    Raises:
        ValueError: when there are fewer cases than processes: metrics cannot be brought together without any.
    """
    if 0 < len(dataset) < process_count():
        fail(
            f"{len(dataset)} validation cases cannot be shared out to {process_count()} processes: start "
            f"{len(dataset)} processes at most, or put more cases into the validation section."
        )
    return share(len(dataset))
