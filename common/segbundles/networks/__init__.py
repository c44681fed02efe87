"""Networks that MONAI lacks, and loading weights into any."""

from .bam import BAM
from .exported import load_exported
from .fcn import FCN
from .valid_unet import ValidUNet
from .vgg_weights import VGG16_URLS, load_vgg16_weights
from .vnet import VNet
from .weights import check_loaded, load_weights, read_weights

__all__ = [
    "BAM",
    "FCN",
    "VGG16_URLS",
    "VNet",
    "ValidUNet",
    "check_loaded",
    "load_exported",
    "load_vgg16_weights",
    "load_weights",
    "read_weights",
]
