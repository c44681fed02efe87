"""What torchrun starts in the tests: several runs of bundles, one behind the other, in each of its processes.

    torchrun ... processes.py JOBS

JOBS is a list in JSON of keyword arguments of ``monai.bundle.run``, each with a free ``port``, a ``name`` and files to
``remove`` before. In the folder of that file, the process of rank r writes what its run failed with, if it did, into
``<name>.<r>.error``; in the last job it then ends, in others it goes on.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from monai.bundle import run

from segbundles.errors import innermost


def main(jobs: Path) -> None:
    """Run the jobs."""
    # a process group of its own for each: their meeting point is not the one of torchrun
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
        except RuntimeError as error:
            (jobs.parent / f"{name}.{rank}.error").write_text(innermost(error))
            if job is todo[-1]:
                raise
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
