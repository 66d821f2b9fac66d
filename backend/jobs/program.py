"""Running one stage program to its end: its environment, its events, and why it ended badly."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.disk import NEARLY_FULL, NO_SPACE_EXIT, DiskFullError, free_bytes
from backend.engines.environments import environment_variables
from backend.errors import EngineError
from backend.jobs.devices import device_environment
from backend.jobs.events import end_torn_line, read_events, read_lines
from backend.paths import PROJECT
from backend.process import PARENT_VARIABLE, QUIET_THREADS, end_tree

POLL_S = 0.2
CANCEL_GRACE_S = 5.0


@dataclass(frozen=True)
class Command:
    """A stage program.

    Attributes:
        argv: The Python, `-m`, the module, the request's file and the result's.
        environment: The environment of its own that this Python belongs to; None if it is ours.
    """

    argv: tuple[str, ...]
    environment: str | None = None

    @property
    def module(self) -> str:
        """Name of the program."""
        return self.argv[2]


def run_program(
    command: Command,
    *,
    device: str,
    events_file: Path,
    log_file: Path,
    on_event: Callable[[dict[str, Any]], None],
    on_poll: Callable[[], None],
    writes: Callable[[], tuple[Path, int | None]],
) -> Any:
    """Run a program in a session of its own until it ends; an exception of a callback ends it.

    Args:
        command: The program.
        device: `cpu` or `cuda:N`; the program sees that one alone.
        events_file: Takes its standard output; its events are appended.
        log_file: Takes its standard error.
        on_event: Called with each event.
        on_poll: Called several times a second.
        writes: Where the program writes most, and how many bytes at most it still has to write.

    Returns:
        Its resource usage (`resource.struct_rusage`).

    Raises:
        EngineError: If it failed, with its own reason or the end of its log.
        DiskFullError: If that was for lack of disk space.
    """
    cursor = end_torn_line(events_file)
    log_start = log_file.stat().st_size
    with open(events_file, "ab") as out, open(log_file, "ab") as err:
        process = subprocess.Popen(
            command.argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=PROJECT, start_new_session=True,
            env=program_environment(command.environment, device),
        )  # fmt: skip
    error = None
    try:
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            events, cursor = read_events(events_file, cursor)
            for event in events:
                if event.get("stage") == "error":
                    error = event["message"]
                else:
                    on_event(event)
            if done:
                process.returncode = os.waitstatus_to_exitcode(status)
                break
            on_poll()
            time.sleep(POLL_S)
    except BaseException:
        end_tree(process, grace_s=CANCEL_GRACE_S)
        raise
    code = process.returncode
    if code == NO_SPACE_EXIT or (code != 0 and free_bytes(events_file.parent) < NEARLY_FULL):
        folder, needed = writes()
        raise DiskFullError(error if code == NO_SPACE_EXIT and error else folder, needed)
    if code != 0:
        raise EngineError(error or exit_reason(code, log_file, log_start))
    return usage


def program_environment(environment: str | None, device: str) -> dict[str, str]:
    """The environment variables of a stage program.

    Args:
        environment: Name of its own environment, where it must not find our packages; None for ours.
        device: `cpu` or `cuda:N`.
    """
    return {
        **(os.environ if environment is None else environment_variables(environment)),
        **device_environment(device),
        **QUIET_THREADS,
        PARENT_VARIABLE: str(os.getpid()),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def exit_reason(code: int, log_file: Path, log_start: int) -> str:
    """Why a stage program ended, from its exit code and the end of what it wrote to the log."""
    lines, _ = read_lines(log_file, log_start)
    tail = " | ".join(line.strip() for line in lines[-3:] if line.strip())
    if code == -signal.SIGKILL:
        return "its process was killed by the system (signal 9), most likely for lack of memory"
    what = f"was ended by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
    return f"its process {what}. Last lines of the log: {tail or 'none'}"
