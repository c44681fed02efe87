from __future__ import annotations

import itertools
import re
import resource
from contextlib import contextmanager

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import tifffile
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch, list_data_collate
from monai.transforms import Compose, EnsureChannelFirstd, Invertd, LoadImaged, Orientationd
from PIL import Image

from segbundles.transforms import SaveSegmentationd, SetSpacingd

RNG = np.random.default_rng(0)
GEOMETRIES = {
    "oblique": ([0.8, 0.6, 0, -0.6, 0.8, 0, 0, 0, 1], (0.7, 0.7, 5.3), (-100.123456789, 20.1, 1 / 3)),
    "tilted": ([0.36, 0.48, -0.8, -0.8, 0.6, 0, 0.48, 0.64, 0.6], (0.625, 1.25, 2.5), (12.25, -3.5, 1e3)),
    "left-handed": ([0, 1, 0, 1, 0, 0, 0, 0, 1], (1.0, 2.0, 0.3), (0.0, 0.0, 0.0)),
    "plain": ([1, 0, 0, 0, 1, 0, 0, 0, 1], (1.0, 1.0, 1.0), (5.0, 6.0, 7.0)),
}


def volume(path, geometry, size=(7, 6, 5)):
    direction, spacing, origin = GEOMETRIES[geometry]
    image = sitk.GetImageFromArray(RNG.integers(0, 200, size[::-1], dtype=np.uint8))
    image.SetDirection(np.asarray(direction, float))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


def preprocessing(spacing_mm=(0.9, 1.1, 1.3)):
    return Compose(
        [
            LoadImaged("image", reader="segbundles.data.SuffixReader"),
            EnsureChannelFirstd("image"),
            SetSpacingd("image", spacing_mm),
            Orientationd("image", axcodes="RAS", labels=None),
        ]
    )


def segment(paths, output_dir, root="", batch_size=1, **arguments):
    """What the inference of a bundle does, with ``image > 100`` as the network."""
    before = preprocessing()
    loader = DataLoader(
        Dataset([{"image": str(path)} for path in paths], before), batch_size, collate_fn=list_data_collate
    )
    after = Compose(
        [
            Invertd("pred", before, "image", nearest_interp=True, to_tensor=True),
            SaveSegmentationd("pred", output_dir, root, **arguments),
        ]
    )
    for batch in loader:
        batch["pred"] = (batch["image"] > 100).to(torch.uint8)
        for item in decollate_batch(batch):
            yield after(item)["pred"].meta["saved_to"]


@pytest.mark.parametrize(
    ("geometry", "size"),
    [
        *((geometry, (7, 6, 5)) for geometry in GEOMETRIES),
        ("tilted", (1, 6, 5)),
        ("left-handed", (7, 6, 1)),
        ("oblique", (7, 1, 1)),
    ],
)
@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nii", ".nii.gz", ".nhdr", ".mhd"])
def test_output_lies_on_the_inputs_grid(tmp_path, suffix, geometry, size):
    source = volume(tmp_path / "in" / f"a{suffix}", geometry, size)
    (saved,) = segment([source], tmp_path / "out", tmp_path / "in")
    in_one_file = {".nhdr": ".nrrd", ".mhd": ".mha"}.get(suffix, suffix)
    assert saved == str(tmp_path / "out" / f"a_seg{in_one_file}")
    assert [p.name for p in (tmp_path / "out").iterdir()] == [f"a_seg{in_one_file}"]
    given, made = sitk.ReadImage(str(source)), sitk.ReadImage(saved)
    tolerance = 1e-5 if "nii" in suffix else 1e-9  # NIfTI holds float32
    assert made.GetSize() == given.GetSize() == size
    assert made.GetPixelIDValue() == sitk.sitkUInt8
    for name in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(made, name)(), getattr(given, name)(), rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(made), sitk.GetArrayFromImage(given) > 100)
    if "nii" in suffix:
        np.testing.assert_allclose(nib.load(saved).affine, nib.load(source).affine, rtol=1e-6, atol=1e-6)
        assert nib.load(saved).shape == size


def test_several_classes_and_a_batch_of_two_formats(tmp_path):
    sources = [volume(tmp_path / "in" / name, "plain") for name in ("a.nrrd", "b.nii.gz")]
    assert [p.rsplit("/", 1)[1] for p in segment(sources, tmp_path / "out", num_classes=4, batch_size=2)] == [
        "a_seg.nrrd",
        "b_seg.nii.gz",
    ]
    made = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out/a_seg.nrrd")))
    np.testing.assert_array_equal(made, sitk.GetArrayFromImage(sitk.ReadImage(str(sources[0]))) > 100)  # not scaled


