"""Resampling that keeps the field of view: averages where an axis shrinks, interpolates where it grows."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import InvertibleTransform, MapTransform
from monai.transforms.utils import scale_affine
from monai.utils import TraceKeys, ensure_tuple, ensure_tuple_rep, look_up_option
from torch.nn import functional as F

__all__ = ["ResampleToSpacing", "ResampleToSpacingd", "per_axis", "resample", "resampled_size"]

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def per_axis(name: str, values: Sequence[float] | float, spatial_dims: int) -> tuple:
    """One value for each spatial axis, from one value for all or from one for each.

    Args:
        name: what the values are called in the error.
        values: one value, or ``spatial_dims`` of them.
        spatial_dims: number of spatial dimensions.

    Raises:
        ValueError: When there are neither 1 nor ``spatial_dims`` values.
    """
    found = ensure_tuple(values)
    if len(found) not in (1, spatial_dims):
        raise ValueError(
            f"{name} must have 1 or {spatial_dims} values for a {spatial_dims}D image, got {len(found)}: {found}."
        )
    return found if len(found) == spatial_dims else found * spatial_dims


def resampled_size(
    size: Sequence[int], spacing_mm: Sequence[float], new_spacing_mm: Sequence[float]
) -> tuple[int, ...]:
    """Number of voxels that cover at the new spacing what ``size`` voxels cover now: at least one, rounded.

    Args:
        size: voxels along each axis.
        spacing_mm: their spacing along each axis, in mm.
        new_spacing_mm: the spacing wanted along each axis, in mm. Rounding moves the one reached off it by up to half a
            voxel over the whole axis.
    """
    return tuple(max(1, round(n * old / new)) for n, old, new in zip(size, spacing_mm, new_spacing_mm, strict=True))


def resample(tensor: torch.Tensor, size: Sequence[int], mode: str = "area") -> torch.Tensor:
    """Resize the spatial axes of a tensor; the outer faces of the first and the last voxel stay where they are.

    Args:
        tensor: in shape (C, spatial) or (B, C, spatial), with as many spatial axes as ``size`` has values.
        size: the new spatial size.
        mode: ``"area"`` averages along the axes that shrink, so that nothing is skipped, and then interpolates linearly
            along those that grow; ``"nearest"``, for label maps, takes the voxel at the new one's centre, type kept.

    Returns:
        A plain tensor, whatever came in, since a :py:class:`monai.data.MetaTensor`'s affine would no longer hold (see
        :py:class:`ResampleToSpacing`). Integers come back as float32 with ``"area"``.

    Raises:
        ValueError: When the tensor has not one or two axes more than ``size`` has values, or ``mode`` is not known.
    """
    look_up_option(mode, ("area", "nearest"))
    size = tuple(int(n) for n in size)
    if tensor.ndim - len(size) not in (1, 2):
        raise ValueError(
            f"size {size} needs a tensor in shape (C, spatial) or (B, C, spatial) with {len(size)} spatial axes, "
            f"got shape {tuple(tensor.shape)}."
        )
    x = tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor
    if mode == "area" and not x.is_floating_point():
        x = x.float()
    old = tuple(x.shape[-len(size) :])
    if old == size:
        return x
    batch = x if x.ndim == len(size) + 2 else x[None]
    if mode == "nearest":
        # torch resizes no other integers than uint8; doubles hold their labels exactly
        native = x.is_floating_point() or x.dtype == torch.uint8
        batch = F.interpolate(batch if native else batch.double(), size, mode="nearest-exact").to(x.dtype)
    else:
        smaller = tuple(min(a, b) for a, b in zip(old, size, strict=True))
        if smaller != old:
            batch = F.interpolate(batch, smaller, mode="area")
        if smaller != size:
            batch = F.interpolate(batch, size, mode=_LINEAR[len(size)], align_corners=False)
    return batch if x.ndim == len(size) + 2 else batch[0]


class ResampleToSpacing(InvertibleTransform):
    """Resample an image to a spacing by :py:func:`resample`, keeping its field of view.

    Unlike :py:class:`monai.transforms.Spacing` it averages where an axis shrinks, so thin structures fade instead of
    vanishing, and the image still ends where it ended: the spacing reached is the field of view over a whole number of
    voxels. The affine follows as :py:class:`monai.transforms.Resize`'s does. Axes keep their orientation.

    Args:
        spacing_mm: the spacing wanted along the image's axes, in mm; one value serves all axes. None leaves the image.
        mode: ``"area"`` for images and ``"nearest"`` for label maps, see :py:func:`resample`.

    Raises:
        ValueError: When ``spacing_mm`` is not positive.
    """

    def __init__(self, spacing_mm: Sequence[float] | float | None, mode: str = "area") -> None:
        if spacing_mm is not None and min(ensure_tuple(spacing_mm)) <= 0:
            raise ValueError(f"spacing_mm must be positive, got {spacing_mm}.")
        self.spacing_mm = spacing_mm
        self.mode = look_up_option(mode, ("area", "nearest"))

    def __call__(self, img: torch.Tensor, mode: str | None = None) -> torch.Tensor:
        """Resample one image.

        Args:
            img: MetaTensor in shape (C, spatial), its affine in mm.
            mode: in place of the one given at the start.

        Raises:
            ValueError: When the image has no affine, or ``spacing_mm`` has neither one value nor one for each axis.
        """
        if not isinstance(img, MetaTensor):
            raise ValueError(
                f"ResampleToSpacing needs a MetaTensor, whose affine gives the spacing, got {type(img).__name__}: "
                "load with LoadImage, or wrap with monai.data.MetaTensor(x, affine=...)."
            )
        old = tuple(img.shape[1:])
        new = old
        if self.spacing_mm is not None:
            wanted = per_axis("spacing_mm", self.spacing_mm, len(old))
            new = resampled_size(old, affine_to_spacing(img.affine, len(old)).tolist(), wanted)
        return self._resize(img, new, self.mode if mode is None else mode)

    def inverse(self, data: torch.Tensor) -> torch.Tensor:
        """Resample back to the size and the affine before."""
        transform = self.pop_transform(data)
        with self.trace_transform(False):
            return self._resize(data, transform[TraceKeys.ORIG_SIZE], transform[TraceKeys.EXTRA_INFO]["mode"])

    def _resize(self, img: MetaTensor, size: Sequence[int], mode: str) -> MetaTensor:
        old, new = tuple(img.shape[1:]), tuple(int(n) for n in size)
        out = MetaTensor(resample(img, new, mode)).copy_meta_from(img)
        return self.push_transform(out, affine=scale_affine(old, new), orig_size=old, extra_info={"mode": mode})


class ResampleToSpacingd(MapTransform, InvertibleTransform):
    """Dictionary-based wrapper of :py:class:`ResampleToSpacing`.

    Args:
        keys: keys of the images.
        spacing_mm: see :py:class:`ResampleToSpacing`.
        mode: ``"area"`` for images and ``"nearest"`` for label maps: one for all keys, or one for each.
        allow_missing_keys: don't raise when a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spacing_mm: Sequence[float] | float | None,
        mode: Sequence[str] | str = "area",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mode = tuple(look_up_option(m, ("area", "nearest")) for m in ensure_tuple_rep(mode, len(self.keys)))
        self.resampler = ResampleToSpacing(spacing_mm)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Resample the images under the keys."""
        d = dict(data)
        for key, mode in self.key_iterator(d, self.mode):
            d[key] = self.resampler(d[key], mode)
        return d

    def inverse(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Resample the images under the keys back."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.resampler.inverse(d[key])
        return d
