from __future__ import annotations

import re

import pytest

from segbundles.errors import check_multiples


@pytest.mark.parametrize(("size", "depth", "more"), [([16, 48], 5, 0), ([388, 388], 5, 4), ([7], 1, 0)])
def test_sizes_that_fit_the_depth_pass(size: list[int], depth: int, more: int) -> None:
    check_multiples("patch_size", size, depth, more)


@pytest.mark.parametrize(
    ("more", "message"),
    [(0, "patch_size [16, 20] must be multiples of 2 ** (depth - 1) = 16."), (4, "= 16, and 4 more.")],
)
def test_others_are_refused(more: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_multiples("patch_size", (16, 20), 5, more)
