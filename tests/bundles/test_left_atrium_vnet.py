from __future__ import annotations

import gzip
import json
import logging
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from bundle_runs import BundleRuns, refuses_to_start, table
from dicom_series import PATIENT, PATIENT_ID, write_series
from monai.bundle import ConfigParser

from segbundles.datasets import get_data_set, prepare
from segbundles.errors import InputError
from segbundles.inferers import LocatorCropInferer
from segbundles.networks import AttentionVNet, load_weights

CPU = {"amp": False, "device": "cpu"}
TINY_TRAINING = {**CPU, "patch_size": [32, 32, 16], "max_epochs": 2, "val_interval": 1, "batch_size": 2}
SEGMENTER = {"base_channels": 2, "network_spacing_mm": [6.0, 6.0, 6.0]}
LOCATOR = {"locator_base_channels": 2, "locator_spacing_mm": [8.0, 8.0, 8.0]}
RUNS = BundleRuns("left_atrium_vnet", CPU, {**TINY_TRAINING, **SEGMENTER})
CONFIGS, config, train, evaluate, infer = RUNS.configs, RUNS.config, RUNS.train, RUNS.evaluate, RUNS.infer


def train_locator(dataset_dir: Path, out: Path, **settings: object) -> None:
    """Train into ``out`` and ``out/models``."""
    common = {"dataset_dir": dataset_dir, "output_dir": out, "ckpt_dir": out / "models"}
    RUNS.run("training", "train_locator.json", **{**common, **TINY_TRAINING, **LOCATOR, **settings})


