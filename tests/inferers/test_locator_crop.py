from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset, MetaTensor, list_data_collate
from monai.engines import SupervisedEvaluator
from monai.inferers import SlidingWindowInferer
from monai.transforms import Activationsd, AsDiscreted, Compose, NormalizeIntensity
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from segbundles.inferers import AutocastInferer, LocatorCropInferer, MirrorInferer, autocast
from segbundles.meta import box_of, notes_of
from segbundles.networks import load_if_given, require_weights

# axes permuted and flipped, 2, 0.5 and 1 mm along the array's axes
PERMUTED = torch.tensor([[0.0, -0.5, 0.0, 30.0], [0.0, 0.0, 1.0, -7.0], [-2.0, 0.0, 0.0, 4.0], [0.0, 0.0, 0.0, 1.0]])


class Bright(nn.Module):
    """A locator that sees what is brighter than 0.5: one logit, or two with the background first."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(40.0))
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        logit = self.scale * (x[:, :1] - 0.5)
        return logit if self.channels == 1 else torch.cat([-logit, logit], dim=1)


class Voxelwise(nn.Module):
    """A network that looks at nothing but the voxel itself, and remembers what it saw."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.weight = torch.arange(1.0, channels + 1)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(x.shape))
        weight = self.weight.reshape(-1, *[1] * (x.ndim - 2))
        return 3.0 * weight * x[:, :1] - 1.0


def scene(size, *boxes, noise: float = 0.2, affine: torch.Tensor | None = None) -> MetaTensor:
    """An image with bright boxes (first voxels, last voxels plus one), in shape (1, *size)."""
    image = noise * torch.rand(1, *size, generator=torch.Generator().manual_seed(len(size)))
    for start, end in boxes:
        image[(0, *map(slice, start, end))] += 0.8
    return MetaTensor(image, affine=affine)


def found_box(out: MetaTensor) -> tuple[tuple[int, ...], ...]:
    """The box in the metadata of one image: first voxels, last voxels plus one."""
    return tuple(map(tuple, box_of(out)))


def expected(image: torch.Tensor, start, end, channels: int = 1, background: float = 20.0) -> torch.Tensor:
    """What the two stages must give with :py:class:`Voxelwise` on one image."""
    out = torch.full((channels, *image.shape[1:]), -background)
    if channels > 1:
        out[0] = background
    box = (slice(None), *map(slice, start, end))
    out[box] = Voxelwise(channels)(image[None])[0][box]
    return out


def make(**kwargs) -> LocatorCropInferer:
    return LocatorCropInferer(
        **{"roi_size": 64, "locator": Bright(), "locator_spacing_mm": 1.0, "margin_mm": 0.0, **kwargs}
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("size", "box", "affine"),
    [
        ((37, 29, 23), ((5, 7, 11), (18, 20, 22)), torch.eye(4)),
        ((21, 40, 33), ((0, 4, 3), (7, 40, 20)), PERMUTED),
        ((17, 1, 9), ((2, 0, 4), (9, 1, 9)), torch.eye(4)),
        ((41, 35), ((10, 3), (31, 35)), torch.eye(4)),
    ],
)
def test_pastes_back_exactly(size, box, affine, channels):
    image = scene(size, box, affine=affine)
    spacing = affine[:3, :3].square().sum(0).sqrt()[: len(size)].tolist()
    inferer = make(locator_spacing_mm=spacing)
    out = inferer(image[None], Voxelwise(channels))
    assert found_box(out) == box
    assert notes_of(out) == ""
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[0].as_tensor(), expected(image, *box, channels))
    torch.testing.assert_close(out.affine, affine.double())


@pytest.mark.parametrize(
    ("spacing", "margin_mm", "start", "end"),
    [
        # the object is at 12:20, 16:28, 8:12; margins are rounded up to whole voxels
        ((1.0, 1.0, 1.0), 3.0, (9, 13, 5), (23, 31, 15)),
        ((0.5, 1.0, 2.0), 3.0, (6, 13, 6), (26, 31, 14)),
        ((0.5, 1.0, 2.0), (1.0, 0.0, 5.0), (10, 16, 5), (22, 28, 15)),
        ((0.1, 1.0, 2.0), 0.3, (9, 15, 7), (23, 29, 13)),
        ((1.0, 1.0, 1.0), 100.0, (0, 0, 0), (32, 32, 16)),
    ],
)
def test_margin_in_mm_on_anisotropic_voxels(spacing, margin_mm, start, end):
    affine = torch.diag(torch.tensor([*spacing, 1.0]))
    image = scene((32, 32, 16), ((12, 16, 8), (20, 28, 12)), affine=affine)
    inferer = make(locator_spacing_mm=spacing, margin_mm=margin_mm)
    out = inferer(image[None], Voxelwise())
    assert found_box(out) == (start, end)


