from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import tifffile
import torch

from segbundles.data import SimpleITKReader, SimpleITKWriter, TiffReader, TiffWriter

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("size", [(5, 4, 3), (1, 4, 3), (5, 1, 1), (5, 4)])
@pytest.mark.parametrize("wrap", [np.asarray, torch.as_tensor])
def test_simpleitk_round_trip(tmp_path, suffix, size, wrap):
    rank = len(size)
    classes = RNG.integers(0, 3, size, dtype=np.uint8)
    affine = np.eye(rank + 1)
    rotation = np.eye(rank)
    rotation[:2, :2] = [[0.6, 0.8], [0.8, -0.6]]
    affine[:rank, :rank] = rotation * [0.3, 1.0, 7.1][:rank]
    affine[:rank, rank] = [1 / 3, -200.7, 1e-3][:rank]
    writer = SimpleITKWriter()
    writer.set_data_array(wrap(classes[None].astype(np.float32)))
    writer.set_metadata({"affine": wrap(affine)})
    writer.write(tmp_path / f"a{suffix}")
    reader = SimpleITKReader()
    array, meta = reader.get_data(reader.read(tmp_path / f"a{suffix}"))
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, classes)
    np.testing.assert_allclose(meta["affine"], affine, rtol=0, atol=1e-12)


def test_simpleitk_takes_the_2d_part_of_a_3d_affine(tmp_path):
    writer = SimpleITKWriter()
    writer.set_data_array(np.zeros((4, 3)), channel_dim=None)
    writer.set_metadata({"affine": np.array([[2.0, 0, 0, 5], [0, 3, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]])})
    writer.write(tmp_path / "a.nrrd")
    image = sitk.ReadImage(str(tmp_path / "a.nrrd"))
    assert image.GetSpacing() == (2, 3)
    assert image.GetOrigin() == (-5, -6)


def test_simpleitk_without_metadata(tmp_path):
    writer = SimpleITKWriter()
    writer.set_data_array(np.ones((1, 3, 2, 2)))
    writer.set_metadata(None)
    writer.write(tmp_path / "a.nrrd")
    assert sitk.ReadImage(str(tmp_path / "a.nrrd")).GetSize() == (3, 2, 2)


@pytest.mark.parametrize("size", [(5, 4), (5, 4, 3), (5, 4, 2)])
def test_tiff_round_trip(tmp_path, size):
    classes = RNG.integers(0, 255, size, dtype=np.uint8)
    writer = TiffWriter()
    writer.set_data_array(classes[None])
    writer.set_metadata({})
    writer.write(tmp_path / "a.tif")
    reader = TiffReader()
    array, _ = reader.get_data(reader.read(tmp_path / "a.tif"))
    np.testing.assert_array_equal(array, classes)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert len(file.pages) == (size[2] if len(size) == 3 else 1)
        assert file.pages[0].shape == (4, 5)


@pytest.mark.parametrize("writer", [SimpleITKWriter, TiffWriter])
def test_several_channels_are_refused(writer):
    with pytest.raises(ValueError, match=r"a class map must have one channel, got shape \(2, 4, 4\): take the argmax"):
        writer().set_data_array(np.zeros((2, 4, 4)))
