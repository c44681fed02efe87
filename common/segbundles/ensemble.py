"""The other members of an ensemble, each with the settings that its weights were trained with."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose

from segbundles.errors import fail
from segbundles.facts import weights_files
from segbundles.inferers import Member
from segbundles.networks import load_weights
from segbundles.transforms import KeepOriginald, MemberInputsd

if TYPE_CHECKING:
    from segbundles.bundle import RunSettings

__all__ = ["load_members"]

logger = logging.getLogger("segbundles")


def load_members(
    settings: RunSettings, inferer: str = "member_inferer", preprocessing: str | None = None
) -> list[Member]:
    """Load the members of an ensemble after the first one, which the config itself loads.

    The config of a member is the running one with the member's own weights and their facts, so that each has its own
    network, locator, pixel size and normalisation. Postprocessing is that of the first.

    Args:
        settings: settings of the run; several files in the knob ``weights`` are an ensemble.
        inferer: id of what segments an image with one network.
        preprocessing: id of the preprocessing, if members differ in it; see
            :class:`segbundles.transforms.MemberInputsd`.

    Returns:
        The members; none if the knob ``weights`` names a single file.

    Raises:
        ValueError: when weights do not fit, or the config runs an exported network.
    """
    members = []
    for config in settings.members:
        parser = ConfigParser(config)
        own: RunSettings = parser.get_parsed_content("settings")
        (path,) = weights_files(parser.get_parsed_content("weights"))
        network = parser.get_parsed_content("network")
        if isinstance(network, torch.jit.ScriptModule):
            fail(f"{path} is a member of an ensemble, and an exported network has no other weights: give one file.")
        load_weights(getattr(network, "module", network), path)
        steps = parser.get_parsed_content(preprocessing).flatten().transforms if preprocessing else ()
        kept = [step for step in steps if isinstance(step, KeepOriginald)]
        steps = steps[steps.index(kept[0]) + 1 :] if kept else ()
        steps = Compose([step for step in steps if not isinstance(step, MemberInputsd)])
        channels = parser.get_parsed_content("network_def::in_channels") if kept else None
        members.append(Member(path.stem, parser.get_parsed_content(inferer), network.eval(), steps, channels))
        settings.notes += [note for note in own.notes if note not in settings.notes]
        logger.info(f"Loaded weights from {path}")
    return members