def test_box_of_a_coarse_locator_covers_the_coarse_voxels():
    # 30 voxels of 1 mm become 8 of 3.75: the object, 11:19, fills coarse voxels 3 and 4, from 11.25 to 18.75
    image = scene((30, 30, 30), ((11, 11, 11), (19, 19, 19)), noise=0.0)
    inferer = make(locator_spacing_mm=4.0)
    out = inferer(image[None], Voxelwise())
    assert found_box(out) == ((11, 11, 11), (19, 19, 19))


def test_follows_the_largest_component():
    large = ((2, 3, 4), (12, 13, 14))
    inferer = make()
    out = inferer(scene((32, 32, 32), large, ((20, 20, 20), (25, 25, 25)))[None], Voxelwise())
    assert found_box(out) == large


def test_locator_of_several_classes_means_any_but_the_background():
    box = ((2, 3, 4), (12, 13, 14))
    inferer = make(locator=Bright(channels=2))
    out = inferer(scene((20, 20, 20), box)[None], Voxelwise())
    assert found_box(out) == box


@pytest.mark.parametrize(("threshold", "found"), [(0.4, True), (0.6, False)])
def test_threshold_is_a_probability(threshold, found):
    image = MetaTensor(torch.zeros(1, 1, 16, 16, 16))
    image[..., 4:8, 4:8, 4:8] = 0.5  # logit 0, probability 0.5
    inferer = make(threshold=threshold)
    out = inferer(image, Voxelwise())
    assert (notes_of(out) == "") is found


def test_batch_has_a_box_and_a_spacing_for_each_item():
    boxes = [((2, 3, 4), (12, 13, 14)), ((8, 1, 6), (20, 9, 16))]
    affines = [torch.eye(4), torch.diag(torch.tensor([0.5, 1.0, 2.0, 1.0]))]
    images = [scene((24, 20, 18), box, affine=affine) for box, affine in zip(boxes, affines, strict=True)]
    batch = list_data_collate(images)
    inferer = make(margin_mm=1.0, locator_spacing_mm=0.5)
    out = inferer(batch, Voxelwise(2))
    assert [found_box(item) for item in out] == [((1, 2, 3), (13, 14, 15)), ((6, 0, 5), (22, 10, 17))]
    for item, image in zip(out, images, strict=True):
        torch.testing.assert_close(item.as_tensor(), expected(image, *found_box(item), channels=2))


@pytest.mark.parametrize(
    ("arguments", "box", "note"),
    [
        ({}, None, "locator found nothing: whole volume segmented"),
        ({"min_size_mm": 7.0}, ((4, 4, 4), (12, 8, 12)), "locator found too small an object (8.0 x 6.0 x 8.0 mm)"),
        ({"max_size_mm": (9.0, 9.0, 7.0)}, ((4, 4, 4), (12, 8, 12)), "locator found too large an object"),
        ({"min_size_mm": (8.0, 6.0, 8.0), "max_size_mm": 8.0}, ((4, 4, 4), (12, 8, 12)), ""),
    ],
)
@pytest.mark.parametrize("roi_size", [16, 48])
def test_falls_back_to_the_whole_volume(arguments, box, note, roi_size, caplog):
    image = scene((36, 20, 40), *([box] if box else []))
    inferer = make(roi_size=roi_size, input_spacing_mm=(1.0, 1.5, 1.0), locator_spacing_mm=(1.0, 1.5, 1.0), **arguments)
    network = Voxelwise()
    with caplog.at_level(logging.WARNING):
        out = inferer(image[None], network)
    assert notes_of(out).startswith(note)
    assert bool(caplog.records) is bool(note)
    if note:
        box = ((0, 0, 0), (36, 20, 40))
        assert notes_of(out).endswith("whole volume segmented")
        assert caplog.records[0].message == f"image: {notes_of(out)}."
        assert set(network.seen) == {(1, 1, 16, 16, 16) if roi_size == 16 else (1, 1, 48, 32, 48)}
    assert found_box(out) == box
    torch.testing.assert_close(out[0], expected(image, *box))


