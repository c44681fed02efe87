from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from monai.data import decollate_batch, list_data_collate
from monai.inferers import SimpleInferer
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged
from PIL import Image

from segbundles.data import StackReader, picture_shape
from segbundles.errors import innermost
from segbundles.inferers import LargeImages
from segbundles.inferers.large import _numbers, _same_cells
from segbundles.meta import notes_of
from segbundles.transforms import (
    CheckImaged,
    Confidenced,
    MeasureCellsd,
    NormalizeSlicesd,
    Previewd,
    ProbabilityWatershedd,
    SaveProbabilitiesd,
    SaveSegmentationd,
    SaveUncertaintyd,
    ToProbabilitiesd,
    Uncertaintyd,
)


def network(x: torch.Tensor) -> torch.Tensor:
    """Probability of membrane, and of cell: membrane is dark, and less certain in the lower half of the grey levels."""
    bright = 0.9 * (x > 0.4).float() + 0.1 * (x > 0.55)
    return torch.cat([1 - bright, bright], dim=1)


def grid(columns: int, rows: int, side: int = 10, seed: int = 0) -> np.ndarray:
    """Cells in a grid, (H, W): squares between dark lines of 2 pixels; their grey levels differ."""
    rng = np.random.default_rng(seed)
    page = rng.integers(150, 200, (rows, columns), dtype=np.uint8).repeat(side, 0).repeat(side, 1)
    dark = np.arange(max(page.shape)) % side < 2
    page[dark[: page.shape[0]]] = 20
    page[:, dark[: page.shape[1]]] = 20
    return page


def write(path: Path, *pages: np.ndarray) -> Path:
    tifffile.imwrite(path, np.stack(pages) if len(pages) > 1 else pages[0], photometric="minisblack")
    return path


def steps(out: Path, facts: dict | None = None) -> tuple[Compose, Compose]:
    before = [
        LoadImaged("image", reader=StackReader),
        EnsureChannelFirstd("image"),
        CheckImaged("image"),
        NormalizeSlicesd("image", 0.5, 0.17),
    ]
    after = [
        ToProbabilitiesd("pred", logits=False),
        Confidenced("pred", score="accuracy", facts=facts),
        Uncertaintyd(),
        ProbabilityWatershedd("pred", mask_keys="pred", sigma=0),
        Previewd("image", label_keys=None, cells_keys="cells", prob_keys="prob"),
        MeasureCellsd("pred"),
        SaveSegmentationd("pred", out),
        SaveSegmentationd("cells", out, output_postfix="cells", label_image=True),
        SaveProbabilitiesd("prob", out),
        SaveUncertaintyd("uncertainty", out),
    ]
    return Compose(before), Compose(after)


def large(out: Path, block_pixels: int | None, margin_pixels: int = 6, facts: dict | None = None) -> LargeImages:
    before, after = steps(out, facts)
    return LargeImages(block_pixels, before, SimpleInferer(), network, after, "cpu", margin_pixels)


def whole(path: Path, out: Path) -> dict:
    """What inference gives of an image that fits into memory."""
    before, after = steps(out)
    batch = list_data_collate([before({"image": str(path)})])
    batch["pred"] = network(batch["image"])
    return after(decollate_batch(batch)[0])


def written(folder: Path, stem: str) -> tuple[np.ndarray, np.ndarray]:
    """Mask and cells."""
    mask = next(iter(folder.glob(f"{stem}_seg.*")))
    read = tifffile.imread if mask.suffix == ".tif" else Image.open
    return np.asarray(read(mask)), tifffile.imread(folder / f"{stem}_cells.tif")


def test_a_page_in_blocks_has_the_cells_of_the_whole(tmp_path: Path) -> None:
    """Blocks of 31 and 34 pixels cut through cells of 10; every cell is found once, with all of its pixels."""
    path = write(tmp_path / "page.tif", grid(10, 6))
    expected = whole(path, tmp_path / "whole")
    item = large(tmp_path / "blocks", 40)(path)
    (mask, cells), (mask_of_whole, cells_of_whole) = (written(tmp_path / name, "page") for name in ("blocks", "whole"))
    assert mask.shape == (60, 100)
    assert (mask == mask_of_whole).all()
    pairs = np.unique(np.stack([cells.ravel(), cells_of_whole.ravel()]), axis=1)
    assert pairs.shape == (2, 61)  # one to one, and the background
    assert np.unique(cells).tolist() == list(range(61))
    measured, of_whole = item["measurements"], expected["measurements"]
    assert measured["cells"] == 60
    assert measured["membrane_fraction"] == of_whole["membrane_fraction"] == pytest.approx(0.36)
    rows = [
        sorted(
            (row["centroid_x"], row["centroid_y"], row["area_pixels"], row["touches_border"]) for row in one["table"]
        )
        for one in (measured, of_whole)
    ]
    assert rows[0] == rows[1]
    assert notes_of(item["image"]).startswith("segmented in blocks of 40 x 40 pixels")
    for name in ("prob", "uncertainty"):
        of_blocks, at_once = (tifffile.imread(tmp_path / kind / f"page_{name}.tif") for kind in ("blocks", "whole"))
        assert of_blocks.shape == ((2, 60, 100) if name == "prob" else (60, 100))
        assert of_blocks == pytest.approx(at_once, abs=1e-6)
    assert not list((tmp_path / "blocks").glob(".blocks_*"))


