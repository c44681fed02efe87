from __future__ import annotations

import hashlib
import logging
import socket
from urllib.error import URLError

import pytest
import torch

from segbundles.networks import VGG16_URLS, VGG16FCN, load_vgg16_weights

# where torchvision's two files keep the thirteen convolutions, and their widths as multiples of the first
PLAIN = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
NORMED = [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40]
WIDTHS = [1, 1, 2, 2, 4, 4, 4, 8, 8, 8, 8, 8, 8]
BASE, FC = 2, 6


def vgg(normed=False, base=BASE, fc=FC, channels=3):
    """Random weights under torchvision's names, all different."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    state, above = {}, channels
    for index, width in zip(NORMED if normed else PLAIN, WIDTHS, strict=True):
        state[f"features.{index}.weight"] = (rand(base * width, above, 3, 3) - 0.4) / above
        state[f"features.{index}.bias"] = rand(base * width)
        above = base * width
        if normed:
            norm = f"features.{index + 1}"
            state |= {f"{norm}.{name}": rand(above) for name in ("weight", "bias", "running_mean")}
            state |= {f"{norm}.running_var": rand(above) + 0.5, f"{norm}.num_batches_tracked": torch.tensor(7)}
    for index, (rows, columns) in {0: (fc, above * 49), 3: (fc, fc), 6: (1000, fc)}.items():
        state |= {f"classifier.{index}.weight": rand(rows, columns) - 0.4, f"classifier.{index}.bias": rand(rows)}
    return state


def small(**kwargs) -> VGG16FCN:
    torch.manual_seed(0)
    return VGG16FCN(**{"base_channels": BASE, "fc_channels": FC, "padding": "same", **kwargs}).eval()


def features(state, x, normed):
    """Torchvision's features, by hand."""
    for i, index in enumerate(NORMED if normed else PLAIN):
        x = torch.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1)
        if normed:
            names = ("running_mean", "running_var", "weight", "bias")
            x = torch.nn.functional.batch_norm(x, *(state[f"features.{index + 1}.{name}"] for name in names))
        x = x.relu()
        if i in (1, 3, 6, 9, 12):
            x = torch.max_pool2d(x, 2)
    return x


