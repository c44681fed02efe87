"""Resampling that keeps the field of view: it averages where an axis shrinks and interpolates where it grows."""

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

from segbundles.errors import fail
from segbundles.meta import without_meta

__all__ = ["ResampleToSpacing", "ResampleToSpacingd", "per_axis", "resample", "resampled_size"]

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def per_axis(name: str, values: Sequence[float] | float, spatial_dims: int) -> tuple:
    """Return one value per spatial axis, given one value for all or one per axis.

    Args:
        name: name of the values in the error message.
        values: one value, or ``spatial_dims`` of them.
        spatial_dims: number of spatial dimensions.

    Raises:
        ValueError: when there are neither 1 nor ``spatial_dims`` values.
    """
    found = ensure_tuple(values)
    if len(found) not in (1, spatial_dims):
        fail(f"{name} must have 1 or {spatial_dims} values for a {spatial_dims}D image, got {len(found)}: {found}.")
    return found if len(found) == spatial_dims else found * spatial_dims


def resampled_size(
    size: Sequence[int], spacing_mm: Sequence[float], new_spacing_mm: Sequence[float]
) -> tuple[int, ...]:
    """Return the number of voxels (rounded, at least one) that cover the same length at a new spacing.

    Args:
        size: voxels along each axis.
        spacing_mm: their spacing along each axis, in mm.
        new_spacing_mm: target spacing along each axis, in mm. Because of the rounding, the actual spacing differs by up
            to half a voxel over the whole axis.
    """
    return tuple(max(1, round(n * old / new)) for n, old, new in zip(size, spacing_mm, new_spacing_mm, strict=True))


def resample(tensor: torch.Tensor, size: Sequence[int], mode: str = "area") -> torch.Tensor:
    """Resize the spatial axes of a tensor; the outer faces of the first and last voxels keep their position.

    Args:
        tensor: shape (C, spatial) or (B, C, spatial), with as many spatial axes as ``size`` has values.
        size: the new spatial size.
        mode: ``"area"`` averages along the axes that shrink, so that no voxel is skipped, then interpolates linearly
            along the axes that grow; ``"nearest"``, for label maps, takes the value at the centre of the new voxel and
            keeps the type.

    Returns:
        A plain tensor, because the affine of a :py:class:`monai.data.MetaTensor` would no longer be right (see
        :py:class:`ResampleToSpacing`). With ``"area"``, integers become float32.

    Raises:
        ValueError: when the tensor does not have one or two axes more than ``size`` has values, or ``mode`` is unknown.
    """
    look_up_option(mode, ("area", "nearest"))
    size = tuple(int(n) for n in size)
    if tensor.ndim - len(size) not in (1, 2):
        fail(
            f"size {size} needs a tensor in shape (C, spatial) or (B, C, spatial) with {len(size)} spatial axes, "
            f"got shape {tuple(tensor.shape)}."
        )
    x = without_meta(tensor)
    if mode == "area" and not x.is_floating_point():
        x = x.float()
    old = tuple(x.shape[-len(size) :])
    if old == size:
        return x
    batch = x if x.ndim == len(size) + 2 else x[None]
    if mode == "nearest":
        # torch cannot resize integers other than uint8; doubles represent their labels exactly
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
    """Resample an image to a spacing with :py:func:`resample`, keeping its field of view.

    Unlike :py:class:`monai.transforms.Spacing`, it averages where an axis shrinks, so thin structures become fainter
    instead of disappearing, and the image ends at the same position: the actual spacing is the field of view divided by
    a whole number of voxels. The affine changes as in :py:class:`monai.transforms.Resize`. Axes keep their orientation.

    Args:
        spacing_mm: target spacing along the image's axes, in mm, one value or one per axis. None changes nothing.
        mode: ``"area"`` for images and ``"nearest"`` for label maps, see :py:func:`resample`.

    Raises:
        ValueError: when ``spacing_mm`` is not positive.
    """

    def __init__(self, spacing_mm: Sequence[float] | float | None, mode: str = "area") -> None:
        if spacing_mm is not None and min(ensure_tuple(spacing_mm)) <= 0:
            fail(f"spacing_mm must be positive, got {spacing_mm}.")
        self.spacing_mm = spacing_mm
        self.mode = look_up_option(mode, ("area", "nearest"))

    def __call__(self, img: torch.Tensor, mode: str | None = None) -> torch.Tensor:
        """Resample one image.

        Args:
            img: MetaTensor of shape (C, spatial), with an affine in mm.
            mode: overrides the mode of the transform.

        Raises:
            ValueError: when the image has no affine, or ``spacing_mm`` has neither one value nor one per axis.
        """
        if not isinstance(img, MetaTensor):
            fail(
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
        """Resample back to the original size and affine."""
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
        spacing_mm: target spacing, see :py:class:`ResampleToSpacing`.
        mode: ``"area"`` for images and ``"nearest"`` for label maps: one for all keys, or one per key.
        allow_missing_keys: as in MONAI.
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
