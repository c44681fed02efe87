"""Lists of cases that read the disk at first use, so that a config can name them before the data is there."""

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
from segbundles.files import walk

__all__ = ["Datalist", "FolderImages", "image_root"]

SECTIONS = ("training", "validation", "testing")


class _LazyCases(Sequence):
    """A list of dictionaries that is made at the first ``len`` or index."""

    _cases: list[dict[str, Any]] | None = None

    def _read(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    @property
    def cases(self) -> list[dict[str, Any]]:
        """The list itself, read now if it was not."""
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
    """One section of ``dataset_dir/datalist.json`` (Decathlon format), with absolute paths.

    Args:
        dataset_dir: folder that holds ``datalist.json``; ``segbundles prepare`` writes it.
        section: ``training``, ``validation`` or ``testing``.
        keys: what every case must have a file for.
        required: whether an empty section is an error.

    Raises:
        ValueError: at first use, when the folder, the list, the section or a file of a case is missing.
    """

    def __init__(
        self,
        dataset_dir: PathLike,
        section: str = "training",
        keys: Sequence[str] = ("image", "label"),
        required: bool = True,
    ) -> None:
        """See the class."""
        self.dataset_dir = dataset_dir
        self.section = section
        self.keys = tuple(keys)
        self.required = required

    def _read(self) -> list[dict[str, Any]]:
        root = Path(self.dataset_dir)
        path = root / "datalist.json"
        prepare = f"`segbundles prepare DATASET --source FOLDER --out {root}` writes one (or `segbundles phantom`)"
        if not root.is_dir():
            fail(f"dataset_dir {str(root)!r} is not a folder: give --dataset_dir one with a datalist.json; {prepare}.")
        if not path.is_file():
            fail(f"there is no datalist.json in {str(root)!r}: {prepare}.")
        if self.section not in SECTIONS:
            fail(f"section must be one of {', '.join(SECTIONS)}, got {self.section!r}.")
        try:
            entries = json.loads(path.read_text(encoding="utf-8")).get(self.section) or []
        except (ValueError, AttributeError) as error:
            fail(f"{path} is not a datalist in JSON ({error}): {prepare}.")
        if not entries and self.required:
            fail(f"{path} has no cases under {self.section!r}: add some, or choose another section.")
        cases, faults = [], []
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict):
                fail(f"{path}, {self.section}: entry {number} is {entry!r}, not a dictionary of files; {prepare}.")
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
        if entries and bare and self.section != "training":
            fail(
                f"{path}: no entry under {self.section!r} has a {bare[0]}, so this section has no truth to score: "
                f"choose another section, or add a {bare[0]} to its entries."
            )
        if faults:
            more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
            fail(f"{path}, {self.section}: {'; '.join(faults[:5])}{more}. Mend it, or run `segbundles prepare` again.")
        return cases


def _unlinked(path: PathLike) -> Path:
    """Absolute path without links; a linked file keeps its own name and folder, which name the output."""
    path = Path(path)
    return path.parent.resolve() / path.name if path.is_file() else path.resolve()


def image_root(dataset_dir: PathLike) -> Path:
    """Folder that output paths mirror: ``dataset_dir``, or the one that holds it if it is (a link to) a file."""
    path = _unlinked(dataset_dir)
    return path.parent if path.is_file() else path


class FolderImages(_LazyCases):
    """Every image under a folder, or one file, as ``{"image": path}``.

    A folder that holds DICOM slices, whatever their names, is one image; so is ``dataset_dir`` itself if it does.

    Args:
        dataset_dir: folder searched with its sub-folders, or a single image.
        output_dir: not searched when it lies inside ``dataset_dir``.
        skip: patterns of paths relative to ``dataset_dir`` to leave out (labels of a publisher's layout, say), as
            ``fnmatch`` reads them, in capitals or not; hidden files, ``*_seg.*`` and ``*_cells.*`` are always left out.
        suffixes: endings taken as images, ``.dcm`` for folders of DICOM slices; None takes all that can be read.

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
        """See the class."""
        self.dataset_dir = dataset_dir
        self.output_dir = output_dir
        self.skip = (*skip, "*_seg.*", "*_cells.*")
        self.suffixes = tuple(SuffixReader.suffixes() if suffixes is None else suffixes)

    @property
    def root(self) -> Path:
        """Folder that output paths mirror, see :func:`image_root`."""
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
            fail(f"dataset_dir {str(self.dataset_dir)!r} is neither a folder nor a file: name images to segment.")
        endings = [suffix for suffix in self.suffixes if suffix not in DICOM]
        series = endings != [*self.suffixes]
        files = (path for path in walk(given) if series or file_suffix(path) in endings)
        files = [path for path in files if (path.is_file() or path.is_symlink()) and not self._skipped(path)]
        found = [path for path in files if file_suffix(path) in endings]
        if series:
            found += _series_folders(path for path in files if file_suffix(path) not in endings)
        if not found:
            also = ", or files be slices of a DICOM series" if series else ""
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
    """Folders in which at least one of the files is a DICOM slice."""
    found: set[Path] = set()
    for path in files:
        with suppress(OSError):  # of others' files; a series that lacks a slice is told by its reader
            if path.parent not in found and is_dicom_slice(path):
                found.add(path.parent)
    return found