@pytest.mark.parametrize("track_meta", [True, False])
def test_the_warning_names_the_file(track_meta, caplog):
    found, lost = scene((20, 20, 20), ((4, 4, 4), (12, 8, 12))), scene((20, 20, 20))
    items = [MetaTensor(v, meta={"filename_or_obj": f"p{i}/a.nrrd"}) for i, v in enumerate((lost, found, lost))]
    batch = list_data_collate(items) if track_meta else torch.stack([item.as_tensor() for item in items])
    with caplog.at_level(logging.WARNING):
        make()(batch, Voxelwise())
        make()(items[0][None] if track_meta else batch[:1], Voxelwise())
    names = ["p0/a.nrrd", "p2/a.nrrd", "p0/a.nrrd"] if track_meta else ["image"] * 3
    note = "locator found nothing: whole volume segmented."
    assert [record.message for record in caplog.records] == [f"{name}: {note}" for name in names]


def test_without_locator_the_box_is_the_whole_volume():
    image = scene((20, 24, 18), ((2, 3, 4), (12, 13, 14)))
    inferer = LocatorCropInferer(roi_size=32)
    out = inferer(image[None], Voxelwise())
    assert found_box(out) == ((0, 0, 0), (20, 24, 18))
    assert notes_of(out) == ""
    torch.testing.assert_close(out[0], expected(image, (0, 0, 0), (20, 24, 18)))


@pytest.mark.parametrize("sw_batch_size", [1, 3])
def test_sliding_window_over_the_crop_equals_one_pass(sw_batch_size):
    image = scene((60, 50, 20), ((3, 4, 2), (55, 47, 18)))
    single, windows = Voxelwise(), Voxelwise()
    one = make()(image[None], single)
    many = make(roi_size=(32, 32, 16), sw_batch_size=sw_batch_size)(image[None], windows)
    torch.testing.assert_close(many, one)
    assert single.seen == [(1, 1, 64, 48, 16)]
    assert {shape[1:] for shape in windows.seen} == {(1, 32, 32, 16)}
    assert max(shape[0] for shape in windows.seen) == sw_batch_size


def test_one_pass_while_the_crop_has_no_more_voxels_than_the_window():
    image = scene((80, 20, 20), ((2, 2, 2), (78, 14, 14)))
    network = Voxelwise()
    make(roi_size=32)(image[None], network)  # 80 x 16 x 16 = 20480 <= 32 ** 3
    assert network.seen == [(1, 1, 80, 16, 16)]


