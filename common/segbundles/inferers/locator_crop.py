"""Two-stage inference: a locator finds the object on a coarse grid, the network sees the crop around it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import chain
from math import ceil, floor, prod
from typing import Any

import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.inferers import Inferer, sliding_window_inference
from monai.transforms.utils import generate_spatial_bounding_box
from monai.utils import convert_to_tensor, ensure_tuple
from torch.nn import functional as F

from segbundles.errors import fail
from segbundles.meta import add_note, file_name, set_box, set_notes
from segbundles.transforms.component import largest_component
from segbundles.transforms.resample import per_axis, resample, resampled_size

from .mirror import logits_of

__all__ = ["LocatorCropInferer"]

logger = logging.getLogger("segbundles")


class LocatorCropInferer(Inferer):
    """Find the object with a coarse locator, then run the network on the crop around it.

    For each item of the batch:

    1. ``locator`` runs on the item resampled to ``locator_spacing_mm``. The box of the largest connected component
       above ``threshold`` is mapped to the input's grid, extended by ``margin_mm`` and clamped to the image.
    2. ``network`` runs on the crop, after ``crop_transform`` and resampling to ``network_spacing_mm``: in one pass if
       the crop has no more voxels than ``roi_size``, otherwise by :py:func:`monai.inferers.sliding_window_inference`.
    3. Its logits are pasted into a float32 output of the input's size. Everywhere else the output means background:
       ``-background_logit`` in a single channel; with several channels ``background_logit`` in the first and
       ``-background_logit`` in the others.

    If the locator finds nothing, or a box that ``min_size_mm`` or ``max_size_mm`` excludes, the crop is the whole
    volume, and a warning and a note say so. Without a locator it is the whole volume too, without a note.

    If the input is a :py:class:`monai.data.MetaTensor`, the metadata of the output contains the note and the box of
    each item (:func:`segbundles.meta.notes_of`, :func:`segbundles.meta.box_of`).

    Apart from input and output, memory is needed only for the locator's coarse grid and for the crop. No gradients are
    computed. Lengths and axes refer to the input's array, whatever its orientation; a length is one number for all axes
    or a list with one number per axis.

    Args:
        roi_size: the most voxels that the network gets at once, given as the size of the sliding window in voxels of
            the network's grid; multiples of ``divisible_k``.
        locator: network with one logit, or with one logit per class and the background first; every other class is
            object. It is set to evaluation mode and moved to the input's device. None uses no locator.
        locator_spacing_mm: spacing of the locator's grid, in mm. Required with a locator.
        locator_transform: callable for the locator's resampled input (C, spatial), such as
            :py:class:`monai.transforms.NormalizeIntensity`.
        threshold: probability above which a voxel of the locator is object.
        margin_mm: margin added to each side of the locator's box, in mm.
        min_size_mm: an edge of the box (without margin) shorter than this is not plausible. None sets no limit.
        max_size_mm: an edge of the box (without margin) longer than this is not plausible. None sets no limit.
        input_spacing_mm: spacing of the input in mm, instead of that of its affine (or 1 mm for a plain tensor).
        crop_transform: callable for the crop (C, spatial), on the input's grid.
        network_spacing_mm: spacing of the network's grid, in mm. None uses the input's grid.
        divisible_k: inputs of locator and network are padded to a multiple of this by repeating the edge voxels.
        sw_batch_size: number of windows that the network gets at once, see
            :py:class:`monai.inferers.SlidingWindowInferer`.
        overlap: overlap of the windows.
        mode: how to blend the windows, ``"gaussian"`` or ``"constant"``.
        background_logit: absolute value of the logits outside the crop.

    Raises:
        ValueError: when an argument is out of range, or ``locator_spacing_mm`` is missing.

    Example:
        >>> import torch
        >>> net = torch.nn.Conv3d(1, 1, 1)
        >>> inferer = LocatorCropInferer(roi_size=(32, 32, 32), locator=net, locator_spacing_mm=2.0, margin_mm=5.0)
        >>> inferer(torch.rand(1, 1, 40, 40, 20), net).shape
        torch.Size([1, 1, 40, 40, 20])
    """

    def __init__(
        self,
        roi_size: Sequence[int] | int,
        locator: torch.nn.Module | None = None,
        locator_spacing_mm: Sequence[float] | float | None = None,
        locator_transform: Callable | None = None,
        threshold: float = 0.5,
        margin_mm: Sequence[float] | float = 10.0,
        min_size_mm: Sequence[float] | float | None = None,
        max_size_mm: Sequence[float] | float | None = None,
        input_spacing_mm: Sequence[float] | float | None = None,
        crop_transform: Callable | None = None,
        network_spacing_mm: Sequence[float] | float | None = None,
        divisible_k: int = 16,
        sw_batch_size: int = 1,
        overlap: Sequence[float] | float = 0.25,
        mode: str = "gaussian",
        background_logit: float = 20.0,
    ) -> None:
        if locator is not None and locator_spacing_mm is None:
            fail("locator_spacing_mm is None: give the spacing that the locator was trained at, in mm.")
        for name, value in (
            ("locator_spacing_mm", locator_spacing_mm),
            ("input_spacing_mm", input_spacing_mm),
            ("network_spacing_mm", network_spacing_mm),
            ("divisible_k", divisible_k),
            ("background_logit", background_logit),
        ):
            if value is not None and min(ensure_tuple(value)) <= 0:
                fail(f"{name} must be positive, got {value}.")
        if min(ensure_tuple(margin_mm)) < 0:
            fail(f"margin_mm must not be negative, got {margin_mm}.")
        if not 0 < threshold < 1:
            fail(f"threshold must be a probability between 0 and 1, got {threshold}.")
        if any(n < 1 or n % divisible_k for n in ensure_tuple(roi_size)):
            fail(f"roi_size must be positive multiples of divisible_k={divisible_k}, got {roi_size}.")
        self.roi_size = roi_size
        self.locator = locator
        self.locator_spacing_mm = locator_spacing_mm
        self.locator_transform = locator_transform
        self.threshold = threshold
        self.margin_mm = margin_mm
        self.min_size_mm = min_size_mm
        self.max_size_mm = max_size_mm
        self.input_spacing_mm = input_spacing_mm
        self.crop_transform = crop_transform
        self.network_spacing_mm = network_spacing_mm
        self.divisible_k = divisible_k
        self.sw_batch_size = sw_batch_size
        self.overlap = overlap
        self.mode = mode
        self.background_logit = background_logit

    @torch.no_grad()
    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Segment a batch.

        Args:
            inputs: (B, C, spatial), 2D or 3D. The spacing is that of a MetaTensor's affine: (4, 4), or one per item.
            network: returns one tensor of logits with the spatial size of its input.
            args: further arguments of ``network``.
            kwargs: further keyword arguments of ``network``.

        Returns:
            Logits (B, channels of the network, spatial), float32, on the input's device.

        Raises:
            ValueError: when an argument does not have one value per spatial axis of the input, or the network's output
                has another spatial size than its input.
        """
        spatial_dims = inputs.ndim - 2
        self._check_axes(spatial_dims)

        def predictor(x: torch.Tensor) -> torch.Tensor:
            return logits_of(network, x, *args, **kwargs)

        output = None
        notes: list[str] = []
        boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for i in range(len(inputs)):
            item = inputs[i]  # of a MetaTensor, with its own metadata
            image, spacing = convert_to_tensor(item, track_meta=False), self._spacing(item, spatial_dims)
            start, end, note = self.locate(image, spacing)
            if note:
                logger.warning(f"{file_name(item)}: {note}.")
            box = (slice(None), *map(slice, start, end))
            logits = self._segment(image[box], spacing, predictor)
            if output is None:
                output = logits.new_full((len(inputs), len(logits), *inputs.shape[2:]), -self.background_logit)
                if len(logits) > 1:
                    output[:, 0] = self.background_logit
            output[i][box] = logits
            notes.append(note)
            boxes.append((start, end))
        if not isinstance(inputs, MetaTensor):
            return output
        output = MetaTensor(output).copy_meta_from(inputs)
        if not inputs.is_batch and len(inputs) == 1:  # `image[None]`, with the metadata of one image
            add_note(output, *notes)
            set_box(output, *boxes[0])
        else:
            set_notes(output, notes)
            set_box(output, *zip(*boxes, strict=True))
        return output

    @torch.no_grad()
    def locate(self, image: torch.Tensor, spacing_mm: Sequence[float]) -> tuple[tuple[int, ...], tuple[int, ...], str]:
        """Find the box of the object in one image, margin included.

        Args:
            image: (C, spatial).
            spacing_mm: spacing along each axis, in mm.

        Returns:
            First voxel of the box, last voxel plus one, and why the box is the whole volume (empty if the locator's box
            was used or there is no locator).
        """
        size = tuple(image.shape[1:])
        dims = len(size)
        whole = (0,) * dims, size
        if self.locator is None:
            return *whole, ""
        mask = self._locator_mask(image, spacing_mm)
        if not mask.any():
            return *whole, "locator found nothing: whole volume segmented"
        first, last = generate_spatial_bounding_box(largest_component(mask)[None])
        axes = list(zip(first, last, size, mask.shape, strict=True))
        edges = [(b - a) * n / coarse * mm for (a, b, n, coarse), mm in zip(axes, spacing_mm, strict=True)]
        found = " x ".join(f"{edge:.1f}" for edge in edges) + " mm"
        if self.min_size_mm is not None and _any_below(edges, per_axis("min_size_mm", self.min_size_mm, dims)):
            return *whole, f"locator found too small an object ({found}): whole volume segmented"
        if self.max_size_mm is not None and _any_below(per_axis("max_size_mm", self.max_size_mm, dims), edges):
            return *whole, f"locator found too large an object ({found}): whole volume segmented"
        # minus a tiny bit: 3 mm at 0.1 mm are 30 voxels plus a rounding error
        margin = [
            ceil(mm / step - 1e-6)
            for mm, step in zip(per_axis("margin_mm", self.margin_mm, dims), spacing_mm, strict=True)
        ]
        start = tuple(max(0, floor(a * n / coarse) - m) for (a, _, n, coarse), m in zip(axes, margin, strict=True))
        end = tuple(min(n, ceil(b * n / coarse) + m) for (_, b, n, coarse), m in zip(axes, margin, strict=True))
        return start, end, ""

    def _locator_mask(self, image: torch.Tensor, spacing_mm: Sequence[float]) -> torch.Tensor:
        """Return where the locator sees the object, as a mask (spatial) on its own grid."""
        wanted = per_axis("locator_spacing_mm", self.locator_spacing_mm, len(spacing_mm))
        size = resampled_size(image.shape[1:], spacing_mm, wanted)
        x = self._padded(_applied(self.locator_transform, resample(image, size).float()))
        if isinstance(self.locator, torch.nn.Module):
            self.locator.to(x.device).eval()
        logits = self.locator(x).float()[0]
        probability = logits[0].sigmoid() if len(logits) == 1 else 1 - logits.softmax(0)[0]
        return probability[tuple(slice(n) for n in size)] > self.threshold

    def _segment(self, crop: torch.Tensor, spacing_mm: Sequence[float], predictor: Callable) -> torch.Tensor:
        """Return the logits of one crop (C, spatial), on the crop's grid."""
        size = tuple(crop.shape[1:])
        if self.network_spacing_mm is not None:
            wanted = per_axis("network_spacing_mm", self.network_spacing_mm, len(size))
            size = resampled_size(size, spacing_mm, wanted)
        x = self._padded(resample(_applied(self.crop_transform, crop.float()), size))
        roi_size = per_axis("roi_size", self.roi_size, len(size))
        if prod(x.shape[2:]) <= prod(roi_size):
            logits = predictor(x)
        else:
            # a window longer than the crop would be padded with zeros
            window = tuple(map(min, roi_size, x.shape[2:]))
            logits = sliding_window_inference(x, window, self.sw_batch_size, predictor, self.overlap, self.mode)
        return resample(logits[0][(slice(None), *(slice(n) for n in size))], crop.shape[1:])

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        """Add the batch axis, and voxels at the far ends up to a multiple of ``divisible_k``."""
        pad = list(chain.from_iterable((0, -n % self.divisible_k) for n in reversed(x.shape[1:])))
        return F.pad(x[None], pad, mode="replicate") if any(pad) else x[None]

    def _spacing(self, image: torch.Tensor, spatial_dims: int) -> tuple[float, ...]:
        """Return the spacing of an image (C, spatial) in mm."""
        if self.input_spacing_mm is not None:
            return per_axis("input_spacing_mm", self.input_spacing_mm, spatial_dims)
        if not isinstance(image, MetaTensor):
            return (1.0,) * spatial_dims
        return tuple(affine_to_spacing(image.affine, spatial_dims).tolist())

    def _check_axes(self, spatial_dims: int) -> None:
        """Refuse lists of the wrong length before any network runs."""
        for name in (
            "roi_size",
            "locator_spacing_mm",
            "margin_mm",
            "min_size_mm",
            "max_size_mm",
            "input_spacing_mm",
            "network_spacing_mm",
        ):
            if getattr(self, name) is not None:
                per_axis(name, getattr(self, name), spatial_dims)


def _applied(transform: Callable | None, x: torch.Tensor) -> torch.Tensor:
    """Return the transformed float32 image as a plain tensor; the image itself stays unchanged."""
    if transform is None:
        return x
    # MONAI's intensity transforms may write into what they get
    return convert_to_tensor(transform(x.clone()), track_meta=False)


def _any_below(values: Sequence[float], limits: Sequence[float]) -> bool:
    return any(value < limit for value, limit in zip(values, limits, strict=True))
