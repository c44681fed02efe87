from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813


def _arrays(seed: int, foreground: int, slices: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Return an image and a label of 6 x 5 voxels in some slices, both unlike those of another seed."""
    rng = np.random.default_rng(seed)
    label = np.zeros((6, 5, slices), np.uint8)
    label[1:4, 1:3, 1:3] = foreground
    label[tuple(np.unravel_index(seed, label.shape))] = foreground
    return rng.integers(0, 255, label.shape, dtype=np.uint8), label


@pytest.fixture
def write_nrrd():
    """Write an array (W, H, D) as .nrrd."""

    def write(path: Path, array: np.ndarray, spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0), direction=None) -> None:
        volume = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
        if array.ndim == 3:
            volume.SetSpacing(spacing)
            volume.SetOrigin(origin)
            volume.SetDirection(np.eye(3).ravel() if direction is None else np.ravel(direction))
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(volume, str(path), useCompression=True)

    return write


@pytest.fixture
def lasc18(tmp_path, write_nrrd):
    """Make a good LASC18 folder with the cases A, B ...; header spacing 1 mm and 88 slices, as the publisher's."""

    def make(cases: int = 6, root: str = "lasc18", spacing=(1.0, 1.0, 1.0), first: int = 0, slices: int = 88) -> Path:
        source = tmp_path / root
        for index in range(first, first + cases):
            image, label = _arrays(index, 255, slices)
            folder = source / "Training Set" / chr(ord("A") + index)
            write_nrrd(folder / "lgemri.nrrd", image, spacing)
            write_nrrd(folder / "laendo.nrrd", label, spacing)
        return source

    return make


@pytest.fixture
def heart(tmp_path):
    """Make a good Task02_Heart folder with cases la_000 ... and the test cases la_900 ..."""

    def make(cases: int = 4, tests: int = 0) -> Path:
        root = tmp_path / "Task02_Heart"
        for folder in ("imagesTr", "labelsTr", "imagesTs"):
            (root / folder).mkdir(parents=True)
        affine = np.diag([1.25, 1.25, 1.37, 1])
        for index in [*range(cases), *range(900, 900 + tests)]:
            image, label = _arrays(index % 100, 1)
            part = "Ts" if index >= 900 else "Tr"
            if part == "Ts":
                image = image[::-1]
            else:
                nib.save(nib.Nifti1Image(label, affine), root / "labelsTr" / f"la_{index:03d}.nii.gz")
            nib.save(nib.Nifti1Image(image.astype(np.int16), affine), root / f"images{part}" / f"la_{index:03d}.nii.gz")
        return root

    return make
