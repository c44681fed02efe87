from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz_readers.py"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_damaged_files_of_every_format_are_read_or_refused_by_name():
    """Three hundred of them; ``benchmarks/fuzz_readers.py`` reads thousands."""
    done = subprocess.run([sys.executable, SCRIPT, "--files", "300"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    total = done.stdout.splitlines()[-1].split(" | ")
    assert total[0] == "| all"
    assert int(total[1]) > 100  # read
    assert int(total[2]) > 100  # refused
