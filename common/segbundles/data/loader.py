"""Data loaders: of training, of images of which some may not be readable, and of one process among several."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader, Dataset, list_data_collate
from monai.utils import CommonKeys as Keys
from monai.utils import ensure_tuple
from torch.utils.data import ConcatDataset, RandomSampler, Sampler, get_worker_info

from segbundles.data.readers import are_channels
from segbundles.distributed import process_count, share
from segbundles.errors import fail, innermost
from segbundles.meta import DEFAULTS, add_note

__all__ = [
    "Failure",
    "LargeImage",
    "SharedDataLoader",
    "TolerantDataLoader",
    "TrainingDataLoader",
    "validation_sampler",
]


@dataclass(frozen=True)
class LargeImage:
    """An image that is too large to be loaded.

    Args:
        files: path of the image.
    """

    files: list[str]


@dataclass(frozen=True)
class Failure:
    """Files that could not be read or prepared.

    Args:
        files: paths.
        reason: what was wrong.
    """

    files: list[str]
    reason: str


class _Guarded(torch.utils.data.Dataset):
    """Items and failures of each entry: one item, or several if the slices of a stack do not fit each other."""

    def __init__(self, dataset: Dataset, is_large: Callable[[Sequence[str]], bool] | None = None) -> None:
        self.dataset = dataset
        self.is_large = is_large

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> list[Any]:
        if self.is_large is not None and self.is_large(files := _reported(self.dataset.data[index])):
            return [LargeImage(files)]
        try:
            return [self.dataset[index]]
        except Exception as error:
            entry, reason = self.dataset.data[index], innermost(error)
        files = _reported(entry)
        if len(files) == 1:
            return [Failure(files, reason)]
        with _quiet():  # attempts may fail: the reasons that count are returned
            return self._split(entry, files)

    def _split(self, entry: Mapping[str, Any], files: list[str]) -> list[Any]:
        """Leave out the slices that fail, and make one stack of each set of slices that fit each other."""
        bad: dict[int, Failure] = {}
        for k in range(len(files)):
            item = self._read(entry, [k])
            if isinstance(item, Failure):
                bad[k] = item
        stacks: list[list[int]] = []
        for k in sorted(range(len(files)), key=bad.__contains__):
            # also slices that fail alone: a black slice is not an image, but it is a valid part of a stack
            fitting = next((s for s in stacks if not isinstance(self._read(entry, [s[0], k]), Failure)), None)
            if fitting is not None:
                fitting.append(k)
            elif k not in bad:
                stacks.append([k])
        found = {k for stack in stacks for k in stack}
        items: list[Any] = [failure for k, failure in bad.items() if k not in found]
        notes = [f"{len(items)} of {len(files)} slices left out"] if items else []
        notes += ["slices that do not fit each other: stacks of their own"] if len(stacks) > 1 else []
        for stack in stacks:
            item = self._read(entry, sorted(stack))
            if not isinstance(item, Failure) and hasattr(item[Keys.IMAGE], "meta"):
                add_note(item[Keys.IMAGE], *notes)
            items.append(item)
        return items

    def _read(self, entry: Mapping[str, Any], slices: Sequence[int]) -> Any:
        part = _part(entry, slices)
        try:
            return Dataset([part], self.dataset.transform)[0]
        except Exception as error:
            return Failure([str(file) for file in part[Keys.IMAGE]], innermost(error))


def _reported(entry: Mapping[str, Any]) -> list[str]:
    """Return the files that reports name: those of the slices of a stack, or the first of an image of channels."""
    files = [str(file) for file in ensure_tuple(entry[Keys.IMAGE])]
    return files[:1] if are_channels(files) else files


def _part(entry: Mapping[str, Any], slices: Sequence[int]) -> dict[str, Any]:
    """Return the entry of some slices of a stack: every list with one value per slice is shortened."""
    count = len(entry[Keys.IMAGE])
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
    return one[Keys.IMAGE].shape == other[Keys.IMAGE].shape and one.keys() == other.keys()


def _collate(items: list[Any]) -> Any:
    metas = [getattr(item[Keys.IMAGE], "meta", {}) for item in items]
    for key in {key for meta in metas for key in meta}.intersection(DEFAULTS):
        for meta in metas:
            meta.setdefault(key, DEFAULTS[key])
    return list_data_collate(items)


def _as_it_is(batch: list) -> list:
    return batch


class TolerantDataLoader:
    """Iterate over batches of the images that can be read, and a :class:`Failure` for each of the others.

    If some slices of a stack of 2D images cannot be read, the readable ones are returned as a shorter stack; slices
    that do not fit each other, in size for example, are returned as several stacks. A note on the image says so.

    The loader has no length: the number of good images is known only at the end, and ignite restarts an iterator that
    is shorter than its length. Images of one shape share a batch: up to twice ``batch_size`` images wait for others of
    their shape, so the order of the batches can differ from the order of the images.

    In a process group, each process gets its share of the images (:func:`segbundles.distributed.share`).

    Args:
        dataset: MONAI dataset over a list of ``{"image": path}``. A stack has a list of paths, and its other lists may
            have one value per slice.
        batch_size: the most images in a batch.
        num_workers: number of processes that read ahead.
        large_images: segments images that are too large to be loaded, see :class:`segbundles.inferers.LargeImages`;
            they are not read, and given as :class:`LargeImage`. None loads all.

    Attributes:
        skip: called with the files of each image of this process before any is read; an image for which it returns
            True is left out. None reads all.
    """

    def __init__(self, dataset: Dataset, batch_size: int = 1, num_workers: int = 0, large_images: Any = None) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.large_images = large_images
        self.skip: Callable[[Sequence[str]], bool] | None = None

    def _chosen(self) -> list[int]:
        mine = share(len(self.dataset))
        if self.skip is None:
            return list(mine)
        return [index for index in mine if not self.skip(tuple(_reported(self.dataset.data[index])))]

    def __iter__(self) -> Iterator[Any]:
        loader = DataLoader(
            _Guarded(self.dataset, self.large_images and self.large_images.is_large),
            batch_size=1,
            sampler=self._chosen(),
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
        )
        waiting: list[list[Any]] = []  # images that may share a batch, the longest waiting first
        for [items] in loader:
            for item in items:
                if isinstance(item, Failure | LargeImage):
                    yield item
                    continue
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
    """Iterate over this process's share of a data set; over all of it without a process group.

    Process ``k % processes`` gets item k. The loader has no length: MONAI's engines skip a loader of length 0, and the
    other processes would wait for the one that has no item.

    Args:
        dataset: data set, the same in all processes.
        batch_size: the most items in a batch.
        num_workers: number of processes that read ahead.
    """

    def __init__(self, dataset: torch.utils.data.Dataset, batch_size: int = 1, num_workers: int = 0) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = num_workers

    def __iter__(self) -> Iterator[Any]:
        mine = share(len(self.dataset))
        yield from DataLoader(self.dataset, batch_size=self.batch_size, sampler=mine, num_workers=self.num_workers)


class _Draws(Sampler):
    """Give each draw of a sampler its own seed."""

    def __init__(self, sampler: Sampler[int]) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # all at once: the network may use torch's random numbers while later items are drawn
        seeds = torch.randint(2**32, (len(self),)).tolist()
        yield from zip(self.sampler, seeds, strict=True)


class _Seeded(torch.utils.data.Dataset):
    """Seed the random transforms of a data set for each item."""

    def __init__(self, dataset: torch.utils.data.Dataset) -> None:
        self.dataset = dataset
        one = dataset.datasets[0] if isinstance(dataset, ConcatDataset) else dataset
        self._transform = getattr(one, "transform", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: tuple[int, int]) -> Any:
        index, seed = draw
        if hasattr(self._transform, "set_random_state"):
            self._transform.set_random_state(seed=seed)
        if get_worker_info() is not None:  # for transforms of yours that take these; the main process has other users
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        return self.dataset[index]


class TrainingDataLoader(DataLoader):
    """Load training data, with random transforms that depend on torch's random state at the start of the epoch only.

    Each item gets a seed of its own. What is drawn is therefore the same with any number of workers, and the workers
    can stay alive between epochs: they are started once, and a resumed run needs no state of theirs.

    Args:
        dataset: training data with random transforms in ``transform``, or a ``ConcatDataset`` that repeats it.
        batch_size: number of items in a batch.
        sampler: draws the items of an epoch. None draws all of them in random order.
        num_workers: number of processes that load ahead, see :func:`segbundles.threads.worker_count`.
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset,
        batch_size: int = 1,
        sampler: Sampler[int] | None = None,
        num_workers: int = 0,
    ) -> None:
        drawn = RandomSampler(dataset) if sampler is None else sampler
        super().__init__(
            _Seeded(dataset),
            num_workers,
            batch_size=batch_size,
            sampler=_Draws(drawn),
            generator=torch.Generator(),  # torch's own state is for the draws: new workers would take a number from it
            persistent_workers=num_workers > 0,
        )

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler the epoch, which decides what each of several processes draws."""
        drawn = self.sampler.sampler
        if hasattr(drawn, "set_epoch"):
            drawn.set_epoch(epoch)


def validation_sampler(dataset: torch.utils.data.Dataset) -> range:
    """Return this process's share of the validation cases; each case counts once in the means of all processes.

    Args:
        dataset: data set of the cases, the same in all processes; it may be empty.

    Raises:
        ValueError: when there are fewer cases than processes: a process without cases has no metric to contribute.
    """
    if 0 < len(dataset) < process_count():
        fail(
            f"{len(dataset)} validation cases cannot be shared by {process_count()} processes: start at most "
            f"{len(dataset)} processes, or add cases to the validation split."
        )
    return share(len(dataset))
