from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer, SliceInferer

from segbundles.inferers import MirrorInferer


def place(x: torch.Tensor) -> torch.Tensor:
    """Logits that rise along the first axis, whatever the input."""
    return torch.arange(float(x.shape[2])).reshape(1, 1, -1, 1).expand(len(x), 1, *x.shape[2:])


@pytest.mark.parametrize(("axes", "passes"), [(None, 1), ([], 1), ([1], 2), ([0, 1], 4)])
def test_logits_are_averaged_over_mirror_images(axes: list[int] | None, passes: int) -> None:
    seen = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return place(x)

    image = torch.rand(2, 3, 6, 4)
    out = MirrorInferer(SimpleInferer(), axes)(image, network)
    assert len(seen) == passes
    assert len({x.numpy().tobytes() for x in seen}) == passes
    expected = torch.full((6,), 2.5) if axes and 0 in axes else torch.arange(6.0)
    torch.testing.assert_close(out[1, 0, :, 2], expected)


def test_of_a_slice_inferer_the_axes_are_the_slices_own() -> None:
    torch.manual_seed(0)
    network = torch.nn.Conv2d(1, 1, 3, padding=1)
    volume = MetaTensor(torch.rand(1, 1, 8, 12, 5))
    inferer = MirrorInferer(SliceInferer(roi_size=(8, 12), spatial_dim=2, sw_batch_size=2), [0, 1])
    with torch.no_grad():
        found = inferer(volume, network)
        slices = [volume.as_tensor()[..., k] for k in range(5)]
        means = [sum(network(x.flip(d)).flip(d) for d in ([], [2], [3], [2, 3])) / 4 for x in slices]
    torch.testing.assert_close(found.as_tensor(), torch.stack(means, -1))


@pytest.mark.parametrize(
    ("axes", "network", "message"),
    [
        ([2], place, r"mirror_axes must be spatial axes from 0 to 1 for a 2D image, got \(2,\)"),
        ([0], lambda x: x[:, :, 1:], r"spatial size \(6, 4\), got shape \(2, 3, 5, 4\)"),
        ([0], lambda x: (x, x), r"spatial size \(6, 4\), got tuple"),
    ],
)
def test_refusals(axes: list[int], network, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MirrorInferer(SimpleInferer(), axes)(torch.rand(2, 3, 6, 4), network)
