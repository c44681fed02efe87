"""Networks exported by the commands of docs/export.md, and inference with the exported files."""

from __future__ import annotations

import ast
import copy
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundle_runs import ROOT, table
from monai.bundle import ConfigParser, load
from monai.networks import trt_compiler
from tiny_bundles import TINY_BUNDLES, TinyBundle, command_line
from typer.testing import CliRunner

from segbundles.cli import app
from segbundles.errors import InputError
from segbundles.networks import export_network, load_exported

PAGE = (ROOT / "docs" / "export.md").read_text()
BY_NAME = {bundle.name: bundle for bundle in TINY_BUNDLES}
VALID_UNET = "bundles/em_membrane_unet/configs/args_valid_unet.json"
# a bundle, which of its networks, and settings of them
NETWORKS = [
    pytest.param("left_atrium_vnet", ["network_def", "locator_def"], {}, id="left_atrium_vnet"),
    pytest.param("left_atrium_vnet", ["network_def"], {"attention": "sequential"}, id="left_atrium_vnet-bam"),
    pytest.param("brain_flair_unet", ["network_def"], {}, id="brain_flair_unet"),
    pytest.param("em_membrane_unet", ["network_def"], {}, id="em_membrane_unet"),
    pytest.param("em_membrane_unet", ["network_def"], {"args_file": VALID_UNET, "base_channels": 2}, id="valid_unet"),
    pytest.param("polyp_fcn8", ["network_def"], {}, id="polyp_fcn8"),
]
# facts of weights that differ from their tiny inference.json: one of the architecture, one of the input
FACTS: dict[str, dict[str, dict[str, Any]]] = {
    "left_atrium_vnet": {
        "model": {"base_channels": 3, "network_spacing_mm": [4.0, 4.0, 4.0]},
        "locator": {"locator_base_channels": 3, "locator_spacing_mm": [8.0, 8.0, 8.0]},
    },
    "brain_flair_unet": {"model": {"base_channels": 3, "intensity_normalization": "slice"}},
    "em_membrane_unet": {"model": {"base_channels": 3, "norm": "instance"}},
    "polyp_fcn8": {"model": {"base_channels": 3, "frame_height": 32}},
}
SLICES, VOLUMES = "brain_flair_unet", "left_atrium_vnet"  # whose ONNX commands the page shows


def documented(*words: str, without: str = "\n") -> str:
    """The one command of the page that contains all these words, and not that one."""
    commands, root = [], ""
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("B="):
                (root,) = shlex.split(line[2:])
            else:
                commands.append(line.replace("$B", root))
    (found,) = (one for one in commands if all(word in one for word in words) and without not in one)
    return found


def export_command(net_id: str) -> str:
    """The page's command that exports a network of the left atrium to TorchScript."""
    if net_id == "network_def":
        return documented("ckpt_export", without="--net_id")
    return documented("ckpt_export", net_id)


def changed(command: str, **options: object) -> list[str]:
    """Words of a command with other or additional options."""
    words = shlex.split(command)
    for name, value in options.items():
        if f"--{name}" in words:
            words[words.index(f"--{name}") + 1] = str(value)
        else:
            words += [f"--{name}", str(value)]
    return words


def segbundles(words: Sequence[str]) -> None:
    """Run a command of segbundles in this process."""
    result = CliRunner().invoke(app, list(words[1:]))
    assert result.exit_code == 0, result.output


def example_shape(name: str, net_id: str) -> str:
    """The input shape in the page's table for the network of a bundle."""
    (row,) = re.findall(rf"\| `{name}` \| (.*?) \| `(\[.*?\])` \|", PAGE)
    assert f"`{net_id}`" in row[0]
    return row[1]


