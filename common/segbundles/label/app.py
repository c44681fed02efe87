"""The app that the server of ``segbundles label`` runs; it is imported only in MONAI Label's environment."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import SimpleITK as sitk  # noqa: N813
from fastapi import HTTPException
from monailabel.config import settings
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.activelearning.random import Random
from monailabel.tasks.infer.bundle import BundleInferTask
from monailabel.tasks.train.bundle import BundleTrainTask
from PIL import ExifTags, Image

import segbundles
from segbundles.confidence import confidence_columns
from segbundles.data import file_suffix
from segbundles.data.base import ITK, NIFTI, PIL, TIFF
from segbundles.errors import fail, innermost
from segbundles.facts import read_facts, sha256
from segbundles.label.server import MEMBERS
from segbundles.networks import load_weights

logger = logging.getLogger(__name__)

#: where the datastore keeps the confidence of each bundle in an image
SCORES = "confidence_of"


class BundlesApp(MONAILabelApp):
    """Serve the bundles in ``app_dir/model`` that ``conf["models"]`` names.

    Args:
        app_dir: folder of the app.
        studies: folder of the images.
        conf: configuration of the app.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        names = conf["models"].split(",")
        self.bundles = {name: os.path.join(app_dir, "model", name) for name in names}  # noqa: PTH118
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name="segbundles",
            description="Segmentation bundles: " + ", ".join(self.bundles),
            version=segbundles.__version__,
        )

    def init_infers(self) -> dict[str, BundleInferTask]:
        """Return one inference task per bundle."""
        return {name: GridInferTask(root, self.conf, load_strict=True) for name, root in self.bundles.items()}

    def init_trainers(self) -> dict[str, BundleTrainTask]:
        """Return one training task per bundle."""
        return {name: ReasonTrainTask(root, self.conf) for name, root in self.bundles.items()}

    def init_strategies(self) -> dict[str, Any]:
        """Return the ways to choose the client's next sample."""
        certain = {f"least_certain_{name}": LeastCertainFirst(name) for name in self.bundles}
        return {"first": First(), "random": Random(), **certain}

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        """Return one scoring method per bundle."""
        return {name: ConfidenceScoring(name, self._infers[name]) for name in self.bundles}

    def init_datastore(self) -> LocalDatastore:
        """Return the datastore, which keeps labels in the image's own pixels."""
        return PixelDatastore(
            self.studies,
            extensions=settings.MONAI_LABEL_DATASTORE_FILE_EXT,
            auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
        )

    def infer(self, request: dict[str, Any], datastore: LocalDatastore | None = None) -> dict[str, Any]:
        """Segment an image; if it fails, the client gets the reason."""
        try:
            return super().infer(request, datastore)
        except Exception as error:
            logger.exception("Inference failed")
            raise HTTPException(500, innermost(error)) from error


class GridInferTask(BundleInferTask):
    """Run a bundle's inference, and answer on the grid on which clients show the image.

    TIFF and JPEG files may contain a resolution. Bundles ignore it and count pixels; ITK and 3D Slicer use it as the
    spacing. Weights that fit only in part are refused. The answer's parameters have the measurements of the mask.
    """

    def run_inferer(self, data: dict[str, Any], convert_to_batch: bool = True, device: str = "cuda") -> dict[str, Any]:
        """Run the network on one image."""
        if turned := _turned(data.get("image_path", "")):
            fail(turned)
        try:
            return super().run_inferer(data, convert_to_batch, device)
        except RuntimeError:
            if self.network is not None:  # if it is about the weights, say it in one line
                load_weights(copy.deepcopy(self.network), self.get_path())
            raise

    def writer(self, data: dict[str, Any], extension: str | None = None, dtype: Any = None) -> tuple[Any, Any]:
        """Write the answer to a file."""
        path, params = super().writer(data, extension, dtype)
        image = data.get("image_path")
        if isinstance(path, str) and image and _in_pixels(image) and file_suffix(path) in (*NIFTI, *ITK):
            _, spacing = _header(image)
            answer = sitk.ReadImage(path)
            answer.SetSpacing([*spacing, 1.0][: answer.GetDimension()])
            sitk.WriteImage(answer, path)
        measured = {key: value for key, value in data.get("measurements", {}).items() if key != "table"}
        return path, {**params, "measurements": measured, **confidence_columns(data)}

    def confidence(self, image: str) -> float:
        """Return the confidence of a bundle in its mask of an image.

        Args:
            image: path of the image.

        Raises:
            ValueError: when the bundle's ``inference.json`` gives no confidence.
        """
        _, data = self({"image": image, "skip_writer": True})
        if data.get("confidence") is None:
            fail(f"{Path(self.bundle_path).name} gives no confidence: its inference.json does not compute one.")
        return float(data["confidence"])

    def weights_digest(self) -> str:
        """Return what changes when the served weights do."""
        models = Path(self.bundle_path, "models")
        return " ".join(sha256(path)[:16] for path in (models / "model.pt", *sorted(models.glob(MEMBERS))))


