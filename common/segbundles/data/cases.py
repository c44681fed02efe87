"""Lists of cases that read the disk at first use, so that a config can name them before the data exists."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from monai.config import PathLike

from segbundles.data.dicom import is_dicom_slice
from segbundles.data.readers import DICOM, SuffixReader, file_stem, file_suffix
from segbundles.errors import fail
from segbundles.files import DATALIST_NAME, SPLITS, walk

__all__ = ["Datalist", "FolderImages", "image_root"]


class _LazyCases(Sequence):
    """Hold a list of dictionaries that is made at the first ``len`` or index."""

    _cases: list[dict[str, Any]] | None = None

    def _read(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    @property
    def cases(self) -> list[dict[str, Any]]:
        """Return the list itself, and read it first if necessary."""
        if self._cases is None:
            self._cases = self._read()
        return self._cases

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: Any) -> Any:
        return self.cases[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.cases)


class Datalist(_LazyCases):
    """Read one split of ``dataset_dir/datalist.json`` (Decathlon format), with absolute paths.

    Args:
        dataset_dir: folder of ``datalist.json``, which ``segbundles prepare`` writes.
        split: ``training``, ``validation`` or ``testing``.
        keys: every case must have a file for each of these.
        required: whether an empty split is an error.

    Raises:
        ValueError: at first use, when the folder, the list, the split or a file of a case is missing.
    """

    def __init__(
        self,
        dataset_dir: PathLike,
        split: str = "training",
        keys: Sequence[str] = ("image", "label"),
        required: bool = True,
    ) -> None:
        self.dataset_dir = dataset_dir
        self.split = split
        self.keys = tuple(keys)
        self.required = required

    def _read(self) -> list[dict[str, Any]]:
        root = Path(self.dataset_dir)
        path = root / DATALIST_NAME
        prepare = f"`segbundles prepare DATASET --source FOLDER --out {root}` writes one (or `segbundles phantom`)"
        if not root.is_dir():
            fail(f"dataset_dir {str(root)!r} is not a folder: give --dataset_dir one with a datalist.json; {prepare}.")
        if not path.is_file():
            fail(f"there is no datalist.json in {str(root)!r}: {prepare}.")
        if self.split not in SPLITS:
            fail(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}.")
        try:
            entries = json.loads(path.read_text(encoding="utf-8")).get(self.split) or []
        except (ValueError, AttributeError) as error:
            fail(f"{path} is not a datalist in JSON ({error}): {prepare}.")
        if not entries and self.required:
            fail(f"{path} has no cases under {self.split!r}: add cases to the {self.split} split, or choose another.")
        cases, faults = [], []
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict):
                fail(f"{path}, {self.split}: entry {number} is {entry!r}, not a dictionary of files; {prepare}.")
            case = dict(entry)
            for key in self.keys:
                if not entry.get(key):
                    faults.append(f"entry {number} ({entry.get('image', '?')}) has no {key}")
                elif not (root / entry[key]).exists():
                    faults.append(f"{key} {entry[key]} does not exist")
                else:
                    case[key] = str(_unlinked(root / entry[key]))
            cases.append(case)
        bare = [key for key in self.keys if key != "image" and not any(entry.get(key) for entry in entries)]
        if entries and bare and self.split != "training":
            fail(
                f"{path}: no entry under {self.split!r} has a {bare[0]}, so there is no truth to compare with: "
                f"choose another split, or add a {bare[0]} to its entries."
            )
        if faults:
            more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
            fail(f"{path}, {self.split}: {'; '.join(faults[:5])}{more}. Fix it, or run `segbundles prepare` again.")
        return cases


def _unlinked(path: PathLike) -> Path:
    """Return an absolute path without links; a linked file keeps its own name and folder, which name the output."""
    path = Path(path)
    return path.parent.resolve() / path.name if path.is_file() else path.resolve()


def image_root(dataset_dir: PathLike) -> Path:
    """Return the folder that output paths mirror: ``dataset_dir``, or its folder if it is a file or a link to one."""
    path = _unlinked(dataset_dir)
    return path.parent if path.is_file() else path


class FolderImages(_LazyCases):
    """List every image under a folder, or one file, as ``{"image": path}``.

    A folder of DICOM slices, whatever their names, is one image; ``dataset_dir`` itself can be such a folder.

    Args:
        dataset_dir: folder searched with its sub-folders, or a single image.
        output_dir: not searched when it is inside ``dataset_dir``.
        skip: ``fnmatch`` patterns of paths relative to ``dataset_dir`` to leave out (the labels of a publisher's
            layout, for example), in upper or lower case. Hidden files, ``*_seg.*`` and ``*_cells.*`` are always left
            out.
        suffixes: suffixes of images, ``.dcm`` for folders of DICOM slices; None takes all that can be read.

    Raises:
        ValueError: at first use, when nothing is found, or when two images would be written to one output name.
    """

    def __init__(
        self,
        dataset_dir: PathLike,
        output_dir: PathLike | None = None,
        skip: Sequence[str] = (),
        suffixes: Sequence[str] | None = None,
    ) -> None:
        self.dataset_dir = dataset_dir
        self.output_dir = output_dir
        self.skip = (*skip, "*_seg.*", "*_cells.*")
        self.suffixes = tuple(SuffixReader.suffixes() if suffixes is None else suffixes)

    @property
    def root(self) -> Path:
        """Return the folder that output paths mirror, see :func:`image_root`."""
        return image_root(self.dataset_dir)

    def _skipped(self, path: Path) -> bool:
        relative = path.relative_to(self.root)
        if any(part.startswith(".") for part in relative.parts):
            return True
        output = None if self.output_dir is None else Path(self.output_dir).resolve()
        if output is not None and output != self.root and output in path.parents:
            return True
        text = f"/{relative.as_posix().lower()}"
        return any(fnmatchcase(text, f"*/{pattern.lower()}") for pattern in self.skip)

    def _read(self) -> list[dict[str, Any]]:
        given = _unlinked(self.dataset_dir)
        if given.is_file():
            return [{"image": str(given)}]
        if not given.is_dir():
            fail(f"dataset_dir {str(self.dataset_dir)!r} is neither a folder nor a file: give the images to segment.")
        endings = [suffix for suffix in self.suffixes if suffix not in DICOM]
        series = endings != [*self.suffixes]
        files = (path for path in walk(given) if series or file_suffix(path) in endings)
        files = [path for path in files if (path.is_file() or path.is_symlink()) and not self._skipped(path)]
        found = [path for path in files if file_suffix(path) in endings]
        if series:
            found += _series_folders(path for path in files if file_suffix(path) not in endings)
        if not found:
            also = ", or files must be slices of a DICOM series" if series else ""
            fail(f"no image under {str(given)!r}: names must end in one of {', '.join(endings)}{also}.")
        by_output: dict[Path, Path] = {}
        for path in sorted(found):
            folder = path.parent if path != given else given  # a series in dataset_dir itself
            name = path.name if path.is_dir() else file_stem(path)
            twin = by_output.setdefault(folder / name, path)
            if twin != path:
                fail(f"{twin} and {path} would both be written as {name}_seg: rename one of them.")
        return [{"image": str(path)} for path in sorted(found)]


def _series_folders(files: Iterable[Path]) -> set[Path]:
    """Return the folders in which at least one of the files is a DICOM slice."""
    found: set[Path] = set()
    for path in files:
        with suppress(OSError):  # files of other users; the reader reports a series with a missing slice
            if path.parent not in found and is_dicom_slice(path):
                found.add(path.parent)
    return found
