"""Mean prediction of several networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer

from segbundles.meta import add_note, batch_notes, join_notes, set_notes, without_meta

__all__ = ["EnsembleInferer", "Member"]


@dataclass
class Member:
    """One of several networks that segment together.

    Args:
        name: its name in notes.
        inferer: what segments an image with the network, on the grid of the image.
        network: the network, with its weights.
        preprocessing: what makes its input of an item, if members differ in it.
        channels: channels of that input; None if it gets what all others get.
    """

    name: str
    inferer: Inferer
    network: torch.nn.Module
    preprocessing: Callable | None = None
    channels: int | None = None


class EnsembleInferer(Inferer):
    """Run another inferer, also with each other member of an ensemble, and return their mean prediction.

    The mean is that of the probabilities, on the grid of the input, so that members can differ in their pixel size,
    window and normalisation. Where members disagree, it is near 0.5. Logits are returned as the logits of the mean.
    Notes of the other members name them.

    n members take n times the time of one, and the memory of n networks and of one sum of probabilities (float64).
    Without other members the inferer runs unchanged.

    Args:
        inferer: the inferer of the first member.
        members: the other members.
        logits: whether the inferers return logits, of which a single channel is the foreground; otherwise they return
            probabilities.

    Example:
        >>> import torch
        >>> from monai.inferers import SimpleInferer
        >>> constant = lambda logit: lambda x: torch.full_like(x, logit)
        >>> other = Member("b", SimpleInferer(), torch.nn.Conv2d(1, 1, 1))
        >>> other.network.weight.data.zero_(), other.network.bias.data.fill_(-2.0)  # doctest: +ELLIPSIS
        (...)
        >>> EnsembleInferer(SimpleInferer(), [other])(torch.zeros(1, 1, 1, 1), constant(2.0)).item()
        0.0
    """

    def __init__(self, inferer: Inferer, members: Sequence[Member] = (), logits: bool = True) -> None:
        self.inferer = inferer
        self.members = list(members)
        self.logits = logits

    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the members one after the other.

        Args:
            inputs: images (B, C, spatial), followed by the inputs of members that have their own, see
                :class:`segbundles.transforms.MemberInputsd`.
            network: network of the first member.
            args: further arguments of the inferers.
            kwargs: further keyword arguments of the inferers.

        Returns:
            Logits or probabilities (B, channels, spatial), float32, with the metadata that the first inferer gives.
        """
        if not self.members:
            return self.inferer(inputs, network, *args, **kwargs)
        parts = self._inputs(inputs)
        first = self.inferer(parts[0], network, *args, **kwargs)
        total = _centred(first) if self.logits else first.double()
        notes = [batch_notes(first, len(first))]
        for member, part in zip(self.members, parts[1:], strict=True):
            found = member.inferer(part, member.network.to(inputs.device), *args, **kwargs)
            notes.append([f"{member.name}: {note}" if note else "" for note in batch_notes(found, len(first))])
            total += _centred(found) if self.logits else found.double()
            del found
        total /= 1 + len(self.members)
        mean = (_logits(total) if self.logits else total).float()
        if not isinstance(first, MetaTensor):
            return mean
        mean = MetaTensor(mean).copy_meta_from(first)
        if any(map(any, notes)):
            joined = [join_notes(*of_one) for of_one in zip(*notes, strict=True)]
            if mean.is_batch:
                set_notes(mean, joined)
            else:  # `image[None]`, with the metadata of one image
                add_note(mean, *joined)
        return mean

    def _inputs(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """Return the input of each member."""
        own = [member.channels for member in self.members if member.channels]
        if not own:
            return [inputs] * (1 + len(self.members))
        return list(inputs.split([inputs.shape[1] - sum(own), *own], 1))


def _centred(logits: torch.Tensor) -> torch.Tensor:
    """Return what can be averaged without loss: 2 p - 1 of one or two channels, p of more; float64.

    Near 0.5, 2 p - 1 keeps its sign where p itself is rounded, so that equal members give the mask of one.
    """
    logits = without_meta(logits).double()
    if logits.shape[1] > 2:
        return logits.softmax(1)
    difference = logits if logits.shape[1] == 1 else logits[:, 1:] - logits[:, :1]
    result = (difference / 2).tanh()
    return result if logits.shape[1] == 1 else torch.cat([-result, result], 1)


def _logits(mean: torch.Tensor) -> torch.Tensor:
    """Return logits of the mean of `_centred`; the largest of several classes is 0, so that ties stay ties."""
    if mean.shape[1] > 2:
        logits = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
        return logits - logits.amax(1, keepdim=True)
    most = 1 - torch.finfo(mean.dtype).eps
    logit = 2 * mean.clamp(-most, most).atanh()
    return logit if mean.shape[1] == 1 else logit / 2
