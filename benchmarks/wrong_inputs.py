"""Give each bundle images that it was not made for, and print what it says about them.

Each row: the input, whether it was refused with an error or flagged for review, and the reason. The first row of a
bundle is a right input, which should not be flagged. `--record` keeps the rows in `docs/wrong_inputs.json` of the
bundle, from which the card is made. --samples is a folder with a few images of the four data sets in their
publishers' layouts: kaggle_3m, Task02_Heart, isbi2012 and CVC-ClinicDB.

    python benchmarks/wrong_inputs.py --samples DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage import data, draw
from skimage.transform import resize

from segbundles.data import read_frame
from segbundles.facts import read_facts
from segbundles.files import write_json
from segbundles.segmenter import Segmenter

ROOT = Path(__file__).resolve().parents[1]
RIGHT = {
    "brain_flair_unet": "brain MR",
    "left_atrium_vnet": "heart MR",
    "em_membrane_unet": "EM section",
    "polyp_fcn8": "colonoscopy frame",
}


def knee(size: int = 256) -> NDArray:
    """Draw two bones and a joint space in grey tissue."""
    image = np.full((size, size), 90.0)
    for row, radius in ((0.2, 0.3), (0.8, 0.28)):
        image[draw.ellipse(row * size, 0.5 * size, radius * size, 0.22 * size, image.shape)] = 200
    image[draw.ellipse(0.48 * size, 0.2 * size, 0.09 * size, 0.07 * size, image.shape)] = 190
    image[: size // 16] = image[-size // 16 :] = image[:, : size // 10] = image[:, -size // 10 :] = 0
    return image + np.random.default_rng(0).normal(0, 6, image.shape)


def stack(folder: Path) -> NDArray:
    """Read the slices of a patient as colours, (rows, columns, channels, slices)."""
    files = [path for path in folder.glob("*.tif") if not path.stem.endswith("_mask")]
    files.sort(key=lambda path: int(path.stem.rpartition("_")[2]))
    return np.stack([np.asarray(Image.open(path), float) for path in files], -1)


def pictures(samples: Path) -> dict[str, NDArray]:
    """Return the images by name: (x, y), (channels, x, y) or (channels, x, y, slices)."""
    brain = stack(next(path for path in sorted((samples / "kaggle_3m").iterdir()) if path.is_dir()))
    heart = nib.load(next((samples / "Task02_Heart" / "imagesTr").glob("*.nii.gz"))).get_fdata()
    frame = read_frame(min((samples / "CVC-ClinicDB" / "Original").glob("*.tif")))[0].astype(float)
    return {
        "brain MR": brain.transpose(2, 1, 0, 3),
        "heart MR": heart[None],
        "EM section": np.asarray(Image.open(samples / "isbi2012" / "train-volume.tif"), float).T,
        "colonoscopy frame": frame.transpose(2, 1, 0),
        "knee (drawn)": knee().T,
        "text page": data.page().T.astype(float),
        "photograph": data.astronaut().transpose(2, 1, 0).astype(float),
        "noise": np.random.default_rng(0).normal(120, 40, (256, 256)).clip(0, 255),
        "black image": np.zeros((256, 256)),
    }


def fitted(image: NDArray, channels: int, shape: tuple[int, ...]) -> NDArray:
    """Bring an image to the channels and the size of a bundle's own images."""
    image = image[None] if image.ndim == 2 else image
    if len(image) != channels:
        image = np.repeat(image.mean(0, keepdims=True), channels, 0)
    if len(shape) == 2 and image.ndim == 4:
        image = image[..., image.shape[-1] // 2]
    plane = image if len(shape) == 2 or image.ndim == 4 else image[..., None]
    if plane.ndim == 4 and plane.shape[-1] == 1:
        flat = resize(plane[..., 0], (channels, *shape[:2]), order=1)
        return np.repeat(flat[..., None], shape[2], -1)
    return resize(plane, (channels, *shape), order=1)


def inputs(bundle: str, found: dict[str, NDArray]) -> Iterator[tuple[str, NDArray]]:
    """Yield the name and the array of each input of a bundle, the right one first."""
    own = found[RIGHT[bundle]]
    own = own[None, ..., None] if own.ndim == 2 else own  # one section
    yield RIGHT[bundle], own
    if bundle == "brain_flair_unet":
        yield "T1 in place of FLAIR", own[[0, 0, 2]]
        yield "upside down (rows reversed)", own[:, :, ::-1]
    if bundle == "polyp_fcn8":
        yield "negative colours", 255 - own
    if bundle == "left_atrium_vnet":
        yield "negative grey levels", own.max() - own
    for name, image in found.items():
        if name != RIGHT[bundle]:
            yield name, fitted(image, len(own), own.shape[1:])


def judged(
    segment: Callable[..., dict[str, Any]], image: NDArray, affine: NDArray | None, dtype: Any
) -> dict[str, Any]:
    """Return what a bundle says about an image: ``outcome``, ``reason`` and ``confidence``."""
    try:
        result = segment(np.ascontiguousarray(image.astype(dtype)), affine)
    except ValueError as error:
        return {"outcome": "refused", "reason": str(error), "confidence": None}
    return {
        "outcome": "flagged" if result["review"] else "passed",
        "reason": result["review"],
        "confidence": result["confidence"],
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, required=True, help="folder with images of the four data sets")
    parser.add_argument("--bundles", nargs="+", default=[*RIGHT], choices=[*RIGHT])
    parser.add_argument("--ckpt_dir", type=Path, help="folder of the weights, of one bundle")
    parser.add_argument(
        "--record", action="store_true", help="write docs/wrong_inputs.json of each bundle, for the card"
    )
    args = parser.parse_args()
    found = pictures(args.samples)
    print("| bundle | input | kind | outcome | confidence | reason |\n|---|---|---|---|---|---|")
    for bundle in args.bundles:
        root, rows = ROOT / "bundles" / bundle, []
        models = args.ckpt_dir or root / "models"
        segment = Segmenter(root, ckpt_dir=str(models))
        for name, image in inputs(bundle, found):
            affine = None
            if bundle == "left_atrium_vnet":
                affine = nib.load(next((args.samples / "Task02_Heart" / "imagesTr").glob("*.nii.gz"))).affine
            elif bundle == "brain_flair_unet":
                affine = np.diag([-1.0, -1.0, 1.0, 1.0])
            row = judged(segment, image, affine, np.uint8 if bundle == "polyp_fcn8" else np.float32)
            rows.append({"input": name, "right": not rows, **row})
            sure = "" if row["confidence"] is None else f"{row['confidence']:.2f}"
            kind = "right" if rows[-1]["right"] else "wrong"
            print(f"| {bundle} | {name} | {kind} | {row['outcome']} | {sure} | {row['reason']} |", flush=True)
        if args.record:
            about = {"bundle": bundle, "weights_sha256": (read_facts(models / "model.pt") or {}).get("sha256")}
            write_json(root / "docs" / "wrong_inputs.json", {**about, "rows": rows})


if __name__ == "__main__":
    main()
