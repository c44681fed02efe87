"""The app that the server of ``segbundles label`` runs; imported in MONAI Label's environment alone."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import SimpleITK as sitk  # noqa: N813
from fastapi import HTTPException
from monailabel.config import settings
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.app import MONAILabelApp
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.activelearning.random import Random
from monailabel.tasks.infer.bundle import BundleInferTask
from monailabel.tasks.train.bundle import BundleTrainTask

import segbundles
from segbundles.data import file_suffix
from segbundles.data.readers import ITK, NIFTI, PIL, TIFF
from segbundles.errors import innermost

logger = logging.getLogger(__name__)


class BundlesApp(MONAILabelApp):
    """MONAI Label over bundles in ``app_dir/model``, those that ``conf["models"]`` names."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        """As MONAI Label asks for."""
        self.bundles = {name: os.path.join(app_dir, "model", name) for name in conf["models"].split(",")}  # noqa: PTH118
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name="segbundles",
            description="Segmentation bundles: " + ", ".join(self.bundles),
            version=segbundles.__version__,
        )

    def init_infers(self) -> dict[str, BundleInferTask]:
        """One a bundle."""
        return {name: GridInferTask(root, self.conf) for name, root in self.bundles.items()}

    def init_trainers(self) -> dict[str, BundleTrainTask]:
        """One a bundle."""
        return {name: ReasonTrainTask(root, self.conf) for name, root in self.bundles.items()}

    def init_strategies(self) -> dict[str, Any]:
        """How the client's 'next sample' is chosen."""
        return {"first": First(), "random": Random()}

    def init_datastore(self) -> LocalDatastore:
        """Labels in the image's own pixels."""
        return PixelDatastore(
            self.studies,
            extensions=settings.MONAI_LABEL_DATASTORE_FILE_EXT,
            auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
        )

    def infer(self, request: dict[str, Any], datastore: LocalDatastore | None = None) -> dict[str, Any]:
        """Segment; what goes wrong is told to the client."""
        try:
            return super().infer(request, datastore)
        except Exception as error:
            logger.exception("Inference failed")
            raise HTTPException(500, innermost(error)) from error


class GridInferTask(BundleInferTask):
    """A bundle's inference, its answer on the grid where clients have the image.

    TIFF and JPEG may tell a resolution. Bundles count pixels there, ITK and 3D Slicer take it for the spacing.
    """

    def writer(self, data: dict[str, Any], extension: str | None = None, dtype: Any = None) -> tuple[Any, Any]:
        """Write the answer."""
        path, params = super().writer(data, extension, dtype)
        image = data.get("image_path")
        if isinstance(path, str) and image and _in_pixels(image) and file_suffix(path) in (*NIFTI, *ITK):
            _, spacing = _header(image)
            answer = sitk.ReadImage(path)
            answer.SetSpacing([*spacing, 1.0][: answer.GetDimension()])
            sitk.WriteImage(answer, path)
        return path, params


class ReasonTrainTask(BundleTrainTask):
    """A bundle's training, a process of its own; the last of its lines, which clients see, tells why it failed."""

    def __call__(self, request: dict[str, Any], datastore: LocalDatastore) -> dict[str, Any]:
        """Train."""
        try:
            return super().__call__(request, datastore)
        except Exception as error:
            logger.exception("Training failed")
            raise SystemExit(f"Training failed: {innermost(error)}") from error


class PixelDatastore(LocalDatastore):
    """A folder of images and labels; labels of 2D images and stacks, however clients send them, are kept as pixels.

    3D Slicer sends NIfTI or NRRD, with the spacing and the axes that it gave the image.
    """

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Keep a label."""
        image = self.get_image_uri(image_id)
        if not image or not _in_pixels(image) or _in_pixels(label_filename):
            return super().save_label(image_id, label_filename, label_tag, label_info)
        label = sitk.ReadImage(label_filename)
        if label.GetNumberOfComponentsPerPixel() > 1 or label.GetDimension() > 3:
            raise HTTPException(400, f"The label of {image_id} has segments that overlap: save one map of them.")
        if label.GetDimension() == 3:
            label = sitk.DICOMOrient(label, "LPS")
        size, _ = _header(image)
        if [*label.GetSize(), 1][:3] != [*size, 1][:3]:
            raise HTTPException(400, f"The label of {image_id} has size {label.GetSize()}, its image {size}.")
        pages = label.GetDimension() == 3 and label.GetSize()[2] > 1
        if label.GetDimension() == 3 and not pages:
            label = label[:, :, 0]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ("label.tif" if pages else "label.png")
            sitk.WriteImage(sitk.Cast(label, sitk.sitkUInt8), str(path))
            return super().save_label(image_id, str(path), label_tag, label_info)


def _in_pixels(path: str | os.PathLike) -> bool:
    """Whether a file's format is one of 2D images, whose bundles know no spacing."""
    return file_suffix(path) in (*TIFF, *PIL)


def _header(path: str) -> tuple[Sequence[int], Sequence[float]]:
    """Size and spacing as ITK has them."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    reader.ReadImageInformation()
    return reader.GetSize(), reader.GetSpacing()
