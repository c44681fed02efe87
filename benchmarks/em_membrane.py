"""Measure the speed of em_membrane_unet: drawing patches, training steps, segmentation and post-processing.

It draws patches as training does, with and without elastic deformation; takes training steps; segments the validation
sections with the bundle's inferer, with and without mirrored and rotated images; and turns the probabilities into cells
with both watersheds, as evaluation does. With ``--weights`` the probabilities are those of trained weights. Without it
they are the truth, smoothed and with noise, and the network has random weights.

    segbundles prepare isbi2012 --source isbi2012 --out D
    python benchmarks/em_membrane.py --dataset_dir D [--weights M/model.pt] [--patches_per_section 8 ...]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from scipy.ndimage import gaussian_filter

from segbundles.metrics import label_cells, threshold_scores
from segbundles.networks import load_if_given
from segbundles.transforms import GreyWatershedd, ProbabilityWatershedd

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "em_membrane_unet"
PATCHES, STEPS = 64, 4


def value_of(text: str) -> Any:
    """Read a number, a list or a truth value, or keep the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def load(values: dict[str, Any], *patches: str, **more: Any) -> ConfigParser:
    """Parse train.json with patches over it, and with the settings of the command line and ``more``."""
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / "configs" / name) for name in ("train.json", *patches)])
    parser.update({"bundle_root": str(BUNDLE), "validate::dataset::cache_rate": 0, "train::dataset::progress": False})
    parser.update({key.removeprefix("--"): value for key, value in values.items()} | more)
    parser.parse()
    return parser


def seconds(function: Callable[[], Any]) -> float:
    """Time one call."""
    since = time.perf_counter()
    function()
    return time.perf_counter() - since


def main() -> None:
    """Measure and print the table."""
    values = {key: value_of(text) for key, text in zip(sys.argv[1::2], sys.argv[2::2], strict=False)}
    if "--dataset_dir" not in values or len(sys.argv) % 2 == 0:
        sys.exit(__doc__)
    weights = values.pop("--weights", None)
    print("| what | each | per second |\n|---|---|---|")

    def row(what: str, spent: float, count: int) -> None:
        print(f"| {what} | {1000 * spent / count:.1f} ms | {count / spent:.1f} |", flush=True)

    for title, more in (("as configured", {}), ("no elastic", {"elastic_probability": 0.0})):
        patches = load(values, **more).get_parsed_content("train::patches")
        count = len(patches)
        row(f"patch drawn, {title}", seconds(lambda p=patches, n=count: [p[k % n] for k in range(PATCHES)]), PATCHES)

    parser = load(values)
    network, loss, optimizer = (parser.get_parsed_content(key) for key in ("network", "loss", "optimizer"))
    device = parser.get_parsed_content("device")
    batch = next(iter(parser.get_parsed_content("train::dataloader")))
    image, label = batch["image"].as_tensor().to(device), batch["label"].as_tensor().to(device)
    inferer = parser.get_parsed_content("train::inferer")

    def step() -> None:
        optimizer.zero_grad()
        loss(inferer(image, network.train()), label).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    row(f"patch trained on, {len(image)} per step", seconds(lambda: [step() for _ in range(STEPS)]), STEPS * len(image))

    sections = list(parser.get_parsed_content("validate::dataset"))
    probabilities, truths = [], []
    for augmented in (False, True):
        more = {"mirror_axes": [0, 1] if augmented else [], "quarter_turns": augmented}
        parser = load(values, "evaluate.json", weights=weights, **more)
        network, inferer = parser.get_parsed_content("network"), parser.get_parsed_content("validate::inferer")
        load_if_given(network, weights)
        network.eval()
        tiles, spent = 0, 0.0

        def counted(x: torch.Tensor, network: torch.nn.Module = network) -> torch.Tensor:
            nonlocal tiles
            tiles += len(x)
            return network(x)

        for section in sections:
            since = time.perf_counter()
            found = inferer(section["image"][None].as_tensor().to(device), counted).cpu()
            spent += time.perf_counter() - since
            if not augmented:
                probabilities += list(np.moveaxis(found[0, 0].numpy(), -1, 0))
                truths += list(np.moveaxis(section["label"][0].numpy(), -1, 0))
        title = ", mirrored and rotated" if augmented else ""
        row(f"tile through the network{title}", spent, tiles)
        row(f"section segmented{title}", spent, len(truths))

    if weights is None:
        rng = np.random.default_rng(0)
        noisy = [gaussian_filter((truth == 0) + rng.normal(0, 0.5, truth.shape), 1.5) for truth in truths]
        probabilities = [np.clip(one, 0, 1) for one in noisy]
    size = " x ".join(map(str, truths[0].shape))
    for name, kind in (("probability", ProbabilityWatershedd), ("grey", GreyWatershedd)):
        parser = load(values, "evaluate.json", weights=weights, watershed=name)
        steps = parser.get_parsed_content("validate::postprocessing").transforms
        (watershed,) = (step for step in steps if isinstance(step, kind))
        (key,) = watershed.keys
        spent = seconds(lambda w=watershed, k=key: [w({k: one[None]}) for one in probabilities])
        row(f"section of {size} to cells, {name} watershed", spent, len(truths))
    pairs = [(one, label_cells(truth)) for one, truth in zip(probabilities, truths, strict=True)]
    row("section scored at ten thresholds", seconds(lambda: [threshold_scores(*pair) for pair in pairs]), len(truths))
    print(f"\n{torch.get_num_threads()} threads, {device.type}, tiles of {parser.get_parsed_content('window_size')}.")


if __name__ == "__main__":
    main()
