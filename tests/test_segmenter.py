from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_series import write_series
from monai.bundle import create_workflow
from tiny_bundles import AFFINE, TINY_BUNDLES, TinyBundle

from segbundles.errors import InputError
from segbundles.measurements import columns
from segbundles.segmenter import Segmenter

BY_NAME = {bundle.name: bundle for bundle in TINY_BUNDLES}


@pytest.mark.parametrize("bundle", TINY_BUNDLES, ids=lambda bundle: bundle.name)
def test_an_array_or_a_path_gives_what_its_file_gives(bundle: TinyBundle, tmp_path: Path) -> None:
    root = bundle.make(tmp_path)
    image = bundle.write_image(tmp_path / "in")
    workflow = create_workflow(
        config_file=str(root / "configs" / "inference.json"),
        workflow_type="inference",
        bundle_root=str(root),
        dataset_dir=str(tmp_path / "in"),
        output_dir=str(tmp_path / "out"),
    )
    assert workflow.check_properties() == []
    workflow.run()
    workflow.finalize()

    before = image.copy()
    segment = Segmenter(root)
    found, by_path = segment(image, bundle.affine), segment(tmp_path / "in" / bundle.file)
    np.testing.assert_array_equal(image, before)
    stem = bundle.file.split(".")[0]
    names = {"pred": f"{stem}_seg.*", "cells": f"{stem}_cells.tif"}
    (row,) = csv.DictReader((tmp_path / "out" / "inference.csv").read_text().splitlines())
    (measured,) = json.loads((tmp_path / "out" / "measurements.json").read_text())["images"]
    for result in (found, by_path):
        assert result.pop("confidence") == pytest.approx(float(row["confidence"]), abs=1e-5)
        low = result.pop("confidence_low")
        assert low == (pytest.approx(float(row["confidence_low"]), abs=1e-5) if row["confidence_low"] else None)
        assert str(result.pop("confidence_calibrated")) == row["confidence_calibrated"]
        assert result.pop("review") == row["review"]
        mine, written = columns(result.pop("measurements")), columns(measured)
        assert mine == {
            key: value if isinstance(value, str) else pytest.approx(value)
            for key, value in written.items()
            if key in mine
        }
    assert found.keys() == (names.keys() if bundle.name == "em_membrane_unet" else {"pred"})
    for key, array in found.items():
        (path,) = (tmp_path / "out").glob(names[key])
        written = bundle.read(path)
        if key == "pred":  # class 1 is 255 in a picture
            written = written > 0
        np.testing.assert_array_equal(array, written)
        assert array.shape == bundle.shape[1:]
        assert 0.01 < (array > 0).mean() < 0.99
        np.testing.assert_array_equal(by_path[key], written)


def test_settings_are_those_of_inference_json(tmp_path: Path) -> None:
    bundle = BY_NAME["polyp_fcn8"]
    root = bundle.make(tmp_path)
    image = bundle.write_image(tmp_path / "in")
    assert Segmenter(root, frame_height=20).inferer.inferer.height == 20
    plain, small = (Segmenter(root, **settings)(image)["pred"] for settings in ({}, {"frame_height": 20}))
    assert (plain != small).any()
    with pytest.raises(InputError) as caught:
        Segmenter(root, frame_heigth=20)
    assert "did you mean 'frame_height'?" in str(caught.value)


def test_one_segmenter_for_images_of_several_sizes(tmp_path: Path) -> None:
    bundle = BY_NAME["left_atrium_vnet"]
    segment = Segmenter(bundle.make(tmp_path))
    image = bundle.write_image(tmp_path / "in")
    first = segment(image, AFFINE)["pred"]
    assert segment(image[:, :30, ::-1], AFFINE)["pred"].shape == (30, 36, 24)
    np.testing.assert_array_equal(segment(image, AFFINE)["pred"], first)


def test_a_series_of_slices_gives_what_its_array_gives(tmp_path: Path) -> None:
    bundle = BY_NAME["left_atrium_vnet"]
    segment = Segmenter(bundle.make(tmp_path))
    image = bundle.write_image(tmp_path / "in").astype(np.int16)
    turned = AFFINE @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 23], [0, 0, 0, 1]])  # slices along x cross y
    write_series(tmp_path / "series", image[0, :, :, ::-1], turned)
    np.testing.assert_array_equal(segment(str(tmp_path / "series"))["pred"][:, :, ::-1], segment(image, AFFINE)["pred"])
    (tmp_path / "series" / "IM0003").unlink()
    with pytest.raises(ValueError, match="a slice is missing between IM0002 and IM0004"):
        segment(tmp_path / "series")
    with pytest.raises(ValueError, match="with its own affine: leave affine out"):
        segment(tmp_path / "series", AFFINE)


@pytest.mark.parametrize(
    ("name", "image", "affine", "message"),
    [
        ("left_atrium_vnet", np.ones((1, 8, 8, 8)), None, r"left_atrium_vnet needs the affine \(4, 4\) of an image"),
        (
            "polyp_fcn8",
            np.ones((3, 32, 32)),
            None,
            r"polyp_fcn8 takes images of uint8, got float64: convert it \(0 .. ",
        ),
        ("polyp_fcn8", np.ones((32, 32, 3), np.uint8), None, r"has 32 channel\(s\) but must have 3"),
        ("em_membrane_unet", np.ones((1, 32, 32)), None, r"has 2 axes \(32, 32\) but must have 3"),
    ],
)
def test_bad_arrays(name: str, image: np.ndarray, affine: Any, message: str, tmp_path: Path) -> None:
    segment = Segmenter(BY_NAME[name].make(tmp_path))
    with pytest.raises(ValueError, match=message):
        segment(image, affine)


def test_no_bundle_and_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a bundle, it has no configs/inference\.json"):
        Segmenter(tmp_path)
    root = BY_NAME["polyp_fcn8"].make(tmp_path)
    (root / "models" / "model.pt").unlink()
    with pytest.raises(ValueError, match=r"there are no weights at .*model\.pt"):
        Segmenter(root)


def test_weights_from_elsewhere_bring_their_facts(tmp_path: Path) -> None:
    bundle = BY_NAME["polyp_fcn8"]
    root = bundle.make(tmp_path)
    models = tmp_path / "elsewhere"
    models.mkdir()
    weights = models / "model.pt"
    bundle.make_weights(root, "network_def", weights, base_channels=3, frame_height=32)
    image = bundle.write_image(tmp_path / "in")
    given = [{"weights": weights}, {"weights": str(weights)}, {"weights": [weights]}, {"ckpt_dir": models}]
    first, *others = (Segmenter(root, **settings) for settings in given)
    assert first.inferer.inferer.height == 32
    expected = first(image)["pred"]
    for other in others:
        np.testing.assert_array_equal(other(image)["pred"], expected)
    assert Segmenter(root, weights=weights, frame_height=40).inferer.inferer.height == 40  # as in inference.json
    with pytest.raises(InputError) as caught:
        Segmenter(root, weights=weights, base_channels=2)
    assert "base_channels is 2, but" in str(caught.value)
