from __future__ import annotations

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from segbundles.handlers import SavePredictions

LABEL = torch.tensor([[[0.0, 1.0], [1.0, 2.0]]])


@pytest.mark.parametrize("key", ["probability", "prob"])
def test_what_was_scored_is_kept(tmp_path, key):
    probability = torch.tensor([[[0.25, 0.75], [0.5, 1.0]]])
    image = MetaTensor(LABEL, meta={"filename_or_obj": "d/p1/img.nrrd"})
    engine = Engine(lambda engine, batch: [{"label": LABEL, "pred": MetaTensor(LABEL), "probability": probability}])
    SavePredictions(tmp_path, key).attach(engine)
    batches = [[{"image": image}], [{"image": image, "case": "a/b: c"}], [{"image": image, "case": "a/b: c"}]]
    for _ in range(2):  # a second run replaces the files
        engine.run(batches)
    files = sorted(path.name for path in (tmp_path / "predictions").iterdir())
    assert files == ["a%2Fb%3A c (2).npz", "a%2Fb%3A c.npz", "p1%2Fimg.npz"]
    with np.load(tmp_path / "predictions/p1%2Fimg.npz") as found:
        assert {name: found[name].dtype.name for name in found} == {
            "label": "uint8",
            "pred": "uint8",
            **({"probability": "float16"} if key == "probability" else {}),
        }
        np.testing.assert_array_equal(found["pred"], LABEL)
        if key == "probability":
            np.testing.assert_array_equal(found["probability"], probability)
