from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import tifffile
import torch
from monai.data import MetaTensor, NibabelWriter
from monai.transforms import SaveImage

from segbundles.data import PictureReader, SimpleITKReader, SimpleITKWriter, SuffixReader, TiffWriter

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


def written_by(writer, path, array, **meta):
    """What a reader finds after MONAI's ``SaveImage`` with a writer and ``resample=True``."""
    image = MetaTensor(array[None], affine=meta.pop("affine"), meta=meta)
    save = SaveImage(path.parent, "", path.suffix, output_dtype=np.uint8, resample=True, writer=writer)
    save(image, filename=path.parent / path.stem)
    reader = SuffixReader()
    found, meta = reader.get_data(reader.read(path))
    return found, meta["affine"]


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize(
    ("affine", "size"),
    [
        (np.diag([-2.0, -2.0, 2.0, 1.0]), (5, 4, 3)),  # mirrored
        (np.diag([1.0, 1.0, 1.0, 1.0]), (10, 8, 6)),  # finer
        (np.array([[0, 2.0, 0, 1], [2, 0, 0, 1], [0, 0, 3, 1], [0, 0, 0, 1]]), (5, 4, 2)),  # turned, coarser
    ],
)
def test_simpleitk_resamples_as_monais_writer_does(tmp_path, suffix, affine, size):
    array = torch.as_tensor(RNG.integers(0, 3, (5, 4, 3)), dtype=torch.float32)
    meta = {"affine": np.diag([2.0, 2.0, 2.0, 1.0]), "original_affine": affine, "spatial_shape": size}
    found, grid = written_by(SimpleITKWriter, tmp_path / f"a{suffix}", array, **meta)
    expected, expected_grid = written_by(NibabelWriter, tmp_path / "b.nii", array, **meta)
    assert found.shape == size
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(grid, affine, rtol=0, atol=1e-6)
    np.testing.assert_allclose(grid, expected_grid, rtol=0, atol=1e-6)


def test_tiff_is_mirrored_back(tmp_path):
    array = torch.as_tensor(RNG.integers(0, 3, (5, 4, 3)), dtype=torch.float32)
    meta = {
        "affine": np.diag([1.0, 1, 1, 1]),
        "original_affine": [[-1.0, 0, 0, 4], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
    }
    found, _ = written_by(TiffWriter, tmp_path / "a.tif", array, **meta, spatial_shape=(5, 4, 3))
    np.testing.assert_array_equal(found, array.numpy()[::-1])


@pytest.mark.parametrize("writer", [SimpleITKWriter, TiffWriter])
def test_another_size_without_an_affine_is_refused(writer):
    writer = writer()
    writer.set_data_array(np.zeros((1, 4, 4)))
    with pytest.raises(ValueError, match=r"^the array has size \(4, 4\) but its file \(8, 8\): invert spatial"):
        writer.set_metadata({"spatial_shape": (8, 8)})
    writer.set_metadata({"spatial_shape": (8, 8)}, resample=False)


def test_numbers_above_float32_survive(tmp_path):
    writer = TiffWriter(output_dtype=np.uint32)
    writer.set_data_array(np.full((1, 3, 2), 2**24 + 1, np.uint32))
    writer.set_metadata({"affine": np.eye(4), "original_affine": np.eye(4), "spatial_shape": (3, 2)})
    writer.write(tmp_path / "a.tif")
    assert (tifffile.imread(tmp_path / "a.tif") == 2**24 + 1).all()


@pytest.mark.parametrize("size", [(5, 4), (5, 4, 3), (5, 4, 2)])
def test_tiff_round_trip(tmp_path, size):
    classes = RNG.integers(0, 255, size, dtype=np.uint8)
    writer = TiffWriter()
    writer.set_data_array(classes[None])
    writer.set_metadata({})
    writer.write(tmp_path / "a.tif")
    reader = PictureReader()
    array, _ = reader.get_data(reader.read(tmp_path / "a.tif"))
    np.testing.assert_array_equal(array, classes)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert len(file.pages) == (size[2] if len(size) == 3 else 1)
        assert file.pages[0].shape == (4, 5)


def test_a_stack_is_converted_page_by_page(tmp_path) -> None:
    """The stack itself may be a file that does not fit into memory."""
    array = np.arange(256 * 256 * 32, dtype=np.int32).reshape(256, 256, 32) % 1000
    writer = TiffWriter(np.uint16)
    writer.set_data_array(array, channel_dim=None)
    tracemalloc.start()
    writer.write(tmp_path / "a.tif")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < array.size * 2 / 2  # half of the stack as it is written
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "a.tif"), array.T)


@pytest.mark.parametrize("writer", [SimpleITKWriter, TiffWriter])
def test_several_channels_are_refused(writer):
    with pytest.raises(ValueError, match=r"a class map must have one channel, got shape \(2, 4, 4\): take the argmax"):
        writer().set_data_array(np.zeros((2, 4, 4)))
