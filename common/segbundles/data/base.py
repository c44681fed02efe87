"""What all readers share: the suffixes, the refusal of files that cannot be read, and lists of files as channels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import PathLike
from monai.data import ImageReader
from monai.utils import MetaKeys, ensure_tuple

from segbundles.errors import InputError, fail
from segbundles.files import shown
from segbundles.meta import add_note, image_meta, notes_of

__all__ = ["DICOM", "ITK", "NIFTI", "PIL", "TIFF", "FileReader", "as_channels", "file_stem", "file_suffix", "shown"]

NIFTI = (".nii", ".nii.gz")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
TIFF = (".tif", ".tiff")
PIL = (".png", ".bmp", ".jpg", ".jpeg")
DICOM = (".dcm",)  # means folders of slices, whatever their names
GRID_TOLERANCE = 1e-3  # of a voxel
CHANNEL_TOLERANCE = 0.1  # of a voxel, because DICOM writes positions with few decimals


def file_suffix(path: PathLike) -> str:
    """Return the suffix in lower case; ``.nii.gz`` counts as one."""
    name = Path(path).name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def file_stem(path: PathLike) -> str:
    """Return the name of a file without its suffix: ``a.b.nii.gz`` gives ``a.b``."""
    name = Path(path).name
    suffix = file_suffix(path)
    return name[: len(name) - len(suffix)] if suffix else name


class FileReader(ImageReader):
    """Base of this library's readers: one file gives an image, several files give its channels.

    ``get_data`` reads, not ``read``: when ``read`` raises, MONAI's ``LoadImage`` tries its own readers, which may
    accept a damaged file.
    """

    suffixes: tuple[str, ...] = ()

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Return whether every file has one of the suffixes."""
        return all(file_suffix(name) in self.suffixes for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> tuple[list[Path], dict[str, Any]]:
        """Take the files of one image; ``get_data`` reads them.

        Args:
            data: path of the file, or one path per channel.
            kwargs: passed to ``decode``.
        """
        return [Path(path) for path in ensure_tuple(data)], kwargs

    def get_data(self, img: tuple[Sequence[Path], dict[str, Any]]) -> tuple[np.ndarray, dict]:
        """Return array and metadata of the files that ``read`` took.

        Raises:
            ValueError: when a file does not exist or cannot be decoded, and when files that are to be channels have
                several channels each, or differ in size or position.
        """
        paths, kwargs = img
        parts = [self._load(Path(path), kwargs) for path in ensure_tuple(paths)]
        return parts[0] if len(parts) == 1 else as_channels(paths, parts)

    def exists(self, path: Path) -> bool:
        """Return whether there is something to read under a path."""
        return path.exists()

    def decode(self, path: Path, **kwargs: Any) -> tuple[np.ndarray, dict]:
        """Return array and metadata of one file.

        Raises:
            ValueError: when the file is refused; the message does not name it. Any other exception means that the file
                is truncated or damaged.
        """
        raise NotImplementedError

    def _load(self, path: Path, kwargs: dict[str, Any]) -> tuple[np.ndarray, dict]:
        name = shown(path)
        if name != str(path):
            fail(f"cannot read {name}: its name contains bytes that are not UTF-8; rename it.")
        if not self.exists(path):
            fail(f"cannot read {path}: there is no such file.")
        try:
            return self.decode(path, **kwargs)
        except InputError as error:
            fail(f"cannot read {path}: {error}")
        except MemoryError:
            fail(f"cannot read {path}: it does not fit into memory, or its header is damaged.")
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            fail(f"cannot read {path}: it is truncated or damaged ({reason}).")


def as_channels(paths: Sequence[Path], parts: Sequence[tuple[np.ndarray, dict]]) -> tuple[np.ndarray, dict]:
    """Stack images of one channel along a last axis, on the grid of the first.

    Args:
        paths: their files, for messages.
        parts: array and metadata of each.

    Raises:
        ValueError: when an image has several channels, or they differ in size or position.
    """
    arrays = []
    first = parts[0][1]
    size = tuple(first[MetaKeys.SPATIAL_SHAPE])
    for path, (array, meta) in zip(paths, parts, strict=True):
        channels = array.shape[-1] if meta[MetaKeys.ORIGINAL_CHANNEL_DIM] == -1 else 1
        if channels > 1:
            fail(f"{path} has {channels} channels but is one of {len(paths)} files, one per channel.")
        if tuple(meta[MetaKeys.SPATIAL_SHAPE]) != size or _apart(first, meta) > CHANNEL_TOLERANCE:
            fail(
                f"{path} and {paths[0]} are channels of one image but differ in size or position: resample them to one "
                "grid beforehand."
            )
        arrays.append(array.reshape(size))
    stacked = {**first, **image_meta(first[MetaKeys.AFFINE], size, channels_last=True)}
    add_note(stacked, *(notes_of(meta) for _, meta in parts))
    return np.stack(arrays, axis=-1), stacked


def _apart(first: dict, second: dict) -> float:
    """Return the largest distance between the corners of two grids of one size, in voxels of the first."""
    corners = np.array(list(product(*((0, n - 1) for n in first[MetaKeys.SPATIAL_SHAPE]))))
    rank = corners.shape[1]
    one, two = (np.asarray(meta[MetaKeys.AFFINE])[:rank, [*range(rank), -1]] for meta in (first, second))
    moved = corners @ (two - one)[:, :rank].T + (two - one)[:, rank]
    return float(np.linalg.norm(moved, axis=1).max() / np.linalg.norm(one[:, :rank], axis=0).min())
