"""The Python environment for MONAI Label.

MONAI Label cannot share an environment with the bundles, because it needs an older pydicom. Its own requirements would
also install SAM 2, whose build fetches another torch, so the packages that it needs for bundles are listed here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from segbundles.errors import fail
from segbundles.files import check_writable, read_json

__all__ = ["MONAI_LABEL", "default_environment", "log_end", "make_environment"]

#: version of MONAI Label
MONAI_LABEL = "0.8.5"
# torchvision is only imported, and newer ones need the torch of their own release; it exists for these Pythons
_WITHOUT_NEEDS = (f"monailabel=={MONAI_LABEL}", "torchvision==0.15.2")
_PYTHONS = ((3, 11), (3, 10))
_TORCH = "torch==2.13.0"
_PYDICOM = "pydicom<3"  # pydicom-seg, which MONAI Label imports, fails with 3
_PACKAGES = f"""
monai==1.6.1 {_PYDICOM} pydicom-seg==0.4.1 dicomweb-client<0.61 pynetdicom<3 google-auth itk-io SimpleITK pynrrd nibabel
pillow scikit-image scikit-learn scipy einops pytorch-ignite tensorboard fire psutil fastapi uvicorn pydantic-settings
python-multipart requests requests-toolbelt schedule timeloop cachetools expiringdict expiring_dict watchdog filelock
passlib pyjwt bcrypt shapely girder-client openslide-python openslide-bin PyYAML
"""
# written when an environment is begun, and again, with its contents, when it is complete
_RECORD = ".segbundles_label.json"
_LOG = "install.log"
_LINES = 15


def default_environment() -> Path:
    """Return a folder in the user's cache; the version is part of its name."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "segbundles" / f"monai_label-{MONAI_LABEL}"


def make_environment(folder: str | os.PathLike | None = None, say: Callable[[str], None] = print) -> Path:
    """Create the environment if it is missing or incomplete, and bring this library in it up to date.

    Args:
        folder: folder of the environment; None means :func:`default_environment`.
        say: called with a message before each long step.

    Returns:
        Path of its Python.

    Raises:
        ValueError: when the folder contains something else, there is no Python that MONAI Label runs on, or a step
            fails; the message has the end of its output.
    """
    root = Path(folder or default_environment()).expanduser().absolute()
    python = root / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    steps = [[_TORCH], [_TORCH, *_PACKAGES.split()], ["--no-deps", *_WITHOUT_NEEDS]]
    project, version = _this_library()
    record = _read_record(root)
    if record.get("packages") != steps or not _runs(python):
        base = _find_python()
        check_writable(root, "environment")
        say(f"Creating an environment for MONAI Label {MONAI_LABEL} in {root}. This takes minutes, but only once.")
        _write_record(root, {})
        _clear(root)
        _run([base, "-m", "venv", str(root)], root, "creating the environment")
        for number, packages in enumerate(steps):
            say(f"Installing packages, {number + 1} of {len(steps)}")
            _run([*_pip(python), *packages], root, "installing packages")
        record = {"packages": steps}
    if record.get("segbundles") != version:
        say(f"Installing segbundles in it, from {project[-1]}")
        _run([*_pip(python), _PYDICOM, *project], root, "installing segbundles")
        _write_record(root, {"packages": steps, "segbundles": version})
    return python


def _this_library() -> tuple[list[str], str]:
    """Return pip's arguments for the running segbundles, and a text that changes when it must be installed again."""
    root = Path(__file__).resolve().parents[3]
    project = root / "pyproject.toml"
    if project.is_file() and (root / "common" / "segbundles").is_dir():
        needs = hashlib.sha256(project.read_bytes()).hexdigest()[:16]
        return ["-e", str(root)], f"{root} {needs}"
    installed = metadata.distribution("segbundles")
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    if not origin:
        return [f"segbundles=={installed.version}"], installed.version
    url = origin["url"]
    if "vcs_info" in origin:
        url = f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
    return [f"segbundles @ {url}"], f"{installed.version} {url}"


def _find_python() -> str:
    if sys.version_info[:2] in _PYTHONS:
        return sys.executable
    for major, minor in _PYTHONS:
        found = shutil.which(f"python{major}.{minor}")
        if found and _runs(found):
            return found
    known = " or ".join(f"{major}.{minor}" for major, minor in _PYTHONS)
    fail(
        f"MONAI Label {MONAI_LABEL} needs Python {known} (its torchvision has no build for "
        f"{sys.version_info[0]}.{sys.version_info[1]}), and there is none on the PATH: install one of them too."
    )


def _runs(python: str | os.PathLike) -> bool:
    try:
        return subprocess.run([str(python), "-c", ""], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _pip(python: Path) -> list[str]:
    return [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off", "--no-input"]


def _run(command: Sequence[str], root: Path, what: str) -> None:
    log = root / _LOG
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=clean_environment(), check=False)
    if done.returncode:
        fail(
            f"{what} in {root} failed with status {done.returncode}. Its output (all of it is in {log}) ends with:\n"
            f"{log_end(log)}\nCheck the network connection and the free disk space, and try again."
        )


def clean_environment() -> dict[str, str]:
    """Return the environment variables without those that point to this environment's packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def log_end(path: Path) -> str:
    """Return the last lines of a log that are not empty."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-_LINES:])


def _read_record(root: Path) -> dict[str, Any]:
    """Return what an environment contains; {} if there is none or it was not completed."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return {}
    path = root / _RECORD
    if not path.is_file():
        fail(f"{root} is not an environment made by this command: give --environment an empty folder, or a new one.")
    try:
        record = read_json(path)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _write_record(root: Path, record: dict[str, Any]) -> None:
    (root / _RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _clear(root: Path) -> None:
    for path in root.iterdir():
        if path.name == _RECORD:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
