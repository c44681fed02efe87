"""What the tests of the bundles share: running one with tiny settings, and reading what it wrote."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from monai.bundle import ConfigParser, run

from segbundles.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT.parent / "shared" / "monai_schema" / "meta_schema_20240725.json"


class BundleRuns:
    """Run a bundle with tiny settings; those given to a method come before them.

    Args:
        name: folder under ``bundles``.
        tiny: settings of every run.
        tiny_training: settings of a training.
    """

    def __init__(self, name: str, tiny: Mapping[str, object], tiny_training: Mapping[str, object]) -> None:
        self.root = ROOT / "bundles" / name
        self.configs = self.root / "configs"
        self.evaluate_files = [str(self.configs / "train.json"), str(self.configs / "evaluate.json")]
        self.tiny = dict(tiny)
        self.tiny_training = dict(tiny_training)

    def config(self, name: str) -> dict:
        """Contents of a JSON, unparsed."""
        return json.loads((self.configs / name).read_text())

    def parsed(self, **settings: object) -> ConfigParser:
        """Parser of train.json."""
        parser = ConfigParser()
        parser.read_config(str(self.configs / "train.json"))
        parser.update({**self.tiny_training, **settings})
        return parser

    def run(self, run_id: str | None, config_file: str | list[str], **settings: object) -> None:
        """Run with the settings given alone; None is written as the word, as MONAI passes over a bare one."""
        words = {key: "null" if value is None else value for key, value in settings.items()}
        run(
            run_id=run_id,
            config_file=config_file if isinstance(config_file, list) else str(self.configs / config_file),
            bundle_root=str(self.root),
            logging_file=False,
            **{key: str(value) if isinstance(value, Path) else value for key, value in words.items()},
        )

    def train(self, dataset_dir: Path, out: Path, **settings: object) -> None:
        """Train into ``out`` and ``out/models``."""
        common = {"dataset_dir": dataset_dir, "output_dir": out, "ckpt_dir": out / "models"}
        self.run("training", "train.json", **{**common, **self.tiny_training, **settings})

    def evaluate(self, trained: Path, dataset_dir: Path, out: Path, **settings: object) -> list[dict[str, str]]:
        """Score; the rows of metrics.csv."""
        common = {"dataset_dir": dataset_dir, "output_dir": out, "ckpt_dir": trained / "models"}
        self.run("evaluating", self.evaluate_files, **{**common, **self.tiny, **settings})
        return table(out / "metrics.csv")

    def infer(self, trained: Path, dataset_dir: Path, output_dir: Path, **settings: object) -> None:
        """Segment, by ``run`` without an id."""
        common = {"dataset_dir": dataset_dir, "output_dir": output_dir, "ckpt_dir": trained / "models"}
        self.run(None, "inference.json", **{**common, **self.tiny, **settings})


def table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    with path.open() as file:
        return list(csv.DictReader(file))


def refuses_to_start(message: str, folder: Path, caplog: pytest.LogCaptureFixture, train: Callable) -> None:
    """Check that a training in a folder stops with a message, which is logged, and writes nothing."""
    with pytest.raises(InputError) as caught:
        train(folder, folder / "out")
    assert message in str(caught.value)
    assert any(record.levelname == "ERROR" and message in record.getMessage() for record in caplog.records)
    assert not (folder / "out").exists()
