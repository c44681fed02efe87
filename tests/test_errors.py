from __future__ import annotations

import ast
import logging
from pathlib import Path

import pytest

from segbundles.errors import InputError, fail, innermost

LIBRARY = Path(__file__).resolve().parents[1] / "common" / "segbundles"


def refuse() -> None:
    try:
        raise KeyError("x")
    except KeyError:
        fail("a is 3, give 4")


def test_fail_logs_its_message_once_and_hides_the_cause(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match=r"^a is 3, give 4$") as caught:
        refuse()
    assert isinstance(caught.value, ValueError)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert [(r.name, r.levelno, r.message) for r in caplog.records] == [("segbundles", logging.ERROR, "a is 3, give 4")]


def test_innermost_is_the_message_below_all_wrappers() -> None:
    outer, inner, innermost_of_all = RuntimeError("first"), ValueError("second"), KeyError()
    outer.__cause__, inner.__cause__ = inner, innermost_of_all
    assert innermost(outer) == "KeyError"
    assert innermost(ValueError("alone")) == "alone"


def test_the_library_refuses_input_by_fail() -> None:
    """A bare ValueError would not be logged, and so not be seen below what MONAI wraps around it."""
    raised = {
        path.relative_to(LIBRARY).as_posix()
        for path in LIBRARY.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise) and ast.unparse(node.exc or node).startswith("ValueError")
    }
    assert raised == {"networks/arguments.py"}  # TorchScript cannot log
