from __future__ import annotations

import itertools
import re
import resource
from contextlib import contextmanager

import imagecodecs
import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import tifffile
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch, list_data_collate
from monai.transforms import Compose, EnsureChannelFirstd, Invertd, LoadImaged, Orientationd
from PIL import Image
from scipy.stats import entropy

from segbundles.data import FolderImages, StackReader
from segbundles.meta import pixel_sizes_nm, set_pixel_sizes_nm
from segbundles.transforms import (
    LogitsToClassd,
    SaveProbabilitiesd,
    SaveSegmentationd,
    SaveUncertaintyd,
    SetSpacingd,
    ToProbabilitiesd,
    Uncertaintyd,
)

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


# ----------------------------------------------------------------------------------------------------------- 3D Slicer

CLASSES = {"0": "background", "1": "left atrium", "2": "scar"}
CODES = {"1": {"category": ["91723000", "SCT", "Anatomical Structure"], "type": ["82471001", "SCT", "Left atrium"]}}
SLICER = {"mask_format": "seg.nrrd", "classes": CLASSES, "codes": CODES, "num_classes": 3}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("suffix", [".nrrd", ".nii.gz", ".mhd"])
def test_a_segmentation_of_slicer(tmp_path, suffix, geometry):
    source = volume(tmp_path / "in" / f"a{suffix}", geometry)
    (saved,) = segment([source], tmp_path / "out", tmp_path / "in", **SLICER)
    assert saved == str(tmp_path / "out/a_seg.seg.nrrd")
    given, made = sitk.ReadImage(str(source)), sitk.ReadImage(saved)
    for name in ("GetSpacing", "GetOrigin", "GetDirection", "GetSize"):
        np.testing.assert_allclose(getattr(made, name)(), getattr(given, name)(), rtol=1e-5, atol=1e-5)
    array, header = nrrd.read(saved)
    np.testing.assert_array_equal(array, sitk.GetArrayFromImage(given).T > 100)
    assert (header["space"], header["type"], header["encoding"]) == ("left-posterior-superior", "unsigned char", "gzip")
    direction = np.array(given.GetDirection()).reshape(3, 3) * given.GetSpacing()
    np.testing.assert_allclose(header["space directions"], direction.T, atol=1e-5)
    np.testing.assert_allclose(header["space origin"], given.GetOrigin(), atol=1e-4)
    assert header["Segmentation_MasterRepresentation"] == "Binary labelmap"
    assert header["Segment0_Color"] == "0.901961 0.623529 0"  # (230, 159, 0) / 255
    assert [header[f"Segment{k}_Name"] for k in range(2)] == ["left atrium", "scar"]
    assert [header[f"Segment{k}_LabelValue"] for k in range(2)] == ["1", "2"]
    assert [header[f"Segment{k}_Layer"] for k in range(2)] == ["0", "0"]
    assert header["Segment1_Extent"] == "0 -1 0 -1 0 -1"  # nothing is of class 2
    assert "~SCT^91723000^Anatomical Structure~SCT^82471001^Left atrium~^^~" in header["Segment0_Tags"]
    assert header["Segment1_Tags"].count("SCT^85756007^Tissue") == 2


def test_the_extent_of_a_segment_is_its_box(tmp_path):
    classes = np.zeros((7, 6, 5), np.uint8)
    classes[1:3, 2:6, 4] = 2
    classes[0, 0, 1] = 1
    SaveSegmentationd("pred", tmp_path, **SLICER)(pred(classes, tmp_path / "a.nrrd"))
    _, header = nrrd.read(str(tmp_path / "a_seg.seg.nrrd"))
    assert header["Segment0_Extent"] == "0 0 0 0 1 1"
    assert header["Segment1_Extent"] == "1 2 2 5 4 4"


def test_pictures_are_no_segmentations_of_slicer_and_2d_images_are_flat_ones(tmp_path):
    plane = RNG.integers(0, 3, (6, 4), dtype=np.uint8)
    save = SaveSegmentationd("pred", tmp_path / "out", **SLICER)
    for name, expected in (("a.png", "a_seg.png"), ("a.nrrd", "a_seg.seg.nrrd"), ("scan", "scan_seg.seg.nrrd")):
        saved = save(pred(plane, tmp_path / name, original_affine=np.eye(3)))["pred"].meta["saved_to"]
        assert saved == str(tmp_path / "out" / expected)
    array, _ = nrrd.read(saved)
    np.testing.assert_array_equal(array[..., 0], plane)


