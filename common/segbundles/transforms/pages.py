"""One page of a stack of sections."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from segbundles.errors import fail
from segbundles.transforms.check import file_name

__all__ = ["SelectPaged"]


class SelectPaged(MapTransform):
    """Keep the page of a stack that the case names: (C, W, H, D) becomes (C, W, H, 1).

    A case without a page stays whole.

    Args:
        keys: stacks, (C, W, H, D), as :class:`segbundles.data.StackReader` reads them. All hold a page a section, so
            their numbers of pages must be equal.
        page_key: entry of the datalist that holds the page, from 0.
        allow_missing_keys: as in MONAI.

    Raises:
        ValueError: when a stack has other axes, another number of pages than the first, or no such page.
    """

    def __init__(self, keys: KeysCollection, page_key: str = "page", allow_missing_keys: bool = False) -> None:
        """See the class."""
        super().__init__(keys, allow_missing_keys)
        self.page_key = page_key

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data with one page each."""
        d = dict(data)
        page = d.get(self.page_key)
        if page is None:
            return d
        first: torch.Tensor | None = None
        for key in self.key_iterator(d):
            stack = d[key]
            if stack.ndim != 4:
                fail(
                    f"{file_name(stack)} has shape {tuple(stack.shape)} where (channels, W, H, pages) is due: "
                    "read it with segbundles.data.StackReader."
                )
            pages = stack.shape[-1]
            if first is None:
                first = stack
            elif pages != first.shape[-1]:
                fail(
                    f"{file_name(stack)} has {pages} pages, {file_name(first)} has {first.shape[-1]}: a page a section "
                    "is due in both."
                )
            if isinstance(page, bool) or not isinstance(page, int) or not 0 <= page < pages:
                fail(f"{file_name(stack)} has {pages} pages, the datalist asks for page {page!r}: they count from 0.")
            # a copy: a view would keep the whole stack in a cache
            d[key] = stack[..., page : page + 1].clone()
        return d
