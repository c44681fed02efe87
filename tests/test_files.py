from __future__ import annotations

import errno
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from segbundles import files
from segbundles.files import (
    RunLock,
    RunLog,
    atomic_path,
    check_writable,
    read_json,
    read_table,
    shown,
    walk,
    write_table,
)


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


def test_a_file_in_place_of_a_folder(tmp_path):
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


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    over = subprocess.Popen(["true"])
    over.wait()
    with atomic_path(tmp_path / "model.pt") as part:
        own = part.name
        part.touch()
    gone = own.replace(f"-{os.getpid()}.", f"-{over.pid}.")
    others = [own, gone.replace(files._HOST, "another0"), f".{over.pid}.part.model.pt", ".notes"]
    for name in (gone, gone.replace("model.pt", "training.ckpt"), *others):
        (tmp_path / name).touch()
    files._swept.clear()
    with atomic_path(tmp_path / "other.txt") as part:
        part.touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "model.pt", "other.txt"])


def test_walk_says_what_it_does_not_search(tmp_path, caplog):
    for name in ("a.png", "b/c.png", "b/.hidden.png", ".git/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "again").symlink_to(tmp_path / "b")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere.png")
    found = {path.relative_to(tmp_path).as_posix() for path in walk(tmp_path)}
    assert found == {"a.png", "b/c.png", "b/.hidden.png", "link.png", "lost.png"}
    assert caplog.messages == [
        f"{tmp_path}/again was not searched: it is a link to a folder. Name that folder to search it."
    ]


class Other:
    """Another process, which has taken the lock."""

    def __init__(self, kind: str, path: Path) -> None:
        setting = "ckpt_dir" if kind == "RunLock" else "output_dir"
        code = (
            f"from segbundles.files import {kind}; x = {kind}({str(path)!r}, {setting!r}); x.take(); print(); input()"
        )
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process.stdout.readline()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def other() -> Iterator[list[Other]]:
    others: list[Other] = []
    yield others
    for one in others:
        one.kill()


@pytest.mark.parametrize(
    ("lock", "setting", "left"),
    [(RunLock, "ckpt_dir", []), (RunLog, "output_dir", ["x.log"])],
)
def test_one_run_at_a_time(tmp_path, other, lock, setting, left):
    path = tmp_path / "x.log"
    other.append(Other(lock.__name__, path))
    mine = lock(path, setting)
    message = f"{setting} {str(tmp_path)!r} is in use: another run is writing x.log there. Wait until it ends, or"
    with pytest.raises(ValueError, match=re.escape(message)):
        mine.take()
    other[0].kill()
    mine.take()  # a process that was killed holds nothing
    again = lock(path, setting)
    again.take()  # nor does a run of this process keep out the next one
    mine.release()
    again.release()
    assert [p.name for p in tmp_path.iterdir()] == left


@pytest.mark.parametrize("lock", [RunLock, RunLog])
def test_the_lock_outlives_an_earlier_holder_of_this_process(tmp_path, lock):
    (tmp_path / "linked").symlink_to(tmp_path)
    earlier, later = lock(tmp_path / "linked" / "x.log", "output_dir"), lock(tmp_path / "x.log", "output_dir")
    earlier.take()
    later.take()
    del earlier
    code = f"from segbundles.files import {lock.__name__} as L; L({str(tmp_path / 'x.log')!r}, 'output_dir').take()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "is in use: another run is writing x.log there" in done.stderr
    later.release()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_system_without_locks_is_left_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    lock = RunLock(tmp_path / "model.pt", "ckpt_dir")
    lock.take()
    assert list(tmp_path.iterdir()) == []
    lock.release()


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), OSError(errno.ENOSYS, "not there")])
def test_without_locks_the_run_goes_on(tmp_path, monkeypatch, error):
    def lockf(*_):
        raise error

    monkeypatch.setattr(files.fcntl, "lockf", lockf)
    lock = RunLock(tmp_path / "model.pt", "ckpt_dir")
    lock.take()
    assert [p.name for p in tmp_path.iterdir()] == [".model.pt.lock"]
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_the_log_holds_what_is_logged_while_it_is_open(tmp_path):
    logger = logging.getLogger("segbundles")
    log = RunLog(tmp_path / "a.log")
    logger.warning("too early")
    log.take()
    logger.warning("100% ü")
    log.release()
    logger.warning("too late")
    log.take()
    try:
        raise TypeError("what stopped it")
    except TypeError as error:
        log.release(error)
    lines = (tmp_path / "a.log").read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(rf"\d{{4}}-.* INFO Started as process {os.getpid()} on .*", lines[0])
    assert lines[1].endswith("WARNING 100% ü")
    assert " INFO Started as process " in lines[2]
    assert lines[3].endswith(" ERROR Traceback (most recent call last):")
    assert lines[-1] == "TypeError: what stopped it"
    assert not any(" too " in line for line in lines)


def test_a_log_that_is_forgotten_is_closed(tmp_path):
    log = RunLog(tmp_path / "a.log")
    log.take()
    before = list(logging.getLogger().handlers)
    del log
    assert len(logging.getLogger().handlers) == len(before) - 1


def test_a_log_that_cannot_be_written_shows_no_errors(tmp_path, capsys):
    log = RunLog(tmp_path / "a.log")
    log.take()
    log._handler.setStream(Path("/dev/full").open("w"))  # noqa: SIM115
    logging.getLogger("segbundles").warning("one")
    log.release()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_as_spreadsheets_save_them(tmp_path: Path, separator: str, mark: str) -> None:
    rows = [["frame", "sequence"], ["1", "a b"], ["2", "é"]]
    (tmp_path / "t.csv").write_text(mark + "\r\n".join(map(separator.join, rows)) + "\r\n", encoding="utf-8")
    assert list(read_table(tmp_path / "t.csv")) == [
        {"frame": "1", "sequence": "a b"},
        {"frame": "2", "sequence": "é"},
    ]
    (tmp_path / "t.json").write_text(mark + '{"é": 1}', encoding="utf-8")
    assert read_json(tmp_path / "t.json") == {"é": 1}


def test_tables_have_empty_cells_for_what_is_undefined(tmp_path: Path) -> None:
    rows = [{"case": "a, b", "dice": 1 / 3, "n": 2, "more": 1}, {"case": "c", "dice": float("nan"), "n": None}, {}]
    write_table(tmp_path / "t.csv", ["case", "dice", "n"], rows)
    assert (tmp_path / "t.csv").read_text().splitlines() == ["case,dice,n", '"a, b",0.333333,2', "c,,", ",,"]


def test_a_name_that_is_not_utf_8_is_escaped_and_not_written(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    assert shown(path) == rf"{tmp_path}/caf\xe9.png"
    assert shown(tmp_path / "café.png") == f"{tmp_path}/café.png"
    message = r"cannot write .*caf\\xe9.png: its name contains bytes that are not UTF-8"
    with pytest.raises(ValueError, match=message), atomic_path(path):
        pass
    log = RunLog(tmp_path / "run.log")
    log.take()
    log._note("INFO", f"{path} was read")  # not through logging: pytest-xdist cannot send what it captures
    log.release()
    assert r"caf\udce9.png was read" in (tmp_path / "run.log").read_text(encoding="utf-8")
