"""Compare two-stage inference with MONAI's sliding window: time and peak memory for one volume, with the same V-Net.

The volume contains one bright ellipsoid, as large as an atrium in a thorax. The V-Nets have random weights. The locator
runs its V-Net, which takes the time that it would really take, but returns the known answer (what is bright). Each
variant has its own process. The memory is the peak of that process, minus what it used before (volume and weights).

    python benchmarks/two_stage.py
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SlidingWindowInferer
from torch import nn

from segbundles.inferers import LocatorCropInferer
from segbundles.meta import box_of
from segbundles.networks import AttentionVNet

SPACING_MM = 0.625
LOCATOR_SPACING_MM = (2.5, 2.5, 1.25)
MARGIN_MM = 5.0
VARIANTS = ("two-stage", "sliding window")


class AnsweredLocator(nn.Module):
    """Run a V-Net, and return the logits of what is bright instead of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.network = AttentionVNet()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x) * 0 + 40 * (x - 0.5)


def make_volume(size: tuple[int, ...], extent: tuple[int, ...]) -> np.ndarray:
    """Return noise around 0.2 with an ellipsoid of 0.9, ``extent`` voxels long and beside the centre; float32."""
    volume = np.random.default_rng(0).random(size, dtype=np.float32)
    volume *= 0.4
    axes = np.ogrid[tuple(map(slice, size))]
    inside = sum(((x - 0.55 * n) / (0.5 * e)) ** 2 for x, n, e in zip(axes, size, extent, strict=True)) < 1
    volume[inside] = 0.9
    return volume


def peak_bytes() -> int:
    """Return the peak memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def run_variant(variant: str, file: Path, roi_size: list[int]) -> dict:
    """Run one variant on the volume in a file, and return its time, memory and passes."""
    torch.manual_seed(0)
    volume = torch.from_numpy(np.load(file))[None, None]
    inputs = MetaTensor(volume, affine=torch.diag(torch.tensor([SPACING_MM] * 3 + [1.0])))
    network = AttentionVNet().eval()
    inferer: Inferer
    if variant == "two-stage":
        inferer = LocatorCropInferer(roi_size, AnsweredLocator(), LOCATOR_SPACING_MM, margin_mm=MARGIN_MM)
    else:
        inferer = SlidingWindowInferer(roi_size, sw_batch_size=1, overlap=0.25, mode="gaussian")
    passes = []
    network.register_forward_hook(lambda module, args, out: passes.append(tuple(out.shape[2:])))
    before, start = peak_bytes(), time.perf_counter()
    with torch.no_grad():
        out = inferer(inputs, network)
    seconds, peak = time.perf_counter() - start, peak_bytes()
    found = box_of(out)
    box = list(zip(*found, strict=True)) if found else None
    assert out.shape == inputs.shape
    return {"seconds": seconds, "bytes": peak - before, "passes": len(passes), "window": passes[0], "box": box}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=3, default=(640, 640, 88), help="voxels along x, y and z")
    parser.add_argument("--extent", type=int, nargs=3, default=(200, 120, 72), help="length of the object, in voxels")
    parser.add_argument("--roi_size", type=int, nargs=3, default=(224, 144, 96), help="largest crop, in voxels")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(run_variant(args.variant, args.file, list(args.roi_size))))
        return

    print(f"volume {tuple(args.size)} at {SPACING_MM} mm; the sliding window is as large as the crop")
    print(f"V-Net without trained weights on {torch.get_num_threads()} threads, float32")
    print(f"locator at {LOCATOR_SPACING_MM} mm: its V-Net runs, and its answer is replaced by the known object")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "volume.npy"
        np.save(file, make_volume(tuple(args.size), tuple(args.extent)))
        window = args.roi_size
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--variant", variant, "--file", str(file), "--roi_size"]
            done = subprocess.run([*command, *map(str, window)], check=True, stdout=subprocess.PIPE, text=True)
            results[variant] = json.loads(done.stdout.splitlines()[-1])
            window = results[variant]["window"]

    print(f"\n{'':16}{'seconds':>10}{'peak MiB':>10}{'passes':>8}  window")
    for variant, row in results.items():
        mib = row["bytes"] / 2**20
        print(f"{variant:16}{row['seconds']:10.1f}{mib:10.0f}{row['passes']:8d}  {tuple(row['window'])}")
    ours, theirs = (results[variant] for variant in VARIANTS)
    print(f"\nbox {' '.join(f'{a}:{b}' for a, b in ours['box'])}")
    print(f"two-stage: {theirs['seconds'] / ours['seconds']:.1f} times as fast, ", end="")
    print(f"{ours['bytes'] / theirs['bytes']:.2f} of the memory")


if __name__ == "__main__":
    main()