class ConfidenceScoring(ScoringMethod):
    """Segment every image without a final label, and keep the bundle's confidence in the datastore.

    An image is segmented again only when the weights have changed. One that cannot be segmented gets no score, and the
    reason instead.

    Args:
        name: name of the bundle.
        task: its inference.
    """

    def __init__(self, name: str, task: GridInferTask) -> None:
        super().__init__(f"Confidence of {name} in its masks of the images that are not labelled yet")
        self.name = name
        self.task = task

    def __call__(self, request: dict[str, Any], datastore: LocalDatastore) -> dict[str, Any]:
        """Score the images, and return how many were scored, failed, or had a score already."""
        self.task.clear_cache()  # a training may have replaced the weights
        digest, counts = self.task.weights_digest(), {"scored": 0, "failed": 0, "skipped": 0}
        for image in datastore.get_unlabeled_images():
            kept = datastore.get_image_info(image).get(SCORES, {})
            if kept.get(self.name, {}).get("weights") == digest:
                counts["skipped"] += 1
                continue
            try:
                found = {"confidence": self.task.confidence(datastore.get_image_uri(image))}
                counts["scored"] += 1
            except Exception as error:
                found = {"confidence": None, "reason": innermost(error)}
                counts["failed"] += 1
                logger.warning(f"{image} has no confidence: {found['reason']}")
            own = {**found, "weights": digest, "ts": int(time.time())}
            datastore.update_image_info(image, {SCORES: {**kept, self.name: own}})
        logger.info(f"Confidence of {self.name}: {counts}")
        return counts


class LeastCertainFirst(Strategy):
    """Choose the image without a final label in whose mask a bundle has the least confidence.

    Images that this strategy has already served since they were scored come after all others, in the order in which
    they were served; images without a score come last.

    Args:
        name: name of the bundle.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"The image of which {name} is the least certain")
        self.name = name

    def __call__(self, request: dict[str, Any], datastore: LocalDatastore) -> dict[str, Any] | None:
        """Return the image, and its confidence if it has one."""
        found = []
        for image in datastore.get_unlabeled_images(request.get("label_tag"), request.get("labels")):
            info = datastore.get_image_info(image)
            score = info.get(SCORES, {}).get(self.name, {})
            confidence, served = score.get("confidence"), info.get("strategy", {}).get(request["strategy"], {})
            since = served.get("ts", 0) if served.get("ts", 0) >= score.get("ts", 0) else 0
            found.append((confidence is None, since, confidence or 0.0, image))
        if not found:
            return None
        missing, _, confidence, image = min(found)
        return {"id": image} if missing else {"id": image, "confidence": confidence}


class ReasonTrainTask(BundleTrainTask):
    """Run a bundle's training in a process of its own, with the facts of the weights that are served.

    If it fails, its last line, which clients see, is the reason.
    """

    def __call__(self, request: dict[str, Any], datastore: LocalDatastore) -> dict[str, Any]:
        """Train on the labels of the datastore."""
        try:
            return super().__call__(request, datastore)
        except Exception as error:
            logger.exception("Training failed")
            raise SystemExit(f"Training failed: {innermost(error)}") from error

    def _update_overrides(self, overrides: dict[str, Any]) -> dict[str, Any]:
        weights = Path(self.bundle_path, "models", "model.pt")
        facts = (read_facts(weights) if weights.is_file() else None) or {"knobs": {}}
        overrides.update({name: value for name, value in facts["knobs"].items() if name in self.bundle_config.config})
        return overrides


class PixelDatastore(LocalDatastore):
    """Keep labels of 2D images and stacks as pixels, in whatever format clients send them.

    3D Slicer sends NIfTI or NRRD, with the spacing and the axes that it gave the image.
    """

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Save a label."""
        image = self.get_image_uri(image_id)
        if not image or not _in_pixels(image) or _in_pixels(label_filename):
            return super().save_label(image_id, label_filename, label_tag, label_info)
        if turned := _turned(image):
            raise HTTPException(400, turned)
        label = sitk.ReadImage(label_filename)
        if label.GetNumberOfComponentsPerPixel() > 1 or label.GetDimension() > 3:
            raise HTTPException(400, f"The label of {image_id} has overlapping segments: save them as one label map.")
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
    """Return whether a file has a format of 2D images, for which bundles count pixels."""
    return file_suffix(path) in (*TIFF, *PIL)


def _turned(path: str | os.PathLike) -> str:
    """Return why an image cannot be labelled, because ITK and 3D Slicer show it as it is stored; empty if it can be."""
    if not path or not _in_pixels(path):
        return ""
    with suppress(OSError), Image.open(path) as image:  # Pillow does not know every TIFF
        if image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1):
            return (
                f"{Path(path).name} has an orientation tag, which 3D Slicer ignores, so that masks would not fit: save "
                "the picture upright."
            )
    return ""


def _header(path: str) -> tuple[Sequence[int], Sequence[float]]:
    """Return the size and spacing that ITK reads."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    reader.ReadImageInformation()
    return reader.GetSize(), reader.GetSpacing()
