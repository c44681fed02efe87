"""A bundle as a function of arrays and files."""

from __future__ import annotations

import os
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

from segbundles.errors import fail
from segbundles.handlers import WeightsLoader
from segbundles.networks import load_weights
from segbundles.transforms import SaveSegmentationd

__all__ = ["Segmenter"]


class Segmenter:
    """Segment arrays as a bundle's ``inference.json`` segments files.

    Networks, weights, preprocessing, inferer and postprocessing are those of the JSON; nothing is written. Networks are
    loaded once, when it is made.

    Args:
        bundle_root: folder of the bundle.
        settings: what to change in ``inference.json``, as after ``monai.bundle run``; ``True``, ``False`` and ``None``
            in place of the words.

    Raises:
        ValueError: when the folder is no bundle, or weights are missing or of another architecture.
        RuntimeError: of MONAI, when ``initialize`` of the JSON refuses a setting; the ``ValueError`` is its cause.

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
            fail(f"{bundle_root} is no bundle, it has no configs/inference.json: give the folder that holds configs.")
        parser = ConfigParser()
        parser.read_config(str(config))
        given = {
            name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in settings.items()
        }
        parser.update({**given, "bundle_root": str(root)})
        parsed = parser.get_parsed_content
        parsed("initialize")
        self.name = root.name
        self.device = parsed("device")
        self.network = parsed("network").eval()
        for handler in parsed("handlers"):
            if isinstance(handler, WeightsLoader) and handler.path is not None:
                load_weights(handler.network, handler.path)
        self.inferer = parsed("inferer")
        steps = parsed("preprocessing").flatten().transforms
        self.reads = next(step for step in steps if isinstance(step, LoadImaged))
        self.oriented = any(isinstance(step, Orientationd) for step in steps)
        self.preprocessing = Compose([step for step in steps if step is not self.reads])
        steps = parsed("postprocessing").flatten().transforms
        self.keys = [key for step in steps if isinstance(step, SaveSegmentationd) for key in step.keys]
        self.postprocessing = Compose([step for step in steps if not isinstance(step, SaveSegmentationd)])

    def __call__(self, image: np.ndarray | PathLike, affine: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Segment one image.

        Args:
            image: path of a file, or of the folder of a DICOM series, in the bundle's formats; or an array,
                (channels, x, y) or (channels, x, y, z), grey levels or colours as they are in a file. Of an array
                with rows first, such as ``numpy.asarray`` of a PIL image gives, this is the transpose.
            affine: (4, 4), from voxels to mm with the axes right, anterior, superior, as nibabel has it. May be left
                out for images that are not in a patient's axes.

        Returns:
            What would be written, by its key, in shape (x, y) or (x, y, z): ``"pred"``, the class indices, and
            ``"cells"``, numbered from 1, where the bundle makes them.

        Raises:
            ValueError: when the file cannot be read, the type is not the bundle's, or the affine is missing.
            RuntimeError: of MONAI, when preprocessing refuses the image; the ``ValueError`` is its cause.
        """
        if isinstance(image, str | os.PathLike):
            if affine is not None:
                fail(f"{image} is a file and brings its own affine: leave affine out.")
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
        # (1, spatial), or (spatial) where the JSON has squeezed it for MONAI Label
        return {key: item[key].numpy(force=True).reshape(item[key].shape[-rank:]) for key in self.keys}

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
