from __future__ import annotations

import pytest
import torch

from segbundles.networks import ValidUNet

SMALL = {"channels": (2, 3, 4, 5, 6)}


def test_published_sizes_and_width():
    """572 gives 388 (the paper's Figure 1), 64 to 1024 channels, 31 million parameters."""
    network = ValidUNet()
    assert network.margin == (572 - 388) // 2 == 92
    widths = [64, 128, 256, 512, 1024]
    convolutions = sum(9 * (a * b + b * b) + 2 * b for a, b in zip([1, *widths], widths, strict=False))
    convolutions += sum(9 * (2 * b * b + b * b) + 2 * b for b in widths[:-1])
    ups = sum(4 * 2 * b * b + b for b in widths[:-1])
    assert sum(p.numel() for p in network.parameters()) == convolutions + ups + 2 * 64 + 2 == 31_030_658
    with torch.no_grad():
        assert ValidUNet(**SMALL)(torch.rand(1, 1, 572, 572)).shape == (1, 2, 388, 388)


@pytest.mark.parametrize(
    ("channels", "size", "expected"),
    [((2, 3, 4, 5, 6), (188, 204), (4, 20)), ((2, 3, 4), (44, 52), (4, 12)), ((2, 3), (20, 26), (4, 10))],
)
def test_sizes_of_other_depths(channels, size, expected):
    with torch.no_grad():
        assert ValidUNet(channels=channels)(torch.rand(1, 1, *size)).shape[2:] == expected


def test_a_pixel_sees_no_further_than_the_margin():
    network = ValidUNet(**SMALL).eval().double()
    x = torch.rand(1, 1, 220, 220, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    changed = x.clone()
    changed[..., 150:, :] += 5  # the first output pixel sees rows 0 to 187 at most, and not fewer than half of them
    with torch.no_grad():
        differs = ((network(x) - network(changed)).abs() > 1e-9).any(1)[0].any(1)
    assert differs.shape == (36,)
    assert differs[-1]
    with torch.no_grad():
        far = x.clone()
        far[..., 219:, :] += 5
        torch.testing.assert_close(network(x)[:, :, 0], network(far)[:, :, 0], atol=1e-12, rtol=0)


def test_scripted_and_traced_at_another_size():
    network = ValidUNet(**SMALL, norm="batch").eval().double()
    traced = torch.jit.trace(network, torch.rand(1, 1, 188, 188, dtype=torch.float64))
    x = torch.rand(1, 1, 204, 220, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), network(x), atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(torch.jit.script(network)(x), network(x), atol=1e-10, rtol=1e-8)


def test_every_parameter_learns_and_dropout_follows_two_levels():
    network = ValidUNet(**SMALL, dropout=0.3)
    assert [m.p for m in network.modules() if isinstance(m, torch.nn.Dropout2d)] == [0.3, 0.3]
    network(torch.rand(1, 1, 204, 204)).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("size", [(570, 572), (572, 570), (204, 172)])
def test_sizes_that_do_not_fit(size):
    wrong = next(n for n in size if n not in (572, 204))
    with pytest.raises(
        ValueError, match=f"a size of {wrong} cannot be halved at every level: use 188 plus a multiple of 16"
    ):
        ValidUNet(**SMALL)(torch.rand(1, 1, *size))


def test_one_level_is_not_a_unet():
    with pytest.raises(ValueError, match=r"channels must have two values or more, one per level, got \[64\]"):
        ValidUNet(channels=[64])
