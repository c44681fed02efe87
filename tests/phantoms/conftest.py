from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def phantom(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the phantom that a module's ``make_phantom`` makes with its settings ``SMALL``."""
    out = tmp_path_factory.mktemp("phantom")
    request.module.make_phantom(out, **request.module.SMALL)
    return out
