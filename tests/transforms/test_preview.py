from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientationd

from segbundles.report import case_slices
from segbundles.transforms import Previewd

AFFINE = torch.diag(torch.tensor([2.0, 1.0, 5.0, 1.0], dtype=torch.float64))


def item(channels=1, spatial=(6, 5, 4), dtype=torch.float32):
    image = torch.arange(channels, dtype=dtype).reshape(-1, *[1] * len(spatial)).expand(-1, *spatial)
    pred = torch.zeros(1, *spatial, dtype=torch.uint8)
    pred[0, 2:4, 1:3] = 1
    return {"image": MetaTensor(image.clone(), affine=AFFINE, meta={"filename_or_obj": "a.nrrd"}), "pred": pred}


@pytest.mark.parametrize(
    ("channels", "channel", "shown"),
    [(1, None, 0), (2, None, 0), (3, None, None), (3, 2, 2), (9, 4, 4), (9, -1, 8), (9, -9, 0)],
)
def test_channel(channels, channel, shown):
    given = item(channels)
    made = Previewd(channel=channel)(given)
    preview = made["preview"]
    expected = given["image"] if shown is None else given["image"][shown]
    np.testing.assert_array_equal(preview["image"], expected.numpy())
    np.testing.assert_array_equal(preview["overlays"]["outlines"], given["pred"][0].numpy())
    assert list(preview["overlays"]) == ["outlines"]
    assert preview["spacing_mm"] == (2, 1, 5)
    np.testing.assert_array_equal(preview["affine"], AFFINE.numpy())
    assert {key: made[key] for key in given} == given
    assert case_slices(**preview)["aspect"] == round(12 / 5, 4)


@pytest.mark.parametrize(("label_keys", "cells_keys"), [(None, "cells"), ("pred", "cells"), (None, None)])
def test_cells(label_keys, cells_keys):
    given = item(spatial=(6, 5, 1))
    given["cells"] = 7 * given["pred"].to(torch.int32)
    shown = case_slices(**Previewd("image", label_keys, cells_keys)(given)["preview"])
    expected = [("outlines", "solid")] * bool(label_keys) + [("cells", "filled")] * bool(cells_keys)
    assert [(overlay["name"], overlay["style"]) for overlay in shown["overlays"]] == expected


@pytest.mark.parametrize("meta", [False, True])
def test_2d_colours(meta):
    given = item(3, (6, 5), torch.uint8)
    if not meta:
        given["image"] = given["image"].as_tensor()
    preview = Previewd()(given)["preview"]
    assert (preview["image"].shape, preview["image"].dtype, preview["affine"]) == ((3, 6, 5), np.uint8, None)
    shown = case_slices(**preview)
    assert (shown["size"], shown["slices"], shown["aspect"]) == ([6, 5], 1, 2.4 if meta else 1.2)


def test_slice_axis_and_what_is_not_there():
    assert case_slices(**Previewd(slice_axis=0)(item())["preview"])["slices"] == 6
    assert "preview" not in Previewd("other", allow_missing_keys=True)(item())
    with pytest.raises(KeyError):
        Previewd("other")(item())
    with pytest.raises(ValueError, match=r"^channel is -4, but a\.nrrd has 3: count from 0, or give None\.$"):
        Previewd(channel=-4)(item(3))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "RAI", "LPI"])
def test_slices_are_in_the_order_of_the_file(codes):
    values = torch.arange(4.0).expand(1, 6, 5, 4).clone()
    for axcodes in ("RAS", "LPS"):
        affine = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), (6, 5, 4))
        image = MetaTensor(values, affine=torch.as_tensor(affine), meta={"original_affine": affine})
        turned = Orientationd("image", axcodes=axcodes, labels=None)({"image": image})
        preview = Previewd()({**turned, "pred": turned["image"]})["preview"]
        assert preview["image"][0, 0].tolist() == preview["overlays"]["outlines"][0, 0].tolist() == [0, 1, 2, 3]
