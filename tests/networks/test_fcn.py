from __future__ import annotations

import io
from math import sqrt

import pytest
import torch
from torch import nn

from segbundles.networks import VGG16FCN

CONFIGURATIONS = [
    {},
    {"variant": 16, "norm": "batch", "in_channels": 1, "out_channels": 4},
    {"variant": 32, "fc_kernel_size": 4, "fc_dilation": 2},
    {"padding": "same", "norm": "batch"},
    {"padding": "same", "variant": 16, "fc_kernel_size": 3, "fc_dilation": 6, "bilinear_init": True},
    {"padding": "same", "variant": 32},
]


def small(**kwargs) -> VGG16FCN:
    torch.manual_seed(0)
    return VGG16FCN(**{"base_channels": 2, "fc_channels": 8, **kwargs})


def loud(**kwargs) -> VGG16FCN:
    """A network whose logits have a standard deviation of 1: Glorot's variance halves at every ReLU."""
    net = small(**kwargs).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(2.0)
                if module.bias is not None:
                    module.bias.uniform_(-0.1, 0.3)
        net.up.weight.div_(net(image(net, 64, 64)).std())
    return net


def image(net: VGG16FCN, *size: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, net.blocks[0][0].conv.in_channels, *size)


def shapes(net: VGG16FCN, *size: int) -> dict[str, tuple[int, ...]]:
    seen = {}
    hooks = {"conv1": net.blocks[0], "fc6": net.fc6, "fc7": net.fc7, "up": net.up}
    hooks |= {f"fuse{i}": fuse for i, fuse in enumerate(net.fuses)}
    hooks |= {f"pool{5 - i}": block for i, block in enumerate(reversed(net.blocks))}
    for name, module in hooks.items():
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: tuple(out.shape[2:])}))
    net(image(net, *size))
    return {name: tuple(s // 2 for s in shape) if "pool" in name else shape for name, shape in seen.items()}


@pytest.mark.parametrize(
    ("kwargs", "parameters"),
    [
        ({}, 134_271_436),
        ({"padding": "same", "bilinear_init": True, "dropout": 0.1}, 134_271_436),
        # less pool3's scores and one 4x4, and a 32x32 for the 16x16: 514 + 66 and 3072 more
        ({"variant": 16}, 134_271_436 - 514 - 66 + 3072),
        ({"variant": 32}, 134_271_436 - 514 - 1026 - 2 * 66 + (64**2 - 16**2) * 4),
        # convolutions 14,714,688 less 4,224 biases, a scale and a shift for each; fc6, fc7, scores, upsampling
        ({"fc_channels": 512, "norm": "batch"}, 14_718_912 + 12_846_080 + 263_168 + 2_566 + 1_158),
    ],
)
def test_parameter_count(kwargs, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in VGG16FCN(**kwargs).parameters()) == parameters


@pytest.mark.parametrize(
    ("variant", "steps"),
    [
        (8, {"fuse0": (16, 12), "fuse1": (34, 26), "up": (280, 216)}),
        (16, {"fuse0": (16, 12), "up": (272, 208)}),
        (32, {"up": (256, 192)}),
    ],
)
def test_published_sizes(variant, steps):
    seen = shapes(small(variant=variant), 224, 160)
    assert (seen["conv1"], seen["pool4"], seen["pool5"]) == ((422, 358), (26, 22), (13, 11))
    assert (seen["fc6"], seen["fc7"]) == ((7, 5), (7, 5))
    assert {name: seen[name] for name in steps} == steps


@pytest.mark.parametrize("kernel", [{"fc_kernel_size": 7}, {"fc_kernel_size": 3, "fc_dilation": 12}])
def test_same_sizes(kernel):
    seen = shapes(small(padding="same", **kernel), 224, 96)
    assert [seen[name] for name in ("pool5", "fc6", "fuse0", "fuse1", "up")] == [
        (7, 3),
        (7, 3),
        (14, 6),
        (28, 12),
        (224, 96),
    ]


@pytest.mark.parametrize(
    ("kwargs", "offsets"),
    [
        # those of Long et al.'s networks
        ({"variant": 8}, [5, 9, 31]),
        ({"variant": 16}, [5, 27]),
        ({"variant": 32}, [19]),
        # one cell of pool5 less on either side: two of pool4, four of pool3, 32 pixels
        ({"variant": 8, "fc_kernel_size": 5}, [3, 5, 63]),
        ({"variant": 8, "padding": "same"}, [0, 0, 0]),
    ],
)
def test_crop_offsets(kwargs, offsets):
    net = small(**kwargs)
    assert [fuse.offset for fuse in net.fuses] + [net.offset] == offsets


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (32, 33), (65, 70)])
@pytest.mark.parametrize("kwargs", CONFIGURATIONS)
def test_any_size(kwargs, size):
    net = small(**kwargs).eval()
    out = net(image(net, *size, batch=2))
    assert out.shape == (2, kwargs.get("out_channels", 2), *size)
    assert out.isfinite().all()


