"""Readers of volumes: NIfTI with nibabel, NRRD and MetaImage with SimpleITK."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data import NibabelReader
from monai.data.utils import orientation_ras_lps

from segbundles.data.base import GRID_TOLERANCE, ITK, NIFTI, FileReader
from segbundles.data.dicom import format_numbers
from segbundles.data.itk_headers import axes_fault, check_metaimage, check_nrrd
from segbundles.errors import InputError
from segbundles.itk import quiet_itk
from segbundles.meta import add_note, image_meta

__all__ = ["NiftiReader", "SimpleITKReader"]

FLOAT32_EPS = float(np.finfo(np.float32).eps)
DEFLATE_RATIO = 1032  # how much gzip can compress
SHEAR_TOLERANCE = 0.01  # of the cosine
COMPLEX = "it contains complex numbers: save the magnitude."


class NiftiReader(FileReader):
    """Read NIfTI with nibabel, on the grid of the header.

    The affine is nibabel's: the sform if its code is set, else the qform, else one made from pixdim. If sform, qform
    and pixdim contradict each other, MONAI's reader silently uses one of them. This reader refuses the file, because
    other programs may use another one.
    """

    suffixes = NIFTI

    def decode(self, path: Path, **kwargs: Any) -> tuple[np.ndarray, dict]:
        """Return array and metadata of one file.

        Args:
            path: the file.
            kwargs: passed to ``nibabel.load``.

        Raises:
            ValueError: when the header contradicts itself by more than float32 rounding explains, is not in mm or does
                not describe a grid, and when values are complex.
        """
        image = nib.load(path, **kwargs)
        with nib.openers.ImageOpener(path) as file:  # nibabel repairs its own copy of the header
            stored = type(image.header).from_fileobj(file, check=False)
        if fault := _layout_fault(image, stored, path) or _grid_fault(image, stored):
            raise InputError(fault)
        kind = image.get_data_dtype()
        if kind.kind == "c":
            raise InputError(COMPLEX)
        if kind.names:  # RGB24, RGBA32
            colours = np.asanyarray(image.dataobj)
            array = np.stack([colours[name] for name in kind.names], axis=-1)
            meta = image_meta(image.affine, image.shape, channels_last=True)
        else:
            reader = NibabelReader()
            reader.filenames = (path,)  # its get_data reads them
            array, meta = reader.get_data(image)
        while array.ndim > 4 and array.shape[-1] == 1:
            array = array[..., 0]
        add_note(meta, _shear_note(image.affine))
        return array, meta


def _layout_fault(image: nib.Nifti1Pair, stored: nib.Nifti1Header, path: Path) -> str | None:
    """Describe what makes the size or the place of the values wrong; None if nothing does."""
    if len(image.shape) < 2 or 0 in image.shape:
        return f"its dim is {format_numbers(stored['dim'])}, but an image has at least two axes, none of size 0."
    if image.dataobj.offset < stored.single_vox_offset:
        return f"its vox_offset is {image.dataobj.offset}, but must be at least {stored.single_vox_offset}."
    needed = image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize
    held = path.stat().st_size * (DEFLATE_RATIO if path.suffix.lower() == ".gz" else 1)
    if needed > held:  # nibabel would fill memory before it finds out
        return f"it is truncated or damaged (its header describes {needed} bytes, but it contains at most {held})."
    return None


def _grid_fault(image: nib.Nifti1Pair, stored: nib.Nifti1Header) -> str | None:
    """Describe what makes the header's grid ambiguous and what to do about it; None if nothing does."""
    header = image.header
    unit = {1: "metres", 3: "micrometres"}.get(int(header["xyzt_units"]) % 8)
    if unit:
        return f"its header is in {unit} (xyzt_units), not mm: rescale affine and pixdim, and set the unit to mm."
    repair = "correct the header, with nibabel (set_sform, set_qform), ITK-SNAP or fslorient."
    for name in ("sform_code", "qform_code"):
        if stored[name] != header[name]:
            return f"its {name} is {stored[name]}, which NIfTI does not define: {repair}"
    pixdim = np.abs(stored["pixdim"][1 : 1 + min(len(image.shape), 3)].astype(np.float64))
    spacing = nib.affines.voxel_sizes(image.affine)[: len(pixdim)]
    with np.errstate(invalid="ignore"):
        agree = np.abs(spacing - pixdim) <= GRID_TOLERANCE * pixdim
    if not agree.all():
        source = "sform" if header["sform_code"] > 0 else "qform"
        return (
            f"its {source} has spacing {format_numbers(spacing)} mm, its pixdim {format_numbers(pixdim)} mm: {repair}"
        )
    if (why := axes_fault(image.affine[:3, : len(pixdim)])) or not np.isfinite(image.affine).all():
        rows = " ".join(format_numbers(row) for row in image.affine[:3])
        return f"its affine is {rows}, but {why or 'each value must be finite'}: {repair}"
    if header["sform_code"] <= 0 or header["qform_code"] <= 0:
        return None
    size = (*image.shape, 1, 1)[:3]
    corners = np.array(list(product(*((0, n - 1) for n in size))))
    sform, qform = image.get_sform(), image.get_qform()
    by_sform, by_qform = (nib.affines.apply_affine(affine, corners) for affine in (sform, qform))
    reach = np.linalg.norm(by_qform - qform[:3, 3], axis=1)
    rounding = _qform_rounding(header) * reach + FLOAT32_EPS * np.abs(by_qform).max()
    apart = np.linalg.norm(by_sform - by_qform, axis=1)
    far = ~(apart <= GRID_TOLERANCE * pixdim.min() + rounding)
    if not far.any():
        return None
    worst = np.flatnonzero(far)[np.argmax(apart[far])]
    return (
        f"its sform puts voxel {format_numbers(corners[worst])} at {format_numbers(by_sform[worst])} mm (spacing "
        f"{format_numbers(spacing)}), its qform at {format_numbers(by_qform[worst])} mm (spacing "
        f"{format_numbers(pixdim)}): {repair}"
    )


