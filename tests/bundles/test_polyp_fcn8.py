from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_runs import BundleRuns, refuses_to_start, table
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, SaveImaged, Transform
from PIL import Image

from segbundles.data import VOID
from segbundles.datasets import get_data_set, prepare
from segbundles.errors import InputError
from segbundles.networks import VGG16FCN
from segbundles.phantoms.polyp import make_phantom, make_sequence

# facts of the weights: not repeated for evaluation and inference
FACTS = {"base_channels": 2, "fc_channels": 4, "fc_kernel_size": 3, "frame_height": 48, "dropout": 0.0}
TINY = {"mirror_axes": [], "amp": False, "device": "cpu"}
TINY_TRAINING = {
    **FACTS,
    **TINY,
    "max_epochs": 2,
    "lr_epochs": 2,
    "val_interval": 1,
    "batch_size": 4,
    "learning_rate": 0.02,
    "patch_size": [32, 32],
}
RUNS = BundleRuns("polyp_fcn8", TINY, TINY_TRAINING)
CONFIGS, EVALUATE = RUNS.configs, RUNS.evaluate_files
config, parsed, bundle_run = RUNS.config, RUNS.parsed, RUNS.run
train, evaluate, infer = RUNS.train, RUNS.evaluate, RUNS.infer
SIZE = (64, 48)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def write_frames(folder: Path, images: list[np.ndarray], labels: list[np.ndarray], suffix: str = ".png") -> None:
    """Write frames (H, W, 3) and masks (H, W), with a datalist that has all of them in training and validation."""
    entries = []
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        for name, array in ((f"{k}.png", image), (f"{k}_mask{suffix}", label)):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / name)
        entries.append({"case": f"case {k}", "image": f"{k}.png", "label": f"{k}_mask{suffix}", "group": "one"})
    (folder / "datalist.json").write_text(json.dumps({"training": entries, "validation": entries}))


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared phantom of five sequences of four frames: three for training, one each for validation and testing."""
    out = tmp_path_factory.mktemp("phantom")
    make_phantom(out, 5, 4, 0, SIZE)
    return out


@pytest.fixture(scope="module")
def trained(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with models/ and the output of a training in which a tiny network has learnt something."""
    out = tmp_path_factory.mktemp("trained")
    # in the phantom, colour is what tells a polyp from its surroundings
    epochs = {"max_epochs": 60, "lr_epochs": 60, "val_interval": 4}
    train(phantom, out, **epochs, learning_rate=0.02, colour_exchange_probability=0.0)
    return out


