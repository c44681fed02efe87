"""A bundle in MONAI Deploy, by the files of docs/deploy, in an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bundle_runs import ROOT
from tiny_bundles import TINY_BUNDLES, command_line

PYTHON = os.environ.get("SEGBUNDLES_DEPLOY_PYTHON")
DOCS = ROOT / "docs" / "deploy"


@pytest.mark.deploy
@pytest.mark.skipif(
    not PYTHON, reason="SEGBUNDLES_DEPLOY_PYTHON is not a Python with monai-deploy-app-sdk, see docs/share.md"
)
def test_the_operator_gives_the_mask_of_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = next(bundle for bundle in TINY_BUNDLES if bundle.name == "left_atrium_vnet")
    root = bundle.make(tmp_path)
    bundle.write_image(tmp_path / "scans")
    (image,) = (tmp_path / "scans").iterdir()
    volume = nib.load(image)
    monkeypatch.chdir(tmp_path)
    command = f"python -m monai.bundle run --bundle_root {root} --config_file {root}/configs/inference.json"
    command_line(f"{command} --dataset_dir scans --output_dir masks")
    (mask,) = (tmp_path / "masks").glob("*_seg.nii.gz")

    shutil.copy(DOCS / "deploy.json", root / "configs")
    config = root / "configs" / "inference.json"
    # the copy was written by a parser, whose empty metadata would replace those of metadata.json
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "_meta_"}))
    words = [PYTHON, DOCS / "app.py", image, tmp_path / "mask.nii.gz"]
    library = {**os.environ, "PYTHONPATH": str(ROOT / "common")}
    subprocess.run(words, cwd=root, env=library, check=True, capture_output=True)
    found, expected = (np.asarray(nib.load(path).dataobj) for path in (tmp_path / "mask.nii.gz", mask))
    np.testing.assert_allclose(nib.load(tmp_path / "mask.nii.gz").affine, volume.affine, atol=1e-4)
    assert 0.01 < expected.mean() < 0.99
    assert (found == expected).mean() > 0.999  # another version of torch may round a voxel differently
