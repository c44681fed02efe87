from __future__ import annotations

import os
import pickle
import re

import pytest
import torch
from torch import nn

from segbundles.networks import load_if_given, load_weights, read_weights, require_weights


class Net(nn.Sequential):
    def __init__(self, channels=2):
        super().__init__(nn.Linear(3, channels), nn.BatchNorm1d(channels), nn.Linear(channels, 1))


def saved(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_load(tmp_path, half, wrapped):
    source, target = Net(), Net().train()
    state = {k: v.half() if half and v.is_floating_point() else v for k, v in source.state_dict().items()}
    path = saved(tmp_path / "m.pt", {"model": state} if wrapped else state)
    assert load_weights(target, str(path), device="cpu") is target
    assert not target.training
    for name, value in target.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype))
        assert value.dtype == source.state_dict()[name].dtype
    assert list(read_weights(path)) == list(state)


def test_device_as_a_string(tmp_path):
    path = saved(tmp_path / "m.pt", Net().state_dict())
    assert next(load_weights(Net(), path, "meta").parameters()).device.type == "meta"


def test_optional_weights_are_a_path_or_a_list_whose_first_is_loaded(tmp_path):
    path = saved(tmp_path / "m.pt", (source := Net()).state_dict())
    for given in (path, str(path), [str(path)], [path, saved(tmp_path / "n.pt", Net().state_dict())]):
        require_weights(given)
        assert torch.equal(load_if_given(Net(), given)[0].weight, source[0].weight)
    for given in (None, []):
        require_weights(given)
        assert load_if_given(Net(), given) is None
    missing = r"^there are no weights at .*none\.pt: train first"
    for given in (str(tmp_path / "none.pt"), [tmp_path / "none.pt"]):
        with pytest.raises(ValueError, match=missing):
            require_weights(given)
        with pytest.raises(ValueError, match=missing):
            require_weights([path, *([given] if isinstance(given, str) else given)])
        with pytest.raises(ValueError, match=missing):
            load_if_given(Net(), given)(torch.zeros(1, 3))


class Code:
    def __reduce__(self):
        return os.mkdir, ("/nonexistent/made by a pickle",)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (None, r"there are no weights at .*m\.pt: train first \(`monai\.bundle run training`\), or give another file"),
        (lambda p: p.write_bytes(b""), r"m\.pt cannot be read as weights \(\w+\): it is damaged or not a state_dict"),
        (lambda p: p.write_bytes(b"not a checkpoint"), r"cannot be read as weights"),
        (lambda p: p.write_bytes(pickle.dumps({"a": Code()})), r"cannot be read as weights \(UnpicklingError\)"),
        (lambda p: torch.save({"a": Code()}, p), r"cannot be read as weights \(UnpicklingError\)"),
        (lambda p: torch.save(Net(), p), r"cannot be read as weights \(UnpicklingError\)"),
        (lambda p: torch.jit.save(torch.jit.script(Net()), p), r"cannot be read as weights"),
        (lambda p: torch.save(torch.zeros(3), p), r"m\.pt is not a plain state_dict \(names to tensors\)"),
        (lambda p: torch.save({"model": 3}, p), r"is not a plain state_dict"),
        (lambda p: torch.save({"network": {}, "optimizer": {}}, p), r"is not a plain state_dict.*model\.pt"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_bad_files(tmp_path, write, message):
    path = tmp_path / "m.pt"
    if write:
        write(path)
    with pytest.raises(ValueError, match=message):
        load_weights(Net(), path)


def test_truncated_file(tmp_path):
    path = saved(tmp_path / "m.pt", nn.Linear(100, 100).state_dict())
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read as weights")):
        read_weights(path)


@pytest.mark.parametrize(
    ("network", "state", "message"),
    [
        (
            Net(4),
            Net(2).state_dict(),
            r"m\.pt has another architecture than the configured Net: "
            r"0\.weight has shape \(2, 3\) in the file and \(4, 3\) in the network; 0\.bias has shape .*; "
            r"1\.weight has .* and 4 more\. Give the settings it was trained with, or other weights\.$",
        ),
        (nn.Linear(1, 1), {"weight": torch.zeros(1, 1)}, r"the configured Linear: bias is missing in the file\. Give"),
        (nn.Linear(1, 1, bias=False), nn.Linear(1, 1).state_dict(), r"configured Linear: bias is not in the network\."),
        (nn.Linear(1, 1), {}, r"weight is missing in the file; bias is missing in the file\."),
        (
            nn.Linear(1, 1),
            {f"module.{k}": v for k, v in nn.Linear(1, 1).state_dict().items()},
            r"weight is missing .* module\.weight is not in the network and 1 more",
        ),
    ],
)
def test_other_architectures(tmp_path, network, state, message):
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(network, saved(tmp_path / "m.pt", state))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
