from __future__ import annotations

import ast
import io
import logging
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from segbundles.errors import InputError, fail, innermost, refusal_in, show_reason_last

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


def test_a_refusal_is_found_below_all_wrappers() -> None:
    refusal, outer = InputError("a"), RuntimeError("b")
    outer.__cause__ = OSError("c")
    outer.__cause__.__context__ = refusal
    assert refusal_in(outer) is refusal_in(refusal) is refusal
    assert refusal_in(ValueError("d")) is None


class TestReasonLast:
    @staticmethod
    def show(monkeypatch: pytest.MonkeyPatch, folder: Path) -> io.StringIO:
        """What a process of ``python -m monai.bundle`` shows, with a console for its log."""
        screen = io.StringIO()
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("monai.bundle.__main__", None))
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        for name, value in {"excepthook": sys.__excepthook__, "stdout": screen, "stderr": screen}.items():
            monkeypatch.setattr(sys, name, value)
        monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(screen)])
        show_reason_last()
        return screen

    @staticmethod
    def end(raises: type[BaseException]) -> None:
        """End the process with what :func:`refuse` raises inside MONAI."""
        try:
            try:
                refuse()
            except ValueError as error:
                raise RuntimeError("Failed to evaluate") from error
        except raises:
            sys.excepthook(*sys.exc_info())

    def test_the_reason_is_the_only_line_and_names_the_file_with_the_traceback(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        screen = self.show(monkeypatch, tmp_path)
        self.end(RuntimeError)
        (log,) = tmp_path.iterdir()
        assert screen.getvalue() == f"ERROR: a is 3, give 4 (traceback: {log})\n"
        assert "Failed to evaluate" in log.read_text()

    def test_the_log_of_the_run_is_named_if_it_has_the_traceback(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        screen = self.show(monkeypatch, tmp_path)
        monkeypatch.setattr(InputError, "log", tmp_path / "training.log")
        self.end(RuntimeError)
        assert screen.getvalue().endswith(f"(traceback: {tmp_path / 'training.log'})\n")
        assert list(tmp_path.iterdir()) == []

    def test_other_errors_are_shown_as_before(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        screen = self.show(monkeypatch, tmp_path)
        try:
            raise ZeroDivisionError("x")
        except ZeroDivisionError:
            sys.excepthook(*sys.exc_info())
        assert "Traceback" in screen.getvalue()

    def test_in_other_programs_nothing_changes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = sys.excepthook
        show_reason_last()
        assert sys.excepthook is before