@pytest.fixture(scope="module")
def frames() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Three frames (H, W, 3) and masks (H, W) that are in no split."""
    image, label = make_sequence(np.random.default_rng(9), SIZE, 3)
    return [image[..., k].T.copy() for k in range(3)], [label[0, ..., k].T.copy() for k in range(3)]


def network_of(trained: Path) -> VGG16FCN:
    network = VGG16FCN(
        base_channels=2, fc_channels=4, fc_kernel_size=3, padding="same", norm="batch", dropout=0.0, bilinear_init=True
    )
    network.load_state_dict(torch.load(trained / "models" / "model.pt", weights_only=True))
    return network.eval()


def logits_of(network: VGG16FCN, frame: np.ndarray) -> np.ndarray:
    """Compute the logits (classes, H, W) of a frame (H, W, 3) without MONAI's transforms, reader and inferer."""
    x = (frame / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    with torch.no_grad():
        return network(torch.as_tensor(x, dtype=torch.float32).permute(2, 1, 0)[None])[0].numpy().transpose(0, 2, 1)


class TestEndToEnd:
    def test_terms_of_the_loss_and_all_pooled_metrics_are_curves(self, trained: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (folder,) = (trained / "tensorboard").iterdir()
        tags = EventAccumulator(str(folder)).Reload().Tags()["scalars"]
        assert {"ce", "dice", "val_jaccard", "val_mean_jaccard", "val_accuracy"} <= set(tags)

    def test_evaluation_scores_frames_sequences_and_the_set(self, trained: Path, phantom: Path, tmp_path: Path) -> None:
        rows = evaluate(trained, phantom, tmp_path, split="training")
        entries = json.loads((phantom / "datalist.json").read_text())["training"]
        assert [(r["case"], r["sequence"]) for r in rows] == [(e["case"], e["group"]) for e in entries]
        network, counts = network_of(trained), {"all": np.zeros(4)}
        for row, entry in zip(rows, entries, strict=True):
            logits = logits_of(network, read(phantom / entry["image"]))
            pred, truth = logits.argmax(0) > 0, read(phantom / entry["label"]) > 127
            matrix = np.array(
                [(~pred & ~truth).sum(), (pred & ~truth).sum(), (~pred & truth).sum(), (pred & truth).sum()]
            )
            for key in ("all", entry["group"]):
                counts[key] = counts.get(key, np.zeros(4)) + matrix
            if truth.any():
                dice = 2 * matrix[3] / (2 * matrix[3] + matrix[1] + matrix[2])
                assert float(row["dice"]) == pytest.approx(dice, abs=2e-3)
            else:
                assert row["status"] in ("empty", "false positive")
        summary = json.loads((tmp_path / "summary.json").read_text())
        n = counts["all"]
        assert summary["pooled_accuracy"] == pytest.approx((n[0] + n[3]) / n.sum(), abs=1e-3)
        jaccard = [n[0] / (n[0] + n[1] + n[2]), n[3] / (n[1] + n[2] + n[3])]
        assert [summary[f"pooled_jaccard_{k}"] for k in (0, 1)] == pytest.approx(jaccard, abs=1e-3)
        assert summary["pooled_jaccard"] == summary["pooled_jaccard_1"]
        assert summary["pooled_mean_jaccard"] == pytest.approx(np.mean(jaccard), abs=1e-3)
        for row in table(tmp_path / "sequences.csv"):
            n = counts[row["sequence"]]
            assert row["frames"] == "4"
            assert float(row["jaccard"] or 0) == pytest.approx(n[3] / max(n[1:].sum(), 1), abs=1e-3)
        page = (tmp_path / "report.html").read_text()
        assert f"{summary['pooled_jaccard']:.3g} (" in page
        assert "sequence_3" in page

    def test_training_watches_the_pooled_jaccard_that_evaluation_gives(
        self, trained: Path, phantom: Path, tmp_path: Path
    ) -> None:
        evaluate(trained, phantom, tmp_path)
        best = torch.load(trained / "training.ckpt", weights_only=True)["evaluator"]["best_metric"]
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["pooled_jaccard"] == pytest.approx(best, abs=5e-3)  # half precision lies between
        entries = json.loads((phantom / "datalist.json").read_text())["validation"]
        polyp = np.mean([(read(phantom / e["label"]) > 127).mean() for e in entries])
        assert best > polyp + 0.05  # better than to call everything a polyp

    def test_a_frame_without_polyp_has_no_dice_or_zero(self, trained: Path, phantom: Path, tmp_path: Path) -> None:
        entries = json.loads((phantom / "datalist.json").read_text())["training"]
        healthy = [e["case"] for e in entries if not read(phantom / e["label"]).any()]
        assert len(healthy) == 4
        state = torch.load(trained / "models" / "model.pt", weights_only=True)
        for sign, status, dice in ((-1, "empty", ""), (1, "false positive", "0")):
            (tmp_path / status / "models").mkdir(parents=True)
            shifted = {**state, "up.bias": torch.tensor([0.0, sign * 1000.0])}
            torch.save(shifted, tmp_path / status / "models" / "model.pt")  # without facts
            settings = {"split": "training", **FACTS}
            rows = {r["case"]: r for r in evaluate(tmp_path / status, phantom, tmp_path / status, **settings)}
            assert {(rows[name]["status"], rows[name]["dice"]) for name in healthy} == {(status, dice)}
            summary = json.loads((tmp_path / status / "summary.json").read_text())
            assert summary["dice"]["n"] == (8 if status == "empty" else 12)

    def test_inference_mirrors_folders_and_leaves_out_the_truth(
        self, trained: Path, phantom: Path, tmp_path: Path
    ) -> None:
        infer(trained, phantom, tmp_path)
        images = sorted((phantom / "Original").iterdir())
        network, values = network_of(trained), set()
        for path in images:
            mask = read(tmp_path / "Original" / f"{path.stem}_seg.png")
            assert mask.shape == SIZE[::-1]
            logits = logits_of(network, read(path))
            assert ((mask > 0) != (logits[1] > logits[0])).mean() < 2e-3
            values |= set(np.unique(mask).tolist())
        assert values == {0, 255}
        assert len(list(tmp_path.rglob("*.png"))) == len(images)
        rows = table(tmp_path / "inference.csv")
        assert {(r["file"], r["status"], r["notes"]) for r in rows} == {
            (f"Original/{p.name}", "ok", "") for p in images
        }

    def test_folders_of_masks_are_left_out_as_prepare_finds_them(
        self, trained: Path, frames: tuple, tmp_path: Path
    ) -> None:
        for folder in ("ground truth", "GroundTruth", "Ground_Truth", "Masks2", "Original"):
            write_frames(tmp_path / "d" / folder, frames[0][:1], frames[1][:1], suffix=".tif")
            (tmp_path / "d" / folder / "0_mask.tif").unlink()
        infer(trained, tmp_path / "d", tmp_path / "o")
        assert [row["file"] for row in table(tmp_path / "o" / "inference.csv")] == ["Original/0.png"]

    def test_frames_are_computed_in_batches_of_one_size(self, trained: Path, phantom: Path, tmp_path: Path) -> None:
        """Each frame gives the same mask as by itself."""
        for batch_size in (1, 16):
            infer(trained, phantom, tmp_path / str(batch_size), batch_size=batch_size)
        masks = [np.stack([read(p) for p in sorted((tmp_path / n).rglob("*.png"))]) for n in ("1", "16")]
        assert (masks[0] != masks[1]).mean() < 1e-4

    @pytest.mark.slow
    def test_mirror_images_of_a_frame_are_segmented_too(self, trained: Path, frames: tuple) -> None:
        network, frame = network_of(trained), frames[0][0]
        parser = ConfigParser()
        parser.read_config(str(CONFIGS / "inference.json"))
        parser.update({**FACTS, **TINY, "mirror_axes": [0, 1]})
        x = torch.as_tensor(frame, dtype=torch.float32).permute(2, 1, 0)[None]
        with torch.no_grad():
            got = parser.get_parsed_content("inferer")(x, network)[0].numpy().transpose(0, 2, 1)
        views = [(), (0,), (1,), (0, 1)]
        logits = [np.flip(logits_of(network, np.flip(frame, v)), [a + 1 for a in v]) for v in views]
        np.testing.assert_allclose(got, np.mean(logits, 0), atol=1e-3)
        assert np.abs(logits[0] - got).max() > 0.01


class TestDraws:
    @staticmethod
    def crops(dataset_dir: Path, epochs: int = 6, **settings: object) -> tuple[torch.Tensor, torch.Tensor]:
        loader = parsed(dataset_dir=str(dataset_dir), **settings).get_parsed_content("train::dataloader")
        torch.manual_seed(0)
        batches = [batch for _ in range(epochs) for batch in loader]
        return tuple(torch.cat([batch[key].as_tensor() for batch in batches]) for key in ("image", "label"))

    def test_crops_about_the_polyp_are_a_setting(self, phantom: Path) -> None:
        """The middle pixel of a crop is polyp, unless the border is too near; a third of the frames have no polyp."""
        shares = {}
        for fraction in (0.0, 1.0):
            _, label = self.crops(phantom, polyp_fraction=fraction, patch_size=[16, 16])
            shares[fraction] = float((label[:, 0, 8, 8] == 1).float().mean())
        assert shares[0.0] < 0.1
        assert shares[1.0] > 0.5

    def test_labels_contain_only_classes_and_images_keep_their_range(self, phantom: Path) -> None:
        image, label = self.crops(phantom, zoom_range=[0.7, 1.4])
        assert set(label.unique().tolist()) == {0.0, 1.0}  # no void from outside the frame
        assert image.dtype == torch.float32
        assert 100 < image.max() < 320
        assert image.shape[1:] == (3, 32, 32)

    def test_without_augmentation_a_crop_is_a_part_of_its_frame(self, phantom: Path) -> None:
        chances = (
            "rotate_degrees",
            "shear_degrees",
            "flip_probability",
            "colour_fraction",
            "colour_exchange_probability",
            "gamma_fraction",
        )
        off = {**dict.fromkeys(chances, 0.0), "zoom_range": [1.0, 1.0], "patch_size": list(SIZE), "batch_size": 1}
        image, label = self.crops(phantom, epochs=1, **off)
        entries = json.loads((phantom / "datalist.json").read_text())["training"]
        stored = {read(phantom / e["image"]).tobytes(): read(phantom / e["label"]) for e in entries}
        for x, y in zip(image, label, strict=True):
            frame = x.round().to(torch.uint8).permute(2, 1, 0).contiguous().numpy()
            np.testing.assert_array_equal(y[0].T > 0, stored[frame.tobytes()] > 127)

    def test_smaller_frames_are_padded_with_void(self, phantom: Path) -> None:
        image, label = self.crops(phantom, epochs=1, patch_size=[96, 96], frame_height=None, zoom_range=[1, 1])
        assert set(label.unique().tolist()) == {0.0, 1.0, float(VOID)}
        assert float((label == VOID).float().mean()) == pytest.approx(1 - 64 * 48 / 96**2)
        assert image[(label == VOID).expand_as(image)].abs().max() < 1e-3

    def test_frames_are_cached_as_eight_bits_at_their_height(self, phantom: Path) -> None:
        cached = parsed(dataset_dir=str(phantom), frame_height=24).get_parsed_content("train::dataset")._cache[0]
        assert {cached[key].dtype for key in ("image", "label")} == {torch.uint8}
        assert (cached["image"].shape, cached["label"].shape) == ((3, 32, 24), (1, 32, 24))

    @staticmethod
    def random_transform(name: str, **settings: object) -> Transform:
        """Return the transform of a name, with its random state set."""
        transforms = parsed(**settings).get_parsed_content("train::random_transforms")
        (found,) = (t for t in transforms if type(t).__name__ == name)
        return found.set_random_state(0)

    def test_turning_moves_the_label_with_the_image(self) -> None:
        """One ramp is image and label, interpolated linearly and by the nearest pixel: both stay alike."""
        affine = self.random_transform("RandAffined")
        for ramp in (torch.arange(64.0)[:, None].expand(64, 48), torch.arange(48.0).expand(64, 48)):
            ramp = ramp[None].contiguous()
            moves = []
            for _ in range(8):
                moved = affine({"image": ramp.clone(), "label": ramp.clone()})
                assert ((moved["label"] - moved["image"]).abs() <= 0.51).all()
                moves.append(float((moved["image"] - ramp).abs().max()))
            assert 8 < max(moves) < 64

    @pytest.mark.parametrize(("smallest", "largest"), [(0.6, 1.6667), (0.9, 1.0), (1.0, 1.0)])
    def test_sizes_are_drawn_between_their_limits_with_the_aspect_kept(self, smallest: float, largest: float) -> None:
        zoom = self.random_transform("RandZoomd", zoom_range=[smallest, largest])
        frame = torch.arange(192.0).expand(256, 192)[None].contiguous()
        sizes = []
        for _ in range(60):
            moved = zoom({"image": frame.clone(), "label": frame.clone()})
            width, height = moved["image"].shape[1:]
            assert width / 256 == pytest.approx(height / 192, abs=0.01)
            assert moved["label"].shape == moved["image"].shape
            assert (moved["label"] - moved["image"]).abs().max() < 1
            sizes.append(height / 192)
        assert smallest - 0.01 <= min(sizes) <= smallest + 0.05
        assert largest - 0.1 <= max(sizes) <= largest + 0.01

    def test_red_green_and_blue_vary_independently(self) -> None:
        """Each changes by a factor of up to 1 +- colour_fraction, so that the hue changes too."""
        scale = self.random_transform("RandScaleIntensityd", colour_fraction=0.2)
        factors = (
            torch.stack([scale({"image": torch.full((3, 4, 4), 100.0)})["image"][:, 0, 0] for _ in range(40)]) / 100
        )
        assert 0.8 <= factors.min() < 0.85
        assert 1.15 < factors.max() <= 1.2
        assert torch.corrcoef(factors.T).abs().fill_diagonal_(0).max() < 0.5

    def test_nothing_is_learnt_from_a_frame_that_is_all_void(self, frames: tuple, tmp_path: Path) -> None:
        images, labels = frames
        write_frames(tmp_path, images, [np.full_like(labels[0], 3), *(label // 255 for label in labels[1:])])
        crops = [self.crops(tmp_path, epochs=4, void_class=3, batch_size=1)[1] for _ in range(2)]
        assert sum(bool((label == VOID).all()) for label in crops[0]) == 4
        assert torch.equal(*crops)
        settings = {"batch_size": 1, "max_epochs": 1, "lr_epochs": 1, "patch_size": [64, 64]}
        train(tmp_path, tmp_path / "t", void_class=3, **settings)
        state = torch.load(tmp_path / "t" / "training.ckpt", weights_only=True)["network"]
        assert all(bool(torch.isfinite(value.float()).all()) for value in state.values())


class TestVoid:
    def test_void_pixels_are_neither_learnt_from_nor_scored(self, frames: tuple, tmp_path: Path) -> None:
        """Twelve rows are void; which value means void makes no difference, so none of it is used as a class."""
        images, labels = frames
        weights, summaries = [], []
        for void in (3, 255):
            masks = [np.where(label > 0, 1, 0).astype(np.uint8) for label in labels]
            for mask in masks:
                mask[:12] = void
            folder = tmp_path / str(void)
            write_frames(folder, images, masks)
            train(folder, folder / "t", void_class=void)
            evaluate(folder / "t", folder, folder / "e", void_class=void)
            weights.append(torch.load(folder / "t" / "training.ckpt", weights_only=True)["network"])
            summaries.append(json.loads((folder / "e" / "summary.json").read_text()))
            summaries[-1].pop("run")
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
        assert summaries[0] == summaries[1]
        network = network_of(tmp_path / "3" / "t")
        right = total = 0
        for image, label in zip(images, labels, strict=True):
            logits = logits_of(network, image)[:, 12:]
            right += int(((logits[1] > logits[0]) == (label[12:] > 0)).sum())
            total += label[12:].size
        assert summaries[1]["pooled_accuracy"] == pytest.approx(right / total, abs=2e-3)

    @pytest.mark.parametrize(("num_classes", "void_class"), [(3, None), (4, None), (3, 3), (4, 3)])
    def test_three_and_four_classes(
        self, num_classes: int, void_class: int | None, frames: tuple, tmp_path: Path
    ) -> None:
        """Use masks like masks3 and masks4 of polyps912; the void class may be one of the classes or above them."""
        images, labels = frames
        masks = [np.where(label > 0, 1, 0).astype(np.uint8) for label in labels]
        for mask in masks:
            mask[:6] = 2
            mask[-6:] = 3 if num_classes == 4 or void_class else 2
        write_frames(tmp_path, images, masks)
        settings = {"num_classes": num_classes, "void_class": void_class}
        train(tmp_path, tmp_path / "t", **settings)
        row = evaluate(tmp_path / "t", tmp_path, tmp_path / "e", void_class=void_class)[0]
        assert {f"dice_{k}" for k in range(1, num_classes)} <= set(row)
        summary = json.loads((tmp_path / "e" / "summary.json").read_text())
        assert f"pooled_jaccard_{num_classes - 1}" in summary
        infer(tmp_path / "t", tmp_path, tmp_path / "i")
        assert len(list((tmp_path / "i").glob("*.png"))) == 3
        step = 255 // (num_classes - 1)
        assert set(np.unique(read(tmp_path / "i" / "0_seg.png")).tolist()) <= {k * step for k in range(num_classes)}

    def test_polyps912_from_the_publishers_layout(self, frames: tuple, tmp_path: Path) -> None:
        images, labels = frames
        source, data = tmp_path / "polyps_split7", tmp_path / "data"
        for k, folder in enumerate(("train", "train", "valid", "test")):
            for name in ("images", "masks4"):
                (source / folder / name).mkdir(parents=True, exist_ok=True)
            mask = np.where(labels[k % 3] > 0, 1, 0).astype(np.uint8)
            mask[:6], mask[-6:] = 2, 3
            noise = np.random.default_rng(k).integers(0, 8, images[k % 3].shape, np.uint8)
            Image.fromarray(images[k % 3] // 2 + noise).save(source / folder / "images" / f"{k}.bmp")
            Image.fromarray(np.roll(mask, k, 1)).save(source / folder / "masks4" / f"{k}.tif")
        prepared = prepare(get_data_set("polyps912", masks="masks4"), source, data)
        void = {"void_class": prepared.datalist["void_class"]}
        train(data, tmp_path / "t", batch_size=2, num_classes=3, **void)
        assert len(evaluate(tmp_path / "t", data, tmp_path / "e", split="testing", **void)) == 1
        summary = json.loads((tmp_path / "e" / "summary.json").read_text())
        assert 0 < summary["pooled_accuracy"] < 1
        assert {"pooled_jaccard_1", "pooled_jaccard_2"} <= set(summary)
        infer(tmp_path / "t", source, tmp_path / "i")
        assert len(list((tmp_path / "i").rglob("*_seg.png"))) == 4


# numbers of the convolutions in torchvision's two files of VGG-16
PLAIN = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
NORMED = [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40]


class TestStart:
    @pytest.fixture
    def vgg(self, tmp_path: Path) -> Path:
        """A file like torchvision's VGG-16 with batch norm, with two channels."""
        generator = torch.Generator().manual_seed(1)
        state, index, above = {}, 0, 3
        for count, width in ((2, 2), (2, 4), (3, 8), (3, 16), (3, 16)):
            for _ in range(count):
                state[f"features.{index}.weight"] = torch.rand(width, above, 3, 3, generator=generator)
                state[f"features.{index}.bias"] = torch.zeros(width)
                state |= {f"features.{index + 1}.{n}": torch.ones(width) for n in ("weight", "running_var")}
                state |= {f"features.{index + 1}.{n}": torch.zeros(width) for n in ("bias", "running_mean")}
                above, index = width, index + 3
            index += 1
        torch.save(state, tmp_path / "vgg.pth")
        return tmp_path / "vgg.pth"

    def test_convolutions_start_from_a_file_of_vgg16(self, vgg: Path, phantom: Path, tmp_path: Path) -> None:
        out = tmp_path / "t"
        # also where --resume true finds nothing to resume
        kept = {"vgg16_weights": vgg, "resume": True, "learning_rate": 1e-30}  # too small to change a weight
        train(phantom, out, max_epochs=1, **kept)
        state = torch.load(out / "training.ckpt", weights_only=True)["network"]
        theirs = torch.load(vgg, weights_only=True)["features.0.weight"]
        assert torch.equal(state["blocks.0.0.conv.weight"], theirs.mT)  # frames are width by height here
        vgg.unlink()  # a resumed run does not need it
        train(phantom, out, max_epochs=2, **kept)
        assert torch.load(out / "training.ckpt", weights_only=True)["trainer"]["epoch"] == 2

    def test_a_file_without_batch_norm_is_fitted_to_the_crops(self, vgg: Path, phantom: Path, tmp_path: Path) -> None:
        state = torch.load(vgg, weights_only=True)
        plain = {}
        for new, old in zip(PLAIN, NORMED, strict=True):
            plain |= {f"features.{new}.{name}": state[f"features.{old}.{name}"] for name in ("weight", "bias")}
        torch.save(plain, vgg)
        parser = parsed(dataset_dir=str(phantom), vgg16_weights=str(vgg))
        parser.get_parsed_content("vgg16_loader")()
        network = parser.get_parsed_content("network_def").state_dict()
        scale = (network["blocks.0.0.adn.N.running_var"] + 1e-5).sqrt()
        assert (scale > 2).all()
        expected = plain["features.2.weight"].mT * scale[:, None, None]
        torch.testing.assert_close(network["blocks.0.1.conv.weight"], expected)

    def test_a_missing_file_is_refused_before_training(self, phantom: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError) as caught:
            train(phantom, tmp_path / "t", vgg16_weights="nowhere.pth")
        assert "there are no VGG-16 weights at nowhere.pth" in str(caught.value)
        assert not [*tmp_path.rglob("*.ckpt"), *tmp_path.rglob("*.pt")]

    def test_imagenet_means_the_published_file(self) -> None:
        source = parsed(vgg16_weights="imagenet").get_parsed_content("vgg16_source")
        assert source == "https://download.pytorch.org/models/vgg16-397923af.pth"
        assert parsed(vgg16_weights="a.pth").get_parsed_content("vgg16_source") == "a.pth"


class TestConfigs:
    @pytest.mark.parametrize(("args", "count"), [(None, 27_831_884), ("args_reference.json", 134_271_436)])
    def test_sizes_of_the_default_and_the_published_network(self, args: str | None, count: int) -> None:
        parser = ConfigParser()
        parser.read_config(str(CONFIGS / "train.json"))
        if args:
            parser.update({k: v for k, v in config(args).items() if k != "_desc_"})
        with torch.device("meta"):
            network = parser.get_parsed_content("network_def")
        assert sum(p.numel() for p in network.parameters()) == count
        if args is None:
            assert sum(v.numel() * 2 for v in network.state_dict().values()) < 64e6

    def test_defaults_are_those_that_two_cores_can_train(self) -> None:
        knobs = config("train.json")
        assert [knobs[k] for k in ("base_channels", "fc_channels", "frame_height", "dropout")] == [64, 512, 192, 0.5]
        assert [knobs[k] for k in ("max_epochs", "lr_epochs", "val_interval", "learning_rate")] == [40, 40, 2, 3e-4]
        assert (knobs["patch_size"], knobs["early_stop_patience"], knobs["crop_borders"]) == ([160, 160], 50, True)
        assert (knobs["zoom_range"], knobs["colour_fraction"]) == ([0.6, 1.6667], 0.2)

    def test_dilation_of_fc6_is_a_setting(self) -> None:
        assert parsed(fc_dilation=3).get_parsed_content("network_def").fc6.conv.dilation == (3, 3)

    def test_settings_of_the_published_system(self) -> None:
        """Adam at 1e-4, batches of 10 crops of 224, frames as they are, cross-entropy, patience 100."""
        args = config("args_reference.json")
        parser = parsed(**{**{k: v for k, v in args.items() if k != "_desc_"}, "base_channels": 2, "fc_channels": 4})
        optimizer, schedule = (parser.get_parsed_content(key) for key in ("optimizer", "lr_scheduler"))
        assert type(optimizer).__name__ == "Adam"
        for _ in range(3):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
            optimizer.step()
            schedule.step()
        loss = parser.get_parsed_content("loss")
        assert (loss.lambda_ce, loss.lambda_dice) == (1.0, 0.0)
        assert (args["batch_size"], args["early_stop_patience"], args["val_interval"]) == (10, 100, 1)
        assert args["frame_height"] is args["norm"] is None
        assert (args["patch_size"], args["crop_borders"], args["dropout"]) == ([224, 224], False, 0.5)
        assert args["base_channels"] == 64
        assert (args["colour_fraction"], args["gamma_fraction"], args["zoom_range"]) == (0.0, 0.0, [0.8, 1.25])
        assert config("args_quickstart.json")["max_epochs"] == config("args_quickstart.json")["lr_epochs"]

    def test_reference_weights_are_trained_by_the_args_file_evaluated_and_applied(
        self, phantom: Path, tmp_path: Path
    ) -> None:
        small = {"args_file": str(CONFIGS / "args_reference.json"), "base_channels": 2, "fc_channels": 4, **TINY}
        common = {"dataset_dir": phantom, "output_dir": tmp_path, "ckpt_dir": tmp_path / "models"}
        bundle_run("training", "train.json", max_epochs=1, patch_size=[32, 32], **common, **small)
        assert len(evaluate(tmp_path, phantom, tmp_path / "e")) == 4
        infer(tmp_path, phantom, tmp_path / "i")
        assert len(list((tmp_path / "i").rglob("*_seg.png"))) == 20

    def test_evaluation_computes_what_inference_does(self) -> None:
        train, evaluate, infer = map(config, ("train.json", "evaluate.json", "inference.json"))
        scored = train["validate"]["inferer"]
        scored["inferer"]["inferer"] = evaluate["validate::inferer::inferer::inferer"]
        assert scored == infer["member_inferer"]
        assert train["validate"]["postprocessing"] == infer["postprocessing"]["transforms"][1]
        assert config("metadata.json")["network_data_format"]["inputs"]["image"]["spatial_shape"] == train["patch_size"]

    def test_a_loss_without_terms_is_refused(self, phantom: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError) as caught:
            train(phantom, tmp_path, ce_weight=0.0, dice_weight=0.0)
        assert "dice_weight" in str(caught.value)

    def test_monai_label_gets_a_mask_of_two_dimensions(self) -> None:
        """MONAI Label removes SaveImaged, and saves the result of the other steps."""
        parser = ConfigParser()
        parser.read_config(str(CONFIGS / "inference.json"))
        parser["preview"] = parser["confidence"] = False  # they need the image too
        steps = [t for t in parser.get_parsed_content("postprocessing").transforms if not isinstance(t, SaveImaged)]
        ramp = torch.linspace(-1, 1, 64 * 48).reshape(64, 48)
        pred = Compose(steps)({"pred": MetaTensor(torch.stack([torch.zeros(64, 48), ramp]))})["pred"]
        assert pred.shape == (64, 48)
        assert torch.equal(pred.as_tensor() > 0, ramp > 0)


def write_case(folder: Path, fault: str, frames: tuple[list[np.ndarray], list[np.ndarray]]) -> None:
    images, labels = ([array.copy() for array in arrays] for arrays in frames)
    if fault == "grey levels":
        labels[0] = (labels[0] // 255 * 7).astype(np.uint8)
    elif fault == "swapped":
        labels[0] = np.where(labels[0] > 0, 1, 0).astype(np.uint8)
        labels[0][:3] = 255
    elif fault == "colour mask":
        labels[0] = np.stack([labels[0], 255 - labels[0], labels[0]], -1)
    elif fault == "mask size":
        labels[0] = labels[0][:-1]
    elif fault == "thin":
        images[0], labels[0] = images[0][:, :1], labels[0][:, :1]
    write_frames(folder, images, labels)
    path = folder / "datalist.json"
    datalist = json.loads(path.read_text())
    if fault == "no datalist":
        path.unlink()
    elif fault == "file missing":
        (folder / "0_mask.png").unlink()
    elif fault == "no label":
        del datalist["training"][2]["label"]
        path.write_text(json.dumps(datalist))
    elif fault == "truncated":
        (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:300])


class TestBadInput:
    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("no datalist", "there is no datalist.json in"),
            ("no label", "entry 2 (2.png) has no label"),
            ("file missing", "label 0_mask.png does not exist"),
            ("mask size", "0_mask.png has size (64, 47) but its image"),
            (
                "grey levels",
                "0_mask.png contains the values 7; allowed are the class indices 0, 1, or grey levels with some",
            ),
            ("swapped", "0_mask.png contains 0, 1 and 255: set void_class to 255 if 255 should be ignored"),
            ("colour mask", "0_mask.png: it is in colour: a mask must be grey, with one channel"),
            ("thin", "0.png: it has 1 x 48 pixels but each side must have at least 16"),
            ("truncated", "0.png: it is truncated or damaged"),
        ],
    )
    def test_training_refuses_it_before_the_first_step(
        self, fault: str, message: str, frames: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_case(tmp_path, fault, frames)
        refuses_to_start(message, tmp_path, caplog, train)

    def test_bad_frames_do_not_stop_the_others(self, trained: Path, frames: tuple, tmp_path: Path) -> None:
        data = tmp_path / "data with spaces" / "patiente é"
        data.mkdir(parents=True)
        image = Image.fromarray(frames[0][0])
        image.save(data / "a.jpg")
        image.save(data / "good 1.jpg", quality=95)
        image.save(data / "z.png")
        (data / "a.jpg").write_bytes((data / "a.jpg").read_bytes()[:-400])
        (data / "b.jpeg").write_bytes(b"no picture at all")
        Image.fromarray(frames[0][0][:, :1]).save(data / "c.png")
        (data / "d.bmp").write_bytes(b"")
        with pytest.raises(InputError) as caught:
            infer(trained, data.parent, tmp_path / "out")
        assert str(caught.value).startswith("4 of 6 images failed: patiente é/a.jpg, ")
        rows = {row["file"]: row for row in table(tmp_path / "out" / "inference.csv")}
        for file, reason in (
            ("a.jpg", "truncated"),
            ("b.jpeg", "truncated or damaged"),
            ("c.png", "has 1 x 48 pixels but each side must have at least 16"),
            ("d.bmp", "truncated or damaged"),
        ):
            assert rows[f"patiente é/{file}"]["status"] == "failed"
            assert reason in rows[f"patiente é/{file}"]["notes"]
        assert sorted(p.name for p in (tmp_path / "out" / "patiente é").iterdir()) == ["good 1_seg.png", "z_seg.png"]


class TestUnusualInput:
    def test_a_tiff_gives_the_mask_of_the_same_colours_in_png(
        self, trained: Path, frames: tuple, tmp_path: Path
    ) -> None:
        """A palette, and grey in which 0 is white."""
        import tifffile

        data = tmp_path / "d"
        for folder in ("palette", "grey"):
            (data / folder).mkdir(parents=True)
        few = Image.fromarray(frames[0][0]).quantize(64)
        for name in ("a.png", "b.tif"):
            few.save(data / "palette" / name)
        grey = np.asarray(Image.fromarray(frames[0][0]).convert("L"))
        Image.fromarray(grey).save(data / "grey" / "a.png")
        tifffile.imwrite(data / "grey" / "b.tif", 255 - grey, photometric="miniswhite")
        infer(trained, data, tmp_path / "o")
        for folder in ("palette", "grey"):
            masks = [read(tmp_path / "o" / folder / f"{name}_seg.png") for name in "ab"]
            assert (masks[0] != masks[1]).mean() < 1e-3, folder

    def test_formats_and_channels_give_the_same_mask(self, trained: Path, frames: tuple, tmp_path: Path) -> None:
        """Grey becomes three channels, alpha is dropped, 16 bits are scaled, with a note; palettes are converted."""
        import tifffile

        image = frames[0][0]
        grey = np.asarray(Image.fromarray(image).convert("L"))
        data = tmp_path / "d"
        (data / "rgb").mkdir(parents=True)
        (data / "grey").mkdir()
        alpha = np.full((*grey.shape, 1), 80, np.uint8)
        Image.fromarray(image).save(data / "rgb" / "a.png")
        Image.fromarray(np.concatenate([image, alpha], -1)).save(data / "rgb" / "alpha.png")
        Image.fromarray(image).save(data / "rgb" / "b.bmp")
        tifffile.imwrite(data / "rgb" / "c.tif", image, photometric="rgb")
        tifffile.imwrite(data / "rgb" / "wide.tiff", image.astype(np.uint16) * 257, photometric="rgb")
        Image.fromarray(np.repeat(grey[..., None], 3, -1)).save(data / "grey" / "a.png")
        Image.fromarray(grey).save(data / "grey" / "grey.png")
        Image.fromarray(np.concatenate([grey[..., None], alpha], -1)).save(data / "grey" / "la.png")
        Image.fromarray(grey).convert("P").save(data / "grey" / "palette.png")
        Image.fromarray(grey.astype(np.uint16) * 257).save(data / "grey" / "wide.png")
        infer(trained, data, tmp_path / "o")
        for folder in ("rgb", "grey"):
            masks = [read(path) for path in sorted((tmp_path / "o" / folder).iterdir())]
            assert len(masks) == 5
            assert max((mask != masks[0]).mean() for mask in masks) < 1e-3, folder
        notes = {row["file"]: row["notes"] for row in table(tmp_path / "o" / "inference.csv")}
        assert notes["rgb/alpha.png"] == "alpha channel dropped"
        assert notes["rgb/wide.tiff"] == "16 bits: scaled to 8"
        assert notes["grey/grey.png"] == "grey: used for all 3 colours"
        assert notes["grey/la.png"] == "alpha channel dropped; grey: used for all 3 colours"
        assert notes["grey/wide.png"] == "16 bits: scaled to 8; grey: used for all 3 colours"
        assert notes["rgb/a.png"] == notes["rgb/b.bmp"] == notes["rgb/c.tif"] == ""

    @pytest.mark.parametrize("size", [(16, 16), (17, 90), (101, 33), (640, 360)])
    def test_frames_of_any_size_are_segmented_and_learnt_from(self, size: tuple, trained: Path, tmp_path: Path) -> None:
        image = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        label = np.zeros(size[::-1], np.uint8)
        label[4:12, 4:12] = 255
        write_frames(tmp_path / "d", [image, image], [label, label])
        infer(trained, tmp_path / "d" / "0.png", tmp_path / "o", frame_height=None)
        assert read(tmp_path / "o" / "0_seg.png").shape == size[::-1]
        train(tmp_path / "d", tmp_path / "t", max_epochs=1, lr_epochs=1)
        assert math.isfinite(
            torch.load(tmp_path / "t" / "training.ckpt", weights_only=True)["evaluator"]["best_metric"]
        )

    def test_a_frame_of_another_scale_gives_the_same_polyp(self, trained: Path, frames: tuple, tmp_path: Path) -> None:
        """All frames are scaled to one height, or at most to max_pixels."""
        image = Image.fromarray(frames[0][0])
        (tmp_path / "d").mkdir()
        image.save(tmp_path / "d" / "one.png")
        image.resize((256, 192), Image.Resampling.BICUBIC).save(tmp_path / "d" / "four.png")
        infer(trained, tmp_path / "d", tmp_path / "o")
        one, four = (read(tmp_path / "o" / f"{name}_seg.png") > 0 for name in ("one", "four"))
        assert four.shape == (192, 256)
        small = four.reshape(48, 4, 64, 4).mean((1, 3)) > 0.5
        assert 2 * (small & one).sum() / (small.sum() + one.sum()) > 0.9
        infer(trained, tmp_path / "d", tmp_path / "limited", frame_height=None, max_pixels=64 * 48)
        limited = read(tmp_path / "limited" / "four_seg.png") > 0
        assert (limited != four).mean() < 1e-3
        notes = {row["file"]: row["notes"] for row in table(tmp_path / "limited" / "inference.csv")}
        height = "frame_height null differs from 48, with which model.pt was trained"
        reduced = "computed at 64 x 48 pixels, as max_pixels is 3072"
        assert notes == {"one.png": height, "four.png": f"{reduced}; {height}"}

    def test_black_borders_make_no_difference(self, trained: Path, frames: tuple, tmp_path: Path) -> None:
        """The part inside them is scaled to frame_height; with them, a polyp would be smaller than in training."""
        (tmp_path / "d").mkdir()
        Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(tmp_path / "d" / "black.png")
        Image.fromarray(frames[0][0]).save(tmp_path / "d" / "plain.png")
        Image.fromarray(np.pad(frames[0][0], ((24, 24), (32, 32), (0, 0)))).save(tmp_path / "d" / "borders.png")
        masks = {}
        for crop in (True, False):
            infer(trained, tmp_path / "d", tmp_path / str(crop), crop_borders=crop)
            masks[crop] = {path.stem: read(path) for path in (tmp_path / str(crop)).glob("*.png")}
            assert {row["status"] for row in table(tmp_path / str(crop) / "inference.csv")} == {"ok"}
        whole, plain = (masks[True][f"{name}_seg"] for name in ("borders", "plain"))
        assert whole.shape == (96, 128)
        inside = whole[24:-24, 32:-32]
        assert (inside != plain).mean() < 2e-3
        assert 0.02 < (plain > 0).mean() < 0.8
        assert (whole > 0).sum() == (inside > 0).sum()
        assert (masks[False]["borders_seg"][24:-24, 32:-32] != plain).mean() > 0.01

    def test_training_crops_black_borders_and_scores_include_them(
        self, trained: Path, frames: tuple, tmp_path: Path
    ) -> None:
        images, labels = frames
        write_frames(tmp_path / "plain", images, labels)
        wide = ((24, 24), (32, 32))
        write_frames(tmp_path / "wide", [np.pad(i, (*wide, (0, 0))) for i in images], [np.pad(a, wide) for a in labels])
        cached = [
            parsed(dataset_dir=str(tmp_path / name)).get_parsed_content("train::dataset")._cache
            for name in ("plain", "wide")
        ]
        for one, other in zip(*cached, strict=True):
            assert torch.equal(one["image"], other["image"])
            assert torch.equal(one["label"], other["label"])
        rows = [evaluate(trained, tmp_path / name, tmp_path / f"{name}_e") for name in ("plain", "wide")]
        dice = [[float(row["dice"]) for row in r] for r in rows]
        assert dice[0] == pytest.approx(dice[1], abs=5e-3)

    def test_frames_of_mixed_sizes_share_batches(self, trained: Path, frames: tuple, tmp_path: Path) -> None:
        """Each frame gives the same mask as by itself."""
        (tmp_path / "d").mkdir()
        for k in range(6):
            image = Image.fromarray(frames[0][k % 3])
            (image.resize((96, 72)) if k % 2 else image).save(tmp_path / "d" / f"{k}.png")
        for batch_size in (1, 3):
            infer(trained, tmp_path / "d", tmp_path / str(batch_size), batch_size=batch_size)
        for k in range(6):
            masks = [read(tmp_path / str(n) / f"{k}_seg.png") for n in (1, 3)]
            assert masks[0].shape == ((72, 96) if k % 2 else (48, 64))
            assert (masks[0] != masks[1]).mean() < 1e-3

    def test_masks_with_jpeg_artefacts_are_taken_above_127(self, frames: tuple, tmp_path: Path) -> None:
        images, labels = frames
        write_frames(tmp_path / "jpeg", images, labels, suffix=".jpg")
        assert len(np.unique(read(tmp_path / "jpeg" / "0_mask.jpg"))) > 2
        dataset = parsed(dataset_dir=str(tmp_path / "jpeg")).get_parsed_content("validate::dataset")
        for case, label in zip(dataset, labels, strict=True):
            assert set(case["label"].unique().tolist()) == {0, 1}
            assert ((case["label"][0].numpy().T > 0) != (label > 0)).mean() < 0.005


@pytest.mark.samples
def test_shipped_weights_segment_a_real_sequence(samples: Path, tmp_path: Path) -> None:
    prepare(get_data_set("clinicdb"), samples / "CVC-ClinicDB", tmp_path / "data", validation_fraction=1.0)
    bundle_run("evaluating", EVALUATE, dataset_dir=tmp_path / "data", output_dir=tmp_path / "e")
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert summary["cases"] == 22
    assert summary["pooled_jaccard"] > 0.5  # loaded, and on fitting input; training has seen them


@pytest.mark.samples
def test_real_frames_are_learnt_from_and_come_out_on_their_grid(samples: Path, trained: Path, tmp_path: Path) -> None:
    prepare(get_data_set("clinicdb"), samples / "CVC-ClinicDB", tmp_path / "data", validation_fraction=0.0)
    train(tmp_path / "data", tmp_path / "t", max_epochs=1, lr_epochs=1, frame_height=144, patch_size=[96, 96])
    assert (tmp_path / "t" / "models" / "model.pt").is_file()
    infer(trained, samples / "CVC-ClinicDB", tmp_path / "o")
    masks = list((tmp_path / "o" / "Original").glob("*_seg.png"))
    assert len(masks) == 22
    assert {read(path).shape for path in masks} == {(288, 384)}
