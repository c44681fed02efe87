from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from bundle_runs import BundleRuns, refuses_to_start, table
from monai.bundle import ConfigParser
from monai.networks.nets import DynUNet
from monai.transforms import SaveImaged
from PIL import Image
from scipy import ndimage

from segbundles.datasets import get_data_set, prepare
from segbundles.errors import InputError
from segbundles.networks import ValidUNet
from segbundles.phantoms.em import make_section

TINY = {
    "window_size": [32, 32],
    "border_pixels": 8,
    "batch_size": 16,
    "mirror_axes": [],
    "quarter_turns": False,
    "amp": False,
    "device": "cpu",
}
TINY_TRAINING = {
    **TINY,
    "base_channels": 4,
    "depth": 3,
    "patch_size": [32, 32],
    "max_epochs": 2,
    "batch_size": 4,
    "learning_rate": 0.02,
    "patches_per_section": 2,
}
RUNS = BundleRuns("em_membrane_unet", TINY, TINY_TRAINING)
CONFIGS, config, train, evaluate, infer = RUNS.configs, RUNS.config, RUNS.train, RUNS.evaluate, RUNS.infer


def parser_of(name: str, args: str | None = None, **settings: object) -> ConfigParser:
    """Parser of a config, with an args file and settings."""
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / name))
    given = {key: value for key, value in config(args).items() if key != "_desc_"} if args else {}
    parser.update({**given, **settings})
    return parser


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
    def test_training_learns(self, trained: Path) -> None:
        best = torch.load(trained / "training.ckpt", weights_only=True)["evaluator"]["best_metric"]
        assert best > 0.85  # a quarter of the pixels is membrane

    def test_evaluation_scores_sections_and_their_cells(self, trained: Path, em_phantom: Path, tmp_path: Path) -> None:
        rows = evaluate(trained, em_phantom, tmp_path, split="training")
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
            "inferring.config.json",
            "measurements.json",
            "preview.html",
            "train-volume_cells.csv",
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

    def test_a_stack_that_is_too_large_is_segmented_from_disk_to_disk(
        self, trained: Path, em_phantom: Path, tmp_path: Path
    ) -> None:
        """The files are the same; only the seconds differ, and the confidence by rounding."""
        stack = tifffile.imread(em_phantom / "train-volume.tif")
        (tmp_path / "in").mkdir()
        tifffile.imwrite(tmp_path / "in/a.tif", np.concatenate([stack] * 3), photometric="minisblack")
        (tmp_path / "in/b.tif").write_bytes(b"II*")
        found, confidences = [], []
        for block in (None, 300):  # 18 pages of 64 x 80 are more than 300 x 300
            out = tmp_path / f"out_{block}"
            with pytest.raises(InputError, match=r"1 of 2 images failed: b\.tif"):
                infer(trained, tmp_path / "in", out, block_pixels=block)
            arrays = [tifffile.imread(out / f"a_{name}.tif") for name in ("seg", "cells")]
            rows = [{k: v for k, v in row.items() if k != "seconds"} for row in table(out / "inference.csv")]
            confidences.append(float(rows[0].pop("confidence")))
            found.append((arrays, rows, (out / "a_cells.csv").read_text(), sorted(p.name for p in out.iterdir())))
            assert "data:image/jpeg" in (out / "preview.html").read_text()
        (arrays, *rest), (others, *other_rest) = found
        assert rest == other_rest
        assert confidences[1] == pytest.approx(confidences[0], abs=1e-4)
        assert len(arrays[0]) == 18
        for one, other in zip(arrays, others, strict=True):
            assert one.dtype == other.dtype
            assert (one == other).all()

    def test_evaluation_scores_the_cells_that_inference_writes(
        self, trained: Path, em_phantom: Path, tmp_path: Path
    ) -> None:
        for watershed in ("probability", "grey"):
            settings = {"watershed": watershed, "min_cell_area": 12}
            rows = evaluate(trained, em_phantom, tmp_path / watershed, split="training", **settings)
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
        """Computed by hand, rows first, each section as one tile, without MONAI's transforms and writers."""
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
        settings = {"smoothing_pixels": 0.0, "marker_threshold": 0.5, "window_size": [64, 64], "border_pixels": 0}
        settings |= {"mirror_axes": [0, 1], "quarter_turns": True} if augmented else {}
        infer(trained, tmp_path / "two.tif", tmp_path / "out", **settings)
        written = tifffile.imread(tmp_path / "out" / "two_seg.tif") > 0
        assert 0.2 < written.mean() < 0.95
        assert (written != expected).mean() < 1e-3

    def test_every_knob_of_an_evaluation_is_recorded_and_in_the_report(
        self, trained: Path, em_phantom: Path, tmp_path: Path
    ) -> None:
        evaluate(trained, em_phantom, tmp_path, marker_threshold=0.3)
        record, page = (tmp_path / name for name in ("evaluating.config.json", "report.html"))
        knobs = json.loads(record.read_text())["knobs"]
        shown = page.read_text()
        known = config("knobs.schema.json")["properties"]
        assert knobs.keys() == known.keys() & (config("train.json").keys() | config("evaluate.json").keys())
        assert (knobs["marker_threshold"], knobs["base_channels"], knobs["split"]) == (0.3, 4, "validation")
        assert [name for name in knobs if f">{name}<" not in shown] == []


