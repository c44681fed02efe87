"""Pack a bundle into one zip that others can download and run: ``segbundles pack``."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from segbundles.commands import find_bundle
from segbundles.errors import fail
from segbundles.facts import facts_path, read_facts, sha256
from segbundles.files import atomic_path, read_json

__all__ = ["LARGEST", "Packed", "pack"]

#: bytes of the largest file that MONAI's model zoo takes
LARGEST = 25_000_000
_LIBRARY = Path(__file__).parent
_NEEDED = ("LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt")
_FOLDERS = ("configs", "docs")
_CARD = "docs/README.md"
_REPLACED = ("_previous", "_shipped")
# packages whose versions have an entry of their own in the metadata
_OWN_VERSIONS = {"monai": "monai", "pytorch": "torch", "numpy": "numpy"}


@dataclass(frozen=True)
class Packed:
    """What was written.

    Args:
        zip: the bundle, with the library.
        large: files to upload beside it; none if the zip contains everything.
    """

    zip: Path
    large: tuple[Path, ...] = ()


def pack(bundle: str, out: str | Path = ".", large_files: str | None = None) -> Packed:
    """Write ``<name>_v<version>.zip`` with configs, documents, licence, weights, their facts, and this library.

    With the library in it, the bundle needs nothing but packages that are on PyPI: those of its ``requirements.txt``,
    which is made from the metadata. Links of the card to pages outside the bundle become plain text. The folders of
    data and results, and weights that a training has replaced, are left out. The same files always give the same bytes.

    Args:
        bundle: its folder or name, see :func:`segbundles.commands.find_bundle`.
        out: folder to write to.
        large_files: address of the folder that files above :data:`LARGEST` will be uploaded to. They are then written
            beside the zip, and ``large_files.json`` in the zip says where to download them. None packs them too.

    Raises:
        ValueError: when a file is missing, the changelog does not mention the version, facts do not describe the
            weights, or nothing can be written.
    """
    root = find_bundle(bundle).resolve()
    for name in _NEEDED:
        if not (root / name).is_file():
            fail(f"{root.name} cannot be packed, because {root / name} does not exist: add it.")
    metadata = _metadata(root)
    name = f"{root.name}_v{metadata['version']}"
    files = dict(_files(root))
    large = {}
    if large_files is not None:
        large = {path: file for path, file in files.items() if file.stat().st_size > LARGEST}
    copies = {path: Path(out, f"{name}_{Path(path).name}") for path in large}
    target = Path(out, f"{name}.zip")
    with atomic_path(target) as part, ZipFile(part, "w", ZIP_DEFLATED) as archive:
        for path, file in sorted(files.items()):
            if path not in large:
                content = file.read_bytes()
                _add(archive, f"{root.name}/{path}", _without_links(content) if path == _CARD else content)
        _add(archive, f"{root.name}/requirements.txt", _requirements(metadata).encode())
        if large:
            text = _large_files(large, {path: f"{large_files.rstrip('/')}/{copies[path].name}" for path in large})
            _add(archive, f"{root.name}/large_files.json", text.encode())
    for path, file in large.items():
        with atomic_path(copies[path]) as part:
            shutil.copyfile(file, part)
    return Packed(target, tuple(copies.values()))


def _metadata(root: Path) -> dict[str, Any]:
    path = root / "configs" / "metadata.json"
    try:
        metadata = read_json(path)
        version, changelog = metadata["version"], metadata["changelog"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"cannot read the version and the changelog of {path} ({error}): correct the file.")
    if version not in changelog:
        fail(f"the changelog of {path} does not mention version {version}: add what is new in it.")
    return metadata


def _without_links(card: bytes) -> bytes:
    """Return a card whose links to pages outside the bundle, which the zip does not contain, are plain text."""
    return re.sub(rb"\[([^\]]*)\]\(\.\./\.\./[^)]*\)", rb"\1", card)


def _requirements(metadata: Mapping[str, Any]) -> str:
    versions = {name: metadata.get(f"{key}_version") for key, name in _OWN_VERSIONS.items()}
    versions |= metadata.get("required_packages_version", {})
    return "".join(f"{name}=={version}\n" for name, version in versions.items() if version)


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files to pack, by their path in the bundle."""
    yield "LICENSE", root / "LICENSE"
    for folder in _FOLDERS:
        yield from _below(root / folder, folder)
    for weights in sorted((root / "models").glob("*.pt")):
        if weights.name.startswith(".") or weights.stem.endswith(_REPLACED):
            continue
        facts = facts_path(weights)
        if read_facts(weights) is None:
            fail(f"{facts} does not describe {weights.name}: restore the file that was written with these weights.")
        for file in (weights, facts):
            yield f"models/{file.name}", file
    yield from _below(_LIBRARY, _LIBRARY.name)


def _below(folder: Path, name: str) -> Iterator[tuple[str, Path]]:
    for file in folder.rglob("*"):
        path = file.relative_to(folder)
        if file.is_file() and not any(part.startswith((".", "__pycache__")) for part in path.parts):
            yield f"{name}/{path.as_posix()}", file


def _add(archive: ZipFile, name: str, content: bytes) -> None:
    info = ZipInfo(name)  # with the earliest date, not today's
    info.external_attr = 0o644 << 16
    info.create_system = 3  # the system that these permissions belong to
    archive.writestr(info, content, ZIP_DEFLATED)


def _large_files(large: Mapping[str, Path], urls: Mapping[str, str]) -> str:
    # MONAI reads YAML too, but only with a package that neither it nor this library installs
    entries = []
    for path, file in large.items():
        entries.append({"path": path, "url": urls[path], "hash_val": sha256(file), "hash_type": "sha256"})
    return json.dumps({"large_files": entries}, indent=4) + "\n"
