from __future__ import annotations

import json
import math
import pickle
import socket
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from ignite.engine import Events
from monai.data import CacheDataset, DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedTrainer
from monai.transforms import (
    CastToTyped,
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    MapTransform,
    RandFlipd,
    RandScaleIntensityd,
)
from torch.utils.data import RandomSampler, WeightedRandomSampler

from segbundles.data import (
    Datalist,
    FolderImages,
    SliceDataset,
    SliceStacks,
    StackReader,
    lesion_weights,
    slice_sampler,
)
from segbundles.handlers.training import EpochSeed
from segbundles.meta import has_spacing

# ---------------------------------------------------------------------------------------------------------- SliceStacks


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def slices(group, *numbers, **more):
    return [
        {"image": f"{group}_{n}.tif", "label": f"{group}_{n}_mask.tif", "group": group, "slice": n, **more}
        for n in numbers
    ]


def test_a_patients_slices_are_one_case_in_the_order_of_slice():
    entries = [*slices("p1", 10, 2), *slices("p2", 1), *slices("p1", 1)]
    for area, entry in enumerate(entries):
        entry |= {"lesion_area": area, "case": f"slice {area}", "site": "A", "scanner": area, "age": [4, 5]}
    assert SliceStacks(entries).cases == [
        {
            "case": "p1",
            "group": "p1",
            "image": ["p1_1.tif", "p1_2.tif", "p1_10.tif"],
            "label": ["p1_1_mask.tif", "p1_2_mask.tif", "p1_10_mask.tif"],
            "slice": [1, 2, 10],
            "lesion_area": [3, 1, 0],
            "site": "A",
            "age": [4, 5],
        },
        {
            "case": "p2",
            "group": "p2",
            "image": ["p2_1.tif"],
            "label": ["p2_1_mask.tif"],
            "slice": [1],
            "lesion_area": [2],
            "site": "A",
            "scanner": 2,
            "age": [4, 5],
        },
    ]
    assert entries[0]["image"] == "p1_10.tif"


@pytest.mark.parametrize(
    ("entries", "order"),
    [
        ([("b_1.png", 7), ("a_2.png", 3)], ["a_2.png", "b_1.png"]),  # slice before number
        ([("x_10.png", 1), ("x_9.png", None)], ["x_9.png", "x_10.png"]),  # number, as not all have a slice
        ([("x_10.png", None), ("x_9.jpg", None), ("x_011.bmp", None)], ["x_9.jpg", "x_10.png", "x_011.bmp"]),
        ([("b.png", None), ("a_2.png", None), ("a_10.png", None)], ["a_10.png", "a_2.png", "b.png"]),  # by name
    ],
)
def test_order_of_a_group(entries, order):
    cases = [{"image": name, "group": 3} | ({} if s is None else {"slice": s}) for name, s in entries]
    (stack,) = SliceStacks(cases)
    assert stack["image"] == order
    assert stack["case"] == "3"
    assert "label" not in stack
    assert ("slice" in stack) == all(s is not None for _, s in entries)


def test_images_of_a_folder_by_name_and_number(tmp_path):
    touch(tmp_path, "p1/a_1.tif", "p1/a_10.tif", "p1/a_2.tif", "p1/b_1.png", "p1/b.png", "p2/a_3.tif", "p2/c_x.jpg")
    stacks = SliceStacks(FolderImages(tmp_path))
    assert [(case["case"], [Path(p).name for p in case["image"]]) for case in stacks] == [
        ("p1/a", ["a_1.tif", "a_2.tif", "a_10.tif"]),
        ("p1/b", ["b.png"]),
        ("p1/b", ["b_1.png"]),
        ("p2/a", ["a_3.tif"]),
        ("c_x", ["c_x.jpg"]),
    ]
    assert all(Path(p).parent.parent == tmp_path for case in stacks for p in case["image"])


