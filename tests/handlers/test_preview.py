from __future__ import annotations

import csv
import logging

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from monai.data import Dataset
from monai.transforms import Compose, EnsureChannelFirstd, Invertd, LoadImaged, Orientationd

from segbundles.bundle import RunSettings
from segbundles.data import FolderImages, TolerantDataLoader
from segbundles.engines import TolerantEvaluator
from segbundles.handlers import InferenceResults, Preview
from segbundles.handlers import preview as module
from segbundles.measurements import measure_volume
from segbundles.report import read_preview
from segbundles.transforms import CheckImaged, LogitsToClassd, Previewd, SaveSegmentationd


def volume(path, bright=((1, 3), (1, 3), (1, 3))):
    """A volume of 4 x 5 x 6 (x, y, z) with a bright box."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(len(path.name)).integers(1, 90, (6, 5, 4), dtype=np.uint8)
    data[tuple(slice(*side) for side in reversed(bright))] = 200
    image = sitk.GetImageFromArray(data)
    image.SetSpacing([1.0, 2.0, 3.0])
    sitk.WriteImage(image, str(path))


class Above100(torch.nn.Module):
    def __init__(self, stop_at=None):
        super().__init__()
        self.calls, self.stop_at = 0, stop_at

    def forward(self, x):
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return x - 100.0


def measure(item):
    """What the bundles measure, after the mask is back on the grid of the file."""
    found = measure_volume(item["pred"][0].numpy(), item["pred"].affine.numpy(), {1: "atrium"})
    return {**item, "measurements": found, "review": "touches the border" if found["touches_border"] else ""}


def infer(source, output, network=None, skip_finished=False, transform=None, settings=None, first=True):
    """The wiring of a bundle's inference.json."""
    before = Compose(
        [
            LoadImaged("image", reader="segbundles.data.SuffixReader"),
            EnsureChannelFirstd("image"),
            CheckImaged("image"),
            Orientationd("image", axcodes="RAS", labels=None),
        ]
    )
    after = [
        LogitsToClassd("pred"),
        transform or Previewd(),
        Invertd("pred", before, "image", nearest_interp=True, to_tensor=True),
        SaveSegmentationd("pred", output, source),
        measure,
    ]
    handlers = [
        Preview(output, source, "Atria", settings, skip_finished),
        InferenceResults(output, source, skip_finished, settings=settings),
    ]
    loader = TolerantDataLoader(Dataset(FolderImages(source, output), before))
    evaluator = TolerantEvaluator(
        "cpu",
        loader,
        network or Above100(),
        postprocessing=Compose(after),
        val_handlers=handlers if first else handlers[::-1],
    )
    evaluator.run()


@pytest.fixture
def folder(tmp_path):
    volume(tmp_path / "d/p1/a.nrrd")
    volume(tmp_path / "d/p2/b.nii.gz", ((1, 4), (1, 3), (2, 5)))  # touches the border
    volume(tmp_path / "d/c.mha", ((1, 2), (1, 2), (1, 2)))
    (tmp_path / "d/z.nrrd").write_bytes(b"damaged")
    return tmp_path / "d"


def shown(output):
    return {case["name"]: case for case in read_preview(output / "preview.html")}


@pytest.mark.parametrize("first", [True, False])
def test_page_of_a_run(tmp_path, folder, first):
    settings = RunSettings(classes={"0": "background", "1": "atrium"}, notes=["amp differs"])
    with pytest.raises(ValueError, match="1 of 4 images failed"):
        infer(folder, tmp_path / "o", settings=settings, first=first)
    cases = shown(tmp_path / "o")
    assert list(cases) == ["z.nrrd", "p2/b.nii.gz", "c.mha", "p1/a.nrrd"]
    assert [case["status"] for case in cases.values()] == ["failed", "please check", "ok", "ok"]
    assert "z.nrrd: it is" in cases["z.nrrd"]["reason"]
    assert cases["p2/b.nii.gz"]["review"] == "touches the border"
    assert cases["p1/a.nrrd"]["found"] == "atrium: 0.0 ml"  # 8 voxels of 6 mm3
    assert cases["p1/a.nrrd"]["measured"] == [["atrium", "0.0 ml, slices 2 to 3"]]
    assert [case["slices"] is not None for case in cases.values()] == [False, True, True, True]
    found = cases["p2/b.nii.gz"]["slices"]
    assert (found["size"], found["aspect"], found["slices"], found["start"]) == ([4, 5], 0.4, 6, 2)
    assert list(found["overlays"][0]["classes"][0]["paths"]) == ["2", "3", "4"]
    page = (tmp_path / "o/preview.html").read_text(encoding="utf-8")
    assert "<h1>Atria</h1>" in page
    assert "<p>amp differs</p>" in page
    with (tmp_path / "o/inference.csv").open(newline="", encoding="utf-8") as table:
        assert {row["file"] for row in csv.DictReader(table)} == set(cases)


