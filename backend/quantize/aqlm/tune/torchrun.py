"""torchrun, tied to the life of its starter: `launch` starts it, and it starts the workers.

Run as `python -m backend.quick_start backend.quantize.aqlm.tune.torchrun STARTER PROCESSES MEETING JOB.json`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch.distributed import run

from backend.process import die_with_parent

WORKER = "backend.quantize.aqlm.tune.worker"


def main() -> None:
    """torchrun, without a port, for as long as the starter lives."""
    starter, processes, meeting, file = sys.argv[1:]
    die_with_parent(int(starter))
    Path(meeting).touch()
    run.main(
        [
            "--nnodes=1", f"--nproc-per-node={processes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={meeting}",
            "--rdzv-conf=store_type=file", "--rdzv-id=tune", "--max-restarts=0", "-m", "backend.quick_start", WORKER,
            file,
        ]
    )  # fmt: skip