def test_volumes_and_tiffs_of_several_pages_pass_as_they_are(tmp_path):
    tifffile.imwrite(tmp_path / "m_1.tif", np.zeros((2, 4, 4), np.uint8), photometric="minisblack")
    tifffile.imwrite(tmp_path / "m_2.tif", np.zeros((4, 4), np.uint8))
    entries = [
        {"image": "x_1.nii.gz", "group": "p"},
        {"image": "x_2.NRRD", "group": "p", "label": "l.nrrd"},
        {"image": str(tmp_path / "m_1.tif"), "group": "p"},
        {"image": ["a.png", "b.png"], "group": "p"},
    ]
    tifffile.imwrite(
        tmp_path / "m_3.tif", np.zeros((2, 4, 4), np.uint8), imagej=True, metadata={"axes": "ZYX"}, truncate=True
    )
    entries.append({"image": str(tmp_path / "m_3.tif"), "group": "p"})  # two pages, one directory
    page = {"image": str(tmp_path / "m_2.tif"), "group": "p"}
    stacks = SliceStacks([*entries, page]).cases
    assert stacks[:5] == entries
    assert stacks[5]["image"] == [page["image"]]


def test_channels_and_thumbnails_are_not_slices(tmp_path):
    tifffile.imwrite(tmp_path / "p_1.tif", np.zeros((3, 8, 8), np.uint8), imagej=True, metadata={"axes": "CYX"})
    with tifffile.TiffWriter(tmp_path / "p_2.tif") as file:
        file.write(np.zeros((8, 8), np.uint8))
        file.write(np.zeros((4, 4), np.uint8), subfiletype=1)
    (stack,) = SliceStacks(FolderImages(tmp_path))
    assert stack["image"] == [str(tmp_path / "p_1.tif"), str(tmp_path / "p_2.tif")]


def test_tiffs_with_pages_are_channels_and_others_are_slices(tmp_path):
    pages = np.arange(2 * 3 * 8 * 6, dtype=np.uint8).reshape(2, 3, 8, 6)
    for channel, pixels in enumerate(pages):
        tifffile.imwrite(tmp_path / f"c{channel}.tif", pixels, photometric="minisblack")
        tifffile.imwrite(tmp_path / f"s{channel}.tif", pixels[0])
    reader = StackReader()
    image, meta = reader.get_data(reader.read([tmp_path / "c0.tif", tmp_path / "c1.tif"]))
    assert (image == pages.transpose(3, 2, 1, 0)).all()
    assert not has_spacing(meta)
    stack, _ = reader.get_data(reader.read([tmp_path / "s0.tif", tmp_path / "s1.tif"]))
    assert (stack == pages[:, 0].transpose(2, 1, 0)).all()
    tifffile.imwrite(tmp_path / "c2.tif", pages[0, :2], photometric="minisblack")
    with pytest.raises(ValueError, match=r"c2.tif and .*c0.tif are channels of one image but differ in size"):
        reader.get_data(reader.read([tmp_path / "c0.tif", tmp_path / "c2.tif"]))


def test_files_are_read_at_first_use_only(tmp_path):
    root = tmp_path / "later"
    stacks = SliceStacks(Datalist(root))
    pickle.loads(pickle.dumps(stacks))
    assert isinstance(stacks, Sequence)
    touch(root, "p_1.tif", "p_1_mask.tif", "p_2.tif", "p_2_mask.tif")
    (root / "datalist.json").write_text(json.dumps({"training": slices("p", 2, 1)}))
    assert len(stacks) == 1
    assert stacks[0]["image"] == [str(root / "p_1.tif"), str(root / "p_2.tif")]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [*slices("p", 1, 2), {"image": "p_3.tif", "group": "p", "slice": 3}],
            "p_3.tif has no label but other slices of p have one: add it, or leave this slice out.",
        ),
        (
            [*slices("p", 1), *slices("p", 1, image="q_1.tif")],
            "p_1.tif and q_1.tif are both slice 1 of p: renumber them, or give each stack its own group",
        ),
        ([{"image": "d/a_1.png"}, {"image": "d/a_01.png"}], "d/a_1.png and d/a_01.png are both slice 1 of a"),
        ([{"image": "a_1.png"}] * 2, "a_1.png and a_1.png are both slice 1 of a"),
    ],
)
def test_faulty_stacks(entries, message, caplog):
    with pytest.raises(ValueError, match="^" + message.replace(".", r"\.")):
        len(SliceStacks(entries))
    assert len(caplog.records) == 1