class TestPatches:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_each_section_gives_so_many_different_patches_an_epoch(self, workers: int, em_phantom: Path) -> None:
        parser = RUNS.parsed(dataset_dir=str(em_phantom), patches_per_section=3, num_workers=workers, batch_size=5)
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
        parser = RUNS.parsed(dataset_dir=str(em_phantom), context_pixels=context, **chances)
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
        """Image and label start equal: they stay alike, and edges move by the number of pixels that the knob says."""
        parser = RUNS.parsed(dataset_dir=str(em_phantom), elastic_pixels=3.0)
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
        transforms = RUNS.parsed(dataset_dir=str(em_phantom), **settings).get_parsed_content("train::random_transforms")
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


class TestConfigs:
    @pytest.mark.parametrize("watershed", ["probability", "grey"])
    @pytest.mark.parametrize("file", ["section.png", "stack.tif"])
    def test_monai_label_is_given_the_mask(
        self, file: str, watershed: str, trained: Path, section: tuple, tmp_path: Path
    ) -> None:
        """Its server runs the ids of inference.json without the transforms that save, and returns ``pred``."""
        write_png(tmp_path / "section.png", section[0])
        tifffile.imwrite(tmp_path / "stack.tif", np.stack([section[0], section[0][::-1]]), photometric="minisblack")
        infer(trained, tmp_path / file, tmp_path / "out", watershed=watershed)
        (path,) = (tmp_path / "out").glob("*_seg.*")
        written = tifffile.imread(path) if path.suffix == ".tif" else np.asarray(Image.open(path))

        folders = {"bundle_root": str(RUNS.root), "ckpt_dir": str(trained / "models")}
        parser = parser_of("inference.json", **TINY, **folders, watershed=watershed)
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
        # its restoring step removes the channel and compares the rest with this
        assert tuple(data["image"].meta["spatial_shape"]) == pred.shape[1:]
        pages = np.moveaxis(pred[0].numpy(), -1, 0).transpose(0, 2, 1)
        assert ((pages * 255) == written.reshape(pages.shape)).all()
        assert set(np.unique(pages)) == {0, 1}

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
        network = parser_of("train.json", **overrides).get_parsed_content("network_def").eval()
        assert network.filters == widths
        dropouts = {m.p for m in network.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd)}
        assert dropouts == ({0.2} if "dropout" in overrides else set())
        norm = torch.nn.InstanceNorm2d if "norm" in overrides else torch.nn.BatchNorm2d
        assert any(isinstance(m, norm) for m in network.modules())
        if parameters:
            assert sum(p.numel() for p in network.parameters()) == parameters
        network, x = network.double(), torch.rand(1, 1, 32, 32).double()
        with torch.no_grad():
            torch.testing.assert_close(torch.jit.script(network)(x), network(x), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("dice_weight", [0.0, 0.5])
    def test_loss_is_softmax_cross_entropy_with_a_share_of_dice(self, dice_weight: float) -> None:
        logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)  # membrane, cell
        truth = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2)
        right = [1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(-1.0))]
        cross_entropy = -np.mean(np.log(right))
        sums = [right[0] + 1 - right[1], right[1] + 1 - right[0]]
        dice = np.mean([1 - 2 * r / (1 + s) for r, s in zip(right, sums, strict=True)])
        expected = cross_entropy + dice_weight * dice
        loss = parser_of("train.json", dice_weight=dice_weight).get_parsed_content("loss")
        assert loss(logits, truth).item() == pytest.approx(expected, abs=1e-4)

    @pytest.mark.parametrize(
        ("args", "name", "rate", "momentum"),
        [(None, "Adam", 5e-4, None), ("args_sgd.json", "SGD", 1e-3, 0.99), ("args_rmsprop.json", "RMSprop", 1e-4, 0)],
    )
    def test_optimizers_with_their_rates_by_json_alone(
        self, args: str | None, name: str, rate: float, momentum: float | None
    ) -> None:
        optimizer = parser_of("train.json", args).get_parsed_content("optimizer")
        assert (type(optimizer).__name__, optimizer.defaults["lr"]) == (name, rate)
        assert optimizer.defaults.get("momentum") == momentum

    def test_the_published_unet_by_json_alone(self, em_phantom: Path, tmp_path: Path) -> None:
        """64 to 1024 channels, 572 pixels for 388; then small, through all three commands.

        What is written is what the network says of the whole section, mirrored at its borders and nowhere else.
        """
        parser = parser_of("inference.json", "args_valid_unet.json")
        network = parser.get_parsed_content("network_def")
        assert sum(p.numel() for p in network.parameters()) == 31_030_658
        assert network.margin == parser.get_parsed_content("context_pixels") == 92
        assert [n + 2 * 92 for n in parser.get_parsed_content("patch_size")] == [572, 572]
        # an args file counts as given by a person: width and depth are given to every command
        small = {"window_size": [32, 32], "patch_size": [32, 32], "border_pixels": 0, "base_channels": 4, "depth": 3}
        small["args_file"] = str(CONFIGS / "args_valid_unet.json")
        train(em_phantom, tmp_path, **small, max_epochs=1)
        (row,) = evaluate(tmp_path, em_phantom, tmp_path / "e", **small)
        assert row["notes"] == ""

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
        infer(tmp_path, em_phantom, tmp_path / "i", **small, **cut)
        written = tifffile.imread(tmp_path / "i" / "train-volume_seg.tif") > 0
        assert (written != (probability < level)).mean() < 1e-3


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
            ("label values", "contains the label values 7; allowed are 0, 255"),
            ("inverted", "label_values must be 2 stored values, one per class, got [255]"),
            ("colour", "has 3 channel(s) but must have 1: convert colour to grey"),
            ("page size", "l.tif has size (64, 80, 1) but its image"),
            ("page count", "l.tif has 1 pages but "),
            ("page", "has 2 pages, so there is no page 2: pages count from 0"),
            ("label size", "has size (63, 80, 1) but its image"),
            ("NaN", "contains NaN or infinite values"),
            ("blank", "is constant (every value is 7)"),
            ("truncated", "it is truncated or damaged"),
        ],
    )
    def test_training_refuses_bad_cases_before_the_first_step(
        self, fault: str, message: str, section: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_case(tmp_path, fault, section)
        refuses_to_start(message, tmp_path, caplog, train)

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
        with pytest.raises(InputError) as caught:
            infer(trained, data, tmp_path / "out")
        assert str(caught.value).startswith("3 of 5 images failed: ")
        rows = {row["file"]: row for row in table(tmp_path / "out" / "inference.csv")}
        assert set(rows) == {"gut é/a.png", "colour.png", "black.png", "broken.tif", "stack.tif"}
        for file, reason in (
            ("colour.png", "convert colour to grey"),
            ("black.png", "is constant (every value is 0)"),
            ("broken.tif", "truncated or damaged"),
        ):
            assert rows[file]["status"] == "failed"
            assert reason in rows[file]["notes"]
        written = sorted(p.name for p in (tmp_path / "out" / "gut é").iterdir())
        assert written == ["a_cells.csv", "a_cells.tif", "a_seg.png"]
        assert tifffile.imread(tmp_path / "out" / "stack_seg.tif").shape == (3, 80, 64)


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
        right = float(evaluate(trained, em_phantom, tmp_path / "right", split="training")[0]["pixel_accuracy"])
        for name, extra, settings in (
            ("told", {"label_values": [255, 0]}, {}),
            ("knob", {}, {"label_values": [255, 0]}),
            ("wrong", {}, {}),
        ):
            (tmp_path / "datalist.json").write_text(json.dumps({"validation": [{**entries[0], **extra}]}))
            row = evaluate(trained, tmp_path, tmp_path / name, **settings)[0]
            expected = 1 - right if name == "wrong" else right
            assert float(row["pixel_accuracy"]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.samples
def test_shipped_weights_segment_real_sections(samples: Path, tmp_path: Path) -> None:
    prepare(get_data_set("isbi2012"), samples / "isbi2012", tmp_path / "data", validation_fraction=1.0)
    folders = {"dataset_dir": tmp_path / "data", "output_dir": tmp_path / "e"}
    RUNS.run("evaluating", RUNS.evaluate_files, **folders, mirror_axes=[], quarter_turns=False)  # an eighth of the time
    rows = table(tmp_path / "e" / "metrics.csv")
    assert [row["case"] for row in rows] == ["section_00", "section_01"]
    # loaded, and on fitting input; training has seen them
    assert min(float(row["pixel_accuracy"]) for row in rows) > 0.85
    assert min(float(row["v_rand_cells"]) for row in rows) > 0.85


@pytest.mark.samples
def test_real_sections_are_learnt_from_and_come_out_on_their_grid(samples: Path, trained: Path, tmp_path: Path) -> None:
    source = samples / "isbi2012"
    prepare(get_data_set("isbi2012"), source, tmp_path / "data", validation_fraction=0.0)
    train(tmp_path / "data", tmp_path / "t", max_epochs=1, patch_size=[64, 64])
    assert (tmp_path / "t" / "models" / "model.pt").is_file()
    infer(trained, source, tmp_path / "out", window_size=[128, 128])
    shape = tifffile.imread(source / "train-volume.tif").shape
    assert tifffile.imread(tmp_path / "out" / "train-volume_seg.tif").shape == shape
    assert tifffile.imread(tmp_path / "out" / "train-volume_cells.tif").shape == shape
