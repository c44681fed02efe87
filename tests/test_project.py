"""Files around the code that must say the same as the project: versions, Pythons and tools."""

from __future__ import annotations

import re
from pathlib import Path

from segbundles import __version__

ROOT = Path(__file__).resolve().parents[1]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_one_version() -> None:
    assert f'version = "{__version__}"' in text("pyproject.toml")
    assert f"version: {__version__}\n" in text("CITATION.cff")
    assert re.findall(r"^## (\S+)$", text("CHANGELOG.md"), re.MULTILINE)[0] == __version__


def test_pythons_of_the_workflow() -> None:
    workflow = text(".github/workflows/tests.yml")
    (matrix,) = re.findall(r"python: \[(.*?)\]", workflow)
    versions = [version.strip('" ') for version in matrix.split(",")]
    assert versions == ["3.10", "3.11", "3.12", "3.13"]
    assert f'requires-python = ">={versions[0]}"' in text("pyproject.toml")
    assert {"./runtests.sh", ".ci/run", "python -m build"} <= set(
        re.findall(r"\./\S+|\.ci/\w+|python -m build", workflow)
    )


def test_one_version_of_ruff() -> None:
    (pinned,) = re.findall(r"^ruff==(\S+)$", text("constraints.txt"), re.MULTILINE)
    assert re.findall(r"\[ruff==(\S+)\]", text(".pre-commit-config.yaml")) == [pinned, pinned]


def test_everything_is_run_by_ci() -> None:
    assert "./runtests.sh --all\n" in text(".ci/run")
    script = text("runtests.sh")
    assert 'tests=(-m "not label")' in script
    assert script.index("--all ]]") < script.index("tests=()") < script.index("install_segbundles")