# --------------------------------------------------------------------------------------------------------- SliceDataset

AREAS = [[0, 2, 1], [3], [0, 0]]  # foreground pixels of the slices of three volumes


def volumes(dtype=torch.float16):
    """Value 100 * volume + slice at every pixel, and labels with as many foreground pixels as ``AREAS`` says."""
    items = []
    for v, areas in enumerate(AREAS):
        depth = len(areas)
        image = torch.zeros(3, 4, 5, depth, dtype=dtype) + 100 * v + torch.arange(depth)
        label = torch.zeros(1, 4, 5, depth, dtype=torch.uint8)
        for s, area in enumerate(areas):
            label[0].reshape(20, depth)[:area, s] = v + 1
        affine = torch.tensor([[-1.0, 0, 0, 7], [0, -1, 0, 8], [0, 0, 2.5, 9], [0, 0, 0, 1]])
        meta = {"filename_or_obj": f"v{v}.nii"}
        if v == 0:
            meta |= {"filename_or_obj": "v0_0.tif", "slices": "v0_0.tif\nv0_1.tif\nv0_2.tif"}
        image, label = (MetaTensor(x, affine=affine, meta=dict(meta)) for x in (image, label))
        items.append({"image": image, "label": label, **({} if v == 1 else {"case": f"p{v}"})})
    return items


class Add(MapTransform):
    """In place, as some transforms work."""

    def __call__(self, data):
        for key in self.key_iterator(data):
            data[key] += 1
        return data


class Count(MapTransform):
    calls = 0

    def __call__(self, data):
        Count.calls += 1
        return data


def test_items_are_the_slices_of_all_volumes():
    dataset = SliceDataset(CacheDataset(volumes(), Compose([]), progress=False))
    assert len(dataset) == 6
    items = [dataset[i] for i in range(6)]
    assert [(item["case"], item["slice"]) for item in items] == [
        ("p0", 0),
        ("p0", 1),
        ("p0", 2),
        ("v1.nii", 0),
        ("p2", 0),
        ("p2", 1),
    ]
    assert [item["image"].unique().tolist() for item in items] == [[0], [1], [2], [100], [200], [201]]
    assert {item["image"].shape for item in items} == {(3, 4, 5)}
    assert {item["label"].shape for item in items} == {(1, 4, 5)}
    assert {item["image"].dtype for item in items} == {torch.float16}
    assert [int((item["label"] > 0).sum()) for item in items] == [0, 2, 1, 3, 0, 0]
    np.testing.assert_array_equal(dataset.lesion_areas, [0, 2, 1, 3, 0, 0])
    assert dataset.lesion_areas.dtype == np.float64
    assert [item["image"].meta["filename_or_obj"] for item in items[1:4]] == ["v0_1.tif", "v0_2.tif", "v1.nii"]
    assert items[2]["image"].affine[:3, 3].tolist() == [7, 8, 9 + 2 * 2.5]
    assert dataset[-1]["image"][0, 0, 0] == 201
    for index in (6, -7):
        with pytest.raises(IndexError, match=f"slice {index} of a dataset of 6 slices"):
            dataset[index]


def test_plain_tensors():
    items = [{key: item[key].as_tensor() for key in ("image", "label")} for item in volumes()]
    dataset = SliceDataset(Dataset(items))
    assert type(dataset[4]["image"]) is torch.Tensor
    assert (dataset[4]["case"], dataset[4]["slice"]) == ("2", 0)


