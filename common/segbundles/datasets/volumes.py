"""Reading and checking of 3D volumes: NRRD by SimpleITK, NIfTI by nibabel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .datalist import Case, Checked, Fault, array_hash

# header fields written in single precision differ in the sixth digit; a real mismatch is far above this
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Volume:
    """Decoded voxels and geometry of a file.

    Args:
        array: voxels, (W, H, D) for a plain volume; other numbers of dimensions are kept for the check to report.
        spacing_mm: voxel size along each array axis.
        origin_mm: position of the first voxel, RAS.
        direction: unit vectors of the array axes as columns, RAS.
    """

    array: np.ndarray
    spacing_mm: np.ndarray
    origin_mm: np.ndarray
    direction: np.ndarray

    @property
    def orientation(self) -> str:
        """Direction of each array axis, as in nibabel: ``RAS`` means to the right, to the front, to the head."""
        from nibabel.orientations import aff2axcodes

        affine = np.eye(4)
        affine[:3, :3] = self.direction
        return "".join(aff2axcodes(affine))


def read_volume(path: Path) -> Volume:
    """Read a ``.nrrd`` (an absent origin is 0), ``.nii`` or ``.nii.gz`` file.

    Raises:
        ValueError: when the file cannot be decoded, such as a truncated one, saying why in one line.
    """
    try:
        return _read_nifti(path) if path.name.endswith((".nii", ".nii.gz")) else _read_itk(path)
    except Exception as error:  # the readers raise anything from EOFError to zlib.error on a broken file
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"cannot be read: {lines[-1] if lines else type(error).__name__}") from error


def _read_nifti(path: Path) -> Volume:
    import nibabel as nib

    image = nib.load(path)
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    return Volume(np.asanyarray(image.dataobj), spacing, image.affine[:3, 3], image.affine[:3, :3] / spacing)


def _read_itk(path: Path) -> Volume:
    import SimpleITK as sitk  # noqa: N813

    from segbundles.itk import quiet_itk

    with quiet_itk():
        image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image).T
    dimension = image.GetDimension()
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])[:dimension, :dimension]
    return Volume(
        array,
        np.array(image.GetSpacing()),
        to_ras @ np.array(image.GetOrigin()),
        to_ras @ np.array(image.GetDirection()).reshape(dimension, dimension),
    )


def check_volumes(case: Case, label_values: Sequence[int], unit_spacing_mm: Sequence[float] | None = None) -> Checked:
    """Open image and label of a case and gather all that is wrong with them.

    Args:
        case: the case; without a label only the image is checked.
        label_values: values that a label may hold, background first.
        unit_spacing_mm: true spacing, by record, of files whose header says 1 mm; it goes into the entry as
            ``spacing_mm``. A header that says otherwise is believed.

    Returns:
        Faults, hashes, the entry's further keys and facts (sizes in voxels, mm and ml).
    """
    result = Checked()
    image = _open(case, case.image, result)
    label = _open(case, case.label, result) if case.label is not None else None

    if image is not None:
        for problem in _image_problems(image.array):
            result.faults.append(Fault(case.name, case.image, problem))
        result.image_hash = array_hash(image.array.astype(np.float32))
        spacing = image.spacing_mm
        if unit_spacing_mm is not None and np.allclose(spacing, 1, atol=_TOLERANCE):
            spacing = np.array(unit_spacing_mm)
            result.extra["spacing_mm"] = list(unit_spacing_mm)
        result.facts["size (voxels)"] = image.array.shape
        result.facts["spacing (mm)"] = tuple(np.round(spacing, 4))
        result.facts["orientation"] = image.orientation
    if label is not None and case.label is not None:
        for problem in _label_problems(label.array, label_values):
            result.faults.append(Fault(case.name, case.label, problem))
        foreground = label.array != label_values[0]
        result.label_hash = array_hash(foreground)
        if image is not None:
            for problem in _geometry_problems(image, label):
                result.faults.append(Fault(case.name, case.label, problem))
            if not result.faults:
                extent = [np.ptp(np.flatnonzero(foreground.any(axis))) + 1 for axis in ((1, 2), (0, 2), (0, 1))]
                result.facts["label box (voxels)"] = tuple(extent)
                result.facts["label box (mm)"] = tuple(extent * spacing)
                result.facts["label volume (ml)"] = (float(foreground.sum() * np.prod(spacing) / 1000),)
    return result


def _open(case: Case, path: Path, result: Checked) -> Volume | None:
    """Return a 3D volume, or None with the fault noted."""
    try:
        volume = read_volume(path)
    except ValueError as error:
        result.faults.append(Fault(case.name, path, str(error)))
        return None
    if volume.array.ndim != 3:
        result.faults.append(Fault(case.name, path, f"has {volume.array.ndim} dimensions {volume.array.shape}, not 3"))
        return None
    return volume


def _image_problems(array: np.ndarray) -> list[str]:
    bad = int(np.size(array) - np.isfinite(array).sum())
    if bad:
        return [f"holds {bad} voxels that are NaN or infinite"]
    if array.size == 0 or array.min() == array.max():
        return [f"is constant: every voxel is {array.flat[0] if array.size else 'missing'}"]
    return []


def _label_problems(array: np.ndarray, label_values: Sequence[int]) -> list[str]:
    values = np.unique(array)
    odd = [f"{v:g}" for v in values if v not in label_values]
    if odd:
        more = " ..." if len(odd) > 5 else ""
        return [f"holds the values {', '.join(odd[:5])}{more} where only {', '.join(map(str, label_values))} are due"]
    if not (values != label_values[0]).any():
        return ["is empty: no foreground voxel"]
    return []


def _geometry_problems(image: Volume, label: Volume) -> list[str]:
    if image.array.shape != label.array.shape:
        return [f"size {label.array.shape} differs from the image's {image.array.shape}"]
    problems = []
    for what, a, b, atol in (
        ("spacing", image.spacing_mm, label.spacing_mm, _TOLERANCE * image.spacing_mm.min()),
        ("origin", image.origin_mm, label.origin_mm, 10 * _TOLERANCE * image.spacing_mm.min()),
        ("direction", image.direction, label.direction, _TOLERANCE),
    ):
        if not np.allclose(a, b, rtol=0, atol=atol):
            problems.append(f"{what} {_show(b)} differs from the image's {_show(a)}")
    return problems


def _show(values: np.ndarray) -> str:
    return "(" + ", ".join(f"{v:.6g}" for v in values.ravel()) + ")"