@pytest.fixture
def saved(tmp_path):
    def save(state, name="vgg.pth"):
        torch.save(state, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("normed", [False, True])
def test_convolutions_and_fc_give_what_vgg16_gives(saved, caplog, normed):
    state = vgg(normed)
    net = small(norm="batch" if normed else None)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with caplog.at_level(logging.INFO, "segbundles"):
        assert load_vgg16_weights(net, saved(state)) is net
    assert "Loaded VGG-16's convolutions, fc6, fc7 from" in caplog.text

    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    y = x
    for block in net.blocks:
        y = net.pool(block(y))
    expected = features(state, x, normed)
    assert expected.std() > 1e-3
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    hidden = torch.relu(expected.flatten(1) @ state["classifier.0.weight"].T + state["classifier.0.bias"])
    hidden = torch.relu(hidden @ state["classifier.3.weight"].T + state["classifier.3.bias"])
    assert hidden.any()
    torch.testing.assert_close(net.fc7(net.fc6(y))[:, :, 3, 3], hidden, atol=1e-4, rtol=1e-3)  # the window on all 7x7

    after = net.state_dict()
    for name in after:
        if "score" in name or name.startswith(("up.", "fuses.")):
            assert torch.equal(after[name], before[name]), name


@pytest.mark.parametrize("transposed", [False, True])
def test_batch_norm_is_set_from_a_batch(saved, transposed):
    """The file without batch norm in a network with it: each channel as in the file, divided by its deviation."""
    state, net = vgg(), small(norm="batch")
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    load_vgg16_weights(net, saved(state), transposed=transposed, forward=lambda: net(x))
    assert not net.training
    y = x
    for block in net.blocks:
        y = net.pool(block(y))
    expected = features(state, x.mT if transposed else x, normed=False)
    hidden = torch.relu(expected.flatten(1) @ state["classifier.0.weight"].T + state["classifier.0.bias"])
    expected = expected.mT if transposed else expected
    for got, plain in ((y, expected), (net.fc6(y)[:, :, 3, 3], hidden)):
        scale = (got.sum(0) / plain.sum(0)).flatten(1).mean(1) if got.ndim == 4 else (got / plain).mean(0)
        shape = (1, -1, 1, 1) if got.ndim == 4 else (1, -1)
        torch.testing.assert_close(got, plain * scale.reshape(shape), atol=1e-4, rtol=1e-4)
        assert (scale > 0).all()

    seen = []
    hook = net.blocks[2][1].adn.N.register_forward_hook(lambda _norm, _inputs, output: seen.append(output))
    net(x)
    before = seen[0]
    net.train()(x)  # by the batch's own statistics: the same, as these were taken from it
    hook.remove()
    torch.testing.assert_close(seen[1], before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(before.std(dim=(0, 2, 3)), torch.ones(4 * BASE), atol=5e-3, rtol=0)


def test_transposed_weights_give_transposed_features(saved):
    state, net = vgg(), small()
    x = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    load_vgg16_weights(net, saved(state), transposed=True)
    y = x
    for block in net.blocks:
        y = net.pool(block(y))
    torch.testing.assert_close(y.mT, features(state, x.mT, normed=False), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "messages"),
    [
        (
            {"fc_channels": 4},
            [
                "fc6 keeps its values: classifier.0 is (6, 784) and fc6 (4, 784).",
                "fc7 keeps its values: classifier.3 is (6, 6) and fc7 (4, 4).",
            ],
        ),
        (
            {"fc_kernel_size": 3, "fc_dilation": 2},
            [
                "fc6 keeps its values: classifier.0 is (6, 784) and fc6 (6, 144).",
                "fc7 keeps its values: fc6 keeps its values too.",
            ],
        ),
    ],
)
def test_other_fc_layers_are_left_and_logged(saved, caplog, kwargs, messages):
    net = small(**kwargs)
    fc6, fc7 = net.fc6.conv.weight.clone(), net.fc7.conv.weight.clone()
    state = vgg()
    with caplog.at_level(logging.INFO, "segbundles"):
        load_vgg16_weights(net, saved(state))
    assert [r.message for r in caplog.records][:2] == messages
    assert caplog.records[-1].message.startswith("Loaded VGG-16's convolutions from")
    assert torch.equal(net.fc6.conv.weight, fc6)
    assert torch.equal(net.fc7.conv.weight, fc7)
    assert torch.equal(net.blocks[4][2].conv.weight, state["features.28.weight"])


def test_a_file_of_features_only_is_enough(saved, caplog):
    state = {name: value for name, value in vgg().items() if name.startswith("features")}
    with caplog.at_level(logging.INFO, "segbundles"):
        load_vgg16_weights(small(), saved(state))
    assert "fc6 keeps its values: the file has no classifier.0." in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "state", "message"),
    [
        (
            {},
            vgg(normed=True),
            r"vgg\.pth does not fit the convolutions of this FCN: features\.2\.weight is missing in the file; "
            r"features\.2\.bias is missing .* With norm=None it takes torchvision's vgg16, with in_channels=3",
        ),
        (
            {"norm": "batch"},
            vgg(),
            r"features\.1\.weight is missing .* With batch norm it takes torchvision's vgg16_bn",
        ),
        ({}, {"a": torch.zeros(1)}, r"features\.0\.weight is missing in the file; .* and 23 more"),
        (
            {"in_channels": 1},
            vgg(),
            r"features\.0\.weight has shape \(2, 3, 3, 3\) in the file and \(2, 1, 3, 3\) in the network\. With",
        ),
        ({"base_channels": 3}, vgg(), r"features\.0\.weight has shape .*and 23 more"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(saved, kwargs, state, message):
    net = small(**kwargs)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_vgg16_weights(net, saved(state))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_no_such_file(tmp_path):
    with pytest.raises(
        ValueError, match=r"no VGG-16 weights at .*gone\.pth: download https://.*vgg16-397923af\.pth and"
    ):
        load_vgg16_weights(small(), tmp_path / "gone.pth")


def test_url_is_downloaded_once_and_checked(saved, hub):
    state = vgg()
    path = saved(state)
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    path = path.rename(path.with_name(f"vgg16-{digits}.pth"))
    load_vgg16_weights(small(), path.as_uri())
    assert [file.name for file in hub.iterdir()] == [path.name]
    url = path.as_uri()
    path.unlink()
    net = load_vgg16_weights(small(), url)
    assert torch.equal(net.blocks[0][0].conv.weight, state["features.0.weight"])


def test_wrong_hash_is_refused_and_nothing_kept(saved, hub):
    path = saved(vgg(), "vgg16-00000000.pth")
    message = r"vgg16-00000000\.pth gave another file than expected \(invalid hash .* sha256 begins with 00000000\)"
    with pytest.raises(ValueError, match=message):
        load_vgg16_weights(small(), path.as_uri())
    assert not list(hub.iterdir())


def test_url_without_a_hash_is_refused(saved, hub):
    with pytest.raises(ValueError, match=r"vgg\.pth does not end in '-<first 8 or more digits of its sha256>\.pth'"):
        load_vgg16_weights(small(), saved(vgg()).as_uri())


@pytest.mark.parametrize(
    ("norm", "kind", "sha256"),
    [
        (None, "vgg16", "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
        ("batch", "vgg16_bn", "6c64b3138f2f4fcb3bcc4cafde11619c4f440eb1631787e93a682fd88305888a"),
    ],
)
def test_offline_the_message_names_the_url_and_the_hash(hub, monkeypatch, norm, kind, sha256):
    def offline(*_args, **_kwargs):
        raise URLError(socket.gaierror(-3, "Temporary failure in name resolution"))

    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(ValueError, match="cannot be downloaded") as error:
        load_vgg16_weights(small(norm=norm))
    assert f"https://download.pytorch.org/models/{kind}-{sha256[:8]}.pth cannot be downloaded" in str(error.value)
    assert "Temporary failure in name resolution" in str(error.value)
    assert f"Download it by hand (its sha256 is {sha256}) and give its path." in str(error.value)
    assert VGG16_URLS[kind].endswith(f"{kind}-{sha256[:8]}.pth")
    assert not list(hub.iterdir())


def test_the_published_files_are_checked_by_their_whole_hash(hub, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, file, hash_prefix: asked.append(hash_prefix))
    for norm in (None, "batch"):
        with pytest.raises(ValueError, match="there are no VGG-16 weights at"):
            load_vgg16_weights(small(norm=norm))
    assert [(len(digits), digits[-4:]) for digits in asked] == [(64, "5bf0"), (64, "888a")]
