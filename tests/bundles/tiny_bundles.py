"""Copies of the bundles whose networks are tiny and untrained, for tests of the doors into them.

The settings that make them tiny are written into their ``inference.json``: what is run needs none.
"""

from __future__ import annotations

import json
import runpy
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nibabel as nib
import numpy as np
import tifffile
import torch
from bundle_runs import ROOT
from monai.bundle import ConfigParser
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import nn

from segbundles.data import FrameReader, PictureReader, StackReader, SuffixReader
from segbundles.facts import facts_path, sha256
from segbundles.handlers.weights import save_weights
from segbundles.knobs import fact_knobs, read_schema
from segbundles.networks import load_weights

AFFINE = np.array([[-2.0, 0, 0, 10], [0, 1.8, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1]])


@dataclass(frozen=True)
class TinyBundle:
    """A bundle, the settings that make its networks tiny, and an image for it.

    Args:
        name: folder under ``bundles``.
        settings: of inference.json.
        shape: of the image, (channels, spatial).
        file: name of the image.
        affine: of the image, None where the format has none.
        reader: reads the image and what is written for it.
        size: input of the network, (batch, channels, spatial), other than what it is exported with.
        networks: file of the weights, and id.
        grey: mean and deviation of what the network gets.
    """

    name: str
    settings: dict[str, Any]
    shape: tuple[int, ...]
    file: str
    affine: np.ndarray | None
    reader: Callable
    size: tuple[int, ...]
    networks: tuple[tuple[str, str], ...] = (("model", "network_def"),)
    grey: tuple[float, float] = (0.0, 1.0)

    def make(self, folder: Path) -> Path:
        """Copy it to ``folder/bundles/name``, with half-precision weights, and give that path."""
        root = folder / "bundles" / self.name
        # without logging.conf: a process of tests keeps its own
        shutil.copytree(
            ROOT / "bundles" / self.name / "configs", root / "configs", ignore=shutil.ignore_patterns("logging.conf")
        )
        config = root / "configs" / "inference.json"
        parser = ConfigParser()
        parser.read_config(str(config))
        parser.update(self.settings)
        config.write_text(json.dumps(parser.get()))
        (root / "models").mkdir()
        for file, net_id in self.networks:
            self.make_weights(root, net_id, root / "models" / f"{file}.pt")
        return root

    def make_weights(self, root: Path, net_id: str, path: Path, **settings: Any) -> None:
        """Write weights of an untrained network of inference.json, and their facts."""
        torch.manual_seed(0)
        network = self.network(root, net_id, **settings)
        x = self.grey[0] + self.grey[1] * _blurred_noise(self.size)
        _decide(network, torch.from_numpy(x).float())
        save_weights(network, path)
        config = json.loads((root / "configs" / "inference.json").read_text()) | settings
        names = fact_knobs(read_schema(root), "weights" if net_id == "network_def" else "locator_weights")
        facts = {"bundle": self.name, "sha256": sha256(path), "knobs": {name: config[name] for name in names}}
        facts_path(path).write_text(json.dumps(facts))

    def network(self, root: Path, net_id: str, weights: Path | None = None, **settings: Any) -> nn.Module:
        """A network of inference.json."""
        parser = ConfigParser()
        parser.read_config(str(root / "configs" / "inference.json"))
        parser.update(settings)
        network = parser.get_parsed_content(net_id)
        return network.eval() if weights is None else load_weights(network, weights)

    def write_image(self, folder: Path) -> np.ndarray:
        """Write an image of blurred noise, and give it, channels first."""
        folder.mkdir(parents=True)
        image = _blurred_noise((1, *self.shape))[0]
        image = np.interp(image, (image.min(), image.max()), (40, 255)).astype(np.uint8)
        path = folder / self.file
        if self.affine is not None:
            channels_last = np.moveaxis(image, 0, -1) if len(image) > 1 else image[0]
            nib.save(nib.Nifti1Image(channels_last, self.affine), path)
        elif path.suffix == ".tif":
            tifffile.imwrite(path, image[0].T, photometric="minisblack")
        else:
            Image.fromarray(image.T).save(path)
        return image

    def read(self, path: Path) -> np.ndarray:
        """Array of a file that was written, without its channels, if any."""
        array = self.reader().get_data(self.reader().read(path))[0]
        return array[..., 0] if self.reader is FrameReader else array


TINY_BUNDLES = (
    TinyBundle(
        "left_atrium_vnet",
        {
            "base_channels": 2,
            "network_spacing_mm": [3.0, 3.0, 3.0],
            "locator_spacing_mm": [6.0, 6.0, 6.0],
            "locator_base_channels": 2,
            "amp": False,
            "device": "cpu",
        },
        (1, 40, 36, 24),
        "heart.nii.gz",
        AFFINE,
        SuffixReader,
        (2, 1, 40, 20, 33),
        (("model", "network_def"), ("locator", "locator_def")),
    ),
    TinyBundle(
        "brain_flair_unet",
        {"base_channels": 2, "depth": 3, "window_size": [32, 32], "amp": False, "device": "cpu"},
        (3, 32, 40, 4),
        "brain.nii.gz",
        AFFINE,
        StackReader,
        (3, 3, 48, 24),
    ),
    TinyBundle(
        "em_membrane_unet",
        {
            "base_channels": 2,
            "depth": 3,
            "window_size": [32, 32],
            "border_pixels": 8,
            "smoothing_pixels": 0.5,
            "mirror_axes": [],
            "quarter_turns": False,
            "amp": False,
            "device": "cpu",
        },
        (1, 48, 56, 2),
        "stack.tif",
        None,
        PictureReader,
        (3, 1, 48, 52),
        grey=(0.5, 0.17),
    ),
    TinyBundle(
        "polyp_fcn8",
        {
            "base_channels": 2,
            "fc_channels": 4,
            "fc_kernel_size": 3,
            "frame_height": 40,
            "amp": False,
            "device": "cpu",
        },
        (3, 64, 48),
        "frame.png",
        None,
        FrameReader,
        (3, 3, 50, 71),
    ),
)


def _blurred_noise(shape: Sequence[int]) -> np.ndarray:
    """Of mean 0 and deviation 1, in shape (batch, channels, spatial)."""
    noise = np.random.default_rng(0).normal(size=shape)
    blurred = gaussian_filter(noise, (0, 0, *[3.0] * (len(shape) - 2)))
    return (blurred - blurred.mean()) / blurred.std()


def _decide(network: nn.Module, x: torch.Tensor) -> None:
    """Scale and shift the last layer, so that the output is mostly sure, and foreground in about half of the image."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # to take on the statistics of x
    *_, weight, bias = network.parameters()
    with torch.no_grad():
        network.train()(x)
        network.eval()
        logits = network(x)
        foreground = logits[:, -1] - logits[:, 0] if len(bias) > 1 else logits[:, 0]
        scale = 5 / foreground.std()
        weight *= scale
        bias *= scale
        bias[-1] -= scale * foreground.median()


def command_line(command: str | Sequence[str]) -> None:
    """Run ``python -m monai.bundle ...`` in this process, as the interpreter would."""
    words = shlex.split(command) if isinstance(command, str) else list(command)
    assert words[:3] == ["python", "-m", "monai.bundle"], words
    with patch("sys.argv", ["monai.bundle", *words[3:]]):
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