@pytest.fixture(scope="module")
def trained(left_atrium_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the output of the training of a tiny locator and segmenter, and their weights in models/."""
    out = tmp_path_factory.mktemp("trained")
    train_locator(left_atrium_phantom, out)
    train(left_atrium_phantom, out)
    return out


class TestEndToEnd:
    def test_both_trainings_share_their_folders(self, trained: Path) -> None:
        names = ["locator.json", "locator.pt", "model.json", "model.pt"]
        assert sorted(path.name for path in (trained / "models").iterdir()) == names
        names = [f"{name}.{suffix}" for name in ("locator", "training") for suffix in ("ckpt", "config.json", "log")]
        assert sorted(path.name for path in trained.iterdir() if path.is_file()) == names
        assert sorted(p.name.split("_")[0] for p in (trained / "tensorboard").iterdir()) == ["locator", "training"]
        facts = json.loads((trained / "models" / "locator.json").read_text())
        assert facts["knobs"] == {**LOCATOR, "locator_norm": "instance"}

    def test_evaluation_scores_every_case_by_name(
        self, trained: Path, left_atrium_phantom: Path, tmp_path: Path
    ) -> None:
        rows = evaluate(trained, left_atrium_phantom, tmp_path, split="training")
        entries = json.loads((left_atrium_phantom / "datalist.json").read_text())["training"]
        assert [row["case"] for row in rows] == [entry["case"] for entry in entries]
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["cases"] == len(entries)
        assert set(summary["dice"]) == {"mean", "low", "high", "sd", "median", "worst", "n", "left_out", "groups"}
        assert set(summary) >= {"run", "agreement", "probabilities", "surface_dice"}
        assert summary["dice"]["mean"] == pytest.approx(np.mean([float(r["dice"]) for r in rows]), abs=1e-5)
        page = (tmp_path / "report.html").read_text()
        assert all(row["case"] in page for row in rows)

    def test_inference_mirrors_folders_and_keeps_each_grid(
        self, trained: Path, left_atrium_phantom: Path, tmp_path: Path
    ) -> None:
        images = sorted(left_atrium_phantom.rglob("lgemri.nrrd"))
        infer(trained, left_atrium_phantom, tmp_path)
        written = sorted(tmp_path.rglob("*_seg.nrrd"))
        assert [p.relative_to(tmp_path).parent for p in written] == [
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
        rows = table(tmp_path / "inference.csv")
        assert [(row["file"], row["status"]) for row in rows] == [
            (p.relative_to(left_atrium_phantom).as_posix(), "ok") for p in images
        ]

    def test_what_is_written_is_what_the_networks_say(
        self, trained: Path, left_atrium_phantom: Path, tmp_path: Path
    ) -> None:
        """Computed by hand on the axes of the file, without MONAI's transforms, readers and writers."""
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
        network = AttentionVNet(base_channels=2, norm="instance", out_act=None)
        load_weights(network, trained / "models" / "model.pt")
        expected = (inferer(array[None, None], network)[0, 0] > 0).flip(flips)
        infer(trained, left_atrium_phantom / entry["image"], tmp_path, use_locator=False, largest_component=False)
        written = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "lgemri_seg.nrrd"))).transpose(2, 1, 0)
        assert 0 < expected.sum() < expected.numel()
        assert (expected.numpy() != written.astype(bool)).mean() < 1e-4

    @pytest.mark.parametrize(
        ("threshold", "settings", "note"),
        [
            (0.999999, {}, "locator found nothing"),
            (1e-9, {"max_size_mm": 150.0}, "locator found too large an object (192.0 x 192.0 x 96.0 mm)"),
            (1e-9, {"min_size_mm": 100.0}, "locator found too small an object (192.0 x 192.0 x 96.0 mm)"),
        ],
    )
    def test_a_fallback_is_noted(
        self,
        threshold: float,
        settings: dict,
        note: str,
        trained: Path,
        left_atrium_phantom: Path,
        tmp_path: Path,
    ) -> None:
        image = next(left_atrium_phantom.rglob("lgemri.nrrd"))
        infer(trained, image, tmp_path, **{"member_inferer::inferer::inferer::threshold": threshold, **settings})
        (row,) = table(tmp_path / "inference.csv")
        assert row["notes"] == f"{note}: whole volume segmented"
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
        with pytest.raises(InputError) as caught:
            infer(trained, data, tmp_path / "out")
        assert "2 of 3 images failed: bad.nrrd, constant.nii.gz" in str(caught.value)
        rows = {row["file"]: row for row in table(tmp_path / "out" / "inference.csv")}
        assert rows["é/good.nrrd"]["status"] == "ok"
        assert "truncated or damaged" in rows["bad.nrrd"]["notes"]
        assert "is constant (every value is 7)" in rows["constant.nii.gz"]["notes"]
        assert [p.name for p in (tmp_path / "out").rglob("*_seg.*")] == ["good_seg.nrrd"]

    def test_what_the_locator_was_trained_with_counts(
        self, trained: Path, left_atrium_phantom: Path, tmp_path: Path
    ) -> None:
        """Its facts, a note on another spacing, no other architecture, and no run without it."""
        image, locator = next(left_atrium_phantom.rglob("lgemri.nrrd")), trained / "models" / "locator.pt"
        infer(trained, image, tmp_path, locator_spacing_mm=[7.0, 9.0, 8.0])
        (row,) = table(tmp_path / "inference.csv")
        note = "locator_spacing_mm [7.0, 9.0, 8.0] differs from [8.0, 8.0, 8.0], with which locator.pt was trained"
        assert note in row["notes"]
        record = json.loads((tmp_path / "inferring.config.json").read_text())
        assert record["knobs"]["locator_base_channels"] == 2
        assert record["sources"]["locator_base_channels"] == "the facts of locator.pt"
        for settings, message in (
            (
                {"locator_base_channels": 4},
                f"locator_base_channels is 4, but {locator} was trained with locator_base_channels 2",
            ),
            (
                {"locator_weights": tmp_path / "none.pt"},
                f"locator_weights is {tmp_path / 'none.pt'}, but there is no such file",
            ),
        ):
            for command in (infer, evaluate):
                with pytest.raises(InputError) as caught:
                    command(trained, left_atrium_phantom, tmp_path / "o", **settings)
                assert str(caught.value).startswith(message)


