"""Compare attention, the boundary loss and a wider network for left_atrium_vnet, with the same budget for each.

Each row of the table is trained with the bundle's own command, for the same number of epochs on the same cases, and
scored on the validation cases inside boxes that come from the truth; two rows are trained with several seeds. The
boundary loss gains weight in the last third of the epochs, up to half of the loss. A coarse grid keeps all of this to
about two hours on one core, so the scores are below those of the shipped model. Rows whose results exist in the output
folder are not computed again.

    segbundles prepare lasc18 --source DIR --out D
    python benchmarks/left_atrium_rows.py --dataset_dir D --out O

The table is written to `O/rows.csv`. The model card shows `docs/figures/rows.csv`, a copy of it.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, median, stdev

import torch
from monai.inferers import SimpleInferer
from monai.losses import DiceCELoss

from segbundles.inferers import AutocastInferer
from segbundles.losses import BoundaryLoss, HybridLoss
from segbundles.networks import AttentionVNet

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "left_atrium_vnet"
BAM = {"attention": "sequential"}
REPEATED = ("V-Net", "BAM d4, hybrid")  # the rows with several seeds
CROP = (64, 48, 32)  # size of a median crop inside the V-Net at 2 mm


def rows(epochs: int) -> dict[str, dict[str, object]]:
    """Return the knobs of each row."""
    start = epochs * 2 // 3
    hybrid = {"boundary_weight": 0.5, "boundary_start_epoch": start, "boundary_epochs": epochs - start}
    return {
        "V-Net": {},
        "hybrid": hybrid,
        "BAM d3": {**BAM, "attention_dilation": 3},
        "BAM d4": {**BAM, "attention_dilation": 4},
        "BAM d4, hybrid": {**BAM, "attention_dilation": 4, **hybrid},
        "wide": {"num_layers": 2},
    }


def run(command: str, configs: list[str], log: Path, overrides: dict[str, object]) -> None:
    """Run one command of the bundle; its output goes to a file, whose end is shown if the command fails."""
    files = [str(BUNDLE / "configs" / name) for name in configs]
    args = [sys.executable, "-m", "monai.bundle", "run", command, "--bundle_root", str(BUNDLE)]
    args += ["--config_file", str(files) if len(files) > 1 else files[0]]
    for key, value in overrides.items():
        args += [f"--{key}", str(value)]
    with log.open("w", encoding="utf-8") as out:
        code = subprocess.run(args, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        sys.exit(f"{' '.join(args)}\nfailed; the end of {log}:\n{log.read_text(encoding='utf-8')[-2000:]}")


def one(folder: Path, dataset_dir: str, epochs: int, seed: int, spacing: list[float], own: dict) -> dict[str, float]:
    """Train and score one row with one seed; return its scores."""
    result = folder / "row.json"
    if not result.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        common = {"dataset_dir": dataset_dir, "ckpt_dir": folder / "models", "output_dir": folder}
        training = {
            "network_spacing_mm": spacing,
            "max_epochs": epochs,
            "lr_epochs": epochs,
            "val_interval": epochs,  # once, so that the last weights are kept
            "batch_size": 1,
            "learning_rate": 0.001,
            "seed": seed,
            "resume": "true",
        }
        run("training", ["train.json"], folder / "training.out", {**common, **training, **own})
        # network and spacing are facts of the weights
        scoring = {**common, "output_dir": folder / "evaluation", "use_locator": "false"}
        run("evaluating", ["train.json", "evaluate.json"], folder / "evaluation.log", scoring)
        summary = json.loads((folder / "evaluation" / "summary.json").read_text(encoding="utf-8"))
        figures = {name: summary[name]["mean"] for name in ("dice", "jaccard", "hd95_mm", "assd_mm")}
        figures |= {"dice_sd": summary["dice"]["sd"], "n": summary["dice"]["n"]}
        result.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    found = json.loads(result.read_text(encoding="utf-8"))
    # there is no distance if nothing was found, and no spread with one case
    return {name: math.nan if value is None else value for name, value in found.items()}


def step_seconds(own: dict[str, object], steps: int = 7) -> float:
    """Return the median time of a training step on one crop, with mixed precision as in training, without loading."""
    network_args = {k: v for k, v in own.items() if not k.startswith("boundary")}
    network = AttentionVNet(norm="instance", out_act=None, **network_args)
    region = DiceCELoss(sigmoid=True, squared_pred=True, batch=True)
    loss = HybridLoss(region, BoundaryLoss(sigmoid=True), region_weight=0.5 if "boundary_weight" in own else 1.0)
    optimizer = torch.optim.Adam(network.parameters())
    image, label = torch.rand(1, 1, *CROP), (torch.rand(1, 1, *CROP) > 0.9).float()
    target = torch.cat([label, torch.rand(1, 1, *CROP)], dim=1) if "boundary_weight" in own else label
    spent = []
    for _ in range(steps):
        since = time.perf_counter()
        optimizer.zero_grad()
        loss(AutocastInferer(SimpleInferer())(image, network), target).backward()
        optimizer.step()
        spent.append(time.perf_counter() - since)
    return median(spent)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset_dir", required=True, help="a folder prepared by `segbundles prepare lasc18`")
    parser.add_argument("--out", required=True, type=Path, help="keeps every run")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--spacing_mm", type=float, default=2.0)
    options = parser.parse_args()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    spacing = [options.spacing_mm] * 3
    configured, table = rows(options.epochs), {}
    for seed in range(options.seeds):  # in the outer loop, so that an interrupted run has all rows once
        for name, own in configured.items():
            if seed and name not in REPEATED:
                continue
            folder = options.out / f"{re.sub('[^a-zA-Z0-9]+', '_', name).lower()}_seed{seed}"
            print(f"{name}, seed {seed} ...", file=sys.stderr, flush=True)
            figures = one(folder, options.dataset_dir, options.epochs, seed, spacing, own)
            table.setdefault(name, []).append(figures)
    seconds = {name: step_seconds(own) for name, own in configured.items()}

    lines = [("row", "Dice, each seed", "mean", "Jaccard", "HD95 (mm)", "ASSD (mm)", "step (s)")]
    for name, found in table.items():
        dice = ", ".join(f"{f['dice']:.4f}" for f in found)
        mean = {key: fmean(f[key] for f in found) for key in found[0]}
        overlap = (f"{mean[key]:.4f}" for key in ("dice", "jaccard"))
        distance = (f"{mean[key]:.2f}" for key in ("hd95_mm", "assd_mm"))
        lines.append((name, dice, *overlap, *distance, f"{seconds[name]:.2f}"))
    with (options.out / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    print((options.out / "rows.csv").read_text(encoding="utf-8"))
    first = next(iter(table.values()))
    over_cases = fmean(f["dice_sd"] for f in first)
    over_seeds = f", over seeds {stdev(f['dice'] for f in first):.4f}" if len(first) > 1 else ""
    print(f"\nV-Net's Dice: standard deviation over {first[0]['n']} cases {over_cases:.4f}{over_seeds}.")


if __name__ == "__main__":
    main()
