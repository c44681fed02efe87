"""Networks that MONAI lacks, and loading weights into any."""

from .bam import BAM
from .fcn import FCN
from .valid_unet import ValidUNet
from .vgg_weights import VGG16_URLS, load_vgg16_weights
from .vnet import VNet
from .weights import load_weights, read_weights

__all__ = ["BAM", "FCN", "VGG16_URLS", "VNet", "ValidUNet", "load_vgg16_weights", "load_weights", "read_weights"]
