"""Running one stage program to its end: its environment, its events, and why it ended badly."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.disk import NEARLY_FULL, NO_SPACE_EXIT, DiskFullError, free_bytes
from backend.engines.environments import environment_variables, own_variables
from backend.formats import remote_code
from backend.jobs.events import end_torn_line, read_events
from backend.jobs.logs.pump import LogPump
from backend.jobs.logs.writer import LogWriter
from backend.jobs.outcomes import StageError, classify, memory_kills
from backend.jobs.redact import redact
from backend.paths import PROJECT
from backend.process import PARENT_VARIABLE, QUIET_THREADS, die_first_of_all, end_descendants, end_tree
from backend.sources import hub_token

FIRST_POLL_S, POLL_S = 0.01, 0.2
"""Pauses between two looks at a program grow from the first to the second: a short one is not waited for in vain."""


@dataclass(frozen=True)
class Command:
    """A stage program.

    Attributes:
        argv: The Python, `-m`, the module, the request's file and the result's.
        environment: The environment of its own that this Python belongs to; None if it is ours.
        hub_token: Whether it may see the token for the Hub.
        code_modules: Where the modules of the model's own code are copied to; None: it may not run such code.
        token_file: Where the home keeps the token for the Hub; without one there, that of our environment is used.
    """

    argv: tuple[str, ...]
    environment: str | None = None
    hub_token: bool = False
    code_modules: Path | None = None
    token_file: Path | None = None

    @property
    def module(self) -> str:
        """Name of the program."""
        return self.argv[2]


@dataclass(frozen=True)
class Watch:
    """What is called while a program runs. An exception of any of them ends the program.

    Attributes:
        on_event: With each event.
        on_poll: Several times a second.
        on_signal: With the name of each signal that is sent to end the program.
        on_stuck: With the pids that even SIGKILL does not end, again and again: until the kernel lets go of them they
            hold what the job was granted, so the job does not end either.
        grace_s: With the exception that ends the program; says how long it may take after SIGINT and after SIGTERM.
        writes: Where the program writes most, and how many bytes at most it still has to write.
    """

    on_event: Callable[[dict[str, Any]], None]
    on_poll: Callable[[], None]
    on_signal: Callable[[str], None]
    on_stuck: Callable[[list[int]], None]
    grace_s: Callable[[BaseException], Sequence[float]]
    writes: Callable[[], tuple[Path, int | None]]


def run_program(command: Command, *, device: Mapping[str, str], events_file: Path, log: LogWriter, watch: Watch) -> Any:
    """Run a program in a session of its own until it ends, and see to it that nothing of it stays behind.

    Args:
        command: The program.
        device: The environment variables that show it the job's devices alone.
        events_file: Takes its standard output; its events are appended.
        log: Takes its standard error.
        watch: What is called meanwhile.

    Returns:
        Its resource usage (`resource.struct_rusage`).

    Raises:
        StageError: If it failed, with its own reason or the end of its log.
        DiskFullError: If that was for lack of disk space.
    """
    cursor = end_torn_line(events_file)
    kills = memory_kills()
    process, errors = _start(command, program_environment(command, device), events_file)
    kind = message = ""
    pause = FIRST_POLL_S
    with LogPump(errors, log) as pump:
        try:
            while True:
                done, status, usage = os.wait4(process.pid, os.WNOHANG)
                events, cursor = read_events(events_file, cursor)
                for event in events:
                    if event.get("stage") == "error":
                        kind, message = str(event.get("kind") or "Error"), redact(str(event.get("message") or ""))
                    else:
                        watch.on_event(event)
                if done:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    break
                watch.on_poll()
                time.sleep(pause)
                pause = min(POLL_S, 1.5 * pause)
        except BaseException as error:
            end_tree(process, grace_s=watch.grace_s(error), on_step=watch.on_signal)
            raise
        finally:
            # A program may leave daemons behind, which may hold the GPU, or the pipe of the log.
            while left := end_descendants():
                watch.on_stuck(left)
    code = process.returncode
    if code == NO_SPACE_EXIT or (code != 0 and free_bytes(events_file.parent) < NEARLY_FULL):
        folder, needed = watch.writes()
        raise DiskFullError(message if code == NO_SPACE_EXIT and message else folder, needed)
    if code != 0:
        tail = pump.last()
        killed = kills is not None and (memory_kills() or 0) > kills
        outcome = classify(code, kind=kind, message=message, tail=tail, memory_kill=killed)
        raise StageError(message or exit_reason(code, tail, memory_kill=killed), outcome)
    return usage


def _start(command: Command, environment: dict[str, str], events_file: Path) -> tuple[subprocess.Popen[bytes], int]:
    """The started program and the reading end of its standard error."""
    reading, writing = os.pipe()
    try:
        with open(events_file, "ab") as out:
            process = subprocess.Popen(
                command.argv, stdin=subprocess.DEVNULL, stdout=out, stderr=writing, cwd=PROJECT,
                start_new_session=True, env=environment,
            )  # fmt: skip
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    die_first_of_all(process.pid)
    return process, reading


def program_environment(command: Command, device: Mapping[str, str]) -> dict[str, str]:
    """The environment variables of a stage program: what is allowed of ours, its devices, and its manners.

    Args:
        command: The program. In an environment of its own it must not find our packages.
        device: The variables that show it the job's devices alone.
    """
    if command.environment is None:
        allowed = own_variables(hub_token=command.hub_token)
        if command.hub_token and command.token_file is not None:
            allowed |= hub_token.variables(command.token_file)
    else:
        allowed = environment_variables(command.environment)
    return {
        **remote_code.environment(allowed, command.code_modules),
        **device,
        **QUIET_THREADS,
        PARENT_VARIABLE: str(os.getpid()),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def exit_reason(code: int, tail: Sequence[str], *, memory_kill: bool) -> str:
    """Why a stage program that reported no error ended, from its exit code and the end of what it wrote."""
    lines = " | ".join(line.strip() for line in tail[-3:] if line.strip())
    if code == -signal.SIGKILL and memory_kill:
        return "its process was killed by the system (signal 9) because memory ran out"
    if code < 0:
        what = f"was ended by signal {-code} ({signal.Signals(-code).name})"
    else:
        what = f"ended with exit code {code} and reported no error"
    if code == -signal.SIGKILL:
        what += "; somebody killed it, or the system did for lack of memory without telling us"
    return f"its process {what}. Last lines of the log: {lines or 'none'}"
