"""Settings and phantoms with which a bundle trains in a second or two, for tests of what goes around a training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle_runs import ROOT

from segbundles.phantoms import brain, em, left_atrium, polyp


@dataclass(frozen=True)
class TinyTraining:
    """A bundle that is trained with a tiny network, for an epoch.

    Args:
        name: folder under ``bundles``.
        metric: the key metric of its validation.
        phantom: writes prepared data to a folder, given that, a seed and optionally the number of cases, 4 or more.
        settings: of train.json and evaluate.json.
    """

    name: str
    metric: str
    phantom: Callable[..., Any]
    settings: dict[str, Any]

    @property
    def root(self) -> Path:
        """Folder of the bundle."""
        return ROOT / "bundles" / self.name


_COMMON = {"max_epochs": 1, "val_interval": 1, "base_channels": 2, "amp": False, "device": "cpu"}
TINY_TRAININGS = {
    tiny.name: tiny
    for tiny in (
        TinyTraining(
            "left_atrium_vnet",
            "val_mean_dice",
            lambda out, seed, cases=4: left_atrium.make_phantom(out, cases, seed, (48, 48, 24), (4.0, 4.0, 4.0)),
            {
                **_COMMON,
                "network_spacing_mm": [8.0, 8.0, 8.0],
                "patch_size": [16, 16, 16],
                "use_locator": False,
            },
        ),
        TinyTraining(
            "brain_flair_unet",
            "val_mean_dice",
            lambda out, seed, cases=4: brain.make_phantom(out, cases, seed, (32, 32), 5),
            {
                **_COMMON,
                "depth": 3,
                "patch_size": [32, 32],
                "window_size": [32, 32],
                "batch_size": 4,
                "mirror_axes": [],
            },
        ),
        TinyTraining(
            "em_membrane_unet",
            "val_pixel_accuracy",
            lambda out, seed, cases=4: em.make_phantom(out, cases, seed, (64, 64)),
            {
                **_COMMON,
                "depth": 3,
                "patch_size": [32, 32],
                "window_size": [32, 32],
                "border_pixels": 8,
                "patches_per_section": 2,
                "mirror_axes": [],
                "quarter_turns": False,
            },
        ),
        TinyTraining(
            "polyp_fcn8",
            "val_jaccard",
            lambda out, seed, cases=4: polyp.make_phantom(out, cases, 2, seed, (64, 48)),
            {
                **_COMMON,
                "fc_channels": 4,
                "fc_kernel_size": 3,
                "frame_height": 48,
                "patch_size": [32, 32],
                "batch_size": 4,
            },
        ),
    )
}
