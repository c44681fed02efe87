"""Networks, losses, transforms, inferers, handlers and metrics that four segmentation bundles add to MONAI.

Sub-packages are named like MONAI's own. Each is imported at first use, so that the command line answers at once.
"""

from __future__ import annotations

import logging
import warnings
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

__version__ = "0.2.0"

# MONAI's LoadImage creates all of its readers, and this one complains in every run without NVIDIA's decoder
warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader: nvImageCodec decoder plugin did not register")
logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)


def __getattr__(name: str) -> ModuleType:
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