class Places(nn.Module):
    """Replaces a layer by one whose features are the positions of its cells in the image."""

    def __init__(self, stride: int, first: float):
        super().__init__()
        self.stride, self.first = stride, first

    def forward(self, x):
        rows = torch.arange(x.shape[2]).float() * self.stride + self.first
        columns = torch.arange(x.shape[3]).float() * self.stride + self.first
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(len(x), 2, -1, -1)


@pytest.mark.parametrize(
    ("kwargs", "shift", "fc6"),
    [
        # from conv1_1's padding less what its kernel takes: 99 pixels; and from fc6: 3 (or 2) cells of 32
        ({}, 99, 96),
        ({"fc_kernel_size": 3, "fc_dilation": 2}, 99, 64),
        ({"padding": "same"}, 0, 0),
        ({"padding": "same", "fc_kernel_size": 3, "fc_dilation": 4}, 0, 0),
    ],
)
@pytest.mark.parametrize(("variant", "source"), [(8, 5), (8, 4), (8, 3), (16, 5), (16, 4), (32, 5)])
def test_every_score_map_is_at_its_place(variant, source, kwargs, shift, fc6):
    # one score map holds the coordinates of its cells, the others zero: bilinear upsampling must return those of the
    # pixels away from the border
    net = small(variant=variant, bilinear_init=True, **kwargs).eval()
    scores = {5: net.score} | {4 - i: fuse.score for i, fuse in enumerate(net.fuses)}
    for module in scores.values():
        nn.init.zeros_(module.weight)
    if source == 5:
        net.score = Places(32, 15.5 - shift + fc6)
    else:
        net.fuses[4 - source].score = Places(2**source, (2**source - 1) / 2 - shift)
    out = net(torch.zeros(1, 3, 192, 200))[0]
    rows, columns = torch.meshgrid(torch.arange(192.0), torch.arange(200.0), indexing="ij")
    inner = slice(48, 144)
    torch.testing.assert_close(out[0, inner, inner], rows[inner, inner], atol=1e-3, rtol=0)
    torch.testing.assert_close(out[1, inner, inner], columns[inner, inner], atol=1e-3, rtol=0)


@pytest.mark.parametrize(("variant", "maps"), [(8, 3), (16, 2), (32, 1)])
@pytest.mark.parametrize("padding", ["published", "same"])
def test_constant_scores_add_up(variant, maps, padding):
    net = small(variant=variant, padding=padding, bilinear_init=True).eval()
    for module in [net.score, *(fuse.score for fuse in net.fuses)]:
        nn.init.zeros_(module.weight)
        nn.init.ones_(module.bias)
    out = net(torch.rand(1, 3, 160, 160))[0, :, 40:120, 40:120]
    torch.testing.assert_close(out, torch.full_like(out, maps))


def test_initialisation():
    torch.manual_seed(0)
    net = VGG16FCN(fc_channels=64, base_channels=16, bilinear_init=True)
    conv = net.blocks[4][1].conv.weight  # 128 channels of 3x3
    bound = sqrt(6 / (2 * 128 * 9))
    assert bound * 0.999 < conv.abs().max().item() <= bound
    assert conv.std().item() == pytest.approx(bound / sqrt(3), rel=0.01)
    assert not any(value.any() for name, value in net.named_parameters() if name.endswith("bias"))
    up = net.fuses[0].up.weight
    row = torch.tensor([0.25, 0.75, 0.75, 0.25])
    torch.testing.assert_close(up[0, 0], torch.outer(row, row))
    torch.testing.assert_close(up[1, 1], torch.outer(row, row))
    assert not up[0, 1].any()
    plain = small().up.weight
    assert plain[0, 1].any()
    assert plain.abs().max().item() <= sqrt(6 / (4 * 256))


@pytest.mark.parametrize("name", ["batch", "BATCH", ["batch", {"momentum": 0.3}]])
def test_batch_norm_follows_every_convolution_but_the_scores(name):
    net = small(norm=name)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 15
    assert {m.momentum for m in norms} == {0.3 if isinstance(name, list) else 0.1}
    assert [m.bias is not None for m in net.modules() if isinstance(m, nn.Conv2d)] == [False] * 15 + [True] * 3


def test_dropout_acts_on_fc6_and_fc7_in_training_only():
    net, plain = small(dropout=0.7), small(dropout=0.0)
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.7, 0.7]
    x = image(net, 64, 64)
    torch.testing.assert_close(net.eval()(x), plain.eval()(x))
    net.train()
    assert not torch.equal(net(x), net(x))


@pytest.mark.parametrize("kwargs", CONFIGURATIONS)
def test_every_parameter_gets_a_gradient(kwargs):
    net = small(**kwargs, dropout=0.0).train()
    net(image(net, 70, 40)).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert net.blocks[0][0].conv.weight.grad.any()


