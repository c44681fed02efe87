"""Measure what an ensemble costs: seconds of the processor and memory of one image with 1, 2 and 3 members.

    python benchmarks/ensemble.py polyp_fcn8=frame.tif brain_flair_unet=volume.nii.gz ... [--device cpu]

Every member is the bundle's own `model.pt`, and each number of members runs in a process of its own, on one thread. The
last column says whether the mask is that of a single member, as it must be.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from segbundles.commands import find_bundle


def measure(bundle: str, image: str, members: int, device: str) -> None:
    """Print the cost of one image, as JSON."""
    import torch

    from segbundles.segmenter import Segmenter

    torch.set_num_threads(1)
    root = find_bundle(bundle)
    segment = Segmenter(root, weights=[str(root / "models" / "model.pt")] * members, device=device)
    before, since = _megabytes(), time.process_time()
    mask = segment(image)["pred"]
    spent = time.process_time() - since
    digest = hashlib.sha256(mask.tobytes()).hexdigest()
    print(json.dumps({"seconds": spent, "loaded": before, "most": _megabytes(), "mask": digest}))


def _megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="BUNDLE=IMAGE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--members", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    pairs = [word.split("=", 1) for word in options.images]
    if options.members:
        measure(*pairs[0], options.members, options.device)
        return
    print("| bundle | members | seconds | memory before, MB | most memory, MB | same mask |\n|---|---|---|---|---|---|")
    for bundle, image in pairs:
        first = None
        for members in (1, 2, 3):
            command = [sys.executable, str(Path(__file__).resolve()), f"{bundle}={image}", "--device", options.device]
            out = subprocess.run([*command, "--members", str(members)], check=True, capture_output=True, text=True)
            found = json.loads(out.stdout.splitlines()[-1])
            first = first or found["mask"]
            same = "yes" if found["mask"] == first else "NO"
            cells = (f"{found['seconds']:.1f}", f"{found['loaded']:.0f}", f"{found['most']:.0f}", same)
            print(f"| {bundle} | {members} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
