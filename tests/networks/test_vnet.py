from __future__ import annotations

import io
from math import sqrt

import pytest
import torch
from torch import nn

from segbundles.networks import BAM, AttentionVNet

# every kind of wiring, at a width that keeps the tests fast
CONFIGURATIONS = [
    {"attention": "sequential"},
    {"attention": "parallel", "norm": "instance", "in_channels": 2, "out_channels": 3},
    {"spatial_dims": 2, "num_layers": 2, "norm": "group", "attention": "sequential"},
    {"norm": "batch", "dilation": 2, "dropout": 0.2},
]


def small(**kwargs) -> AttentionVNet:
    torch.manual_seed(0)
    return AttentionVNet(**{"base_channels": 4, **kwargs})


def image(net: AttentionVNet, *size: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, net.in_channels, *size[: net.spatial_dims])


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("kwargs", "parameters"),
    [
        ({}, 10_759_066),
        ({"num_layers": 2}, 16_200_026),
        ({"attention": "sequential"}, 10_850_145),
        ({"attention": "parallel"}, 10_850_145),
        ({"dilation": 2, "dropout": 0.5}, 10_759_066),
    ],
)
def test_parameter_count_is_the_references(kwargs, parameters):
    with torch.device("meta"):
        assert count(AttentionVNet(**kwargs)) == parameters


@pytest.mark.parametrize("size", [(17, 33, 5), (16, 16, 16), (1, 20, 40)])
@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize(("in_channels", "out_channels"), [(1, 1), (3, 2), (5, 4)])
def test_any_size_and_channels(spatial_dims, size, in_channels, out_channels):
    net = small(spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)
    x = image(net, *size, batch=2)
    assert net(x).shape == (2, out_channels, *size[:spatial_dims])


@pytest.mark.parametrize(
    ("in_channels", "weights"),
    [(1, [8.0]), (3, [3.0, 3.0, 2.0]), (8, [1.0] * 8), (10, [1.0] * 8 + [0.0, 0.0])],
)
def test_residual_path_by_hand(in_channels, weights):
    # with every convolution at zero only the residual adds and the last skip are left: the head sums the eight channels
    # of the first level, and its PReLU (slope 0.25) is the only activation on that way
    net = AttentionVNet(spatial_dims=2, in_channels=in_channels)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "conv" in name and parameter.dim() > 1:
                parameter.zero_()
        net.head.conv.weight.fill_(1.0)
        x = torch.randn(1, in_channels, 19, 16)
        total = (x * torch.tensor(weights).reshape(1, -1, 1, 1)).sum(1, keepdim=True)
        torch.testing.assert_close(net(x), torch.where(total > 0, total, 0.25 * total))


def test_attention_acts_ahead_of_the_residual_add():
    net = small(spatial_dims=2, attention="sequential")
    level = net.downs[1].level
    x = torch.randn(1, 16, 8, 8)
    torch.testing.assert_close(level(x, x), level.attention(level.convs(x)) + x)
    assert [type(up.level.attention) for up in net.ups] == [nn.Identity] * 4


def test_attention_sits_in_the_five_levels_down():
    net = AttentionVNet(attention="parallel", attention_reduction=2, attention_dilation=3)
    gates = [m for m in net.modules() if isinstance(m, BAM)]
    assert [g.channel_gate[1].in_channels for g in gates] == [8, 16, 32, 64, 128]
    assert [g.channel_gate[1].out_channels for g in gates] == [4, 8, 16, 32, 64]
    assert {g.spatial_gate[3].dilation for g in gates} == {(3, 3, 3)}
    assert not any(g.sequential for g in gates)


def test_dilation_acts_on_the_way_down_only():
    net = small(dilation=2)
    down = [m.dilation[0] for part in (net.input_level, net.downs) for m in part.modules() if isinstance(m, nn.Conv3d)]
    up = [m.dilation[0] for m in net.ups.modules() if isinstance(m, nn.Conv3d)]
    assert (down.count(2), down.count(1), up) == (7, 4, [1] * 6)  # the four of dilation 1 are the strided 2x2x2


@pytest.mark.parametrize(
    ("norm", "kind", "groups"),
    [
        ("instance", nn.InstanceNorm3d, None),
        ("BATCH", nn.BatchNorm3d, None),
        ("group", nn.GroupNorm, {2: {2}, 6: {2}, 8: {8}}),
        (["group", {"num_groups": 2}], nn.GroupNorm, {2: {2}, 6: {2}, 8: {2}}),
    ],
)
def test_norm_follows_every_convolution_but_the_heads(norm, kind, groups):
    for base in (2, 6, 8):
        with torch.device("meta"):
            net = AttentionVNet(base_channels=base, norm=norm)
        norms = [m for m in net.modules() if isinstance(m, kind)]
        assert len(norms) == 21
        biases = [m.bias is not None for m in net.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d))]
        assert biases == [False] * 21 + [True]
        if groups:
            assert {m.num_groups for m in norms if m.num_channels == base} == groups[base]


def test_dropout_is_off_in_evaluation_and_on_in_training():
    plain, dropping = small(spatial_dims=2), small(spatial_dims=2, dropout=0.5)
    dropping.load_state_dict(plain.state_dict())
    assert sum(isinstance(m, nn.Dropout2d) for m in dropping.modules()) == 9
    x = image(plain, 32, 32)
    torch.testing.assert_close(dropping.eval()(x), plain.eval()(x))
    dropping.train()
    assert not torch.equal(dropping(x), dropping(x))


