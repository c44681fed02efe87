"""Store one volume with its axes in all 48 orders, segment each, and compare the masks voxel for voxel.

    python benchmarks/axis_orders.py BUNDLE IMAGE [--knob value ...]

Each volume is NIfTI; the masks are compared after reorientation. Exit status 1 if any two differ.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np


def main() -> None:
    """Run the command and print the table."""
    if len(sys.argv) < 3 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    bundle, source = Path(sys.argv[1]), sys.argv[2]
    from segbundles.data import SuffixReader

    array, meta = SuffixReader().get_data(SuffixReader().read(source))
    image = nib.as_closest_canonical(nib.Nifti1Image(array, meta["affine"]))
    with tempfile.TemporaryDirectory() as folder:
        images, masks = Path(folder) / "images", Path(folder) / "masks"
        images.mkdir()
        orders = [
            "".join(code)
            for letters in itertools.permutations(("LR", "PA", "IS"))
            for code in itertools.product(*letters)
        ]
        for order in orders:
            turn = nib.orientations.ornt_transform(
                nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(order)
            )
            nib.save(image.as_reoriented(turn), images / f"{order}.nii.gz")
        command = ["inferring", "--bundle_root", str(bundle), "--config_file", str(bundle / "configs/inference.json")]
        command += ["--dataset_dir", str(images), "--output_dir", str(masks), *sys.argv[3:]]
        subprocess.run([sys.executable, "-m", "monai.bundle", "run", *command], check=True)
        different = 0
        first: np.ndarray | None = None
        print("| axes | foreground voxels | voxels that differ from the first |\n|---|---|---|")
        for order in orders:
            mask = np.asarray(nib.as_closest_canonical(nib.load(masks / f"{order}_seg.nii.gz")).dataobj)
            first = mask if first is None else first
            apart = int((mask != first).sum())
            different += apart > 0
            print(f"| {order} | {int((mask > 0).sum())} | {apart} |")
    print(f"{len(orders) - different} of {len(orders)} masks agree")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
