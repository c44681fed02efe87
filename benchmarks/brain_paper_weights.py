"""Convert the weights that Buda et al. published for their brain U-Net, so that this bundle can load them.

    python benchmarks/brain_paper_weights.py unet.pt --out model.pt
    python -m monai.bundle run inferring --bundle_root bundles/brain_flair_unet \
        --config_file bundles/brain_flair_unet/configs/inference.json \
        --args_file bundles/brain_flair_unet/configs/args_reference_paper.json --weights model.pt ...

``unet.pt`` is in the folder weights of https://github.com/mateuszbuda/brain-segmentation-pytorch. Both networks have
the same layers in the same order. Two things differ: a decoder there takes the upsampled channels before those of the
encoder, here after them; and convolutions there have no bias, here one that is 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from segbundles.networks import ValidUNet


def converted(published: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state_dict of a :class:`segbundles.networks.ValidUNet` with the published weights."""
    first, last = published["encoder1.enc1conv1.weight"], published["conv.weight"]
    width = first.shape[0]
    network = ValidUNet(
        first.shape[1], last.shape[0], [width * 2**level for level in range(5)], "batch", padding="same"
    )
    state = network.state_dict()
    theirs = iter(published.items())
    for name, ours in state.items():
        if name.endswith("bias") and state[name.removesuffix("bias") + "weight"].shape[2:] == (3, 3):
            ours.zero_()
            continue
        key, value = next(theirs)
        if value.shape != ours.shape:
            raise SystemExit(f"{key} has shape {tuple(value.shape)}, {name} has {tuple(ours.shape)}: not this network")
        if name.endswith("convolutions.0.weight"):
            up, skip = value.chunk(2, dim=1)
            value = torch.cat([skip, up], dim=1)
        state[name] = value.clone()
    return state


def main() -> None:
    """Convert the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.save(converted(torch.load(options.source, map_location="cpu", weights_only=True)), options.out)


if __name__ == "__main__":
    main()
