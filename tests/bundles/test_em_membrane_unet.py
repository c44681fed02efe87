from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from bundle_runs import BundleRuns, root_cause, table
from monai.bundle import ConfigParser, ConfigWorkflow, load, verify_metadata, verify_net_in_out
from monai.transforms import SaveImaged
from PIL import Image
from scipy import ndimage

from segbundles.datasets import get_data_set, prepare
from segbundles.datasets.em import make_section

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "bundles" / "em_membrane_unet"
CONFIGS = BUNDLE / "configs"
SCHEMA = ROOT.parent / "shared" / "monai_schema" / "meta_schema_20240725.json"

TINY = {
    "base_channels": 4,
    "depth": 3,
    "patch_size": [32, 32],
    "border_pixels": 8,
    "tiles_per_batch": 16,
    "test_time_augmentation": False,
    "amp": False,
    "device": "cpu",
}
TINY_TRAINING = {**TINY, "max_epochs": 2, "batch_size": 4, "learning_rate": 0.02, "patches_per_section": 2}
RUNS = BundleRuns("em_membrane_unet", TINY, TINY_TRAINING)
EVALUATE, config, bundle_run = RUNS.evaluate_files, RUNS.config, RUNS.run
train, evaluate, infer = RUNS.train, RUNS.evaluate, RUNS.infer


@pytest.fixture(scope="module")
def trained(em_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with models/ and training output of a tiny network that has learnt something."""
    out = tmp_path_factory.mktemp("trained")
    train(em_phantom, out, max_epochs=4, lr_epochs=4, patches_per_section=16)
    return out


@pytest.fixture(scope="module")
def section() -> tuple[np.ndarray, np.ndarray]:
    """Image and label (H, W) of a section that no stack holds."""
    image, label = make_section(np.random.default_rng(7), (64, 80))
    return image[0].T, label[0].T


def write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


class TestEndToEnd:
    def test_training_learns_and_writes_half_precision_weights(self, trained: Path) -> None:
        assert [p.name for p in (trained / "models").iterdir()] == ["model.pt"]
        state = torch.load(trained / "models" / "model.pt", weights_only=True)
        assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float16}
        assert {"training.ckpt", "tensorboard"} <= {p.name for p in trained.iterdir()}
        best = torch.load(trained / "training.ckpt", weights_only=True)["evaluator"]["best_metric"]
        assert best > 0.85  # a quarter of the pixels is membrane

    def test_tensorboard_holds_loss_metric_and_picture(self, trained: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        tags: dict[str, set[str]] = {"scalars": set(), "images": set()}
        for file in (trained / "tensorboard").rglob("events*"):
            events = EventAccumulator(str(file)).Reload()
            for kind in tags:
                tags[kind] |= set(events.Tags()[kind])
        assert any("train_loss" in tag for tag in tags["scalars"])
        assert any("val_pixel_accuracy" in tag for tag in tags["scalars"])
        assert any(tag.startswith("validation/case_0") for tag in tags["images"])

    def test_evaluation_scores_sections_and_their_cells(self, trained: Path, em_phantom: Path, tmp_path: Path) -> None:
        rows = evaluate(trained, em_phantom, tmp_path, section="training")
        assert [row["case"] for row in rows] == [f"section_{k:02d}" for k in range(4)]
        truth = tifffile.imread(em_phantom / "train-labels.tif")
        assert [int(row["true_cells"]) for row in rows] == [ndimage.label(page)[1] for page in truth[:4]]
        for row in rows:
            assert 0.8 < float(row["pixel_accuracy"]) < 1
            assert 0.7 < float(row["pixel_accuracy_mask"]) < 1
            assert all(0 < float(row[f"{s}{c}"]) <= 1 for s in ("v_rand", "v_info") for c in ("", "_cells"))
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["pixel_accuracy"]["n"] == summary["cases"] == 4
        thresholds = {float(row["threshold"]): float(row["v_rand"]) for row in table(tmp_path / "thresholds.csv")}
        assert summary["v_rand"]["mean"] == pytest.approx(max(thresholds.values()), rel=1e-4)
        assert thresholds[summary["v_rand_threshold"]] == max(thresholds.values())
        page = (tmp_path / "report.html").read_text()
        assert page.count("data:image/jpeg") == 4

    def test_inference_writes_masks_and_cells_of_a_stack(self, trained: Path, em_phantom: Path, tmp_path: Path) -> None:
        infer(trained, em_phantom, tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "inference.csv",
            "inference.log",
            "train-volume_cells.tif",
            "train-volume_seg.tif",
        ]
        mask, cells = (tifffile.imread(tmp_path / f"train-volume_{name}.tif") for name in ("seg", "cells"))
        truth = tifffile.imread(em_phantom / "train-labels.tif")
        assert mask.shape == cells.shape == truth.shape
        assert (mask.dtype, cells.dtype) == (np.uint8, np.uint16)
        assert set(np.unique(mask)) == {0, 255}
        assert ((mask == 0) == (cells == 0)).all()
        assert (mask == truth).mean() > 0.85
        for page in cells:
            assert np.unique(page).tolist() == list(range(page.max() + 1))
        assert [(r["file"], r["status"]) for r in table(tmp_path / "inference.csv")] == [("train-volume.tif", "ok")]

    def test_evaluation_scores_the_cells_that_inference_writes(
        self, trained: Path, em_phantom: Path, tmp_path: Path
    ) -> None:
        for watershed in ("probability", "grey"):
            settings = {"watershed": watershed, "min_cell_area": 12}
            rows = evaluate(trained, em_phantom, tmp_path / watershed, section="training", **settings)
            infer(trained, em_phantom / "train-volume.tif", tmp_path / watershed / "i", **settings)
            cells = tifffile.imread(tmp_path / watershed / "i" / "train-volume_cells.tif")
            assert [int(row["cells"]) for row in rows] == [page.max() for page in cells[:4]]
            mask = tifffile.imread(tmp_path / watershed / "i" / "train-volume_seg.tif")
            right = (mask == tifffile.imread(em_phantom / "train-labels.tif"))[:4].mean((1, 2))
            assert [float(row["pixel_accuracy_mask"]) for row in rows] == pytest.approx(right, abs=1e-5)

    @pytest.mark.parametrize("augmented", [False, True])
    def test_what_is_written_is_what_the_network_says(
        self, augmented: bool, trained: Path, em_phantom: Path, tmp_path: Path
    ) -> None:
        """Put through by hand, rows first, each section as one tile, without MONAI's transforms and writers."""
        from monai.networks.nets import DynUNet

        pages = tifffile.imread(em_phantom / "train-volume.tif")[:2, :64, :64]
        tifffile.imwrite(tmp_path / "two.tif", pages, photometric="minisblack")
        grey = pages.astype(float)
        mean, std = (f(grey, axis=(1, 2), keepdims=True) for f in (np.mean, np.std))
        batch = torch.as_tensor((grey - mean) / std * 0.17 + 0.5, dtype=torch.float32)[:, None].transpose(2, 3)
        network = DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 16], norm_name="batch").eval()
        network.load_state_dict(torch.load(trained / "models" / "model.pt", weights_only=True))
        ways = [(flip, turns) for flip in (False, True) for turns in range(4)] if augmented else [(False, 0)]
        probability = torch.zeros(2, 64, 64)
        with torch.no_grad():
            for flip, turns in ways:
                x = torch.rot90(batch.flip(3) if flip else batch, turns, (2, 3))
                back = torch.rot90(network(x).softmax(1)[:, 0], -turns, (1, 2))
                probability += (back.flip(2) if flip else back) / len(ways)
        expected = (probability < 0.5).numpy().transpose(0, 2, 1)
        # no smoothing, and markers up to the membrane: the cells are the parts below one half
        settings = {"smoothing_pixels": 0.0, "marker_threshold": 0.5, "patch_size": [64, 64], "border_pixels": 0}
        infer(trained, tmp_path / "two.tif", tmp_path / "out", test_time_augmentation=augmented, **settings)
        written = tifffile.imread(tmp_path / "out" / "two_seg.tif") > 0
        assert 0.2 < written.mean() < 0.95
        assert (written != expected).mean() < 1e-3

    @pytest.mark.slow
    def test_from_another_folder_by_the_command_line(self, trained: Path, em_phantom: Path, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "monai.bundle", "run", "inferring", "--bundle_root", str(BUNDLE)]
        command += ["--config_file", str(CONFIGS / "inference.json"), "--dataset_dir", str(em_phantom)]
        command += ["--output_dir", "out", "--ckpt_dir", str(trained / "models"), "--test_time_augmentation", "true"]
        command += ["--base_channels", "4", "--depth", "3", "--patch_size", "[32,32]", "--amp", "false"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / "out" / "train-volume_seg.tif").is_file()
        misspelt = subprocess.run([*command, "--watersheds", "grey"], cwd=tmp_path, capture_output=True, text=True)
        assert misspelt.returncode != 0
        assert "did you mean 'watershed'?" in misspelt.stdout


