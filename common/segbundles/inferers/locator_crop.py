"""Two-stage inference: a locator finds the object on a coarse grid, the network sees the crop around it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import chain
from math import ceil, floor, prod
from typing import Any

import torch
from monai.config import PathLike
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.inferers import Inferer, sliding_window_inference
from monai.transforms.utils import generate_spatial_bounding_box, get_largest_connected_component_mask
from monai.utils import convert_to_tensor, ensure_tuple
from torch.nn import functional as F

from segbundles.networks import load_weights
from segbundles.transforms.resample import per_axis, resample, resampled_size

from .mirror import predict_mirrored

__all__ = ["LocatorCropInferer"]

logger = logging.getLogger(__name__)

Box = tuple[tuple[int, ...], tuple[int, ...]]


class LocatorCropInferer(Inferer):
    """Find the object with a coarse locator, then run the network once, on the crop around it.

    For each item of the batch:

    1. ``locator`` runs on the item resampled to ``locator_spacing_mm``. The box of the largest connected component
       above ``threshold`` goes back to the input's grid, grows by ``margin_mm`` and is clamped to the image.
    2. ``network`` runs on the crop (normalised by ``crop_transform``, then resampled to ``network_spacing_mm``, both if
       given): in one pass if the crop has no more voxels than ``roi_size``, else by
       :py:func:`monai.inferers.sliding_window_inference`.
    3. Its logits go into a float32 output of the input's size, which elsewhere says background: ``-background_logit``
       in a single channel; of several, ``background_logit`` in the first and ``-background_logit`` in the others.

    When the locator finds nothing, or a box that ``min_size_mm`` or ``max_size_mm`` rules out, the crop is the whole
    volume; a warning is logged and a note says so. Without a locator it is the whole volume too, with nothing to note.

    The note and the box of each item are in ``last_notes`` and ``last_boxes``. If the input is a
    :py:class:`monai.data.MetaTensor`, so is the output, with the input's meta data and in ``meta`` besides: ``notes``
    (text, empty if there is nothing to say), ``box_start`` and ``box_end`` (voxels of the input, end exclusive), for
    each item after :py:func:`monai.data.decollate_batch`.

    Memory beyond the input and the output is that of the locator on its coarse grid and of the network on the crop.
    There are no gradients. Lengths and axes are those of the input's array, whatever its orientation; a length is one
    number for all axes or a list with one for each.

    Args:
        roi_size: the most voxels the network gets at once, as the size of the sliding window, in voxels of the
            network's grid; multiples of ``divisible_k``.
        locator: network with one logit, or with a logit a class and the background first; every other class is object.
            It is set to eval mode and moved to the input's device. None: no locator.
        locator_spacing_mm: spacing of the locator's grid, in mm. Needed if there is a locator.
        locator_transform: callable for the locator's resampled input in shape (C, spatial), as
            :py:class:`monai.transforms.NormalizeIntensity`.
        locator_weights: file with the locator's weights, loaded at the first call. None: it has them.
        threshold: probability above which a voxel of the locator is object.
        margin_mm: what to add to the locator's box on each side.
        min_size_mm: an edge of the box below this, margin not counted, is not plausible. None: no limit.
        max_size_mm: an edge of the box above this, margin not counted, is not plausible. None: no limit.
        input_spacing_mm: spacing of the input, in mm, in place of its affine's (or of 1 mm for a plain tensor).
        crop_transform: callable for the crop in shape (C, spatial), on the input's grid.
        network_spacing_mm: spacing of the network's grid, in mm. None: the input's grid.
        divisible_k: inputs of locator and network are padded to a multiple of this by repeating the edge voxels.
        sw_batch_size: number of windows the network gets at once, see :py:class:`monai.inferers.SlidingWindowInferer`.
        overlap: overlap of the windows.
        mode: how to blend the windows, ``"gaussian"`` or ``"constant"``.
        mirror_axes: spatial axes to mirror, singly and together, at test time; the logits are averaged.
        background_logit: size of the logit outside the crop.

    Raises:
        ValueError: When an argument is out of range, or ``locator_spacing_mm`` is missing.

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
        locator_weights: PathLike | None = None,
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
        mirror_axes: Sequence[int] = (),
        background_logit: float = 20.0,
    ) -> None:
        if locator is not None and locator_spacing_mm is None:
            raise ValueError("locator_spacing_mm is None: give the spacing that the locator was trained at, in mm.")
        for name, value in (
            ("locator_spacing_mm", locator_spacing_mm),
            ("input_spacing_mm", input_spacing_mm),
            ("network_spacing_mm", network_spacing_mm),
            ("divisible_k", divisible_k),
            ("background_logit", background_logit),
        ):
            if value is not None and min(ensure_tuple(value)) <= 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        if min(ensure_tuple(margin_mm)) < 0:
            raise ValueError(f"margin_mm must not be negative, got {margin_mm}.")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be a probability between 0 and 1, got {threshold}.")
        if any(n < 1 or n % divisible_k for n in ensure_tuple(roi_size)):
            raise ValueError(f"roi_size must be positive multiples of divisible_k={divisible_k}, got {roi_size}.")
        self.roi_size = roi_size
        self.locator = locator
        self.locator_spacing_mm = locator_spacing_mm
        self.locator_transform = locator_transform
        self.locator_weights = locator_weights
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
        self.mirror_axes = tuple(mirror_axes)
        self.background_logit = background_logit
        self.last_notes: list[str] = []
        self.last_boxes: list[Box] = []

    @torch.no_grad()
    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Segment a batch.

        Args:
            inputs: in shape (B, C, spatial), 2D or 3D. A MetaTensor's affine, (4, 4) or one an item, gives the spacing.
            network: returns one tensor of logits in its input's spatial size.
            args: further arguments of ``network``.
            kwargs: further keyword arguments of ``network``.

        Returns:
            Logits in shape (B, channels of the network, spatial), float32, on the input's device.

        Raises:
            ValueError: When an argument has another number of values than the input has spatial axes, or the network's
                output does not fit its input.
        """
        data = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        spatial_dims = data.ndim - 2
        self._check_axes(spatial_dims)

        def predictor(x: torch.Tensor) -> torch.Tensor:
            return predict_mirrored(x, *args, network=network, mirror_axes=self.mirror_axes, **kwargs)

        output = None
        self.last_notes, self.last_boxes = [], []
        for i, (image, spacing) in enumerate(zip(data, self._spacings(inputs, spatial_dims), strict=True)):
            start, end, note = self.locate(image, spacing)
            if note:
                logger.warning(f"{self._name(inputs, i)}: {note}.")
            box = (slice(None), *map(slice, start, end))
            logits = self._segment(image[box], spacing, predictor)
            if output is None:
                output = logits.new_full((len(data), len(logits), *data.shape[2:]), -self.background_logit)
                if len(logits) > 1:
                    output[:, 0] = self.background_logit
            output[i][box] = logits
            self.last_notes.append(note)
            self.last_boxes.append((start, end))
        return self._with_meta(output, inputs) if isinstance(inputs, MetaTensor) else output

    @torch.no_grad()
    def locate(self, image: torch.Tensor, spacing_mm: Sequence[float]) -> tuple[tuple[int, ...], tuple[int, ...], str]:
        """Find the box of the object in one image, margin included.

        Args:
            image: in shape (C, spatial).
            spacing_mm: its spacing along each axis, in mm.

        Returns:
            First voxel of the box, last voxel plus one, and why it is the whole volume (empty if the locator was
            followed or there is none).
        """
        size = tuple(image.shape[1:])
        dims = len(size)
        whole = (0,) * dims, size
        if self.locator is None:
            return *whole, ""
        mask = self._locator_mask(image, spacing_mm)
        if not mask.any():
            return *whole, "locator found nothing: whole volume segmented"
        first, last = generate_spatial_bounding_box(get_largest_connected_component_mask(mask)[None])
        axes = list(zip(first, last, size, mask.shape, strict=True))
        edges = [(b - a) * n / coarse * mm for (a, b, n, coarse), mm in zip(axes, spacing_mm, strict=True)]
        found = " x ".join(f"{edge:.1f}" for edge in edges) + " mm"
        if self.min_size_mm is not None and _any_below(edges, per_axis("min_size_mm", self.min_size_mm, dims)):
            return *whole, f"locator found too small an object ({found}): whole volume segmented"
        if self.max_size_mm is not None and _any_below(per_axis("max_size_mm", self.max_size_mm, dims), edges):
            return *whole, f"locator found too large an object ({found}): whole volume segmented"
        # less a hair, as 3 mm at 0.1 mm are 30 voxels and a rounding error
        margin = [
            ceil(mm / step - 1e-6)
            for mm, step in zip(per_axis("margin_mm", self.margin_mm, dims), spacing_mm, strict=True)
        ]
        start = tuple(max(0, floor(a * n / coarse) - m) for (a, _, n, coarse), m in zip(axes, margin, strict=True))
        end = tuple(min(n, ceil(b * n / coarse) + m) for (_, b, n, coarse), m in zip(axes, margin, strict=True))
        return start, end, ""

    def _locator_mask(self, image: torch.Tensor, spacing_mm: Sequence[float]) -> torch.Tensor:
        """Where the locator sees the object, in shape (spatial) of its own grid."""
        wanted = per_axis("locator_spacing_mm", self.locator_spacing_mm, len(spacing_mm))
        size = resampled_size(image.shape[1:], spacing_mm, wanted)
        x = self._padded(_applied(self.locator_transform, resample(image, size).float()))
        if self.locator_weights is not None:
            # not when made: a config can then be read, and its network loaded, where the weights are still to come
            load_weights(self.locator, self.locator_weights)
            self.locator_weights = None
        if isinstance(self.locator, torch.nn.Module):
            self.locator.to(x.device).eval()
        logits = self.locator(x).float()[0]
        probability = logits[0].sigmoid() if len(logits) == 1 else 1 - logits.softmax(0)[0]
        return probability[tuple(slice(n) for n in size)] > self.threshold

    def _segment(self, crop: torch.Tensor, spacing_mm: Sequence[float], predictor: Callable) -> torch.Tensor:
        """Logits of one crop in shape (C, spatial), on the crop's grid."""
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

    @staticmethod
    def _name(inputs: torch.Tensor, index: int) -> str:
        """File of an item of the batch, or its number."""
        files = inputs.meta.get("filename_or_obj") if isinstance(inputs, MetaTensor) else None
        return str(ensure_tuple(files)[index]) if files else f"item {index} of the batch"

    def _spacings(self, inputs: torch.Tensor, spatial_dims: int) -> list[tuple[float, ...]]:
        """Spacing of each item, in mm."""
        if self.input_spacing_mm is not None:
            return [per_axis("input_spacing_mm", self.input_spacing_mm, spatial_dims)] * len(inputs)
        if not isinstance(inputs, MetaTensor):
            return [(1.0,) * spatial_dims] * len(inputs)
        affines = inputs.affine if inputs.affine.ndim == 3 else [inputs.affine] * len(inputs)
        return [tuple(affine_to_spacing(affine, spatial_dims).tolist()) for affine in affines]

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
        if any(not 0 <= axis < spatial_dims for axis in self.mirror_axes):
            raise ValueError(
                f"mirror_axes must be spatial axes from 0 to {spatial_dims - 1} for a {spatial_dims}D image, "
                f"got {self.mirror_axes}."
            )

    def _with_meta(self, output: torch.Tensor, inputs: MetaTensor) -> MetaTensor:
        found = {
            "notes": self.last_notes,
            "box_start": torch.tensor([start for start, _ in self.last_boxes]),
            "box_end": torch.tensor([end for _, end in self.last_boxes]),
        }
        if not inputs.is_batch and len(inputs) == 1:  # `image[None]`: its meta data is one image's
            found = {key: value[0] for key, value in found.items()}
        output = MetaTensor(output).copy_meta_from(inputs)
        output.meta.update(found)
        return output


def _applied(transform: Callable | None, x: torch.Tensor) -> torch.Tensor:
    """The transform of a float32 image, as a plain tensor; the image itself stays as it is."""
    if transform is None:
        return x
    # MONAI's intensity transforms may write into what they get
    return convert_to_tensor(transform(x.clone()), track_meta=False)


def _any_below(values: Sequence[float], limits: Sequence[float]) -> bool:
    return any(value < limit for value, limit in zip(values, limits, strict=True))
