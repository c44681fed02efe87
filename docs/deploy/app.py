"""Segment a NIfTI volume with a bundle in MONAI Deploy: cd BUNDLE; python app.py IMAGE OUTPUT.

The source stands for the DICOM operators of a real application: it gives the same kind of image.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.deploy.conditions import CountCondition
from monai.deploy.core import AppContext, Application, Image, IOType, Operator, OperatorSpec
from monai.deploy.operators.monai_bundle_inference_operator import (
    BundleConfigNames,
    IOMapping,
    MonaiBundleInferenceOperator,
)

SOURCE, TARGET = sys.argv[1:]


class Source(Operator):
    """Read the volume."""

    def setup(self, spec: OperatorSpec) -> None:
        """Name the output."""
        spec.output("image")

    def compute(self, op_input, op_output, context) -> None:
        """Give an image like that of a DICOM series: slices first, and an affine in LPS."""
        volume = nib.load(SOURCE)
        spacing = nib.affines.voxel_sizes(volume.affine)
        metadata = {
            "dicom_affine_transform": np.diag([-1, -1, 1, 1]) @ volume.affine,
            "nifti_affine_transform": volume.affine,
            **dict(zip(("col_pixel_spacing", "row_pixel_spacing", "depth_pixel_spacing"), spacing, strict=True)),
        }
        op_output.emit(Image(np.asarray(volume.dataobj, np.float32).T, metadata), "image")


class Target(Operator):
    """Write the mask."""

    def setup(self, spec: OperatorSpec) -> None:
        """Name the input."""
        spec.input("pred")

    def compute(self, op_input, op_output, context) -> None:
        """Write the mask on the grid of the volume."""
        mask = op_input.receive("pred").asnumpy().T
        nib.save(nib.Nifti1Image(mask, nib.load(SOURCE).affine), TARGET)


class App(Application):
    """Source, bundle, target."""

    def compose(self) -> None:
        """Connect the operators."""
        source = Source(self, CountCondition(self, 1), name="source")
        segment = MonaiBundleInferenceOperator(
            self,
            # by default, the operator would take the folder `models` for the bundle
            app_context=AppContext({"model": str(Path("no_model").absolute())}),
            input_mapping=[IOMapping("image", Image, IOType.IN_MEMORY)],
            output_mapping=[IOMapping("pred", Image, IOType.IN_MEMORY)],
            bundle_path=Path.cwd(),
            bundle_config_names=BundleConfigNames(config_names=["inference", "deploy"]),
            name="segment",
        )
        self.add_flow(source, segment, {("image", "image")})
        self.add_flow(segment, Target(self, name="target"), {("pred", "pred")})


if __name__ == "__main__":
    App().run()
