from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from segbundles.meta import file_name, has_spacing, notes_of, spacing_of
from segbundles.transforms import CheckImaged, LabelToClassd, SetSpacingd

OBLIQUE = np.array([[0.6, -0.8 * 2, 0, 10], [0.8, 0.6 * 2, 0, -20], [0, 0, -3, 5], [0, 0, 0, 1]])


def image(*shape, name="p/img.nrrd", affine=None, fill=None, dtype=torch.float32):
    data = torch.arange(int(np.prod(shape))).reshape(shape).to(dtype) if fill is None else torch.full(shape, fill)
    affine = np.eye(4) if affine is None else affine
    return MetaTensor(data, affine=torch.as_tensor(affine), meta={"filename_or_obj": name})


def spoilt(value):
    volume = image(1, 4, 4, 4)
    volume[0, 1, 2, 3] = value
    return volume


@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.as_tensor()], ids=["MetaTensor", "tensor"])
def test_good_pairs_pass_as_they_are(make):
    data = {"image": make(image(1, 4, 5, 6, affine=OBLIQUE)), "label": make(image(1, 4, 5, 6, affine=OBLIQUE)), "x": 1}
    out = CheckImaged(["image", "label"])(data)
    assert out == data
    assert out["image"] is data["image"]


@pytest.mark.parametrize(
    ("arguments", "volume", "message"),
    [
        ({}, image(1, 4, 4), r"p/img\.nrrd has 2 axes \(4, 4\) but must have 3: give a volume, not one slice"),
        ({}, image(1, 4, 4, 4, 2), r"p/img\.nrrd has 4 axes \(4, 4, 4, 2\) but must have 3: give one image per file"),
        ({"spatial_dims": 2}, image(1, 4, 4, 4), r"p/img\.nrrd has 3 axes \(4, 4, 4\) but must have 2"),
        (
            {},
            image(2, 4, 4, 4),
            r"p/img\.nrrd has 2 channel\(s\) but must have 1: convert colour to grey, or save each",
        ),
        (
            {"spatial_dims": 2, "channels": 3},
            image(1, 4, 4),
            r"has 1 channel\(s\) but must have 3: give an image with 3",
        ),
        ({}, spoilt(float("nan")), r"p/img\.nrrd contains NaN or infinite values: correct it, or leave it out"),
        ({}, spoilt(float("-inf")), r"p/img\.nrrd contains NaN or infinite values"),
        ({}, image(1, 4, 4, 4, fill=7.0), r"p/img\.nrrd is constant \(every value is 7\): leave it out"),
        ({}, image(1, 4, 4, 4, fill=3), r"p/img\.nrrd is constant \(every value is 3\)"),
        ({}, image(1, 4, 0, 4), r"p/img\.nrrd is empty: its size is \(4, 0, 4\)"),
        ({}, torch.zeros(1, 4, 4), r"^image has 2 axes"),
    ],
)
def test_bad_images(arguments, volume, message, caplog):
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match=message):
        CheckImaged("image", **arguments)({"image": volume})
    assert len(caplog.records) == 1


def test_an_image_of_two_grey_levels_may_be_a_label():
    mask, grey = image(1, 4, 4, 4, fill=0.0), image(1, 4, 4, 4)
    mask[0, 1] = 255
    for given in (mask, grey, image(1, 4, 4, 4, fill=1.0)):
        CheckImaged(["image", "label"], allow_constant=True)({"image": given, "label": mask.clone()})
        assert notes_of(given) == ("only two grey levels: is this a label?" if given is mask else "")


def test_any_channels_constants_and_missing_keys_where_asked_for():
    check = CheckImaged(["image", "label"], channels=None, allow_constant=True, allow_missing_keys=True)
    check({"image": image(5, 4, 4, 4, fill=1.0)})
    with pytest.raises(KeyError, match="label"):
        CheckImaged(["image", "label"])({"image": image(1, 4, 4, 4)})


@pytest.mark.parametrize(
    ("spacing", "settings", "noted"),
    [((1, 1, 1), {}, True), ((1, 1, 2), {}, False), ((1, 1, 1), {"spacing_mm": 1.0}, False), ((1, 1), {}, False)],
)
def test_a_voxel_size_that_programs_write_without_knowing_it_is_noted(spacing, settings, noted):
    """The spacing of the settings, or of the case, counts as known."""
    given = image(1, *(4 for _ in spacing), affine=np.diag([*spacing, *[1] * (4 - len(spacing))]))
    out = SetSpacingd("image", **settings)({"image": given})
    note = "voxel size 1 x 1 x 1 mm, as headers without one say: give spacing_mm if it is wrong"
    assert notes_of(out["image"]) == (note if noted else "")


def test_an_empty_label_is_accepted():
    CheckImaged(["image", "label"])({"image": image(1, 4, 4, 4), "label": image(1, 4, 4, 4, fill=0)})