def test_results_in_the_folder_of_the_images_are_not_segmented_again(tmp_path):
    source = volume(tmp_path / "a.nrrd", "plain")
    tuple(segment([source], tmp_path, tmp_path, **SLICER))
    save = SaveSegmentationd("pred", tmp_path, tmp_path)
    assert save.is_written(source)
    assert not save.is_written(tmp_path / "b.nrrd")
    (tmp_path / "inference.csv").write_text("file,status\na.nrrd,ok\n")
    for skip in (["*.none"], []):
        assert [entry["image"] for entry in FolderImages(tmp_path, tmp_path, skip)] == [str(source)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_format": "nrrd"}, "mask_format must be 'seg.nrrd', or None for the format of the image, got 'nrrd'."),
        ({"mask_format": "seg.nrrd"}, "mask_format 'seg.nrrd' needs classes, the name of each class by its index."),
        ({"classes": {"0": "none"}}, "classes must name at least one class besides 0, the background, got"),
        ({"classes": {"heart": 1}}, "a class must be a number from 0 to 255, got 'heart'."),
        ({"classes": CLASSES, "codes": {"3": CODES["1"]}}, "codes has class 3, but classes only has [0, 1, 2]: name"),
        ({"classes": CLASSES, "codes": {"1": {"type": ["1", "SCT", "A"]}}}, "codes of class 1 must have category and"),
        (
            {"classes": CLASSES, "codes": {"1": {**CODES["1"], "type": ["1", "SCT"]}}},
            "the type of class 1 must be a value, a coding scheme and a meaning, got ['1', 'SCT'].",
        ),
    ],
)
def test_wrong_names_and_codes(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        SaveSegmentationd("pred", **options)


# ------------------------------------------------------------------------------------------------------- probabilities


def logits(channels, size):
    """Random logits with ties, and with differences that probabilities of float32 do not show."""
    values = torch.as_tensor(RNG.normal(0, 3, (channels, *size)).astype(np.float32))
    values[:, 0] = 0
    values[-1, 1] = values[:, 1].amax(0) + 1e-7
    values[0, 2] = 1e-9 if channels == 1 else 90
    return values


@pytest.mark.parametrize(("channels", "num_classes"), [(1, 2), (2, 2), (3, 3), (5, 5)])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha", ".tif", ".png", ".jpg", ""])
def test_probabilities_add_up_and_the_largest_is_the_mask(tmp_path, suffix, channels, num_classes):
    size = (6, 5) if suffix in (".png", ".jpg") else (6, 5, 4)
    item = pred(np.zeros(size, np.uint8), tmp_path / f"a{suffix}")
    item["pred"] = MetaTensor(logits(channels, size), meta=item["pred"].meta)
    set_pixel_sizes_nm(item["pred"], (4, 4, 50))
    item = LogitsToClassd("pred")(ToProbabilitiesd("pred")(item))
    assert item["prob"].shape == (num_classes, *size)
    np.testing.assert_allclose(item["prob"].sum(0), 1, atol=1e-6)
    np.testing.assert_array_equal(item["prob"].argmax(0), item["pred"][0])

    SaveProbabilitiesd("prob", tmp_path / "out", tmp_path, num_classes=num_classes)(item)
    (path,) = (tmp_path / "out").iterdir()
    flat = suffix in (".png", ".jpg")
    expected = {"": ".nii.gz", ".jpg": ".png"}.get(suffix, suffix) if not flat or num_classes < 5 else ".tif"
    expected = ".png" if flat and num_classes < 5 else expected
    assert path.name == f"a_prob{expected}"
    if expected == ".png":
        read = imagecodecs.png_decode(path.read_bytes())  # rows, columns, channels
        assert read.dtype == np.uint16
        assert (read.sum(-1, dtype=int) == 65535).all()
        read = read.transpose(2, 1, 0)
        np.testing.assert_allclose(read / 65535, item["prob"].numpy(), atol=num_classes / 65535)
    elif expected == ".tif":
        with tifffile.TiffFile(path) as file:
            assert file.series[0].axes == ("CYX" if flat else "ZCYX")
            assert file.imagej_metadata["unit"] == "nm"
            read = file.asarray()
        read = np.moveaxis(read, -3, 0)
        read = read.transpose(0, *reversed(range(1, read.ndim)))
    elif expected == ".nii.gz":
        read = np.moveaxis(np.asarray(nib.load(path).dataobj), -1, 0)
    else:
        read = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).transpose(3, 2, 1, 0)
    if expected != ".png":
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, item["prob"].numpy())
    np.testing.assert_array_equal(read.argmax(0), item["pred"][0])


def test_probabilities_of_a_stack_of_pictures(tmp_path):
    files = [tmp_path / f"s_{k}.png" for k in range(4)]
    item = pred(np.zeros((6, 5, 4), np.uint8), files[0], slices="\n".join(map(str, files)))
    item["prob"] = MetaTensor(logits(3, (6, 5, 4)).softmax(0), meta=item["pred"].meta)
    SaveProbabilitiesd("prob", tmp_path / "out", tmp_path, num_classes=3)(item)
    for k in range(4):
        read = imagecodecs.png_decode((tmp_path / f"out/s_{k}_prob.png").read_bytes()).transpose(2, 1, 0)
        np.testing.assert_allclose(read / 65535, item["prob"][..., k].numpy(), atol=3 / 65535)


