"""Runs of bundles in processes of their own that start at once, with faults in them.

    python forked_runs.py

imports what a run needs, and forks a process for each job that it reads, a line of JSON. It answers with the number of
that process; read that number, it answers with the exit status of the process when it has ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from pydoc import locate
from typing import Any

KILLED = -signal.SIGKILL
# by a run
IMPORTED = (
    "matplotlib.pyplot",
    "monai.bundle",
    "torch.utils.tensorboard",
    "segbundles.bundle",
    "segbundles.handlers",
    "segbundles.inferers",
    "segbundles.losses",
    "segbundles.report",
    "tiny_bundles",
)


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a run: at the so-manyth call of a function, of those with a path of this name among arguments.

    Args:
        at: function, with its module.
        call: number of the call, from 1.
        do: ``kill`` the process, ``half``: write half of the file and kill, ``pause`` until a file is gone, or
            ``memory``: keep the resident memory (KiB) after every call, a line each.
        name: of the file among the arguments; any if empty.
        path: the file that pauses, or of the memory.
    """

    at: str
    call: int = 1
    do: str = "kill"
    name: str = ""
    path: str = ""

    def set_up(self) -> None:
        """Put it in the place of the function."""
        module, _, name = self.at.rpartition(".")
        owner: Any = locate(module)
        original = getattr(owner, name)
        calls = count(1)

        def replaced(*args: Any, **kwargs: Any) -> Any:
            paths = [arg for arg in args if isinstance(arg, Path)]
            if (self.name and not any(path.name.endswith(self.name) for path in paths)) or (
                self.do != "memory" and next(calls) != self.call
            ):
                return original(*args, **kwargs)
            if self.do == "pause":
                Path(self.path).touch()
                while Path(self.path).exists():
                    time.sleep(0.05)
            if self.do == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if self.do == "half":
                os.truncate(paths[0], paths[0].stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            if self.do == "memory":
                resident = re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())
                with Path(self.path).open("a") as file:
                    file.write(f"{resident[1]}\n")
            return result

        setattr(owner, name, replaced)


class ForkedRuns:
    """The server, seen from a test."""

    def __init__(self) -> None:
        # without the descriptors of pytest's capture, so that a test that fails does not wait for it
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def start(
        self, command: Sequence[object], output: Path, fault: Fault | None = None, powerless: bool = False
    ) -> int:
        """Start ``python -m monai.bundle <command>``.

        Args:
            command: its words.
            output: file of what it prints.
            fault: what goes wrong.
            powerless: whether permissions hold for it, though the tests are run as root.
        """
        job = {"command": [*map(str, command)], "output": str(output), "powerless": powerless}
        return self._ask({**job, "fault": fault and asdict(fault)})

    def wait(self, process: int) -> int:
        """Exit status of a process."""
        return self._ask(process)

    def _ask(self, question: Any) -> int:
        print(json.dumps(question), file=self._server.stdin)
        return int(self._server.stdout.readline())

    def close(self) -> None:
        """End the server."""
        self._server.communicate()


def _serve() -> None:
    for name in IMPORTED:
        import_module(name)
    for line in sys.stdin:
        question = json.loads(line)
        if isinstance(question, int):
            answer = os.waitstatus_to_exitcode(os.waitpid(question, 0)[1])
        elif not (answer := os.fork()):
            _run(**question)
        print(answer, flush=True)
    os._exit(0)  # at once: there is nothing to tidy up


def _run(command: list[str], output: str, fault: dict[str, Any] | None, powerless: bool) -> None:
    from tiny_bundles import command_line

    status = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(file, stream)
        if powerless:
            # of root's powers none: neither to read nor to write what permissions forbid
            header = (ctypes.c_uint32 * 2)(0x20080522, 0)
            ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)())
        if fault:
            Fault(**fault).set_up()
        command_line(["python", "-m", "monai.bundle", *command])
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as the interpreter does at the end
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
