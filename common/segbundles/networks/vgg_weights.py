"""Load torchvision's ImageNet weights of VGG-16 into the FCN, without needing torchvision."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from monai.config import PathLike
from monai.networks.blocks import Convolution
from torch import nn

from segbundles.errors import fail

from .fcn import VGG16FCN
from .weights import read_weights

__all__ = ["VGG16_URLS", "load_vgg16_weights"]

logger = logging.getLogger("segbundles")

#: torchvision's files, without and with batch norm; a name ends in the first eight digits of the file's sha256
VGG16_URLS = {
    "vgg16": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "vgg16_bn": "https://download.pytorch.org/models/vgg16_bn-6c64b313.pth",
}
_SHA256 = {
    VGG16_URLS["vgg16"]: "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    VGG16_URLS["vgg16_bn"]: "6c64b3138f2f4fcb3bcc4cafde11619c4f440eb1631787e93a682fd88305888a",
}


def load_vgg16_weights(
    network: VGG16FCN,
    source: PathLike | None = None,
    transposed: bool = False,
    forward: Callable[[], Any] | None = None,
) -> VGG16FCN:
    """Load torchvision's ImageNet VGG-16 into an FCN, and return the FCN.

    All thirteen convolutions are loaded; for a network with batch norm, those of ``vgg16_bn`` with its statistics. The
    first two fully connected layers become fc6 and fc7 if the network has their width and kernel (4096 and 7x7);
    otherwise fc6 and fc7 keep their values and the log says so. Scores and transposed convolutions never change. These
    weights expect RGB in 0..1, minus the mean (0.485, 0.456, 0.406), divided by (0.229, 0.224, 0.225).

    A network with batch norm also accepts the file without batch norm if ``forward`` is given. ``forward`` passes a
    batch of typical images through the network once. Every norm is set to the mean and deviation of its channels on
    that batch, and the next convolution is scaled accordingly. The convolutions then give the same output as the
    file's, with each channel divided by its deviation, and training starts from values of unit scale.

    Args:
        network: FCN whose parameters are replaced, with ``in_channels=3`` and ``base_channels=64``.
        source: file with a state_dict named as torchvision's ``vgg16`` (or ``vgg16_bn`` if the network has batch norm);
            or a URL of one, whose name ends in ``-<first digits of its sha256>.pth``, downloaded once to
            ``torch.hub``'s folder; or None for the published file that fits, see :py:data:`VGG16_URLS` (528 MiB).
        transposed: whether the network sees images as MONAI's readers give them, (channel, width, height). The kernels
            are then transposed too, so that the features are those of the published network on upright images.
        forward: computes ``network`` on a batch; only called if the network has batch norm and the file does not.

    Raises:
        ValueError: when the file is missing, cannot be downloaded, has another hash, is not such a state_dict, or does
            not fit the network's convolutions.
    """
    kind = "vgg16" if network.norm is None else "vgg16_bn"
    if source is None:
        source = VGG16_URLS[kind]
    path = _download(str(source)) if "://" in str(source) else Path(source)
    if not path.is_file():
        fail(f"there are no VGG-16 weights at {path}: download {VGG16_URLS[kind]} and give the path of that file.")
    state, own = read_weights(path), network.state_dict()

    calibrated = network.norm is not None and forward is not None and "features.1.running_mean" not in state
    names = _feature_names(network, network.norm is not None and not calibrated)
    faults = [f"{name} is missing in the file" for name in names.values() if name not in state]
    faults += [
        f"{theirs} has shape {tuple(state[theirs].shape)} in the file and {tuple(own[name].shape)} in the network"
        for name, theirs in names.items()
        if theirs in state and name in own and state[theirs].shape != own[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        fail(
            f"{path} does not fit the convolutions of this FCN: {'; '.join(faults[:3])}{more}. With "
            f"{'norm=None' if network.norm is None else 'batch norm'} it takes torchvision's {kind}, "
            "with in_channels=3 and base_channels=64."
        )
    new = {name: state[theirs] for name, theirs in names.items()}
    if transposed:
        new = {name: value.transpose(2, 3) if value.ndim == 4 else value for name, value in new.items()}
    if network.norm is not None and not calibrated:
        for name in [name for name in new if name.endswith("conv.bias")]:
            # the network has no such bias: the norm subtracts its mean, so the bias is subtracted from the mean
            mean = name.replace("conv.bias", "adn.N.running_mean")
            new[mean] = new[mean] - new.pop(name)

    loaded = ["convolutions"]
    bias = "conv.bias" if network.norm is None or calibrated else "adn.N.bias"
    for layer, theirs in (("fc6", "classifier.0"), ("fc7", "classifier.3")):
        weight = own[f"{layer}.conv.weight"]
        given = state.get(f"{theirs}.weight")
        if given is None or f"{theirs}.bias" not in state:
            reason = f"the file has no {theirs}"
        elif given.shape != (weight.shape[0], weight[0].numel()):
            reason = f"{theirs} is {tuple(given.shape)} and {layer} {(weight.shape[0], weight[0].numel())}"
        elif layer == "fc7" and "fc6" not in loaded:
            reason = "fc6 keeps its values too"
        else:
            given = given.reshape(weight.shape)
            given = given.transpose(2, 3) if transposed else given
            new |= {f"{layer}.conv.weight": given, f"{layer}.{bias}": state[f"{theirs}.bias"]}
            loaded.append(layer)
            continue
        logger.info(f"{layer} keeps its values: {reason}.")
    biases = [new.pop(name) for name in list(new) if calibrated and name.endswith("conv.bias")]
    network.load_state_dict(new, strict=False)
    if calibrated:
        units = [*(unit for block in network.blocks for unit in block), network.fc6, network.fc7][: len(biases)]
        _calibrate(network, units, biases, forward)
    logger.info(f"Loaded VGG-16's {', '.join(loaded)} from {path}")
    return network


def _calibrate(
    network: VGG16FCN, units: list[Convolution], biases: list[torch.Tensor], forward: Callable[[], Any]
) -> None:
    """Set each unit's norm from its inputs in ``forward``, as if its convolution had the bias, and scale the next."""
    hooks = []
    for unit, bias, after in zip(units, biases, [*units[1:], None], strict=True):

        def set_norm(
            norm: nn.Module, inputs: tuple, bias: torch.Tensor = bias, after: nn.Module | None = after
        ) -> None:
            var, mean = torch.var_mean(inputs[0].float(), dim=(0, 2, 3), correction=0)
            scale = (var + norm.eps).sqrt()
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
            norm.weight.fill_(1)
            norm.bias.copy_((mean + bias.to(mean.device)) / scale)
            if after is not None:
                after.conv.weight.mul_(scale[:, None, None])

        hooks.append(unit.adn.N.register_forward_pre_hook(set_norm))
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            forward()
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()


