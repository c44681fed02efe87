from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from typer.testing import CliRunner

from segbundles.cli import app
from segbundles.datasets import DataFaults, get_data_set, merge, prepare
from segbundles.datasets.splits import split_runs

SECTIONS = 10


def _stacks(sections: int = SECTIONS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels (D, H, W) = (sections, 6, 8) with a dark membrane of one column."""
    images = np.random.default_rng(seed).integers(100, 200, (sections, 6, 8)).astype(np.uint8)
    labels = np.full(images.shape, 255, np.uint8)
    for index in range(sections):
        labels[index, :, 3] = 0
        labels[index].flat[2 * index] = 0
    images[labels == 0] //= 4
    return images, labels


@pytest.fixture
def isbi(tmp_path):
    """Make a good folder of TIFF stacks."""

    def make(sections: int = SECTIONS, root: str = "isbi", test: int = 0) -> Path:
        source = tmp_path / root
        source.mkdir()
        images, labels = _stacks(sections)
        tifffile.imwrite(source / "train-volume.tif", images, photometric="minisblack")
        tifffile.imwrite(source / "train-labels.tif", labels, photometric="minisblack")
        if test:
            tifffile.imwrite(source / "test-volume.tif", _stacks(test, 1)[0], photometric="minisblack")
        return source

    return make


def _prepare(source: Path, tmp_path: Path, invert_labels: bool = False, **options):
    prepared = prepare(get_data_set("isbi2012", invert_labels=invert_labels), source, tmp_path / "out", **options)
    # all of these have few groups
    return replace(prepared, notes=[note for note in prepared.notes if not note.startswith("validation has ")])


def _pages(prepared, split: str) -> list[int]:
    return [entry["page"] for entry in prepared.datalist[split]]


def test_last_fifth_is_validation(isbi, tmp_path):
    prepared = _prepare(isbi(), tmp_path)
    assert _pages(prepared, "training") == list(range(8))
    assert prepared.datalist["validation"][0] == {
        "case": "section_08",
        "image": "../isbi/train-volume.tif",
        "label": "../isbi/train-labels.tif",
        "page": 8,
        "group": "section_08..section_09",
        "membrane_fraction": 0.1458,  # 7 of 48
    }
    assert prepared.datalist["labels"] == {"0": "membrane", "1": "cell"}
    assert prepared.units == ("sections", "blocks")
    assert prepared.notes == []
    assert prepared.facts == {
        "size (pixels)": "8 x 6",
        "membrane (%)": "14.58",
        "labels": "membrane is dark or rare, as expected (10)",
    }


@pytest.mark.parametrize(
    ("options", "validation"),
    [
        ({"validation_fraction": 0.1}, [9]),
        ({"validation_fraction": 0.01}, [9]),
        ({"validation_fraction": 0}, []),
        ({"seed": 5}, [8, 9]),  # nothing is drawn
        ({"validation_cases": ["section_08"]}, [8, 9]),
        ({"validation_cases": ["section_03"]}, [3, 4]),
        ({"validation_cases": ["section_03", "section_06"]}, [3, 4, 5, 6]),
        ({"validation_cases": ["section_09"], "validation_fraction": 0.3}, [7, 8, 9]),
        ({"folds": 3, "fold": 0}, [0, 1, 2]),
        ({"folds": 3, "fold": 1}, [3, 4, 5]),
        ({"folds": 3, "fold": 2}, [6, 7, 8, 9]),
        ({"split": {"training": ["section_00", "section_01"], "validation": ["section_05"]}}, [5]),
    ],
)
def test_validation_is_one_block(isbi, tmp_path, options, validation):
    prepared = _prepare(isbi(), tmp_path, **options)
    assert _pages(prepared, "validation") == validation
    assert len({e["group"] for e in prepared.datalist["validation"]}) == bool(validation)
    training = {e["group"] for e in prepared.datalist["training"]}
    assert not training & {e["group"] for e in prepared.datalist["validation"]}
    if "split" not in options:
        assert _pages(prepared, "training") == [i for i in range(SECTIONS) if i not in validation]


def test_training_on_both_sides_is_two_blocks(isbi, tmp_path):
    prepared = _prepare(isbi(), tmp_path, folds=3, fold=1)
    assert [e["group"] for e in prepared.datalist["training"]] == (
        ["section_00..section_02"] * 3 + ["section_06..section_09"] * 4
    )


@pytest.mark.parametrize("folds", [2, 3, 7, 27])
def test_folds_are_runs_that_cover_all_once(folds):
    cases = [f"section_{i:02d}" for i in range(27)]
    seen = []
    for fold in range(folds):
        splits = split_runs(cases, folds=folds, fold=fold)
        chosen = [i for i, c in enumerate(cases) if splits[c] == "validation"]
        assert chosen == list(range(chosen[0], chosen[-1] + 1))
        assert len(chosen) in (27 // folds, 27 // folds + 1)
        seen += chosen
    assert seen == list(range(27))


def test_reference_split():
    splits = split_runs([f"section_{i:02d}" for i in range(30)], validation_fraction=0.1)
    assert [c for c, s in splits.items() if s == "validation"] == ["section_27", "section_28", "section_29"]


def test_test_stack_is_testing(isbi, tmp_path):
    prepared = _prepare(isbi(test=3), tmp_path)
    assert _pages(prepared, "validation") == [8, 9]
    entries = prepared.datalist["testing"]
    assert [e["case"] for e in entries] == ["test_00", "test_01", "test_02"]
    assert {e["group"] for e in entries} == {"test_00..test_02"}
    assert all("label" not in e and e["image"] == "../isbi/test-volume.tif" for e in entries)


@pytest.mark.parametrize("sections", [1, 12])
def test_any_number_of_pages(isbi, tmp_path, sections):
    prepared = _prepare(isbi(sections), tmp_path)
    assert prepared.datalist["numTraining"] + prepared.datalist["numValidation"] == sections


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("train/image/{}.png", "train/label/{}.png"),
        ("images/{}.png", "masks/{}.png"),
        ("imgs/train-volume{:02d}.png", "labels/train-labels{:02d}.png"),
    ],
)
def test_png_pairs_in_numeric_order(tmp_path, image, label):
    source = tmp_path / "png"
    for index, (pixels, values) in enumerate(zip(*_stacks(12), strict=True)):
        for name, array in ((image, pixels), (label, values)):
            path = source / name.format(index)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
            (path.parent / f"._{path.name}").write_text("no image")
    prepared = _prepare(source, tmp_path, validation_fraction=0.25)
    entries = prepared.datalist["training"] + prepared.datalist["validation"]
    assert [e["case"] for e in entries] == [f"section_{i:02d}" for i in range(12)]
    assert entries[10]["image"] == f"../png/{image.format(10)}"
    assert entries[10]["label"] == f"../png/{label.format(10)}"
    assert "page" not in entries[10]
    assert {e["group"] for e in prepared.datalist["validation"]} == {"section_09..section_11"}


def test_png_without_a_partner_or_twice(tmp_path):
    source = tmp_path / "png"
    images, labels = _stacks(3)
    for folder, names in (("image", ("0", "1", "01")), ("label", ("0", "2"))):
        (source / folder).mkdir(parents=True)
        for name in names:
            Image.fromarray((images if folder == "image" else labels)[int(name)]).save(source / folder / f"{name}.png")
    with pytest.raises(DataFaults) as caught:
        _prepare(source, tmp_path)
    assert {(f.file.name, f.problem.split(":")[0]) for f in caught.value.faults} == {
        ("1.png", "is a second file of section_01, next to 01.png"),
        ("01.png", "has no label"),
        ("2.png", "has no image"),
    }


def _rewrite(path: Path, change) -> None:
    tifffile.imwrite(path, change(tifffile.imread(path)), photometric="minisblack")


def _ragged(path: Path) -> None:
    with tifffile.TiffWriter(path) as file:
        for shape in ((6, 8), (6, 8), (5, 8)):
            file.write(np.zeros(shape, np.uint8), photometric="minisblack")


def _grey_page(stack: np.ndarray) -> np.ndarray:
    stack[3] = np.arange(48).reshape(6, 8)
    return stack


def _colour(path: Path) -> None:
    tifffile.imwrite(path, np.stack([tifffile.imread(path)] * 3, -1), photometric="rgb")


VOLUME, LABELS = "train-volume.tif", "train-labels.tif"
FAULTS = {
    "page counts": (LABELS, lambda p: _rewrite(p, lambda a: a[:9]), "stack", r"has 9 pages, train-volume.tif has 10"),
    "pages of different size": (
        VOLUME,
        _ragged,
        "stack",
        r"pages of different sizes.*\(5, 8\), \(6, 8\)",
    ),
    "no labels": (LABELS, Path.unlink, "stack", "has no partner: train-labels.tif is missing"),
    "no volume": (VOLUME, Path.unlink, "stack", "has no partner: train-volume.tif is missing"),
    "truncated": (VOLUME, lambda p: p.write_bytes(p.read_bytes()[:4]), "stack", "cannot be read"),
    "not a TIFF": (LABELS, lambda p: p.write_text("an apple a day"), "stack", "cannot be read: .*TIFF"),
    "other values": (
        LABELS,
        lambda p: _rewrite(p, _grey_page),
        "section_03",
        "label values 1, 2, 3, 4, 5.* allowed are 0, 255",
    ),
    "0 and 1": (
        LABELS,
        lambda p: _rewrite(p, lambda a: a // 255),
        "section_00",
        "label values 1.* allowed are 0, 255",
    ),
    "colour": (VOLUME, _colour, "section_00", "has 3 channel"),
    "other size": (
        LABELS,
        lambda p: _rewrite(p, lambda a: a[:, :5]),
        "section_00",
        r"size \(8, 5, 1\).* image train-volume.tif has \(8, 6, 1\)",
    ),
    "inverted": (
        LABELS,
        lambda p: _rewrite(p, lambda a: 255 - a),
        "section_00",
        "looks inverted: 255 is the dark, rare class.* --invert-labels",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(isbi, tmp_path, fault):
    name, change, case, problem = FAULTS[fault]
    source = isbi()
    change(source / name)
    with pytest.raises(DataFaults) as caught:
        _prepare(source, tmp_path)
    first = caught.value.faults[0]
    assert first.case == case
    assert re.search(problem, first.problem)
    missing = fault in ("no labels", "no volume")  # the file that is there is named
    assert first.file.name == ({VOLUME: LABELS, LABELS: VOLUME}[name] if missing else name)
    assert not (tmp_path / "out").exists()


def test_inverted_labels_and_the_flag(isbi, tmp_path):
    source = isbi()
    with pytest.raises(DataFaults, match="0 is the dark, rare class, which should be membrane; leave out --invert"):
        _prepare(source, tmp_path, invert_labels=True)
    _rewrite(source / LABELS, lambda a: 255 - a)
    with pytest.raises(DataFaults) as caught:
        _prepare(source, tmp_path)
    assert len(caught.value.faults) == 1  # of the file, not of each section
    prepared = _prepare(source, tmp_path, invert_labels=True)
    entries = prepared.datalist["training"] + prepared.datalist["validation"]
    assert all(e["label_values"] == [255, 0] for e in entries)
    assert entries[0]["membrane_fraction"] == 0.1458
    with pytest.raises(ValueError, match="lgg has no option 'invert_labels': it has none"):
        get_data_set("lgg", invert_labels=True)


def test_command_line(isbi, tmp_path):
    source = isbi()
    arguments = ["prepare", "isbi2012", "--source", str(source), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--validation-case", "section_03"])
    assert result.exit_code == 0, result.output
    assert "Sections" in result.output
    _rewrite(source / LABELS, lambda a: 255 - a)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "--invert-labels" in result.output
    assert CliRunner().invoke(app, [*arguments, "--invert-labels"]).exit_code == 0


def test_one_odd_section_is_a_note(isbi, tmp_path):
    source = isbi()

    def change(stack: np.ndarray) -> np.ndarray:
        stack[4] = 255 - stack[4]
        stack[6] = 255
        return stack

    _rewrite(source / LABELS, change)
    assert _prepare(source, tmp_path).notes == [
        "1 sections have no membrane: section_06",
        "membrane and cell look swapped in 1 sections, look at them: section_04",
    ]


def test_identical_sections_stay_on_one_side(isbi, tmp_path):
    source = isbi()

    def change(stack: np.ndarray) -> np.ndarray:
        stack[8] = stack[7]
        return stack

    _rewrite(source / VOLUME, change)
    with pytest.raises(ValueError, match="cross the split: section_07 in training, section_08 in validation"):
        _prepare(source, tmp_path)
    prepared = _prepare(source, tmp_path, validation_fraction=0.3)
    assert prepared.notes == ["identical images: section_07, section_08 (one group)"]


def test_missing_section_is_noted(tmp_path):
    source = tmp_path / "png"
    for folder, stack in zip(("image", "label"), _stacks(6), strict=True):
        (source / folder).mkdir(parents=True)
        for index in (0, 1, 2, 5):
            Image.fromarray(stack[index]).save(source / folder / f"{index}.png")
    assert _prepare(source, tmp_path).notes == ["section numbers have gaps: 3, 4 missing"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_cases": ["section_3"]}, "cases that are not in the source: section_3; did you mean 'section_"),
        (
            {"validation_cases": ["section_03"], "folds": 2, "fold": 0},
            "'section_03' cannot be given to validation with folds, .* choose the fold that contains it",
        ),
        ({"folds": 11, "fold": 0}, "11 folds need 11 cases or more, found 10"),
    ],
)
def test_bad_split(isbi, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        _prepare(isbi(), tmp_path, **options)


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=r"no case in .*: expected train-volume.tif and train-labels.tif, or PNG"):
        _prepare(tmp_path, tmp_path)


def test_stacks_of_one_directory_have_all_their_pages(isbi, tmp_path):
    source = isbi()
    expected = _prepare(source, tmp_path).datalist
    for name in (VOLUME, LABELS):
        stack = tifffile.imread(source / name)
        tifffile.imwrite(source / name, stack, imagej=True, metadata={"axes": "ZYX"}, truncate=True)
    (tmp_path / "out").rename(tmp_path / "before")
    assert _prepare(source, tmp_path).datalist == expected


def test_palettes_of_images_and_labels_are_expanded(tmp_path):
    datalists = []
    for palette in (False, True):
        source = tmp_path / ("palette" if palette else "plain")
        for folder, stack in zip(("image", "label"), _stacks(4), strict=True):
            (source / folder).mkdir(parents=True)
            for number, grey in enumerate(stack):
                image = Image.fromarray(255 - grey, mode="P") if palette else Image.fromarray(grey)
                if palette:
                    image.putpalette(np.arange(255, -1, -1).repeat(3).tolist())
                image.save(source / folder / f"{number}.png")
        prepared = prepare(get_data_set("isbi2012"), source, tmp_path / f"out_{palette}")
        assert prepared.facts["labels"] == "membrane is dark or rare, as expected (4)"
        datalists.append([entry["membrane_fraction"] for entry in prepared.datalist["training"]])
    assert datalists[0] == datalists[1]


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("kind", ["1", "P"])
def test_labels_of_one_bit_and_of_a_coloured_palette(tmp_path, kind, inverted):
    source = tmp_path / "png"
    images, labels = _stacks(4)
    for folder in ("image", "label"):
        (source / folder).mkdir(parents=True)
    for number, (image, label) in enumerate(zip(images, labels == (0 if inverted else 255), strict=True)):
        Image.fromarray(image).save(source / "image" / f"{number}.png")
        mask = Image.fromarray(label) if kind == "1" else Image.fromarray(label.astype(np.uint8), mode="P")
        if kind == "P":
            mask.putpalette([0, 0, 0, 255, 0, 0])
        mask.save(source / "label" / f"{number}.png")
    prepared = _prepare(source, tmp_path, inverted)
    found = [entry["membrane_fraction"] for entry in prepared.datalist["training"]]
    assert found == [round(float((label == 0).mean()), 4) for label in labels[: len(found)]]


def test_merge_keeps_every_page(isbi, tmp_path):
    for name in ("a", "b"):
        prepare(get_data_set("isbi2012"), isbi(root=f"{name}_source"), tmp_path / name)
    merged = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert (merged.datalist["numTraining"], merged.datalist["numValidation"]) == (16, 4)
    prepare(get_data_set("isbi2012"), tmp_path / "a_source", tmp_path / "d")
    merged = merge([tmp_path / "a", tmp_path / "d"], tmp_path / "e")
    assert (merged.datalist["numTraining"], len(merged.notes)) == (8, 10)


def test_samples(samples, tmp_path):
    prepared = prepare(get_data_set("isbi2012"), samples / "isbi2012", tmp_path, validation_fraction=0.5)
    assert (prepared.datalist["numTraining"], prepared.datalist["numValidation"]) == (1, 1)
    assert prepared.facts["size (pixels)"] == "512 x 512"
    assert prepared.facts["labels"] == "membrane is dark or rare, as expected (2)"
    with pytest.raises(DataFaults, match="looks inverted"):
        prepare(get_data_set("isbi2012", invert_labels=True), samples / "isbi2012", tmp_path)
