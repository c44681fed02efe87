"""Networks that MONAI lacks, and loading weights into any."""

from .bam import BAM
from .vnet import VNet
from .weights import load_weights, read_weights

__all__ = ["BAM", "VNet", "load_weights", "read_weights"]
