"""Segment images that are too large for the memory: page by page and block by block, from disk to disk."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import PathLike
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.inferers import Inferer
from monai.networks.utils import eval_mode
from monai.transforms import Compose, LoadImaged
from monai.utils import CommonKeys as Keys
from monai.utils import MetaKeys
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from segbundles.confidence import confidence_columns, join_confidence
from segbundles.data import DiskTensor, StackReader, each_page, file_suffix, forget, picture_shape
from segbundles.data.base import TIFF
from segbundles.errors import fail
from segbundles.meta import FILE, add_note, notes_of, set_levels, set_slice_files
from segbundles.transforms import (
    CheckImaged,
    MeasureCellsd,
    NormalizeSlicesd,
    Previewd,
    SaveOutputd,
    SaveProbabilitiesd,
    SaveUncertaintyd,
    displayed_case,
    uncertainty_levels,
)

__all__ = ["LargeImages"]

_SHOWN_PIXELS = 2**21  # of all pages, in the preview and in the estimate of grey levels
_SEAM = 16  # pixels beside a seam in which the cells of two blocks are compared
_OF_WHOLE = (MeasureCellsd, SaveOutputd)
_OF_FLOATS = (SaveProbabilitiesd, SaveUncertaintyd)  # a PNG of them is made in memory, with copies
_CELLS = "cells"  # whose numbers are made unique in each page
_LEVELS = "uncertainty levels"  # what the preview shows of the probabilities


@dataclass(frozen=True)
class _Block:
    """Where a block is in its page: the part that counts, and the same with a margin; slices along x and y."""

    core: tuple[slice, slice]
    window: tuple[slice, slice]

    @property
    def inside(self) -> tuple[slice, slice]:
        """The part that counts, within the window."""
        return tuple(slice(c.start - w.start, c.stop - w.start) for c, w in zip(self.core, self.window, strict=True))


class LargeImages:
    """Segment stacks and sections that are too large for the memory, with the steps of ``inference.json``.

    Each page is read alone, and cut into blocks that overlap by a margin. Every block passes preprocessing, inferer and
    the watershed; results are kept on disk. A page that fits into one block gives the same result as in a stack that
    fits into memory. In a larger page, the grey levels are normalised with the mean and deviation of every n-th pixel
    of the page; cells that meet at the seam of two blocks are joined if one covers at least half of the other beside
    it. The confidence is the mean over all pixels, and ``review`` says in how many blocks there is a reason to look.

    Args:
        block_pixels: side of a block. Images with more pixels than a block, all pages together, are large. None: no
            image is.
        preprocessing: steps of inference, with ``LoadImaged`` first.
        inferer: inferer of the network.
        network: the network.
        postprocessing: steps of inference. Those that measure and write get the whole image, on disk, and the preview
            gets every n-th pixel; all others get each block.
        device: device of the network.
        margin_pixels: how far a block sees beyond its part of the page.

    Raises:
        ValueError: when ``block_pixels`` is not larger than twice the margin.
    """

    def __init__(
        self,
        block_pixels: int | None,
        preprocessing: Compose,
        inferer: Inferer,
        network: Callable,
        postprocessing: Compose,
        device: torch.device | str,
        margin_pixels: int = 128,
    ) -> None:
        if block_pixels is not None and not block_pixels > 2 * margin_pixels:
            fail(f"block_pixels must be more than {2 * margin_pixels}, or null for no limit, got {block_pixels}.")
        self.block_pixels = block_pixels
        self.margin_pixels = margin_pixels
        self.inferer = inferer
        self.network = network
        self.device = torch.device(device)
        steps = [step for step in preprocessing.flatten().transforms if not isinstance(step, LoadImaged)]
        last = max((k for k, step in enumerate(steps) if isinstance(step, CheckImaged)), default=-1)
        self._checks = Compose(steps[: last + 1])
        # a page of a stack, and a block of a page, may be blank
        self._tolerant_checks = Compose([_tolerant(step) for step in self._checks.transforms])
        self._before = Compose([step for step in steps if not isinstance(step, CheckImaged)])
        steps = postprocessing.flatten().transforms
        self._after = Compose([step for step in steps if not isinstance(step, (*_OF_WHOLE, Previewd))])
        self._of_whole = [step for step in steps if isinstance(step, _OF_WHOLE)]
        self._preview = next((step for step in steps if isinstance(step, Previewd)), None)
        self._shows_uncertainty = self._preview is not None and self._preview.prob_keys is not None

    def is_large(self, files: Sequence[PathLike]) -> bool:
        """Return whether an image, given by its files, is too large for the memory."""
        if self.block_pixels is None or len(files) > 1:
            return False
        shape = picture_shape(files[0])
        return shape is not None and math.prod(shape) > self.block_pixels**2

    def __call__(self, file: PathLike) -> dict[str, Any]:
        """Segment an image and write its results.

        Args:
            file: path of the image.

        Returns:
            ``measurements``, ``preview`` and confidence, as far as postprocessing asks for them, and ``image``, of
            which the metadata alone counts.

        Raises:
            ValueError: when the image cannot be read or segmented, or its probabilities or uncertainty are asked
                for and it is no TIFF.
        """
        path = Path(file)
        if file_suffix(path) not in TIFF and any(isinstance(step, _OF_FLOATS) for step in self._of_whole):
            fail(
                f"probabilities and uncertainty of an image as large as {path.name} are written as TIFF only: convert "
                "the image to TIFF, or set save_probabilities and save_uncertainty to false."
            )
        with eval_mode(self.network), tempfile.TemporaryDirectory(prefix=".blocks_", dir=self._folder()) as folder:
            run = _Run(self, path, Path(folder))
            for number in range(run.pages):
                run.segment_page(number)
            return run.finish()

    def _folder(self) -> Path | None:
        folder = next((step.output_dir for step in self._of_whole if isinstance(step, SaveOutputd)), None)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _segment(self, image: MetaTensor) -> dict[str, Any]:
        item = self._before({Keys.IMAGE: image})
        batch = list_data_collate([item])
        batch[Keys.PRED] = self.inferer(batch[Keys.IMAGE].to(self.device), self.network).cpu()
        (item,) = decollate_batch(batch)
        item = self._after(item)
        if self._shows_uncertainty:
            item[_LEVELS] = uncertainty_levels(item[self._preview.prob_keys])[None]
        return item

    def _blocks(self, size: tuple[int, int]) -> Iterator[_Block]:
        """Cut a page into equal blocks, column by column."""
        sides = []
        for n in size:
            count = math.ceil(n / self.block_pixels)
            edges = [n * k // count for k in range(count + 1)]
            sides.append([slice(*edge) for edge in pairwise(edges)])
        for x in sides[0]:
            for y in sides[1]:
                window = (
                    slice(max(0, core.start - self.margin_pixels), min(n, core.stop + self.margin_pixels))
                    for core, n in zip((x, y), size, strict=True)
                )
                yield _Block((x, y), tuple(window))


class _Run:
    """The results of one image so far."""

    def __init__(self, owner: LargeImages, file: Path, folder: Path) -> None:
        self.owner = owner
        self.folder = folder
        self.file = file
        self.pages = picture_shape(file)[0]
        used = (key for step in owner._of_whole for key in step.keys)
        shown = [_LEVELS] * owner._shows_uncertainty
        self.keys = list(dict.fromkeys([*used, _CELLS, *shown]))
        self.maps: dict[str, np.memmap] = {}  # (pages, channels, H, W), the order in which a file has them
        self.shown: list[np.ndarray] = []
        self.step = 1
        self.meta: dict[str, Any] = {}
        self.confidences: list[dict[str, Any]] = []
        self.pixels: list[int] = []  # of each block

    def segment_page(self, number: int) -> None:
        """Segment a page, from 0; the first one must come first."""
        owner = self.owner
        array, meta = self._read(number)
        size = array.shape[:2]
        blocks = list(owner._blocks(size))
        few = np.ascontiguousarray(array[:: self.step, :: self.step])
        self.shown.append(few)
        owner._tolerant_checks({Keys.IMAGE: self._tensor(few, meta)})
        levels = NormalizeSlicesd.levels(torch.from_numpy(few[..., 0].astype(np.float32))) if len(blocks) > 1 else None
        cells, joined, kept = 0, [], []
        for block in blocks:
            image = self._tensor(array[block.window], meta)
            if levels is not None:
                self._set_levels(image, block, *levels)
            item = owner._segment(image)
            add_note(self.meta, notes_of(*item.values()))
            self.confidences.append(confidence_columns(item))
            self.pixels.append(math.prod(c.stop - c.start for c in block.core))
            found = np.asarray(item[_CELLS])[0, ..., 0].astype(np.uint32)
            found[found > 0] += cells
            joined += self._seams(found, number, block)
            cells = max(cells, int(found.max()))
            kept.append(np.unique(found[block.inside]))
            for key in self.keys:
                values = found[None] if key == _CELLS else np.asarray(item[key])[..., 0]
                core = values[(slice(None), *block.inside)]
                self._map(key, core, size)[number, :, block.core[1], block.core[0]] = core.swapaxes(1, 2)
            self._forget()
        self._number(number, blocks, _numbers(cells, joined, kept))

    def _read(self, number: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Return a page (W, H, 1 or channels) and its metadata, and keep those of the first page for the results."""
        reader = StackReader(number if self.pages > 1 else None)
        array, meta = reader.get_data(reader.read(self.file))
        if number == 0:
            whole = self.pages * math.prod(array.shape[:2])
            self.step = max(1, math.ceil(math.sqrt(whole / _SHOWN_PIXELS)))
            self.meta = meta
            if self.pages > 1:
                set_slice_files(meta, [])  # one file, although its pages are read alone
        elif array.shape[:2] != tuple(self.meta[MetaKeys.SPATIAL_SHAPE][:2]):
            fail(f"page {number + 1} of {self.file} has another size than the first: give each size its own file.")
        return array, meta

    def _set_levels(self, image: MetaTensor, block: _Block, mean: float, spread: float, border: Any) -> None:
        """Give a block the grey levels of its page; what is in the flat border of the page gets the mean."""
        if border is not None:
            index = np.ix_(*(np.arange(w.start, w.stop) // self.step for w in block.window))
            image[..., 0][torch.from_numpy(border[index])] = mean
        set_levels(image, mean, spread)

    def _tensor(self, array: np.ndarray, meta: dict[str, Any]) -> MetaTensor:
        """Return what ``LoadImaged`` would return of a part of the image."""
        values = np.ascontiguousarray(array, dtype=np.float32)
        kept = {key: copy.copy(meta[key]) for key in meta if key not in (MetaKeys.AFFINE, MetaKeys.ORIGINAL_AFFINE)}
        kept |= {FILE: str(self.file), MetaKeys.SPATIAL_SHAPE: np.asarray(array.shape[:3])}
        return MetaTensor(torch.from_numpy(values), affine=torch.as_tensor(meta[MetaKeys.AFFINE]), meta=kept)

    def _few(self, key: str) -> torch.Tensor:
        """Return every n-th pixel of what a map has, (W, H, pages)."""
        few = [page[:: self.step, :: self.step].T.copy() for page in each_page(self.maps[key][:, 0])]
        return torch.from_numpy(np.stack(few, axis=-1))

    def _map(self, key: str, values: np.ndarray, size: tuple[int, int]) -> np.memmap:
        if key not in self.maps:
            shape = (self.pages, values.shape[0], size[1], size[0])
            self.maps[key] = np.memmap(self.folder / key, dtype=values.dtype, mode="w+", shape=shape)
        return self.maps[key]

    def _forget(self) -> None:
        for values in self.maps.values():
            forget(values)

    def _seams(self, found: np.ndarray, number: int, block: _Block) -> list[np.ndarray]:
        """Return pairs of numbers of one cell: of the blocks before this one, and of this one."""
        if _CELLS not in self.maps:
            return []
        before = self.maps[_CELLS][number, 0]
        pairs = []
        for axis in (0, 1):
            start = block.core[axis].start
            if start == 0:
                continue
            place = list(block.core)
            place[axis] = slice(start - min(_SEAM, start - block.window[axis].start), start)
            here = tuple(slice(p.start - w.start, p.stop - w.start) for p, w in zip(place, block.window, strict=True))
            pairs.append(_same_cells(np.asarray(before[place[1], place[0]]).T, found[here]))
        return pairs

    def _number(self, number: int, blocks: list[_Block], numbers: np.ndarray) -> None:
        """Give the cells of a page their numbers."""
        values = self.maps[_CELLS][number, 0]
        for block in blocks:
            x, y = block.core
            values[y, x] = numbers[values[y, x]]
            self._forget()

    def finish(self) -> dict[str, Any]:
        """Measure and write the results, and return what the tables and the preview show."""
        owner, item = self.owner, {}
        shown = owner._checks({Keys.IMAGE: self._tensor(np.concatenate(self.shown, axis=2), self.meta)})[Keys.IMAGE]
        add_note(self.meta, notes_of(shown))
        in_blocks = len(self.pixels) > self.pages
        if in_blocks:
            add_note(self.meta, f"segmented in blocks of {owner.block_pixels} x {owner.block_pixels} pixels")
        if all(self.confidences):
            item |= join_confidence(self.confidences, self.pixels, "blocks" if in_blocks else "pages")
        whole: dict[str, Any] = {key: self._whole(values) for key, values in self.maps.items()}
        if owner._preview is not None:
            layers = {"cells": _CELLS} | ({"uncertainty": _LEVELS} if owner._shows_uncertainty else {})
            item["preview"] = displayed_case(shown, {name: self._few(key) for name, key in layers.items()})
        for step in owner._of_whole:
            whole = step(whole)
            self._forget()
        if "measurements" in whole:
            item["measurements"] = whole["measurements"]
        item[Keys.IMAGE] = MetaTensor(torch.zeros(1))
        add_note(item[Keys.IMAGE], notes_of(self.meta, *whole.values()))
        return item

    def _whole(self, values: np.memmap) -> DiskTensor:
        """Return a map as the steps of inference have it, (channels, W, H, pages); it stays on disk."""
        meta = self._tensor(np.empty((1, 1, 1)), self.meta).meta
        meta[MetaKeys.SPATIAL_SHAPE] = np.asarray([*values.shape[:1:-1], self.pages])
        return DiskTensor(values.transpose(1, 3, 2, 0), meta)


def _tolerant(step: Any) -> Any:
    if isinstance(step, CheckImaged):
        step = copy.copy(step)
        step.allow_constant = True
    return step


def _same_cells(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Return pairs of numbers, (pairs, 2), of cells of which one covers at least half of the other."""
    both = (before > 0) & (now > 0)
    pairs, overlap = np.unique(np.stack([before[both], now[both]], axis=1), axis=0, return_counts=True)
    areas = [dict(zip(*np.unique(one, return_counts=True), strict=True)) for one in (before, now)]
    least = [min(areas[0][a], areas[1][b]) for a, b in pairs.tolist()]
    return pairs[2 * overlap >= np.asarray(least, dtype=np.int64)]


def _numbers(count: int, joined: Sequence[np.ndarray], kept: Sequence[np.ndarray]) -> np.ndarray:
    """Return the new number of each of ``count`` cells, from 1 without gaps in the order of the old ones; uint32.

    Args:
        count: number of cells, with those that were seen in margins only.
        joined: pairs of numbers of one cell.
        kept: numbers of the cells that are in the page.
    """
    pairs = np.concatenate([np.empty((0, 2), np.int64), *joined])
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count + 1, count + 1))
    _, group = connected_components(graph, directed=False)
    there = np.unique(np.concatenate([np.empty(0, np.int64), *kept]))
    groups, first = np.unique(group[there[there > 0]], return_index=True)
    numbers = np.zeros(count + 1, np.uint32)
    numbers[groups[np.argsort(first)]] = np.arange(1, len(groups) + 1)
    return numbers[group]
