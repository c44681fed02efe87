"""One volume stored with its axes in each of the 48 orders comes out the same, in every format."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from dicom_series import write_series
from monai.bundle import ConfigParser
from monai.data import decollate_batch, list_data_collate
from monai.data.utils import orientation_ras_lps
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd
from scipy.spatial.transform import Rotation

from segbundles.bundle import RunSettings

CONFIG = Path(__file__).parents[2] / "bundles" / "left_atrium_vnet" / "configs" / "inference.json"
ORDERS = [(axes, flips) for axes in itertools.permutations(range(3)) for flips in itertools.product((1, -1), repeat=3)]
VOLUME = np.random.default_rng(0).integers(0, 1000, (5, 4, 3)).astype(np.int16)
STRAIGHT = np.array([[0.5, 0, 0, -20], [0, 0.75, 0, 30], [0, 0, 2, 8.5], [0, 0, 0, 1]])
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", (20, -15, 30), degrees=True).as_matrix() @ np.diag([0.5, 0.75, 2])
OBLIQUE[:3, 3] = -20, 30, 8.5
TO_RAS = {"LPS": (-1, -1, 1), "RAS": (1, 1, 1), "LAS": (-1, 1, 1)}


def reordered(volume, affine, axes, flips):
    """The same volume, stored with other axes first and some of them reversed, and its affine."""
    step = np.zeros((4, 4))
    step[3, 3] = 1
    for new, (old, flip) in enumerate(zip(axes, flips, strict=True)):
        step[old, new] = flip
        step[old, 3] = volume.shape[old] - 1 if flip < 0 else 0
    return np.ascontiguousarray(volume.transpose(axes)[tuple(slice(None, None, flip) for flip in flips)]), affine @ step


def write_nifti(folder, volume, affine):
    nib.save(nib.Nifti1Image(volume, affine), folder / "a.nii.gz")
    return folder / "a.nii.gz"


def write_nrrd(folder, volume, affine, space):
    said = np.diag([*TO_RAS[space], 1]) @ affine
    header = {"space": space, "space directions": said[:3, :3].T, "space origin": said[:3, 3]}
    nrrd.write(str(folder / "a.nrrd"), volume, header)
    return folder / "a.nrrd"


def write_metaimage(folder, volume, affine):
    lps = orientation_ras_lps(affine)
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(volume.T)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    sitk.WriteImage(image, str(folder / "a.mha"))
    return folder / "a.mha"


def write_dicom(folder, volume, affine):
    write_series(folder / "series", volume, affine)
    return folder / "series"


FORMATS = {
    "NIfTI": write_nifti,
    "MetaImage": write_metaimage,
    "DICOM": write_dicom,
    **{f"NRRD {space}": lambda *args, space=space: write_nrrd(*args, space) for space in TO_RAS},
}


def load(path):
    steps = [LoadImaged("image", reader="segbundles.data.SuffixReader"), EnsureChannelFirstd("image")]
    return Compose([*steps, Orientationd("image", axcodes="RAS", labels=None)])({"image": str(path)})["image"]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("affine", "tolerance"), [(STRAIGHT, 0), (OBLIQUE, 2e-5)], ids=["straight", "oblique"])
def test_every_order_of_the_axes_gives_one_array_and_affine(tmp_path, kind, affine, tolerance):
    for number, order in enumerate(ORDERS):
        folder = tmp_path / str(number)
        folder.mkdir()
        image = load(FORMATS[kind](folder, *reordered(VOLUME, affine, *order)))
        np.testing.assert_array_equal(image[0].numpy(), VOLUME)
        np.testing.assert_allclose(image.affine.numpy(), affine, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def segment():
    """The left-atrium bundle's own inference on one file, with a tiny network that has random weights."""
    parser = ConfigParser()
    parser.read_config(CONFIG)
    parser.update({"settings": RunSettings(), "preview": False, "measurements": False, "dicom_seg": False})
    parser.update({"use_locator": False, "network_spacing_mm": [2.5] * 3, "base_channels": 2})
    parser.update({"window_size": [32, 32, 32], "dataset_dir": "/", "device": "$torch.device('cpu')", "amp": False})

    def run(path, output_dir):
        parser["output_dir"] = str(output_dir)
        parser.parse(True)
        torch.manual_seed(3)
        preprocessing, network, inferer, postprocessing = (
            parser.get_parsed_content(name) for name in ("preprocessing", "network", "inferer", "postprocessing")
        )
        batch = list_data_collate([preprocessing({"image": str(path)})])
        with torch.no_grad():
            batch["pred"] = inferer(batch["image"], network.eval())
        return Path(postprocessing(decollate_batch(batch)[0])["pred"].meta["saved_to"])

    return run


@pytest.mark.slow
def test_masks_of_every_order_and_format_agree_voxel_for_voxel(tmp_path, segment):
    volume = np.random.default_rng(1).normal(100, 20, (24, 20, 14)).round()
    affine = np.diag([2.0, 2.5, 3, 1])
    expected = None
    for (number, order), kind in itertools.product(enumerate(ORDERS[::13]), FORMATS):
        folder = tmp_path / f"{kind} {number}"
        folder.mkdir()
        stored = volume.astype(np.int16 if kind == "DICOM" else np.float32)
        stored, grid = reordered(stored, affine, *order)
        path = FORMATS[kind](folder, stored, grid)
        mask = load(segment(path, folder / "masks"))
        expected = mask.numpy() if expected is None else expected
        assert 0.05 < expected.mean() < 0.95
        np.testing.assert_array_equal(mask.numpy(), expected)
        np.testing.assert_array_equal(mask.affine.numpy(), affine)
