"""Signed distance maps of labels, in mm."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy

import edt
import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.networks import one_hot
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_dst_type, convert_to_tensor

from segbundles.errors import fail

__all__ = [
    "SignedDistanceMap",
    "SignedDistanceMapd",
    "signed_distance_map",
]


def _expand_spacing(spacing_mm: Sequence[float] | float, spatial_dims: int) -> tuple[float, ...]:
    """Return one spacing per axis, checked."""
    spacing = tuple(float(s) for s in np.atleast_1d(np.asarray(spacing_mm, dtype=float)))
    if len(spacing) == 1:
        spacing *= spatial_dims
    if len(spacing) != spatial_dims or not all(0 < s < np.inf for s in spacing):
        fail(
            f"spacing_mm must be one positive number, or one for each of {spatial_dims} spatial axes, got {spacing_mm}."
        )
    return spacing


def signed_distance_map(mask: NdarrayOrTensor, spacing_mm: Sequence[float] | float = 1.0) -> NdarrayOrTensor:
    """Compute the signed Euclidean distance of every voxel to the border of a mask, negative inside.

    Outside the mask, the value is the distance to the nearest voxel of the mask. Inside, it is minus the distance to
    the nearest voxel outside, plus the smallest spacing, so that on an isotropic grid the mask's own border voxels are
    0. At spacing 1 this is the map of :class:`monai.losses.BoundaryLoss`. The ``edt`` library computes the distances of
    both sides in one pass, with as many threads as torch uses (one in the workers of a data loader).

    A channel without foreground or without background has no border. Its map is 0, so that it does not contribute to a
    boundary loss.

    Based on the level set function of:
        Kervadec, H. et al. (2019) Boundary loss for highly unbalanced segmentation. MIDL 2019.
        https://arxiv.org/abs/1812.07032

    Args:
        mask: binary masks, one per channel, shape (C, H, W) or (C, H, W, D); a value above 0.5 is inside.
        spacing_mm: distance in mm between neighbouring voxels, one number or one per spatial axis.

    Returns:
        The map in mm, float32, in the shape and of the type (array, tensor, MetaTensor) and device of ``mask``.

    Raises:
        ValueError: when ``mask`` is not of shape (C, H, W[, D]), or ``spacing_mm`` does not fit it.

    Example:
        >>> signed_distance_map(np.array([[[0, 0, 1, 1, 1, 0]]]))
        array([[[ 2.,  1.,  0., -1.,  0.,  1.]]], dtype=float32)
    """
    if mask.ndim not in (3, 4):
        fail(f"mask must have shape (C, H, W) or (C, H, W, D), got {tuple(mask.shape)}.")
    spacing = _expand_spacing(spacing_mm, mask.ndim - 1)
    inside = (convert_to_tensor(mask, track_meta=False) > 0.5).contiguous().cpu().numpy()
    output = np.zeros(inside.shape, dtype=np.float32)
    for channel, phi in zip(inside, output, strict=True):
        if not channel.any() or channel.all():
            continue
        # edt measures to the nearest voxel of another label, so labels 1 and 2 give both sides at once
        distance = edt.edt(channel + np.uint8(1), anisotropy=spacing, parallel=torch.get_num_threads())
        phi[...] = np.where(channel, min(spacing) - distance, distance)
    return convert_to_dst_type(output, mask, dtype=torch.float32)[0]


class SignedDistanceMap(Transform):
    """Compute the signed distance map of a label, for :class:`segbundles.losses.BoundaryLoss`.

    Compute the map on the whole volume, before any crop, because the nearest border may be outside a crop. This
    transform and all before it can be cached. The map is float32 and keeps the label's affine and metadata, so that
    MONAI's spatial transforms move it together with image and label. Use ``mode="bilinear"`` and
    ``padding_mode="border"`` for the map in those transforms, and pad it with ``mode="edge"``, because zeros would look
    like a border. After a rotation the map is interpolated; after a scaling or an elastic deformation its values are
    still the distances in the original volume.

    See :func:`signed_distance_map` for the definition, also for empty and full masks.

    Args:
        num_classes: number of classes of a label with one channel of class indices; the map then has one channel per
            class. None for a binary mask (0 and one other value) or one-hot labels, which give one map per channel.
        include_background: if False, the first of several classes gets no map. A single channel always gets one.
        spacing_mm: distance in mm between neighbouring voxels, one number or one per spatial axis. None reads it from
            the affine of a MetaTensor, and means 1 for arrays and plain tensors.

    Raises:
        ValueError: when ``num_classes`` is less than 2.
    """

    backend = [TransformBackends.NUMPY]  # noqa: RUF012

    def __init__(
        self,
        num_classes: int | None = None,
        include_background: bool = True,
        spacing_mm: Sequence[float] | float | None = None,
    ) -> None:
        if num_classes is not None and num_classes < 2:
            fail(f"num_classes must be 2 or more, or None for a binary mask, got {num_classes}.")
        self.num_classes = num_classes
        self.include_background = include_background
        self.spacing_mm = spacing_mm

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Compute the map.

        Args:
            img: the label, shape (C, H, W) or (C, H, W, D).

        Returns:
            The map in mm, float32, one channel per mask, of the type of ``img``, with the same affine and metadata.

        Raises:
            ValueError: when ``img`` is not of shape (C, H, W[, D]), contains neither binary masks nor indices of
                ``num_classes`` classes, or ``spacing_mm`` does not fit it.
        """
        spacing_mm = self.spacing_mm
        if spacing_mm is None:
            spacing_mm = 1.0
            if isinstance(img, MetaTensor):
                spacing_mm = affine_to_spacing(img.affine, r=3)[: img.ndim - 1].tolist()
        masks = self._masks(convert_to_tensor(img, track_meta=False))
        if not self.include_background and masks.shape[0] > 1:
            masks = masks[1:]
        output = convert_to_dst_type(signed_distance_map(masks, spacing_mm), img, dtype=torch.float32)[0]
        if isinstance(img, MetaTensor):
            output.meta = deepcopy(img.meta)  # the conversion's copy is shallow and shares the affine
        return output

    def _masks(self, label: torch.Tensor) -> torch.Tensor:
        """Return one binary mask per channel."""
        if self.num_classes is not None and label.shape[0] == 1:
            low, high = label.min().item(), label.max().item()
            if low < 0 or high >= self.num_classes or (label.is_floating_point() and (label != label.round()).any()):
                fail(
                    f"label must contain class indices 0 to {self.num_classes - 1}, got values from {low} to {high}. "
                    "Map other values to indices first, for example with MapLabelValued."
                )
            return one_hot(label, num_classes=self.num_classes, dtype=torch.uint8, dim=0)
        if self.num_classes is not None and label.shape[0] != self.num_classes:
            fail(
                f"label must have 1 channel, or one for each of num_classes={self.num_classes} classes, "
                f"got shape {tuple(label.shape)}."
            )
        # indices of several classes would otherwise silently become one foreground
        if not ((label == 0) | (label == label.max())).all():
            fail(
                f"label must be binary (0 and one other value), got values from {label.min().item()} to "
                f"{label.max().item()} with others in between. For class indices give num_classes; resample labels "
                'with mode="nearest".'
            )
        return label != 0


class SignedDistanceMapd(MapTransform):
    """Dictionary form of :class:`SignedDistanceMap`.

    Args:
        keys: keys of the labels.
        output_postfix: the map of ``key`` is stored as ``{key}_{output_postfix}``; the label stays.
        num_classes: as in :class:`SignedDistanceMap`, like the next two.
        include_background: whether the first of several classes gets a map.
        spacing_mm: distance in mm between neighbouring voxels.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when ``output_postfix`` is empty, or ``num_classes`` is less than 2.

    Example:
        >>> transform = SignedDistanceMapd(keys="label")
        >>> transform({"label": label})["label_distance"]
    """

    backend = SignedDistanceMap.backend

    def __init__(
        self,
        keys: KeysCollection,
        output_postfix: str = "distance",
        num_classes: int | None = None,
        include_background: bool = True,
        spacing_mm: Sequence[float] | float | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if not output_postfix:
            fail("output_postfix must not be empty: the map would replace its label.")
        self.output_postfix = output_postfix
        self.transform = SignedDistanceMap(num_classes, include_background, spacing_mm)

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        """Return the data with the maps added."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[f"{key}_{self.output_postfix}"] = self.transform(d[key])
        return d
