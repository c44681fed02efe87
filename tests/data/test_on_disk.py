"""Arrays on disk: the same values as in memory, one page of them in memory at a time."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from segbundles.data import DiskTensor, each_page, forget
from segbundles.measurements import measure_cells
from segbundles.transforms import SaveSegmentationd

PAGES, SIDE = 12, 256
PAGE_KB = SIDE * SIDE * 4 / 1024


@pytest.fixture
def cells(tmp_path: Path) -> np.memmap:
    """Return numbers of cells (pages, 1, H, W): quarters of a page, from 1 to 4, in a file."""
    array = np.memmap(tmp_path / "cells.raw", np.int32, mode="w+", shape=(PAGES, 1, SIDE, SIDE))
    half = np.arange(SIDE) // (SIDE // 2)
    array[:] = 1 + half + 2 * half[:, None]
    forget(array)
    return array


def in_memory_kb(array: np.memmap) -> int:
    """Return how much of a file is in the memory of this process."""
    blocks = Path("/proc/self/smaps").read_text().split(f"{array.filename}\n")
    return sum(int(block.split("Rss:")[1].split()[0]) for block in blocks[1:])


def test_pages_in_order_and_views_of_a_file() -> None:
    array = np.arange(24).reshape(2, 3, 2, 2)
    np.testing.assert_array_equal(np.stack(list(each_page(array))), array.reshape(6, 2, 2))
    (page,) = each_page(array[0, 0])
    np.testing.assert_array_equal(page, [[0, 1], [2, 3]])


def test_a_tensor_on_disk_has_its_values_and_metadata(cells: np.memmap) -> None:
    tensor = DiskTensor(cells.transpose(1, 3, 2, 0), {"name": "a"})
    assert tensor.shape == (1, SIDE, SIDE, PAGES)
    assert tensor.meta["name"] == "a"
    assert int(tensor[0, -1, 0, 3]) == 2  # x comes first
    np.testing.assert_array_equal(tensor.numpy(force=True), torch.Tensor.numpy(tensor))


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="this system does not say what is in memory")
def test_measuring_and_writing_keep_one_page_in_memory(cells: np.memmap, tmp_path: Path) -> None:
    seen = [in_memory_kb(cells) for page in each_page(cells) if page.max() == 4]
    assert len(seen) == PAGES
    assert max(seen) < 2 * PAGE_KB
    np.asarray(cells).sum()
    assert in_memory_kb(cells) > (PAGES - 1) * PAGE_KB

    source = tmp_path / "a.tif"
    tensor = DiskTensor(
        cells.transpose(1, 3, 2, 0), {"filename_or_obj": str(source), "spatial_shape": (SIDE, SIDE, 12)}
    )
    labels = tensor.numpy(force=True)[0]
    measured, rows = measure_cells(labels, labels)
    SaveSegmentationd("cells", tmp_path / "out", tmp_path, "cells", label_image=True)({"cells": tensor})
    assert in_memory_kb(cells) < 2 * PAGE_KB

    assert measured == {"cells": 4 * PAGES, "cells_per_section": [4] * PAGES, "membrane_fraction": 0.0}
    assert {row["area_pixels"] for row in rows} == {SIDE * SIDE // 4}
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out" / "a_cells.tif"), cells[:, 0])