class TestPatches:
    @staticmethod
    def parser(dataset_dir: Path, **settings: object) -> ConfigParser:
        parser = ConfigParser()
        parser.read_config(str(CONFIGS / "train.json"))
        parser.update({**TINY_TRAINING, "dataset_dir": str(dataset_dir), **settings})
        return parser

    @pytest.mark.parametrize("workers", [0, 2])
    def test_each_section_gives_so_many_different_patches_an_epoch(self, workers: int, em_phantom: Path) -> None:
        parser = self.parser(em_phantom, patches_per_section=3, num_workers=workers, batch_size=5)
        loader = parser.get_parsed_content("train::dataloader")
        torch.manual_seed(0)
        batches = list(loader)
        assert [len(batch["image"]) for batch in batches] == [5, 5, 2]
        cases = [case for batch in batches for case in batch["case"]]
        assert {case: cases.count(case) for case in cases} == {f"section_{k:02d}": 3 for k in range(4)}
        patches = torch.cat([batch["image"] for batch in batches]).as_tensor()
        assert patches.shape == (12, 1, 32, 32)
        assert len({tuple(patch.flatten().tolist()) for patch in patches}) == 12
        assert {v for batch in batches for v in batch["label"].unique().tolist()} == {0, 1}

    @pytest.mark.parametrize("context", [0, 20])
    def test_without_augmentation_a_patch_is_cut_out_of_its_section(self, context: int, em_phantom: Path) -> None:
        """With context around it: the section's own pixels, and mirrored ones only outside the section."""
        chances = {f"{name}_probability": 0.0 for name in ("flip", "rotate90", "elastic", "intensity")}
        parser = self.parser(em_phantom, context_pixels=context, **chances)
        item = parser.get_parsed_content("train::patches")[1]
        side = 32 + 2 * context
        assert item["image"].shape == (1, side, side)
        assert item["label"].shape == (1, 32, 32)
        pages = [tifffile.imread(em_phantom / f"train-{name}.tif")[1].T for name in ("volume", "labels")]
        grey = (pages[0] - pages[0].mean()) / pages[0].std() * 0.17 + 0.5
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(grey, context, "symmetric"), (side, side))
        apart = np.abs(windows - item["image"][0].numpy()).max((2, 3))
        x, y = np.unravel_index(apart.argmin(), apart.shape)
        assert apart[x, y] < 1e-5
        assert np.array_equal(item["label"][0].numpy(), pages[1][x : x + 32, y : y + 32] == 255)

    def test_elastic_moves_by_some_pixels_and_label_with_image(self, em_phantom: Path) -> None:
        """With the label as image too: both stay alike, and edges move by the pixels that the knob gives."""
        parser = self.parser(em_phantom, elastic_pixels=3.0)
        (elastic,) = (
            t for t in parser.get_parsed_content("train::random_transforms") if type(t).__name__ == "Rand2DElasticd"
        )
        elastic.prob = 1.0
        elastic.rand_2d_elastic.deform_grid.magnitude = (3.0, 3.0)
        elastic.set_random_state(0)
        columns = torch.arange(64.0).expand(1, 64, 64).contiguous()
        moved = elastic({"image": columns.clone(), "label": columns.clone()})
        shift = (moved["image"] - columns)[0, 8:-8, 8:-8]
        assert 1.0 < shift.std() < 4.0
        assert ((moved["label"] - moved["image"]).abs() <= 0.51).all()

    def test_intensities_change_by_the_grey_levels_that_the_knobs_give(self, em_phantom: Path) -> None:
        settings = {"intensity_probability": 1.0, "noise_grey_levels": 20.0, "brightness_grey_levels": 20.0}
        transforms = self.parser(em_phantom, **settings).get_parsed_content("train::random_transforms")
        by_name = {type(t).__name__: t for t in transforms}
        flat = torch.full((1, 64, 64), 0.5)
        noise, shift = [], []
        for seed in range(60):
            for name, found in (("RandGaussianNoised", noise), ("RandShiftIntensityd", shift)):
                by_name[name].set_random_state(seed)
                out = by_name[name]({"image": flat.clone()})["image"]
                found.append(float(out.std() if found is noise else out.mean() - 0.5) * 255)
        assert 15 < max(noise) < 21
        assert min(noise) < 4
        assert max(map(abs, shift)) <= 20
        assert max(shift) > 15
        assert min(shift) < -15


