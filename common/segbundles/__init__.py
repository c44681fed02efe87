"""What MONAI lacks for four segmentation bundles: networks, losses, transforms, inferers, handlers and metrics.

Sub-packages are named as MONAI's own and are imported at first use, so that the command line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

_SUBMODULES = (
    "bundle",
    "data",
    "datasets",
    "handlers",
    "inferers",
    "losses",
    "metrics",
    "networks",
    "report",
    "transforms",
)


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
