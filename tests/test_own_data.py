"""The walk of docs/own_data.md: six patients of mixed kinds, from their files to a trained model and masks."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bundle_runs import BundleRuns, table
from own_data import AFFINE, write_patients
from tiny_trainings import TINY_TRAININGS
from typer.testing import CliRunner

from segbundles.cli import app

TINY = TINY_TRAININGS["brain_flair_unet"].settings
RUNS = BundleRuns("brain_flair_unet", TINY, TINY)
THREE = "--images */t1.nii.gz --images */flair.nii.gz --images */t1c.nii.gz"
PARTS = {
    "tiff": "--images */*.tif --labels */*_mask.tif --group folder",
    "rgb": "--images *.nii.gz --labels *_lesion.nii.gz",
    "files": f"{THREE} --labels */lesion.nii.gz",
    "slicer": f"{THREE} --labels */flair.seg.nrrd --segments Lesion --validation-fraction 0",
}


def say(*words: object) -> str:
    """Run ``segbundles`` in this process."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Folder with the patients, a list for each kind, and the joined list."""
    folder = tmp_path_factory.mktemp("own")
    write_patients(folder / "in")
    for name, options in PARTS.items():
        half = [] if "fraction" in options else ["--validation-fraction", 0.5]
        classes = ["--classes", "background,lesion", "--name", name, "--bundle", "brain_flair_unet"]
        out = ["--source", folder / "in" / name, "--out", folder / "parts" / name]
        say("prepare", "pairs", *out, *shlex.split(options), *classes, *half)
    say("merge", *(folder / "parts" / name for name in PARTS), "--out", folder / "all")
    return folder


def test_mixed_patients_are_prepared_and_joined(prepared):
    datalist = json.loads((prepared / "all/datalist.json").read_text())
    assert datalist["name"] == "tiff+rgb+files+slicer"
    groups = {split: {entry["group"] for entry in datalist[split]} for split in ("training", "validation")}
    assert [len(found) for found in groups.values()] == [4, 3]
    (own,) = (entry for entry in datalist["training"] if entry["group"] == "slicer/c7")
    assert own["image"] == [f"../in/slicer/c7/{name}.nii.gz" for name in ("t1", "flair", "t1c")]
    assert own["label"] == "../parts/slicer/converted_labels/c7.nii.gz"


def test_mixed_patients_are_learnt_from_scored_and_segmented(prepared, tmp_path):
    RUNS.train(prepared / "all", tmp_path)
    facts = json.loads((tmp_path / "models/model.json").read_text())
    assert facts["data"]["training"] == {"cases": 7, "groups": 4}  # four slices and three volumes
    assert len(RUNS.evaluate(tmp_path, prepared / "all", tmp_path / "evaluation")) == 3

    (prepared / "in/files/c6/flair.nii.gz").rename(prepared / "flair.nii.gz")
    out, channels = tmp_path / "masks", "*t1.nii.gz,*flair.nii.gz,*t1c.nii.gz"
    settings = {key: value for key, value in TINY.items() if key in RUNS.config("inference.json")}
    with pytest.raises(ValueError, match=r"1 of 2 images failed: c6/t1.nii.gz"):
        BundleRuns("brain_flair_unet", settings, {}).infer(
            tmp_path, prepared / "in/files", out, channels=channels, skip_finished=True
        )
    (prepared / "flair.nii.gz").rename(prepared / "in/files/c6/flair.nii.gz")
    rows = {row["file"]: row for row in table(out / "inference.csv")}
    assert [row["status"] for row in rows.values()] == ["ok", "failed"]
    assert "c6/*flair.nii.gz: there is no such file" in rows["c6/t1.nii.gz"]["notes"]
    # named after the first file, and nothing was assumed about channels
    assert np.allclose(nib.load(out / "c5/t1_seg.nii.gz").affine, AFFINE)
    assert "one channel" not in rows["c5/t1.nii.gz"]["notes"]
