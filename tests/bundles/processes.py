"""What torchrun starts in the tests: several runs of bundles, one after the other, in each of its processes.

    torchrun ... processes.py JOBS

JOBS is a JSON list of keyword arguments of ``monai.bundle.run``, each with a free ``port``, a ``name`` and files to
``remove`` before. If a run fails in the process of rank r, that process writes the error to ``<name>.<r>.error`` beside
JOBS; it ends after the last job and otherwise continues. A job starts when all processes have done the one before.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist
from monai.bundle import run

from segbundles.errors import innermost


def main(jobs: Path) -> None:
    """Run the jobs."""
    # each job has its own process group, which does not meet where torchrun does
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    todo = json.loads(jobs.read_text())
    for job in todo:
        os.environ["MASTER_PORT"] = str(job.pop("port"))
        name, rank = job.pop("name"), os.environ["RANK"]
        removed = job.pop("remove")
        for path in removed if rank == "0" else ():
            Path(path).unlink()
        try:
            run(**job)
        except (RuntimeError, ValueError) as error:
            (jobs.parent / f"{name}.{rank}.error").write_text(innermost(error))
            if job is todo[-1]:
                raise
        if dist.is_initialized():
            dist.destroy_process_group()
        (jobs.parent / f"{name}.{rank}.done").touch()
        while len(list(jobs.parent.glob(f"{name}.*.done"))) < int(os.environ["WORLD_SIZE"]):
            time.sleep(0.02)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
