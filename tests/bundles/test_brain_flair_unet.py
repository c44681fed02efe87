from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import tifffile
import torch
from bundle_runs import SCHEMA, BundleRuns, root_cause, table
from dicom_series import write_series
from monai.bundle import ConfigParser, ConfigWorkflow, load, verify_metadata, verify_net_in_out
from PIL import Image

from segbundles.datasets import get_data_set, prepare
from segbundles.datasets.brain import make_patient

TINY = {
    "base_channels": 2,
    "depth": 3,
    "patch_size": [32, 32],
    "crop_size": [32, 32],
    "mirror_axes": [],
    "amp": False,
    "device": "cpu",
}
# a network this small learns its phantoms only if they are left as they are
UNCHANGED = {
    "rotate_degrees": 0.0,
    "scale_fraction": 0.0,
    "contrast_fraction": 0.0,
    "noise_sd": 0.0,
    "missing_probability": 0.0,
}
TINY_TRAINING = {**TINY, **UNCHANGED, "max_epochs": 2, "lr_epochs": 30, "batch_size": 4, "learning_rate": 0.03}
RUNS = BundleRuns("brain_flair_unet", TINY, TINY_TRAINING)
BUNDLE, CONFIGS, EVALUATE = RUNS.root, RUNS.configs, RUNS.evaluate_files
config, bundle_run, train, evaluate, infer = RUNS.config, RUNS.run, RUNS.train, RUNS.evaluate, RUNS.infer
ONE_CHANNEL = "one channel: taken as FLAIR and used for all 3"


