"""Stacks of 2D images as volumes, and training on the slices of volumes."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import PathLike
from monai.data import DistributedSampler, DistributedWeightedRandomSampler, MetaTensor
from monai.transforms import Compose
from numpy.typing import ArrayLike
from torch.utils.data import Dataset, RandomSampler, Sampler, WeightedRandomSampler

from segbundles.data.base import file_stem
from segbundles.data.cases import _LazyCases
from segbundles.data.pictures import is_slice
from segbundles.distributed import process_count
from segbundles.errors import fail
from segbundles.meta import FILE, file_name, slice_files, without_meta

__all__ = ["SliceDataset", "SliceStacks", "lesion_weights", "slice_sampler"]

BY_SLICE = ("slice", "lesion_area")


class SliceStacks(_LazyCases):
    """List of cases in which 2D images that belong together form one case, for :class:`segbundles.data.StackReader`.

    2D images (TIFF, PNG, BMP, JPEG) belong together if they have the same ``group``; without a group, if they are in
    the same folder and their stems only differ in a trailing ``_<number>``. They are sorted by ``slice`` if all have
    it, else by the trailing number if all have one, else by path. Such a stack is one case: ``image`` and ``label`` are
    lists of paths, ``slice`` and ``lesion_area`` are lists if all slices have them, and ``case`` is the group or the
    name without the number. Other entries are kept if they are equal for the whole stack. Volume files, TIFF files with
    several pages, and images that are already lists (such as the channels of a volume) stay as they are.

    Args:
        cases: dictionaries of paths: a list, a :class:`Datalist`, :class:`FolderImages`. Read at first use.
        keys: entries that become lists of paths; the first is the image.

    Raises:
        ValueError: at first use, when only some slices of a stack have a key, or two have the same number.
    """

    def __init__(self, cases: Sequence[Mapping[str, Any]], keys: Sequence[str] = ("image", "label")) -> None:
        self.source = cases
        self.keys = tuple(keys)

    def _read(self) -> list[dict[str, Any]]:
        together: dict[Any, list[dict[str, Any]]] = {}
        for number, entry in enumerate(self.source):
            together.setdefault(self._stack_of(number, entry), []).append(dict(entry))
        folders = [key for key in together if isinstance(key, tuple)]
        names = dict(zip(folders, _names(folders), strict=True))
        return [
            entries[0] if isinstance(key, int) else self._stack(names.get(key, key), entries)
            for key, entries in together.items()
        ]

    def _stack_of(self, number: int, entry: Mapping[str, Any]) -> int | str | tuple[Path, str, bool]:
        """Return the group, or folder and name, that the slices of a stack share; a number for other images."""
        image = entry[self.keys[0]]
        if isinstance(image, list | tuple) or not is_slice(image):
            return number
        if entry.get("group") is not None:
            return str(entry["group"])
        name, trailing = _split(image)
        return Path(image).parent, name, trailing is not None

    def _stack(self, name: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
        image = self.keys[0]
        order = sorted(zip(_numbers(entries, image), entries, strict=True), key=lambda pair: pair[0])
        for (number, entry), (following, twin) in pairwise(order):
            if number == following:
                fail(
                    f"{entry[image]} and {twin[image]} are both slice {number} of {name}: "
                    "renumber them, or give each stack its own group or folder."
                )
        entries = [entry for _, entry in order]
        shared = {k: v for k, v in entries[0].items() if all(k in entry and entry[k] == v for entry in entries)}
        stack = {"case": name, **{k: v for k, v in shared.items() if k != "case"}}
        for key in (*self.keys, *BY_SLICE):
            values = [entry.get(key) for entry in entries]
            stack.pop(key, None)
            if key in self.keys and 0 < values.count(None) < len(values):
                bare = entries[values.index(None)][image]
                fail(f"{bare} has no {key} but other slices of {name} have one: add it, or leave this slice out.")
            if None not in values:
                stack[key] = values
        return stack


def _split(path: PathLike) -> tuple[str, int | None]:
    """Return the stem without its trailing number, and that number."""
    match = re.fullmatch(r"(.*)_(\d+)", file_stem(path), re.DOTALL)
    return (match[1], int(match[2])) if match else (file_stem(path), None)


def _numbers(entries: Sequence[Mapping[str, Any]], image: str) -> list[Any]:
    """Return the values by which the entries of a stack are sorted."""
    given = [entry.get("slice") for entry in entries]
    if None not in given:
        return given
    trailing = [_split(entry[image])[1] for entry in entries]
    if None not in trailing:
        return trailing
    return [str(entry[image]) for entry in entries]


def _names(stacks: Sequence[tuple[Path, str, bool]]) -> list[str]:
    """Return the names of cases: the file name without its number, preceded by folders if several are equal."""
    often = Counter(name for _, name, _ in stacks)
    paths = [folder.absolute() for folder, _, _ in stacks]
    root = os.path.commonpath(paths) if paths else ""
    return [
        name if often[name] == 1 else (path / name).relative_to(root).as_posix()
        for path, (_, name, _) in zip(paths, stacks, strict=True)
    ]


class SliceDataset(Dataset):
    """Dataset of the slices of a dataset of volumes.

    An item is ``{key: (C, W, H), "case": ..., "slice": s}`` after ``transform``, where s counts from 0 in its volume.
    Slices are copies, so transforms do not change a cache, and have the name of their own file. All volumes are loaded
    once, at the first use of the length, except stacks whose entry has a ``lesion_area`` for each of their files.

    Args:
        data: dataset whose items contain volumes (C, W, H, D). It should cache all volumes, because every slice loads
            its volume, and have no random transforms, for which ``CacheDataset`` would copy the volume.
        transform: transforms of slices, including random ones.
        keys: volumes to cut into slices; the foreground (> 0) of the last is the lesion.
        context_slices: number of neighbours on each side that become channels of the first key, as
            :class:`segbundles.transforms.NeighbourSlicesd` makes them of a whole volume.

    Raises:
        ValueError: when a volume has another number of slices than when it was counted.
    """

    def __init__(
        self,
        data: Dataset,
        transform: Sequence[Callable] | Callable | None = None,
        keys: Sequence[str] = ("image", "label"),
        context_slices: int = 0,
    ) -> None:
        self.context_slices = context_slices
        self.data = data
        self.transform = transform if isinstance(transform, Compose) else Compose(transform)
        self.keys = tuple(keys)
        self._starts: np.ndarray | None = None
        self._areas: np.ndarray | None = None

    def _measure(self) -> None:
        areas = [self._areas_of(index) for index in range(len(self.data))]
        self._areas = np.concatenate([np.empty(0), *areas])
        self._starts = np.cumsum([0, *map(len, areas)])

    def _areas_of(self, index: int) -> np.ndarray:
        entries = getattr(self.data, "data", None)
        entry = entries[index] if isinstance(entries, Sequence) else {}
        files, areas = entry.get(self.keys[0]), entry.get("lesion_area")
        if isinstance(files, list | tuple) and isinstance(areas, list | tuple) and len(files) == len(areas):
            return np.asarray(areas, dtype=np.float64)
        label = torch.as_tensor(self.data[index][self.keys[-1]])
        return torch.count_nonzero((label > 0).any(0), dim=(0, 1)).numpy(force=True).astype(np.float64)

    @property
    def lesion_areas(self) -> np.ndarray:
        """Return the foreground pixels of each slice, (slices,)."""
        if self._areas is None:
            self._measure()
        return self._areas

    def __len__(self) -> int:
        return len(self.lesion_areas)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"slice {index} of a dataset of {len(self)} slices")
        index = int(index) % len(self)
        volume = int(np.searchsorted(self._starts, index, side="right")) - 1
        start, end = (int(n) for n in self._starts[volume : volume + 2])
        item = self.data[volume]
        for key in self.keys:
            if item[key].shape[-1] != end - start:
                fail(
                    f"{key} {file_name(item[key], f'volume {volume}')} has {item[key].shape[-1]} slices but had "
                    f"{end - start} before: transforms of volumes must keep all slices and must not be random."
                )
        number = index - start
        context = {self.keys[0]: self.context_slices}
        cut: dict[str, Any] = {key: _cut(item[key], number, context.get(key, 0)) for key in self.keys}
        name = item.get("case", file_name(item[self.keys[0]], str(volume)))
        return self.transform({**cut, "case": name, "slice": number})


def neighbours(number: int, slices: int, context: int) -> list[int]:
    """Return the numbers of a slice and its neighbours, in order; the first and last slice stand in for missing ones.

    Args:
        number: number of the slice.
        slices: number of slices of the volume.
        context: number of neighbours on each side.
    """
    return [min(max(k, 0), slices - 1) for k in range(number - context, number + context + 1)]


def _cut(volume: torch.Tensor, number: int, context: int) -> torch.Tensor:
    """Return a copy of one slice (C, W, H) of a volume (C, W, H, D), with its position and file."""
    plain = without_meta(volume)
    piece = torch.cat([plain[..., k] for k in neighbours(number, plain.shape[-1], context)])
    piece = piece.clone(memory_format=torch.contiguous_format)
    if not isinstance(volume, MetaTensor):
        return piece
    affine = volume.affine.clone()
    affine[:3, 3] += number * affine[:3, 2]
    files = slice_files(volume)
    return MetaTensor(piece, affine=affine, meta={FILE: files[number] if files else file_name(volume, "")})


def lesion_weights(areas: ArrayLike, floor: float = 0.1) -> np.ndarray:
    """Compute the probability of drawing each slice from its lesion area, with a minimum for slices without lesion.

    For areas s it is ``(s + floor * mean(s)) / ((1 + floor) * sum(s))``; equal for all if no slice has a lesion.

    Args:
        areas: lesion area of each slice, (slices,), in any unit.
        floor: weight of a slice without lesion, as a fraction of the mean area.

    Returns:
        Probabilities, (slices,), float64, of sum 1.

    Raises:
        ValueError: when an area or ``floor`` is negative or not finite, or there is no slice.
    """
    s = np.asarray(areas, dtype=np.float64)
    if s.ndim != 1 or s.size == 0:
        fail(f"areas must be one number per slice, got shape {s.shape}: is the list of cases empty?")
    if not (np.isfinite(s) & (s >= 0)).all():
        fail(
            f"areas must be finite and not negative, got {s[~(np.isfinite(s) & (s >= 0))][0]:g}: correct the datalist."
        )
    if not 0 <= floor < np.inf:
        fail(f"floor must be finite and not negative (for example 0.1), got {floor}.")
    if not s.any():
        return np.full(len(s), 1 / len(s))
    return (s + floor * s.mean()) / ((1 + floor) * s.sum())


def slice_sampler(
    dataset: SliceDataset, floor: float = 0.1, num_samples: int | None = None, weighted: bool = True, seed: int = 0
) -> Sampler[int]:
    """Return a sampler that draws slices by :func:`lesion_weights` with replacement, or each once per epoch.

    In a process group, every process draws different slices in each epoch; ``seed`` and ``set_epoch``, which MONAI's
    trainers call, decide which. Without a group, torch's random state decides.

    Args:
        dataset: slices to draw from.
        floor: as in :func:`lesion_weights`.
        num_samples: number of slices that all processes together draw per epoch; None means as many as there are.
        weighted: whether to draw by weight; if not, every slice is drawn once per epoch.
        seed: seed for several processes, the same in all.

    Raises:
        ValueError: when there is no slice, or ``num_samples`` is not positive or is given without ``weighted``.
    """
    if not len(dataset):
        fail("there is no slice to draw from: the list of cases is empty.")
    if num_samples is not None and not weighted:
        fail(f"num_samples is {num_samples} but without weights every slice is drawn once per epoch: set it to null.")
    number = len(dataset) if num_samples is None else num_samples
    if number < 1:
        fail(f"num_samples must be positive, or null for as many as there are slices, got {num_samples}.")
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not weighted:
        return DistributedSampler(dataset, seed=seed) if grouped else RandomSampler(dataset)
    weights = lesion_weights(dataset.lesion_areas, floor).tolist()
    if not grouped:
        return WeightedRandomSampler(weights, number)
    share = math.ceil(number / process_count())
    # uneven parts of the dataset, because even ones would share a slice; every process draws the same number
    return DistributedWeightedRandomSampler(dataset, weights, share, even_divisible=False, seed=seed)
