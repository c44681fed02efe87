from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from segbundles.report import (
    CELL_COLOURS,
    PREDICTION_COLOURS,
    TRUTH_COLOURS,
    colour_cells,
    limit_figures,
    section_figure,
)


def brick_wall(rows: int, columns: int, side: int = 12) -> np.ndarray:
    """Cells like bricks, each with six neighbours, 2 pixels of membrane between them."""
    cells = np.zeros((rows * side, columns * side), np.int32)
    for r in range(rows):
        for c in range(columns + 1):
            left = c * side - (side // 2 if r % 2 else 0)
            cells[r * side + 1 : (r + 1) * side - 1, max(0, left + 1) : max(0, left + side - 1)] = 1 + r * 100 + c
    return cells


def test_neighbours_differ_and_a_cell_has_one_colour():
    cells = brick_wall(6, 7)
    colours = colour_cells(cells)
    of = {}
    for cell in np.unique(cells[cells > 0]):
        found = np.unique(colours[cells == cell], axis=0)
        assert len(found) == 1
        assert tuple(found[0].tolist()) in CELL_COLOURS
        of[cell] = tuple(found[0].tolist())
    assert (colours[cells == 0] == 0).all()
    # across the membrane: two pixels of it, so three steps reach the next cell
    pairs = set()
    for a, b in ((cells[3:], cells[:-3]), (cells[:, 3:], cells[:, :-3])):
        pairs |= {
            tuple(sorted(p)) for p in np.stack([a.ravel(), b.ravel()], 1).tolist() if p[0] and p[1] and p[0] != p[1]
        }
    assert len(pairs) > 80
    assert all(of[a] != of[b] for a, b in pairs)
    assert len(set(of.values())) == len(CELL_COLOURS)  # and no colour stands for most of the cells


def test_numbers_with_gaps_and_no_cell_at_all():
    cells = np.array([[5, 5, 0, 1000]])
    assert len(np.unique(colour_cells(cells)[0], axis=0)) == 3
    assert not colour_cells(np.zeros((4, 5), int)).any()
    whole = colour_cells(np.full((4, 5), 3))
    assert tuple(whole[0, 0].tolist()) == CELL_COLOURS[0]
    with pytest.raises(
        ValueError, match=r"cells must be a label image \(H, W\) of integers from 0, got shape \(4, 5\) of float64"
    ):
        colour_cells(np.zeros((4, 5)))


def picture_of(jpeg: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(jpeg)) as picture:
        assert picture.format == "JPEG"
        return np.asarray(picture.convert("RGB")).astype(int)


def share(picture: np.ndarray, colour) -> float:
    return float((np.abs(picture - np.array(colour)).max(-1) < 40).mean())


def test_four_panels_show_errors_in_their_colours():
    """Wide image: the left half is membrane that was missed, and the right half is called membrane for nothing."""
    truth = np.zeros((60, 30), int)
    truth[30:] = 1
    prediction = 1 - truth
    image = np.linspace(0, 255, 60 * 30).reshape(60, 30)
    jpeg = section_figure(image, truth, prediction, 1.0 - prediction, np.zeros((60, 30), int))
    assert len(jpeg) <= 300_000
    picture = picture_of(jpeg)
    height, width = picture.shape[:2]
    errors = picture[height // 2 :, width // 2 :]
    blue, orange = TRUTH_COLOURS[0], PREDICTION_COLOURS[0]
    half = errors.shape[1] // 2
    assert share(errors[:, : half - 10], blue) > 0.5
    assert share(errors[:, half + 10 :], orange) > 0.5
    assert share(errors[:, : half - 10], orange) < 0.02
    # the panel beside is upright: W runs to the right
    probability = picture[: height // 2, width // 2 :]
    assert probability[height // 4, 20].mean() > 200
    assert probability[height // 4, -20].mean() < 60


@pytest.mark.parametrize("size", [(512, 512), (40, 200), (300, 20)])
def test_noise_of_any_size_stays_small(size):
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 9, size)
    jpeg = section_figure(rng.integers(0, 256, size), cells > 4, cells > 5, rng.random(size), cells)
    assert len(jpeg) <= 300_000
    picture_of(jpeg)


def test_many_sections_are_drawn_smaller():
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (520, 680, 3), np.uint8)).save(buffer, "JPEG", quality=85)
    large, small = buffer.getvalue(), b"small ones are not touched"
    assert 200_000 < len(large) <= 300_000
    assert limit_figures([]) == []
    assert limit_figures([large] * 46) == [large] * 46
    # 14 MB / 140 = 100 kB
    found = limit_figures([large, *[small] * 139])
    assert found[1:] == [small] * 139
    assert 50_000 < len(found[0]) <= 100_000
    picture_of(found[0])
    # and no smaller than the picture of a case of the other bundles
    assert 34_000 < len(limit_figures([large, *[small] * 4999])[0]) <= 68_000


def test_shapes_that_differ_are_refused():
    a, b = np.zeros((4, 5)), np.zeros((5, 4))
    with pytest.raises(
        ValueError, match=r"must have one shape \(W, H\), got image \(4, 5\), truth \(5, 4\), prediction"
    ):
        section_figure(a, b, a, a, a.astype(int))
    with pytest.raises(ValueError, match=r"must have one shape"):
        section_figure(*[np.zeros((4, 5, 6))] * 5)
