"""Compare a training with the settings of `segbundles adapt` with one with the bundle's: scores and minutes.

    python benchmarks/adapt.py make three_classes --out data/three
    python benchmarks/adapt.py make lgg_volumes --source kaggle_3m --out data/lgg_volumes [-- --split FILE ...]
    python benchmarks/adapt.py compare left_atrium_vnet data/three --out O [--metrics dice_1 dice_2] [-- --seed 1 ...]

`three_classes` are 30 synthetic volumes of 1.5 x 1.5 x 2 mm whose atrium is cut into two classes; `lgg_volumes` are the
patients of kaggle_3m as NIfTI volumes of three channels, with the split that `segbundles prepare lgg` draws, or that
the words after `--` ask of it. `compare` trains twice, with the same knobs after `--`, and evaluates both; of the
adapted settings the other training has the number of classes only. Results that exist in the output folder are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813
from monai.transforms import LoadImage

from segbundles.adapt import adapt, write_plans
from segbundles.data import Datalist, SliceStacks, StackReader
from segbundles.datasets import get_data_set, prepare, write_datalist
from segbundles.files import SPLITS, read_json
from segbundles.phantoms.left_atrium import make_phantom

SPACING_MM = (1.5, 1.5, 2.0)
SIZE = (128, 128, 64)


def segbundles(log: Path, *words: object) -> float:
    """Run the command; its output goes to a file, whose end is shown if it fails. Return the minutes."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as out:
        command = [sys.executable, "-m", "segbundles", *map(str, words)]
        if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode:
            sys.exit(f"{' '.join(command)}\nfailed; the end of {log}:\n{log.read_text(encoding='utf-8')[-2000:]}")
    return (time.perf_counter() - start) / 60


def make_three_classes(out: Path) -> None:
    """Write the synthetic volumes, and their list."""
    datalist = make_phantom(out, 30, 0, SIZE, SPACING_MM).datalist
    for split in SPLITS:
        for entry in datalist[split]:
            path = out / entry["label"]
            image = sitk.ReadImage(str(path))
            label = (sitk.GetArrayFromImage(image) > 0).astype(np.uint8)
            label[int(np.argwhere(label)[:, 0].mean()) :] *= 2  # along z, which no training mirrors
            cut = sitk.GetImageFromArray(label)
            cut.CopyInformation(image)
            sitk.WriteImage(cut, str(path), useCompression=True)
    datalist |= {"name": "three_classes", "labels": {"0": "background", "1": "one half", "2": "other half"}}
    write_datalist(datalist, out)


def make_lgg_volumes(source: Path, out: Path, words: list[str]) -> None:
    """Write the patients of kaggle_3m as volumes, and their list."""
    options = dict(zip((word.lstrip("-").replace("-", "_") for word in words[::2]), words[1::2], strict=True))
    slices = prepare(get_data_set("lgg"), source, out / "slices", **options)
    datalist = {**slices.datalist, "name": "lgg_volumes", "tensorImageSize": "3D", **{split: [] for split in SPLITS}}
    load = LoadImage(StackReader, image_only=True)
    for split in SPLITS:
        for stack in SliceStacks(Datalist(out / "slices", split, required=False)):
            entry = {"case": stack["case"], "group": stack["group"]}
            for key in ("image", "label"):
                volume = load(stack[key])
                entry[key] = f"{stack['case']}_{key}.nii.gz"
                nib.save(nib.Nifti1Image(volume.numpy().astype(np.uint8), volume.affine.numpy()), out / entry[key])
            datalist[split].append(entry)
    write_datalist(datalist, out)


def compare(bundle: str, data: Path, out: Path, metrics: list[str], words: list[str]) -> None:
    """Train and evaluate with both settings, and print a table."""
    out.mkdir(parents=True, exist_ok=True)
    plans, notes = adapt(bundle, data)
    settings = write_plans(plans, out / "settings.json", f"Settings for {data.name}, from segbundles adapt.")[0]
    print("\n".join([*notes, f"adapted: {json.dumps(plans[0].chosen)}"]))
    classes = plans[0].chosen.get("num_classes")
    own = ["--num_classes", classes] if classes else []
    if all(set(plan.chosen) <= {"num_classes"} for plan in plans):
        print("The bundle's settings fit: there is nothing to compare.")
        return
    rows = []
    for name, given in (("bundle's", own), ("adapted", ["--args_file", settings])):
        folder = out / name.strip("'s")
        minutes = folder / "minutes.json"
        if not minutes.is_file():
            spent = segbundles(folder / "train.txt", "train", bundle, data, folder, *given, *words)
            where = ("--ckpt_dir", folder / "models")
            segbundles(folder / "evaluate.txt", "evaluate", bundle, data, folder / "evaluation", *where, *given)
            minutes.write_text(json.dumps(round(spent, 1)))
        summary = read_json(folder / "evaluation/summary.json")
        found = metrics or [key for key, value in summary.items() if isinstance(value, dict) and "mean" in value]
        rows.append([name, f"{read_json(minutes)}", *(f"{summary[key]['mean']:.4f}" for key in found)])
    print(f"| settings | minutes | {' | '.join(found)} |\n|{'---|' * (len(found) + 2)}")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


def main() -> None:
    """Read the command line."""
    words = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make")
    make.add_argument("name", choices=["three_classes", "lgg_volumes"])
    make.add_argument("--source", type=Path)
    both = commands.add_parser("compare")
    both.add_argument("bundle")
    both.add_argument("data", type=Path)
    both.add_argument("--metrics", nargs="*", default=[])
    for one in (make, both):
        one.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(sys.argv[1 : len(sys.argv) - len(words) - bool(words)])
    if options.command == "compare":
        compare(options.bundle, options.data, options.out, options.metrics, words)
    elif options.name == "three_classes":
        make_three_classes(options.out)
    else:
        make_lgg_volumes(options.source, options.out, words)


if __name__ == "__main__":
    main()
