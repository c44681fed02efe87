"""Synthetic patients in the layouts and formats that people have."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813
import tifffile

AFFINE = np.array([[-0.9, 0, 0, 20], [0, -0.9, 0, 15], [0, 0, 5, -8], [0, 0, 0, 1.0]])


def arrays(seed: int, channels: int = 3, size: tuple[int, ...] = (12, 10, 4)) -> tuple[np.ndarray, np.ndarray]:
    """Return an image (W, H, D, C) and a label (W, H, D) of 8 voxels in slices 1 and 2, unlike those of other seeds."""
    rng = np.random.default_rng(seed)
    label = np.zeros(size, np.uint8)
    label[2 + seed % 5 : 4 + seed % 5, 3:5, 1:3] = 1
    return rng.integers(0, 255, (*size, channels)).astype(np.uint8), label


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    """Write an array as NIfTI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def write_slices(folder: Path, seed: int, size: tuple[int, ...] = (12, 10, 4)) -> None:
    """Write a patient as a folder of TIFF, one per slice."""
    image, label = arrays(seed, size=size)
    folder.mkdir(parents=True)
    for number in range(image.shape[2]):
        tifffile.imwrite(folder / f"{folder.name}_{number + 1}.tif", image[:, :, number].swapaxes(0, 1))
        tifffile.imwrite(folder / f"{folder.name}_{number + 1}_mask.tif", label[:, :, number].T * np.uint8(255))


def write_segments(path: Path, label: np.ndarray, segments: dict[str, int], affine: np.ndarray = AFFINE) -> None:
    """Write a segmentation as 3D Slicer does: the box around the segments, of an image on the grid of ``affine``."""
    box = [slice(found.min(), found.max() + 1) for found in np.nonzero(label)]
    lps = np.diag([-1, -1, 1, 1]) @ affine
    image = sitk.GetImageFromArray(np.ascontiguousarray(label[tuple(box)].T))
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin((lps[:3, :3] @ [one.start for one in box] + lps[:3, 3]).tolist())
    for number, (name, value) in enumerate(segments.items()):
        for key, text in (("ID", f"S{number}"), ("Name", name), ("LabelValue", str(value)), ("Layer", "0")):
            image.SetMetaData(f"Segment{number}_{key}", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), useCompression=True)


def write_scans(folder: Path, seed: int, size: tuple[int, ...], segments: dict[str, int] | None = None) -> None:
    """Write a patient as three files, with a label, or with segments as 3D Slicer writes them."""
    image, label = arrays(seed, size=size)
    for channel, name in enumerate(("t1", "flair", "t1c")):
        save(folder / f"{name}.nii.gz", image[..., channel])
    if segments:
        write_segments(folder / "flair.seg.nrrd", label, segments)
    else:
        save(folder / "lesion.nii.gz", label)


def write_patients(folder: Path, size: tuple[int, ...] = (32, 28, 4)) -> None:
    """Write two patients as folders of TIFF, two as volumes of three channels, two as three files, one of 3D Slicer."""
    for seed in (1, 2):
        write_slices(folder / "tiff" / f"a{seed}", seed, size)
    for seed in (3, 4):
        image, label = arrays(seed, size=size)
        save(folder / f"rgb/b{seed}.nii.gz", image)
        save(folder / f"rgb/b{seed}_lesion.nii.gz", label)
    for seed in (5, 6):
        write_scans(folder / f"files/c{seed}", seed, size)
    write_scans(folder / "slicer/c7", 7, size, {"other": 9, "Lesion": 1})
