from __future__ import annotations

import io

import numpy as np
import pytest
from monai.data import MetaTensor
from PIL import Image

from segbundles.report import PREDICTION_COLOURS, TRUTH_COLOURS, case_figure, choose_slices, overlay_rgb

CAPTION = 54  # height of a panel's caption in pixels
PANEL, GAP = 376, 8


def rectangle(shape, rows, columns, value=1):
    label = np.zeros(shape, np.uint8)
    label[rows[0] : rows[1], columns[0] : columns[1]] = value
    return label


def is_colour(picture, colour):
    return (picture == np.array(colour)).all(axis=-1)


def decode(figure: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(figure)).convert("RGB")).astype(int)


# rows 4-9 and columns 10-24 of 20 x 32, enlarged 12 times: edges at y = 48 and 120, x = 120 and 300
LABEL = rectangle((20, 32), (4, 10), (10, 25))
BLACK = np.zeros((20, 32), np.uint8)


def test_truth_is_a_solid_line_along_the_pixel_edges():
    picture = overlay_rgb(BLACK, LABEL)
    assert picture.shape == (240, 384, 3)
    assert picture.dtype == np.uint8
    blue = is_colour(picture, TRUTH_COLOURS[0])
    assert blue[60:108, [119, 120, 299, 300]].all()
    assert blue[[47, 48, 119, 120], 132:288].all()
    rows, columns = np.nonzero(picture.any(axis=-1))
    extent = (rows.min(), rows.max(), columns.min(), columns.max())
    assert extent == pytest.approx((46, 121, 118, 301), abs=1)  # half the line and its rim
    assert not picture[52:116, 124:296].any()


def test_prediction_is_dashed_in_another_colour():
    picture = overlay_rgb(BLACK, None, LABEL)
    orange = is_colour(picture, PREDICTION_COLOURS[0])
    assert 0.3 < orange[47, 132:288].mean() < 0.7
    assert np.diff(orange[47, 132:288].astype(int)).clip(0).sum() == pytest.approx(156 / 12, abs=1)
    assert not is_colour(picture, TRUTH_COLOURS[0]).any()


def test_both_show_where_they_coincide():
    picture = overlay_rgb(BLACK, LABEL, LABEL)
    assert is_colour(picture, TRUTH_COLOURS[0])[47, 132:288].mean() > 0.15
    assert is_colour(picture, PREDICTION_COLOURS[0])[47, 132:288].mean() > 0.3


def test_outline_shows_on_a_background_of_its_own_colour():
    background = np.broadcast_to(np.array(TRUTH_COLOURS[0], np.uint8), (20, 32, 3))
    beside_the_line = overlay_rgb(background, LABEL)[84, 118].astype(int)
    assert beside_the_line.sum() < sum(TRUTH_COLOURS[0]) - 60


@pytest.mark.parametrize(("value", "place"), [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (6, 0)])
def test_each_class_has_its_pair_of_colours(value, place):
    label = LABEL * value
    assert is_colour(overlay_rgb(BLACK, label), TRUTH_COLOURS[place]).any()
    assert is_colour(overlay_rgb(BLACK, None, label), PREDICTION_COLOURS[place]).any()
    assert len(set(TRUTH_COLOURS + PREDICTION_COLOURS)) == 10


def test_outline_of_a_full_mask_stays_inside_the_picture():
    picture = overlay_rgb(BLACK, np.ones_like(BLACK))
    blue = is_colour(picture, TRUTH_COLOURS[0])
    assert blue[:2, 10:-10].all()
    assert blue[10:-10, -2:].all()


def test_grey_window_is_the_1st_to_99th_percentile():
    ramp = np.linspace(-1000, 1000, 101)[None].repeat(4, axis=0).astype(np.float32)
    ramp[0, 0] = np.nan
    picture = overlay_rgb(ramp, size=(4, 101))
    assert picture[2, 0, 0] == picture[2, 1, 0] == 0
    assert picture[2, 50, 0] == pytest.approx(128, abs=1)
    assert picture[2, 99, 0] == 255


