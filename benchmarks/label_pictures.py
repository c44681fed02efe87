"""Make the pictures of docs/monai_label.md: the answers of a MONAI Label server, compared with the truth.

    python benchmarks/label_pictures.py --samples SAMPLES --out docs

SAMPLES contains the folders `Task02_Heart`, `kaggle_3m`, `isbi2012` and `CVC-ClinicDB`, in their publishers' layouts.
Missing folders and bundles without weights are left out. It starts the server of `segbundles label` on a free port,
sends requests like 3D Slicer, writes `monai_label_<bundle>.jpeg`, and prints Dice and seconds per case.
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import requests
import SimpleITK as sitk  # noqa: N813
import tifffile

from segbundles.data import FrameReader, file_suffix
from segbundles.label import LabelServer, find_bundles, make_environment
from segbundles.report import case_figure


def cases(samples: Path) -> Iterator[tuple[str, Path, sitk.Image, np.ndarray]]:
    """Yield bundle, file, image, and truth in ITK's order of axes, (z, y, x) or (y, x)."""
    for path in sorted((samples / "Task02_Heart" / "imagesTr").glob("la_*.nii.gz"))[:1]:
        truth = sitk.GetArrayFromImage(sitk.ReadImage(str(path.parents[1] / "labelsTr" / path.name)))
        yield "left_atrium_vnet", path, sitk.ReadImage(str(path)), truth > 0
    masks = {path: tifffile.imread(path) > 0 for path in sorted((samples / "kaggle_3m").rglob("*_mask.tif"))}
    if masks:
        mask = max(masks, key=lambda path: np.count_nonzero(masks[path]))
        path = mask.with_name(mask.name.replace("_mask", ""))
        yield "brain_flair_unet", path, sitk.ReadImage(str(path)), masks[mask]
    for path in (samples / "isbi2012").glob("train-volume.tif"):
        truth = tifffile.imread(path.with_name("train-labels.tif"))[0]
        yield "em_membrane_unet", path, sitk.ReadImage(str(path))[:, :, 0], truth > 0
    for path in sorted((samples / "CVC-ClinicDB" / "Original").glob("*.tif"))[:1]:
        truth = tifffile.imread(samples / "CVC-ClinicDB" / "Ground Truth" / path.name)
        # SimpleITK reads the colours of these TIFF files, which are stored one after the other, as interleaved
        reader = FrameReader()
        frame = np.ascontiguousarray(reader.get_data(reader.read(path))[0].transpose(1, 0, 2))
        yield "polyp_fcn8", path, sitk.GetImageFromArray(frame, isVector=True), truth > 0


def main() -> None:
    """Write the pictures and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--environment", type=Path, help="as for segbundles label")
    options = parser.parse_args()
    python = make_environment(options.environment)
    bundles, _ = find_bundles()
    with socket.socket() as probe, tempfile.TemporaryDirectory() as studies:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        found = [case for case in cases(options.samples) if case[0] in bundles]
        for bundle, path, image, _ in found:
            sitk.WriteImage(image, str(Path(studies) / f"{bundle}{file_suffix(path)}"))
        with LabelServer(python, studies, bundles, port=port) as server:
            server.wait_until_ready()
            print("| bundle | case | Dice | seconds |\n|---|---|---|---|")
            for bundle, path, image, truth in found:
                since = time.perf_counter()
                answer = requests.post(
                    f"{server.url}/infer/{bundle}",
                    params={"image": bundle, "output": "image"},
                    data={"params": json.dumps({"result_extension": ".nrrd", "result_dtype": "uint8"})},
                    timeout=3600,
                )
                answer.raise_for_status()
                seconds = time.perf_counter() - since
                file = Path(studies) / "answer.nrrd"
                file.write_bytes(answer.content)
                mask = sitk.GetArrayFromImage(sitk.ReadImage(str(file))).reshape(truth.shape)
                dice = 2 * np.count_nonzero(truth & (mask > 0)) / max(np.count_nonzero(truth) + mask.sum(), 1)
                name = f"{path.parent.name}/{path.name}"
                print(f"| {bundle} | {name} | {dice:.3f} | {seconds:.1f} |", flush=True)
                picture = draw(image, truth, mask)
                (options.out / f"monai_label_{bundle}.jpeg").write_bytes(picture)


def draw(image: sitk.Image, truth: np.ndarray, mask: np.ndarray) -> bytes:
    """Return a JPEG of the image with truth and answer outlined."""
    pixels = sitk.GetArrayFromImage(image)
    pixels = pixels.transpose(2, 1, 0) if image.GetNumberOfComponentsPerPixel() > 1 else pixels.T
    return case_figure(pixels, truth.T.astype(int), mask.T.astype(int), spacing_mm=image.GetSpacing())


if __name__ == "__main__":
    main()