@pytest.fixture(scope="module")
def trained(brain_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with models/ and training output of a tiny network that has learnt something."""
    out = tmp_path_factory.mktemp("trained")
    train(brain_phantom, out, slices_per_epoch=120)
    return out


@pytest.fixture(scope="module")
def patient() -> tuple[np.ndarray, np.ndarray]:
    """Image (3, W, H, D) and label (W, H, D) of a patient that no section holds."""
    image, label = make_patient(np.random.default_rng(7), (32, 40), 6)
    return image, label[0]


def write_slices(folder: Path, image: np.ndarray, label: np.ndarray | None = None, name: str = "p") -> list[dict]:
    """TIFF slices as kaggle_3m has them, and their entries of a datalist, without folder."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for k in range(image.shape[-1]):
        pixels = np.ascontiguousarray(image[..., k].T)
        colour = pixels.ndim == 3 and pixels.shape[-1] > 2
        tifffile.imwrite(folder / f"{name}_{k + 1}.tif", pixels, photometric="rgb" if colour else "minisblack")
        entry = {"image": f"{name}_{k + 1}.tif", "group": name, "slice": k + 1}
        if label is not None:
            tifffile.imwrite(folder / f"{name}_{k + 1}_mask.tif", np.ascontiguousarray(label[..., k].T))
            entry["label"] = f"{name}_{k + 1}_mask.tif"
        entries.append(entry)
    return entries


def read_slices(folder: Path, count: int, name: str = "p") -> np.ndarray:
    """Segmentation (W, H, D) from PNG slices."""
    return np.stack([np.asarray(Image.open(folder / f"{name}_{k + 1}_seg.png")).T for k in range(count)], -1)


def axial(image: np.ndarray, spacing: Sequence[float] = (0.9, 0.9, 5.0)) -> nib.Nifti1Image:
    """A NIfTI volume (W, H, D[, channels]) with the axes of a stack of slices: to the left, to the back, up."""
    array = np.moveaxis(image, 0, -1) if image.ndim == 4 else image
    return nib.Nifti1Image(array.astype(np.int16), np.diag([-spacing[0], -spacing[1], spacing[2], 1.0]))


class TestEndToEnd:
    def test_training_writes_half_precision_weights_and_keeps_its_state_elsewhere(self, trained: Path) -> None:
        assert [p.name for p in (trained / "models").iterdir()] == ["model.pt"]
        state = torch.load(trained / "models" / "model.pt", weights_only=True)
        assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float16}
        assert {"training.ckpt", "tensorboard"} <= {p.name for p in trained.iterdir()}

    def test_tensorboard_holds_loss_metric_and_picture(self, trained: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        tags: dict[str, set[str]] = {"scalars": set(), "images": set()}
        for file in (trained / "tensorboard").rglob("events*"):
            events = EventAccumulator(str(file)).Reload()
            for kind in tags:
                tags[kind] |= set(events.Tags()[kind])
        assert any("train_loss" in tag for tag in tags["scalars"])
        assert any("val_mean_dice" in tag for tag in tags["scalars"])
        assert any(tag.startswith("validation/case_0") for tag in tags["images"])

    def test_evaluation_scores_patients_and_slices(self, trained: Path, brain_phantom: Path, tmp_path: Path) -> None:
        rows = evaluate(trained, brain_phantom, tmp_path, section="training")
        entries = json.loads((brain_phantom / "datalist.json").read_text())["training"]
        patients = list(dict.fromkeys(entry["group"] for entry in entries))
        assert [row["case"] for row in rows] == patients
        for row in rows:
            areas = [entry["lesion_area"] for entry in entries if entry["group"] == row["case"]]
            assert int(row["lesion_slices"]) == sum(area > 0 for area in areas)
            assert int(row["lesion_free_slices"]) == areas.count(0)
        slices = table(tmp_path / "slices.csv")
        assert [(s["case"], s["slice"]) for s in slices] == [(e["group"], Path(e["image"]).name) for e in entries]
        assert [int(s["truth_pixels"]) for s in slices] == [e["lesion_area"] for e in entries]
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["cases"] == 3
        assert summary["slice_dice_all"]["n"] == sum(e["lesion_area"] > 0 for e in entries)
        free = [s for s in slices if s["truth_pixels"] == "0"]
        assert summary["lesion_free_slices"] == len(free)
        assert summary["false_positive_slices"] == sum(s["predicted_pixels"] != "0" for s in free)
        page = (tmp_path / "report.html").read_text()
        assert all(patient in page for patient in patients)

    def test_a_patient_without_lesion_has_no_dice_or_none_of_it(
        self, trained: Path, brain_phantom: Path, tmp_path: Path
    ) -> None:
        """No Dice where nothing is predicted; 0, and counted, where something is."""
        for threshold, status, dice in ((0.999999, "empty", ""), (1e-6, "false positive", "0")):
            settings = {"section": "training", "validate::postprocessing::transforms::0::threshold": threshold}
            rows = {r["case"]: r for r in evaluate(trained, brain_phantom, tmp_path / status, **settings)}
            assert (rows["phantom0_001"]["status"], rows["phantom0_001"]["dice"]) == (status, dice)
            summary = json.loads((tmp_path / status / "summary.json").read_text())
            assert summary["dice"]["n"] == (2 if status == "empty" else 3)

    def test_the_largest_component_alone_is_scored_unless_told_otherwise(
        self, trained: Path, brain_phantom: Path, tmp_path: Path
    ) -> None:
        settings = {"section": "training", "validate::postprocessing::transforms::0::threshold": 0.2}
        predicted = {}
        for keep in (True, False):
            evaluate(trained, brain_phantom, tmp_path / str(keep), largest_component=keep, **settings)
            slices = table(tmp_path / str(keep) / "slices.csv")
            predicted[keep] = sum(int(s["predicted_pixels"]) for s in slices)
        assert 0 < predicted[True] < predicted[False]

    def test_flair_alone_scores_as_if_the_others_were_missing(
        self, trained: Path, patient: tuple, tmp_path: Path
    ) -> None:
        image, label = patient
        filled = np.repeat(image[1:2], 3, 0)
        settings = {"largest_component": False, "validate::postprocessing::transforms::0::threshold": 0.1}
        for name, pixels in (("whole", image), ("filled", filled)):
            entries = write_slices(tmp_path / name, pixels, label * 255)
            (tmp_path / name / "datalist.json").write_text(json.dumps({"validation": entries}))
            for alone in (True, False):
                evaluate(trained, tmp_path / name, tmp_path / f"{name}{alone}", flair_alone=alone, **settings)
        predicted = {
            path.name: [s["predicted_pixels"] for s in table(path / "slices.csv")]
            for path in tmp_path.glob("*e")
            if (path / "slices.csv").is_file()
        }
        assert predicted["wholeTrue"] == predicted["filledTrue"] == predicted["filledFalse"] != predicted["wholeFalse"]

    def test_inference_mirrors_folders_with_a_mask_a_slice(
        self, trained: Path, brain_phantom: Path, tmp_path: Path
    ) -> None:
        images = sorted(p for p in brain_phantom.rglob("*.tif") if not p.stem.endswith("_mask"))
        infer(trained, brain_phantom, tmp_path, **{"postprocessing::transforms::0::threshold": 0.1})
        due = {p.relative_to(brain_phantom).with_name(f"{p.stem}_seg.png") for p in images}
        assert {p.relative_to(tmp_path) for p in tmp_path.rglob("*.png")} == due
        values = set()
        for path in due:
            with Image.open(tmp_path / path) as mask:
                assert (mask.size, mask.mode) == ((32, 32), "L")
                values |= set(np.unique(np.asarray(mask)).tolist())
        assert values == {0, 255}
        rows = table(tmp_path / "inference.csv")
        assert {(row["file"], row["status"], row["notes"]) for row in rows} == {
            (p.relative_to(brain_phantom).as_posix(), "ok", "") for p in images
        }

    @pytest.mark.parametrize(
        ("normalization", "mirror_axes"), [("volume", []), ("slice", []), ("volume", [0, 1])], ids=str
    )
    def test_what_is_written_is_what_the_network_says(
        self, normalization: str, mirror_axes: list[int], trained: Path, brain_phantom: Path, tmp_path: Path
    ) -> None:
        """Put through by hand, rows first, without MONAI's transforms, readers and writers."""
        from monai.networks.nets import DynUNet

        folder = brain_phantom / "kaggle_3m" / "phantom0_003"
        count = len(list(folder.glob("*_mask.tif")))
        stack = np.stack([tifffile.imread(folder / f"phantom0_003_{k + 1}.tif") for k in range(count)]).astype(float)
        if normalization == "volume":
            low, high = np.percentile(stack, (10, 99), axis=(0, 1, 2))
            stack = np.clip((stack - low) / (high - low), 0, 1)
            stack = (stack - stack.mean((0, 1, 2))) / stack.std((0, 1, 2))
        else:
            low, high = (f(stack, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
            stack = (stack - low) / (high - low)
        network = DynUNet(2, 3, 1, [3, 3, 3], [1, 2, 2], [2, 2], filters=[2, 4, 8], norm_name="batch").eval()
        network.load_state_dict(torch.load(trained / "models" / "model.pt", weights_only=True))
        batch = torch.as_tensor(stack, dtype=torch.float32).permute(0, 3, 2, 1)  # (slices, channels, W, H)
        with torch.no_grad():
            views = [[], [2], [3], [2, 3]] if mirror_axes else [[]]
            mean = sum(network(batch.flip(axes)).flip(axes) for axes in views) / len(views)
        logits = mean[:, 0].permute(1, 2, 0).numpy()
        threshold = float(1 / (1 + np.exp(-np.median(logits))))  # half of the pixels, whatever was learnt
        settings = {"largest_component": False, "postprocessing::transforms::0::threshold": threshold}
        settings["mirror_axes"] = mirror_axes
        infer(trained, folder, tmp_path, normalization=normalization, **settings)
        written = read_slices(tmp_path, count, "phantom0_003") > 0
        assert 0.4 < written.mean() < 0.6
        assert (written != (logits > np.median(logits))).mean() < 1e-3

    @pytest.mark.slow
    def test_from_another_folder_by_the_command_line(self, trained: Path, brain_phantom: Path, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "monai.bundle", "run", "inferring", "--bundle_root", str(BUNDLE)]
        command += ["--config_file", str(CONFIGS / "inference.json"), "--dataset_dir", str(brain_phantom)]
        command += ["--output_dir", "out", "--ckpt_dir", str(trained / "models"), "--largest_component", "false"]
        command += ["--base_channels", "2", "--depth", "3", "--patch_size", "[32,32]", "--amp", "false"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(list((tmp_path / "out").rglob("*_seg.png"))) == len(list(brain_phantom.rglob("*_mask.tif")))
        misspelt = subprocess.run([*command, "--normalisation", "slice"], cwd=tmp_path, capture_output=True, text=True)
        assert misspelt.returncode != 0
        assert "did you mean 'normalization'?" in misspelt.stdout


class TestDraws:
    @staticmethod
    def lesion_share(dataset_dir: Path, epochs: int, **settings: object) -> tuple[float, int]:
        """Share of slices with lesion in what the trainer's loader gives, and slices an epoch."""
        parser = ConfigParser()
        parser.read_config(str(CONFIGS / "train.json"))
        parser.update({**TINY_TRAINING, "dataset_dir": str(dataset_dir), **settings})
        loader = parser.get_parsed_content("train::dataloader")
        torch.manual_seed(0)
        labels = torch.cat([batch["label"] for _ in range(epochs) for batch in loader])
        return float((labels > 0).any(-1).any(-1).float().mean()), len(labels) // epochs

    def test_slices_with_lesion_are_drawn_by_their_area_and_others_are_kept(self, brain_phantom: Path) -> None:
        entries = json.loads((brain_phantom / "datalist.json").read_text())["training"]
        plain = np.mean([entry["lesion_area"] > 0 for entry in entries])
        share, slices = self.lesion_share(brain_phantom, 15, lesion_floor=0.1)
        assert slices == len(entries)
        assert plain < 0.4
        # (s + 0.1 mean) / (1.1 sum s), summed over the slices with lesion
        assert share == pytest.approx((1 + 0.1 * plain) / 1.1, abs=0.05)
        assert share < 1

    def test_draws_are_settings(self, brain_phantom: Path) -> None:
        entries = json.loads((brain_phantom / "datalist.json").read_text())["training"]
        plain = np.mean([entry["lesion_area"] > 0 for entry in entries])
        assert self.lesion_share(brain_phantom, 2, weighted_slices=False) == (pytest.approx(plain), len(entries))
        assert self.lesion_share(brain_phantom, 2, lesion_floor=0.0, slices_per_epoch=7) == (1.0, 7)


class TestMemory:
    def test_the_cache_is_in_half_precision_and_what_is_drawn_is_not(self, brain_phantom: Path) -> None:
        parser = ConfigParser()
        parser.read_config(str(CONFIGS / "train.json"))
        parser.update({**TINY_TRAINING, "dataset_dir": str(brain_phantom)})
        parser.update({"flip_probability": 0.0})
        cached, drawn, scored = (
            parser.get_parsed_content(f"{k}")[0] for k in ("train::dataset", "train::slices", "validate::dataset")
        )
        assert (cached["image"].dtype, cached["label"].dtype) == (torch.float16, torch.uint8)
        assert {drawn[key].dtype for key in ("image", "label")} == {torch.float32}
        torch.testing.assert_close(drawn["image"], cached["image"][..., 0].float(), rtol=0, atol=1e-4)
        assert scored["image"].dtype == torch.float32
        assert scored["image"].mean((1, 2, 3)).abs().max() < 1e-5
        assert (scored["image"].std((1, 2, 3)) - 1).abs().max() < 1e-3


class TestResume:
    @pytest.mark.parametrize("args", [None, "args_reference_r.json"])
    def test_stopped_and_resumed_gives_the_same_weights_bit_for_bit(
        self, args: str | None, brain_phantom: Path, tmp_path: Path
    ) -> None:
        """Also under the one-cycle schedule, which is stepped every iteration, with dropout."""
        common = {"max_epochs": 3, "lr_epochs": 3, "early_stop_patience": 9, "dropout": 0.1}
        if args is not None:
            common["args_file"] = str(CONFIGS / args)

        def state(name: str, **settings: object) -> dict:
            train(brain_phantom, tmp_path / name, **{**common, **settings})
            return torch.load(tmp_path / name / "training.ckpt", weights_only=True)

        whole = state("whole")
        state("parts", max_epochs=1)
        parts = state("parts", resume=True)
        assert parts["trainer"]["epoch"] == whole["trainer"]["epoch"] == 3
        for name, value in whole["network"].items():
            assert torch.equal(value, parts["network"][name]), name
        for name in ("evaluator", "lr_scheduler"):
            assert parts[name] == whole[name]
        assert parts["trainer"]["resumable"] == whole["trainer"]["resumable"]
        if args is not None:
            steps = parts["trainer"]["iteration"]
            assert parts["lr_scheduler"]["total_steps"] == parts["lr_scheduler"]["last_epoch"] == steps


class TestContract:
    @pytest.mark.parametrize(("files", "kind"), [("train.json", "train"), ("inference.json", "infer")])
    def test_check_properties_lacks_nothing(self, files: str, kind: str, brain_phantom: Path) -> None:
        workflow = ConfigWorkflow(
            config_file=str(CONFIGS / files),
            workflow_type=kind,
            logging_file=False,
            bundle_root=str(BUNDLE),
            dataset_dir=str(brain_phantom),
            output_dir=str(brain_phantom / "unused"),
            device="cpu",
        )
        workflow.initialize()
        assert workflow.check_properties() == []

    def test_load_returns_the_network_with_its_weights(self, trained: Path, tmp_path: Path) -> None:
        shutil.copytree(BUNDLE, tmp_path / "brain_flair_unet")
        shutil.copytree(trained / "models", tmp_path / "brain_flair_unet" / "models", dirs_exist_ok=True)
        network = load(
            name="brain_flair_unet",
            bundle_dir=str(tmp_path),
            source="monaihosting",
            net_override={
                "filters": [2, 4, 8],
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
            ({}, [16, 32, 64, 128, 256, 512], 7_778_113),
            ({"base_channels": 32, "depth": 5}, [32, 64, 128, 256, 512], 7_762_561),
            ({"base_channels": 64, "depth": 5}, [64, 128, 256, 512, 1024], 31_036_673),
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
        x = torch.rand(1, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(torch.jit.script(network)(x), network(x))

    def test_files_say_the_same_where_they_must(self) -> None:
        train, infer, evaluate = map(config, ("train.json", "inference.json", "evaluate.json"))
        assert train["network_def"] == infer["network_def"]
        assert evaluate["validate::inferer::inferer"] == infer["inferer"]["inferer"]
        assert train["validate"]["inferer"]["enabled"] == infer["inferer"]["enabled"]
        for knob in set(train) & set(infer) - {"_desc_", "output_dir", "batch_size"}:
            if not isinstance(train[knob], dict) and not knob.startswith(("_section", "run", "initialize")):
                assert train[knob] == infer[knob], knob
        assert evaluate["largest_component"] == infer["largest_component"]
        scored, written = (c["transforms"] for c in (evaluate["validate::postprocessing"], infer["postprocessing"]))
        assert scored == written[:2]
        for_labels = ("segbundles.transforms.SetSpacingd", "segbundles.transforms.LabelToClassd")
        learnt = [t for t in train["train"]["deterministic_transforms"] if t["_target_"] not in for_labels]
        assert [{**t, "keys": "image"} for t in learnt] == infer["preprocessing"]["transforms"]
        data_format = config("metadata.json")["network_data_format"]
        assert data_format["inputs"]["image"]["spatial_shape"] == train["patch_size"]
        assert data_format["inputs"]["image"]["num_channels"] == train["network_def"]["in_channels"]

    def test_run_is_what_the_named_id_runs(self) -> None:
        for name, run_id in (("train", "training"), ("evaluate", "evaluating"), ("inference", "inferring")):
            assert config(f"{name}.json")[run_id] == "@run"

    def test_loss_is_the_weighted_sum_of_dice_and_cross_entropy(self) -> None:
        parser = ConfigParser()
        parser.read_config(str(CONFIGS / "train.json"))
        logits = torch.tensor([2.0, -1.0, 0.0, 0.0]).reshape(2, 1, 1, 2)
        truth = torch.tensor([1.0, 0.0, 0.0, 0.0]).reshape(2, 1, 1, 2)
        p = 1 / (1 + np.exp([-2.0, 1.0, 0.0, 0.0]))
        dice = 1 - (2 * p[0] + 1) / (p.sum() + 1 + 1)  # over the whole batch, smoothed by 1
        bce = -np.mean(np.log([p[0], 1 - p[1], 1 - p[2], 1 - p[3]]))
        assert parser.get_parsed_content("loss")(logits, truth).item() == pytest.approx(0.3 * dice + 0.7 * bce)

    def test_settings_of_the_r_version(self) -> None:
        """SGD with momentum, one cycle to 0.1 over 20 epochs of batches of 4, by the args file alone."""
        parser = ConfigParser()
        parser.read_config(str(CONFIGS / "train.json"))
        args = config("args_reference_r.json")
        parser.update({k: v for k, v in args.items() if k != "_desc_"} | {"train::dataloader": [None] * 5})
        network, optimizer = (parser.get_parsed_content(key) for key in ("network_def", "optimizer"))
        assert network.filters == [64, 128, 256, 512, 1024]
        assert {m.p for m in network.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd)} == {0.6}
        schedule = parser.get_parsed_content("lr_scheduler")
        assert (type(optimizer).__name__, type(schedule).__name__) == ("SGD", "OneCycleLR")
        rates = []
        for _ in range(20 * 5):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if len(rates) < 100:
                schedule.step()
        assert max(rates) == pytest.approx(0.1)
        assert rates[0] == pytest.approx(0.1 / 25)
        assert rates[-1] < 1e-4
        assert (args["batch_size"], args["max_epochs"], args["normalization"]) == (4, 20, "slice")

    def test_settings_of_the_paper(self) -> None:
        """Adam at 1e-4 for 100 epochs of batches of 16, width 32 with batch norm, by the args file alone."""
        parser = ConfigParser()
        parser.read_config(str(CONFIGS / "train.json"))
        args = config("args_reference_paper.json")
        parser.update({k: v for k, v in args.items() if k != "_desc_"})
        network, optimizer = (parser.get_parsed_content(key) for key in ("network_def", "optimizer"))
        assert network.filters == [32, 64, 128, 256, 512]
        assert type(optimizer).__name__ == "Adam"
        schedule = parser.get_parsed_content("lr_scheduler")
        for _ in range(3):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
            optimizer.step()
            schedule.step()
        assert (args["batch_size"], args["max_epochs"], args["normalization"]) == (16, 100, "volume")

    @pytest.mark.parametrize("args", ["args_reference_r.json", "args_reference_paper.json"])
    def test_reference_weights_are_trained_evaluated_and_applied_with_its_settings(
        self, args: str, brain_phantom: Path, tmp_path: Path
    ) -> None:
        """By the args file, made small."""
        small = {"args_file": str(CONFIGS / args), **TINY}
        common = {"dataset_dir": brain_phantom, "ckpt_dir": tmp_path / "models"}
        bundle_run("training", "train.json", output_dir=tmp_path, **common, **small, max_epochs=1)
        bundle_run("evaluating", EVALUATE, output_dir=tmp_path / "e", **common, **small)
        bundle_run("inferring", "inference.json", output_dir=tmp_path / "i", **common, **small)
        assert (tmp_path / "e" / "report.html").is_file()
        assert len(list((tmp_path / "i").rglob("*_seg.png"))) == len(list(brain_phantom.rglob("*_mask.tif")))


def write_case(folder: Path, fault: str, patient: tuple[np.ndarray, np.ndarray]) -> None:
    image, label = (array.copy() for array in patient)
    if fault == "black":
        image[:] = 0
    elif fault == "label values":
        label[0, 0, 0] = 7
    elif fault == "RGBA":
        image = np.concatenate([image, np.full_like(image[:1], 255)])
    elif fault == "NaN":
        image = image.astype(np.float32)
        image[0, 0, 0, 0] = np.nan
    entries = write_slices(folder, image, label)
    first = folder / "p_1.tif"
    if fault == "mask without image":
        del entries[2]["image"]
    elif fault == "no label":
        del entries[2]["label"]
    elif fault == "file missing":
        (folder / "p_1_mask.tif").unlink()
    elif fault == "mask size":
        for path in folder.glob("*_mask.tif"):
            tifffile.imwrite(path, np.zeros((40, 31), np.uint8))
    elif fault == "slice size":
        tifffile.imwrite(first, np.zeros((30, 32, 3), np.uint8), photometric="rgb")
    elif fault == "colour mask":
        for path in folder.glob("*_mask.tif"):
            tifffile.imwrite(path, np.zeros((40, 32, 3), np.uint8), photometric="rgb")
    elif fault == "same number":
        entries[1]["slice"] = 1
    elif fault == "truncated":
        first.write_bytes(first.read_bytes()[:300])
    if fault != "no datalist":
        (folder / "datalist.json").write_text(json.dumps({"training": entries, "validation": []}))


class TestBadInput:
    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("no datalist", "there is no datalist.json in"),
            ("mask without image", "entry 2 (?) has no image"),
            ("no label", "entry 2 (p_3.tif) has no label"),
            ("file missing", "label p_1_mask.tif does not exist"),
            ("mask size", "has size (31, 40, 6), its image"),
            ("slice size", "slices of one stack must be equal"),
            ("label values", "holds the label values 7: allowed are 0, 255"),
            ("colour mask", "has 3 channels, a label has one"),
            ("RGBA", "has 4 channels, 3 are due: if it is RGBA, drop the alpha channel: save it as RGB"),
            ("same number", "are both slice 1 of p"),
            ("NaN", "holds NaN or infinite values"),
            ("black", "is constant (every value is 0)"),
            ("truncated", "it is truncated or damaged"),
        ],
    )
    def test_training_refuses_it_before_the_first_step(
        self, fault: str, message: str, patient: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_case(tmp_path, fault, patient)
        with pytest.raises(RuntimeError) as caught:
            train(tmp_path, tmp_path / "out")
        cause = root_cause(caught.value)
        assert isinstance(cause, ValueError)
        assert message in str(cause)
        errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR" and message in r.getMessage()]
        assert len(errors) == 1
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"normalization": "minmax"}, "normalization must be volume or slice, got 'minmax'"),
            ({"patch_size": [32, 30]}, "patch_size [32, 30] must be multiples of 2 ** (depth - 1)"),
            ({"crop_size": [32, 30]}, "crop_size [32, 30] must be multiples of 2 ** (depth - 1)"),
            ({"crop_size": [64, 32]}, "crop_size [64, 32] is larger than patch_size"),
            ({"max_epochs": 3, "lr_epochs": 2}, "the learning rate comes down to 0 after 2 epochs, max_epochs is 3"),
            (
                {"args_file": str(CONFIGS / "args_reference_r.json"), "max_epochs": 3, "lr_epochs": 2},
                "the one-cycle schedule ends after 10 steps, this run takes 15",
            ),
            ({"weighted_slices": False, "slices_per_epoch": 5}, "every slice is drawn once an epoch: set it to null"),
            ({"lesion_floor": -0.1}, "floor must be finite and not negative"),
        ],
    )
    def test_settings_that_cannot_be(
        self, settings: dict, message: str, brain_phantom: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(RuntimeError) as caught:
            train(brain_phantom, tmp_path, **settings)
        assert message in str(root_cause(caught.value))
        assert len([r for r in caplog.records if r.name == "segbundles" and message in r.getMessage()]) == 1

    @pytest.mark.parametrize("settings", [{"normalization": "minmax"}, {"patch_size": [32, 30]}])
    def test_inference_checks_its_settings_too(self, settings: dict, trained: Path, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError) as caught:
            infer(trained, tmp_path, tmp_path / "out", **settings)
        assert next(iter(settings)) in str(root_cause(caught.value))

    @pytest.mark.parametrize("setting", ["output_dir", "ckpt_dir"])
    def test_a_folder_that_cannot_be_written_is_refused_before_training(
        self, setting: str, brain_phantom: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(RuntimeError) as caught:
            train(brain_phantom, tmp_path / "out", **{setting: tmp_path / "file" / "x"})
        assert str(root_cause(caught.value)).startswith(f"{setting} '{tmp_path / 'file' / 'x'}' cannot be written to")

    def test_missing_weights(self, brain_phantom: Path, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError) as caught:
            infer(tmp_path, brain_phantom, tmp_path / "out")
        assert "there are no weights at" in str(root_cause(caught.value))

    def test_weights_of_another_architecture(self, trained: Path, brain_phantom: Path, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError) as caught:
            evaluate(trained, brain_phantom, tmp_path / "out", base_channels=4)
        assert "is of another architecture than the DynUNet configured" in str(root_cause(caught.value))
        assert "has shape" in str(root_cause(caught.value))

    def test_an_empty_folder_is_an_error(self, trained: Path, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError) as caught:
            infer(trained, tmp_path, tmp_path / "out")
        assert "no image under" in str(root_cause(caught.value))

    def test_bad_slices_and_volumes_do_not_stop_the_others(self, trained: Path, patient: tuple, tmp_path: Path) -> None:
        image, label = patient
        data = tmp_path / "data with spaces"
        write_slices(data / "patient é", image, label)
        (data / "patient é" / "p_2.tif").write_bytes(b"II*\0 no TIFF")
        rgba = np.concatenate([image, np.full_like(image[:1], 255)])
        write_slices(data / "rgba", rgba[..., 4:5], name="p")
        (data / "rgba" / "p_1.tif").rename(data / "patient é" / "p_5.tif")
        black = np.zeros((3, 32, 40, 1), np.uint8)
        write_slices(data / "black", black, name="alone")
        nib.save(axial(image[:2]), data / "two.nii.gz")
        with pytest.raises(RuntimeError) as caught:
            infer(trained, data, tmp_path / "out")
        assert str(root_cause(caught.value)).startswith("4 of 8 images failed: black/alone_1.tif, ")
        rows = {row["file"]: row for row in table(tmp_path / "out" / "inference.csv")}
        for file, reason in (
            ("patient é/p_2.tif", "truncated or damaged"),
            ("black/alone_1.tif", "is constant (every value is 0)"),
            ("patient é/p_5.tif", "if it is RGBA, drop the alpha channel"),
            ("two.nii.gz", "has 2 channels, 3 are due"),
        ):
            assert rows[file]["status"] == "failed"
            assert reason in rows[file]["notes"]
        written = sorted(p.name for p in (tmp_path / "out" / "patient é").iterdir())
        assert written == [f"p_{k}_seg.png" for k in (1, 3, 4, 6)]
        assert rows["patient é/p_1.tif"]["notes"] == "2 of 6 slices left out"

    @pytest.mark.parametrize("batch_size", [1, 8])
    def test_an_image_that_fails_in_the_middle_does_not_stop_the_others(
        self, batch_size: int, trained: Path, patient: tuple, tmp_path: Path
    ) -> None:
        data, out = tmp_path / "data", tmp_path / "out"
        for name in ("a", "b"):
            write_slices(data, patient[0][..., :2], name=name)
        (out / "a_1_seg.png").mkdir(parents=True)  # in the way of the first output
        with pytest.raises(RuntimeError, match="Failed to evaluate") as caught:
            infer(trained, data, out, batch_size=batch_size)
        assert str(root_cause(caught.value)).startswith("2 of 4 images failed: a_1.tif, a_2.tif.")
        rows = {row["file"]: row for row in table(out / "inference.csv")}
        assert (rows["a_1.tif"]["status"], rows["b_1.tif"]["status"]) == ("failed", "ok")
        assert "cannot write" in rows["a_1.tif"]["notes"]
        for k in (1, 2):
            assert (out / f"b_{k}_seg.png").is_file()


class TestUnusualInput:
    # enough pixels that a mask turned or mirrored cannot look the same
    MUCH = {"largest_component": False, "postprocessing::transforms::0::threshold": 0.1}  # noqa: RUF012

    @pytest.fixture(scope="class")
    def stacked(self, trained: Path, patient: tuple, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
        """Segmentation (W, H, D) of the patient's slices, in a folder with a space in its name."""
        data = tmp_path_factory.mktemp("data")
        write_slices(data / "my patient", patient[0])
        infer(trained, data, data / "out", **self.MUCH)
        mask = read_slices(data / "out" / "my patient", 6) // 255
        assert 0.02 < mask.mean() < 0.9
        assert not np.array_equal(mask, mask[::-1])
        return mask

    @pytest.mark.parametrize("axes", ["LPS", "RAS", "PSR", "ILA"])
    @pytest.mark.parametrize("oblique", [False, True], ids=["straight", "oblique"])
    def test_a_volume_stored_any_way_gives_what_its_slices_give(
        self, axes: str, oblique: bool, trained: Path, patient: tuple, stacked: np.ndarray, tmp_path: Path
    ) -> None:
        """As three channels in NIfTI: axial, sagittal and coronal storage, on axes turned by up to 25 degrees."""
        volume = axial(patient[0])
        affine = volume.affine
        if oblique:
            from scipy.spatial.transform import Rotation

            affine = affine.copy()
            affine[:3, :3] = Rotation.from_euler("xyz", (25, -15, 10), degrees=True).as_matrix() @ affine[:3, :3]
            affine[:3, 3] = (-31, 12.5, 40)
            volume = nib.Nifti1Image(volume.get_fdata().astype(np.int16), affine)
        current = nib.orientations.io_orientation(affine)
        wanted = nib.orientations.axcodes2ornt(axes)
        stored = volume.as_reoriented(nib.orientations.ornt_transform(current, wanted))
        nib.save(stored, tmp_path / "v.nii.gz")
        infer(trained, tmp_path / "v.nii.gz", tmp_path / "out", **self.MUCH)
        mask = nib.load(tmp_path / "out" / "v_seg.nii.gz")
        assert mask.shape == stored.shape[:3]
        np.testing.assert_allclose(mask.affine, stored.affine, rtol=0, atol=1e-5)
        back = mask.as_reoriented(nib.orientations.ornt_transform(wanted, current))
        np.testing.assert_array_equal(np.asarray(back.dataobj), stacked)

    @pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".dicom"])
    def test_a_lone_flair_volume_fills_the_three_channels_with_a_warning(
        self, suffix: str, trained: Path, patient: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        flair = patient[0][1]
        write_slices(tmp_path / "three", np.stack([flair] * 3))
        if suffix == ".nrrd":
            image = sitk.GetImageFromArray(flair.T)
            image.SetSpacing((0.9, 0.9, 5.0))
            sitk.WriteImage(image, str(tmp_path / "flair.nrrd"))
        elif suffix == ".dicom":  # a folder, of slices to the left, to the back, up
            write_series(tmp_path / "flair.dicom", flair.astype(np.int16), axial(flair).affine)
        else:
            nib.save(axial(flair), tmp_path / f"flair{suffix}")
        infer(trained, tmp_path, tmp_path / "out", **self.MUCH)
        name = "flair.dicom_seg.nii.gz" if suffix == ".dicom" else f"flair_seg{suffix}"
        path = tmp_path / "out" / name
        if suffix == ".nrrd":
            written = sitk.ReadImage(str(path))
            assert written.GetSpacing() == (0.9, 0.9, 5.0)
            mask = sitk.GetArrayFromImage(written).T
        else:
            mask = np.asarray(nib.load(path).dataobj)
            np.testing.assert_allclose(nib.load(path).affine, axial(flair).affine, atol=1e-6)
        np.testing.assert_array_equal(mask, read_slices(tmp_path / "out" / "three", 6) // 255)
        rows = {row["file"]: row for row in table(tmp_path / "out" / "inference.csv")}
        assert rows[f"flair{suffix}"]["notes"] == ONE_CHANNEL
        assert rows["three/p_1.tif"]["notes"] == ""
        assert [m for m in caplog.messages if m.endswith(f"flair{suffix} has {ONE_CHANNEL}.")]

    def test_one_slice_alone(self, trained: Path, patient: tuple, tmp_path: Path) -> None:
        write_slices(tmp_path / "my slices", patient[0][..., 3:4])
        infer(trained, tmp_path / "my slices" / "p_1.tif", tmp_path / "out")
        with Image.open(tmp_path / "out" / "p_1_seg.png") as mask:
            assert mask.size == (32, 40)
        assert [row["file"] for row in table(tmp_path / "out" / "inference.csv")] == ["p_1.tif"]

    def test_tiff_of_sixteen_bits_of_one_channel_and_of_pages(
        self, trained: Path, patient: tuple, stacked: np.ndarray, tmp_path: Path
    ) -> None:
        """Grey levels have no unit here, so 16 bits are as good as 8; one channel is taken for FLAIR."""
        image = patient[0]
        write_slices(tmp_path / "wide", image.astype(np.uint16) * 256)
        write_slices(tmp_path / "grey", image[1])
        tifffile.imwrite(tmp_path / "pages.tif", np.ascontiguousarray(image.transpose(3, 2, 1, 0)), photometric="rgb")
        infer(trained, tmp_path, tmp_path / "out", **self.MUCH)
        np.testing.assert_array_equal(read_slices(tmp_path / "out" / "wide", 6) // 255, stacked)
        assert tifffile.imread(tmp_path / "out" / "pages_seg.tif").shape == (6, 40, 32)
        np.testing.assert_array_equal(tifffile.imread(tmp_path / "out" / "pages_seg.tif").T // 255, stacked)
        notes = {row["file"]: row["notes"] for row in table(tmp_path / "out" / "inference.csv")}
        assert notes["grey/p_1.tif"] == ONE_CHANNEL
        assert notes["wide/p_1.tif"] == notes["pages.tif"] == ""

    def test_an_all_black_slice_of_a_patient_is_segmented_with_the_others(
        self, trained: Path, patient: tuple, tmp_path: Path
    ) -> None:
        image = patient[0].copy()
        image[..., 0] = 0
        write_slices(tmp_path / "p", image)
        for normalization in ("volume", "slice"):
            infer(trained, tmp_path / "p", tmp_path / normalization, normalization=normalization)
            assert len(list((tmp_path / normalization).glob("*_seg.png"))) == 6
            assert {row["status"] for row in table(tmp_path / normalization / "inference.csv")} == {"ok"}

    @pytest.mark.parametrize("size", [(20, 90), (47, 33)])
    def test_slices_of_any_size_are_segmented_and_learnt_from(self, size: tuple, trained: Path, tmp_path: Path) -> None:
        image = np.random.default_rng(0).integers(0, 255, (3, *size, 3), dtype=np.uint8)
        label = np.zeros((*size, 3), np.uint8)
        label[5:15, 5:15, 1] = 255
        data = tmp_path / "data"
        entries = write_slices(data, image, label)
        (data / "datalist.json").write_text(json.dumps({"training": entries, "validation": entries}))
        infer(trained, data, tmp_path / "out")
        assert read_slices(tmp_path / "out", 3).shape == (*size, 3)
        train(data, tmp_path, max_epochs=1)
        assert (tmp_path / "models" / "model.pt").is_file()

    def test_volumes_are_learnt_from_like_slices(self, patient: tuple, tmp_path: Path) -> None:
        """Three channels, a lone FLAIR channel, stored sagittally; and distances in mm, as headers tell spacing."""
        image, label = patient
        turn = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("LPS"), nib.orientations.axcodes2ornt("PSR")
        )
        for name, array in (("three", image), ("flair", image[1])):
            nib.save(axial(array).as_reoriented(turn), tmp_path / f"{name}.nii.gz")
        nib.save(axial(label // 255).as_reoriented(turn), tmp_path / "label.nii.gz")
        entries = [{"image": f"{name}.nii.gz", "label": "label.nii.gz", "case": name} for name in ("three", "flair")]
        (tmp_path / "datalist.json").write_text(json.dumps({"training": entries, "validation": entries}))
        train(tmp_path, tmp_path / "t")
        rows = evaluate(tmp_path / "t", tmp_path, tmp_path / "e")
        assert [row["case"] for row in rows] == ["three", "flair"]
        assert [row["notes"] for row in rows] == ["", ONE_CHANNEL]
        assert {row["spacing_mm"] for row in rows} == {"0.9 x 0.9 x 5"}
        assert {int(row["lesion_slices"]) for row in rows} == {int((label > 0).any((0, 1)).sum())}

    def test_the_spacing_of_slices_can_be_told(self, trained: Path, brain_phantom: Path, tmp_path: Path) -> None:
        settings = {"section": "training", "validate::postprocessing::transforms::0::threshold": 0.2}
        rows = evaluate(trained, brain_phantom, tmp_path, spacing_mm=[1, 1, 5], **settings)
        assert {row["spacing_mm"] for row in rows} == {"1 x 1 x 5"}
        assert "hd95" in rows[0] or "hd95_mm" in rows[0]

    def test_a_second_run_keeps_the_state_of_the_first(self, brain_phantom: Path, tmp_path: Path) -> None:
        train(brain_phantom, tmp_path)
        first = (tmp_path / "training.ckpt").read_bytes()
        weights = (tmp_path / "models" / "model.pt").read_bytes()
        train(brain_phantom, tmp_path, max_epochs=1, initial_weights=str(tmp_path / "models" / "model.pt"))
        assert (tmp_path / "training_previous.ckpt").read_bytes() == first
        assert (tmp_path / "models" / "model_previous.pt").read_bytes() == weights

    def test_three_classes_of_ones_own(self, patient: tuple, tmp_path: Path) -> None:
        image, label = patient
        classes = (label > 0).astype(np.uint8)
        classes[:4, :4, 2] = 2
        entries = write_slices(tmp_path, image, classes)
        (tmp_path / "datalist.json").write_text(json.dumps({"training": entries, "validation": entries}))
        train(tmp_path, tmp_path / "t", num_classes=3)
        row = evaluate(tmp_path / "t", tmp_path, tmp_path / "e", num_classes=3)[0]
        assert {"dice", "dice_1", "dice_2"} <= set(row)


def test_metadata_and_model_card_give_the_same_figures() -> None:
    found = config("metadata.json")["eval_metrics"]
    card = (BUNDLE / "docs" / "README.md").read_text()
    assert list(found) == ["mean_dice"]
    assert any(
        line.startswith("| as shipped") and f"**{found['mean_dice']:.3f}**" in line for line in card.splitlines()
    )


@pytest.mark.samples
def test_shipped_weights_segment_real_patients(samples: Path, tmp_path: Path) -> None:
    prepare(get_data_set("lgg"), samples / "kaggle_3m", tmp_path / "data", validation_fraction=1.0)
    bundle_run("evaluating", EVALUATE, dataset_dir=tmp_path / "data", output_dir=tmp_path / "e")
    rows = table(tmp_path / "e" / "metrics.csv")
    assert {row["case"] for row in rows} == {path.name for path in (samples / "kaggle_3m").iterdir()}
    assert min(float(row["dice"]) for row in rows) >= 0.7


@pytest.mark.samples
def test_real_slices_are_learnt_from_and_come_out_on_their_grid(samples: Path, trained: Path, tmp_path: Path) -> None:
    folder = min((samples / "kaggle_3m").iterdir())
    prepare(get_data_set("lgg"), samples / "kaggle_3m", tmp_path / "data", validation_fraction=0.0)
    settings = {"max_epochs": 1, "slices_per_epoch": 8, "patch_size": [256, 256], "batch_size": 4}
    train(tmp_path / "data", tmp_path / "t", **settings)
    assert (tmp_path / "t" / "models" / "model.pt").is_file()
    infer(trained, folder, tmp_path / "out")
    images = [p for p in folder.glob("*.tif") if not p.stem.endswith("_mask")]
    for path in images:
        with Image.open(tmp_path / "out" / f"{path.stem}_seg.png") as mask, Image.open(path) as image:
            assert mask.size == image.size
    assert len(list((tmp_path / "out").glob("*_seg.png"))) == len(images)