def onnx(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (node.name for node in session.get_inputs())
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_equal(
    exported: Callable,
    network: torch.nn.Module,
    sizes: Sequence[Sequence[int]],
    grey: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Compare an exported network with the same network in float64, on noise of that mean and deviation.

    Rounding errors depend on the processor, whose kernels sum in another order, and grow with the depth of the network.
    The error of the network itself, in the same precision and on the same processor, therefore sets the scale. The root
    mean square hardly depends on the order, where the largest error of all logits does. 64 units in the last place are
    added for ONNX Runtime, which approximates some functions; one wrong logit in 15,000 would be 1000 times as much.
    """
    exact = copy.deepcopy(network).double()
    with torch.no_grad(), torch.jit.optimized_execution(False):  # its profiling would take seconds
        for size in sizes:
            x = grey[0] + grey[1] * torch.randn(*size)
            found, own = exported(x), network(x)
            with torch.autocast("cpu", enabled=False):
                expected = exact(x.double())
            assert expected.std() > 0.01
            assert (found.dtype, found.shape) == (own.dtype, own.shape)
            error = rms(own - expected)
            assert error < 0.1 * expected.std()
            assert rms(found - expected) < 4 * error + 64 * torch.finfo(torch.float32).eps * rms(expected)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the project's root, for the page's commands."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "net_ids", "settings"), NETWORKS)
def test_exported_networks_equal_the_network_at_other_sizes(
    name: str, net_ids: list[str], settings: dict[str, Any], here: Path
) -> None:
    pytest.importorskip("onnx")
    bundle = BY_NAME[name]
    root = bundle.make(here)
    weights = {net_id: root / "models" / f"{file}.pt" for file, net_id in bundle.networks if net_id in net_ids}
    values = {key: value for key, value in settings.items() if key != "args_file"}
    if "args_file" in settings:
        values = json.loads(Path(settings["args_file"]).read_text()) | values
    for net_id, path in weights.items():
        bundle.make_weights(root, net_id, path, **values)
        dtypes = {value.dtype for value in torch.load(path, weights_only=True).values()}
        assert dtypes <= {torch.float16, torch.int64}

    alone = {"use_locator": "false"} if name == VOLUMES and "locator_def" not in net_ids else {}
    segbundles(changed(documented("segbundles export").replace(VOLUMES, name), **settings, **alone))
    for net_id, path in weights.items():
        command_line(changed(export_command(net_id).replace(VOLUMES, name), **settings))
        module, metadata, _ = load(name, bundle_dir="bundles", load_ts_module=True, model_file=f"models/{path.stem}.ts")
        assert not module.training
        assert metadata["name"] == json.loads((root / "configs" / "metadata.json").read_text())["name"]

        shape, exported = example_shape(name, net_id), path.with_suffix(".onnx")
        command = documented("onnx_export", VOLUMES if shape.count(",") == 4 else SLICES)
        command = command.replace(VOLUMES, name).replace(SLICES, name)
        options = {"net_id": net_id, "input_shape": shape, "ckpt_file": path, "filepath": exported}
        command_line(changed(command, **options, **settings))

        network = bundle.network(root, net_id, path, **values)
        sizes = [ast.literal_eval(shape), bundle.size]
        sizes.append([1, *sizes[0][1:]])
        for suffix in (".ts", ".pt2"):
            assert_equal(load_exported(path.with_suffix(suffix)), network, sizes, bundle.grey)
            with torch.autocast("cpu", dtype=torch.bfloat16):  # what amp is
                assert_equal(load_exported(path.with_suffix(suffix)), network, sizes[1:2], bundle.grey)
        assert_equal(onnx(exported), network, sizes, bundle.grey)


@pytest.fixture(params=TINY_BUNDLES, ids=lambda bundle: bundle.name)
def bundle(request: pytest.FixtureRequest) -> TinyBundle:
    return request.param


def infer(root: Path, output_dir: str, **options: object) -> dict[str, np.ndarray]:
    """Segment ``scans`` with inference.json; return what was written, by name."""
    command = f"python -m monai.bundle run --bundle_root {root} --config_file {root}/configs/inference.json"
    command_line(changed(command, dataset_dir="scans", output_dir=output_dir, **options))
    return written(root.name, output_dir)


def written(name: str, output_dir: str) -> dict[str, np.ndarray]:
    (row,) = table(Path(output_dir) / "inference.csv")
    assert row["status"] == "ok"
    files = [path for path in Path(output_dir).iterdir() if path.suffix not in (".csv", ".json", ".log", ".html")]
    found = {path.name: BY_NAME[name].read(path) for path in files}
    for array in found.values():
        assert 0.01 < (array > 0).mean() < 0.99  # an empty mask would agree whatever happened
    return found


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Compare foreground; a processor may round a few voxels differently, and the numbers of cells depend on them."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert ((found[name] > 0) != (array > 0)).mean() < 1e-3, name


def knobs(output_dir: str) -> dict[str, Any]:
    return json.loads((Path(output_dir) / "inferring.config.json").read_text())["knobs"]


def test_openvino_gives_the_masks_of_torch(bundle: TinyBundle, here: Path) -> None:
    pytest.importorskip("openvino")
    root = bundle.make(here).relative_to(here)
    for file, net_id in bundle.networks:
        bundle.make_weights(root, net_id, root / "models" / f"{file}.pt", **FACTS[bundle.name][file])
    bundle.write_image(here / "scans")
    expected = infer(root, "torch")
    assert_same(infer(root, "openvino", engine="openvino"), expected)
    assert len(list((root / "models").glob("model.*.onnx"))) == 1


@pytest.mark.parametrize("kind", ["pt2", "ts"])
def test_exported_networks_give_the_masks_of_the_weights_with_the_same_facts(
    kind: str, bundle: TinyBundle, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each error names the command that writes the missing file, which is run here."""
    root = bundle.make(here).relative_to(here)
    facts = FACTS[bundle.name]
    for file, net_id in bundle.networks:
        bundle.make_weights(root, net_id, root / "models" / f"{file}.pt", **facts[file])
    bundle.write_image(here / "scans")
    expected = infer(root, "eager")
    command = documented(f"args_inference_{kind}.json").replace(VOLUMES, bundle.name)
    command = changed(command, output_dir="exported")
    missing = set()
    for _ in bundle.networks:
        with pytest.raises(InputError) as caught:
            command_line(command)
        path, export = re.fullmatch(
            r"there is no exported network at (\S+): this command writes it: (.*)", str(caught.value)
        ).groups()
        missing.add(path)
        if kind == "pt2":  # one command for all networks
            segbundles(shlex.split(export))
            break
        command_line(export)
    files = [file for file, _ in bundle.networks]
    assert missing == {f"{root}/models/{file}.{kind}" for file in (files[:1] if kind == "pt2" else files)}
    command_line(command)
    assert_same(written(bundle.name, "exported"), expected)
    trained = {name: value for values in facts.values() for name, value in values.items()}
    for folder in ("eager", "exported"):
        assert {name: knobs(folder)[name] for name in trained} == trained

    assert "is not beside" not in caplog.text
    for file, _ in bundle.networks:
        (root / "models" / f"{file}.pt").unlink()
    command_line(changed(shlex.join(command), output_dir="alone"))
    for file, _ in bundle.networks:
        assert f"{file}.pt is not beside {root}/models/{file}.{kind}: knobs that are facts" in caplog.text


def test_without_the_locator_none_has_to_be_exported(here: Path) -> None:
    bundle = BY_NAME["left_atrium_vnet"]
    root = bundle.make(here).relative_to(here)
    bundle.write_image(here / "scans")
    expected = infer(root, "eager", use_locator="false")
    command_line(export_command("network_def"))
    options = {"use_locator": "false", "output_dir": "exported"}
    command_line(changed(documented("args_inference_ts.json"), **options))
    assert_same(written(bundle.name, "exported"), expected)


def test_the_handler_that_exported_networks_disable_is_the_one_that_loads_weights() -> None:
    for name in BY_NAME:
        configs = ROOT / "bundles" / name / "configs"
        first, *_ = json.loads((configs / "inference.json").read_text())["handlers"]
        assert first["_target_"] == "segbundles.handlers.WeightsLoader"
        for kind in ("pt2", "ts"):
            assert json.loads((configs / f"args_inference_{kind}.json").read_text())["handlers::0::_disabled_"] is True


@pytest.mark.parametrize("content", [b"no network", None])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.ts", r"model\.ts cannot be read as TorchScript .*; this command writes it: .* --net_id n "),
        (
            "model.pt2",
            r"model\.pt2 cannot be read as an exported program .*; this command writes it: segbundles export ",
        ),
    ],
)
def test_a_file_that_is_no_exported_network(name: str, message: str, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is None:
        torch.save({"weight": torch.ones(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_exported(path, tmp_path, "n")


def test_a_size_that_the_network_does_not_take_is_refused_by_its_program(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.PixelUnshuffle(2), torch.nn.Conv2d(4, 1, 1))
    export_network(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), network), tmp_path / "model.pt2")
    program = load_exported(tmp_path / "model.pt2").eval()
    assert program(torch.zeros(1, 1, 6, 10)).shape == (1, 1, 3, 5)
    with pytest.raises((AssertionError, RuntimeError)):
        program(torch.zeros(1, 1, 6, 9))


class TestTensorRT:
    """What can be tested without a GPU."""

    def test_the_patch_runs_without_tensorrt(
        self, bundle: TinyBundle, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(trt_compiler, "trt_imported", False)
        root = bundle.make(here).relative_to(here)
        bundle.write_image(here / "scans")
        expected = infer(root, "eager")
        command = documented("inference_trt.json").replace(SLICES, bundle.name)
        command_line(changed(command, output_dir="patched"))
        assert_same(written(bundle.name, "patched"), expected)

    def test_its_onnx_file_equals_the_network_in_the_profiles(
        self, bundle: TinyBundle, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The compiler exports to ONNX, then builds an engine; only the export is tested."""
        pytest.importorskip("onnx")
        root = bundle.make(here)
        parser = ConfigParser()
        parser.read_config([str(root / "configs" / name) for name in ("inference.json", "inference_trt.json")])
        network = parser.get_parsed_content("network_def").eval()
        compiler = trt_compiler.TrtCompiler(network, str(here / "plan"), **parser.get_parsed_content("trt_args"))
        monkeypatch.setattr(compiler, "_onnx_to_trt", lambda path: shutil.copy(path, here / "network.onnx") and None)

        if compiler.profiles:
            least, _, most = compiler.profiles[0]["x"]
        else:
            least, most = (
                [n, bundle.size[1], *bundle.settings["window_size"]] for n in compiler.dynamic_batchsize[::2]
            )
        compiler._build_and_save(copy.deepcopy(network), {"x": torch.randn(least)})
        other = [min(a + 5, b) for a, b in zip(least, most, strict=True)]
        assert other != least
        assert_equal(onnx(here / "network.onnx"), network, [least, other], bundle.grey)


def shipped() -> Iterator[Any]:
    for name, bundle in BY_NAME.items():
        missing = [file for file, _ in bundle.networks if not (ROOT / f"bundles/{name}/models/{file}.pt").is_file()]
        yield pytest.param(name, marks=pytest.mark.skipif(bool(missing), reason=f"{name} has no weights {missing}"))


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped())
def test_shipped_weights_by_the_documented_commands(name: str, here: Path) -> None:
    pytest.importorskip("onnx")
    root = here / "bundles" / name
    shutil.copytree(ROOT / "bundles" / name / "configs", root / "configs")
    (root / "models").mkdir()
    for path in (ROOT / "bundles" / name / "models").glob("*.pt"):
        shutil.copy(path, root / "models")
    channels = 1 if name == "em_membrane_unet" else 3
    sizes = [(1, 1, 40, 48, 50)] if name == VOLUMES else [(1, channels, 96, 128)]

    segbundles(["segbundles", "export", str(root)])
    for file, net_id in BY_NAME[name].networks:
        weights = root / "models" / f"{file}.pt"
        network = BY_NAME[name].network(root, net_id, weights)
        command_line(export_command(net_id).replace(VOLUMES, name))
        for suffix in (".ts", ".pt2"):
            assert_equal(load_exported(weights.with_suffix(suffix)), network, sizes)
        if net_id == "network_def":
            command = documented("onnx_export", VOLUMES if name == VOLUMES else SLICES).replace(SLICES, name)
            command_line(changed(command, input_shape=example_shape(name, net_id)))
            assert_equal(onnx(weights.with_suffix(".onnx")), network, sizes)