def pred(classes, source, **meta):
    shape = np.asarray(classes).shape
    meta = {"filename_or_obj": str(source), "spatial_shape": shape, "original_affine": np.eye(4), **meta}
    return {"pred": MetaTensor(torch.as_tensor(classes)[None], meta=meta)}


@pytest.mark.parametrize(("num_classes", "factor"), [(2, 255), (3, 127), (4, 85), (256, 1)])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif"])
def test_2d_gives_png(tmp_path, suffix, num_classes, factor):
    classes = RNG.integers(0, num_classes, (6, 4), dtype=np.uint8)  # W x H
    out = SaveSegmentationd("pred", tmp_path / "out", num_classes=num_classes)(pred(classes, tmp_path / f"a{suffix}"))
    assert out["pred"].meta["saved_to"] == str(tmp_path / "out/a_seg.png")
    with Image.open(tmp_path / "out/a_seg.png") as picture:
        assert picture.size == (6, 4)
        assert picture.mode == "L"
        np.testing.assert_array_equal(np.asarray(picture), classes.T * factor)


def test_png_through_the_whole_pipeline(tmp_path):
    picture = RNG.integers(0, 255, (4, 6), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    before = Compose([LoadImaged("image", reader="segbundles.data.SuffixReader"), EnsureChannelFirstd("image")])
    item = before({"image": str(tmp_path / "a.png")})
    item["pred"] = (item["image"] > 100).to(torch.uint8)
    SaveSegmentationd("pred", tmp_path / "out")(item)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/a_seg.png")), (picture > 100) * 255)


@pytest.mark.parametrize("pages", [2, 3, 7])
def test_a_stack_gives_a_stack(tmp_path, pages):
    stack = RNG.integers(0, 255, (pages, 4, 6), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "s.tiff", stack, photometric="minisblack")
    (saved,) = segment([tmp_path / "s.tiff"], tmp_path / "out")
    assert saved == str(tmp_path / "out/s_seg.tif")
    with tifffile.TiffFile(saved) as file:
        assert len(file.pages) == pages
        np.testing.assert_array_equal(np.stack([p.asarray() for p in file.pages]), (stack > 100) * 255)


def stack(folder, names, size=(6, 4), channels=3):
    """Colour slices of the given names, and their values as (W, H, D)."""
    folder.mkdir(parents=True, exist_ok=True)
    values = RNG.integers(0, 255, (len(names), size[1], size[0], channels), dtype=np.uint8)
    for name, picture in zip(names, values, strict=True):
        if name.endswith("tif"):
            tifffile.imwrite(folder / name, picture, photometric="rgb")
        else:
            Image.fromarray(picture).save(folder / name)
    return [folder / name for name in names], values[..., 1].transpose(2, 1, 0)


@pytest.mark.parametrize("names", [("p_2.tif", "p_10.tif", "p_11.tif"), ("a.png",), ("a.tif",), ("a.bmp", "b.tif")])
@pytest.mark.parametrize("axcodes", ["RAS", "LPS"])
def test_a_stack_of_files_gives_a_file_a_slice(tmp_path, names, axcodes):
    files, values = stack(tmp_path / "d/p", names)
    before = Compose(
        [
            LoadImaged("image", reader="segbundles.data.StackReader"),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes=axcodes, labels=None),
        ]
    )
    loader = DataLoader(Dataset([{"image": [str(f) for f in files]}], before), 1, collate_fn=list_data_collate)
    (batch,) = loader
    batch["pred"] = (batch["image"][:, 1:2] > 100).to(torch.uint8)
    after = Compose(
        [
            Invertd("pred", before, "image", nearest_interp=True, to_tensor=True),
            SaveSegmentationd("pred", tmp_path / "out", tmp_path / "d"),
        ]
    )
    (item,) = decollate_batch(batch)
    saved = after(item)["pred"].meta["saved_to"].split("\n")
    assert saved == [str(tmp_path / "out/p" / f"{name.split('.')[0]}_seg.png") for name in names]
    assert sorted(p.name for p in (tmp_path / "out/p").iterdir()) == sorted(p.rsplit("/", 1)[1] for p in saved)
    for k, path in enumerate(saved):
        with Image.open(path) as picture:
            assert (picture.size, picture.mode) == ((6, 4), "L")
            np.testing.assert_array_equal(np.asarray(picture), (values[..., k] > 100).T * 255)


