from __future__ import annotations

from math import log

import pytest
import torch

from segbundles.networks import BAM

FORMS = ("parallel", "sequential")


def constant_gates(bam: BAM, channel: list[float], spatial: float) -> BAM:
    """Make the gates, ahead of the sigmoid, the same for every input."""
    with torch.no_grad():
        for gate, bias in ((bam.channel_gate, channel), (bam.spatial_gate, [spatial])):
            gate[-1].weight.zero_()
            gate[-1].bias.copy_(torch.tensor(bias))
    return bam


def all_ones(bam: BAM) -> BAM:
    with torch.no_grad():
        for name, parameter in bam.named_parameters():
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return bam


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize(
    ("form", "channel", "spatial", "factors"),
    [
        # sigmoid(log 3) = 0.75: 1 + 0.75 and 1 + 0.5; a sum of the gates instead of their product would give 2nd != 1.5
        ("parallel", [1.0, 0.0], log(3), [1.75, 1.5]),
        # y = 1.75 x and 1.5 x, z = 1.5 y, x + z
        ("sequential", [log(3), 0.0], 0.0, [3.625, 3.25]),
    ],
)
def test_known_gates_give_known_factors(spatial_dims, form, channel, spatial, factors):
    bam = constant_gates(BAM(spatial_dims, 2, form=form), channel, spatial)
    x = torch.randn(3, 2, *[5] * spatial_dims)
    expected = x * torch.tensor(factors).reshape(1, 2, *[1] * spatial_dims)
    torch.testing.assert_close(bam(x), expected)


def test_sequential_spatial_gate_reads_the_channel_gated_map():
    bam = all_ones(BAM(2, 1, form="sequential", norm=None))
    with torch.no_grad():
        bam.channel_gate[-1].weight.zero_()  # y = 1.5 x
        for index in (3, 6):  # the dilated convolutions pass their centre on
            bam.spatial_gate[index].weight.zero_()
            bam.spatial_gate[index].weight[..., 1, 1] = 1.0
    x = torch.full((1, 1, 4, 4), log(3) / 1.5)  # sigmoid(y) = 0.75
    torch.testing.assert_close(bam(x), x * (1 + 1.5 * 1.75))


def test_channel_gate_pools_the_mean():
    bam = all_ones(BAM(2, 1, norm=None))
    with torch.no_grad():
        bam.spatial_gate[-1].weight.zero_()
        bam.spatial_gate[-1].bias.fill_(1.0)
    x = torch.tensor([0.0, 0.0, 0.0, 4 * log(3)]).reshape(1, 1, 2, 2)
    torch.testing.assert_close(bam(x), 1.75 * x)


@pytest.mark.parametrize(("num_dilated_convs", "taps"), [(1, 3), (2, 5), (3, 7)])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_spatial_gate_sees_as_far_as_the_dilation(spatial_dims, num_dilated_convs, taps):
    dilation = 3
    bam = all_ones(BAM(spatial_dims, 1, dilation=dilation, num_dilated_convs=num_dilated_convs, norm=None))
    side = 2 * dilation * num_dilated_convs + 3
    x = torch.ones(1, 1, *[side] * spatial_dims, requires_grad=True)
    centre = (0, 0, *[side // 2] * spatial_dims)
    bam.spatial_gate(x)[centre].backward()
    seen = x.grad[0, 0].nonzero() - side // 2
    assert len(seen) == taps**spatial_dims
    assert not (seen % dilation).any()


@pytest.mark.parametrize(
    ("in_channels", "reduction", "hidden", "parameters"),
    [
        # channel gate 8*2+2 + 2*8+8, without norm; spatial gate 8*2+2, 2*(2*2*27+2), 2+1, three norms of 2*2
        (8, 4, 2, 42 + 18 + 220 + 3 + 12),
        # channel gate 16*4+4 + 8 + 4*16+16; spatial gate 16*4+4, 2*(4*4*27+4), 4+1, three norms of 2*4
        (16, 4, 4, 156 + 68 + 872 + 5 + 24),
        (8, 16, 1, 25 + 9 + 56 + 2 + 6),
    ],
)
def test_bottleneck_width_and_parameters(in_channels, reduction, hidden, parameters):
    bam = BAM(3, in_channels, reduction=reduction)
    assert bam.channel_gate[1].out_channels == hidden
    assert sum(p.numel() for p in bam.parameters()) == parameters


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("norm", [("group", {"num_groups": 1}), "group", ["GROUP", {"num_groups": 2}], None])
def test_trains_at_batch_1(form, spatial_dims, norm):
    bam = BAM(spatial_dims, 32, reduction=4, form=form, norm=norm).train()
    x = torch.randn(1, 32, *[6] * spatial_dims, requires_grad=True)
    out = bam(x)
    assert out.shape == x.shape
    out.square().mean().backward()
    for name, parameter in bam.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_default_channel_gate_still_depends_on_the_input():
    torch.manual_seed(0)
    for in_channels in (8, 16):  # 2 hidden channels (norm left out) and 4 (kept)
        gate = BAM(2, in_channels, reduction=4).channel_gate
        a, b = gate(torch.rand(1, in_channels, 4, 4)), gate(torch.rand(1, in_channels, 4, 4))
        assert (a - b).abs().max() > 1e-4


def test_batch_norm_needs_two_cases_in_training_only():
    bam = BAM(2, 8, reduction=2, norm="batch")
    assert bam(torch.rand(2, 8, 4, 4)).shape == (2, 8, 4, 4)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        bam(torch.rand(1, 8, 4, 4))
    assert bam.eval()(torch.rand(1, 8, 4, 4)).shape == (1, 8, 4, 4)


@pytest.mark.parametrize("form", FORMS)
def test_scripted_equals_eager(form):
    bam = BAM(3, 8, reduction=4, form=form).eval()
    x = torch.randn(2, 8, 5, 6, 7)
    torch.testing.assert_close(torch.jit.script(bam)(x), bam(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"spatial_dims": 1}, "spatial_dims must be one of 2, 3, got 1"),
        ({"form": "serial"}, "form must be one of 'parallel', 'sequential', got 'serial'"),
        ({"reduction": 0}, "reduction must be at least 1, got 0"),
        ({"dilation": 0}, "dilation must be at least 1, got 0"),
        ({"num_dilated_convs": 0}, "num_dilated_convs must be at least 1, got 0"),
        ({"norm": "instance"}, "norm must be None or one of 'batch', 'syncbatch', 'group', got 'instance'"),
        ({"norm": "bath"}, "norm must be None or one of 'batch', 'syncbatch', 'group', got 'bath'"),
        ({"norm": ("group", {"num_groups": 8})}, "8 groups does not fit BAM's 8 hidden channels"),
        ({"norm": ("group", {"num_groups": 3})}, "3 groups does not fit BAM's 8 hidden channels"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        BAM(**{"spatial_dims": 3, "in_channels": 32, "reduction": 4, **kwargs})