class Allocations(TorchDispatchMode):
    """Remembers the storages of all tensors that operations return: address and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[torch.Tensor] = []  # alive, so that no address is used twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.kept += [x for x in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(x, torch.Tensor)]
        return out

    def largest(self, count: int) -> list[int]:
        sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.kept}
        return sorted(sizes.values(), reverse=True)[:count]


def test_memory_beyond_input_and_output_is_that_of_the_crop():
    network = Voxelwise(channels=2)
    image = scene((96, 80, 64), ((40, 32, 20), (60, 48, 32)))[None]
    inferer = make(locator_spacing_mm=4.0, margin_mm=2.0)
    with Allocations() as allocations:
        out = inferer(image, network)
    assert found_box(out) == ((38, 30, 18), (62, 50, 34))
    assert network.seen == [(1, 1, 32, 32, 16)]
    assert allocations.largest(3) == [out.nbytes, image.nbytes, 2 * 4 * 32 * 32 * 16]


def test_network_runs_on_its_own_spacing():
    image = torch.zeros(1, 48, 48, 24)
    ramp = torch.linspace(0.0, 1.0, 48).reshape(1, -1, 1, 1)
    image += ramp
    network = Voxelwise()
    inferer = LocatorCropInferer(roi_size=64, input_spacing_mm=(0.5, 1.0, 2.0), network_spacing_mm=1.0)
    out = inferer(image[None], network)
    assert network.seen == [(1, 1, 32, 48, 48)]  # 24 padded to 32
    inside = slice(1, -1)  # a ramp is kept by averaging and by interpolation, but at its ends
    torch.testing.assert_close(out[0][:, inside], expected(image, (0, 0, 0), (48, 48, 24))[:, inside])


def test_network_spacing_with_locator_keeps_the_box_on_the_input_grid():
    box = ((10, 12, 4), (29, 31, 15))
    inferer = make(network_spacing_mm=0.7)
    out = inferer(scene((40, 40, 20), box)[None], Voxelwise())[0, 0]
    assert found_box(out) == box
    inside = torch.zeros_like(out, dtype=torch.bool)
    inside[tuple(map(slice, *box))] = True
    assert (out[~inside] == -20).all()
    assert (out[inside] > -1).all()


@pytest.mark.parametrize(("axes", "passes"), [((0,), 2), ((0, 2), 4), ((0, 1, 2), 8)])
def test_mirror_images_of_the_crop_are_averaged_as_logits(axes, passes):
    calls = []

    def network(x):  # logit = place along the first axis
        calls.append(x)
        return torch.arange(16.0).reshape(1, 1, -1, 1, 1).expand(1, 1, 16, 16, 16)

    image = torch.rand(1, 1, 16, 16, 16)
    out = MirrorInferer(LocatorCropInferer(roi_size=16), axes)(image, network)
    assert len(calls) == passes
    assert sum(torch.equal(x, image) for x in calls) == 1
    torch.testing.assert_close(out[0, 0, :, 3, 5], torch.full((16,), 7.5))


def test_mirrored_network_of_single_voxels_is_unchanged():
    image = scene((40, 30, 20), ((3, 4, 2), (30, 20, 18)))
    out = MirrorInferer(make(), (0, 1, 2))(image[None], Voxelwise())
    torch.testing.assert_close(out, make()(image[None], Voxelwise()))


def test_transforms_get_the_locator_grid_and_the_crop_and_leave_the_input_alone():
    box = ((4, 4, 4), (20, 20, 20))
    image = 100 * scene((32, 32, 32), box)
    before = image.clone()
    seen = []

    def network(x):
        seen.append(x)
        return x * 1.0

    inferer = make(
        locator_spacing_mm=2.0,
        locator_transform=NormalizeIntensity(subtrahend=[0.0], divisor=[100.0], channel_wise=True),
        crop_transform=NormalizeIntensity(channel_wise=True),  # writes into what it gets
    )
    out = inferer(image[None], network)
    assert found_box(out) == box
    crop = image[(slice(None), *map(slice, *box))]
    torch.testing.assert_close(seen[0][0], (crop - crop.mean()) / crop.std(unbiased=False))
    torch.testing.assert_close(out[0][(slice(None), *map(slice, *box))], seen[0][0])
    assert torch.equal(image, before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float64, torch.bfloat16])
def test_any_input_type_gives_float32(dtype):
    image = (scene((20, 20, 20), ((4, 4, 4), (12, 12, 12)), noise=0.0) * 5).round().to(dtype)
    inferer = make(locator_transform=NormalizeIntensity(subtrahend=0.0, divisor=4.0))
    out = inferer(image[None], Voxelwise())
    assert out.dtype == torch.float32
    assert found_box(out) == ((4, 4, 4), (12, 12, 12))
    assert out[0, 0, 5, 5, 5] == 11.0


@pytest.mark.parametrize("batch_size", [1, 2])
def test_notes_and_boxes_survive_the_evaluator(batch_size):
    images = [scene((20, 20, 20), ((4, 5, 6), (12, 12, 12))), scene((20, 20, 20))]
    cases = [{"image": MetaTensor(image, meta={"filename_or_obj": f"{i}.nrrd"})} for i, image in enumerate(images)]
    inferer = make()
    results = []
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(Dataset(cases), batch_size=batch_size),
        network=Voxelwise(),
        inferer=AutocastInferer(inferer),
        postprocessing=Compose(
            [Activationsd("pred", sigmoid=True), AsDiscreted("pred", threshold=0.5, dtype=torch.uint8)]
        ),
    )
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: results.extend(engine.state.output))
    evaluator.run()
    first, second = (result["pred"] for result in results)
    assert first.meta["filename_or_obj"] == "0.nrrd"
    assert notes_of(first) == ""
    assert box_of(first) == ([4, 5, 6], [12, 12, 12])
    assert first.dtype == torch.uint8
    assert int(first.sum()) == 8 * 7 * 6
    assert second.meta["filename_or_obj"] == "1.nrrd"
    assert notes_of(second) == "locator found nothing: whole volume segmented"
    assert box_of(second) == ([0, 0, 0], [20, 20, 20])
    assert (notes_of(results[1]["image"]), box_of(results[1]["image"])) == ("", None)


@pytest.mark.parametrize("found", [True, False])
def test_single_image_with_a_batch_axis_gets_its_own_note(found):
    # MONAI Label passes image[None], whose affine has no batch axis
    image = scene((20, 20, 20), *([((4, 5, 6), (12, 12, 12))] if found else []))
    out = make()(MetaTensor(image, meta={"original": 1})[None], Voxelwise())[0]
    assert out.meta["original"] == 1
    assert notes_of(out) == ("" if found else "locator found nothing: whole volume segmented")
    assert box_of(out) == (([4, 5, 6], [12, 12, 12]) if found else ([0, 0, 0], [20, 20, 20]))
    assert out.affine.shape == (4, 4)


def test_input_spacing_replaces_that_of_the_header():
    image = scene((20, 20, 20), ((8, 8, 8), (12, 12, 12)))[None]
    inferer = make(input_spacing_mm=0.5, locator_spacing_mm=0.5, margin_mm=1.0)
    out = inferer(image, Voxelwise())
    assert found_box(out) == ((6, 6, 6), (14, 14, 14))
    torch.testing.assert_close(out.affine, image.affine)


def test_no_gradients_and_no_change_of_mode():
    network = nn.Conv3d(1, 1, 1)
    network.train()
    inferer = make(locator=Bright().train())
    out = inferer(scene((20, 20, 20), ((4, 5, 6), (12, 12, 12)))[None], network)
    assert not out.requires_grad
    assert network.training
    assert not inferer.locator.training


def test_runs_locator_and_network_in_bfloat16(monkeypatch):
    monkeypatch.setattr(autocast, "cpu_has_bfloat16", lambda: True)
    dtypes = []

    class Net(nn.Conv3d):
        def forward(self, x):
            x = super().forward(x)
            dtypes.append(x.dtype)
            return x

    inferer = make(locator=Net(1, 1, 1))
    out = AutocastInferer(inferer)(torch.rand(1, 1, 16, 16, 16), Net(1, 2, 1))
    assert dtypes == [torch.bfloat16] * 2
    assert out.dtype == torch.float32


def test_arguments_reach_the_network():
    out = LocatorCropInferer(roi_size=16)(torch.ones(1, 1, 16, 16), lambda x, a, b: a * x + b, 2.0, b=3.0)
    assert out.unique().tolist() == [5.0]


def test_copies_and_pickles():
    image = scene((20, 20, 20), ((4, 5, 6), (12, 12, 12)))[None]
    inferer = make(crop_transform=NormalizeIntensity())
    out = inferer(image, Voxelwise())
    for other in (copy.deepcopy(inferer), pickle.loads(pickle.dumps(inferer))):
        torch.testing.assert_close(other(image, Voxelwise()), out)
        assert other.locator is not inferer.locator


def test_built_from_a_configuration():
    parser = ConfigParser(
        {
            "use_locator": False,
            "locator": {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 1, "kernel_size": 1},
            "inferer": {
                "_target_": "segbundles.inferers.LocatorCropInferer",
                "roi_size": [32, 32, 16],
                "locator": "$@locator if @use_locator else None",
                "locator_spacing_mm": [2.5, 2.5, 1.25],
                "locator_transform": {"_target_": "NormalizeIntensity"},
            },
        }
    )
    inferer = parser.get_parsed_content("inferer")
    assert inferer.locator is None
    assert inferer(torch.rand(1, 1, 20, 20, 10), Voxelwise()).shape == (1, 1, 20, 20, 10)


def test_whole_volume_equals_monai_sliding_window():
    torch.manual_seed(0)
    network = nn.Conv3d(1, 2, 3, padding=1)
    image = torch.rand(1, 1, 48, 32, 48)
    ours = LocatorCropInferer(roi_size=(32, 32, 16), overlap=0.5)(image, network)
    monai = SlidingWindowInferer(roi_size=(32, 32, 16), overlap=0.5, mode="gaussian")(image, network)
    torch.testing.assert_close(ours, monai)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"locator": Bright()}, "locator_spacing_mm is None: give the spacing"),
        ({"locator_spacing_mm": (1.0, 0.0, 1.0)}, r"locator_spacing_mm must be positive, got \(1.0, 0.0, 1.0\)"),
        ({"network_spacing_mm": -1.0}, "network_spacing_mm must be positive, got -1.0"),
        ({"input_spacing_mm": 0}, "input_spacing_mm must be positive, got 0"),
        ({"background_logit": -20.0}, "background_logit must be positive, got -20.0"),
        ({"divisible_k": 0}, "divisible_k must be positive, got 0"),
        ({"margin_mm": -2.0}, "margin_mm must not be negative, got -2.0"),
        ({"threshold": 1.0}, "threshold must be a probability between 0 and 1, got 1.0"),
        ({"roi_size": (32, 40, 16)}, r"roi_size must be positive multiples of divisible_k=16, got \(32, 40, 16\)"),
        ({"roi_size": 0}, "roi_size must be positive multiples of divisible_k=16, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LocatorCropInferer(**{"roi_size": 32, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"roi_size": (32, 32)}, r"roi_size must have 1 or 3 values for a 3D image, got 2: \(32, 32\)"),
        ({"locator_spacing_mm": (1.0, 1.0)}, "locator_spacing_mm must have 1 or 3 values for a 3D image, got 2"),
        ({"network_spacing_mm": (1.0, 1.0)}, "network_spacing_mm must have 1 or 3 values"),
        ({"input_spacing_mm": (1.0, 1.0)}, "input_spacing_mm must have 1 or 3 values"),
        ({"margin_mm": (1.0,) * 4}, "margin_mm must have 1 or 3 values for a 3D image, got 4"),
        ({"min_size_mm": (1.0, 1.0)}, "min_size_mm must have 1 or 3 values"),
        ({"max_size_mm": (1.0, 1.0)}, "max_size_mm must have 1 or 3 values"),
    ],
)
def test_wrong_lengths_are_named_before_any_network_runs(arguments, message):
    network = Voxelwise()
    with pytest.raises(ValueError, match=message):
        make(**arguments)(torch.rand(1, 1, 16, 16, 16), network)
    assert network.seen == []


@pytest.mark.parametrize(
    ("network", "found"),
    [
        (lambda x: x[..., ::2], r"shape \(1, 1, 16, 16, 8\)"),
        (lambda x: [x, x], "list"),
    ],
)
def test_output_that_does_not_fit_is_named(network, found):
    with pytest.raises(ValueError, match=rf"one tensor of its input's spatial size \(16, 16, 16\), got {found}"):
        LocatorCropInferer(roi_size=16)(torch.rand(1, 1, 16, 16, 16), network)


@pytest.mark.parametrize("given", ["weights", "missing", None])
def test_a_config_loads_the_locator_once_and_can_be_read_without_its_weights(given, tmp_path):
    """The wiring of left_atrium_vnet, whose inferer MONAI Label parses by itself."""
    locator = nn.Conv3d(1, 1, 1)
    torch.save(locator.state_dict(), tmp_path / "weights.pt")
    path = given and str(tmp_path / f"{given}.pt")
    parser = ConfigParser(
        {
            "imports": ["$import segbundles"],
            "locator_weights": path,
            "locator_def": {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 1, "kernel_size": 1},
            "locator": "$segbundles.networks.load_if_given(@locator_def, @locator_weights)",
            "inferer": {
                "_target_": "segbundles.inferers.LocatorCropInferer",
                "roi_size": 16,
                "locator": "@locator",
                "locator_spacing_mm": 1.0,
            },
        }
    )
    inferer, image = parser.get_parsed_content("inferer"), torch.rand(1, 1, 16, 16, 16)
    if given == "missing":
        for use in (lambda: inferer(image, Voxelwise()), lambda: require_weights(path)):
            with pytest.raises(ValueError, match=r"^there are no weights at .*missing\.pt: train first"):
                use()
        return
    require_weights(path)
    inferer(image, Voxelwise())
    assert inferer.locator is (parser.get_parsed_content("locator_def") if given else None)
    assert given is None or torch.equal(inferer.locator.weight, locator.weight)
    assert load_if_given(locator, None) is None
