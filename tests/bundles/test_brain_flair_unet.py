from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import tifffile
import torch
from bundle_runs import BundleRuns, refuses_to_start, table
from dicom_series import write_series
from monai.bundle import ConfigParser
from PIL import Image

from segbundles.datasets import get_data_set, prepare
from segbundles.errors import InputError
from segbundles.phantoms.brain import make_patient

# facts of the weights: not repeated for evaluation and inference
FACTS = {"base_channels": 2, "depth": 3}
TINY = {"window_size": [32, 32], "mirror_axes": [], "amp": False, "device": "cpu"}
# a network this small learns its phantoms only if they are left as they are
UNCHANGED = {
    "rotate_degrees": 0.0,
    "scale_fraction": 0.0,
    "contrast_fraction": 0.0,
    "noise_sd": 0.0,
    "missing_probability": 0.0,
}
TINY_TRAINING = {
    **FACTS,
    **TINY,
    **UNCHANGED,
    "patch_size": [32, 32],
    "max_epochs": 2,
    "lr_epochs": 30,
    "batch_size": 4,
    "learning_rate": 0.03,
}
RUNS = BundleRuns("brain_flair_unet", TINY, TINY_TRAINING)
CONFIGS, EVALUATE = RUNS.configs, RUNS.evaluate_files
config, parsed, bundle_run = RUNS.config, RUNS.parsed, RUNS.run
train, evaluate, infer = RUNS.train, RUNS.evaluate, RUNS.infer
ONE_CHANNEL = "one channel: taken as FLAIR and used for all 3"