@pytest.mark.parametrize("first", [True, False])
def test_a_run_that_is_stopped(tmp_path, folder, first):
    with pytest.raises(KeyboardInterrupt):
        infer(folder, tmp_path / "o", Above100(stop_at=2), first=first)
    assert list(shown(tmp_path / "o")) == ["c.mha"]
    assert (tmp_path / "o/inference.csv").is_file()
    assert "ERROR" in (tmp_path / "o/inference.log").read_text()


def test_finished_images_keep_their_blocks(tmp_path, folder):
    output = tmp_path / "o"
    with pytest.raises(KeyboardInterrupt):
        infer(folder, output, Above100(stop_at=3))
    earlier = shown(output)
    assert list(earlier) == ["c.mha", "p1/a.nrrd"]
    (folder / "c.mha").unlink()
    (folder / "z.nrrd").unlink()
    network = Above100()
    infer(folder, output, network, skip_finished=True)
    cases = shown(output)
    assert (network.calls, list(cases)) == (1, ["p2/b.nii.gz", "p1/a.nrrd"])
    assert cases["p1/a.nrrd"] == earlier["p1/a.nrrd"]
    (output / "p1/a_seg.nrrd").unlink()
    infer(folder, output, network, skip_finished=True)
    assert network.calls == 2
    assert list(shown(output)) == list(cases)
    infer(folder, output, network)
    assert network.calls == 4
    assert list(shown(output)) == list(cases)


def test_what_cannot_be_shown_is_a_warning(tmp_path, folder, caplog):
    """The segmentation is there, and the run goes on."""
    (folder / "z.nrrd").unlink()
    wrong = {"image": np.zeros((2, 2)), "overlays": {"o": np.zeros((3, 3))}}
    infer(folder, tmp_path / "o", transform=lambda item: {**item, "preview": wrong})
    cases = shown(tmp_path / "o")
    assert len(cases) == 3
    for name, case in cases.items():
        assert case["slices"] is None
        assert case["notes"].startswith("no picture: image must have shape")
        assert any(text.startswith(f"{name} is not shown in preview.html: ") for text in caplog.messages)
    infer(folder, tmp_path / "o2", transform=lambda item: item)
    assert {case["notes"] for case in shown(tmp_path / "o2").values()} == {""}


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path, folder, caplog):
    (folder / "z.nrrd").unlink()
    (tmp_path / "o/preview.html").mkdir(parents=True)
    infer(folder, tmp_path / "o")
    assert "preview.html was not written: cannot write" in caplog.text
    assert (tmp_path / "o/inference.csv").is_file()


def test_images_of_all_processes_and_stacks_are_on_the_page(tmp_path, folder, monkeypatch):
    (folder / "z.nrrd").unlink()
    other = {**dict.fromkeys(("reason", "review", "notes", "found"), ""), "measured": [], "seconds": 1, "slices": None}
    other |= {"name": "b/1.tif and 1 more of its stack", "files": ["b/1.tif", "b/2.tif"]}
    monkeypatch.setattr(module, "gather", lambda mine: [mine, [other]])
    infer(folder, tmp_path / "o")
    names = list(shown(tmp_path / "o"))
    assert names == ["p2/b.nii.gz", "b/1.tif and 1 more of its stack", "c.mha", "p1/a.nrrd"]


def test_images_share_the_page(tmp_path, folder, monkeypatch, caplog):
    seen = []
    monkeypatch.setattr("segbundles.report.case_slices", lambda *a, most_bytes, **k: seen.append(most_bytes))
    (folder / "z.nrrd").unlink()
    infer(folder, tmp_path / "o")
    monkeypatch.setattr(module, "_PAGE_BYTES", 300_000)
    with caplog.at_level(logging.WARNING):
        infer(folder, tmp_path / "o")
    assert seen == [1_000_000] * 3 + [100_000] * 3
    assert not caplog.messages
