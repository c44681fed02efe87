from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from matplotlib.path import Path as Polygon
from PIL import Image

from segbundles.report import CELL_COLOURS, PREDICTION_COLOURS, TRUTH_COLOURS, case_slices, share_of_page


def polygons(path: str) -> list[np.ndarray]:
    """Corners (x, y) of the closed lines of a path, in pixels."""
    found = []
    for part in path.removesuffix("z").split("z"):
        numbers = [int(n) for n in re.findall(r"-?\d+", part)]
        found.append(np.cumsum(np.reshape(numbers, (-1, 2)), axis=0) / 2)
    return found


def filled(path: str, width: int, height: int) -> np.ndarray:
    """Pixels (rows, columns) whose centres are inside an odd number of lines."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    centres = np.stack([columns.ravel(), rows.ravel()], 1)
    inside = sum(Polygon(corners).contains_points(centres).astype(int) for corners in polygons(path))
    return (inside % 2 == 1).reshape(height, width)


def sheet(shown: dict) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(shown["picture"].removeprefix("data:image/jpeg;base64,"))))


def tile(shown: dict, number: int) -> np.ndarray:
    (width, height), columns = shown["tile"], shown["columns"]
    left, top = number % columns * width, number // columns * height
    return np.asarray(sheet(shown).crop((left, top, left + width, top + height)))


def only(shown: dict) -> dict:
    ((one,),) = (overlay["classes"] for overlay in shown["overlays"])
    return one


def test_one_pixel_of_a_2d_image():
    classes = np.zeros((4, 3), np.uint8)  # (W, H)
    classes[2, 1] = 1
    shown = case_slices(np.arange(12.0).reshape(4, 3), {"outlines": classes})
    assert (shown["size"], shown["tile"], shown["slices"], shown["start"]) == ([4, 3], [4, 3], 1, 0)
    ((corners,), by_slice) = polygons(only(shown)["paths"]["0"]), only(shown)
    # between the centre (2.5, 1.5) of the pixel and those of its neighbours
    assert {tuple(corner) for corner in corners.tolist()} == {(2.5, 1), (3, 1.5), (2.5, 2), (2, 1.5)}
    assert (by_slice["class"], by_slice["colour"]) == (1, "rgb(230, 159, 0)")
    assert list(by_slice["paths"]) == ["0"]
    assert json.loads(json.dumps(shown)) == shown


def test_straight_lines_have_corners_only():
    classes = np.zeros((12, 10), bool)
    classes[2:9, 3:8] = True
    (corners,) = polygons(only(case_slices(np.zeros((12, 10)), {"o": classes}))["paths"]["0"])
    assert len(corners) == 8  # of a rectangle whose corners are cut
    assert (corners.min(0).tolist(), corners.max(0).tolist()) == ([2, 3], [9, 8])


@pytest.mark.parametrize("slice_axis", [-1, 0, 1])
def test_paths_fill_the_classes_on_every_slice(slice_axis):
    noise = np.random.default_rng(0).random((14, 11, 9))
    classes = np.digitize(noise, (0.5, 0.8))  # with holes, islands and pixels that touch at corners
    classes[..., 7] = 0
    shown = case_slices(noise, {"truth": classes, "prediction": classes == 2}, slice_axis=slice_axis)
    turned = np.moveaxis(np.moveaxis(classes, slice_axis, -1), 0, 1)  # (rows, columns, slices)
    height, width, count = turned.shape
    assert (shown["size"], shown["slices"]) == ([width, height], count)
    truth, prediction = shown["overlays"]
    assert [one["class"] for one in truth["classes"]] == [1, 2]
    for one in truth["classes"]:
        for k in range(count):
            path = one["paths"].get(str(k))
            expected = turned[..., k] == one["class"]
            assert (path is None) == (not expected.any())
            if path:
                np.testing.assert_array_equal(filled(path, width, height), expected)
    assert prediction["classes"][0]["paths"] == truth["classes"][1]["paths"]


def test_names_styles_and_colours():
    classes = np.broadcast_to(np.arange(8, dtype=np.uint8), (5, 8))
    shown = case_slices(np.zeros((5, 8)), {"truth": classes, "prediction": classes})
    assert [(o["name"], o["style"]) for o in shown["overlays"]] == [("truth", "solid"), ("prediction", "dashed")]
    for overlay, colours in zip(shown["overlays"], (TRUTH_COLOURS, PREDICTION_COLOURS), strict=True):
        expected = [f"rgb{colours[k % 5]}" for k in range(7)]
        assert [one["colour"] for one in overlay["classes"]] == expected
    assert case_slices(np.zeros((5, 8)), {"outlines": classes})["overlays"][0]["style"] == "solid"


def test_uncertainty_is_switched_off_at_first_and_changes_nothing_else():
    image = np.arange(48.0).reshape(4, 4, 3)
    outlines, levels = np.zeros((2, 4, 4, 3), np.uint8)
    outlines[1, 1, 0] = 1
    levels[2:, 2:, 2], levels[3, 3, 2] = 1, 2
    without = case_slices(image, {"outlines": outlines})
    shown = case_slices(image, {"outlines": outlines, "uncertainty": levels})
    first, second = shown.pop("overlays")
    assert {**shown, "overlays": [first]} == without  # it also starts at the same slice
    assert (first["hidden"], second["hidden"]) == (False, True)
    assert (second["name"], second["style"]) == ("uncertainty", "filled")
    assert [(one["class"], list(one["paths"])) for one in second["classes"]] == [(1, ["2"]), (2, ["2"])]
    assert case_slices(image, {"outlines": outlines, "uncertainty": 0 * levels}) == without


def test_cells_are_filled_and_neighbours_differ():
    cells = np.zeros((20, 20, 2), np.int32)
    cells[:9, :, 0], cells[11:, :, 0] = 501, 7
    cells[5:15, 5:15, 1] = 7
    shown = case_slices(np.zeros((20, 20, 2)), {"cells": cells})
    (overlay,) = shown["overlays"]
    assert overlay["style"] == "filled"
    assert [one["colour"] for one in overlay["classes"]] == [f"rgb{colour}" for colour in CELL_COLOURS[:2]]
    assert [list(one["paths"]) for one in overlay["classes"]] == [["0", "1"], ["0"]]
    fillings = [filled(one["paths"]["0"], 20, 20) for one in overlay["classes"]]
    np.testing.assert_array_equal(fillings[0] | fillings[1], cells[..., 0].T > 0)
    assert not (fillings[0] & fillings[1]).any()


@pytest.mark.parametrize("count", [1, 2, 7, 130])
def test_every_slice_is_in_the_picture(count):
    grey = np.linspace(0, 250, max(count, 2))[:count]
    image = np.broadcast_to(grey, (40, 24, count)).copy()
    image[0, 0, 0], image[1, 0, 0] = 0, 250
    shown = case_slices(image, {})
    assert sheet(shown).mode == "L"
    assert shown["tile"] == [40, 24]
    assert shown["start"] == count // 2
    low, high = np.percentile(image, (1, 99)) if count > 1 else (0, 250)
    for k in range(count):
        expected = np.clip((grey[k] - low) / max(high - low, 1) * 255, 0, 255)
        assert abs(float(np.median(tile(shown, k))) - expected) < 3


def test_colours_stay_as_they_are():
    image = np.zeros((3, 16, 32, 2), np.uint8)
    image[:, :, :, 0], image[:, :, :, 1] = (
        np.array([200, 30, 60])[:, None, None],
        np.array([10, 250, 120])[:, None, None],
    )
    shown = case_slices(image, {})
    assert sheet(shown).mode == "RGB"
    for k in range(2):
        np.testing.assert_allclose(tile(shown, k)[8:24, 4:12].mean((0, 1)), image[:, 0, 0, k], atol=4)


def test_slices_are_turned_and_stretched_like_those_of_the_figure():
    affine = np.diag([2.0, 1.0, 5.0, 1.0])  # RAS: x and y run to the right and up on the screen's left and bottom
    image, classes = np.zeros((10, 30, 3)), np.zeros((10, 30, 3), np.uint8)
    image[0, 0] = 1
    classes[:2, :5, 1] = 1
    shown = case_slices(image, {"outlines": classes}, affine=affine)
    assert (shown["size"], shown["aspect"], shown["start"]) == ([10, 30], round(20 / 30, 4), 1)
    (corners,) = polygons(only(shown)["paths"]["1"])
    assert (corners.min(0).tolist(), corners.max(0).tolist()) == ([8, 25], [10, 30])
    picture = tile(shown, 0)
    assert picture[-1, -1] > picture[0, 0] + 100
    assert case_slices(image, {}, spacing_mm=(1, 1, 9))["aspect"] == round(10 / 30, 4)


@pytest.mark.parametrize(("truth", "prediction", "start"), [(3, 6, 3), (None, 6, 6), (None, None, 4)])
def test_starts_at_the_largest_object(truth, prediction, start):
    maps = {"truth": np.zeros((9, 9, 8), np.uint8), "prediction": np.zeros((9, 9, 8), np.uint8)}
    for (name, k), size in zip({"truth": truth, "prediction": prediction}.items(), (3, 8), strict=True):
        if k is not None:
            maps[name][:size, :size, k] = 1
            maps[name][:2, :2, 1] = 1
    shown = case_slices(np.zeros((9, 9, 8)), maps)
    assert shown["start"] == start
    assert [bool(overlay["classes"]) for overlay in shown["overlays"]] == [truth is not None, prediction is not None]


@pytest.mark.parametrize("most_bytes", [30_000, 120_000, 1_000_000])
@pytest.mark.parametrize("noisy", [False, True])
def test_size(noisy, most_bytes):
    """Pictures and outlines become coarser, and no slice is lost."""
    generator = np.random.default_rng(0)
    image = generator.random((60, 50, 40), np.float32)
    classes = generator.integers(0, 3, image.shape, np.uint8) if noisy else np.zeros(image.shape, np.uint8)
    classes[10:40, 10:40, 5:35] = 1
    classes[15:25, 15:25, 5:35] = 0
    shown = case_slices(image, {"outlines": classes}, most_bytes=most_bytes)
    assert len(json.dumps(shown)) <= most_bytes
    assert set(only(shown)["paths"] if not noisy else shown["overlays"][0]["classes"][0]["paths"]) >= set(
        map(str, range(5, 35))
    )
    assert tile(shown, 39).shape[0] >= 8
    if not noisy:
        np.testing.assert_array_equal(filled(only(shown)["paths"]["5"], 60, 50), classes[..., 5].T > 0)
    for path in (p for one in shown["overlays"][0]["classes"] for p in one["paths"].values()):
        for corners in polygons(path):
            assert corners.min() >= 0
            assert (corners.max(0) <= (60, 50)).all()


@pytest.mark.parametrize(
    ("cases", "share"), [(0, 1000_000), (1, 1000_000), (48, 500_000), (200, 120_000), (9999, 30_000)]
)
def test_share_of_a_page(cases, share):
    assert share_of_page(24_000_000, cases, 1_000_000) == share


@pytest.mark.parametrize(
    ("shape", "maps", "options", "message"),
    [
        ((4, 5), {"outlines": np.zeros((5, 4))}, {}, r"got image \(4, 5\), outlines \(5, 4\)"),
        ((4, 5, 6), {"outlines": np.full((4, 5, 6), 0.5)}, {}, "outlines must contain whole class numbers"),
        ((4, 5), {"cells": np.full((4, 5), -1)}, {}, "cells must be a label image"),
        ((4, 5, 6), {}, {"spacing_mm": (1, 0, 1)}, "spacing_mm must be 3 positive numbers"),
        ((4, 5, 6), {}, {"slice_axis": 3}, "slice_axis must be from -3 to 2, got 3"),
    ],
)
def test_case_slices_refuses(shape, maps, options, message):
    with pytest.raises(ValueError, match=message):
        case_slices(np.zeros(shape), maps, **options)
