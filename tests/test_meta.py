"""What travels with an image, and that one module alone knows its names."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch, list_data_collate

from segbundles import meta
from segbundles.data.loader import _collate
from segbundles.meta import (
    add_note,
    batch_notes,
    box_of,
    file_name,
    files_of,
    has_spacing,
    image_meta,
    join_notes,
    notes_of,
    pixel_nm,
    pixel_sizes_nm,
    set_box,
    set_has_spacing,
    set_notes,
    set_pixel_sizes_nm,
    set_slice_files,
    slice_files,
    spacing_of,
)

LIBRARY = Path(meta.__file__).parent


def image(**more: object) -> MetaTensor:
    return MetaTensor(torch.zeros(1, 2, 2, 2), affine=np.diag([2.0, 3.0, 4.0, 1.0]), meta=more)


def test_an_image_without_metadata() -> None:
    plain = torch.zeros(1, 2, 2)
    assert (file_name(plain), files_of(plain), slice_files(plain), notes_of(plain)) == ("image", ["image"], [], "")
    assert (spacing_of(plain), has_spacing(plain), box_of(plain)) == ((1.0, 1.0), True, None)
    assert file_name(plain, "?") == "?"


def test_files_and_spacing() -> None:
    one = image(filename_or_obj="a/b.nii")
    assert (files_of(one), spacing_of(one)) == (["a/b.nii"], (2.0, 3.0, 4.0))
    set_slice_files(one.meta, [Path("a/1.png"), "a/2.png"])
    set_has_spacing(one, False)
    assert (files_of(one), file_name(one), has_spacing(one)) == (["a/1.png", "a/2.png"], "a/b.nii", False)
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    made = image_meta(affine, (5, 6, 7))
    affine[0, 0] = 9
    assert made["original_affine"][0, 0] == 2
    assert tuple(made["spatial_shape"]) == (5, 6, 7)
    assert np.isnan(made["original_channel_dim"])
    assert image_meta(affine, (5, 6), channels_last=True)["original_channel_dim"] == -1


def test_notes_are_joined_each_once() -> None:
    assert join_notes("a; b", None, "", "b; c") == "a; b; c"
    one, other = image(), image()
    add_note(one, "", "")
    assert "notes" not in one.meta
    add_note(one, "cropped")
    add_note(one, "cropped", "resampled")
    add_note(other, "empty")
    assert notes_of(one, other, torch.zeros(1)) == "cropped; resampled; empty"


def test_what_travels_survives_a_batch() -> None:
    items = [image(filename_or_obj=f"{k}.nii") for k in range(2)]
    set_slice_files(items[0].meta, ["0a", "0b"])
    set_slice_files(items[1].meta, ["1a"])
    batch = list_data_collate(items)
    assert batch_notes(batch, 2) == ["", ""]
    set_notes(batch, ["a", ""])
    set_box(batch, [[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]])
    assert batch_notes(batch, 2) == ["a", ""]
    first, second = decollate_batch(batch)
    assert [(files_of(one), notes_of(one)) for one in (first, second)] == [(["0a", "0b"], "a"), (["1a"], "")]
    assert box_of(second) == ([3, 4, 5], [9, 10, 11])
    assert batch_notes({"notes": "all"}, 2) == ["all", "all"]


def test_pixel_sizes_survive_a_batch_in_which_others_have_none() -> None:
    items = [{"image": image(filename_or_obj=f"{k}.tif")} for k in range(2)]
    set_pixel_sizes_nm(items[0]["image"], (4, 4.03, 50))
    set_pixel_sizes_nm(items[1]["image"], None)
    assert "pixel_sizes_nm" not in items[1]["image"].meta
    first, second = decollate_batch(_collate(items))
    assert pixel_sizes_nm(first["image"]) == (4, 4.03, 50)
    assert pixel_nm(first["image"]) == pytest.approx(4.015)
    assert (pixel_sizes_nm(second["image"]), pixel_nm(second["image"]), pixel_nm(torch.zeros(1))) == (None, None, None)
    set_pixel_sizes_nm(second["image"], (4, 5, 0))
    assert (pixel_sizes_nm(second["image"]), pixel_nm(second["image"])) == ((4, 5, 0), None)
    assert notes_of(second["image"]) == "pixels of 4 x 5 nm are not square: their size is not used"


@pytest.mark.parametrize("name", ["filename_or_obj", "has_spacing", "pixel_sizes_nm", "box_start", "box_end"])
def test_no_other_module_writes_these_names(name: str) -> None:
    found = [path.name for path in LIBRARY.rglob("*.py") if re.search(rf"[\"']{name}[\"']", path.read_text())]
    assert found == ["meta.py"]
