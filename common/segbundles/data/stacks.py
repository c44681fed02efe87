"""Volumes made of 2D images, and learning from the slices of volumes."""

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
import tifffile
import torch
from monai.config import PathLike
from monai.data import DistributedSampler, DistributedWeightedRandomSampler, MetaTensor
from monai.transforms import Compose
from numpy.typing import ArrayLike
from torch.utils.data import Dataset, RandomSampler, Sampler, WeightedRandomSampler

from segbundles.data.cases import _LazyCases
from segbundles.data.readers import PIL, TIFF, file_stem, file_suffix
from segbundles.errors import fail

__all__ = ["SliceDataset", "SliceStacks", "lesion_weights", "slice_sampler"]

BY_SLICE = ("slice", "lesion_area")


class SliceStacks(_LazyCases):
    """Cases of which 2D images that belong together are one, to be read by :class:`segbundles.data.StackReader`.

    2D images (TIFF, PNG, BMP, JPEG) belong together when they have the same ``group``; without a group, when they lie
    in one folder and their stems differ only in a trailing ``_<number>``. Their order is that of ``slice`` if all have
    it, else of the trailing number if all have one, else of their paths. Such a stack is one case: ``image`` and
    ``label`` are lists of paths, ``slice`` and ``lesion_area`` lists where all slices have them, ``case`` the group or
    the name without a number; what else is equal over the stack is kept. Volume files, TIFF files of several pages and
    images that are lists already pass as they are.

    Args:
        cases: dictionaries of paths: a list, a :class:`Datalist`, :class:`FolderImages`. Read at first use.
        keys: what becomes a list of paths; the first is the image.

    Raises:
        ValueError: at first use, when some slices of a stack lack a key that others have, or two have one number.
    """

    def __init__(self, cases: Sequence[Mapping[str, Any]], keys: Sequence[str] = ("image", "label")) -> None:
        """See the class."""
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
        """What is equal for slices of one stack: the group, or folder and name; a number for what is no slice."""
        image = entry[self.keys[0]]
        if isinstance(image, list | tuple) or not _is_slice(image):
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
                    "number them anew, or give each stack a group (or a folder) of its own."
                )
        entries = [entry for _, entry in order]
        shared = {k: v for k, v in entries[0].items() if all(k in entry and entry[k] == v for entry in entries)}
        stack = {"case": name, **{k: v for k, v in shared.items() if k != "case"}}
        for key in (*self.keys, *BY_SLICE):
            values = [entry.get(key) for entry in entries]
            stack.pop(key, None)
            if key in self.keys and 0 < values.count(None) < len(values):
                bare = entries[values.index(None)][image]
                fail(f"{bare} has no {key}, other slices of {name} have one: add it, or leave this slice out.")
            if None not in values:
                stack[key] = values
        return stack


def _split(path: PathLike) -> tuple[str, int | None]:
    """Stem without its trailing number, and that number."""
    match = re.fullmatch(r"(.*)_(\d+)", file_stem(path), re.DOTALL)
    return (match[1], int(match[2])) if match else (file_stem(path), None)


def _is_slice(path: PathLike) -> bool:
    """Whether a file is in a format of 2D images, and holds one."""
    if file_suffix(path) not in TIFF:
        return file_suffix(path) in PIL
    try:
        with tifffile.TiffFile(path) as file:
            return len(file.pages) < 2
    except Exception:  # StackReader will say so by name, when its turn comes
        return True


def _numbers(entries: Sequence[Mapping[str, Any]], image: str) -> list[Any]:
    """What the entries of a stack are sorted by."""
    given = [entry.get("slice") for entry in entries]
    if None not in given:
        return given
    trailing = [_split(entry[image])[1] for entry in entries]
    if None not in trailing:
        return trailing
    return [str(entry[image]) for entry in entries]


def _names(stacks: Sequence[tuple[Path, str, bool]]) -> list[str]:
    """Names of cases: those of the files without number, preceded by folders where several have one name."""
    often = Counter(name for _, name, _ in stacks)
    paths = [folder.absolute() for folder, _, _ in stacks]
    root = os.path.commonpath(paths) if paths else ""
    return [
        name if often[name] == 1 else (path / name).relative_to(root).as_posix()
        for path, (_, name, _) in zip(paths, stacks, strict=True)
    ]