@pytest.mark.parametrize(
    ("change", "millimetres"),
    [
        (lambda a: a, None),
        (lambda a: a + np.eye(4, k=3) * 5e-4, None),  # less than a thousandth of a voxel
        (lambda a: a + np.eye(4, k=3) * 0.5, "0.5"),
        (lambda a: a @ np.diag([1, 1, 2, 1]), "15"),  # 5 steps of 3 mm more at the far end
        (lambda a: a @ np.diag([-1, 1, 1, 1]), "6"),  # flipped: 2 x 3 steps of 1 mm
        (lambda a: np.eye(4), r"26\.9"),  # at (0, 0, 5): (10, -20, -10) and (0, 0, 5)
    ],
)
def test_geometry_of_the_label(change, millimetres):
    data = {"image": image(1, 4, 5, 6, affine=OBLIQUE)}
    data["label"] = image(1, 4, 5, 6, name="p/lab.nrrd", affine=change(OBLIQUE))
    check = CheckImaged(["image", "label"])
    if millimetres is None:
        check(data)
        return
    with pytest.raises(
        ValueError, match=rf"p/lab\.nrrd is up to {millimetres} mm away from its image p/img\.nrrd: their"
    ):
        check(data)


def test_size_of_the_label():
    data = {"image": image(1, 4, 5, 6), "label": image(1, 4, 6, 5, name="p/lab.nrrd")}
    with pytest.raises(ValueError, match=r"p/lab\.nrrd has size \(4, 6, 5\) but its image p/img\.nrrd has \(4, 5, 6\)"):
        CheckImaged(["image", "label"])(data)


@pytest.mark.parametrize("sizes", [(4, 4), (3, 4), (4, 3), (3, 3)])
def test_geometry_in_2d_with_affines_of_either_size(sizes):
    """The affines of 2D images come as (3, 3) or (4, 4), whatever the reader."""

    def picture(size, shift):
        affine = np.eye(size)
        affine[0, -1] = shift
        return image(1, 4, 4, affine=affine)

    check = CheckImaged(["image", "label"], spatial_dims=2)
    check({"image": picture(sizes[0], 2), "label": picture(sizes[1], 2)})
    with pytest.raises(ValueError, match="is up to 2 mm away from"):
        check({"image": picture(sizes[0], 2), "label": picture(sizes[1], 0)})


@pytest.mark.parametrize(
    ("argument", "record", "expected"),
    [
        (None, None, (1, 2, 3)),
        (None, [0.7, 0.7, 0.1], (0.7, 0.7, 0.1)),
        ([0.1, 0.2, 0.3], [9, 9, 9], (0.1, 0.2, 0.3)),
        (0.625, None, (0.625, 0.625, 0.625)),
        ((0.3,), None, (0.3, 0.3, 0.3)),
    ],
)
def test_set_spacing(argument, record, expected):
    data = {"image": image(1, 4, 4, 4, affine=OBLIQUE), "label": image(1, 4, 4, 4, affine=OBLIQUE)}
    data["image"].meta["original_affine"] = OBLIQUE
    if record:
        data["spacing_mm"] = record
    out = SetSpacingd(["image", "label"], argument)(data)
    for key in ("image", "label"):
        np.testing.assert_allclose(spacing_of(out[key]), expected, rtol=1e-12)
        affine = out[key].affine.numpy()
        np.testing.assert_allclose(affine[:3, :3] / expected, OBLIQUE[:3, :3] / [1, 2, 3], rtol=0, atol=1e-12)
        np.testing.assert_array_equal(affine[:3, 3], OBLIQUE[:3, 3])
    np.testing.assert_array_equal(out["image"].meta["original_affine"], OBLIQUE)
    np.testing.assert_array_equal(data["image"].data, out["image"].data)


@pytest.mark.parametrize(("argument", "expected"), [(None, False), (0.625, True)])
def test_set_spacing_makes_it_known(argument, expected):
    given = image(1, 4, 4, 4)
    given.meta["has_spacing"] = False
    assert has_spacing(SetSpacingd("image", argument)({"image": given})["image"]) is expected


def test_set_spacing_of_a_plain_tensor_and_in_2d():
    out = SetSpacingd("image", [0.5, 2.0, 3.0])({"image": torch.zeros(1, 2, 2, 2)})
    assert spacing_of(out["image"]) == (0.5, 2.0, 3.0)
    out = SetSpacingd("image", [0.5, 2.0])({"image": image(1, 4, 4)})
    assert spacing_of(out["image"]) == (0.5, 2.0)


@pytest.mark.parametrize("spacing", [[1, 1], [1, 1, 0], [1, 1, -1], ["a", 1, 1], "abc", [1, 1, None], [1, 1, np.nan]])
def test_set_spacing_refuses(spacing):
    with pytest.raises(ValueError, match=r"spacing_mm must be 3 positive numbers \(mm per axis\), got"):
        SetSpacingd("image", spacing)({"image": image(1, 2, 2, 2)})


def label(*values, dtype=torch.float32):
    return MetaTensor(
        torch.tensor(values, dtype=dtype).reshape(1, -1, 1, 1),
        affine=torch.eye(4) * 2,
        meta={"filename_or_obj": "p/lab.nrrd"},
    )