def test_a_cache_stays_as_it_is():
    cache = CacheDataset(volumes(torch.float32), Compose([CastToTyped("image", torch.float32)]), progress=False)
    before = [cache[v]["image"].clone() for v in range(3)]
    dataset = SliceDataset(cache, Compose([Add(["image", "label"])]))
    for _ in range(2):
        assert [dataset[i]["image"].max().item() for i in range(6)] == [1, 2, 3, 101, 201, 202]
    for v in range(3):
        assert torch.equal(cache[v]["image"], before[v])
        assert "slice" not in cache[v]
    assert dataset.lesion_areas.tolist() == [0, 2, 1, 3, 0, 0]


def test_each_volume_is_loaded_once_for_the_count():
    Count.calls = 0
    dataset = SliceDataset(Dataset(volumes(), Count("image")))
    assert Count.calls == 0
    assert len(dataset) == 6
    assert dataset.lesion_areas.sum() == 6
    assert Count.calls == 3


@pytest.mark.parametrize(
    ("entry", "areas", "calls"),
    [
        ({"image": ["a", "b", "c"], "lesion_area": [5, 6, 7]}, [5, 6, 7], 0),
        ({"image": ["a", "b", "c"], "lesion_area": [5, 6]}, [0, 2, 1], 1),  # does not fit: counted
        ({"image": ["a", "b", "c"]}, [0, 2, 1], 1),
        ({"image": "a.nii", "lesion_area": 13}, [0, 2, 1], 1),
    ],
)
def test_areas_of_the_datalist_spare_the_count(entry, areas, calls):
    class Load(Count):
        def __call__(self, data):
            return {**data, **volumes()[0]} if super().__call__(data) else {}

    Count.calls = 0
    dataset = SliceDataset(Dataset([entry], Load("image")))
    assert dataset.lesion_areas.tolist() == areas
    assert Count.calls == calls
    assert dataset[2]["image"].max() == 2


def test_a_volume_that_lost_slices_is_named():
    dataset = SliceDataset(Dataset([{"image": ["a", "b"], "lesion_area": [1, 0]}], lambda _: volumes()[0]))
    with pytest.raises(ValueError, match=r"^image v0_0\.tif has 3 slices but had 2 before: transforms of volumes"):
        dataset[0]


def random_slices(seed=None):
    transform = Compose([RandScaleIntensityd("image", factors=0.5, prob=1.0), RandFlipd(["image", "label"], prob=0.5)])
    dataset = SliceDataset(CacheDataset(volumes(torch.float32), Compose([]), progress=False), transform)
    if seed is not None:
        transform.set_random_state(seed)
    return dataset


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_with_and_without_workers(num_workers):
    dataset = random_slices()
    orders = []
    for _ in range(2):
        torch.manual_seed(3)
        loader = DataLoader(dataset, batch_size=2, sampler=slice_sampler(dataset), num_workers=num_workers)
        batches = list(loader)
        assert batches[0]["image"].shape == (2, 3, 4, 5)
        names = chain.from_iterable(zip(b["case"], b["slice"].tolist(), strict=True) for b in batches)
        orders.append((list(names), [b["image"].sum().item() for b in batches]))
    assert orders[0] == orders[1]
    assert len(orders[0][0]) == 6


def test_it_travels_to_another_process_with_its_count():
    dataset = SliceDataset(Dataset(volumes(), Count("image")))
    len(dataset)
    Count.calls = 0
    again = pickle.loads(pickle.dumps(dataset))
    assert len(again) == 6
    assert Count.calls == 0
    assert again[4]["image"].max() == 200


