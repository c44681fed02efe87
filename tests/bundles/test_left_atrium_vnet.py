from __future__ import annotations

import csv
import gzip
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from dicom_series import PATIENT, PATIENT_ID, write_series
from monai.bundle import ConfigParser, ConfigWorkflow, load, run, verify_metadata, verify_net_in_out

from segbundles.datasets import get_data_set, prepare

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "bundles" / "left_atrium_vnet"
CONFIGS = BUNDLE / "configs"
SCHEMA = ROOT.parent / "shared" / "monai_schema" / "meta_schema_20240725.json"

TINY = {
    "base_channels": 2,
    "network_spacing_mm": [6.0, 6.0, 6.0],
    "locator_spacing_mm": [8.0, 8.0, 8.0],
    "locator_def::base_channels": 2,
    "amp": False,
    "device": "cpu",
}
TINY_TRAINING = {**TINY, "patch_size": [32, 32, 16], "max_epochs": 2, "val_interval": 1, "batch_size": 2}
EVALUATE = [str(CONFIGS / "train.json"), str(CONFIGS / "evaluate.json")]


def config(name: str) -> dict:
    return json.loads((CONFIGS / name).read_text())


def bundle_run(run_id: str | None, config_file: str | list[str], **settings: object) -> None:
    run(
        run_id=run_id,
        config_file=config_file if isinstance(config_file, list) else str(CONFIGS / config_file),
        bundle_root=str(BUNDLE),
        logging_file=False,
        **{key: str(value) if isinstance(value, Path) else value for key, value in settings.items()},
    )


def infer(trained: Path, dataset_dir: Path, output_dir: Path, **settings: object) -> None:
    """Segment with the tiny networks, by ``run`` without an id."""
    common = {"dataset_dir": dataset_dir, "output_dir": output_dir, "ckpt_dir": trained / "models"}
    bundle_run(None, "inference.json", **common, **{**TINY, **settings})