def test_a_stack_of_another_number_of_files_is_refused(tmp_path):
    data = pred(np.zeros((4, 4, 3)), tmp_path / "a.tif", slices=f"{tmp_path}/a.tif\n{tmp_path}/b.tif")
    with pytest.raises(ValueError, match=r"a\.tif has size \(4, 4, 3\) but its stack has 2 files, not one per slice"):
        SaveSegmentationd("pred", tmp_path / "out")(data)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("suffix", "made"), [(".tif", ".png"), (".png", ".png"), (".nrrd", ".nrrd")])
def test_one_slice_without_the_names_of_slices(tmp_path, suffix, made):
    classes = RNG.integers(0, 2, (6, 4, 1), dtype=np.uint8)
    out = SaveSegmentationd("pred", tmp_path / "out")(pred(classes, tmp_path / f"a{suffix}"))
    assert out["pred"].meta["saved_to"] == str(tmp_path / f"out/a_seg{made}")
    if made == ".png":
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/a_seg.png")), classes[..., 0].T * 255)


@pytest.mark.parametrize(
    ("source", "root", "expected"),
    [
        ("d/p1/a.nrrd", "d", "p1/a_seg.nrrd"),
        ("d/p 1/ü/a.b.c.nii.gz", "d", "p 1/ü/a.b.c_seg.nii.gz"),
        ("d/A.NII.GZ", "d", "A_seg.nii.gz"),
        ("d/a.1.jpeg", "d", "a.1_seg.png"),
        ("d/p1/a.nrrd", "d/p1/a.nrrd", "a_seg.nrrd"),  # a single file
        ("elsewhere/a.nrrd", "d", "a_seg.nrrd"),
    ],
)
@pytest.mark.parametrize("relative", [False, True])
def test_folders_are_mirrored(tmp_path, monkeypatch, source, root, expected, relative):
    monkeypatch.chdir(tmp_path)
    (tmp_path / source).parent.mkdir(parents=True)
    (tmp_path / source).touch()
    (tmp_path / "d").mkdir(exist_ok=True)
    base = "" if relative else f"{tmp_path}/"
    save = SaveSegmentationd("pred", f"{base}out", f"{base}{root}")
    save(pred(np.zeros((2, 3, 4) if "nii" in expected or "nrrd" in expected else (2, 3)), f"{base}{source}"))
    assert [p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*_seg*")] == [expected]


def test_a_linked_image_keeps_its_place_and_name(tmp_path):
    volume(tmp_path / "archive/0001.nrrd", "plain")
    (tmp_path / "d/p1").mkdir(parents=True)
    (tmp_path / "d/p1/a.nrrd").symlink_to(tmp_path / "archive/0001.nrrd")
    assert list(segment([tmp_path / "d/p1/a.nrrd"], tmp_path / "out", tmp_path / "d")) == [
        str(tmp_path / "out/p1/a_seg.nrrd")
    ]


def test_a_single_linked_image_is_mirrored_from_its_own_folder(tmp_path):
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive/0001.nrrd").touch()
    (tmp_path / "archive/d").mkdir()
    (tmp_path / "archive/d/a.nrrd").symlink_to(tmp_path / "archive/0001.nrrd")
    save = SaveSegmentationd("pred", tmp_path / "out", tmp_path / "archive/d/a.nrrd")
    assert save.output_path(tmp_path / "archive/d/a.nrrd") == tmp_path / "out/a_seg.nrrd"


@pytest.mark.parametrize("name", ["IM1", "IM1.dcm", "1.2.840.5", "3_t1_fl3d"])
def test_a_dicom_series_gives_nifti(tmp_path, name):
    """A folder, an enhanced file, or the name of a series in a folder, where there is no such file."""
    save = SaveSegmentationd("pred", tmp_path / "out", tmp_path)
    made = tmp_path / "out/study" / f"{name.removesuffix('.dcm')}_seg.nii.gz"
    assert save.output_path(tmp_path / "study" / name) == made
    (tmp_path / "study" / name).mkdir(parents=True)
    assert save.output_path(tmp_path / "study" / name).name == f"{name}_seg.nii.gz"


def test_postfix():
    path = SaveSegmentationd("pred", "out", "d", output_postfix="cells").output_path("d/x/a.tif", pages=True)
    assert path.as_posix() == "out/x/a_cells.tif"


@pytest.mark.parametrize(("highest", "dtype"), [(3, np.uint16), (65_535, np.uint16), (65_536, np.uint32)])
@pytest.mark.parametrize(
    ("source", "slices", "size", "made"),
    [
        ("a.png", "a.png", (4, 3, 1), "a_cells.tif"),
        ("a.tif", "", (4, 3, 5), "a_cells.tif"),
        ("a.png", "", (4, 3), "a_cells.tif"),
        ("a.tif", "", (4, 3, 1), "a_cells.tif"),
        ("a.nrrd", "", (4, 3, 5), "a_cells.nrrd"),
        ("a.nii.gz", "", (4, 3, 5), "a_cells.nii.gz"),
    ],
)
def test_a_label_image_is_written_as_it_is(tmp_path, highest, dtype, source, slices, size, made):
    labels = torch.arange(int(np.prod(size)), dtype=torch.int32).reshape(1, *size)
    labels[labels == 1] = highest
    meta = {"filename_or_obj": str(tmp_path / source), "spatial_shape": size}
    meta["slices"] = str(tmp_path / slices) if slices else ""
    save = SaveSegmentationd("cells", tmp_path / "out", tmp_path, output_postfix="cells", label_image=True)
    save({"cells": MetaTensor(labels, meta=meta)})
    path = tmp_path / "out" / made
    if made.endswith(".tif"):
        found = tifffile.imread(path).T
        assert len(tifffile.TiffFile(path).pages) == (size[2] if len(size) > 2 else 1)
    elif made.endswith(".nrrd"):
        found = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T
    else:
        found = np.asarray(nib.load(path).dataobj)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, labels[0].numpy().reshape(found.shape))


