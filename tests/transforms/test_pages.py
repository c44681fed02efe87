from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from segbundles.transforms import SelectPaged


def stack(pages, name="d/a.tif"):
    """(1, 2, 3, pages), page k filled with k."""
    data = torch.arange(pages, dtype=torch.float32).expand(1, 2, 3, pages).clone()
    return MetaTensor(data, meta={"filename_or_obj": name})


@pytest.mark.parametrize("page", [0, 2, 4])
def test_the_page_that_the_case_names_is_kept_and_nothing_else_in_memory(page):
    data = {"image": stack(5), "label": stack(5, "d/b.tif").as_tensor(), "page": page, "case": "x"}
    out = SelectPaged(["image", "label"])(data)
    for key in ("image", "label"):
        assert out[key].shape == (1, 2, 3, 1)
        assert out[key].unique().tolist() == [page]
        assert out[key].untyped_storage().nbytes() == 6 * 4
    assert out["image"].meta["filename_or_obj"] == "d/a.tif"
    assert (out["case"], out["page"]) == ("x", page)
    assert data["image"].shape[-1] == 5


@pytest.mark.parametrize("record", [{}, {"page": None}])
def test_without_a_page_the_stack_stays_whole(record):
    given = stack(3)
    assert SelectPaged("image")({"image": given, **record})["image"] is given


def test_another_entry_may_name_the_page():
    assert SelectPaged("image", page_key="z")({"image": stack(3), "z": 1, "page": 2})["image"].unique().tolist() == [1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"image": stack(3), "page": 3}, r"d/a\.tif has 3 pages, the datalist asks for page 3: they count from 0"),
        ({"image": stack(3), "page": -1}, r"has 3 pages, the datalist asks for page -1"),
        ({"image": stack(3), "page": "1"}, r"asks for page '1'"),
        ({"image": stack(3), "page": True}, r"asks for page True"),
        (
            {"image": stack(3), "label": stack(2, "d/b.tif"), "page": 0},
            r"d/b\.tif has 2 pages, d/a\.tif has 3: a page a section is due in both",
        ),
        (
            {"image": stack(3)[..., 0], "page": 0},
            r"d/a\.tif has shape \(1, 2, 3\) where \(channels, W, H, pages\) is due",
        ),
    ],
)
def test_pages_that_are_not_there(data, message):
    with pytest.raises(ValueError, match=message):
        SelectPaged(["image", "label"], allow_missing_keys=True)(data)