def test_given_window_and_constant_image():
    assert (overlay_rgb(np.full((5, 5), 30), window=(0, 60)) == 128).all()
    assert overlay_rgb(np.full((5, 5), 30)).shape == (385, 385, 3)


def test_uint8_colours_are_shown_as_they_are():
    image = np.full((500, 400, 3), (200, 30, 60), np.uint8)
    picture = overlay_rgb(image)
    np.testing.assert_array_equal(picture, image)


@pytest.mark.parametrize(
    ("image", "truth", "message"),
    [
        (np.zeros((4, 5, 6)), None, r"image must have shape \(H, W\) or \(H, W, 3\), got \(4, 5, 6\)"),
        (np.zeros((4, 5)), np.zeros((5, 4), int), r"truth has shape \(5, 4\) but the image has \(4, 5\)"),
        (np.zeros((4, 5)), np.full((4, 5), 0.5), "truth must contain whole class numbers, got fractions"),
    ],
)
def test_overlay_refuses(image, truth, message):
    with pytest.raises(ValueError, match=message):
        overlay_rgb(image, truth)


def stack(*areas):
    """Label of shape (6, 6, D) with that many pixels in each slice."""
    label = np.zeros((36, len(areas)), np.uint8)
    for k, area in enumerate(areas):
        label[:area, k] = 1
    return label.reshape(6, 6, -1)


@pytest.mark.parametrize(
    ("truth", "prediction", "max_slices", "expected"),
    [
        (
            stack(0, 2, 9, 3, 8, 1, 0),
            stack(1, 2, 8, 3, 2, 1, 0),
            4,
            [
                (0, "first slice of the object (prediction)"),
                (2, "largest truth area"),
                (4, "most errors"),
                (5, "last slice of the object (truth, prediction)"),
            ],
        ),
        (
            stack(0, 2, 9, 3, 8, 1, 0),
            stack(1, 2, 8, 3, 2, 1, 0),
            2,
            [(2, "largest truth area"), (4, "most errors")],
        ),
        (stack(0, 2, 9, 3, 8, 1, 0), stack(1, 2, 8, 3, 2, 1, 0), 1, [(4, "most errors")]),
        # 18 slices of object: within 3 slices of each other, worst and largest are one panel; a further one is added
        (
            stack(*[5] * 5, 9, 9, *[5] * 11),
            stack(*[5] * 5, 9, 4, *[5] * 7, 3, 5, 5, 5),
            4,
            [
                (0, "first slice of the object (truth, prediction)"),
                (6, "most errors, near the largest truth area"),
                (14, "many errors"),
                (17, "last slice of the object (truth, prediction)"),
            ],
        ),
        # a missed case, and no prediction at all
        (
            stack(0, 4, 0),
            stack(0, 0, 0),
            4,
            [(1, "largest truth area, most errors, first slice, last slice")],
        ),
        (stack(0, 4, 0), None, 4, [(1, "largest truth area, first slice, last slice")]),
        # an empty truth, and none
        (
            stack(0, 0, 0, 0),
            stack(0, 4, 5, 0),
            4,
            [
                (1, "first slice of the object (prediction)"),
                (2, "largest prediction area, most errors, last slice"),
            ],
        ),
        (None, stack(0, 4, 0), 4, [(1, "largest prediction area, first slice, last slice")]),
        (stack(0, 0, 0), stack(0, 0, 0), 4, [(1, "middle slice, nothing to outline")]),
    ],
)
def test_slices_are_chosen_as_documented(truth, prediction, max_slices, expected):
    assert choose_slices(truth, prediction, max_slices) == expected


def test_choose_slices_refuses():
    with pytest.raises(ValueError, match="max_slices must be at least 1, got 0"):
        choose_slices(stack(1), None, 0)
    with pytest.raises(ValueError, match="truth and prediction are both None"):
        choose_slices(None, None)


