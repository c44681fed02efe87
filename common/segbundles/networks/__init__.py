"""Networks that MONAI does not have, and loading weights into any network."""

from .bam import BAM
from .engine import use_engine
from .exported import ExportedNetwork, export_network, load_exported
from .fcn import VGG16FCN
from .valid_unet import ValidUNet
from .vgg_weights import VGG16_URLS, load_vgg16_weights
from .vnet import AttentionVNet
from .weights import load_if_given, load_weights, read_weights, require_weights

__all__ = [
    "BAM",
    "VGG16FCN",
    "VGG16_URLS",
    "AttentionVNet",
    "ExportedNetwork",
    "ValidUNet",
    "export_network",
    "load_exported",
    "load_if_given",
    "load_vgg16_weights",
    "load_weights",
    "read_weights",
    "require_weights",
    "use_engine",
]
