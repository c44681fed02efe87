"""Make the mistakes that people make in the JSON, run the real command line for each, and print what it said last.

Each row: the mistake, exit status, lines with "Traceback" on the screen, files written, last line on the screen. The
run is refused if the status is not 0; no row should have a traceback or a file. Takes about five minutes on two cores:

    python benchmarks/mistakes.py
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from segbundles.phantoms.brain import make_phantom as make_brain
from segbundles.phantoms.left_atrium import make_phantom as make_left_atrium

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 100
# a training that starts in spite of the mistake takes seconds
SMALL: dict[str, dict[str, Any]] = {
    "left_atrium_vnet": {
        "max_epochs": 2,
        "lr_epochs": 2,
        "val_interval": 1,
        "device": "cpu",
        "network_spacing_mm": [4.0, 4.0, 4.0],
        "patch_size": [16, 16, 16],
        "window_size": [32, 32, 16],
        "base_channels": 1,
    },
    "brain_flair_unet": {
        "max_epochs": 2,
        "lr_epochs": 2,
        "val_interval": 1,
        "device": "cpu",
        "patch_size": [16, 16],
        "window_size": [32, 32],
        "base_channels": 2,
        "depth": 3,
        "slices_per_epoch": 8,
    },
}


@dataclass
class Mistake:
    """One mistake.

    Args:
        name: as shown in the table.
        edits: knobs of section 1 with their wrong values.
        change: wrong text of train.json, from the right one.
        words: more words on the command line.
        bundle: name of the bundle.
        configs: configs that are named.
        run_id: what is run.
        check: whether ``segbundles check`` is run, because MONAI stops before anything of this project is imported.
    """

    name: str
    edits: dict[str, Any] = field(default_factory=dict)
    change: Callable[[str], str | bytes] | None = None
    words: tuple[str, ...] = ()
    bundle: str = "left_atrium_vnet"
    configs: tuple[str, ...] = ("train.json",)
    run_id: str = "training"
    check: bool = False


def swap(old: str, new: str) -> Callable[[str], str]:
    """Return a function that replaces one part of a text."""
    return lambda text: text.replace(old, new, 1)


def knob(name: str, value: Any, bundle: str = "left_atrium_vnet", **more: Any) -> Mistake:
    """Return a wrong line in section 1."""
    also = "".join(f", {key} {json.dumps(other)}" for key, other in more.items())
    return Mistake(f"{name} {json.dumps(value)}{also}", {name: value, **more}, bundle=bundle)


def text(name: str, change: Callable[[str], str | bytes]) -> Mistake:
    """Return a text that is not valid JSON."""
    return Mistake(name, change=change, check=True)


EPOCHS = '"max_epochs": 2,'
BRAIN = "brain_flair_unet"
MISTAKES = [
    *(knob("max_epochs", value) for value in ("2", -5, 0, 2.5, None)),
    *(knob("learning_rate", value) for value in ("1e-3", None, -0.001, 10)),
    knob("dice_weight", "0.5", BRAIN),
    knob("dice_weight", -1, BRAIN),
    knob("patch_size", [256], BRAIN),
    knob("patch_size", [192, 192, 192], BRAIN),
    knob("num_classes", 1),
    knob("num_classes", 0),
    knob("spacing_mm", [1, 1]),
    knob("batch_size", None),
    knob("batch_size", 0),
    knob("dropout", 50),
    knob("depth", 2, BRAIN),
    knob("base_channels", 8.5),
    knob("norm", "bach"),
    knob("val_interval", 0),
    knob("val_interval", 5, max_epochs=2),
    knob("device", "gpu"),
    knob("device", "cuda:9"),
    knob("amp", "yes"),
    knob("cache_rate", 50),
    knob("rotate_degrees", [15]),
    knob("max_epoch", 5),
    text("a key twice", swap(EPOCHS, f'{EPOCHS}\n    "seed": 1,')),
    Mistake("a renamed knob", change=swap('"learning_rate":', '"learning_rat":')),
    text("trailing comma", lambda text: text.rstrip()[:-1].rstrip() + ",\n}\n"),
    text("// comment", swap(EPOCHS, f"{EPOCHS} // long")),
    text("# comment", swap(EPOCHS, f"{EPOCHS} # long")),
    text("typographic quotes", swap('"max_epochs"', "“max_epochs”")),
    text("missing comma", swap(EPOCHS, EPOCHS[:-1])),
    text("missing quote", swap('"max_epochs"', '"max_epochs')),
    text("missing brace", swap('"lr": "@learning_rate"\n    },', '"lr": "@learning_rate"\n    ,')),
    text("missing last brace", lambda text: text.rstrip()[:-1]),
    text("0,001", swap('"learning_rate": 0.001', '"learning_rate": 0,001')),
    text("True", swap('"amp": true', '"amp": True')),
    text(".001", swap('"learning_rate": 0.001', '"learning_rate": .001')),
    text("byte-order mark", lambda text: text.encode("utf-8-sig")),
    text("UTF-16", lambda text: text.encode("utf-16")),
    text("empty file", lambda text: ""),
    Mistake("mistyped initial_weights", {"initial_weights": "{ROOT}/bundles/left_atrium_vnet/models/modell.pt"}),
    Mistake("evaluate.json alone", configs=("evaluate.json",), run_id="evaluating", check=True),
    Mistake("--ckpt_dir that names a file", words=("--ckpt_dir", str(ROOT / "LICENSE"))),
    Mistake("--max_epoch 5", words=("--max_epoch", "5")),
    Mistake("--dataset_dir 'study#2'", words=("--dataset_dir", "study#2")),
    Mistake(
        "inferring --dataset_dir 'study#2'",
        words=("--dataset_dir", "study#2"),
        configs=("inference.json",),
        run_id="inferring",
    ),
    Mistake("--max_epochs many", words=("--max_epochs", "many")),
]


def attempt(mistake: Mistake, folder: Path, data: dict[str, Path]) -> tuple[str, ...]:
    """Make one mistake in a copy of a bundle, run it, and return a row of the table."""
    source, bundle = ROOT / "bundles" / mistake.bundle, folder / mistake.bundle
    shutil.copytree(source / "configs", bundle / "configs")
    (bundle / "models").mkdir()
    if mistake.run_id != "training":
        for path in (source / "models").iterdir():
            (bundle / "models" / path.name).symlink_to(path)
    path = bundle / "configs" / "train.json"
    lines = list(json.loads(path.read_text(encoding="utf-8")).items())
    end = [key for key, _ in lines].index("_section_2_")
    tree = {**dict(lines[:end]), **SMALL[mistake.bundle], **mistake.edits, **dict(lines[end:])}
    content = json.dumps(tree, indent=4).replace("{ROOT}", str(ROOT))
    changed = mistake.change(content) if mistake.change else content
    if mistake.change and changed == content:
        raise ValueError(f"{mistake.name} changes nothing")
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode("utf-8"))
    before = {*folder.rglob("*")}
    configs = [f"{bundle}/configs/{name}" for name in mistake.configs]
    if mistake.check:
        words = [str(Path(sys.executable).with_name("segbundles")), "check", str(bundle)]
        words += [word for name in mistake.configs for word in ("--config", name)]
    else:
        words = [sys.executable, "-m", "monai.bundle", "run", mistake.run_id, "--bundle_root", str(bundle)]
        words += ["--config_file", str(configs[0] if len(configs) == 1 else configs)]
        words += ["--dataset_dir", str(data[mistake.bundle])] if "--dataset_dir" not in mistake.words else []
        words += ["--output_dir", str(folder / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(folder.parent)}
    try:
        done = subprocess.run(
            [*words, *mistake.words], cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S
        )
        status, screen = str(done.returncode), done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        status, screen = "stopped", f"still running after {LIMIT_S} s"
    shown = [line for line in screen.splitlines() if line.strip()] or [""]
    written = len({*folder.rglob("*")} - before)
    last = shown[-1].replace(str(folder), "...").replace(str(ROOT) + "/", "").replace("|", "\\|")
    return mistake.name, status, str(screen.count("Traceback")), str(written), last.strip()


def main() -> None:
    """Try all mistakes, two at a time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of the mistakes to try; without any: all")
    names = parser.parse_args().names
    chosen = [it for it in MISTAKES if not names or any(name in it.name for name in names)]
    with TemporaryDirectory() as folder:
        data = {name: Path(folder, "data", name) for name in SMALL}
        make_left_atrium(data["left_atrium_vnet"], 4, 0, (32, 32, 20), (4.0, 4.0, 4.0))
        make_brain(data["brain_flair_unet"], 4, 0, (32, 32), 4)
        folders = [Path(folder, str(number)) for number in range(len(chosen))]
        for path in folders:
            path.mkdir()
        with ThreadPoolExecutor(2) as pool:
            rows = list(pool.map(lambda pair: attempt(*pair, data), zip(chosen, folders, strict=True)))
    print("| mistake | status | tracebacks | files | last line |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    good = [row for row in rows if row[1] not in ("0", "stopped") and row[2:4] == ("0", "0")]
    print(f"\n{len(rows)} mistakes, {len(good)} refused without a traceback and before anything was written")


if __name__ == "__main__":
    main()