def bright_corner():
    """Volume of shape (40, 20, 5), bright where x is low and y is high."""
    volume = np.zeros((40, 20, 5), np.uint8)
    volume[:20, 10:] = 200
    return volume


def corners(figure: bytes) -> list[bool]:
    """Whether the first panel is bright at top left, top right, bottom left and bottom right."""
    picture = decode(figure)[CAPTION:, :PANEL].mean(axis=-1)
    y, x = picture.shape[0] // 4, PANEL // 4
    return [bool(picture[j, i] > 100) for j in (y, 3 * y) for i in (x, 3 * x)]


def test_volume_is_transposed_so_that_the_second_axis_runs_down():
    figure = case_figure(bright_corner(), None, None)
    assert decode(figure).shape == (CAPTION + PANEL // 2, 2 * PANEL + GAP, 3)
    assert corners(figure) == [False, False, True, False]


@pytest.mark.parametrize(
    ("directions", "expected"),
    [
        ((1, 1, 1), [False, True, False, False]),  # x to the right and y to anterior: both turned
        ((-1, -1, 1), [False, False, True, False]),
        ((-1, 1, 1), [True, False, False, False]),
    ],
)
def test_affine_turns_slices_to_radiological_convention(directions, expected):
    assert corners(case_figure(bright_corner(), None, None, affine=np.diag([*directions, 1.0]))) == expected


def test_affine_exchanges_axes_and_gives_the_spacing():
    # first axis towards posterior at 1 mm, second towards left at 4 mm: shown with posterior down, left to the right
    affine = np.array([[0, -4.0, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    figure = case_figure(bright_corner(), None, None, affine=affine)
    assert decode(figure).shape[0] == CAPTION + PANEL // 2
    assert corners(figure) == [False, True, False, False]


@pytest.mark.parametrize(
    ("spacing", "axis", "height"),
    [
        ((1, 1, 1), -1, PANEL // 2),
        ((1, 2, 9), 2, PANEL),
        ((1, 9, 4), 1, PANEL // 2),  # (x, z): 40 wide, 5 x 4 high
        ((9, 1, 4), 0, PANEL),  # (y, z): 20 wide, 5 x 4 high
    ],
)
def test_aspect_ratio_comes_from_the_spacing(spacing, axis, height):
    figure = decode(case_figure(bright_corner(), None, None, spacing, slice_axis=axis))
    assert figure.shape[0] == CAPTION + height


def bluish(picture):
    """Pixels of the truth's outline, after JPEG."""
    return (picture[..., 2] - picture[..., 0] > 90) & (picture[..., 1] > 120)


def test_small_object_is_cropped_with_the_whole_slice_as_thumbnail():
    volume = np.full((200, 160, 3), 50, np.uint8)
    volume[0, 0] = 255
    truth = np.zeros_like(volume)
    truth[20:40, 100:110, 1] = 1  # x 20-39, y 100-109: crop of 36 x 36, 8 around it
    picture = decode(case_figure(volume, truth, truth))
    panel = picture[CAPTION:, :PANEL]
    rows, columns = np.nonzero(bluish(panel))
    edges = (columns.min(), columns.max(), rows.min(), rows.max())
    assert edges == pytest.approx([k * PANEL / 36 for k in (8, 28, 13, 23)], abs=4)
    assert panel.shape[0] == PANEL
    assert (panel[:2, -100:] > 200).all()  # the thumbnail's white edge, at the top right


def test_large_object_is_not_cropped():
    truth = np.zeros((60, 30, 2), np.uint8)
    truth[5:55, 3:27] = 1
    picture = decode(case_figure(np.full(truth.shape, 50, np.uint8), truth, truth))
    assert picture.shape[0] == 1 * (CAPTION + PANEL // 2)


def test_colour_image_keeps_its_colours_and_enlarges_the_object():
    image = np.zeros((3, 120, 90), np.uint8)
    image[0, :, :45] = 220  # upper half red
    truth = np.zeros((120, 90), np.uint8)
    truth[70:80, 50:60] = 1
    picture = decode(case_figure(image, truth, np.zeros_like(truth)))
    whole, crop = picture[CAPTION:, :PANEL], picture[CAPTION:, PANEL + GAP :]  # the whole is 282 high, 47 from above
    np.testing.assert_allclose(whole[47 + 30, 30], (220, 0, 0), atol=12)
    assert whole[47 + 200, 30].max() < 30
    in_whole, in_crop = (np.ptp(np.nonzero(bluish(x))[1]) for x in (whole, crop))
    assert in_whole == pytest.approx(10 * PANEL / 120, abs=6)
    assert in_crop > 3 * in_whole


def test_image_filled_with_objects_shows_the_window_of_most_errors():
    truth = np.zeros((90, 60), np.uint8)
    truth[:, ::10] = 1
    prediction = truth.copy()
    prediction[70:76, 40:46] = 1 - prediction[70:76, 40:46]
    picture = decode(case_figure(np.zeros_like(truth), truth, prediction))
    whole, window = picture[CAPTION:, :PANEL], picture[CAPTION:, PANEL + GAP :]
    assert not bluish(whole).any()  # outlines would hide the image
    assert (whole[..., :] > 200).all(axis=-1).any()  # the frame
    assert bluish(window).any()


@pytest.mark.parametrize("shape", [(50, 40), (3, 50, 40), (50, 40, 6), (3, 50, 40, 6)])
@pytest.mark.parametrize("given", ["both", "truth", "prediction", "none"])
def test_every_kind_of_image_with_and_without_labels(shape, given):
    generator = np.random.default_rng(0)
    label = np.zeros(shape[1:] if shape[0] == 3 else shape, np.int64)
    label[20:30, 10:20] = 1
    if given == "none" and len(shape) == 4:
        pytest.skip("without labels the image alone tells (3, W, H) from (W, H, D), and four axes are always colour")
    truth = label if given in ("both", "truth") else None
    prediction = label if given in ("both", "prediction") else None
    figure = case_figure(generator.normal(size=shape), truth, prediction)
    assert Image.open(io.BytesIO(figure)).format == "JPEG"


def test_figure_of_noise_stays_small():
    generator = np.random.default_rng(0)
    volume = generator.integers(0, 256, (64, 64, 12), np.uint8)
    truth, prediction = (generator.random((2, *volume.shape)) > 0.6).astype(np.uint8)
    assert len(case_figure(volume, truth, prediction)) <= 68_000


def test_meta_tensor_gives_the_same_as_numpy():
    volume, truth = bright_corner(), np.zeros((40, 20, 5), np.uint8)
    truth[5:20, 5:15, 1:4] = 1
    assert case_figure(MetaTensor(volume), MetaTensor(truth), None) == case_figure(volume, truth, None)


@pytest.mark.parametrize(
    ("shape", "truth_shape", "options", "message"),
    [
        ((1, 8, 8, 8), (8, 8, 8), {}, r"got image \(1, 8, 8, 8\), truth \(8, 8, 8\)"),
        ((8, 8, 8), (8, 8, 9), {}, r"got image \(8, 8, 8\), truth \(8, 8, 9\)"),
        ((8,), None, {}, r"got image \(8,\)"),
        ((8, 8, 8), None, {"spacing_mm": (1, 0, 1)}, r"spacing_mm must be 3 positive numbers, .* got \[1, 0, 1\]"),
        ((8, 8, 8), None, {"slice_axis": 3}, "slice_axis must be from -3 to 2, got 3"),
        ((8, 8, 8), None, {"affine": np.eye(3)}, r"affine must have shape \(4, 4\), got \(3, 3\)"),
    ],
)
def test_case_figure_refuses(shape, truth_shape, options, message):
    truth = None if truth_shape is None else np.zeros(truth_shape, np.uint8)
    with pytest.raises(ValueError, match=message):
        case_figure(np.zeros(shape), truth, None, **options)
