"""Time signed distance maps of an atrium-like volume with segbundles, scipy and MONAI.

Run: python benchmarks/distance_map.py [--threads N] [--repeats N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from monai.losses import BoundaryLoss as MonaiBoundaryLoss
from rich.console import Console
from rich.table import Table
from scipy.ndimage import distance_transform_edt

from segbundles.losses import BoundaryLoss
from segbundles.transforms.signed_distance import signed_distance_map

SHAPE = (96, 640, 640)
SPACINGS_MM = ((1.0, 1.0, 1.0), (2.5, 0.625, 0.625))


def atrium_like_mask() -> np.ndarray:
    """Return a lobed body with two tubes, about 1 % of the volume, like an atrium in its padded MR volume."""
    z, y, x = np.ogrid[tuple(slice(n) for n in SHAPE)]
    wobble = 1 + 0.3 * np.sin(y / 17) * np.cos(x / 13)
    body = ((z - 48) / 22) ** 2 + ((y - 300) / 70) ** 2 + ((x - 330) / 55) ** 2 < wobble
    tubes = ((z - 55) ** 2 + (y - 270) ** 2 < 90) & (abs(x - 330) < 110)
    return body | tubes


def scipy_map(mask: np.ndarray, spacing_mm: tuple[float, ...]) -> np.ndarray:
    inside = distance_transform_edt(mask, sampling=spacing_mm)
    outside = distance_transform_edt(~mask, sampling=spacing_mm)
    return np.where(mask, min(spacing_mm) - inside, outside).astype(np.float32)


def best_of(repeats: int, function: Callable, *args: object) -> tuple[float, object]:
    """Return the shortest time in seconds, and the result."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function(*args)
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch and edt")
    parser.add_argument("--repeats", type=int, default=3, help="number of runs; the fastest counts")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    mask = atrium_like_mask()
    title = f"{'x'.join(map(str, SHAPE))}, {mask.mean():.1%} inside, {args.threads} thread(s), best of {args.repeats}"
    table = Table(
        "computation", "spacing (mm)", "other (s)", "ours (s)", "times faster", "largest difference", title=title
    )

    for spacing_mm in SPACINGS_MM:
        ours, phi = best_of(args.repeats, signed_distance_map, mask[None], spacing_mm)
        other, expected = best_of(args.repeats, scipy_map, mask, spacing_mm)
        difference = f"{np.abs(phi[0] - expected).max():.1e} mm"
        spacing = " ".join(map(str, spacing_mm))
        table.add_row("map, scipy", spacing, f"{other:.2f}", f"{ours:.2f}", f"{other / ours:.1f}", difference)

    label = torch.from_numpy(mask)[None, None].float()
    logits = torch.randn(label.shape, generator=torch.Generator().manual_seed(0))
    other, expected = best_of(args.repeats, MonaiBoundaryLoss(sigmoid=True), logits, label)
    targets = {"map on the fly": label, "map given": torch.cat([label, signed_distance_map(label[0])[None]], dim=1)}
    for name, target in targets.items():
        ours, loss = best_of(args.repeats, BoundaryLoss(sigmoid=True), logits, target)
        difference = f"{abs(loss - expected) / abs(expected):.1e} relative"
        row = f"loss, MONAI; ours with {name}"
        table.add_row(row, "1.0 1.0 1.0", f"{other:.2f}", f"{ours:.2f}", f"{other / ours:.1f}", difference)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
