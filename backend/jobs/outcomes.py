"""How a job ended, as a code for programs and advice for people.

A code is given only where its cause was seen. A process killed by signal 9, for one, is `out_of_memory` only if the
kernel has counted a kill for lack of memory meanwhile; else nobody knows who sent the signal, and it is
`engine_crashed`.
"""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from backend.disk import DiskFullError, is_disk_full
from backend.errors import CheckpointError, ConfigError, DataError, EngineError, JobError, ModelError, QuantdeckError

Outcome = Literal[
    "out_of_memory",
    "gpu_out_of_memory",
    "gpu_lost",
    "disk_full",
    "time_limit",
    "engine_crashed",
    "engine_failed",
    "bad_input",
    "runner_died",
    "machine_restarted",
    "internal_error",
    "cancelled",
]
CODES: tuple[Outcome, ...] = get_args(Outcome)

_ADVICE: dict[Outcome, str] = {
    "out_of_memory": "Close other programs, or use a smaller model, fewer or shorter calibration sequences, or a "
    "smaller evaluation batch, then resume the job: finished layers are not done twice.",
    "gpu_out_of_memory": "Free the GPU of other programs, or use shorter calibration sequences or a smaller "
    "evaluation batch, then resume the job: finished layers are not done twice.",
    "gpu_lost": "The GPU or its driver failed, not the job. Look at `nvidia-smi` and at `dmesg` for lines with Xid; "
    "a restart of the machine may be needed. Then resume the job.",
    "disk_full": "Free some space and resume the job: it goes on where it stopped.",
    "time_limit": "Resume the job: it goes on where it stopped and has the whole time again. A clone of it can be "
    "given a longer TIME_LIMIT_HOURS.",
    "engine_crashed": "The log's last lines may tell why. Resuming goes on after the last finished layer; if it ends "
    "in the same way, clone the job with other settings.",
    "engine_failed": "The reason is the engine's own. Clone the job and change what it names; resume it if the cause "
    "was outside of the job.",
    "bad_input": "The model, the text or a setting cannot be used as asked. Clone the job and change what the reason "
    "names.",
    "runner_died": "Resume the job: it goes on where it stopped. If it happens again, look at the machine's log for "
    "processes killed for lack of memory.",
    "machine_restarted": "Resume the job: it goes on where it stopped.",
    "internal_error": "This is a defect of Quantdeck. The log has the details; please report them.",
    "cancelled": "Resume the job to go on where it stopped.",
}

_GPU_MEMORY = re.compile(
    r"CUDA out of memory|HIP out of memory|torch\.(cuda\.)?OutOfMemoryError|CUDA error: out of memory"
    r"|cudaErrorMemoryAllocation|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
_GPU_LOST = re.compile(
    r"\bXid\b|GPU is lost|NVML_ERROR_GPU_IS_LOST|fallen off the bus|device (is|was) lost|cudaErrorDevicesUnavailable"
    r"|CUDA-capable device\(s\) is/are busy or unavailable|uncorrectable (ECC|NVLink) error|cudaErrorNoDevice"
    r"|no CUDA-capable device is detected|CUDA error: (unknown error|driver shutting down|hardware stack error)"
    r"|Unable to determine the device handle for GPU|NVML: (Unknown Error|Driver Not Loaded)",
    re.IGNORECASE,
)
_MEMORY = re.compile(
    r"\bMemoryError\b|std::bad_alloc|Cannot allocate memory|can't allocate memory|not enough memory: you tried"
    r"|Unable to allocate [\d.]+ [KMGT]i?B",
    re.IGNORECASE,
)


class StageError(EngineError):
    """A stage program ended badly.

    Args:
        message: Why, for people.
        outcome: The same as a code.
    """

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome


class HaltError(JobError):
    """The job as a whole was stopped by a limit, whatever stage it was in.

    Args:
        message: Which limit, for people.
        outcome: The same as a code.
    """

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome


def advice(code: str) -> str:
    """What can be done about an outcome, in one or two sentences; empty for a code that is not known."""
    return _ADVICE.get(code, "")  # type: ignore[call-overload]


def outcome_of_text(text: str) -> Outcome | None:
    """The outcome that an error's words or a log's last lines tell; None if they tell none of those."""
    for pattern, outcome in ((_GPU_LOST, "gpu_lost"), (_GPU_MEMORY, "gpu_out_of_memory"), (_MEMORY, "out_of_memory")):
        if pattern.search(text):
            return outcome  # type: ignore[return-value]
    return None


def classify(
    code: int, *, kind: str = "", message: str = "", tail: Iterable[str] = (), memory_kill: bool = False
) -> Outcome:
    """The outcome of a stage program that failed.

    Args:
        code: Its exit code; negative for the signal that ended it.
        kind: Type of the error that it reported; empty if it reported none.
        message: That error's message.
        tail: The last lines that it wrote to the log.
        memory_kill: Whether the kernel has killed for lack of memory while it ran.
    """
    if kind in ("MemoryError", "ArrayMemoryError", "_ArrayMemoryError"):
        return "out_of_memory"
    if kind:
        bad_input = {e.__name__ for e in (ConfigError, ModelError, CheckpointError, DataError)} | {"ConfigErrors"}
        return outcome_of_text(f"{kind}: {message}") or ("bad_input" if kind in bad_input else "engine_failed")
    # No error of its own was reported, so it did not end in Python's way.
    if memory_kill and code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "out_of_memory"
    return outcome_of_text("\n".join(tail)) or "engine_crashed"


def outcome_of(error: BaseException) -> Outcome:
    """The outcome that an error inside the runner stands for."""
    if isinstance(error, StageError | HaltError):
        return error.outcome
    if isinstance(error, DiskFullError) or is_disk_full(error):
        return "disk_full"
    if isinstance(error, MemoryError):
        return "out_of_memory"
    if isinstance(error, ConfigError | ModelError | CheckpointError | DataError):
        return "bad_input"
    if isinstance(error, QuantdeckError | OSError):
        return "engine_failed"
    return "internal_error"


def memory_kills() -> int | None:
    """How many processes the kernel has killed for lack of memory: in this control group, else on this machine.

    Returns:
        The count so far, or None if the system does not tell.
    """
    for path in _counters():
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in path.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return None


def _counters() -> Iterable[Path]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                yield Path("/sys/fs/cgroup") / path.lstrip("/") / "memory.events"
            elif "memory" in controllers.split(","):
                yield Path("/sys/fs/cgroup/memory") / path.lstrip("/") / "memory.oom_control"
    yield Path("/sys/fs/cgroup/memory.events")
    yield Path("/proc/vmstat")