def _qform_rounding(header: nib.Nifti1Header) -> float:
    """Return the angle in radians by which rounding may turn a qform.

    The header stores b, c and d as float32. Near half a turn, where many scanners' axes are, a = sqrt(1 - bb - cc - dd)
    is inaccurate.
    """
    bcd = np.array([header[f"quatern_{name}"] for name in "bcd"], dtype=np.float64)
    square, error = max(1 - bcd @ bcd, 0), 3 * FLOAT32_EPS
    return 2 * (np.sqrt(square + error) - np.sqrt(max(square - error, 0)))


class SimpleITKReader(FileReader):
    """Read NRRD and MetaImage with SimpleITK, after a look at the header itself.

    Arrays have axes (x, y, z), or (x, y, z, channel) for vector images; the affine is RAS, in mm. A header without an
    origin means origin 0, one without a spacing 1 mm, and a NRRD header without a ``space`` means
    left-posterior-superior. ITK silently replaces
    NaN spacings by 1 and ignores units; this reader refuses such files.
    """

    suffixes = ITK

    def decode(self, path: Path, **kwargs: Any) -> tuple[np.ndarray, dict]:
        """Return array and metadata of one file.

        Args:
            path: the file.
            kwargs: passed to ``SimpleITK.ReadImage``.

        Raises:
            ValueError: when the file cannot be decoded, its header does not describe a grid in mm, or it contains
                several volumes or numbers that are not grey levels.
        """
        import SimpleITK as sitk  # noqa: N813

        note = (check_nrrd if path.suffix.lower() in (".nrrd", ".nhdr") else check_metaimage)(path)
        try:
            with quiet_itk():
                image = sitk.ReadImage(str(path), **kwargs)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            if reason.startswith("Reason:"):  # of an older error of the system
                reason = "ITK cannot read its header or its voxels"
            raise InputError(f"it is truncated or damaged ({reason}).") from None
        dims = image.GetDimension()
        array = sitk.GetArrayFromImage(image)
        if np.iscomplexobj(array):
            raise InputError(COMPLEX)
        vector = image.GetNumberOfComponentsPerPixel() > 1
        order = (*reversed(range(dims)), dims) if vector else tuple(reversed(range(dims)))
        rank = min(dims, 3)
        array = array.transpose(order)
        array = array.reshape(*array.shape[:rank], *array.shape[dims:])  # further axes have size 1
        affine = np.eye(rank + 1)
        direction = np.asarray(image.GetDirection()).reshape(dims, dims)[:rank, :rank]
        affine[:rank, :rank] = direction * np.asarray(image.GetSpacing())[:rank]
        affine[:rank, -1] = image.GetOrigin()[:rank]
        meta = image_meta(orientation_ras_lps(affine), image.GetSize()[:rank], vector)
        add_note(meta, note, _shear_note(affine))
        return array, meta


def _shear_note(affine: np.ndarray) -> str:
    """Return a note on axes that are not perpendicular, because volumes and distances assume that they are."""
    axes = affine[:-1, :-1] / np.linalg.norm(affine[:-1, :-1], axis=0)
    cosine = np.abs(np.tril(axes.T @ axes, -1)).max()
    if cosine <= SHEAR_TOLERANCE:
        return ""
    return f"axes at {np.degrees(np.arccos(cosine)):.0f} degrees instead of 90: lengths and volumes are approximate"
