"""Several processes that tune together, started by torchrun on this machine.

They find each other through files, and nothing listens but gloo or NCCL on the loopback interface.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from backend import errors
from backend.errors import EngineError, QuantdeckError
from backend.paths import PROJECT
from backend.quantize.aqlm.tune.job import Outcome, TuneJob
from backend.quantize.aqlm.tune.progress import History
from backend.quantize.aqlm.tune.report import Measurement, StepReport

TORCHRUN = "backend.quantize.aqlm.tune.torchrun"
ALONE = {
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # torchrun would open a store for all interfaces
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}
TAIL_LINES = 20


def launch(
    job: TuneJob, processes: int, *, on_step: Callable[[StepReport], None], on_stage: Callable[[str], None]
) -> Outcome:
    """Tune in several processes.

    Args:
        job: What.
        processes: How many.
        on_step: Called after each step.
        on_stage: Called with `teacher`, `load`, `tune`.

    Raises:
        QuantdeckError: What the first process that failed said.
        EngineError: If there are fewer devices than processes, or a process failed without a word.
    """
    if torch.device(job.device).type == "cuda" and torch.cuda.device_count() < processes:
        raise EngineError(
            f"{processes} processes need as many CUDA devices; {torch.cuda.device_count()} are visible. "
            "Name as many, or start fewer processes."
        )
    with tempfile.TemporaryDirectory(prefix="quantdeck-") as name:
        folder = Path(name)
        file = job.write(folder)
        program = [sys.executable, "-m", "backend.quick_start", TORCHRUN]
        command = [*program, str(os.getpid()), str(processes), str(folder / "meeting"), str(file)]
        tail: list[str] = []
        with subprocess.Popen(
            command, cwd=PROJECT, env=_environment(processes), stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            try:
                for line in child.stdout:
                    if not _pass_on(line, on_step, on_stage):
                        tail = [*tail, line][-TAIL_LINES:]
                        sys.stderr.write(line)
            except BaseException:
                child.terminate()
                raise
        for rank in range(processes):
            _raise(folder / f"error-{rank}.json")
        answer = folder / "outcome.json"
        if child.returncode or not answer.is_file():
            raise EngineError(
                f"A tuning process ended with exit code {child.returncode}. Its last words: {''.join(tail)[-2000:]}"
            )
        return outcome_from(json.loads(answer.read_text(encoding="utf-8")))


def outcome_from(facts: dict[str, Any]) -> Outcome:
    """The inverse of `asdict`."""
    history = facts["history"]
    measurements = [Measurement(**values) for values in history["measurements"]]
    return Outcome(History(**{**history, "measurements": measurements}), facts["resumed_at"])


def event(**values: Any) -> str:
    """A line by which the first worker tells its starter something."""
    return json.dumps({"tune": values})


def _pass_on(line: str, on_step: Callable[[StepReport], None], on_stage: Callable[[str], None]) -> bool:
    """Whether a line was an event, and if so, hand it on."""
    try:
        values = json.loads(line)["tune"]
    except (ValueError, KeyError, TypeError):
        return False
    if "stage" in values:
        on_stage(values["stage"])
    else:
        on_step(StepReport(**values["step"]))
    return True


def _raise(file: Path) -> None:
    """The error that a worker left, if it did."""
    if not file.is_file():
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["kind"] == "ConfigError":
        raise errors.ConfigError(found["message"], key=found["key"], value=found["value"])
    kind: type[QuantdeckError] = getattr(errors, found["kind"], EngineError)
    raise kind(found["message"])


def _environment(processes: int) -> dict[str, str]:
    threads = max(1, torch.get_num_threads() // processes)
    return {**os.environ, **ALONE, "OMP_NUM_THREADS": str(threads)}
