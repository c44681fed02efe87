from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

# before torch is imported: two pytest processes that each use both cores wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT.parent / "shared" / "real_data" / "samples"


@pytest.fixture(autouse=True)
def log_as_at_the_start() -> None:
    """Whatever a bundle's logging.conf set in an earlier test, which may have closed what it then wrote to."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("segbundles").setLevel(logging.NOTSET)
    for logger in map(logging.getLogger, (None, "ignite", "monai")):
        for handler in logger.handlers[:]:
            if getattr(getattr(handler, "stream", None), "closed", False):
                logger.removeHandler(handler)


@pytest.fixture(scope="session")
def left_atrium_phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared phantom of five tiny cases: three for training, one each for validation and testing."""
    from segbundles.phantoms.left_atrium import make_phantom

    out = tmp_path_factory.mktemp("phantom")
    make_phantom(out, 5, 0, (64, 64, 32), (3.0, 3.0, 3.0))
    return out


@pytest.fixture(scope="session")
def brain_phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared phantom of five tiny patients: three for training, one each for validation and testing."""
    from segbundles.phantoms.brain import make_phantom

    out = tmp_path_factory.mktemp("phantom")
    make_phantom(out, 5, 0, (32, 32), 6)
    return out


@pytest.fixture(scope="session")
def em_phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared phantom of six small sections: four for training, one each for validation and testing."""
    from segbundles.phantoms.em import make_phantom

    out = tmp_path_factory.mktemp("phantom")
    make_phantom(out, 6, 0, (64, 80))
    return out


@pytest.fixture
def samples() -> Path:
    """Folder of real sample cases."""
    if not SAMPLES.is_dir():
        pytest.skip(f"no real samples at {SAMPLES}")
    return SAMPLES
