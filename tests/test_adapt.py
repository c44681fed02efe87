"""Settings that fit a data set, and fine-tuning of the weights that came with a bundle."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from bundle_runs import ROOT
from own_data import save
from tiny_bundles import TINY_BUNDLES, command_line
from tiny_trainings import TINY_TRAININGS
from torch import nn
from typer.testing import CliRunner

from segbundles.adapt import (
    Cases,
    Machine,
    Plan,
    adapt,
    fit,
    median_spacing,
    per_voxel_bytes,
    plan_frames,
    plan_locator,
    plan_sections,
    plan_slices,
    plan_volumes,
    write_plans,
)
from segbundles.cli import app
from segbundles.commands import run_commands, train_commands
from segbundles.finetuning import fine_tuning, shipped_weights

BUNDLES = ROOT / "bundles"
CPU, GPU = Machine("cpu", 8.0), Machine("cuda", 8.0)


@pytest.mark.parametrize(
    ("median", "most", "step", "square", "expected"),
    [
        ((60, 50, 33), 10**9, 16, False, [64, 64, 48]),
        ((200, 100, 100), 128 * 112 * 112, 16, False, [176, 80, 96]),  # the axis that is covered most is cut
        ((500, 20), 64 * 64, 32, False, [128, 32]),
        ((500, 300), 100 * 100, 32, True, [96, 96]),
        ((40, 70), 10**9, 32, True, [64, 64]),
        ((5, 5, 5), 1, 16, False, [16, 16, 16]),
    ],
)
def test_a_patch_has_the_shape_of_the_median_image(median, most, step, square, expected):
    patch = fit(median, most, step, square)
    assert patch == expected
    assert np.prod(patch) <= max(most, step ** len(patch))


def test_bytes_that_a_step_keeps():
    # the input (4 bytes), the output of ReLU (8 channels) and nothing for the weights
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.ReLU())
    assert per_voxel_bytes(network, 1, [16, 16]) == 4 + 8 * 4


def cases(size=(120, 120, 60), spacing=(1.0, 1.0, 2.0), box=(60.0, 50.0, 40.0), number=5, **more) -> Cases:
    return Cases(sizes=[size] * number, spacings=[spacing] * number, boxes=[box] * number, **more)


def test_median_spacing_and_thick_slices():
    usual = cases()
    usual.spacings = [(1, 1, 2), (0.8, 0.8, 2.5), (1.2, 1.2, 3)]
    assert median_spacing(usual) == [1, 1, 2.5]
    usual.spacings = [(1, 1, z) for z in (3.5, 5, 6, 7, 8, 9, 10, 6, 6, 6, 6)]
    assert median_spacing(usual) == [1, 1, 5]  # a tenth of the cases is below it


def test_axes_of_a_file_become_those_of_the_network():
    found = Cases()
    facts = {"orientation": "PSL", "size (voxels)": (10, 20, 30), "spacing (mm)": (1.0, 2.0, 3.0)}
    found.add({**facts, "label box (voxels)": (4, 5, 6), "classes": "0 2"})
    assert (found.sizes, found.spacings, found.boxes, found.classes) == (
        [(30, 10, 20)],
        [(3.0, 1.0, 2.0)],
        [(18.0, 4.0, 10.0)],
        {0, 2},
    )


class TestVolumes:
    def plan(self, found: Cases, machine: Machine = CPU) -> Plan:
        plan = Plan(BUNDLES / "left_atrium_vnet", "train.json", machine)
        plan_volumes(plan, found)
        return plan

    def test_data_like_the_bundle_s_own_need_no_setting(self):
        found = cases((320, 320, 110), (1.25, 1.25, 1.37), (75.0, 70.0, 65.0))
        assert self.plan(found).chosen == {}

    def test_a_gpu_has_batches_of_two_and_as_many_steps(self):
        plan = self.plan(cases((320, 320, 110), (1.25, 1.25, 1.37), (75.0, 70.0, 65.0)), GPU)
        # the box and 20 mm on each side, at 1.25 mm: 92 x 88 x 84 voxels
        assert plan.chosen == {"patch_size": [96, 96, 96], "batch_size": 2, "max_epochs": 120, "lr_epochs": 120}

    def test_other_spacing_and_small_objects(self):
        plan = self.plan(cases((120, 120, 40), (1.0, 1.0, 3.0), (24.0, 20.0, 18.0)))
        assert plan.chosen["network_spacing_mm"] == [1.0, 1.0, 3.0]
        assert (plan.chosen["min_size_mm"], plan.chosen["max_size_mm"]) == (5.0, 50.0)

    def test_a_spacing_of_the_bundle_that_is_somewhat_finer_stays(self):
        plan = self.plan(cases((120, 120, 60), (1.5, 1.5, 2.0), (60.0, 60.0, 60.0)))
        assert "network_spacing_mm" not in plan.chosen

    def test_little_memory_means_a_coarser_spacing(self):
        found, gib = cases((600, 600, 600), (0.5, 0.5, 0.5), (110.0, 110.0, 110.0)), 2.5
        assert self.plan(found, Machine("cuda", 16.0)).chosen["network_spacing_mm"] == [0.5, 0.5, 0.5]
        plan = self.plan(found, Machine("cuda", gib))
        spacing, patch = plan.chosen["network_spacing_mm"][0], plan.chosen["patch_size"]
        assert 0.5 < spacing < 1.0
        assert np.prod(patch) >= 0.25 * (150 / spacing) ** 3 * 0.98  # a crop has edges of 150 mm
        assert plan.bytes_each * np.prod(patch) * 2 <= gib * 2**30

    def test_locator_of_small_objects_is_finer(self):
        plan = Plan(BUNDLES / "left_atrium_vnet", "train_locator.json", CPU)
        plan_locator(plan, cases((120, 120, 60), (1.0, 1.0, 2.0), (24.0, 20.0, 18.0)))
        assert plan.chosen["locator_spacing_mm"] == [2.25, 2.25, 2.25]
        assert "locator_patch_size" not in plan.chosen  # 80 x 80 x 32 covers half of the volume, 54 x 54 x 54
        plan = Plan(BUNDLES / "left_atrium_vnet", "train_locator.json", CPU)
        plan_locator(plan, cases((120, 120, 60), (1.0, 1.0, 2.0), (12.0, 12.0, 12.0)))
        assert plan.chosen["locator_spacing_mm"] == [1.65, 1.65, 1.65]  # 1.5 mm, coarser because volumes would be large
        assert sorted(plan.chosen["locator_patch_size"]) == [48, 64, 64]

    def test_without_a_foreground(self):
        with pytest.raises(ValueError, match="no training case has a spacing and a foreground"):
            self.plan(Cases(sizes=[(9, 9, 9)], spacings=[(1.0, 1.0, 1.0)]))


class TestPictures:
    @pytest.mark.parametrize(
        ("size", "expected"),
        [
            ((256, 256), {}),
            ((64, 80), {"depth": 5, "patch_size": [64, 80], "window_size": [64, 80]}),
            # half of a slice is not covered by the bundle's patches; four of these cost what 8 of the bundle's do
            ((512, 512), {"patch_size": [256, 288], "batch_size": 4, "window_size": [256, 288]}),
        ],
    )
    def test_slices(self, size, expected):
        plan = Plan(BUNDLES / "brain_flair_unet", "train.json", CPU)
        plan_slices(plan, Cases(sizes=[size] * 3))
        assert plan.chosen == expected

    @pytest.mark.parametrize(
        ("edge", "expected"),
        [
            (1024, {}),
            (200, {"patch_size": [192, 192], "window_size": [192, 192]}),
            (70, {"patch_size": [64, 64], "window_size": [64, 64], "border_pixels": 16}),
        ],
    )
    def test_sections(self, edge, expected):
        plan = Plan(BUNDLES / "em_membrane_unet", "train.json", CPU)
        plan_sections(plan, Cases(sizes=[(edge, edge + 20)]))
        assert plan.chosen == expected

    @pytest.mark.parametrize(
        ("size", "expected"),
        [((384, 288), {}), ((96, 72), {"frame_height": 72, "patch_size": [96, 96], "void_class": 3})],
    )
    def test_frames(self, size, expected):
        plan = Plan(BUNDLES / "polyp_fcn8", "train.json", CPU)
        plan_frames(plan, Cases(sizes=[size], void_class=expected.get("void_class")))
        assert plan.chosen == expected


def three_classes(folder: Path, cases: int = 4) -> None:
    """Write volumes of two nested boxes, with slices of 2 mm, and their list."""
    rng = np.random.default_rng(0)
    entries = []
    for number in range(cases):
        label = np.zeros((48, 48, 16), np.uint8)
        x, y = rng.integers(10, 20, 2)
        label[x : x + 16, y : y + 16, 4:12], label[x + 4 : x + 12, y + 4 : y + 12, 6:10] = 1, 2
        image = (40 * label + rng.normal(100, 5, label.shape)).astype(np.int16)
        for name, array in (("image", image), ("label", label)):
            save(folder / f"{number}_{name}.nii.gz", array, np.diag([1.0, 1.0, 3.0, 1.0]))
        entries.append({"image": f"{number}_image.nii.gz", "label": f"{number}_label.nii.gz", "group": str(number)})
    content = {
        "labels": {"0": "background", "1": "wall", "2": "core"},
        "training": entries[1:],
        "validation": entries[:1],
    }
    (folder / "datalist.json").write_text(json.dumps(content))


def test_the_files_run_and_the_weights_keep_the_names_of_the_classes(tmp_path):
    bundle = next(tiny for tiny in TINY_BUNDLES if tiny.name == "left_atrium_vnet").make(tmp_path)
    three_classes(tmp_path / "data")
    plans, notes = adapt(bundle, tmp_path / "data", CPU)
    assert notes == []
    files = write_plans(plans, tmp_path / "mine.json", "Settings for a test.")
    assert [file.name for file in files] == ["mine.json", "mine_locator.json"]
    content = json.loads(files[0].read_text())
    assert list(content)[:3] == ["_desc_", "_num_classes_desc_", "num_classes"]
    assert content["num_classes"] == 3
    assert content["locator_spacing_mm"] == json.loads(files[1].read_text())["locator_spacing_mm"]
    tiny = {
        "max_epochs": 1,
        "val_interval": 1,
        "base_channels": 2,
        "locator_base_channels": 2,
        "device": "cpu",
        "amp": "false",
    }
    options = [str(word) for key, value in tiny.items() for word in (f"--{key}", value)]
    commands = train_commands(
        str(bundle), str(tmp_path / "data"), str(tmp_path / "out"), ["--args_file", str(files[0]), *options]
    )
    assert str(files[1]) in commands[0]
    command_line(commands[1])
    facts = json.loads((tmp_path / "out/models/model.json").read_text())
    assert facts["classes"] == {"0": "background", "1": "wall", "2": "core"}
    assert facts["knobs"]["network_spacing_mm"] == content["network_spacing_mm"]


def test_a_class_without_any_label_is_a_note(tmp_path):
    three_classes(tmp_path / "data", 3)
    path = tmp_path / "data/datalist.json"
    path.write_text(path.read_text().replace('"2": "core"', '"2": "core", "3": "rim"'))
    _, notes = adapt("left_atrium_vnet", tmp_path / "data", CPU)
    assert notes == ["no training label contains the class 3"]


class TestFineTuning:
    @pytest.fixture
    def bundle(self, tmp_path):
        """Bundle whose tiny weights were made by 10 epochs of 40 cases."""
        root = next(tiny for tiny in TINY_BUNDLES if tiny.name == "brain_flair_unet").make(tmp_path)
        path = root / "models/model.json"
        facts = json.loads(path.read_text()) | {"epochs": 10, "data": {"training": {"cases": 40}}}
        path.write_text(json.dumps(facts))
        return root

    def words(self, bundle: Path, data: Path, *settings: list[str]) -> dict[str, str]:
        return dict(fine_tuning(bundle, "train.json", str(data), settings))

    def test_what_is_not_given_is_chosen(self, bundle, tmp_path):
        (tmp_path / "datalist.json").write_text(json.dumps({"training": [{}] * 5}))
        weights = str(bundle / "models/model.pt")
        # 400 steps with one case each made the weights: a tenth of them is 8 epochs of 5 cases
        expected = {"--learning_rate": "0.0001", "--max_epochs": "8", "--lr_epochs": "8"}
        assert self.words(bundle, tmp_path) == {"--initial_weights": weights, **expected}
        given = self.words(bundle, tmp_path, ["--max_epochs", "3"], ["--learning_rate", "0.5"])
        assert given == {
            "--initial_weights": weights, "--max_epochs": "3", "--learning_rate": "0.5", "--lr_epochs": "3",
        }  # fmt: skip
        (tmp_path / "datalist.json").write_text(json.dumps({"training": [{}]}))
        assert self.words(bundle, tmp_path)["--max_epochs"] == "36"  # never more than the config's

    def test_an_args_file_with_a_fault_is_named(self, bundle, tmp_path):
        (tmp_path / "my.json").write_text('{"max_epochs": 3,}')
        with pytest.raises(ValueError, match=r"my\.json, line 1, column 17: .*comma"):
            self.words(bundle, tmp_path, ["--args_file", str(tmp_path / "my.json")])

    def test_weights_that_were_replaced_and_that_are_absent(self, bundle):
        (bundle / "models/model.pt").rename(bundle / "models/model_shipped.pt")
        assert shipped_weights(bundle).name == "model_shipped.pt"
        (bundle / "models/model_shipped.pt").unlink()
        with pytest.raises(ValueError, match=r"needs .*models/model.pt, which does not exist"):
            shipped_weights(bundle)

    def test_scores_before_and_after_have_the_same_settings(self, bundle, brain_phantom, tmp_path, monkeypatch):
        ran = []

        def in_process(commands, say):
            for command in commands:
                ran.append(command)
                command_line(command)
            return 0

        monkeypatch.setattr("segbundles.commands.run_commands", in_process)
        tiny = TINY_TRAININGS["brain_flair_unet"].settings
        tiny = {key: json.dumps(value).strip('"') for key, value in tiny.items() if key != "mirror_axes"}
        options = [word for key, value in tiny.items() for word in (f"--{key}", value)]
        places = [str(bundle), str(brain_phantom), str(tmp_path / "out")]
        done = CliRunner().invoke(app, ["train", *places, "--initial_weights", "shipped", *options])
        assert done.exit_code == 0, done.output
        assert [command[4] for command in ran] == ["training", "evaluating", "evaluating"]
        before, after = (shlex.join(command) for command in ran[1:])
        where = {
            "evaluation_before": "evaluation",
            f"--weights {bundle / 'models/model.pt'}": f"--ckpt_dir {tmp_path / 'out/models'}",
        }
        for one, other in where.items():
            before = before.replace(one, other)
        assert before == after
        summary = json.loads((tmp_path / "out/evaluation_before/summary.json").read_text())
        row = next(line for line in done.output.splitlines() if "│ dice " in line)
        assert f"{summary['dice']['mean']:.4f}" in row


def test_commands_run_in_order_until_one_fails():
    said = []
    commands = [["python", "-c", f"raise SystemExit({code})"] for code in (0, 3, 0)]
    assert run_commands(commands, said.append) == 3
    assert len(said) == 2