@pytest.mark.parametrize("num_workers", [0, 2])
def test_slices_and_transforms_are_seeded_per_epoch(num_workers):
    def train(first, last):
        torch.manual_seed(int(np.random.default_rng().integers(1000)))
        dataset = random_slices()
        seen = {}
        network = torch.nn.Conv2d(3, 1, 1)
        trainer = SupervisedTrainer(
            device="cpu",
            max_epochs=last,
            train_data_loader=DataLoader(
                dataset, batch_size=3, sampler=slice_sampler(dataset), num_workers=num_workers
            ),
            network=network,
            optimizer=torch.optim.SGD(network.parameters(), 0.1),
            loss_function=lambda pred, label: (pred - label).mean(),
            train_handlers=[EpochSeed(5, dataset)],
        )
        trainer.add_event_handler(Events.STARTED, lambda engine: setattr(engine.state, "epoch", first))
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED,
            lambda engine: seen.setdefault(engine.state.epoch, []).append(
                sum(item["image"].sum().item() for item in engine.state.batch)
            ),
        )
        trainer.run()
        return seen

    whole, resumed = train(0, 3), train(2, 3)
    assert list(whole) == [1, 2, 3]
    assert list(resumed) == [3]
    assert whole[3] == resumed[3]
    assert whole[1] != whole[2] != whole[3]


def test_slices_of_files(tmp_path):
    rng = np.random.default_rng(0)
    pictures = rng.integers(1, 255, (12, 6, 5, 3), dtype=np.uint8)
    masks = np.zeros((12, 6, 5), np.uint8)
    masks[10, :2, :3] = 255
    for i in range(12):
        tifffile.imwrite(tmp_path / f"p_{i}.tif", pictures[i], photometric="rgb")
        tifffile.imwrite(tmp_path / f"p_{i}_mask.tif", masks[i])
    cases = [
        {"image": str(tmp_path / f"p_{i}.tif"), "label": str(tmp_path / f"p_{i}_mask.tif"), "group": "p", "slice": i}
        for i in (3, 10, 0, 11, 1, 2, 4, 5, 6, 7, 8, 9)
    ]
    keys = ["image", "label"]
    load = Compose([LoadImaged(keys, reader="segbundles.data.StackReader"), EnsureChannelFirstd(keys)])
    dataset = SliceDataset(Dataset(SliceStacks(cases), load))
    assert len(dataset) == 12
    assert dataset.lesion_areas.tolist() == [0] * 10 + [6, 0]
    item = dataset[10]
    assert (item["case"], item["slice"]) == ("p", 10)
    assert item["image"].meta["filename_or_obj"] == str(tmp_path / "p_10.tif")
    np.testing.assert_array_equal(item["image"].numpy(), pictures[10].transpose(2, 1, 0))
    np.testing.assert_array_equal(item["label"].numpy(), masks[10].T[None])


# -------------------------------------------------------------------------------------------------- weights and sampler


@pytest.mark.parametrize(
    ("areas", "floor", "expected"),
    [
        ([0, 0, 100, 300], 0.1, [10 / 440, 10 / 440, 110 / 440, 310 / 440]),  # mean 100, sum 400
        ([0, 0, 100, 300], 0.0, [0, 0, 0.25, 0.75]),
        ([0, 4], 1.0, [2 / 8, 6 / 8]),
        ([5], 0.1, [1.0]),
        ([0, 0, 0, 0], 0.1, [0.25] * 4),
    ],
)
def test_lesion_weights(areas, floor, expected):
    weights = lesion_weights(areas, floor)
    np.testing.assert_allclose(weights, expected, rtol=1e-14, atol=0)
    assert weights.sum() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize(
    ("areas", "floor", "message"),
    [
        ([1, -2], 0.1, r"areas must be finite and not negative, got -2: correct the datalist"),
        ([1, float("nan")], 0.1, r"areas must be finite and not negative, got nan"),
        ([1], -0.5, r"floor must be finite and not negative \(for example 0\.1\), got -0\.5"),
        ([1], float("inf"), r"floor must be finite and not negative \(for example 0\.1\), got inf"),
        ([], 0.1, r"areas must be one number per slice, got shape \(0,\): is the list of cases empty"),
        ([[1]], 0.1, r"areas must be one number per slice, got shape \(1, 1\)"),
    ],
)
def test_lesion_weights_of_nonsense(areas, floor, message):
    with pytest.raises(ValueError, match=message):
        lesion_weights(areas, floor)


class Slices(Sequence):
    """What a sampler needs of a SliceDataset."""

    def __init__(self, areas):
        self.lesion_areas = np.asarray(areas, dtype=float)

    def __len__(self):
        return len(self.lesion_areas)

    def __getitem__(self, index):
        return index


