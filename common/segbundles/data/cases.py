"""Lists of cases that read the disk at first use, so that a config can name them before the data exists."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from monai.config import PathLike

from segbundles.data.base import DICOM, file_stem, file_suffix
from segbundles.data.dicom import (
    Series,
    channel_series,
    chosen_series,
    is_dicom,
    is_dicom_slice,
    list_series,
    may_be_volume,
)
from segbundles.data.readers import SuffixReader
from segbundles.errors import InputError, fail
from segbundles.files import DATALIST_NAME, SPLITS, read_json, read_table, shown, shown_below, walk
from segbundles.leaks import check_leaks
from segbundles.patterns import Pattern, join, split_list
from segbundles.segments import SEGMENTATION

__all__ = ["Datalist", "FolderImages", "image_root", "list_images"]

logger = logging.getLogger("segbundles")

BY_PATTERN, BY_LABEL = "by the pattern", "as labels"  # reasons that depend on the knob skip
# formats of images that are not read, although a person may expect it
NOT_READ = (
    *(".webp", ".gif", ".jp2", ".j2k", ".jpx", ".jxl", ".heic", ".heif", ".avif", ".psd", ".pgm", ".ppm", ".svg"),
    *(".svs", ".ndpi", ".scn", ".mrxs", ".vsi", ".czi", ".lif", ".lsm", ".nd2", ".oib", ".oif", ".dm3", ".dm4", ".mrc"),
    *(".ima", ".par", ".rec", ".img", ".hdr", ".mgz", ".mgh", ".mnc", ".vtk", ".vti", ".npy", ".npz", ".h5", ".mat"),
)
ARCHIVES = (".zip", ".gz", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz")
CONVERTIBLE = {"PNG": ".png", "TIFF": ".tif", "NIfTI": ".nii"}
RUN_FILES = ("inference.csv", "inference.log", "inferring.config.json")  # what the handlers write beside the results


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

    The ``image`` of a case is a file, or a list of files: the channels of a volume.

    Args:
        dataset_dir: folder of ``datalist.json``, which ``segbundles prepare`` writes.
        split: ``training``, ``validation`` or ``testing``.
        keys: every case must have a file for each of these.
        required: whether an empty split is an error.

    Raises:
        ValueError: at first use, when the folder, the list, the split or a file of a case is missing, or when two
            splits of the list have a group, a file or the content of a file in common.
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
            entries = read_json(path).get(self.split) or []
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
                    continue
                names = entry[key] if isinstance(entry[key], list) else [entry[key]]
                absent = [name for name in names if not (root / name).exists() and not is_dicom(root / name)]
                faults += [f"{key} {name} does not exist" for name in absent]
                if not absent:
                    paths = [str(_unlinked(root / name)) for name in names]
                    case[key] = paths if isinstance(entry[key], list) else paths[0]
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
        check_leaks(path, self.keys, _is_blank)
        return cases


def _is_blank(path: Path) -> bool:
    """Return whether an image has one value throughout; an image that cannot be read is not blank."""
    reader = SuffixReader()
    with suppress(Exception):
        array, _ = reader.get_data(reader.read(path))
        return bool(array.min() == array.max())
    return False


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

    A folder of DICOM slices, whatever their names, is one image; ``dataset_dir`` itself can be such a folder. If it
    contains several series, each is an image, whose path is that of the folder and the name of the series, see
    :class:`segbundles.data.DicomReader`. Series that cannot be volumes are then left out: one slice, slices in several
    orientations (localisers), colours, and images without a position.

    The log says what is left out, with one line per reason:

    - what a pattern of ``skip`` matches;
    - labels: files that a ``datalist.json`` in their folder, or in one above it that is searched, names as labels, and
      ``*.seg.nrrd`` of 3D Slicer;
    - hidden files, and files with other suffixes; if these are formats of images, this is a warning;
    - DICOM series that ``series`` does not choose, or that cannot be volumes;
    - what is in ``output_dir``, and what an earlier run wrote according to the ``inference.csv`` there.

    If ``skip`` is empty, no name decides: labels are segmented too, with a warning. So is a single file that is given
    as ``dataset_dir``.

    Args:
        dataset_dir: folder searched with its sub-folders, or a single image.
        output_dir: not searched when it is inside ``dataset_dir``. The two may be the same folder.
        skip: ``fnmatch`` patterns of paths relative to ``dataset_dir`` to leave out (the labels of a publisher's
            layout, for example), in upper or lower case.
        suffixes: suffixes of images, ``.dcm`` for folders of DICOM slices; None takes all that can be read.
        postfixes: ends of the stems of results, as in :class:`segbundles.handlers.InferenceResults`.
        series: number or description of the DICOM series to take; None takes all, each as an image. With a list, the
            series of a study are the channels of one image, one per item; its path is the folder that contains the
            series, or the folders with one series each. The reader of the images must have the same ``series``.
        channels: one pattern per channel (a list, or a text with commas), where the channels of an image are files or
            DICOM series of their own. Files belong together if they are in the same folder and ``*`` stands for the
            same text, or ``{case}`` does, see :class:`segbundles.patterns.Pattern`; ``image`` is then a list, and
            results are named after the first. An image of which a channel is missing is in the list, so that the reader
            reports it. Files that no pattern matches are left out. None takes each file as an image.

    Raises:
        ValueError: at first use, when nothing is found, when no DICOM series is the chosen one, when two images would
            be written to one output name, when a result would replace an image, or the result of an earlier run of
            another image, and when a single file has another format.
    """

    def __init__(
        self,
        dataset_dir: PathLike,
        output_dir: PathLike | None = None,
        skip: Sequence[str] = ("*_seg.*",),
        suffixes: Sequence[str] | None = None,
        postfixes: Sequence[str] = ("seg",),
        series: int | str | Sequence[int | str] | None = None,
        channels: str | Sequence[str] | None = None,
    ) -> None:
        self.dataset_dir = dataset_dir
        self.channels = split_list(channels)
        self.output_dir = output_dir
        self.skip = tuple(skip)
        self.suffixes = tuple(SuffixReader.suffixes() if suffixes is None else suffixes)
        self.postfixes = tuple(postfixes)
        self.series = series

    @property
    def root(self) -> Path:
        """Return the folder that output paths mirror, see :func:`image_root`."""
        return image_root(self.dataset_dir)

    def _read(self) -> list[dict[str, Any]]:
        given = _unlinked(self.dataset_dir)
        if self.channels and not given.is_dir():
            fail(
                f"channels is {', '.join(self.channels)}, but {str(self.dataset_dir)!r} is not a folder: give the "
                "folder of the patient, or of several."
            )
        if given.is_file():
            self._check_format(given)
            labels = _labels([given.parent / DATALIST_NAME])
            self._warn_of_labels([given] if _is_label(given, labels) else [], "it was given as dataset_dir")
            self._check_other_images([given])
            return [{"image": str(given)}]
        if not given.is_dir() and is_dicom(given):  # the name of a series in a folder
            return [{"image": str(given)}]
        if not given.is_dir():
            fail(f"dataset_dir {str(self.dataset_dir)!r} is neither a folder nor a file: give the images to segment.")
        endings = [suffix for suffix in self.suffixes if suffix not in DICOM]
        series = endings != [*self.suffixes]
        files, left_out = self._sorted_out(sorted(walk(given)))
        found = [path for path in files if file_suffix(path) in endings]
        others = [path for path in files if file_suffix(path) not in endings]
        folders = _series_folders(others) if series else set()
        strange = [path for path in others if path.parent not in folders]
        images = [path for path in strange if file_suffix(path) in NOT_READ]
        if len(strange) > len(images):
            left_out["with another suffix"] = [path for path in strange if path not in images]
        found = sorted([*found, *self._scans(folders, left_out)])
        cases = self._joined(found, left_out) if self.channels else [[path] for path in found]
        report = [f"{len(paths)} {reason} ({self._names(paths)})" for reason, paths in left_out.items()]
        if images:
            kinds = " or ".join(kind for kind, suffix in CONVERTIBLE.items() if suffix in endings)
            unread = f"{len(images)} in formats that are not read ({self._names(images)}): convert them to {kinds}"
            logger.warning(f"Left out: {unread}.")
        if not cases:
            also = ", or files must be slices of a DICOM series" if series else ""
            report += [unread] if images else []
            why = f" Left out: {'; '.join(report)}." if report else ""
            if any(reason == BY_LABEL or reason.startswith(BY_PATTERN) for reason in left_out):
                why += ' With --skip "[]", no name is left out.'
            fail(f"no image under {shown(given)!r}: names must end in one of {', '.join(endings)}{also}.{why}")
        self._check_outputs([paths[0] for paths in cases])
        for line in report:
            logger.info(f"Left out: {line}.")
        return [{"image": [str(path) for path in paths] if self.channels else str(paths[0])} for paths in cases]

    def _check_format(self, path: Path) -> None:
        """Refuse a single file that cannot be an image for this bundle."""
        suffix = file_suffix(path)
        if suffix in self.suffixes or (not {*DICOM}.isdisjoint(self.suffixes) and is_dicom_slice(path)):
            return
        repair = "unpack it first" if path.suffix.lower() in ARCHIVES else "convert it to one of these formats"
        endings = ", ".join(ending for ending in self.suffixes if ending not in DICOM)
        fail(f"{shown(path)} is not an image that can be read here: names must end in one of {endings}; {repair}.")

    def _joined(self, found: Sequence[Path], left_out: dict[str, list[Path]]) -> list[list[Path]]:
        """Return the files of the channels of each image; a file that is missing has the name of its pattern."""
        patterns = [Pattern(text, anywhere=True) for text in self.channels]
        by_key, others = join(patterns, {path.relative_to(self.root).as_posix(): path for path in found})
        if others:
            left_out["that no pattern of channels matches"] = others
        cases = []
        for files in by_key.values():
            place = next(path.parent for path in files if path is not None)
            absent = (place / PurePath(pattern.text).name for pattern in patterns)
            cases.append([path or missing for path, missing in zip(files, absent, strict=True)])
        return sorted(cases)

    def _scans(self, folders: Iterable[Path], left_out: dict[str, list[Path]]) -> list[Path]:
        """Return the paths of the images in folders of DICOM slices, and add the series that are left out."""
        by_folder: dict[Path, list[Series]] = {}
        found = []
        for folder in sorted(folders):
            try:
                by_folder[folder] = list_series(folder)
            except (InputError, OSError):  # the reader says what is wrong
                found.append(folder)
        if isinstance(self.series, list | tuple):
            return [*found, *self._studies(by_folder, left_out)]
        chosen: list[Series] = []
        for series in by_folder.values():
            if self.series is not None:
                chosen += chosen_series(series, self.series)
            elif len(series) > 1:
                chosen += [one for one in series if may_be_volume(one)] or series
            else:
                chosen += series
        every = [one for series in by_folder.values() for one in series]
        if every and not chosen:
            more = f" and {len(every) - 10} more" if len(every) > 10 else ""
            fail(
                f"series is {self.series!r}, but no DICOM series under {shown(self.dataset_dir)!r} has this number or "
                f"description; there are {', '.join(map(str, every[:10]))}{more}."
            )
        self._leave_out(every, chosen, left_out)
        return [*found, *(one.path for one in chosen)]

    def _leave_out(self, series: Sequence[Series], chosen: Sequence[Series], left_out: dict[str, list[Path]]) -> None:
        others = [one.path for one in series if one not in chosen]
        if others:
            reason = "DICOM series that cannot be volumes" if self.series is None else f"by series {self.series!r}"
            left_out.setdefault(reason, []).extend(others)

    def _studies(self, by_folder: dict[Path, list[Series]], left_out: dict[str, list[Path]]) -> list[Path]:
        """Return the folders of the studies whose series are the channels of one image."""
        studies: dict[Path, list[Series]] = {}
        single = [folder for folder, series in by_folder.items() if len(series) == 1 and folder != self.root]
        parents = Counter(folder.parent for folder in single)
        for folder, series in by_folder.items():
            with_siblings = folder in single and parents[folder.parent] > 1
            studies.setdefault(folder.parent if with_siblings else folder, []).extend(series)
        for series in studies.values():
            with suppress(InputError):  # the reader says what is missing
                self._leave_out(series, channel_series(series, self.series), left_out)
        return list(studies)

    def _sorted_out(self, paths: Sequence[Path]) -> tuple[list[Path], dict[str, list[Path]]]:
        """Return the files that may be images, and the others by the reason for which they are left out."""
        root = self.root
        output = None if self.output_dir is None else Path(self.output_dir).resolve()
        labels = _labels(path for path in paths if path.name == DATALIST_NAME)
        patterns = {pattern: f"{BY_PATTERN} {pattern!r} of skip" for pattern in self.skip}
        results = self._earlier_results(output)
        files: list[Path] = []
        left_out: dict[str, list[Path]] = {}
        for path in paths:
            text = f"/{path.relative_to(root).as_posix().lower()}"
            matching = (reason for pattern, reason in patterns.items() if fnmatchcase(text, f"*/{pattern.lower()}"))
            if output not in (None, root) and output in path.parents:
                reason = "in the output folder"
            elif path.parent == output and path.name in RUN_FILES:
                continue
            elif path.name.startswith("."):
                reason = "hidden"
            elif path.parent / _result_stem(path) in results:
                reason = "as results of an earlier run"
            elif self.skip and _is_label(path, labels):
                reason = BY_LABEL
            elif not (path.is_file() or path.is_symlink()):
                reason = "that cannot be read like files"
            else:
                reason = next(matching, None)
            if reason is None:
                files.append(path)
            else:
                left_out.setdefault(reason, []).append(path)
        if not self.skip:
            self._warn_of_labels([path for path in files if _is_label(path, labels)], "skip is []")
        return files, left_out

    def _warn_of_labels(self, paths: Sequence[Path], why: str) -> None:
        if paths:
            logger.warning(f"Segmented although their names are those of labels, because {why}: {self._names(paths)}.")

    def _names(self, paths: Sequence[Path]) -> str:
        names = ", ".join(shown(path.relative_to(self.root).as_posix()) for path in paths[:3])
        return names + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")

    def _outputs(self, output: Path, names: Iterable[PurePath | str]) -> set[Path]:
        """Return the results, without suffix, of images whose paths relative to ``dataset_dir`` have no suffix."""
        return {output / f"{name}_{postfix}" for name in names for postfix in self.postfixes}

    def _earlier_results(self, output: Path | None) -> set[Path]:
        """Return the results, without suffix, that the table of an earlier run names."""
        if output is None or not (output / "inference.csv").is_file():
            return set()
        rows = read_table(output / "inference.csv", errors="replace")
        images = [PurePath(row["file"]) for row in rows if row.get("file")]
        # a row may also be the folder of a DICOM series, which has no suffix
        return self._outputs(output, {name for path in images for name in (path, path.with_name(file_stem(path)))})

    def _check_other_images(self, found: Sequence[Path]) -> None:
        """Refuse to replace the results of other images that have the same names, if these are still there."""
        if self.output_dir is None:
            return
        table, record = Path(self.output_dir, "inference.csv"), Path(self.output_dir, "inferring.config.json")
        try:
            earlier = image_root(read_json(record)["knobs"]["dataset_dir"])
            names = {row["file"] for row in read_table(table, errors="replace") if row["status"] == "ok"}
        except (OSError, ValueError, KeyError, TypeError, csv.Error):  # no earlier run, or only a part of its files
            return
        for path in found:
            other = earlier / path.relative_to(self.root)
            if shown_below(path, self.root) in names and other.exists() and not other.samefile(path):
                fail(
                    f"{shown(self.output_dir)} has the result of another image of this name, {shown(other)}: choose "
                    f"another output_dir for {shown(path)}."
                )

    def _check_outputs(self, found: Sequence[Path]) -> None:
        root = self.root
        by_output: dict[PurePath, Path] = {}
        for path in found:
            # a series in dataset_dir itself is written inside
            folder = PurePath() if path == root else path.parent.relative_to(root)
            name = folder / (path.name if path.is_dir() else file_stem(path))
            twin = by_output.setdefault(name, path)
            if twin != path:
                fail(
                    f"{shown(twin)} and {shown(path)} would both be written as {shown(name.name)}_seg: rename one "
                    "of them."
                )
        if self.output_dir is None:
            return
        self._check_other_images(found)
        written = self._outputs(Path(self.output_dir).resolve(), by_output)
        for path in found:
            if path.parent / _result_stem(path) in written:
                fail(f"{shown(path)} would be replaced by a result of this run: choose another output_dir.")


