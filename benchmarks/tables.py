"""What the benchmarks share: tables, the machine, a few cases of prepared data, and measured child processes."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import tifffile
import torch

from segbundles.files import SPLITS, read_json
from segbundles.threads import usable_cores

ROOT = Path(__file__).resolve().parents[1]
BUNDLES = ("left_atrium_vnet", "brain_flair_unet", "em_membrane_unet", "polyp_fcn8")


@dataclass
class Table:
    """A table that is printed, and written as CSV for the model cards."""

    title: str
    heads: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def show(self) -> None:
        """Print the table as Markdown."""
        lines = [self.heads, ["---"] * len(self.heads), *self.rows]
        print(f"\n{self.title}\n\n" + "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines), flush=True)

    def write(self, path: Path, note: str) -> None:
        """Write the table as CSV, with a note as its last line, as `cards.py` reads it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([self.heads, *self.rows, [note]])


def machine() -> str:
    """Say what a benchmark ran on, in one line."""
    names = [platform.processor() or platform.machine()]
    if (info := Path("/proc/cpuinfo")).is_file():
        lines = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        names = lines[:1] or names
    if torch.cuda.is_available():
        names.append(torch.cuda.get_device_name())
    versions = ", ".join(f"{name} {import_module(name).__version__}" for name in ("torch", "monai", "segbundles"))
    counts = (("core", usable_cores()), ("thread", torch.get_num_threads()))
    numbers = ", ".join(f"{count} {name}{'s' * (count > 1)}" for name, count in counts)
    return f"{', '.join(names)}; {numbers}; {versions}"


def some_cases(source: Path, out: Path, counts: Mapping[str, int]) -> Path:
    """Write a list of the first cases of each split of a prepared data set, and return its folder.

    Args:
        source: folder with ``datalist.json``.
        out: folder to write to.
        counts: number of cases of each split; the slices of a group stay together and count as one case.
    """
    datalist = read_json(source / "datalist.json")
    for split in SPLITS:
        stacked = any("slice" in case for case in datalist[split])
        chosen, seen = [], {}
        for number, case in enumerate(datalist[split]):
            if seen.setdefault(case["group"] if stacked else number, len(seen)) >= counts.get(split, 0):
                continue
            paths = {key: _absolute(case[key], source) for key in ("image", "label") if key in case}
            chosen.append({**case, **paths})
        datalist[split] = chosen
    out.mkdir(parents=True, exist_ok=True)
    (out / "datalist.json").write_text(json.dumps(datalist), encoding="utf-8")
    return out


def _absolute(paths: Any, folder: Path) -> Any:
    if isinstance(paths, list):
        return [_absolute(path, folder) for path in paths]
    return str((folder / paths).resolve())


def images(data: Path, out: Path, split: str = "validation") -> Path:
    """Link the images of a split into a folder, and return it; slices of a group share a folder; pages are copied."""
    for case in read_json(data / "datalist.json")[split]:
        for path in map(Path, case["image"] if isinstance(case["image"], list) else [case["image"]]):
            folder = out / (case["group"] if "slice" in case else "")
            folder.mkdir(parents=True, exist_ok=True)
            link = folder / f"{case['case']}{path.suffix}"
            if "page" in case:
                tifffile.imwrite(link, tifffile.imread(path, key=case["page"]))
            elif not link.exists():
                link.symlink_to(path)
    return out


# a process starts with the peak of the one that started it, so a small one comes between
_LAUNCHER = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[2:]).returncode
with open(sys.argv[1], "w") as file:
    file.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(status if status >= 0 else 128 - status)
"""


def child(command: Iterable[object], environment: Mapping[str, str] | None = None) -> tuple[float, float]:
    """Run a command, and return its seconds and the peak of its memory in MiB, that of its largest process.

    Raises:
        SystemExit: when the command fails; with the end of its output.
    """
    words = list(map(str, command))
    with tempfile.NamedTemporaryFile("r") as peak:
        start = [sys.executable, "-c", _LAUNCHER, peak.name, *words]
        since = time.perf_counter()
        done = subprocess.run(
            start,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        spent = time.perf_counter() - since
        if done.returncode:
            sys.exit(f"{' '.join(words)}\nfailed with status {done.returncode}:\n{done.stdout[-3000:]}")
        return spent, float(peak.read()) / (2**20 if sys.platform == "darwin" else 2**10)