def test_probabilities_are_turned_back_with_the_mask(tmp_path):
    """Orientation only moves voxels, so that the probabilities on the file's grid are those of the network."""
    source = volume(tmp_path / "a.nrrd", "left-handed")
    before = preprocessing(None)
    item = decollate_batch(list_data_collate([before({"image": str(source)})]))[0]
    item["pred"] = (item["image"] - 100) / 20
    after = Compose(
        [
            ToProbabilitiesd("pred"),
            LogitsToClassd("pred"),
            Uncertaintyd("prob"),
            Invertd(["pred", "prob", "uncertainty"], before, "image", nearest_interp=True, to_tensor=True),
            SaveProbabilitiesd("prob", tmp_path, tmp_path),
            SaveUncertaintyd("uncertainty", tmp_path, tmp_path),
            SaveSegmentationd("pred", tmp_path, tmp_path),
        ]
    )
    after(item)
    grey = sitk.GetArrayFromImage(sitk.ReadImage(str(source))).astype(np.float32)
    made = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a_prob.nrrd")))
    np.testing.assert_allclose(made[..., 1], 1 / (1 + np.exp(-(grey - 100) / 20)), atol=1e-6)
    np.testing.assert_array_equal(made.argmax(-1), sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a_seg.nrrd"))))
    doubt = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a_uncertainty.nrrd")))
    np.testing.assert_allclose(doubt, entropy(made, base=2, axis=-1), atol=2e-5)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha", ".tif", ".png", ".jpg", ""])
def test_uncertainty_in_the_format_of_the_image(tmp_path, suffix):
    flat = suffix in (".png", ".jpg")
    size = (6, 5) if flat else (6, 5, 4)
    item = pred(np.zeros(size, np.uint8), tmp_path / f"a{suffix}")
    values = RNG.random((1, *size)).astype(np.float32)
    item["uncertainty"] = MetaTensor(torch.from_numpy(values), meta=item["pred"].meta)
    SaveUncertaintyd("uncertainty", tmp_path / "out", tmp_path)(item)
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == "a_uncertainty" + {"": ".nii.gz", ".jpg": ".png"}.get(suffix, suffix)
    if flat:
        read = imagecodecs.png_decode(path.read_bytes()).T
        assert (read.dtype, read.shape) == (np.uint16, size)
        np.testing.assert_allclose(read / 65535, values[0], atol=0.5 / 65535)
        return
    if suffix == ".tif":
        read = tifffile.imread(path).T
    elif suffix in ("", ".nii.gz"):
        read = np.asarray(nib.load(path).dataobj)
    else:
        read = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, values[0])


def test_probabilities_as_output():
    prob = torch.tensor([[[0.2, 0.7]], [[0.8, 0.3]]])
    torch.testing.assert_close(ToProbabilitiesd("pred", logits=False)({"pred": prob})["prob"], prob)
    with pytest.raises(ValueError, match=r"^pred has one channel, but probabilities must have one per class"):
        ToProbabilitiesd("pred", logits=False)({"pred": prob[:1]})


# --------------------------------------------------------------------------------------------------------- pixel sizes


@pytest.mark.parametrize("label_image", [False, True])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((20, 30), {"resolution": (2.5e6, 2.5e6), "resolutionunit": "CENTIMETER"}),
        (
            (3, 20, 30),
            {"imagej": True, "resolution": (0.25, 0.25), "metadata": {"axes": "ZYX", "unit": "nm", "spacing": 50}},
        ),
    ],
)
def test_masks_keep_the_pixel_size(tmp_path, size, options, label_image):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros(size, np.uint8), photometric="minisblack", **options)
    image = LoadImaged("pred", reader=StackReader)({"pred": tmp_path / "a.tif"})
    image = EnsureChannelFirstd("pred")(image)
    image["pred"][0, 0] = 1
    saved = SaveSegmentationd("pred", tmp_path / "out", tmp_path, label_image=label_image)(image)["pred"]
    reader = StackReader()
    array, meta = reader.get_data(reader.read(saved.meta["saved_to"]))
    np.testing.assert_array_equal(array > 0, image["pred"][0])
    assert pixel_sizes_nm(meta) == pytest.approx((4, 4, 50 if len(size) == 3 else 0))


def test_many_cells_and_large_pixels_keep_what_their_format_can_hold(tmp_path):
    cells = np.arange(300 * 300 * 2, dtype=np.int32).reshape(300, 300, 2)
    item = pred(cells, tmp_path / "a.tif")
    set_pixel_sizes_nm(item["pred"], (0.3, 0.3, 50))
    SaveSegmentationd("pred", tmp_path, label_image=True)(item)
    with tifffile.TiffFile(tmp_path / "a_seg.tif") as file:  # uint32, which ImageJ does not have
        np.testing.assert_array_equal(file.asarray(), cells.transpose())
        assert file.pages.first.get_resolution("CENTIMETER") == pytest.approx((1e7 / 0.3, 1e7 / 0.3))
    item = pred(np.zeros((20, 30), np.uint8), tmp_path / "b.png")
    set_pixel_sizes_nm(item["pred"], (0.3, 0.3, 0))
    SaveSegmentationd("pred", tmp_path)(item)
    with Image.open(tmp_path / "b_seg.png") as picture:  # 3.3e9 pixels per metre do not fit into a PNG
        assert "dpi" not in picture.info
        assert picture.size == (20, 30)
