"""Serve the bundles with MONAI Label, in a Python environment of its own."""

from .environment import MONAI_LABEL, default_environment, make_environment
from .server import LabelServer, find_bundles

__all__ = ["MONAI_LABEL", "LabelServer", "default_environment", "find_bundles", "make_environment"]