def test_draws_follow_the_weights():
    areas = [0, 0, 100, 300]
    torch.manual_seed(0)
    drawn = list(slice_sampler(Slices(areas), num_samples=20000))
    assert len(drawn) == 20000
    expected = lesion_weights(areas)
    often = np.bincount(drawn, minlength=4) / 20000
    # four standard deviations; weights without the floor, or equal ones, are further off
    np.testing.assert_array_less(abs(often - expected), 4 * np.sqrt(expected * (1 - expected) / 20000))
    assert (abs(lesion_weights(areas, 0) - expected) > 4 * np.sqrt(expected * (1 - expected) / 20000)).any()


def test_one_process():
    slices = Slices([0, 1, 2, 3, 4] * 4)
    weighted, plain = slice_sampler(slices), slice_sampler(slices, weighted=False)
    assert isinstance(weighted, WeightedRandomSampler)
    assert isinstance(plain, RandomSampler)
    assert len(weighted) == len(plain) == 20
    assert sorted(plain) == list(range(20))
    assert len(slice_sampler(slices, num_samples=7)) == 7
    for sampler in (weighted, plain):
        draws = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            draws.append(list(sampler))
        assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("areas", "arguments", "message"),
    [
        ([], {}, "there is no slice to draw from: the list of cases is empty"),
        ([1], {"num_samples": 0}, "num_samples must be positive, or null for as many as there are slices, got 0"),
        ([1], {"num_samples": 5, "weighted": False}, "num_samples is 5 but without weights every slice is drawn once"),
    ],
)
def test_sampler_of_nonsense(areas, arguments, message):
    with pytest.raises(ValueError, match=message):
        slice_sampler(Slices(areas), **arguments)


SHARED_AREAS = [0, 0, 0, 10, 20, 30, 40] * 15  # an odd number of slices


def _draw(rank, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(100 + rank)  # as RunLoader seeds
    out = {}
    for name, arguments in {
        "weighted": {},
        "plain": {"weighted": False},
        "seed": {"weighted": False, "seed": 1},
    }.items():
        sampler = slice_sampler(Slices(SHARED_AREAS), **arguments)
        out[name] = []
        for epoch in range(200 if name == "weighted" else 2):
            sampler.set_epoch(epoch)
            out[name].append(list(sampler))
            assert len(sampler) == len(out[name][-1])
    out["few"] = list(slice_sampler(Slices(SHARED_AREAS), num_samples=4))
    (folder / f"{rank}.json").write_text(json.dumps(out))
    torch.distributed.destroy_process_group()


def test_two_processes_draw_different_slices_that_follow_the_weights_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # forked, as the workers of a loader are: new interpreters take longer to import torch than all else takes
    torch.multiprocessing.start_processes(_draw, (port, tmp_path), nprocs=2, start_method="fork")
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    n = len(SHARED_AREAS)
    for mine, theirs in zip(one["weighted"], other["weighted"], strict=True):
        assert not set(mine) & set(theirs)
        assert len(mine) == len(theirs) == math.ceil(n / 2)
    drawn = [*chain(*one["weighted"]), *chain(*other["weighted"])]
    often = np.bincount(drawn, minlength=n) / len(drawn)
    areas = np.array(SHARED_AREAS)
    for area in np.unique(areas):  # expected: 0.039 for all of 0, 0.104, 0.195, 0.286 and 0.377
        expected = lesion_weights(areas)[areas == area].sum()
        assert often[areas == area].sum() == pytest.approx(expected, abs=0.012)
    for mine, theirs in zip(one["plain"], other["plain"], strict=True):
        assert set(mine) | set(theirs) == set(range(n))
        assert len(mine) == len(theirs) == math.ceil(n / 2)
    assert one["plain"][0] != one["plain"][1]  # set_epoch
    assert one["plain"][0] != one["seed"][0]
    assert len(one["few"]) == len(other["few"]) == 2
