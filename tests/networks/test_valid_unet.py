from __future__ import annotations

import brain_paper_weights
import pytest
import torch
from torch.nn import functional as F

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
    torch.manual_seed(0)  # with other weights the last layers may all be 0
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


def test_with_padding_it_is_the_network_of_buda() -> None:
    """7,763,041 parameters as published, and a bias in each of the 18 convolutions that have none there."""
    net = ValidUNet(3, 1, (32, 64, 128, 256, 512), "batch", padding="same").eval()
    biases = sum(m.out_channels for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3))
    assert sum(p.numel() for p in net.parameters()) - biases == 7_763_041
    assert net(torch.rand(1, 3, 32, 48)).shape == (1, 1, 32, 48)
    assert net.margin == 0
    with pytest.raises(ValueError, match="a size of 40 cannot be halved at every level: use 16 plus a multiple of 16"):
        net(torch.rand(1, 3, 40, 48))
    with pytest.raises(ValueError, match="padding must be"):
        ValidUNet(padding="full")


def test_the_weights_published_for_buda_give_the_same_output() -> None:
    """The published network written out with torch's functions, from its paper and the names of its weights."""
    width, weights, random = 2, {}, torch.Generator().manual_seed(0)

    def add(name: str, *shape: int) -> None:
        weights[name] = torch.rand(shape, generator=random) - 0.5

    def block(name: str, short: str, above: int, channels: int) -> None:
        for number, count in ((1, above), (2, channels)):
            add(f"{name}.{short}conv{number}.weight", channels, count, 3, 3)
            for part in ("weight", "bias", "running_mean"):
                add(f"{name}.{short}norm{number}.{part}", channels)
            weights[f"{name}.{short}norm{number}.running_var"] = torch.rand(channels, generator=random) + 0.5
            weights[f"{name}.{short}norm{number}.num_batches_tracked"] = torch.tensor(3)

    for level in range(4):
        block(f"encoder{level + 1}", f"enc{level + 1}", 3 if level == 0 else width * 2 ** (level - 1), width * 2**level)
    block("bottleneck", "bottleneck", width * 8, width * 16)
    for level in (4, 3, 2, 1):
        channels = width * 2 ** (level - 1)
        add(f"upconv{level}.weight", 2 * channels, channels, 2, 2)
        add(f"upconv{level}.bias", channels)
        block(f"decoder{level}", f"dec{level}", 2 * channels, channels)
    add("conv.weight", 1, width, 1, 1)
    add("conv.bias", 1)

    def run(x: torch.Tensor, name: str, short: str) -> torch.Tensor:
        for number in (1, 2):
            x = F.conv2d(x, weights[f"{name}.{short}conv{number}.weight"], padding=1)
            mean, var, scale, shift = (
                weights[f"{name}.{short}norm{number}.{part}"]
                for part in ("running_mean", "running_var", "weight", "bias")
            )
            x = F.relu(F.batch_norm(x, mean, var, scale, shift))
        return x

    image = x = torch.rand(1, 3, 32, 16, generator=random)
    skips = []
    for level in range(1, 5):
        skips.append(run(x, f"encoder{level}", f"enc{level}"))
        x = F.max_pool2d(skips[-1], 2)
    x = run(x, "bottleneck", "bottleneck")
    for level in (4, 3, 2, 1):
        x = F.conv_transpose2d(x, weights[f"upconv{level}.weight"], weights[f"upconv{level}.bias"], stride=2)
        x = run(torch.cat([x, skips[level - 1]], 1), f"decoder{level}", f"dec{level}")
    expected = F.conv2d(x, weights["conv.weight"], weights["conv.bias"])
    net = ValidUNet(3, 1, [width * 2**level for level in range(5)], "batch", padding="same")
    net.load_state_dict(brain_paper_weights.converted(weights))
    torch.testing.assert_close(net.eval()(image), expected, rtol=1e-4, atol=1e-5)
