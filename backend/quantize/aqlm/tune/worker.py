"""One of several tuning processes, as torchrun starts it.

Run as `python -m backend.quick_start backend.quantize.aqlm.tune.worker JOB.json`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from backend.errors import ConfigError, QuantdeckError
from backend.files import write_json
from backend.process import die_with_parent
from backend.quantize.aqlm.tune.group import Group
from backend.quantize.aqlm.tune.job import TuneJob, run
from backend.quantize.aqlm.tune.launch import event
from backend.quantize.aqlm.tune.report import StepReport


def main() -> None:
    """Tune; the first process prints events and leaves the outcome beside the job."""
    die_with_parent(os.getppid())
    file = Path(sys.argv[1])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    job = TuneJob.read(file)
    device = torch.device(job.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    store = dist.FileStore(str(file.parent / "store"), size)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)

    def tell(**values: object) -> None:
        if rank == 0:
            print(event(**values), flush=True)

    def on_step(step: StepReport) -> None:
        tell(step=asdict(step))

    try:
        outcome = run(job, Group(rank, size), device, on_step=on_step, on_stage=lambda stage: tell(stage=stage))
    except QuantdeckError as error:
        facts: dict[str, object] = {"kind": type(error).__name__, "message": error.message, "key": "", "value": None}
        if isinstance(error, ConfigError):
            facts |= {"message": error.detail, "key": error.key, "value": error.value}
        write_json(file.parent / f"error-{rank}.json", facts)
        raise
    if rank == 0:
        write_json(file.parent / "outcome.json", asdict(outcome))
    dist.destroy_process_group()
