from __future__ import annotations

import csv
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import tifffile
import torch
from ignite.engine import Events
from monai.data import Dataset
from monai.inferers import Inferer
from monai.transforms import Compose, EnsureChannelFirstd, Invertd, LoadImaged, Orientationd
from PIL import Image

from segbundles.bundle import RunSettings
from segbundles.data import FolderImages, TolerantDataLoader
from segbundles.engines import InferenceEvents, TolerantEvaluator
from segbundles.handlers import InferenceMeasurements, InferenceResults, Preview
from segbundles.inferers import LocatorCropInferer
from segbundles.transforms import CheckImaged, FillChannelsd, LogitsToClassd, SaveSegmentationd


def volume(path, size=(6, 5, 4), bright=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(len(path.name)).integers(1, 90, size[::-1], dtype=np.uint8)
    if bright:
        data[1:3, 1:3, 1:3] = 200
    image = sitk.GetImageFromArray(data)
    image.SetSpacing([1.0, 2.0, 3.0])
    sitk.WriteImage(image, str(path))
    return path


class Above100(torch.nn.Module):
    def __init__(self, stop_at=None):
        super().__init__()
        self.calls, self.stop_at = 0, stop_at

    def forward(self, x):
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return x - 100.0


class Counting(Inferer):
    """Remembers what it was given."""

    def __init__(self):
        self.inferer = LocatorCropInferer(16, Above100(), locator_spacing_mm=[1.0, 2.0, 3.0], margin_mm=0)
        self.sizes = []

    def __call__(self, inputs, network, *args, **kwargs):
        self.sizes.append(tuple(inputs.shape))
        return self.inferer(inputs, network)


def infer(source, output, network=None, cases=None, channels=1, skip_finished=False, settings=None, **arguments):
    """The wiring of a bundle's inference.json: the evaluator and its inferer."""
    before = Compose(
        [
            LoadImaged("image", reader=f"segbundles.data.{'StackReader' if cases else 'SuffixReader'}"),
            EnsureChannelFirstd("image"),
            CheckImaged("image", channels=None),
            *([FillChannelsd("image", channels)] if channels > 1 else []),
            Orientationd("image", axcodes="RAS", labels=None),
        ]
    )
    inferer = Counting()
    evaluator = TolerantEvaluator(
        "cpu",
        TolerantDataLoader(Dataset(cases or FolderImages(source, output), before), **arguments),
        network or Above100(),
        inferer=inferer if channels == 1 else None,
        postprocessing=Compose(
            [
                LogitsToClassd("pred"),
                Invertd("pred", before, "image", nearest_interp=True, to_tensor=True),
                SaveSegmentationd("pred", output, source),
            ]
        ),
        val_handlers=[InferenceResults(output, source, skip_finished, settings=settings)],
    )
    return evaluator, inferer


def run(evaluator, failed=None):
    """Run; what failed ends the run with this message."""
    if failed is None:
        evaluator.run()
    else:
        with pytest.raises(ValueError, match=failed):
            evaluator.run()


def table(output):
    with (output / "inference.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def outputs(output):
    return sorted(p.relative_to(output).as_posix() for p in output.rglob("*_seg.*"))


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "d"
    volume(source / "p1/a.nrrd")
    volume(source / "p1/ü, b.nrrd", bright=False)
    volume(source / "p2/c.nii.gz", size=(4, 6, 5))
    volume(source / "p2/e.mha", size=(4, 6, 5))
    cut = volume(source / "p1/cut.nrrd", size=(30, 30, 30))
    cut.write_bytes(cut.read_bytes()[:5000])
    sitk.WriteImage(sitk.GetImageFromArray(np.full((3, 3, 3), 7, np.uint8)), str(source / "flat.nrrd"))
    return source


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_bad_images_among_good_ones(tmp_path, folder, batch_size, num_workers, caplog):
    output = tmp_path / "o"
    evaluator, inferer = infer(folder, output, batch_size=batch_size, num_workers=num_workers)
    with caplog.at_level(logging.INFO, "segbundles"):
        run(evaluator, r"^2 of 6 images failed: flat\.nrrd, p1/cut\.nrrd\. See .*inference\.csv\.$")
    assert outputs(output) == ["p1/a_seg.nrrd", "p1/ü, b_seg.nrrd", "p2/c_seg.nii.gz", "p2/e_seg.mha"]
    rows = table(output)
    assert [(row["file"], row["status"]) for row in rows] == [
        ("flat.nrrd", "failed"),
        ("p1/a.nrrd", "ok"),
        ("p1/cut.nrrd", "failed"),
        ("p1/ü, b.nrrd", "ok"),
        ("p2/c.nii.gz", "ok"),
        ("p2/e.mha", "ok"),
    ]
    assert list(rows[0]) == ["file", "status", "seconds", "notes"]
    assert "is constant (every value is 7)" in rows[0]["notes"]
    assert rows[2]["notes"].startswith(f"cannot read {folder}/p1/cut.nrrd: it is truncated or damaged")
    assert [rows[i]["notes"] for i in (1, 3, 4, 5)] == ["", "locator found nothing: whole volume segmented", "", ""]
    assert all(0 <= float(row["seconds"]) < 20 for row in rows)
    # each good image once, together only where the sizes agree
    shapes = [(1, 6, 5, 4)] * 2 + [(1, 4, 6, 5)] * 2
    assert inferer.sizes == [(1, *s) for s in shapes] if batch_size == 1 else [(2, *shapes[0]), (2, *shapes[2])]
    for name in ("p1/a", "p2/e"):
        suffix = ".nrrd" if name == "p1/a" else ".mha"
        given = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{name}{suffix}")))
        made = sitk.GetArrayFromImage(sitk.ReadImage(str(output / f"{name}_seg{suffix}")))
        np.testing.assert_array_equal(made, given > 100)
    warnings = [r.message.split(":")[0] for r in caplog.records if r.levelno == logging.WARNING]
    assert [w for w in warnings if "was not" in w] == ["flat.nrrd was not segmented", "p1/cut.nrrd was not segmented"]


def stack(folder, count, size=(6, 5), channels=3):
    """Colour slices p_1.tif, p_2.tif ..., as paths."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(count).integers(0, 255, (count, *size[::-1], channels), dtype=np.uint8)
    files = [folder / f"p_{k}.tif" for k in range(1, count + 1)]
    for file, picture in zip(files, values.squeeze(), strict=True):
        tifffile.imwrite(file, picture, photometric="rgb" if channels == 3 else "minisblack")
    return [str(file) for file in files]


class First(Above100):
    """Takes one of the channels."""

    def forward(self, x):
        return super().forward(x[:, :1])


GREY = "one channel: taken as FLAIR and used for all 3"


def stacks(source):
    """A stack of three good slices, one of two with a bad third, a grey one, and a volume."""
    bad = stack(source / "p2", 3)
    (source / "p2/p_2.tif").write_bytes(b"no TIFF")
    return [
        {"image": stack(source / "p1", 3)},
        {"image": bad},
        {"image": stack(source / "p3", 2, channels=1)},
        {"image": str(volume(source / "v.nii.gz"))},
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_row_a_slice(tmp_path, batch_size, num_workers, caplog):
    source, output = tmp_path / "d", tmp_path / "o"
    arguments = {"batch_size": batch_size, "num_workers": num_workers, "network": First(), "channels": 3}
    evaluator, _ = infer(source, output, cases=stacks(source), **arguments)
    with caplog.at_level(logging.INFO, "segbundles"):
        run(evaluator, r"^1 of 9 images failed: p2/p_2\.tif\. See")
    rows = {row["file"]: row for row in table(output)}
    assert {file: row["status"] for file, row in rows.items()} == {
        **{f"p1/p_{k}.tif": "ok" for k in (1, 2, 3)},
        **{f"p2/p_{k}.tif": "failed" if k == 2 else "ok" for k in (1, 2, 3)},
        **{f"p3/p_{k}.tif": "ok" for k in (1, 2)},
        "v.nii.gz": "ok",
    }
    notes = {file: row["notes"] for file, row in rows.items()}
    assert notes.pop("p2/p_2.tif").startswith(f"cannot read {source}/p2/p_2.tif: it is truncated or damaged")
    left_out, grey, none = "1 of 3 slices left out", GREY, ""
    assert list(notes.values()) == [none] * 3 + [left_out] * 2 + [grey] * 3
    assert outputs(output) == [
        *(f"p{i}/p_{k}_seg.png" for i, k in ((1, 1), (1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (3, 2))),
        "v_seg.nii.gz",
    ]
    assert len({rows[f"p1/p_{k}.tif"]["seconds"] for k in (1, 2, 3)}) == 1
    messages = sorted(record.message for record in caplog.records if "segmented in" in record.message)
    assert [message.split(" segmented")[0] for message in messages] == [
        *("p1/p_1.tif and 2 more of its stack", "p2/p_1.tif and 1 more of its stack"),
        *("p3/p_1.tif and 1 more of its stack", "v.nii.gz"),
    ]
    assert messages[2].endswith(f"s ({GREY})")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_names_that_are_not_utf8(tmp_path, num_workers):
    """They fail by name, in the table as on the screen, and nothing else does."""
    volume(tmp_path / "d/a.nrrd").rename(tmp_path / "d" / os.fsdecode(b"m\xfcller.nrrd"))
    volume(tmp_path / "d/b.nrrd")
    files = stack(tmp_path / "d/p", 3)
    name = str(Path(files[1]).rename(tmp_path / "d/p" / os.fsdecode(b"p_\xe9.tif")))
    cases = [*FolderImages(tmp_path / "d", suffixes=[".nrrd"]), {"image": [files[0], name, files[2]]}]
    evaluator, _ = infer(tmp_path / "d", tmp_path / "o", First(), cases, channels=3, num_workers=num_workers)
    run(evaluator, r"^2 of 5 images failed: m\\xfcller\.nrrd, p/p_\\xe9\.tif\. See")
    rows = {row["file"]: row for row in table(tmp_path / "o")}
    good = ["b.nrrd", "p/p_1.tif", "p/p_3.tif"]
    assert sorted(rows) == sorted([*good, r"m\xfcller.nrrd", r"p/p_\xe9.tif"])
    assert [file for file, row in rows.items() if row["status"] == "ok"] == good
    message = r"d/m\xfcller.nrrd: its name contains bytes that are not UTF-8; rename it."
    assert rows[r"m\xfcller.nrrd"]["notes"].endswith(message)
    assert outputs(tmp_path / "o") == ["b_seg.nrrd", "p/p_1_seg.png", "p/p_3_seg.png"]


class NotTooBright(First):
    """Fails at an image, or a batch of images, of which one is brighter than any of ``stack``."""

    def forward(self, x):
        if bool((x == 255).any()):
            raise RuntimeError("out of memory")
        return super().forward(x)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_stack_that_cannot_be_segmented(tmp_path, batch_size, bad):
    """Every file of the stack is a row; the others of its batch come out, and notes do not mix."""
    source, output = tmp_path / "d", tmp_path / "o"
    cases = [{"image": stack(source / f"p{k}", 2, channels=1)} for k in range(3)]
    tifffile.imwrite(source / f"p{bad}/p_2.tif", np.full((5, 6), 255, np.uint8), photometric="minisblack")
    evaluator, _ = infer(source, output, NotTooBright(), cases, channels=3, batch_size=batch_size)
    run(evaluator, rf"^2 of 6 images failed: p{bad}/p_1\.tif, p{bad}/p_2\.tif")
    rows = {row["file"]: row for row in table(output)}
    assert len(rows) == 6
    for k in range(3):
        for row in (rows[f"p{k}/p_1.tif"], rows[f"p{k}/p_2.tif"]):
            assert (row["status"], row["notes"]) == (("failed", "out of memory") if k == bad else ("ok", GREY))
    assert outputs(output) == [f"p{k}/p_{n}_seg.png" for k in range(3) if k != bad for n in (1, 2)]
    for k in {0, 1, 2} - {bad}:
        given = tifffile.imread(source / f"p{k}/p_1.tif")
        with Image.open(output / f"p{k}/p_1_seg.png") as made:
            np.testing.assert_array_equal(np.asarray(made) > 0, given > 100)


def test_notes_and_record_of_the_settings(tmp_path):
    volume(tmp_path / "d/a.nrrd")
    volume(tmp_path / "d/b.nrrd", bright=False)
    (tmp_path / "d/c.nrrd").touch()
    settings = RunSettings(bundle="heart", knobs={"amp": False}, notes=["margin_mm 5 differs from the weights' 20"])
    run(infer(tmp_path / "d", tmp_path / "o", settings=settings)[0], "1 of 3 images failed")
    a, b, c = (row["notes"] for row in table(tmp_path / "o"))
    assert a == settings.notes[0]
    assert b == f"locator found nothing: whole volume segmented; {settings.notes[0]}"
    assert c.startswith("cannot read")
    assert c.endswith(f"; {settings.notes[0]}")
    record = json.loads((tmp_path / "o/inferring.config.json").read_text())
    assert (record["bundle"], record["knobs"]) == ("heart", {"amp": False})


class TestSkipFinished:
    def run(self, folder, output, failed=None, cases=None, **arguments):
        """The wiring of a bundle; files that the network saw, and the rows."""
        evaluator, _ = infer(folder, output, cases=cases, skip_finished=True, **arguments)
        seen = []
        evaluator.add_event_handler(
            InferenceEvents.IMAGE_COMPLETED, lambda engine: seen.append(engine.state.report.files[0])
        )
        run(evaluator, failed)
        names = [Path(file).relative_to(folder).as_posix() for file in seen]
        return sorted(names), {row["file"]: row for row in table(output)}

    def test_images_with_outputs_are_passed_over_and_keep_their_rows(self, tmp_path, folder, caplog):
        output = tmp_path / "o"
        good = ["p1/a.nrrd", "p1/ü, b.nrrd", "p2/c.nii.gz", "p2/e.mha"]
        seen, first = self.run(folder, output, "2 of 6 images failed")
        assert seen == good
        (output / "p1/a_seg.nrrd").unlink()
        before = {path: path.stat().st_mtime_ns for path in output.rglob("*_seg.*")}
        rows = table(output)
        with (output / "inference.csv").open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0], delimiter=";")  # as a spreadsheet saves it
            writer.writeheader()
            writer.writerows(rows)
        seen, second = self.run(folder, output, "^2 of 6 images failed")
        assert seen == ["p1/a.nrrd"]
        assert all(path.stat().st_mtime_ns == time for path, time in before.items())
        assert outputs(output) == ["p1/a_seg.nrrd", "p1/ü, b_seg.nrrd", "p2/c_seg.nii.gz", "p2/e_seg.mha"]
        assert second.keys() == first.keys()
        assert [second[file]["notes"] for file in good] == [
            "",
            "locator found nothing: whole volume segmented; finished before",
            *["finished before"] * 2,
        ]
        assert all(second[file]["seconds"] == first[file]["seconds"] for file in good[1:])
        assert second["flat.nrrd"]["status"] == second["p1/cut.nrrd"]["status"] == "failed"
        for name in ("flat.nrrd", "p1/cut.nrrd"):
            (folder / name).unlink()
        caplog.clear()
        with caplog.at_level(logging.INFO, "segbundles"):
            seen, third = self.run(folder, output)  # nothing is left to do
        assert (seen, list(third)) == ([], good)
        assert third["p1/ü, b.nrrd"]["notes"] == second["p1/ü, b.nrrd"]["notes"]
        assert caplog.messages[-1:] == [f"0 images segmented, 4 finished before. Results: {output}"]

    def test_without_a_table_outputs_alone_tell(self, tmp_path):
        volume(tmp_path / "d/a.nrrd")
        self.run(tmp_path / "d", tmp_path / "o")
        (tmp_path / "o/inference.csv").unlink()
        seen, rows = self.run(tmp_path / "d", tmp_path / "o")
        assert seen == []
        assert rows["a.nrrd"] == {"file": "a.nrrd", "status": "ok", "seconds": "", "notes": "finished before"}

    def test_an_output_older_than_a_failure_is_not_trusted(self, tmp_path):
        image = volume(tmp_path / "d/a.nrrd")
        self.run(tmp_path / "d", tmp_path / "o")
        good = image.read_bytes()
        image.write_bytes(b"damaged")
        run(infer(tmp_path / "d", tmp_path / "o")[0], "^a.nrrd was not segmented: ")
        assert outputs(tmp_path / "o") == ["a_seg.nrrd"]  # of the first run
        image.write_bytes(good)
        assert self.run(tmp_path / "d", tmp_path / "o")[0] == ["a.nrrd"]

    def test_a_stack_of_which_a_slice_is_missing_is_done_again(self, tmp_path):
        source, output = tmp_path / "d", tmp_path / "o"
        cases = [{"image": stack(source / f"p{k}", 2)} for k in (1, 2)]
        arguments = {"cases": cases, "network": First(), "channels": 3}
        assert self.run(source, output, **arguments)[0] == ["p1/p_1.tif", "p2/p_1.tif"]
        (output / "p2/p_2_seg.png").unlink()
        seen, rows = self.run(source, output, **arguments)
        assert seen == ["p2/p_1.tif"]
        assert [row["notes"] for row in rows.values()] == ["finished before"] * 2 + [""] * 2

    @pytest.mark.parametrize(("made", "done"), [("a_seg.png", False), ("a_cells.tif", False), (None, True)])
    def test_all_outputs_of_an_image_must_be_there(self, made, done, tmp_path):
        results = InferenceResults(tmp_path / "o", tmp_path, skip_finished=True, postfixes=["seg", "cells"])
        (tmp_path / "o").mkdir()
        for name in [made] if made else ["a_seg.png", "a_cells.tif"]:
            (tmp_path / "o" / name).touch()
        assert results.finished([str(tmp_path / "a.png")]) is done
        assert len(results.rows) == done


def test_all_good_and_the_summary_comes_after_all_other_handlers(tmp_path, caplog):
    volume(tmp_path / "d/a.nrrd")
    evaluator, _ = infer(tmp_path / "d", tmp_path / "o")
    logger = logging.getLogger("segbundles")
    evaluator.add_event_handler(Events.COMPLETED, lambda: logger.info("completed"))
    with caplog.at_level(logging.INFO, "segbundles"):
        for _ in range(2):
            caplog.clear()
            run(evaluator)
            summary = f"1 image segmented. Results: {tmp_path / 'o'}"
            assert caplog.messages[-2:] == ["completed", summary]
            assert caplog.messages.count(summary) == 1


@pytest.mark.parametrize("place", ["out", "."])
def test_results_are_not_segmented_again(tmp_path, place, caplog):
    """The output folder may be in the data folder, or be that folder; without patterns, a label gets a note."""
    source, output = volume(tmp_path / "d/p/a.nrrd"), tmp_path / "d" / place
    mask = np.zeros((3, 3, 3), np.uint8)
    mask[1] = 255
    sitk.WriteImage(sitk.GetImageFromArray(mask), str(tmp_path / "d/b.nrrd"))
    for _ in range(2):
        cases = FolderImages(tmp_path / "d", output, skip=[])
        infer(tmp_path / "d", output, cases=cases)[0].run()
        rows = {row["file"]: row["notes"] for row in table(output)}
        assert list(rows) == ["b.nrrd", "p/a.nrrd"]
        assert "only two grey levels: is this a label?" in rows["b.nrrd"]
        assert rows["p/a.nrrd"] == ""
        assert outputs(output) == ["b_seg.nrrd", "p/a_seg.nrrd"]
    infer(source, tmp_path / "o")[0].run()
    assert table(tmp_path / "o")[0]["file"] == "a.nrrd"
    assert outputs(tmp_path / "o") == ["a_seg.nrrd"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (1, r"^0\.nrrd was not segmented: .*it is truncated or damaged"),
        (5, r"^5 of 5 .*: 0\.nrrd, .*, 2\.nrrd and 2 more\."),
    ],
)
def test_all_bad(tmp_path, bad, message):
    (tmp_path / "d").mkdir()
    for i in range(bad):
        (tmp_path / f"d/{i}.nrrd").touch()
    run(infer(tmp_path / "d", tmp_path / "o")[0], message)
    assert [row["status"] for row in table(tmp_path / "o")] == ["failed"] * bad
    log = (tmp_path / "o/inference.log").read_text()
    assert "0.nrrd was not segmented" in log
    assert "Traceback (most recent call last)" in log  # the screen shows the reason alone and points here


def test_a_run_without_images_leaves_what_is_there(tmp_path):
    volume(tmp_path / "d/a.nrrd")
    run(infer(tmp_path / "d", tmp_path / "o")[0])
    before = {path: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    (tmp_path / "empty").mkdir()
    evaluator, _ = infer(tmp_path / "empty", tmp_path / "o", settings=RunSettings(bundle="heart"))
    for handler in (InferenceMeasurements, Preview):
        handler(tmp_path / "o", tmp_path / "empty").attach(evaluator)
    run(evaluator, "no image under '.*empty': names must end in one of")
    assert {path: path.read_bytes() for path in (tmp_path / "o").iterdir()} == before


def test_the_table_is_written_when_the_run_is_stopped(tmp_path):
    for name in "abc":
        volume(tmp_path / f"d/{name}.nrrd")
    evaluator, _ = infer(tmp_path / "d", tmp_path / "o", network=Above100(stop_at=2))
    with pytest.raises(KeyboardInterrupt):
        evaluator.run()
    assert [(row["file"], row["status"]) for row in table(tmp_path / "o")] == [("a.nrrd", "ok")]
    assert outputs(tmp_path / "o") == ["a_seg.nrrd"]
    assert "KeyboardInterrupt" in (tmp_path / "o/inference.log").read_text()


def test_output_folder_that_cannot_be_written_to(tmp_path):
    volume(tmp_path / "d/a.nrrd")
    (tmp_path / "o").touch()
    network = Above100()
    evaluator, _ = infer(tmp_path / "d", tmp_path / "o", network=network)
    with pytest.raises(ValueError, match=r"output_dir '.*o' cannot be written to .*: give --output_dir another folder"):
        evaluator.run()
    assert network.calls == 0


def test_an_empty_folder_is_an_error(tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(ValueError, match="no image under"):
        infer(tmp_path / "d", tmp_path / "o")[0].run()


def test_a_single_linked_image_goes_by_its_own_name(tmp_path):
    (tmp_path / "0001.nrrd").touch()
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.nrrd").symlink_to(tmp_path / "0001.nrrd")
    results = InferenceResults(tmp_path / "out", tmp_path / "d/a.nrrd")
    assert results.root == tmp_path / "d"
    assert results._name(str(tmp_path / "d/a.nrrd")) == "a.nrrd"
