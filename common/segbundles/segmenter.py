"""Use a bundle as a function of arrays and files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.config import PathLike
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.transforms import Compose, LoadImaged, Orientationd
from monai.utils import CommonKeys as Keys
from monai.utils import MetaKeys

from segbundles.confidence import confidence_columns
from segbundles.errors import fail, unwrapped
from segbundles.handlers import WeightsLoader
from segbundles.transforms import SaveOutputd

__all__ = ["Segmenter"]


class Segmenter:
    """Segment arrays as a bundle's ``inference.json`` segments files.

    Networks, weights, preprocessing, inferer and postprocessing are those of the JSON; nothing is written. The networks
    are loaded once, by the constructor. Knobs that are facts of the weights, such as the width of the network, have the
    values that the weights were trained with. Several weights, ``weights=["a.pt", "b.pt"]``, are an ensemble.

    Args:
        bundle_root: folder of the bundle.
        settings: knobs of ``inference.json`` to change, such as ``weights="mine.pt"`` or ``amp=False``.

    Raises:
        ValueError: when the folder is not a bundle, or weights are missing or have another architecture.
        RuntimeError: from MONAI, when ``initialize`` of the JSON refuses a setting; the ``ValueError`` is its cause.

    Example:
        >>> import numpy as np
        >>> segment = Segmenter("bundles/polyp_fcn8")  # doctest: +SKIP
        >>> segment(np.zeros((3, 384, 288), np.uint8))["pred"].shape  # doctest: +SKIP
        (384, 288)
    """

    def __init__(self, bundle_root: PathLike, **settings: Any) -> None:
        root = Path(bundle_root).resolve()
        config = root / "configs" / "inference.json"
        if not config.is_file():
            fail(f"{bundle_root} is not a bundle, it has no configs/inference.json: give the folder with configs.")
        # settle() finds what was given under this name
        override = {**settings, "bundle_root": root}
        override = {name: os.fspath(value) if isinstance(value, Path) else value for name, value in override.items()}
        parser = ConfigParser()
        parser.read_config(str(config))
        parser.update(override)
        parsed = parser.get_parsed_content
        parsed("initialize")
        self.name = root.name
        self.device = parsed("device")
        self.network = parsed("network").eval()
        for handler in parsed("handlers"):
            if isinstance(handler, WeightsLoader):
                handler()
        self.inferer = parsed("inferer")
        steps = parsed("preprocessing").flatten().transforms
        self.reads = next(step for step in steps if isinstance(step, LoadImaged))
        self.oriented = any(isinstance(step, Orientationd) for step in steps)
        self.preprocessing = Compose([step for step in steps if step is not self.reads])
        steps = parsed("postprocessing").flatten().transforms
        written = [key for step in steps if isinstance(step, SaveOutputd) for key in step.keys]
        self.keys = list(dict.fromkeys(written))
        self.postprocessing = Compose([step for step in steps if not isinstance(step, SaveOutputd)])

    @unwrapped
    def __call__(
        self, image: np.ndarray | PathLike | Sequence[PathLike], affine: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Segment one image.

        Args:
            image: path of a file in one of the bundle's formats, or of the folder of a DICOM series, or a list of one
                for each channel; or an array (channels, x, y) or (channels, x, y, z) of grey levels or colours, as in a
                file. An array with the rows first, such as ``numpy.asarray`` of a PIL image, must be transposed.
            affine: (4, 4), from voxels to mm with the axes right, anterior, superior, as in nibabel. It may be left out
                for images without a patient's axes.

        Returns:
            The results that inference would write, by their key, (x, y) or (x, y, z): ``"pred"``, the class indices;
            ``"cells"``, numbered from 1, if the bundle finds cells; and, with the knob ``save_probabilities``,
            ``"prob"``, the probability of each class, with the classes as first axis; with ``save_uncertainty``,
            ``"uncertainty"``, 0 to 1. ``"measurements"`` is what ``measurements.json`` has for one image, unless that
            knob is off; cells are in its ``"table"``. ``"confidence"``, ``"confidence_low"``,
            ``"confidence_calibrated"`` and ``"review"`` are those of ``inference.csv``.

        Raises:
            ValueError: when the file cannot be read, the array has another type than the bundle's images, the affine is
                missing, or preprocessing refuses the image.
        """
        paths = image if isinstance(image, list | tuple) and image else [image]
        if all(isinstance(path, str | os.PathLike) for path in paths):
            if affine is not None:
                fail(f"{image} is a file with its own affine: leave affine out.")
            tensor = self.reads({Keys.IMAGE: image})[Keys.IMAGE]
            rank = len(tensor.meta[MetaKeys.SPATIAL_SHAPE])
        else:
            tensor = self._tensor(image, affine)
            rank = tensor.ndim - 1
        batch = list_data_collate([self.preprocessing({Keys.IMAGE: tensor})])
        with torch.no_grad():
            batch[Keys.PRED] = self.inferer(batch[Keys.IMAGE].to(self.device), self.network)
        (item,) = decollate_batch(batch)
        item = self.postprocessing(item)
        results = {key: item[key].numpy(force=True) for key in self.keys}
        # (1, spatial), or (spatial) if the JSON has squeezed it for MONAI Label
        results = {key: value[0] if value.ndim > rank and len(value) == 1 else value for key, value in results.items()}
        return results | {key: item[key] for key in ("measurements", *confidence_columns(item)) if key in item}

    def _tensor(self, image: np.ndarray, affine: np.ndarray | None) -> MetaTensor:
        dtype, given = np.dtype(self.reads._loader.dtype), np.asarray(image)
        if dtype.kind == "u" and given.dtype != dtype:
            fail(f"{self.name} takes images of {dtype}, got {given.dtype}: convert it (0 .. {np.iinfo(dtype).max}).")
        if affine is None and self.oriented:
            fail(f"{self.name} needs the affine (4, 4) of an image, from voxels to mm in RAS: an array has no axes.")
        return MetaTensor(
            torch.from_numpy(given.astype(dtype)),
            affine=None if affine is None else torch.as_tensor(np.array(affine, dtype=np.float64)),
            meta={MetaKeys.ORIGINAL_CHANNEL_DIM: 0},
        )