@pytest.fixture(scope="module")
def trained(brain_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with models/ and the output of a training in which a tiny network has learnt something."""
    out = tmp_path_factory.mktemp("trained")
    train(brain_phantom, out, slices_per_epoch=120)
    return out


@pytest.fixture(scope="module")
def patient() -> tuple[np.ndarray, np.ndarray]:
    """Image (3, W, H, D) and label (W, H, D) of a patient that is in no split."""
    image, label = make_patient(np.random.default_rng(7), (32, 40), 6)
    return image, label[0]


def write_slices(folder: Path, image: np.ndarray, label: np.ndarray | None = None, name: str = "p") -> list[dict]:
    """Write TIFF slices like those of kaggle_3m, and return their datalist entries, relative to the folder."""
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


def assert_alike(mask: np.ndarray, expected: np.ndarray) -> None:
    """Check that two masks are equal, except for pixels that a rounding error can change."""
    assert mask.shape == expected.shape
    assert (mask != expected).mean() < 1e-3


def read_slices(folder: Path, count: int, name: str = "p") -> np.ndarray:
    """Read a segmentation (W, H, D) from PNG slices."""
    return np.stack([np.asarray(Image.open(folder / f"{name}_{k + 1}_seg.png")).T for k in range(count)], -1)


def axial(image: np.ndarray, spacing: Sequence[float] = (0.9, 0.9, 5.0)) -> nib.Nifti1Image:
    """Return a NIfTI volume (W, H, D[, channels]) with the axes of a stack of slices: to the left, to the back, up."""
    array = np.moveaxis(image, 0, -1) if image.ndim == 4 else image
    return nib.Nifti1Image(array.astype(np.int16), np.diag([-spacing[0], -spacing[1], spacing[2], 1.0]))


class TestEndToEnd:
    def test_evaluation_scores_patients_and_slices(self, trained: Path, brain_phantom: Path, tmp_path: Path) -> None:
        rows = evaluate(trained, brain_phantom, tmp_path, split="training")
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

    def test_a_patient_without_lesion_has_no_dice_or_zero(
        self, trained: Path, brain_phantom: Path, tmp_path: Path
    ) -> None:
        """No Dice where nothing is predicted; 0, and counted, where something is."""
        for threshold, status, dice in ((0.999999, "empty", ""), (1e-6, "false positive", "0")):
            settings = {"split": "training", "validate::postprocessing::transforms::1::threshold": threshold}
            rows = {r["case"]: r for r in evaluate(trained, brain_phantom, tmp_path / status, **settings)}
            assert (rows["phantom0_001"]["status"], rows["phantom0_001"]["dice"]) == (status, dice)
            summary = json.loads((tmp_path / status / "summary.json").read_text())
            assert summary["dice"]["n"] == (2 if status == "empty" else 3)

    def test_largest_component_is_a_knob_of_evaluation(
        self, trained: Path, brain_phantom: Path, tmp_path: Path
    ) -> None:
        settings = {"split": "training", "validate::postprocessing::transforms::1::threshold": 0.2}
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
        settings = {"largest_component": False, "validate::postprocessing::transforms::1::threshold": 0.1}
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

    def test_inference_mirrors_folders_with_one_mask_per_slice(
        self, trained: Path, brain_phantom: Path, tmp_path: Path
    ) -> None:
        images = sorted(p for p in brain_phantom.rglob("*.tif") if not p.stem.endswith("_mask"))
        infer(trained, brain_phantom, tmp_path, **{"postprocessing::transforms::1::threshold": 0.1})
        expected = {p.relative_to(brain_phantom).with_name(f"{p.stem}_seg.png") for p in images}
        assert {p.relative_to(tmp_path) for p in tmp_path.rglob("*.png")} == expected
        values = set()
        for path in expected:
            with Image.open(tmp_path / path) as mask:
                assert (mask.size, mask.mode) == ((32, 32), "L")
                values |= set(np.unique(np.asarray(mask)).tolist())
        assert values == {0, 255}
        rows = table(tmp_path / "inference.csv")
        assert {(row["file"], row["status"], row["notes"]) for row in rows} == {
            (p.relative_to(brain_phantom).as_posix(), "ok", "") for p in images
        }

    @pytest.mark.parametrize(
        ("intensity_normalization", "mirror_axes"), [("volume", []), ("slice", []), ("volume", [0, 1])], ids=str
    )
    def test_what_is_written_is_what_the_network_says(
        self, intensity_normalization: str, mirror_axes: list[int], trained: Path, brain_phantom: Path, tmp_path: Path
    ) -> None:
        """Compare with a computation by hand, rows first, without MONAI's transforms, readers and writers."""
        from monai.networks.nets import DynUNet

        folder = brain_phantom / "kaggle_3m" / "phantom0_003"
        count = len(list(folder.glob("*_mask.tif")))
        stack = np.stack([tifffile.imread(folder / f"phantom0_003_{k + 1}.tif") for k in range(count)]).astype(float)
        if intensity_normalization == "volume":
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
        settings = {"largest_component": False, "postprocessing::transforms::1::threshold": threshold}
        settings["mirror_axes"] = mirror_axes
        infer(trained, folder, tmp_path, intensity_normalization=intensity_normalization, **settings)
        written = read_slices(tmp_path, count, "phantom0_003") > 0
        assert 0.4 < written.mean() < 0.6
        assert (written != (logits > np.median(logits))).mean() < 1e-3


class TestDraws:
    @staticmethod
    def lesion_share(dataset_dir: Path, epochs: int, **settings: object) -> tuple[float, int]:
        """Return the share of slices with lesion that the trainer's loader gives, and the slices per epoch."""
        loader = parsed(dataset_dir=str(dataset_dir), **settings).get_parsed_content("train::dataloader")
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

    def test_how_slices_are_drawn_is_a_knob(self, brain_phantom: Path) -> None:
        entries = json.loads((brain_phantom / "datalist.json").read_text())["training"]
        plain = np.mean([entry["lesion_area"] > 0 for entry in entries])
        assert self.lesion_share(brain_phantom, 2, weighted_slices=False) == (pytest.approx(plain), len(entries))
        assert self.lesion_share(brain_phantom, 2, lesion_floor=0.0, slices_per_epoch=7) == (1.0, 7)


class TestMemory:
    def test_the_cache_is_in_half_precision_and_what_is_drawn_is_not(self, brain_phantom: Path) -> None:
        parser = parsed(dataset_dir=str(brain_phantom), flip_probability=0.0)
        cached, drawn, scored = (
            parser.get_parsed_content(f"{k}")[0] for k in ("train::dataset", "train::slices", "validate::dataset")
        )
        assert (cached["image"].dtype, cached["label"].dtype) == (torch.float16, torch.uint8)
        assert {drawn[key].dtype for key in ("image", "label")} == {torch.float32}
        torch.testing.assert_close(drawn["image"], cached["image"][..., 0].float(), rtol=0, atol=1e-4)
        assert scored["image"].dtype == torch.float32
        assert scored["image"].mean((1, 2, 3)).abs().max() < 1e-5
        assert (scored["image"].std((1, 2, 3)) - 1).abs().max() < 1e-3


class TestConfigs:
    @pytest.mark.parametrize(
        ("overrides", "widths", "parameters"),
        [
            ({}, [16, 32, 64, 128, 256, 512], 7_778_113),
            ({"base_channels": 8, "depth": 3, "dropout": 0.2, "norm": "instance"}, [8, 16, 32], 29_281),
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
        assert sum(p.numel() for p in network.parameters()) == parameters
        network, x = network.double(), torch.rand(1, 3, 32, 32, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(torch.jit.script(network)(x), network(x))

    def test_evaluation_computes_what_inference_does(self) -> None:
        train, infer, evaluate = map(config, ("train.json", "inference.json", "evaluate.json"))
        assert evaluate["validate::inferer::inferer"] == infer["member_inferer"]["inferer"]
        assert train["validate"]["inferer"]["enabled"] == infer["member_inferer"]["enabled"]
        scored, written = (c["transforms"] for c in (evaluate["validate::postprocessing"], infer["postprocessing"]))
        assert scored[0] == {key: value for key, value in written[0].items() if key != "_disabled_"}
        assert scored[1:] == written[1:4]
        data_format = config("metadata.json")["network_data_format"]
        assert data_format["inputs"]["image"]["spatial_shape"] == train["window_size"]
        assert (train["network_def"]["in_channels"], train["context_slices"]) == ("$3 * (2 * @context_slices + 1)", 0)
        assert data_format["inputs"]["image"]["num_channels"] == 3

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
        """SGD with momentum, one cycle to 0.1 over 20 epochs of batches of 4, with the args file alone."""
        parser = ConfigParser()
        parser.read_config(str(CONFIGS / "train.json"))
        args = config("args_reference_r.json")
        parser.update({k: v for k, v in args.items() if k != "_desc_"} | {"train::dataloader": [None] * 5})
        network, optimizer = (parser.get_parsed_content(key) for key in ("network_def", "optimizer"))
        assert sum(p.numel() for p in network.parameters()) == 31_036_673
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
        assert (args["batch_size"], args["max_epochs"], args["intensity_normalization"]) == (4, 20, "slice")

    def test_settings_of_the_paper(self) -> None:
        """Adam at 1e-4 for 100 epochs of batches of 16, width 32 with batch norm, with the args file alone."""
        parser = ConfigParser()
        parser.read_config(str(CONFIGS / "train.json"))
        args = config("args_reference_paper.json")
        parser.update({k: v for k, v in args.items() if k != "_desc_"})
        network, optimizer = (parser.get_parsed_content(key) for key in ("network_def", "optimizer"))
        biases = 2 * 2 * sum(32 * 2**level for level in range(4)) + 2 * 512  # of convolutions, 0 in the paper's
        assert sum(p.numel() for p in network.parameters()) == 7_763_041 + biases
        assert type(optimizer).__name__ == "Adam"
        schedule = parser.get_parsed_content("lr_scheduler")
        for _ in range(3):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
            optimizer.step()
            schedule.step()
        assert (args["batch_size"], args["max_epochs"], args["intensity_normalization"]) == (16, 100, "volume")

    @pytest.mark.parametrize("args", ["args_reference_r.json", "args_reference_paper.json"])
    def test_reference_weights_are_trained_by_the_args_file_evaluated_and_applied(
        self, args: str, brain_phantom: Path, tmp_path: Path
    ) -> None:
        small = {"args_file": str(CONFIGS / args), **FACTS, **TINY, "patch_size": [32, 32], "max_epochs": 1}
        common = {"dataset_dir": brain_phantom, "output_dir": tmp_path, "ckpt_dir": tmp_path / "models"}
        bundle_run("training", "train.json", **common, **small)
        state = torch.load(tmp_path / "training.ckpt", weights_only=True)
        steps = {"args_reference_r.json": state["trainer"]["iteration"], "args_reference_paper.json": 1}
        assert state["lr_scheduler"]["last_epoch"] == steps[args]
        same = {"args_file": small["args_file"], **FACTS} if "paper" in args else {}  # another network
        assert len(evaluate(tmp_path, brain_phantom, tmp_path / "e", **same)) == 1
        infer(tmp_path, brain_phantom, tmp_path / "i", **same)
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
            colours = np.arange(40 * 32 * 3, dtype=np.uint16).astype(np.uint8).reshape(40, 32, 3)
            tifffile.imwrite(path, colours, photometric="rgb")
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
            ("mask size", "has size (31, 40, 6) but its image"),
            ("slice size", "all slices of a stack must be equal"),
            ("label values", "contains the label values 7; allowed are 0, 255"),
            ("colour mask", "has 3 channels but a label must have one"),
            (
                "RGBA",
                "has 4 channels but must have 3: give 3 channels, or one (if the fourth is transparency, save it as",
            ),
            ("same number", "are both slice 1 of p"),
            ("NaN", "contains NaN or infinite values"),
            ("black", "is constant (every value is 0)"),
            ("truncated", "it is truncated or damaged"),
        ],
    )
    def test_training_refuses_it_before_the_first_step(
        self, fault: str, message: str, patient: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_case(tmp_path, fault, patient)
        refuses_to_start(message, tmp_path, caplog, train)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"args_file": str(CONFIGS / "args_reference_r.json"), "max_epochs": 3, "lr_epochs": 2},
                "the one-cycle schedule ends after 10 steps, this run takes 15",
            ),
            ({"weighted_slices": False, "slices_per_epoch": 5}, "every slice is drawn once per epoch: set it to null"),
        ],
    )
    def test_settings_that_cannot_be(
        self, settings: dict, message: str, brain_phantom: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(InputError) as caught:
            train(brain_phantom, tmp_path, **settings)
        assert message in str(caught.value)
        assert len([r for r in caplog.records if r.name == "segbundles" and message in r.getMessage()]) == 1

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
        with pytest.raises(InputError) as caught:
            infer(trained, data, tmp_path / "out")
        assert str(caught.value).startswith("4 of 8 images failed: black/alone_1.tif, ")
        rows = {row["file"]: row for row in table(tmp_path / "out" / "inference.csv")}
        for file, reason in (
            ("patient é/p_2.tif", "truncated or damaged"),
            ("black/alone_1.tif", "is constant (every value is 0)"),
            ("patient é/p_5.tif", "if the fourth is transparency, save it as RGB"),
            ("two.nii.gz", "has 2 channels but must have 3"),
        ):
            assert rows[file]["status"] == "failed"
            assert reason in rows[file]["notes"]
        written = sorted(p.name for p in (tmp_path / "out" / "patient é").iterdir())
        assert written == [f"p_{k}_seg.png" for k in (1, 3, 4, 6)]
        assert rows["patient é/p_1.tif"]["notes"] == "2 of 6 slices left out"


class TestUnusualInput:
    # enough pixels that a mask turned or mirrored cannot look the same
    MUCH = {"largest_component": False, "postprocessing::transforms::1::threshold": 0.1}  # noqa: RUF012

    @pytest.fixture(scope="class")
    def stacked(self, trained: Path, patient: tuple, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
        """Segmentation (W, H, D) of the patient's slices, in a folder with a space in its name."""
        data = tmp_path_factory.mktemp("data")
        write_slices(data / "my patient", patient[0])
        infer(trained, data, data / "out", **self.MUCH)
        mask = read_slices(data / "out" / "my patient", 6) // 255
        for axis in range(3):
            assert not np.array_equal(mask, np.flip(mask, axis))
        return mask

    @pytest.mark.parametrize("axes", ["LPS", "RAS", "PSR", "ILA"])
    @pytest.mark.parametrize("oblique", [False, True], ids=["straight", "oblique"])
    def test_a_volume_stored_any_way_gives_what_its_slices_give(
        self, axes: str, oblique: bool, trained: Path, patient: tuple, stacked: np.ndarray, tmp_path: Path
    ) -> None:
        """Store three channels in NIfTI: axial, sagittal and coronal, and on axes turned by up to 25 degrees."""
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
        assert_alike(np.asarray(back.dataobj), stacked)

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
        assert_alike(mask, read_slices(tmp_path / "out" / "three", 6) // 255)
        rows = {row["file"]: row for row in table(tmp_path / "out" / "inference.csv")}
        no_seg = "; no DICOM SEG: StudyInstanceUID is missing in the series." if suffix == ".dicom" else ""
        assert rows[f"flair{suffix}"]["notes"] == ONE_CHANNEL + no_seg
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
        """Grey levels have no unit, so 16 bits are as good as 8; one channel is used as FLAIR."""
        image = patient[0]
        write_slices(tmp_path / "wide", image.astype(np.uint16) * 256)
        write_slices(tmp_path / "grey", image[1])
        tifffile.imwrite(tmp_path / "pages.tif", np.ascontiguousarray(image.transpose(3, 2, 1, 0)), photometric="rgb")
        infer(trained, tmp_path, tmp_path / "out", **self.MUCH)
        assert_alike(read_slices(tmp_path / "out" / "wide", 6) // 255, stacked)
        assert_alike(tifffile.imread(tmp_path / "out" / "pages_seg.tif").T // 255, stacked)
        notes = {row["file"]: row["notes"] for row in table(tmp_path / "out" / "inference.csv")}
        assert notes["grey/p_1.tif"] == ONE_CHANNEL
        assert notes["wide/p_1.tif"] == notes["pages.tif"] == ""

    def test_an_all_black_slice_of_a_patient_is_segmented_with_the_others(
        self, trained: Path, patient: tuple, tmp_path: Path
    ) -> None:
        image = patient[0].copy()
        image[..., 0] = 0
        write_slices(tmp_path / "p", image)
        for intensity_normalization in ("volume", "slice"):
            infer(
                trained,
                tmp_path / "p",
                tmp_path / intensity_normalization,
                intensity_normalization=intensity_normalization,
            )
            assert len(list((tmp_path / intensity_normalization).glob("*_seg.png"))) == 6
            assert {row["status"] for row in table(tmp_path / intensity_normalization / "inference.csv")} == {"ok"}

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
        """Use three channels and FLAIR alone, stored sagittally; the spacing in their headers gives distances in mm."""
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

    def test_the_spacing_of_slices_is_a_knob(self, trained: Path, brain_phantom: Path, tmp_path: Path) -> None:
        settings = {"split": "training", "validate::postprocessing::transforms::1::threshold": 0.2}
        rows = evaluate(trained, brain_phantom, tmp_path, spacing_mm=[1, 1, 5], **settings)
        assert {row["spacing_mm"] for row in rows} == {"1 x 1 x 5"}
        assert "hd95" in rows[0] or "hd95_mm" in rows[0]

    def test_three_classes(self, patient: tuple, tmp_path: Path) -> None:
        image, label = patient
        classes = (label > 0).astype(np.uint8)
        classes[:4, :4, 2] = 2
        entries = write_slices(tmp_path, image, classes)
        (tmp_path / "datalist.json").write_text(json.dumps({"training": entries, "validation": entries}))
        train(tmp_path, tmp_path / "t", num_classes=3)
        row = evaluate(tmp_path / "t", tmp_path, tmp_path / "e")[0]
        assert {"dice", "dice_1", "dice_2"} <= set(row)


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
    settings = {"max_epochs": 1, "slices_per_epoch": 8, "window_size": [256, 256], "batch_size": 4}
    train(tmp_path / "data", tmp_path / "t", **settings)
    assert (tmp_path / "t" / "models" / "model.pt").is_file()
    infer(trained, folder, tmp_path / "out")
    images = [p for p in folder.glob("*.tif") if not p.stem.endswith("_mask")]
    for path in images:
        with Image.open(tmp_path / "out" / f"{path.stem}_seg.png") as mask, Image.open(path) as image:
            assert mask.size == image.size
    assert len(list((tmp_path / "out").glob("*_seg.png"))) == len(images)