@pytest.mark.parametrize(
    ("arguments", "values", "expected"),
    [
        ({}, (0, 1, 1), (0, 1, 1)),
        ({}, (0, 255, 0), (0, 1, 0)),
        ({}, (255, 255), (1, 1)),
        ({}, (0, 0), (0, 0)),
        ({"num_classes": 3}, (2, 1, 0), (2, 1, 0)),
        ({"num_classes": 3, "values": [0, 128, 255]}, (255, 0, 128), (2, 0, 1)),
        ({"values": [255, 0]}, (255, 0), (0, 1)),  # membranes: 0 is the object
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int16])
@pytest.mark.parametrize("plain", [False, True])
def test_label_to_class(arguments, values, expected, dtype, plain):
    given = label(*values, dtype=dtype)
    out = LabelToClassd("label", **arguments)({"label": given.as_tensor() if plain else given, "other": 1})
    assert out["label"].dtype == torch.uint8
    assert out["label"].flatten().tolist() == list(expected)
    assert isinstance(out["label"], MetaTensor) is not plain
    if not plain:
        assert file_name(out["label"]) == "p/lab.nrrd"
        assert spacing_of(out["label"]) == (2, 2, 2)
    assert given.flatten().tolist() == list(values)


@pytest.mark.parametrize(
    ("arguments", "values", "message"),
    [
        (
            {},
            (0, 1, 2),
            r"p/lab\.nrrd contains the label values 2; allowed are 0, 1: correct the file, or",
        ),
        ({}, (0, 1, 255), r"label values 1; allowed are 0, 255"),
        ({}, (0, 0.5, 1), r"label values 0\.5; allowed are 0, 1"),
        ({"num_classes": 3}, (0, 3, 4, 5, 6, 7, 8, -1), r"label values -1, 3, 4, 5, 6; allowed are 0, 1, 2"),
        ({"values": [0, 255]}, (0, 1), r"label values 1; allowed are 0, 255"),
        ({}, (0, float("nan")), r"label values nan"),
        ({}, (0, 0.9989), r"label values 0\.9989; allowed are 0, 1"),
    ],
)
def test_label_values_outside_the_set(arguments, values, message):
    with pytest.raises(ValueError, match=message):
        LabelToClassd("label", **arguments)({"label": label(*values)})


@pytest.mark.parametrize("given", [None, [0, 255]])
def test_a_case_may_have_label_values_of_its_own(given):
    """Such as membrane 255 instead of 0: the datalist takes precedence over the config."""
    convert = LabelToClassd("label", values=given)
    out = convert({"label": label(0, 255, 0, dtype=torch.uint8), "label_values": [255, 0]})["label"]
    assert out.flatten().tolist() == [1, 0, 1]
    assert convert({"label": label(0, 255, 0, dtype=torch.uint8)})["label"].flatten().tolist() == [0, 1, 0]
    other = LabelToClassd("label", record_key="stored")
    assert other({"label": label(7, 9), "stored": [9, 7]})["label"].flatten().tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"label_values must be 2 stored values, one per class, got \[255\]"):
        convert({"label": label(0, 1), "label_values": [255]})


def test_label_arguments_and_channels():
    with pytest.raises(ValueError, match=r"values must be 3 stored values, one per class, got \[0, 255\]"):
        LabelToClassd("label", num_classes=3, values=[0, 255])
    with pytest.raises(ValueError, match=r"p/lab\.nrrd has 3 channels but a label must have one"):
        LabelToClassd("label")({"label": image(3, 4, 4, name="p/lab.nrrd")})


@pytest.mark.parametrize(("one", "expected"), [(0.99999, [0, 1]), (255 * 0.99999, [0, 1])])
def test_label_that_a_file_scales(one, expected):
    assert LabelToClassd("label")({"label": label(0.0001, one)})["label"].flatten().tolist() == expected


@pytest.mark.parametrize(
    ("values", "colour", "expected"),
    [(None, (128, 0, 0), [0, 1]), ([0, 255], (9, 9, 9), [0, 1]), ([255, 0], (0, 255, 0), [1, 0])],
)
def test_label_of_black_and_one_other_colour(values, colour, expected):
    given = image(3, 2, 1, 1, name="p/lab.png", fill=0.0)
    given[:, 1, 0, 0] = torch.tensor(colour, dtype=torch.float32)
    out = LabelToClassd("label", values=values)({"label": given})["label"]
    assert out.shape == (1, 2, 1, 1)
    assert out.flatten().tolist() == expected
    assert file_name(out) == "p/lab.png"
    with pytest.raises(ValueError, match=r"p/lab\.png has 3 channels but a label must have one: save it as class ind"):
        LabelToClassd("label", num_classes=3)({"label": given})
    given[:, 0] = torch.tensor(colour).reshape(3, 1, 1) // 2
    with pytest.raises(ValueError, match="must have one, or three with black and one other colour: save it as class"):
        LabelToClassd("label", values=values)({"label": given})


def test_in_a_monai_compose_the_message_is_the_root_cause():
    with pytest.raises(RuntimeError) as caught:
        Compose([CheckImaged("image")])({"image": image(1, 4, 4)})
    assert isinstance(caught.value.__cause__, ValueError)
    assert "must have 3" in str(caught.value.__cause__)