def _feature_names(network: VGG16FCN, normed: bool) -> dict[str, str]:
    """Return the names of the convolutions (always with bias) and norms in the network, and torchvision's names."""
    pairs: dict[str, str] = {}
    index = 0
    for b, block in enumerate(network.blocks):
        for u in range(len(block)):
            unit = f"blocks.{b}.{u}"
            pairs |= {f"{unit}.conv.{name}": f"features.{index}.{name}" for name in ("weight", "bias")}
            if normed:
                for name in ("weight", "bias", "running_mean", "running_var"):
                    pairs[f"{unit}.adn.N.{name}"] = f"features.{index + 1}.{name}"
            index += 3 if normed else 2
        index += 1
    return pairs


def _download(url: str) -> Path:
    """Return the file of a URL in torch.hub's folder; download and check it if it is not there yet."""
    name = Path(urlparse(url).path).name
    digits = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    if digits is None:
        fail(
            f"the file name of {url} does not end in '-<first 8 or more digits of its sha256>.pth', so the download "
            "cannot be checked: download it by hand and give the path."
        )
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    logger.info(f"Downloading {url} to {path}")
    known = _SHA256.get(url, digits[1])
    by_hand = (
        f"Download it by hand (its sha256 {'is' if len(known) == 64 else 'begins with'} {known}) and give its path."
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=known)
    except (OSError, HTTPException) as error:
        fail(f"{url} cannot be downloaded to {path} ({error}). {by_hand}")
    except RuntimeError as error:
        fail(f"{url} gave another file than expected ({error}). {by_hand}")
    return path
