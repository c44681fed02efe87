"""Run the code of docs/python.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_runs import ROOT, table
from tiny_bundles import TINY_BUNDLES

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    images = {}
    for bundle in TINY_BUNDLES:
        bundle.make(tmp_path)
        images[bundle.name] = bundle.write_image(tmp_path / bundle.name)
        name = {"left_atrium_vnet": "scan.nii.gz", "brain_flair_unet": "scans/brain.nii.gz"}.get(
            bundle.name, bundle.file
        )
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / bundle.name / bundle.file).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    arrays, pictures, others = BLOCKS
    lines = [line for line in arrays.splitlines() if line]
    assert len(lines) <= 10

    exec(compile(arrays, "docs/python.md, arrays", "exec"), names)
    scan, atrium = nib.load("scan.nii.gz"), nib.load("atrium.nii.gz")
    np.testing.assert_array_equal(scan.affine, atrium.affine)
    mask = np.asarray(atrium.dataobj)
    assert set(np.unique(mask)) == {0, 1}
    litres = mask.sum() * 2.0 * 1.8 * 3.0 / 1e6
    assert float(re.search(r"(\S+) ml", capsys.readouterr().out)[1]) == pytest.approx(1000 * litres, abs=0.06)

    exec(compile(pictures, "docs/python.md, pictures", "exec"), names)
    np.testing.assert_array_equal(names["frame"], images["polyp_fcn8"].T)
    assert names["polyp"].shape == (48, 64)
    np.testing.assert_array_equal(names["stack"], images["em_membrane_unet"][0].T)
    assert names["cells"].shape == (2, 56, 48)
    assert names["cells"].max() > 1

    exec(compile(others, "docs/python.md, others", "exec"), names)
    assert [row["status"] for row in table(Path("masks/inference.csv"))] == ["ok"]
    assert nib.load("masks/brain_seg.nii.gz").shape == (32, 40, 4)
    weights = torch.load("bundles/brain_flair_unet/models/model.pt", weights_only=True)
    state = names["network"].state_dict()
    assert all(torch.equal(state[name].half().cpu(), value.half()) for name, value in weights.items())