def root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@pytest.fixture(scope="module")
def trained(left_atrium_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with models/ and training output of a tiny locator and segmenter."""
    out = tmp_path_factory.mktemp("trained")
    common = {"dataset_dir": left_atrium_phantom, "output_dir": out / "training", "ckpt_dir": out / "models"}
    locator = {k: v for k, v in TINY_TRAINING.items() if k not in ("base_channels", "network_spacing_mm")}
    locator["network_def::base_channels"] = locator.pop("locator_def::base_channels")
    bundle_run("training", "train_locator.json", **common, **locator)
    bundle_run("training", "train.json", **common, **TINY_TRAINING)
    return out


class TestEndToEnd:
    def test_training_writes_half_precision_weights_and_keeps_its_state_elsewhere(self, trained: Path) -> None:
        assert sorted(p.name for p in (trained / "models").iterdir()) == ["locator.pt", "model.pt"]
        for name in ("locator.pt", "model.pt"):
            state = torch.load(trained / "models" / name, weights_only=True)
            assert {value.dtype for value in state.values()} == {torch.float16}
        assert {"training.ckpt", "locator.ckpt", "tensorboard"} <= {p.name for p in (trained / "training").iterdir()}

    def test_tensorboard_holds_loss_metric_and_picture(self, trained: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        tags: dict[str, set[str]] = {"scalars": set(), "images": set()}
        for file in (trained / "training" / "tensorboard").rglob("events*"):
            events = EventAccumulator(str(file)).Reload()
            for kind in tags:
                tags[kind] |= set(events.Tags()[kind])
        assert any("train_loss" in tag for tag in tags["scalars"])
        assert any("val_mean_dice" in tag for tag in tags["scalars"])
        assert any(tag.startswith("validation/case_0") for tag in tags["images"])

    def test_evaluation_scores_every_case_by_name(
        self, trained: Path, left_atrium_phantom: Path, tmp_path: Path
    ) -> None:
        bundle_run(
            "evaluating",
            EVALUATE,
            dataset_dir=left_atrium_phantom,
            output_dir=tmp_path / "out",
            ckpt_dir=trained / "models",
            section="training",
            **TINY,
        )
        entries = json.loads((left_atrium_phantom / "datalist.json").read_text())["training"]
        rows = list(csv.DictReader((tmp_path / "out" / "metrics.csv").open()))
        assert [row["case"] for row in rows] == [entry["case"] for entry in entries]
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary["cases"] == len(entries)
        assert set(summary["dice"]) == {"mean", "sd", "median", "worst", "n"}
        assert summary["dice"]["mean"] == pytest.approx(np.mean([float(r["dice"]) for r in rows]), abs=1e-5)
        page = (tmp_path / "out" / "report.html").read_text()
        assert all(row["case"] in page for row in rows)

    def test_inference_mirrors_folders_and_keeps_each_grid(
        self, trained: Path, left_atrium_phantom: Path, tmp_path: Path
    ) -> None:
        images = sorted(left_atrium_phantom.rglob("lgemri.nrrd"))
        infer(trained, left_atrium_phantom, tmp_path / "o")
        written = sorted((tmp_path / "o").rglob("*_seg.nrrd"))
        assert [p.relative_to(tmp_path / "o").parent for p in written] == [
            p.relative_to(left_atrium_phantom).parent for p in images
        ]
        directions = set()
        for image, mask in zip(images, written, strict=True):
            a, b = sitk.ReadImage(str(image)), sitk.ReadImage(str(mask))
            assert a.GetSize() == b.GetSize()
            for get in ("GetSpacing", "GetOrigin", "GetDirection"):
                np.testing.assert_allclose(getattr(a, get)(), getattr(b, get)(), rtol=0, atol=1e-12)
            assert set(np.unique(sitk.GetArrayFromImage(b))) <= {0, 1}
            directions.add(tuple(np.round(a.GetDirection(), 3)))
        assert len(directions) > 1  # or the test shows nothing about direction
        rows = list(csv.DictReader((tmp_path / "o" / "inference.csv").open()))
        assert [(row["file"], row["status"]) for row in rows] == [
            (p.relative_to(left_atrium_phantom).as_posix(), "ok") for p in images
        ]

    def test_what_is_written_is_what_the_networks_say(
        self, trained: Path, left_atrium_phantom: Path, tmp_path: Path
    ) -> None:
        """Put through by hand on the file's own axes, without MONAI's transforms, readers and writers."""
        from segbundles.inferers import LocatorCropInferer
        from segbundles.networks import VNet, load_weights

        entry = json.loads((left_atrium_phantom / "datalist.json").read_text())["validation"][0]
        image = sitk.ReadImage(str(left_atrium_phantom / entry["image"]))
        flips = [axis for axis in (0, 1) if image.GetDirection()[4 * axis] > 0]  # LPS file to RAS array
        array = torch.as_tensor(sitk.GetArrayFromImage(image).astype(np.float32)).permute(2, 1, 0)
        array = array.flip(flips)
        inferer = LocatorCropInferer(
            roi_size=(160, 160, 128),
            input_spacing_mm=image.GetSpacing(),
            crop_transform=lambda crop: (crop - crop.mean()) / crop.std(correction=0),
            network_spacing_mm=6.0,
        )
        network = load_weights(VNet(base_channels=2, norm="instance", out_act=None), trained / "models" / "model.pt")
        expected = (inferer(array[None, None], network)[0, 0] > 0).flip(flips)
        infer(
            trained,
            left_atrium_phantom / entry["image"],
            tmp_path,
            **{"use_locator": False, "largest_component": False},
        )
        written = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "lgemri_seg.nrrd"))).transpose(2, 1, 0)
        assert 0 < expected.sum() < expected.numel()
        assert (expected.numpy() != written.astype(bool)).mean() < 1e-4

    def test_a_fallback_is_noted(self, trained: Path, left_atrium_phantom: Path, tmp_path: Path) -> None:
        image = next(left_atrium_phantom.rglob("lgemri.nrrd"))
        infer(trained, image, tmp_path, **{"inferer::inferer::threshold": 0.999999})
        row = next(csv.DictReader((tmp_path / "inference.csv").open()))
        assert row["notes"] == "locator found nothing: whole volume segmented"
        assert (tmp_path / "lgemri_seg.nrrd").is_file()

    def test_one_bad_image_does_not_stop_the_others(
        self, trained: Path, left_atrium_phantom: Path, tmp_path: Path
    ) -> None:
        data = tmp_path / "data with spaces"
        good = next(left_atrium_phantom.rglob("lgemri.nrrd"))
        (data / "é").mkdir(parents=True)
        shutil.copy(good, data / "é" / "good.nrrd")
        (data / "bad.nrrd").write_bytes(good.read_bytes()[:2000])
        nib.save(nib.Nifti1Image(np.full((20, 20, 10), 7, np.int16), np.eye(4)), data / "constant.nii.gz")
        with pytest.raises(RuntimeError) as caught:
            infer(trained, data, tmp_path / "out")
        assert "2 of 3 images failed: bad.nrrd, constant.nii.gz" in str(root_cause(caught.value))
        rows = {r["file"]: r for r in csv.DictReader((tmp_path / "out" / "inference.csv").open())}
        assert rows["é/good.nrrd"]["status"] == "ok"
        assert "truncated or damaged" in rows["bad.nrrd"]["notes"]
        assert "is constant (every value is 7)" in rows["constant.nii.gz"]["notes"]
        assert [p.name for p in (tmp_path / "out").rglob("*_seg.*")] == ["good_seg.nrrd"]

    @pytest.mark.slow
    def test_from_another_folder_by_the_command_line(
        self, trained: Path, left_atrium_phantom: Path, tmp_path: Path
    ) -> None:
        command = [sys.executable, "-m", "monai.bundle", "run", "inferring", "--bundle_root", str(BUNDLE)]
        command += ["--config_file", str(CONFIGS / "inference.json"), "--dataset_dir", str(left_atrium_phantom)]
        command += ["--output_dir", "out", "--ckpt_dir", str(trained / "models"), "--use_locator", "false"]
        command += ["--base_channels", "2", "--network_spacing_mm", "[6.0,6.0,6.0]", "--amp", "false"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(list((tmp_path / "out").rglob("*_seg.nrrd"))) == 5
        misspelt = subprocess.run([*command, "--use_locater", "1"], cwd=tmp_path, capture_output=True, text=True)
        assert misspelt.returncode != 0
        assert "did you mean 'use_locator'?" in misspelt.stdout


class TestResume:
    SETTINGS = {  # noqa: RUF012
        **TINY_TRAINING,
        "max_epochs": 3,
        "boundary_weight": 0.5,
        "boundary_epochs": 2,
        "early_stop_patience": 9,
        "attention": "sequential",
        "dropout": 0.1,
        "elastic_probability": 0.5,
    }

    def test_stopped_and_resumed_gives_the_same_weights_bit_for_bit(
        self, left_atrium_phantom: Path, tmp_path: Path
    ) -> None:
        def train(name: str, **settings: object) -> dict:
            out = tmp_path / name
            bundle_run(
                "training",
                "train.json",
                dataset_dir=left_atrium_phantom,
                output_dir=out,
                ckpt_dir=out / "models",
                **{**self.SETTINGS, **settings},
            )
            return torch.load(out / "training.ckpt", weights_only=True)

        whole = train("whole")
        train("parts", max_epochs=1)
        parts = train("parts", max_epochs=3, resume=True)
        assert parts["trainer"]["epoch"] == whole["trainer"]["epoch"] == 3
        for name, value in whole["network"].items():
            assert torch.equal(value, parts["network"][name]), name
        assert parts["evaluator"] == whole["evaluator"]
        assert parts["trainer"]["resumable"] == whole["trainer"]["resumable"]
        assert parts["lr_scheduler"] == whole["lr_scheduler"]


class TestContract:
    @pytest.mark.parametrize(
        ("files", "kind"), [("train.json", "train"), ("train_locator.json", "train"), ("inference.json", "infer")]
    )
    def test_check_properties_lacks_nothing(self, files: str, kind: str, left_atrium_phantom: Path) -> None:
        workflow = ConfigWorkflow(
            config_file=str(CONFIGS / files),
            workflow_type=kind,
            logging_file=False,
            bundle_root=str(BUNDLE),
            dataset_dir=str(left_atrium_phantom),
            output_dir=str(left_atrium_phantom / "unused"),
            device="cpu",
        )
        workflow.initialize()
        assert workflow.check_properties() == []

    def test_load_returns_the_network_with_its_weights(self, trained: Path, tmp_path: Path) -> None:
        shutil.copytree(BUNDLE, tmp_path / "left_atrium_vnet")
        shutil.copytree(trained / "models", tmp_path / "left_atrium_vnet" / "models", dirs_exist_ok=True)
        network = load(
            name="left_atrium_vnet", bundle_dir=str(tmp_path), source="monaihosting", net_override={"base_channels": 2}
        )
        expected = torch.load(trained / "models" / "model.pt", weights_only=True)
        assert all(torch.equal(v.half(), expected[k]) for k, v in network.state_dict().items())

    def test_metadata_fits_the_schema(self) -> None:
        if not SCHEMA.is_file():
            pytest.skip(f"no schema at {SCHEMA}")
        verify_metadata(
            meta_file=str(CONFIGS / "metadata.json"),
            filepath=str(SCHEMA),
            hash_val="cd64aa8a5904426f6fc6855dabe46af8c742d5bad644b4e9cfb78ebad09ad678",
            hash_type="sha256",
        )

    @pytest.mark.parametrize("network", ["network_def", "locator_def"])
    def test_networks_take_and_give_what_the_metadata_says(self, network: str) -> None:
        verify_net_in_out(
            net_id=network,
            meta_file=str(CONFIGS / "metadata.json"),
            config_file=str(CONFIGS / "inference.json"),
            device="cpu",
            extra_forward_args={},
        )

    def test_files_say_the_same_where_they_must(self) -> None:
        train, infer, locator, evaluate = map(
            config, ("train.json", "inference.json", "train_locator.json", "evaluate.json")
        )
        assert train["network_def"] == infer["network_def"]
        assert train["locator_def"] == infer["locator_def"] == locator["network_def"]
        assert evaluate["validate::inferer::inferer"] == infer["inferer"]["inferer"]
        for knob in set(train) & set(infer) - {"_desc_", "output_dir", "batch_size"}:
            if not isinstance(train[knob], dict) and not knob.startswith(("_section", "run", "initialize")):
                assert train[knob] == infer[knob], knob
        for knob in ("use_locator", "margin_mm", "mirror_axes", "largest_component"):
            assert evaluate[knob] == infer[knob]
        scored, written = (c["transforms"] for c in (evaluate["validate::postprocessing"], infer["postprocessing"]))
        assert scored == written[:2]
        assert locator["locator_spacing_mm"] == train["locator_spacing_mm"]
        for trained_by, name in ((train, "network_data_format"), (locator, "locator_data_format")):
            assert config("metadata.json")[name]["inputs"]["image"]["spatial_shape"] == trained_by["patch_size"]

    def test_run_is_what_the_named_id_runs(self) -> None:
        for name, run_id in (
            ("train.json", "training"),
            ("train_locator.json", "training"),
            ("evaluate.json", "evaluating"),
            ("inference.json", "inferring"),
        ):
            assert config(name)[run_id] == "@run"

    @pytest.mark.parametrize(
        ("overrides", "parameters"),
        [
            ({}, 10_759_066),
            ({"boundary_weight": 0.99}, 10_759_066),
            ({"attention": "sequential", "attention_dilation": 3}, 10_850_145),
            ({"attention": "sequential", "attention_dilation": 4}, 10_850_145),
            ({"attention": "sequential", "boundary_weight": 0.99}, 10_850_145),
            ({"num_layers": 2}, 16_200_026),
        ],
        ids=["V-Net", "hybrid", "BAM d3", "BAM d4", "BAM hybrid", "wide"],
    )
    def test_rows_of_the_reference_run_by_overrides_alone(self, overrides: dict, parameters: int) -> None:
        parser = ConfigParser()
        parser.read_config(str(CONFIGS / "train.json"))
        parser.update({k: v for k, v in config("args_reference.json").items() if k != "_desc_"} | overrides)
        network = parser.get_parsed_content("network_def")
        assert sum(p.numel() for p in network.parameters()) == parameters
        loss = parser.get_parsed_content("loss")
        assert type(loss.region_loss).__name__ == "DiceLoss"
        schedule = parser.get_parsed_content("lr_scheduler")
        assert (schedule.factor, schedule.patience) == (0.8, 7)

    def test_reference_weights_are_trained_evaluated_and_applied_with_its_settings(
        self, left_atrium_phantom: Path, tmp_path: Path
    ) -> None:
        """By the args files, made small."""
        small = {
            "network_def::base_channels": 2,
            "network_spacing_mm": [6.0, 6.0, 6.0],
            "locator_spacing_mm": [8.0, 8.0, 8.0],
            "device": "cpu",
            "amp": False,
        }
        training = {**small, "patch_size": [32, 32, 16], "max_epochs": 1, "output_dir": tmp_path}
        common = {"dataset_dir": left_atrium_phantom, "ckpt_dir": tmp_path / "models"}
        segmenter = {"args_file": str(CONFIGS / "args_reference.json"), **common}
        locator = {"args_file": str(CONFIGS / "args_reference_locator.json"), **common, **training}
        del locator["network_spacing_mm"]
        bundle_run("training", "train_locator.json", **locator)
        bundle_run("training", "train.json", **segmenter, **training)
        applied = {**segmenter, **small, "locator_def::base_channels": 2}
        bundle_run("evaluating", EVALUATE, output_dir=tmp_path / "e", **applied)
        bundle_run("inferring", "inference.json", output_dir=tmp_path / "i", **applied)
        assert (tmp_path / "e" / "report.html").is_file()
        assert len(list((tmp_path / "i").rglob("*_seg.nrrd"))) == 5


def volume(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.diag([3.0, 3.0, 3.0, 1.0]) if affine is None else affine), path)
    return path


def scene(shape: tuple[int, ...] = (40, 40, 24)) -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng(0).normal(100, 10, shape).astype(np.float32)
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(n // 3, 2 * n // 3) for n in shape)] = 1
    return image + 50 * label, label


def write_case(folder: Path, fault: str) -> None:
    image, label = scene()
    image_affine = label_affine = np.diag([3.0, 3.0, 3.0, 1.0])
    entry = {"image": "image.nii.gz", "label": "label.nii.gz"}
    if fault == "no label":
        del entry["label"]
    elif fault == "size":
        label = label[:, :, :-1]
    elif fault == "geometry":
        label_affine = np.diag([3.0, 3.0, 2.0, 1.0])
    elif fault == "label values":
        label[0, 0, 0] = 7
    elif fault == "2D":
        image, label = image[:, :, 12], label[:, :, 12]
    elif fault == "4D":
        image = np.stack([image, image], -1)
    elif fault == "NaN":
        image[0, 0, 0] = np.nan
    elif fault == "constant":
        image[:] = 3
    volume(folder / "image.nii.gz", image, image_affine)
    volume(folder / "label.nii.gz", label, label_affine)
    if fault == "truncated nii.gz":
        data = (folder / "image.nii.gz").read_bytes()
        (folder / "image.nii.gz").write_bytes(data[: len(data) // 2])
    elif fault == "truncated nrrd":
        entry["image"] = "image.nrrd"
        sitk.WriteImage(sitk.GetImageFromArray(image.T), str(folder / "image.nrrd"), True)
        data = (folder / "image.nrrd").read_bytes()
        (folder / "image.nrrd").write_bytes(data[: len(data) // 2])
    elif fault == "file missing":
        (folder / "label.nii.gz").unlink()
    if fault != "no datalist":
        (folder / "datalist.json").write_text(json.dumps({"training": [entry], "validation": []}))


class TestBadInput:
    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("no datalist", "there is no datalist.json in"),
            ("no label", "entry 0 (image.nii.gz) has no label"),
            ("file missing", "label label.nii.gz does not exist"),
            ("size", "has size (40, 40, 23), its image"),
            ("geometry", "mm from its image"),
            ("label values", "holds the label values 7: allowed are 0, 1"),
            ("2D", "has 2 axes (40, 40), 3 are due"),
            ("4D", "has 2 channels, 1 are due"),
            ("NaN", "holds NaN or infinite values"),
            ("constant", "is constant (every value is 3)"),
            ("truncated nii.gz", "it is truncated or damaged"),
            ("truncated nrrd", "it is truncated or damaged"),
        ],
    )
    def test_training_refuses_it_before_the_first_step(
        self, fault: str, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_case(tmp_path, fault)
        with pytest.raises(RuntimeError) as caught:
            bundle_run(
                "training",
                "train.json",
                dataset_dir=tmp_path,
                output_dir=tmp_path / "out",
                ckpt_dir=tmp_path / "out",
                **TINY_TRAINING,
            )
        cause = root_cause(caught.value)
        assert isinstance(cause, ValueError)
        assert message in str(cause)
        errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR" and message in r.getMessage()]
        assert len(errors) == 1
        assert not (tmp_path / "out").exists()

    def test_missing_dataset_dir_names_the_command(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError) as caught:
            bundle_run("training", "train.json", dataset_dir=tmp_path / "none", **TINY_TRAINING)
        assert "is not a folder" in str(root_cause(caught.value))
        assert "segbundles prepare" in str(root_cause(caught.value))

    @pytest.mark.parametrize("setting", ["output_dir", "ckpt_dir"])
    def test_a_folder_that_cannot_be_written_is_refused_before_training(
        self, setting: str, left_atrium_phantom: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("in the way")
        folders = {"output_dir": tmp_path / "out", "ckpt_dir": tmp_path / "out", setting: tmp_path / "file" / "x"}
        with pytest.raises(RuntimeError) as caught:
            bundle_run("training", "train.json", dataset_dir=left_atrium_phantom, **folders, **TINY_TRAINING)
        assert str(root_cause(caught.value)).startswith(f"{setting} '{tmp_path / 'file' / 'x'}' cannot be written to")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"use_locator": False}, "there are no weights at"),
            ({"use_locator": True}, "there are no weights at"),
        ],
    )
    def test_missing_weights(self, settings: dict, message: str, left_atrium_phantom: Path, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError) as caught:
            bundle_run(
                "inferring",
                "inference.json",
                dataset_dir=left_atrium_phantom,
                output_dir=tmp_path / "out",
                ckpt_dir=tmp_path / "none",
                **{**TINY, **settings},
            )
        assert message in str(root_cause(caught.value))

    def test_weights_of_another_architecture(self, trained: Path, left_atrium_phantom: Path, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError) as caught:
            bundle_run(
                "evaluating",
                EVALUATE,
                dataset_dir=left_atrium_phantom,
                output_dir=tmp_path / "out",
                ckpt_dir=trained / "models",
                **{**TINY, "base_channels": 4, "use_locator": False},
            )
        assert "is of another architecture than the VNet configured" in str(root_cause(caught.value))
        assert "has shape" in str(root_cause(caught.value))

    def test_an_image_that_fails_in_the_middle_does_not_stop_the_others(
        self, trained: Path, left_atrium_phantom: Path, tmp_path: Path
    ) -> None:
        data, out = tmp_path / "data", tmp_path / "out"
        data.mkdir()
        for name in ("a", "b"):
            shutil.copy(next(left_atrium_phantom.rglob("lgemri.nrrd")), data / f"{name}.nrrd")
        (out / "a_seg.nrrd").mkdir(parents=True)  # in the way of the first output
        with pytest.raises(RuntimeError, match="Failed to evaluate") as caught:
            infer(trained, data, out)
        assert str(root_cause(caught.value)).startswith("1 of 2 images failed: a.nrrd.")
        rows = {row["file"]: row for row in csv.DictReader((out / "inference.csv").open())}
        assert (rows["a.nrrd"]["status"], rows["b.nrrd"]["status"]) == ("failed", "ok")
        assert "cannot write" in rows["a.nrrd"]["notes"]
        assert (out / "b_seg.nrrd").is_file()

    @pytest.mark.parametrize(
        ("file", "settings", "message"),
        [
            ("train.json", {"patch_size": [16, 16]}, "patch_size must be 3 numbers of voxels, got [16, 16]"),
            ("train_locator.json", {"patch_size": [16]}, "patch_size must be 3 numbers of voxels, got [16]"),
            ("train.json", {"crop_from": "turth"}, "crop_from must be truth or locator, got 'turth'"),
            ("train.json", {"boundary_weight": 1.5}, "boundary_weight must be between 0 and 1, got 1.5"),
        ],
    )
    def test_settings_that_cannot_be(self, file: str, settings: dict, message: str, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError) as caught:
            bundle_run("training", file, dataset_dir=tmp_path, **settings)
        assert str(root_cause(caught.value)) == message

    def test_a_schedule_shorter_than_the_run_is_refused(self, left_atrium_phantom: Path, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError) as caught:
            bundle_run(
                "training",
                "train.json",
                dataset_dir=left_atrium_phantom,
                output_dir=tmp_path,
                ckpt_dir=tmp_path,
                **{**TINY_TRAINING, "max_epochs": 3, "lr_epochs": 2},
            )
        assert "set lr_epochs to max_epochs or more" in str(root_cause(caught.value))

    def test_an_empty_folder_is_an_error(self, trained: Path, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError) as caught:
            infer(trained, tmp_path, tmp_path / "out")
        assert "no image under" in str(root_cause(caught.value))


def _counted_back(axis: int, count: int) -> np.ndarray:
    """From indices of an array flipped along an axis to its own."""
    affine = np.eye(4)
    affine[axis, axis], affine[axis, 3] = -1, count - 1
    return affine


class TestUnusualInput:
    def test_small_anisotropic_and_oblique_volumes_work(
        self, trained: Path, left_atrium_phantom: Path, tmp_path: Path
    ) -> None:
        data = tmp_path / "data"
        data.mkdir()
        image, _ = scene((25, 19, 7))
        turn = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, -1.0]])
        affine = np.eye(4)
        affine[:3, :3] = turn * [2.0, 2.5, 9.0]
        affine[:3, 3] = [-31.0, 12.5, 40.0]
        volume(data / "oblique.nii.gz", image, affine)
        volume(data / "one.slice.nii", image[:, :, :1], affine)
        infer(trained, data, tmp_path / "out")
        for name, size in (("oblique_seg.nii.gz", (25, 19, 7)), ("one.slice_seg.nii", (25, 19, 1))):
            written = nib.load(tmp_path / "out" / name)
            assert written.shape == size
            np.testing.assert_allclose(written.affine, affine, rtol=0, atol=1e-5)

    def test_dicom_series_come_out_as_the_same_volumes_in_nifti(
        self, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Patients' names stay in the slices, and a folder with two series does not stop the others."""
        data, out = tmp_path / "data", tmp_path / "out"
        data.mkdir()
        image = scene((25, 28, 12))[0].astype(np.int16)
        affine = np.eye(4)
        affine[:3, :3] = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, -1.0]]) * [2.0, 2.5, 5.0]
        affine[:3, 3] = [-31.0, 12.5, 40.0]
        volume(data / "volume.nii.gz", image, affine)
        # counted the other way: slices come in the order of the normal x cross y
        write_series(data / "PA1" / "SE.1", image[:, :, ::-1], affine @ _counted_back(2, 12))
        write_series(data / "PA1" / "SE2", image, affine, SeriesDescription="cine")
        write_series(data / "PA1" / "SE2", image[:, :, :1], affine, ["loc"], SeriesInstanceUID="9", SeriesNumber=1)
        with caplog.at_level(logging.INFO), pytest.raises(RuntimeError) as caught:
            infer(trained, data, out, use_locator=False, largest_component=False)
        assert "1 of 3 images failed: PA1/SE2." in str(root_cause(caught.value))
        rows = {row["file"]: row for row in csv.DictReader((out / "inference.csv").open())}
        assert {file: row["status"] for file, row in rows.items()} == {
            "PA1/SE.1": "ok",
            "PA1/SE2": "failed",
            "volume.nii.gz": "ok",
        }
        assert "it holds 2 series, 'cine' of 12 slices, '' (number 1) of 1 slice" in rows["PA1/SE2"]["notes"]
        of_series, of_volume = (nib.load(out / name) for name in ("PA1/SE.1_seg.nii.gz", "volume_seg.nii.gz"))
        np.testing.assert_allclose(of_series.affine, affine @ _counted_back(2, 12), atol=1e-5)
        mask = np.asarray(of_volume.dataobj)
        assert 0.01 < mask.mean() < 0.99
        np.testing.assert_array_equal(np.asarray(of_series.dataobj)[:, :, ::-1], mask)

        infer(trained, data / "PA1" / "SE.1", tmp_path / "alone", use_locator=False, largest_component=False)
        assert [row["file"] for row in csv.DictReader((tmp_path / "alone" / "inference.csv").open())] == ["SE.1"]
        np.testing.assert_array_equal(nib.load(tmp_path / "alone" / "SE.1_seg.nii.gz").dataobj, of_series.dataobj)
        files = [path for path in out.rglob("*") if path.is_file()]
        assert {path.suffix for path in files} >= {".csv", ".gz"}
        written = [gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes() for path in files]
        for secret in (PATIENT, PATIENT_ID):
            assert secret not in caplog.text
            assert not any(secret.encode() in content for content in written)

    def test_a_volume_smaller_than_the_patch_is_trained_on(self, tmp_path: Path) -> None:
        image, label = scene((20, 20, 10))
        volume(tmp_path / "i.nii.gz", image)
        volume(tmp_path / "l.nii.gz", label)
        entry = {"image": "i.nii.gz", "label": "l.nii.gz"}
        (tmp_path / "datalist.json").write_text(json.dumps({"training": [entry] * 2, "validation": [entry]}))
        out = tmp_path / "out"
        bundle_run("training", "train.json", dataset_dir=tmp_path, output_dir=out, ckpt_dir=out, **TINY_TRAINING)
        assert (out / "model.pt").is_file()

    def test_crops_from_the_locator(self, trained: Path, left_atrium_phantom: Path, tmp_path: Path) -> None:
        shutil.copytree(trained / "models", tmp_path / "models")
        bundle_run(
            "training",
            "train.json",
            dataset_dir=left_atrium_phantom,
            output_dir=tmp_path,
            ckpt_dir=tmp_path / "models",
            **{**TINY_TRAINING, "crop_from": "locator", "initial_weights": str(trained / "models" / "model.pt")},
        )
        assert (tmp_path / "models" / "model_previous.pt").read_bytes() == (trained / "models/model.pt").read_bytes()

    def test_where_the_locator_finds_nothing_crops_are_taken_around_the_truth(
        self, trained: Path, left_atrium_phantom: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        bundle_run(
            "training",
            "train.json",
            dataset_dir=left_atrium_phantom,
            output_dir=tmp_path / "t",
            ckpt_dir=shutil.copytree(trained / "models", tmp_path / "models"),
            **{**TINY_TRAINING, "max_epochs": 1, "crop_from": "locator", "locator_boxes::threshold": 0.999999},
        )
        warnings = [m for m in caplog.messages if "locator found nothing: the crop is taken around the label" in m]
        assert len(warnings) == 3
        assert all("lgemri.nrrd" in message for message in warnings)

    def test_a_second_run_keeps_the_state_of_the_first(self, left_atrium_phantom: Path, tmp_path: Path) -> None:
        common = {"dataset_dir": left_atrium_phantom, "output_dir": tmp_path, "ckpt_dir": tmp_path / "m"}
        bundle_run("training", "train.json", **common, **TINY_TRAINING)
        first = (tmp_path / "training.ckpt").read_bytes()
        bundle_run("training", "train.json", **common, **{**TINY_TRAINING, "max_epochs": 1})
        assert (tmp_path / "training_previous.ckpt").read_bytes() == first

    def test_three_classes_of_ones_own(self, tmp_path: Path) -> None:
        image, label = scene((32, 32, 16))
        label[12:16, 12:16, 6:9] = 2
        volume(tmp_path / "i.nii.gz", image)
        volume(tmp_path / "l.nii.gz", label)
        entry = {"image": "i.nii.gz", "label": "l.nii.gz"}
        (tmp_path / "datalist.json").write_text(json.dumps({"training": [entry] * 2, "validation": [entry]}))
        common = {"dataset_dir": tmp_path, "ckpt_dir": tmp_path / "models", "num_classes": 3}
        bundle_run("training", "train.json", output_dir=tmp_path / "t", boundary_weight=0.5, **common, **TINY_TRAINING)
        bundle_run("evaluating", EVALUATE, output_dir=tmp_path / "e", use_locator=False, **common, **TINY)
        row = next(csv.DictReader((tmp_path / "e" / "metrics.csv").open()))
        assert {"dice", "dice_1", "dice_2"} <= set(row)


def test_metadata_and_model_card_give_the_same_figures() -> None:
    found = config("metadata.json")["eval_metrics"]
    card = (BUNDLE / "docs" / "README.md").read_text()
    assert sorted(found) == ["mean_dice_bright_blood", "mean_dice_lge"]
    for title, name in (("LGE", "mean_dice_lge"), ("bright blood", "mean_dice_bright_blood")):
        assert any(line.startswith(f"| {title}") and f"**{found[name]:.3f}**" in line for line in card.splitlines())


@pytest.mark.samples
@pytest.mark.parametrize(
    ("name", "folder", "settings", "dice"),
    [("lasc18", "lasc18", {"use_locator": False}, 0.88), ("heart", "Task02_Heart", {}, 0.88)],
)
def test_shipped_weights_segment_real_atria(
    name: str, folder: str, settings: dict, dice: float, samples: Path, tmp_path: Path
) -> None:
    prepare(get_data_set(name), samples / folder, tmp_path / "data", validation_fraction=1.0)
    bundle_run("evaluating", EVALUATE, dataset_dir=tmp_path / "data", output_dir=tmp_path / "e", **settings)
    rows = list(csv.DictReader((tmp_path / "e" / "metrics.csv").open()))
    assert len(rows) == len(
        list(samples.glob(f"{folder}/**/laendo.nrrd" if name == "lasc18" else f"{folder}/labelsTr/*"))
    )
    assert min(float(row["dice"]) for row in rows) >= dice
    if not settings:
        assert min(float(row["truth_in_box"]) for row in rows) >= 0.995


@pytest.mark.samples
def test_real_volumes_come_out_on_their_grid(trained: Path, samples: Path, tmp_path: Path) -> None:
    for folder in ("Task02_Heart", "lasc18"):
        infer(trained, samples / folder, tmp_path / folder)
    heart = nib.load(samples / "Task02_Heart/imagesTr/la_014.nii.gz")
    mask = nib.load(tmp_path / "Task02_Heart/imagesTr/la_014_seg.nii.gz")
    assert mask.shape == heart.shape
    np.testing.assert_allclose(mask.affine, heart.affine, rtol=0, atol=1e-6)
    images = sorted(samples.glob("lasc18/*/*/lgemri.nrrd"))
    masks = sorted(tmp_path.glob("lasc18/*/*/lgemri_seg.nrrd"))
    assert len(images) == len(masks) == 2
    for image, mask in zip(images, masks, strict=True):
        a, b = sitk.ReadImage(str(image)), sitk.ReadImage(str(mask))
        assert a.GetSize() == b.GetSize()
        assert a.GetDirection() == b.GetDirection()
