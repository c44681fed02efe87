from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from monai.transforms import Compose, EnsureChannelFirstd
from PIL import Image

from segbundles.transforms import LoadPaged

SIZE = (3, 2)  # rows, columns


def write(path: Path, pages: int = 5) -> str:
    """Pages of SIZE, page k filled with k."""
    data = np.arange(pages, dtype=np.uint8)[:, None, None].repeat(3, 1).repeat(2, 2)
    tifffile.imwrite(path, data, photometric="minisblack", compression="zlib")
    return str(path)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the pages that were decoded."""
    found: list[int] = []
    decode = tifffile.TiffPage.asarray

    def asarray(page: tifffile.TiffPage, *args: object, **kwargs: object) -> np.ndarray:
        found.append(page.index)
        return decode(page, *args, **kwargs)

    monkeypatch.setattr(tifffile.TiffPage, "asarray", asarray)
    return found


@pytest.mark.parametrize("page", [0, 2, 4])
def test_only_the_page_that_the_case_names_is_read(page: int, tmp_path: Path, decoded: list[int]) -> None:
    data = {"image": write(tmp_path / "a.tif"), "label": write(tmp_path / "b.tif"), "page": page, "case": "x"}
    out = Compose([LoadPaged(["image", "label"]), EnsureChannelFirstd(["image", "label"])])(data)
    assert decoded == [page, page]
    for key in ("image", "label"):
        assert out[key].shape == (1, 2, 3, 1)
        assert out[key].unique().tolist() == [page]
        assert out[key].meta["filename_or_obj"] == data[key]
        np.testing.assert_array_equal(out[key].affine, np.diag([-1.0, -1, 1, 1]))
    assert (out["case"], out["page"]) == ("x", page)


@pytest.mark.parametrize("record", [{}, {"page": None}])
def test_without_a_page_the_stack_is_read_whole(record: dict, tmp_path: Path, decoded: list[int]) -> None:
    out = LoadPaged("image")({"image": write(tmp_path / "a.tif"), **record})["image"]
    assert out.shape == (2, 3, 5)
    assert out[0, 0].tolist() == decoded == [0, 1, 2, 3, 4]


def test_another_entry_may_name_the_page(tmp_path: Path) -> None:
    data = {"image": write(tmp_path / "a.tif"), "z": 1, "page": 2}
    assert LoadPaged("image", page_key="z")(data)["image"].unique().tolist() == [1]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (3, "cannot read {0}/a.tif: it has 3 pages, so there is no page 3: pages count from 0."),
        (-1, "cannot read {0}/a.tif: it has 3 pages, so there is no page -1"),
        ("1", "cannot read {0}/a.tif: it has 3 pages, so there is no page '1'"),
        (True, "cannot read {0}/a.tif: it has 3 pages, so there is no page True"),
        (0, "{0}/b.tif has 2 pages but {0}/a.tif has 3: both must have one per section."),
    ],
)
def test_missing_pages(page: object, message: str, tmp_path: Path) -> None:
    data = {"image": write(tmp_path / "a.tif", 3), "label": write(tmp_path / "b.tif", 2), "page": page}
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(tmp_path))}"):
        LoadPaged(["image", "label"])(data)


def test_only_a_single_tiff_has_pages(tmp_path: Path) -> None:
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / "a.png")
    message = f"{tmp_path}/a.png has no page 0: only a single TIFF has pages; leave out the page."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        LoadPaged("image")({"image": str(tmp_path / "a.png"), "page": 0})