class TestReference:
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
        args, args_locator = ({"args_file": str(CONFIGS / f"args_reference{name}.json")} for name in ("", "_locator"))
        # args files count as given by a person, so what makes them small is given to every command
        spacing, small = SEGMENTER["network_spacing_mm"], {"max_epochs": 1, "patch_size": [32, 32, 16]}
        applied = {**args, **LOCATOR, "network_spacing_mm": spacing}
        train_locator(left_atrium_phantom, tmp_path, **args_locator, **small)
        train(left_atrium_phantom, tmp_path, **args, **small)
        rows = evaluate(tmp_path, left_atrium_phantom, tmp_path / "e", **applied)
        infer(tmp_path, left_atrium_phantom, tmp_path / "i", **applied)
        rows += table(tmp_path / "i" / "inference.csv")
        assert len(rows) == 6
        assert not any("trained" in row["notes"] for row in rows)
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


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no datalist", "there is no datalist.json in"),
        ("no label", "entry 0 (image.nii.gz) has no label"),
        ("file missing", "label label.nii.gz does not exist"),
        ("size", "has size (40, 40, 23) but its image"),
        ("geometry", "mm away from its image"),
        ("label values", "contains the label values 7; allowed are 0, 1"),
        ("2D", "has 2 axes (40, 40) but must have 3"),
        ("4D", "has 2 channel(s) but must have 1"),
        ("NaN", "contains NaN or infinite values"),
        ("constant", "is constant (every value is 3)"),
        ("truncated nii.gz", "it is truncated or damaged"),
        ("truncated nrrd", "it is truncated or damaged"),
    ],
)
def test_training_refuses_bad_cases_before_the_first_step(
    fault: str, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_case(tmp_path, fault)
    refuses_to_start(message, tmp_path, caplog, train)


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
        """Patients' names stay in the slices; of a folder with two series, the localiser is left out."""
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
        with caplog.at_level(logging.INFO):
            infer(trained, data, out, use_locator=False, largest_component=False)
        assert re.search(r"Left out: 1 .*PA1/SE2/1", caplog.text)
        rows = {row["file"]: row for row in table(out / "inference.csv")}
        assert {file: row["status"] for file, row in rows.items()} == {
            "PA1/SE.1": "ok",
            "PA1/SE2/cine": "ok",
            "volume.nii.gz": "ok",
        }
        names = ("PA1/SE.1_seg.nii.gz", "volume_seg.nii.gz", "PA1/SE2/cine_seg.nii.gz")
        of_series, of_volume, of_cine = (nib.load(out / name) for name in names)
        np.testing.assert_allclose(of_series.affine, affine @ _counted_back(2, 12), atol=1e-5)
        mask = np.asarray(of_volume.dataobj)
        assert 0.01 < mask.mean() < 0.99
        np.testing.assert_array_equal(np.asarray(of_series.dataobj)[:, :, ::-1], mask)
        np.testing.assert_array_equal(np.asarray(of_cine.dataobj).sum(), mask.sum())

        infer(trained, data / "PA1" / "SE.1", tmp_path / "alone", use_locator=False, largest_component=False)
        assert [row["file"] for row in table(tmp_path / "alone" / "inference.csv")] == ["SE.1"]
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
        train(tmp_path, tmp_path / "out")
        assert (tmp_path / "out" / "models" / "model.pt").is_file()

    @pytest.mark.parametrize(("threshold", "warnings"), [(1e-9, 0), (0.999999, 3)])
    def test_crops_from_the_locator_or_around_the_truth_where_it_finds_nothing(
        self,
        threshold: float,
        warnings: int,
        trained: Path,
        left_atrium_phantom: Path,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        settings = {"max_epochs": 1, "crop_from": "locator", "locator_boxes::threshold": threshold}
        shutil.copytree(trained / "models", tmp_path / "models")
        train(left_atrium_phantom, tmp_path, **settings)
        told = [m for m in caplog.messages if "locator found nothing: the label's box is used for the crop" in m]
        assert len(told) == warnings
        assert all("lgemri.nrrd" in message for message in told)
        record = json.loads((tmp_path / "training.config.json").read_text())
        assert {name: record["knobs"][name] for name in LOCATOR} == LOCATOR  # from its facts

    def test_three_classes_of_ones_own(self, tmp_path: Path) -> None:
        image, label = scene((32, 32, 16))
        label[12:16, 12:16, 6:9] = 2
        volume(tmp_path / "i.nii.gz", image)
        volume(tmp_path / "l.nii.gz", label)
        entry = {"image": "i.nii.gz", "label": "l.nii.gz"}
        (tmp_path / "datalist.json").write_text(json.dumps({"training": [entry] * 2, "validation": [entry]}))
        train(tmp_path, tmp_path / "t", num_classes=3, boundary_weight=0.5)
        (row,) = evaluate(tmp_path / "t", tmp_path, tmp_path / "e", use_locator=False)
        assert {"dice", "dice_1", "dice_2"} <= set(row)


@pytest.mark.samples
@pytest.mark.parametrize(
    ("name", "folder", "settings"), [("lasc18", "lasc18", {"use_locator": False}), ("heart", "Task02_Heart", {})]
)
def test_shipped_weights_segment_real_atria(
    name: str, folder: str, settings: dict, samples: Path, tmp_path: Path
) -> None:
    prepare(get_data_set(name), samples / folder, tmp_path / "data", validation_fraction=1.0)
    RUNS.run("evaluating", RUNS.evaluate_files, dataset_dir=tmp_path / "data", output_dir=tmp_path / "e", **settings)
    rows = table(tmp_path / "e" / "metrics.csv")
    assert len(rows) == len(
        list(samples.glob(f"{folder}/**/laendo.nrrd" if name == "lasc18" else f"{folder}/labelsTr/*"))
    )
    assert min(float(row["dice"]) for row in rows) > 0.5  # loaded, and on fitting input; training has seen them
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