def _labels(datalists: Iterable[Path]) -> set[Path]:
    """Return the files that datalists name as labels; a list that cannot be read is named in a warning."""
    found: set[Path] = set()
    for path in datalists:
        if not path.is_file():
            continue
        try:
            content = read_json(path)
            entries = [entry for split in SPLITS for entry in content.get(split) or []]
            found |= {_unlinked(path.parent / entry["label"]) for entry in entries if entry.get("label")}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            logger.warning(f"{shown(path)} cannot be read ({error}), so the labels that it names are not known.")
    return found


def _is_label(path: Path, labels: set[Path]) -> bool:
    return path in labels or path.name.lower().endswith(SEGMENTATION)


def list_images(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return every image below a folder, labels included: files, and DICOM series as :class:`FolderImages` names them.

    Args:
        folder: folder to search.
        suffixes: suffixes of images, ``.dcm`` for folders of DICOM slices.
    """
    files = [path for path in sorted(walk(folder)) if not path.name.startswith(".")]
    images = {path for path in files if file_suffix(path) in suffixes and file_suffix(path) not in DICOM}
    series: list[Path] = []
    for place in sorted(
        _series_folders(path for path in files if path not in images) if {*DICOM} & {*suffixes} else ()
    ):
        try:
            series += [one.path for one in list_series(place)]
        except (InputError, OSError):  # the reader says what is wrong
            series.append(place)
    return sorted([*images, *series])


def _result_stem(path: Path) -> str:
    """Return the name of a file without its suffix, as results have it: ``a_seg.seg.nrrd`` gives ``a_seg``."""
    slicer = path.name.lower().endswith(SEGMENTATION)
    return path.name[: -len(SEGMENTATION)] if slicer else file_stem(path)


def _series_folders(files: Iterable[Path]) -> set[Path]:
    """Return the folders in which at least one of the files is a DICOM slice."""
    found: set[Path] = set()
    for path in files:
        with suppress(OSError):  # files of other users; the reader reports a series with a missing slice
            if path.parent not in found and is_dicom_slice(path):
                found.add(path.parent)
    return found