class SliceDataset(Dataset):
    """The slices of a dataset of volumes.

    Item i is ``{key: (C, W, H), "case": ..., "slice": s}`` of a slice s, counted from 0 in its volume, after
    ``transform``. Slices are copies: what transforms do to them leaves a cache as it is. They know their own file as
    ``meta["filename_or_obj"]``. The volumes are gone through once, at the first use of the length; a stack whose entry
    has a ``lesion_area`` for each of its files need not be.

    Args:
        data: dataset whose items hold volumes (C, W, H, D). Every slice asks for its volume, so it should be one that
            caches all, without random transforms: ``CacheDataset`` would copy the volume for them.
        transform: transforms of slices, random ones too.
        keys: volumes to cut; the foreground (> 0) of the last is the lesion.

    Raises:
        ValueError: when a volume has another number of slices than at first.
    """

    def __init__(
        self,
        data: Dataset,
        transform: Sequence[Callable] | Callable | None = None,
        keys: Sequence[str] = ("image", "label"),
    ) -> None:
        """See the class."""
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
        """Foreground pixels of each slice, (slices,)."""
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
                name = _meta(item[key]).get("filename_or_obj", f"volume {volume}")
                fail(
                    f"{key} {name} has {item[key].shape[-1]} slices, {end - start} were counted before: transforms of "
                    "volumes must keep the slices that the datalist lists, and draw nothing at random."
                )
        number = index - start
        cut: dict[str, Any] = {key: _cut(item[key], number) for key in self.keys}
        name = item.get("case", _meta(item[self.keys[0]]).get("filename_or_obj", str(volume)))
        return self.transform({**cut, "case": name, "slice": number})


def _meta(image: torch.Tensor) -> dict[str, Any]:
    return getattr(image, "meta", {})


def _cut(volume: torch.Tensor, number: int) -> torch.Tensor:
    """A copy of one slice (C, W, H) of a volume (C, W, H, D), with its place and its file."""
    if not isinstance(volume, MetaTensor):
        return volume[..., number].clone(memory_format=torch.contiguous_format)
    piece = volume.as_tensor()[..., number].clone(memory_format=torch.contiguous_format)
    affine = volume.affine.clone()
    affine[:3, 3] += number * affine[:3, 2]
    file = volume.meta.get("filename_or_obj", "")
    if "slices" in volume.meta:
        file = volume.meta["slices"].split("\n")[number]
    return MetaTensor(piece, affine=affine, meta={"filename_or_obj": file})


def lesion_weights(areas: ArrayLike, floor: float = 0.1) -> np.ndarray:
    """Probability to draw each slice: by its lesion area, yet with a share for slices without any.

    With s the areas, ``(s + floor * mean(s)) / ((1 + floor) * sum(s))``; equal where no slice has a lesion.

    Args:
        areas: lesion area of each slice, (slices,), in any unit.
        floor: what a slice without lesion weighs, as a part of the mean area.

    Returns:
        Probabilities, (slices,), float64, of sum 1.

    Raises:
        ValueError: when an area or ``floor`` is negative or not finite, or there is no slice.
    """
    s = np.asarray(areas, dtype=np.float64)
    if s.ndim != 1 or s.size == 0:
        fail(f"areas must be one number a slice, got shape {s.shape}: is the list of cases empty?")
    if not (np.isfinite(s) & (s >= 0)).all():
        fail(f"areas must be finite and not negative, got {s[~(np.isfinite(s) & (s >= 0))][0]:g}: mend the datalist.")
    if not 0 <= floor < np.inf:
        fail(f"floor must be finite and not negative (0.1, say), got {floor}.")
    if not s.any():
        return np.full(len(s), 1 / len(s))
    return (s + floor * s.mean()) / ((1 + floor) * s.sum())


def slice_sampler(
    dataset: SliceDataset, floor: float = 0.1, num_samples: int | None = None, weighted: bool = True, seed: int = 0
) -> Sampler[int]:
    """Sampler that draws slices by :func:`lesion_weights`, with replacement, or each once an epoch.

    Where a process group stands when this is called, every process draws from slices that no other has in that epoch:
    ``seed`` and ``set_epoch``, which MONAI's trainers call, decide which. Else all randomness is torch's.

    Args:
        dataset: slices to draw from.
        floor: as in :func:`lesion_weights`.
        num_samples: slices drawn in an epoch by all processes together; None takes as many as there are.
        weighted: if not, every slice is drawn once in an epoch.
        seed: for several processes, the same in all.

    Raises:
        ValueError: when there is no slice, ``num_samples`` is not positive, or it is given without ``weighted``.
    """
    if not len(dataset):
        fail("there is no slice to draw from: the list of cases is empty.")
    if num_samples is not None and not weighted:
        fail(f"num_samples is {num_samples}, but without weights every slice is drawn once an epoch: set it to null.")
    number = len(dataset) if num_samples is None else num_samples
    if number < 1:
        fail(f"num_samples must be positive, or null for as many as there are slices, got {num_samples}.")
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not weighted:
        return DistributedSampler(dataset, seed=seed) if several else RandomSampler(dataset)
    weights = lesion_weights(dataset.lesion_areas, floor).tolist()
    if not several:
        return WeightedRandomSampler(weights, number)
    share = math.ceil(number / torch.distributed.get_world_size())
    # uneven shares: to make them even, one slice would be in two; the number drawn is the same everywhere
    return DistributedWeightedRandomSampler(dataset, weights, share, even_divisible=False, seed=seed)