class TestResume:
    def test_stopped_and_resumed_gives_the_same_weights_bit_for_bit(self, em_phantom: Path, tmp_path: Path) -> None:
        common = {"max_epochs": 3, "lr_epochs": 3, "early_stop_patience": 9, "dropout": 0.1}

        def state(name: str, **settings: object) -> dict:
            train(em_phantom, tmp_path / name, **{**common, **settings})
            return torch.load(tmp_path / name / "training.ckpt", weights_only=True)

        whole = state("whole")
        state("parts", max_epochs=1)
        parts = state("parts", resume=True)
        assert parts["trainer"]["epoch"] == whole["trainer"]["epoch"] == 3
        for name, value in whole["network"].items():
            assert torch.equal(value, parts["network"][name]), name
        for name in ("evaluator", "lr_scheduler"):
            assert parts[name] == whole[name]


class TestContract:
    @pytest.mark.parametrize(("files", "kind"), [("train.json", "train"), ("inference.json", "infer")])
    def test_check_properties_lacks_nothing(self, files: str, kind: str, em_phantom: Path) -> None:
        workflow = ConfigWorkflow(
            config_file=str(CONFIGS / files),
            workflow_type=kind,
            logging_file=False,
            bundle_root=str(BUNDLE),
            dataset_dir=str(em_phantom),
            output_dir=str(em_phantom / "unused"),
            device="cpu",
        )
        workflow.initialize()
        assert workflow.check_properties() == []

    @pytest.mark.parametrize("watershed", ["probability", "grey"])
    @pytest.mark.parametrize("file", ["section.png", "stack.tif"])
    def test_monai_label_is_given_the_mask(
        self, file: str, watershed: str, trained: Path, section: tuple, tmp_path: Path
    ) -> None:
        """As its server goes through the ids of inference.json: what saves is left out, and ``pred`` is returned."""
        write_png(tmp_path / "section.png", section[0])
        tifffile.imwrite(tmp_path / "stack.tif", np.stack([section[0], section[0][::-1]]), photometric="minisblack")
        infer(trained, tmp_path / file, tmp_path / "out", watershed=watershed)
        (path,) = (tmp_path / "out").glob("*_seg.*")
        written = tifffile.imread(path) if path.suffix == ".tif" else np.asarray(Image.open(path))

        parser = ConfigParser()
        parser.read_config(str(CONFIGS / "inference.json"))
        ckpt_dir = str(trained / "models")
        parser.update({**TINY, "watershed": watershed, "bundle_root": str(BUNDLE), "ckpt_dir": ckpt_dir})
        network = parser.get_parsed_content("network_def").eval()
        network.load_state_dict(torch.load(trained / "models" / "model.pt", weights_only=True))
        data = {"image": str(tmp_path / file), "device": "cpu"}
        for transform in parser.get_parsed_content("preprocessing").transforms:
            data = transform(data)
        data["pred"] = parser.get_parsed_content("inferer")(data["image"][None], network)[0]
        for transform in parser.get_parsed_content("postprocessing").transforms:
            if not isinstance(transform, SaveImaged):
                data = transform(data)
        pred = data["pred"]
        assert (pred.dtype, pred.shape) == (torch.uint8, data["image"].shape)
        # its restoring step takes the channel away, and compares the rest with this
        assert tuple(data["image"].meta["spatial_shape"]) == pred.shape[1:]
        pages = np.moveaxis(pred[0].numpy(), -1, 0).transpose(0, 2, 1)
        assert ((pages * 255) == written.reshape(pages.shape)).all()
        assert set(np.unique(pages)) == {0, 1}

    def test_load_returns_the_network_with_its_weights(self, trained: Path, tmp_path: Path) -> None:
        shutil.copytree(BUNDLE, tmp_path / "em_membrane_unet")
        shutil.copytree(trained / "models", tmp_path / "em_membrane_unet" / "models", dirs_exist_ok=True)
        network = load(
            name="em_membrane_unet",
            bundle_dir=str(tmp_path),
            source="monaihosting",
            net_override={
                "filters": [4, 8, 16],
                "kernel_size": [3, 3, 3],
                "strides": [1, 2, 2],
                "upsample_kernel_size": [2, 2],
            },
        )
        expected = torch.load(trained / "models" / "model.pt", weights_only=True)
        assert all(torch.equal(v.to(expected[k].dtype), expected[k]) for k, v in network.state_dict().items())

    def test_metadata_fits_the_schema(self) -> None:
        if not SCHEMA.is_file():
            pytest.skip(f"no schema at {SCHEMA}")
        verify_metadata(
            meta_file=str(CONFIGS / "metadata.json"),
            filepath=str(SCHEMA),
            hash_val="cd64aa8a5904426f6fc6855dabe46af8c742d5bad644b4e9cfb78ebad09ad678",
            hash_type="sha256",
        )

    def test_network_takes_and_gives_what_the_metadata_says(self) -> None:
        verify_net_in_out(
            net_id="network_def",
            meta_file=str(CONFIGS / "metadata.json"),
            config_file=str(CONFIGS / "inference.json"),
            device="cpu",
            extra_forward_args={},
        )

    @pytest.mark.parametrize(
        ("overrides", "widths", "parameters"),
        [
            ({}, [32, 64, 128, 256, 512], 7_762_018),
            ({"base_channels": 8, "depth": 3, "dropout": 0.2, "norm": "instance"}, [8, 16, 32], 0),
        ],
    )
    def test_width_depth_norm_and_dropout_are_settings_and_it_is_scripted(
        self, overrides: dict, widths: list[int], parameters: int
    ) -> None:
        parser = ConfigParser()
        parser.read_config(str(CONFIGS / "train.json"))
        parser.update(overrides)
        network = parser.get_parsed_content("network_def").eval()
        assert network.filters == widths
        dropouts = {m.p for m in network.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd)}
        assert dropouts == ({0.2} if "dropout" in overrides else set())
        norm = torch.nn.InstanceNorm2d if "norm" in overrides else torch.nn.BatchNorm2d
        assert any(isinstance(m, norm) for m in network.modules())
        if parameters:
            assert sum(p.numel() for p in network.parameters()) == parameters
        x = torch.rand(1, 1, 32, 32)
        with torch.no_grad():
            assert torch.equal(torch.jit.script(network)(x), network(x))

    def test_files_say_the_same_where_they_must(self) -> None:
        train, infer, evaluate = map(config, ("train.json", "inference.json", "evaluate.json"))
        assert train["network_def"] == infer["network_def"]
        scored = {**train["validate"]["inferer"], "ckpt_dir": "@ckpt_dir"}
        setting = "test_time_augmentation"
        scored["inferer"][setting] = evaluate[f"validate::inferer::inferer::{setting}"]
        assert scored == infer["inferer"]
        for knob in set(train) & set(infer) - {"_desc_", "output_dir", "batch_size"}:
            if not isinstance(train[knob], dict) and not knob.startswith(("_section", "run", "initialize")):
                assert train[knob] == infer[knob], knob
        knobs = [key for key in evaluate if key in infer and key not in ("_desc_", "run")]
        assert len(knobs) == 12
        assert all(evaluate[knob] == infer[knob] for knob in knobs)
        scored, written = (c["transforms"] for c in (evaluate["validate::postprocessing"], infer["postprocessing"]))
        # a mask in the place of the probability is what MONAI Label returns; scores need both
        assert [{**t, "keys": "pred", "mask_keys": "pred"} for t in scored[1:3]] == written[:2]
        learnt = [t for t in train["train"]["deterministic_transforms"] if "LabelToClassd" not in t["_target_"]]
        assert learnt[0] == {"_target_": "segbundles.transforms.LoadPaged", "keys": ["image", "label"]}
        first, *others = infer["preprocessing"]["transforms"]
        assert first == {"_target_": "LoadImaged", "keys": "image", "reader": "segbundles.data.StackReader"}
        assert [{**t, "keys": "image"} for t in learnt[1:]] == others
        data_format = config("metadata.json")["network_data_format"]
        assert data_format["inputs"]["image"]["spatial_shape"] == train["patch_size"]
        assert data_format["inputs"]["image"]["num_channels"] == train["network_def"]["in_channels"]
        assert data_format["outputs"]["pred"]["num_channels"] == train["network_def"]["out_channels"]

    def test_the_report_tells_every_setting_that_its_scores_depend_on(self) -> None:
        evaluate, infer = map(config, ("evaluate.json", "inference.json"))
        (report,) = (h for h in evaluate["validate::handlers"] if h["_target_"].endswith("SectionReport"))
        told = {name: value for name, value in report["settings"].items() if name not in ("dataset", "weights")}
        assert all(value == f"@{name}" for name, value in told.items())
        own = {key for key in evaluate if key in infer and key not in ("_desc_", "run")}
        tiles = {value[1:] for value in infer["inferer"]["inferer"].values() if value[:1] == "@"} - {"tiles_per_batch"}
        assert own | tiles | {"section", "label_values", "amp"} <= told.keys()

    def test_the_patches_for_several_processes_read_alike_in_all_bundles(self) -> None:
        mine = config("multi_gpu_train.json")
        folders = [path.parent for path in ROOT.glob("bundles/*/configs/multi_gpu_train.json")]
        assert len(folders) >= 4
        for folder in folders:
            patch, train = (json.loads((folder / name).read_text()) for name in ("multi_gpu_train.json", "train.json"))
            for key in mine:
                if key not in ("_desc_", "network") and not key.startswith("train::"):
                    assert patch[key] == mine[key], (folder, key)
            assert patch["network"] == {**mine["network"], "module": train["network"]}, folder
            sampler = patch.get("train::sampler", train["train"].get("sampler"))
            assert sampler["seed"] == "@seed", folder
            if "train::sampler" in patch:  # else the bundle's own one shares out by itself
                assert [k for k in patch if k[:7] == "train::"] == [k for k in mine if k[:7] == "train::"]
                assert {**sampler, "dataset": 0} == {**mine["train::sampler"], "dataset": 0}, folder

    def test_the_model_card_explains_every_setting(self) -> None:
        card = (BUNDLE / "docs" / "README.md").read_text()
        sections = ("_section_2_", "validation_cases", "_section_2_")
        for name, end in zip(("train.json", "evaluate.json", "inference.json"), sections, strict=True):
            keys = list(config(name))
            knobs = [key for key in keys[: keys.index(end)] if key[0] != "_" and key not in ("imports", "bundle_root")]
            assert len(knobs) > 10
            assert [knob for knob in knobs if f"`{knob}`" not in card] == []

    def test_run_is_what_the_named_id_runs(self) -> None:
        for name, run_id in (("train", "training"), ("evaluate", "evaluating"), ("inference", "inferring")):
            assert config(f"{name}.json")[run_id] == "@run"

    @pytest.mark.parametrize("dice_weight", [0.0, 0.5])
    def test_loss_is_softmax_cross_entropy_with_a_share_of_dice(self, dice_weight: float) -> None:
        parser = ConfigParser()
        parser.read_config(str(CONFIGS / "train.json"))
        parser.update({"dice_weight": dice_weight})
        logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)  # membrane, cell
        truth = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2)
        right = [1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(-1.0))]
        cross_entropy = -np.mean(np.log(right))
        sums = [right[0] + 1 - right[1], right[1] + 1 - right[0]]
        dice = np.mean([1 - 2 * r / (1 + s) for r, s in zip(right, sums, strict=True)])
        expected = cross_entropy + dice_weight * dice
        assert parser.get_parsed_content("loss")(logits, truth).item() == pytest.approx(expected, abs=1e-4)

    @pytest.mark.parametrize(
        ("args", "name", "rate", "momentum"),
        [(None, "Adam", 5e-4, None), ("args_sgd.json", "SGD", 1e-3, 0.99), ("args_rmsprop.json", "RMSprop", 1e-4, 0)],
    )
    def test_optimizers_with_their_rates_by_json_alone(
        self, args: str | None, name: str, rate: float, momentum: float | None
    ) -> None:
        parser = ConfigParser()
        parser.read_config(str(CONFIGS / "train.json"))
        parser.update({k: v for k, v in (config(args) if args else {}).items() if k != "_desc_"})
        optimizer = parser.get_parsed_content("optimizer")
        assert (type(optimizer).__name__, optimizer.defaults["lr"]) == (name, rate)
        assert optimizer.defaults.get("momentum") == momentum

    def test_the_published_unet_by_json_alone(self, em_phantom: Path, tmp_path: Path) -> None:
        """64 to 1024 channels, 572 pixels for 388; then small, through all three commands.

        What is written is what the network says of the whole section, mirrored at its borders and nowhere else.
        """
        from segbundles.networks import ValidUNet

        parser = ConfigParser()
        parser.read_config(str(CONFIGS / "inference.json"))
        parser.update({k: v for k, v in config("args_valid_unet.json").items() if k != "_desc_"})
        network = parser.get_parsed_content("network_def")
        assert sum(p.numel() for p in network.parameters()) == 31_030_658
        assert network.margin == parser.get_parsed_content("context_pixels") == 92
        assert [n + 2 * 92 for n in parser.get_parsed_content("patch_size")] == [572, 572]
        args = {"args_file": str(CONFIGS / "args_valid_unet.json")}
        small = {**TINY, "border_pixels": 0}
        common = {"dataset_dir": em_phantom, "ckpt_dir": tmp_path / "models"}
        bundle_run("training", "train.json", output_dir=tmp_path, **common, **args, **small, max_epochs=1)
        bundle_run("evaluating", EVALUATE, output_dir=tmp_path / "e", **common, **args, **small)
        assert (tmp_path / "e" / "report.html").is_file()

        network = ValidUNet(channels=[4, 8, 16]).eval()
        network.load_state_dict(torch.load(tmp_path / "models" / "model.pt", weights_only=True))
        grey = tifffile.imread(em_phantom / "train-volume.tif").astype(float)
        mean, std = (f(grey, axis=(1, 2), keepdims=True) for f in (np.mean, np.std))
        grey = np.pad((grey - mean) / std * 0.17 + 0.5, ((0, 0), (20, 20), (20, 20)), "symmetric")
        with torch.no_grad():
            batch = torch.as_tensor(grey, dtype=torch.float32)[:, None].transpose(2, 3)
            probability = network(batch).softmax(1)[:, 0].numpy().transpose(0, 2, 1)
        assert probability.shape == (6, 80, 64)
        level = float(np.median(probability))
        cut = {"smoothing_pixels": 0.0, "marker_threshold": level, "membrane_threshold": level}
        bundle_run("inferring", "inference.json", output_dir=tmp_path / "i", **common, **args, **small, **cut)
        written = tifffile.imread(tmp_path / "i" / "train-volume_seg.tif") > 0
        assert (written != (probability < level)).mean() < 1e-3

    @pytest.mark.slow
    def test_two_processes_train_together(self, em_phantom: Path, tmp_path: Path) -> None:
        entries = json.loads((em_phantom / "datalist.json").read_text())
        for entry in entries["training"] + entries["validation"] + entries["testing"]:
            entry.update({key: str(em_phantom / entry[key]) for key in ("image", "label")})
        entries["validation"] += entries["testing"]  # one section for each process
        (tmp_path / "datalist.json").write_text(json.dumps(entries))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
        command += ["-m", "monai.bundle", "run", "training", "--bundle_root", str(BUNDLE), "--config_file"]
        command += [f"['{CONFIGS / 'train.json'}','{CONFIGS / 'multi_gpu_train.json'}']"]
        command += ["--dataset_dir", str(tmp_path), "--ckpt_dir", str(tmp_path / "models")]
        command += ["--output_dir", str(tmp_path), "--max_epochs", "2", "--base_channels", "4", "--depth", "3"]
        command += ["--patch_size", "[32,32]", "--amp", "false", "--batch_size", "2", "--patches_per_section", "2"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        parser = ConfigParser()
        parser.read_config(str(CONFIGS / "train.json"))
        parser.update({"base_channels": 4, "depth": 3})
        network = parser.get_parsed_content("network_def")
        weights = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
        network.load_state_dict(weights)  # of the network itself, not of what wraps it
        assert {v.dtype for v in weights.values() if v.is_floating_point()} == {torch.float16}
        assert all(torch.isfinite(v).all() for v in weights.values())
        norms = [m.weight for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert all((weight != 1).any() for weight in norms)  # which they start at
        state = torch.load(tmp_path / "training.ckpt", weights_only=True)
        assert state["trainer"]["iteration"] == 4  # eight patches, two processes, batches of two: two steps an epoch
        assert done.stdout.count("epoch 2/2") == 1  # the first process alone speaks


def write_case(folder: Path, fault: str, section: tuple[np.ndarray, np.ndarray]) -> None:
    """A stack of two sections with something wrong, or two files."""
    image, label = (np.stack([array, array[::-1]]) for array in section)
    entries = [{"image": "v.tif", "label": "l.tif", "page": k, "case": f"s{k}"} for k in range(2)]
    if fault == "label values":
        label[0, 0, 0] = 7
    elif fault == "inverted":
        entries[0]["label_values"] = [255]
    elif fault == "page":
        entries[1]["page"] = 2
    elif fault == "page count":
        label = label[:1]
    elif fault == "label size":
        label = label[:, :, :-1]
    elif fault == "NaN":
        image = image.astype(np.float32)
        image[0, 0, 0] = np.nan
    elif fault == "blank":
        image[0] = 7
    elif fault == "no label":
        del entries[1]["label"]
    folder.mkdir(parents=True, exist_ok=True)
    photometric = "minisblack"
    if fault == "colour":
        image, photometric = np.stack([image] * 3, -1), "rgb"
    tifffile.imwrite(folder / "v.tif", image, photometric=photometric)
    tifffile.imwrite(folder / "l.tif", label, photometric="minisblack")
    if fault == "page size":
        with tifffile.TiffWriter(folder / "v.tif") as file:
            for page in (image[0], image[1][1:]):
                file.write(page, contiguous=False, metadata=None)
    elif fault == "truncated":
        (folder / "v.tif").write_bytes((folder / "v.tif").read_bytes()[:3000])
    elif fault == "file missing":
        (folder / "l.tif").unlink()
    if fault != "no datalist":
        (folder / "datalist.json").write_text(json.dumps({"training": entries, "validation": []}))


class TestBadInput:
    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("no datalist", "there is no datalist.json in"),
            ("no label", "entry 1 (v.tif) has no label"),
            ("file missing", "label l.tif does not exist"),
            ("label values", "holds the label values 7: allowed are 0, 255"),
            ("inverted", "label_values must name 2 stored values, one a class, got [255]"),
            ("colour", "has 3 channels, 1 are due: give one with 1: an image in colour is to be converted to grey"),
            ("page size", "l.tif has size (64, 80, 1), its image"),
            ("page count", "l.tif has 1 pages, "),
            ("page", "has 2 pages, page 2 is asked for: they count from 0"),
            ("label size", "has size (63, 80, 1), its image"),
            ("NaN", "holds NaN or infinite values"),
            ("blank", "is constant (every value is 7)"),
            ("truncated", "it is truncated or damaged"),
        ],
    )
    def test_training_refuses_it_before_the_first_step(
        self, fault: str, message: str, section: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_case(tmp_path, fault, section)
        with pytest.raises(RuntimeError) as caught:
            train(tmp_path, tmp_path / "out")
        cause = root_cause(caught.value)
        assert isinstance(cause, ValueError)
        assert message in str(cause)
        errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR" and message in r.getMessage()]
        assert errors
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"patch_size": [32, 30]}, "patch_size [32, 30] must be multiples of 2 ** (depth - 1)"),
            ({"patch_size": [32, 64]}, "patch_size must be square to be turned, got [32, 64]"),
            ({"tile_overlap": 1.0}, "overlap must be a share of a tile"),
            ({"border_pixels": -1}, "border and context must be 0 or more (pixels), got -1 and 0"),
            ({"context_pixels": 20, "patch_size": [34, 34]}, "must be multiples of 2 ** (depth - 1) = 4, and 4 more"),
            ({"label_values": [0]}, "values must name 2 stored values, one a class, got [0]"),
            ({"max_epochs": 3, "lr_epochs": 2}, "the learning rate comes down to 0 after 2 epochs, max_epochs is 3"),
        ],
    )
    def test_settings_that_cannot_be(self, settings: dict, message: str, em_phantom: Path, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError) as caught:
            train(em_phantom, tmp_path, **settings)
        assert message in str(root_cause(caught.value))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"watershed": "none"}, "watershed must be probability or grey, got 'none'"),
            ({"patch_size": [32, 30]}, "patch_size [32, 30] must be multiples"),
            ({"marker_threshold": 2}, "marker_threshold must lie between 0 and 1, got 2"),
            ({"watershed": "grey", "closing_pixels": 0}, "closing_size must be 1 or more (pixels), got 0"),
            ({"min_cell_area": -1}, "min_cell_area must be 0 or more (pixels), got -1"),
        ],
    )
    def test_inference_and_evaluation_check_their_settings(
        self, settings: dict, message: str, trained: Path, em_phantom: Path, tmp_path: Path
    ) -> None:
        for command in (infer, evaluate):
            with pytest.raises(RuntimeError) as caught:
                command(trained, em_phantom, tmp_path / "out", **settings)
            assert message in str(root_cause(caught.value))

    @pytest.mark.parametrize("setting", ["output_dir", "ckpt_dir"])
    def test_a_folder_that_cannot_be_written_is_refused_before_training(
        self, setting: str, em_phantom: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(RuntimeError) as caught:
            train(em_phantom, tmp_path / "out", **{setting: tmp_path / "file" / "x"})
        assert str(root_cause(caught.value)).startswith(f"{setting} '{tmp_path / 'file' / 'x'}' cannot be written to")

    def test_missing_weights_and_those_of_another_network(
        self, trained: Path, em_phantom: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(RuntimeError) as caught:
            infer(tmp_path, em_phantom, tmp_path / "out")
        assert "there are no weights at" in str(root_cause(caught.value))
        with pytest.raises(RuntimeError) as caught:
            evaluate(trained, em_phantom, tmp_path / "out", base_channels=8)
        assert "is of another architecture than the DynUNet configured" in str(root_cause(caught.value))

    def test_bad_images_do_not_stop_the_others(self, trained: Path, section: tuple, tmp_path: Path) -> None:
        image, label = section
        data = tmp_path / "data with spaces"
        write_png(data / "gut é" / "a.png", image)
        write_png(data / "gut é" / "a_label.png", label)
        write_png(data / "labels" / "a.png", label)
        write_png(data / "colour.png", np.stack([image] * 3, -1))
        write_png(data / "black.png", np.zeros_like(image))
        (data / "broken.tif").write_bytes(b"II*\0 no TIFF")
        tifffile.imwrite(
            data / "stack.tif", np.stack([image, image[::-1], np.zeros_like(image)]), photometric="minisblack"
        )
        with pytest.raises(RuntimeError) as caught:
            infer(trained, data, tmp_path / "out")
        assert str(root_cause(caught.value)).startswith("3 of 5 images failed: ")
        rows = {row["file"]: row for row in table(tmp_path / "out" / "inference.csv")}
        assert set(rows) == {"gut é/a.png", "colour.png", "black.png", "broken.tif", "stack.tif"}
        for file, reason in (
            ("colour.png", "an image in colour is to be converted to grey"),
            ("black.png", "is constant (every value is 0)"),
            ("broken.tif", "truncated or damaged"),
        ):
            assert rows[file]["status"] == "failed"
            assert reason in rows[file]["notes"]
        assert sorted(p.name for p in (tmp_path / "out" / "gut é").iterdir()) == ["a_cells.tif", "a_seg.png"]
        assert tifffile.imread(tmp_path / "out" / "stack_seg.tif").shape == (3, 80, 64)

    def test_an_empty_folder_is_an_error(self, trained: Path, tmp_path: Path) -> None:
        (tmp_path / "volume.nii.gz").write_bytes(b"not of this kind")
        with pytest.raises(RuntimeError) as caught:
            infer(trained, tmp_path, tmp_path / "out")
        assert "no image under" in str(root_cause(caught.value))

    def test_an_image_that_fails_in_the_middle_does_not_stop_the_others(
        self, trained: Path, section: tuple, tmp_path: Path
    ) -> None:
        for name in ("a", "b"):
            write_png(tmp_path / "data" / f"{name}.png", section[0])
        (tmp_path / "out" / "a_seg.png").mkdir(parents=True)  # in the way of the first output
        with pytest.raises(RuntimeError) as caught:
            infer(trained, tmp_path / "data", tmp_path / "out")
        assert str(root_cause(caught.value)).startswith("1 of 2 images failed: a.png.")
        assert (tmp_path / "out" / "b_seg.png").is_file()
        assert (tmp_path / "out" / "b_cells.tif").is_file()


class TestUnusualInput:
    def test_a_section_gives_one_segmentation_whatever_file_holds_it(
        self, trained: Path, section: tuple, tmp_path: Path
    ) -> None:
        """PNG, TIFF of one page and of three, 16 bits, floating point: grey levels have no unit here."""
        image = section[0]
        data = tmp_path / "data"
        write_png(data / "a.png", image)
        tifffile.imwrite(data / "one.tif", image)
        tifffile.imwrite(data / "wide.tif", image.astype(np.uint16) * 200 + 1000)
        tifffile.imwrite(data / "float.tif", image.astype(np.float32) / 255)
        tifffile.imwrite(data / "three.tif", np.stack([image[::-1], image, image[:, ::-1]]), photometric="minisblack")
        infer(trained, data, tmp_path / "out")
        with Image.open(tmp_path / "out" / "a_seg.png") as mask:
            assert (mask.size, mask.mode) == ((64, 80), "L")
            expected = np.asarray(mask)
        assert 0.3 < (expected == 255).mean() < 0.95
        cells = tifffile.imread(tmp_path / "out" / "a_cells.tif")
        assert cells.dtype == np.uint16
        assert ((cells > 0) == (expected == 255)).all()
        for name in ("one", "wide", "float"):
            found = np.asarray(Image.open(tmp_path / "out" / f"{name}_seg.png"))
            assert (found != expected).mean() < 1e-3, name
        stack = tifffile.imread(tmp_path / "out" / "three_seg.tif")
        assert (stack[1] != expected).mean() < 1e-3
        assert tifffile.imread(tmp_path / "out" / "three_cells.tif").shape == (3, 80, 64)

    @pytest.mark.parametrize("size", [(20, 90), (7, 5), (47, 33)])
    def test_images_of_any_size_are_segmented_and_learnt_from(self, size: tuple, trained: Path, tmp_path: Path) -> None:
        """Also those smaller than a tile, mirrored until they fill it."""
        rng = np.random.default_rng(0)
        write_png(tmp_path / "data" / "a.png", rng.integers(0, 255, size, dtype=np.uint8))
        write_png(tmp_path / "data" / "labels" / "a.png", rng.integers(0, 2, size, dtype=np.uint8) * 255)
        entries = [{"image": "a.png", "label": "labels/a.png"}]
        (tmp_path / "data" / "datalist.json").write_text(json.dumps({"training": entries, "validation": entries}))
        infer(trained, tmp_path / "data", tmp_path / "out")
        with Image.open(tmp_path / "out" / "a_seg.png") as mask:
            assert mask.size == size[::-1]
        train(tmp_path / "data", tmp_path, max_epochs=1)
        assert (tmp_path / "models" / "model.pt").is_file()

    def test_a_stack_without_pages_named_is_learnt_from_and_scored_whole(
        self, section: tuple, em_phantom: Path, tmp_path: Path
    ) -> None:
        shutil.copy(em_phantom / "train-volume.tif", tmp_path / "v.tif")
        shutil.copy(em_phantom / "train-labels.tif", tmp_path / "l.tif")
        entries = [{"image": "v.tif", "label": "l.tif", "case": "mine"}]
        (tmp_path / "datalist.json").write_text(json.dumps({"training": entries, "validation": entries}))
        train(tmp_path, tmp_path / "t", max_epochs=1)
        state = torch.load(tmp_path / "t" / "training.ckpt", weights_only=True)
        assert state["trainer"]["iteration"] == 3  # six pages, two patches each, batches of four
        rows = evaluate(tmp_path / "t", tmp_path, tmp_path / "e")
        assert [row["case"] for row in rows] == [f"mine_page_{k:02d}" for k in range(6)]

    def test_inverted_labels_by_the_datalist_or_by_a_knob(
        self, em_phantom: Path, trained: Path, tmp_path: Path
    ) -> None:
        """Membrane 255 and cell 0, as `prepare --invert-labels` notes: scored as the challenge's are."""
        entries = json.loads((em_phantom / "datalist.json").read_text())["training"][:1]
        shutil.copy(em_phantom / "train-volume.tif", tmp_path / "train-volume.tif")
        tifffile.imwrite(tmp_path / "train-labels.tif", 255 - tifffile.imread(em_phantom / "train-labels.tif"))
        right = float(evaluate(trained, em_phantom, tmp_path / "right", section="training")[0]["pixel_accuracy"])
        for name, extra, settings in (
            ("told", {"label_values": [255, 0]}, {}),
            ("knob", {}, {"label_values": [255, 0]}),
            ("wrong", {}, {}),
        ):
            (tmp_path / "datalist.json").write_text(json.dumps({"validation": [{**entries[0], **extra}]}))
            row = evaluate(trained, tmp_path, tmp_path / name, **settings)[0]
            expected = 1 - right if name == "wrong" else right
            assert float(row["pixel_accuracy"]) == pytest.approx(expected, abs=1e-5)

    def test_a_second_run_keeps_the_state_of_the_first(self, em_phantom: Path, tmp_path: Path) -> None:
        train(em_phantom, tmp_path, max_epochs=1)
        first = (tmp_path / "training.ckpt").read_bytes()
        weights = (tmp_path / "models" / "model.pt").read_bytes()
        train(em_phantom, tmp_path, max_epochs=1, initial_weights=str(tmp_path / "models" / "model.pt"))
        assert (tmp_path / "training_previous.ckpt").read_bytes() == first
        assert (tmp_path / "models" / "model_previous.pt").read_bytes() == weights


def test_metadata_and_model_card_give_the_same_figures() -> None:
    found = config("metadata.json")["eval_metrics"]
    card = (BUNDLE / "docs" / "README.md").read_text()
    assert list(found) == ["pixel_accuracy", "v_rand_cells"]
    shipped = next(line for line in card.splitlines() if line.startswith("| as shipped"))
    assert f"**{found['pixel_accuracy']:.4f}**" in shipped


@pytest.mark.samples
def test_shipped_weights_segment_real_sections(samples: Path, tmp_path: Path) -> None:
    prepare(get_data_set("isbi2012"), samples / "isbi2012", tmp_path / "data", validation_fraction=1.0)
    bundle_run("evaluating", EVALUATE, dataset_dir=tmp_path / "data", output_dir=tmp_path / "e")
    rows = table(tmp_path / "e" / "metrics.csv")
    assert [row["case"] for row in rows] == ["section_00", "section_01"]
    assert min(float(row["pixel_accuracy"]) for row in rows) >= 0.92
    assert min(float(row["v_rand_cells"]) for row in rows) >= 0.97


@pytest.mark.samples
def test_real_sections_are_learnt_from_and_come_out_on_their_grid(samples: Path, trained: Path, tmp_path: Path) -> None:
    source = samples / "isbi2012"
    prepare(get_data_set("isbi2012"), source, tmp_path / "data", validation_fraction=0.0)
    train(tmp_path / "data", tmp_path / "t", max_epochs=1, patch_size=[64, 64])
    assert (tmp_path / "t" / "models" / "model.pt").is_file()
    infer(trained, source, tmp_path / "out", patch_size=[128, 128])
    shape = tifffile.imread(source / "train-volume.tif").shape
    assert tifffile.imread(tmp_path / "out" / "train-volume_seg.tif").shape == shape
    assert tifffile.imread(tmp_path / "out" / "train-volume_cells.tif").shape == shape
