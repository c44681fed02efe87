"""Reading one page of a TIFF with several."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from monai.config import DtypeLike, KeysCollection
from monai.data import ImageReader
from monai.transforms import LoadImaged

from segbundles.data import StackReader
from segbundles.data.pictures import page_count
from segbundles.errors import fail
from segbundles.meta import file_name

__all__ = ["LoadPaged"]


class LoadPaged(LoadImaged):
    """Read stacks with :class:`segbundles.data.StackReader`; if a case names a page, read only that, (W, H, 1).

    A page is what :func:`segbundles.data.pictures.read_picture` says. Other pages are not decoded, so a stack whose
    pages are cases is as fast to read as single files.

    Args:
        keys: stacks to read. If a case names a page, all must have the same number of pages.
        page_key: entry of the datalist with the page of a TIFF, from 0.
        dtype: as in MONAI.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: as for ``StackReader``, and when a stack has another number of pages than the first.
    """

    def __init__(
        self,
        keys: KeysCollection,
        page_key: str = "page",
        dtype: DtypeLike = np.float32,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, reader=StackReader, dtype=dtype, allow_missing_keys=allow_missing_keys)
        self.page_key = page_key

    def __call__(self, data: Mapping[Hashable, Any], reader: ImageReader | None = None) -> dict[Hashable, Any]:
        """Return the data with images instead of paths."""
        page = data.get(self.page_key)
        if page is None:
            return super().__call__(data, reader)
        loaded = super().__call__(data, StackReader(page))
        files = [file_name(loaded[key]) for key in self.key_iterator(loaded)]
        pages = {file: page_count(file) for file in files}
        for path, number in pages.items():
            if number != pages[files[0]]:
                fail(f"{path} has {number} pages but {files[0]} has {pages[files[0]]}: both must have one per section.")
        return loaded
