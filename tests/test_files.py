from __future__ import annotations

import logging
import re

import pytest

from segbundles.errors import fail
from segbundles.files import atomic_path, check_writable


def refuse():
    try:
        raise KeyError("x")
    except KeyError:
        fail("a is 3, give 4")


def test_fail_logs_its_message_once_and_is_its_own_root(caplog):
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match=r"^a is 3, give 4$") as caught:
        refuse()
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert [(r.name, r.levelname, r.message) for r in caplog.records] == [("segbundles", "ERROR", "a is 3, give 4")]


def test_file_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "new folder" / "ü b.nii.gz"
    with atomic_path(target) as part:
        part.write_text("all of it")
        assert not target.exists()
        assert part.parent == target.parent
        assert part.name.startswith(".")
        assert part.name.endswith(target.name)
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    assert target.read_text() == "all of it"


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (OSError(28, "No space left on device"), ValueError, r"cannot write .*a\.txt \(No space left on device\)"),
        (RuntimeError("first line\nfile write failed\n"), ValueError, r"cannot write .*a\.txt \(file write failed\)"),
        (RuntimeError(), ValueError, r"cannot write .*a\.txt \(RuntimeError\)"),
        (KeyboardInterrupt("stopped"), KeyboardInterrupt, "stopped"),
        (TypeError("a defect"), TypeError, "a defect"),
    ],
)
def test_no_half_file_and_the_old_one_stays(tmp_path, error, expected, message):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write():
        with atomic_path(target) as part:
            part.write_text("ha")
            raise error

    with pytest.raises(expected, match=message):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert target.read_text() == "old"


def test_a_file_where_a_folder_is_due(tmp_path):
    (tmp_path / "in the way").touch()
    target = tmp_path / "in the way" / "a.txt"

    def write():
        with atomic_path(target):
            pytest.fail("nothing can be written")

    with pytest.raises(ValueError, match=re.escape(f"cannot write {target} (")):
        write()
    with pytest.raises(ValueError, match=r"ckpt_dir '.*in the way' cannot be written to \(.*give --ckpt_dir another"):
        check_writable(tmp_path / "in the way", "ckpt_dir")


def test_check_writable_makes_the_folder_and_leaves_nothing_in_it(tmp_path):
    check_writable(tmp_path / "a" / "b", "output_dir")
    assert list((tmp_path / "a" / "b").iterdir()) == []