@pytest.mark.parametrize("kwargs", CONFIGURATIONS)
def test_scripted_and_traced_at_another_size_equal_eager(kwargs):
    net = loud(**kwargs).double()  # in float64, rounding does not depend on the processor's kernels
    scripted, traced = torch.jit.script(net), torch.jit.trace(net, image(net, 64, 32).double())
    with torch.no_grad(), torch.jit.optimized_execution(False):  # its profiling would take seconds a case
        for size, batch in (((50, 71), 2), ((64, 32), 1)):
            x = image(net, *size, batch=batch).double()
            expected = net(x)
            assert expected.std() > 0.01  # outputs near zero would agree whatever happened
            torch.testing.assert_close(scripted(x), expected, atol=1e-10, rtol=1e-8)
            torch.testing.assert_close(traced(x), expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("kwargs", [CONFIGURATIONS[0], CONFIGURATIONS[3], CONFIGURATIONS[5]])
def test_onnx_with_dynamic_batch_and_size_equals_eager(kwargs):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    net = loud(**kwargs)
    axes = {0: "batch", 2: "height", 3: "width"}
    file = io.BytesIO()
    torch.onnx.export(
        net,
        (image(net, 64, 32),),
        file,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": axes, "logits": axes},
        dynamo=False,
    )
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    x = image(net, 50, 71, batch=2)
    (logits,) = session.run(None, {"image": x.numpy()})
    assert logits.std() > 0.01
    torch.testing.assert_close(torch.from_numpy(logits), net(x).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kwargs", [{}, {"padding": "same", "norm": "batch"}])
def test_bf16_autocast_stays_near_fp32(kwargs):
    net = small(base_channels=8, dropout=0.0, **kwargs).eval()
    x = image(net, 96, 64)
    expected = net(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = net(x)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("size", [(32, 32), (64, 160), (96, 96)])  # pool5 1x1, 2x5 and 3x3, under a 7x7 kernel
def test_bf16_gradients_of_fc6_on_small_maps_are_those_of_fp32(size):
    net = small(padding="same", base_channels=32, dropout=0.0)
    features = torch.rand(2, 256, size[0] // 32, size[1] // 32)

    def gradient(bf16: bool) -> torch.Tensor:
        net.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            out = net._run_fc6(features)
        freed = [
            torch.full((2**power,), float("nan")) for power in range(6, 22)
        ]  # what uninitialised memory then holds
        del freed
        out.float().square().mean().backward()
        return net.fc6.conv.weight.grad.flatten().clone()

    exact = gradient(bf16=False)
    for _ in range(3):
        assert torch.cosine_similarity(exact, gradient(bf16=True), dim=0) > 0.99


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"spatial_dims": 3}, r"spatial_dims must be 2 \(VGG-16 is two-dimensional\), got 3"),
        ({"variant": 4}, "variant must be one of 8, 16, 32, got 4"),
        ({"padding": "valid"}, "padding must be one of 'published', 'same', got 'valid'"),
        ({"norm": "bath"}, "norm must be None or one of 'batch', 'syncbatch', got 'bath'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"fc_channels": 0}, "fc_channels must be at least 1, got 0"),
        ({"base_channels": -1}, "base_channels must be at least 1, got -1"),
        (
            {"fc_kernel_size": 3, "fc_dilation": 4},
            r"needs an fc6 of 3 to 7 cells.* got 9: change it, or set padding='same'",
        ),
        ({"fc_kernel_size": 1}, r"needs an fc6 of 3 to 7 cells.* got 1:"),
        ({"padding": "same", "fc_kernel_size": 6}, "fc_kernel_size must be odd for padding='same', got 6"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


def test_wrong_input_dimensions_are_named():
    with pytest.raises(ValueError, match=r"2 spatial dimensions\), got torch.Size\(\[1, 3, 16, 16, 16\]\)"):
        small()(torch.rand(1, 3, 16, 16, 16))


@pytest.mark.parametrize("variant", [8, 16, 32])
def test_a_relu_after_the_scores_cuts_negative_ones(variant: int) -> None:
    """Scores of -1 everywhere count as 0; without the ReLU they are added up."""
    arguments = {"variant": variant, "base_channels": 2, "fc_channels": 4, "padding": "same", "bilinear_init": True}
    image = torch.rand(1, 3, 64, 64)
    outputs = {}
    for score_relu in (False, True):
        net = VGG16FCN(**arguments, score_relu=score_relu).eval()
        for module in (net.score, *(fuse.score for fuse in net.fuses)):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.constant_(module.bias, -1.0)
        outputs[score_relu] = net(image)
    assert torch.count_nonzero(outputs[True]) == 0
    assert outputs[False][0, 0, 32, 32].item() == pytest.approx({8: -3, 16: -2, 32: -1}[variant], abs=1e-5)