def test_other_grid_is_refused(tmp_path):
    data = pred(np.zeros((4, 4, 4)), tmp_path / "a.nrrd", spatial_shape=(4, 4, 5))
    with pytest.raises(ValueError, match=r"a\.nrrd has size \(4, 4, 4\) but the image \(4, 4, 5\): invert spatial"):
        SaveSegmentationd("pred", tmp_path / "out")(data)
    assert not (tmp_path / "out").exists()


def test_a_plain_tensor_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the file of the segmented image is not known: use LoadImaged"):
        SaveSegmentationd("pred", tmp_path)({"pred": torch.zeros(1, 4, 4)})


def test_missing_keys(tmp_path):
    assert SaveSegmentationd("pred", tmp_path, allow_missing_keys=True)({"image": 1}) == {"image": 1}


@pytest.mark.parametrize("suffix", [".nrrd", ".nii.gz", ".png", ".mha"])
def test_output_folder_that_is_a_file(tmp_path, suffix):
    (tmp_path / "out").touch()
    data = pred(np.zeros((4, 4, 4) if suffix != ".png" else (4, 4)), tmp_path / f"a{suffix}")
    with pytest.raises(
        ValueError, match=f"cannot write {re.escape(str(tmp_path))}/out/a_seg{suffix}.*: choose another folder"
    ):
        SaveSegmentationd("pred", tmp_path / "out")(data)


@contextmanager
def full_disk(size):
    """No file may grow beyond ``size`` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nii", ".nii.gz", ".png", ".tif"])
def test_full_disk_leaves_no_half_file(tmp_path, suffix):
    noise = RNG.integers(0, 2, (64, 64) if suffix == ".png" else (64, 64, 8), dtype=np.uint8)
    (tmp_path / "out").mkdir()
    with full_disk(100), pytest.raises(ValueError, match=r"cannot write .*a_seg.*make room, or choose another folder"):
        SaveSegmentationd("pred", tmp_path / "out")(pred(noise, tmp_path / f"a{suffix}"))
    assert list((tmp_path / "out").iterdir()) == []


def test_every_corner_of_an_oblique_nrrd_in_world_coordinates(tmp_path):
    source = volume(tmp_path / "a.nrrd", "tilted")
    (saved,) = segment([source], tmp_path / "out")
    given, made = sitk.ReadImage(str(source)), sitk.ReadImage(saved)
    for corner in itertools.product((0, 6), (0, 5), (0, 4)):
        np.testing.assert_allclose(
            made.TransformIndexToPhysicalPoint(corner), given.TransformIndexToPhysicalPoint(corner), rtol=0, atol=1e-9
        )