def test_a_stack_page_by_page_is_what_it_is_at_once(tmp_path: Path) -> None:
    """Also with a blank page and another number of cells on each."""
    blank = np.full((60, 70), 90, np.uint8)
    path = write(
        tmp_path / "stack.tif", grid(7, 6), blank, grid(7, 6, seed=1)[::-1], np.pad(grid(5, 6), ((0, 0), (0, 20)))
    )
    expected = whole(path, tmp_path / "whole")
    item = large(tmp_path / "pages", 80)(path)
    for one, other in zip(*(written(tmp_path / name, "stack") for name in ("pages", "whole")), strict=True):
        assert one.shape == (4, 60, 70)
        assert one.dtype == other.dtype
        assert (one == other).all()
    assert item["measurements"] == expected["measurements"]
    assert "blocks" not in notes_of(item["image"])
    shown, of_whole = item["preview"], expected["preview"]
    assert shown["image"].shape == of_whole["image"].shape
    for layer in ("cells", "uncertainty"):
        assert (shown["overlays"][layer] == of_whole["overlays"][layer]).all()
    # the mean of equal pages, which is that of all pixels
    assert item["confidence"] == pytest.approx(expected["confidence"], abs=1e-6)


def test_the_confidence_of_a_page_in_blocks(tmp_path: Path) -> None:
    """The mean over the pixels; the right half, which alone is uncertain, gives the reasons to look."""
    page = grid(8, 8)
    page[:, 40:][page[:, 40:] > 20] = 110
    facts = {
        "score": "accuracy",
        "temperature": 1.0,
        "shift": 0.0,
        "intercept": 0.0,
        "coefficients": {"expected": 1.0},
        "margin": 0.1,
        "low": 0.95,
        "masks": {"size_percent": [0.0, 100.0]},
        "images": {},
    }
    path = write(tmp_path / "page.tif", page)
    before, after = steps(tmp_path / "whole", facts)
    batch = list_data_collate([before({"image": str(path)})])
    batch["pred"] = network(batch["image"])
    expected = after(decollate_batch(batch)[0])
    item = large(tmp_path / "blocks", 40, facts=facts)(path)
    assert 0.9 < item["confidence"] < 1
    assert item["confidence"] == pytest.approx(expected["confidence"], abs=0.01)
    assert item["confidence_low"] == pytest.approx(item["confidence"] - 0.1)
    kinds = [reason.partition(":")[0] for reason in item["review"].split("; ")]
    assert "low confidence" in kinds
    assert "(in 2 of 4 blocks)" in item["review"]


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ([np.full((60, 60), 7, np.uint8)] * 2, "is constant"),
        ([np.stack([grid(6, 6)] * 3, axis=-1)], r"has 3 channel\(s\) but must have 1"),
    ],
)
def test_what_is_refused(pages: list[np.ndarray], message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.tif"
    photometric = "rgb" if pages[0].ndim == 3 else "minisblack"
    tifffile.imwrite(path, np.squeeze(np.stack(pages)), photometric=photometric)
    with pytest.raises(RuntimeError, match="applying transform") as caught:
        large(tmp_path / "out", 40)(path)
    assert re.search(message, innermost(caught.value))
    assert not list((tmp_path / "out").glob("*"))


def test_probabilities_of_a_large_png_are_refused(tmp_path: Path) -> None:
    Image.fromarray(grid(8, 8)).save(tmp_path / "page.png")
    with pytest.raises(ValueError, match=r"as large as page\.png are written as TIFF only: convert the image"):
        large(tmp_path / "out", 40)(tmp_path / "page.png")
    assert not (tmp_path / "out").exists()


def test_which_images_are_large(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.tif", grid(4, 4)), write(tmp_path / "b.tif", *[grid(4, 4)] * 2), tmp_path / "c.png"]
    Image.fromarray(grid(5, 4)).save(paths[2])
    (tmp_path / "bad.tif").write_bytes(b"II*\0")
    assert [picture_shape(path) for path in paths] == [(1, 40, 40), (2, 40, 40), (1, 40, 50)]
    assert [large(tmp_path, 40).is_large([path]) for path in paths] == [False, True, True]
    assert not large(tmp_path, 40).is_large([tmp_path / "bad.tif"])
    assert not large(tmp_path, 40).is_large(paths)
    assert not large(tmp_path, None).is_large([paths[1]])
    with pytest.raises(ValueError, match="block_pixels must be more than 12, or null for no limit, got 12"):
        large(tmp_path, 12)


def test_cells_are_joined_where_one_covers_half_of_the_other() -> None:
    before = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 3]])
    now = np.array([[5, 5, 5, 5, 5, 6, 6, 6, 7]])
    assert _same_cells(before, now).tolist() == [[1, 5], [2, 6], [3, 7]]
    # 1 and 4 are one cell, 2 is only in a margin, and 5 joins it with 3
    numbers = _numbers(5, [np.array([[1, 4]]), np.array([[2, 5], [5, 3]])], [np.array([0, 1, 3]), np.array([4])])
    assert numbers.tolist() == [0, 1, 2, 2, 1, 2]
    assert _numbers(3, [], [np.array([0, 3]), np.array([1])]).tolist() == [0, 1, 0, 2]
    assert _numbers(0, [], [np.array([0])]).tolist() == [0]


def test_a_flat_border_of_a_page_does_not_change_its_levels(tmp_path: Path) -> None:
    """Half of the page is black, as stitching leaves it: it counts as cell, together with the eight beside it."""
    page = np.pad(grid(8, 8), ((0, 0), (0, 80)))
    item = large(tmp_path / "out", 60)(write(tmp_path / "page.tif", page))
    mask, _ = written(tmp_path / "out", "page")
    assert (mask[:, :78] > 0).tolist() == (page[:, :78] > 20).tolist()
    assert item["measurements"]["cells"] == 64 - 8 + 1