def test_padding_repeats_the_edge():
    net = small().eval()
    torch.testing.assert_close(
        net(torch.full((1, 1, 17, 20, 30), 3.0)), net(torch.full((1, 1, 32, 32, 32), 3.0))[:, :, :17, :20, :30]
    )


def test_initialisation_is_xavier_normal_with_zero_bias():
    torch.manual_seed(0)
    net = AttentionVNet(attention="sequential")
    deepest = net.downs[3].level.convs[1].conv
    assert deepest.weight.std().item() == pytest.approx(sqrt(2 / (2 * 128 * 125)), rel=0.01)
    transposed = net.ups[0].up.conv
    assert transposed.weight.std().item() == pytest.approx(sqrt(2 / ((128 + 64) * 8)), rel=0.01)
    assert abs(deepest.weight.mean().item()) < 1e-4
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
    assert all((m.weight == 0.25).all() for m in net.modules() if isinstance(m, nn.PReLU))


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("attention", [None, "sequential", "parallel"])
@pytest.mark.parametrize("norm", [None, "instance"])
def test_every_parameter_gets_a_gradient_at_batch_1(num_layers, attention, norm):
    net = small(num_layers=num_layers, attention=attention, norm=norm, in_channels=2, out_channels=2).train()
    net(image(net, 20, 16, 33)).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert net.input_level.convs[0].conv.weight.grad.any()


@pytest.mark.parametrize("kwargs", CONFIGURATIONS)
def test_scripted_and_traced_at_another_size_equal_eager(kwargs):
    # in float64, rounding does not depend on the processor's kernels
    net = small(base_channels=2, **kwargs).eval().double()
    scripted, traced = torch.jit.script(net), torch.jit.trace(net, image(net, 32, 32, 16).double())
    with torch.no_grad(), torch.jit.optimized_execution(False):  # its profiling would take seconds per case
        x = image(net, 20, 17, 33, batch=2).double()
        expected = net(x)
        assert expected.abs().max() > 1e-3  # outputs near zero would agree whatever happened
        torch.testing.assert_close(scripted(x), expected, atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(traced(x), expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("kwargs", CONFIGURATIONS[:3])
def test_onnx_with_dynamic_batch_and_size_equals_eager(kwargs):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    net = small(**kwargs).eval()
    axes = {0: "batch"} | {i + 2: f"size_{i}" for i in range(net.spatial_dims)}
    file = io.BytesIO()
    torch.onnx.export(
        net,
        (image(net, 32, 32, 16),),
        file,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": axes, "logits": axes},
        dynamo=False,
    )
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    x = image(net, 20, 17, 33, batch=2)
    (logits,) = session.run(None, {"image": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), net(x).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kwargs", [{}, *CONFIGURATIONS[:2]])
def test_bf16_autocast_and_channels_last_stay_near_fp32(kwargs, channels_last):
    net = small(**kwargs).train()
    x = image(net, 32, 20, 16)
    expected = net(x).detach()
    if channels_last:
        net = net.to(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(net(x), expected, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = net(x)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("size", [(32, 32, 16), (48, 80, 80)])  # deepest level 2x2x1 and 3x5x5
def test_bf16_gradients_of_short_axes_are_those_of_fp32(size):
    net = AttentionVNet(norm="instance")
    x = image(net, *size)

    def gradients(bf16: bool) -> dict[str, torch.Tensor]:
        net.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = net(x)
        freed = [
            torch.full((2**power,), float("nan")) for power in range(6, 22)
        ]  # what uninitialised memory then holds
        del freed
        logits.float().square().mean().backward()
        return {n: p.grad.clone() for n, p in net.named_parameters() if n.endswith("conv.weight")}

    exact, near = gradients(bf16=False), gradients(bf16=True)
    for name, gradient in exact.items():
        assert torch.cosine_similarity(gradient.flatten(), near[name].flatten(), dim=0) > 0.95, name


def test_half_precision_weights_load_back():
    saved = small(spatial_dims=2, attention="sequential").eval()
    state = {name: value.half() for name, value in saved.state_dict().items()}
    torch.manual_seed(1)
    loaded = AttentionVNet(spatial_dims=2, base_channels=4, attention="sequential").eval()
    loaded.load_state_dict(state)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    x = image(saved, 24, 24)
    torch.testing.assert_close(loaded(x), saved(x), atol=0.01, rtol=0.01)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"spatial_dims": 4}, "spatial_dims must be one of 2, 3, got 4"),
        ({"attention": "serial"}, "attention must be one of None, 'sequential', 'parallel', got 'serial'"),
        ({"attention": "False"}, "attention must be one of None, 'sequential', 'parallel', got 'False'"),
        ({"norm": "bath"}, "norm must be None or one of 'instance', 'batch', 'syncbatch', 'group', got 'bath'"),
        ({"norm": ("group", {"num_groups": 3})}, "3 groups does not divide a level of 8 channels"),
        ({"base_channels": 0}, "base_channels must be at least 1, got 0"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"attention": "parallel", "attention_reduction": 0}, "reduction must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AttentionVNet(**kwargs)


def test_wrong_input_dimensions_are_named():
    with pytest.raises(ValueError, match=r"3 spatial dimensions\), got torch.Size\(\[1, 1, 16, 16\]\)"):
        small()(torch.rand(1, 1, 16, 16))
