"""Runs a program as a fresh process and says what it cost: CPU seconds, peak memory, wall time.

The kernel counts a process's peak memory from the moment of the fork, so a large parent would be counted too.
Commands that measure therefore import no torch; whatever needs it runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.paths import PROJECT
from backend.process import PARENT_VARIABLE, QUIET_THREADS

ONE_THREAD = {
    **QUIET_THREADS,
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1"),
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}
"""Environment of a measured process: one thread, no network."""


@dataclass(frozen=True)
class Usage:
    """What a process and the descendants that it waited for cost.

    Attributes:
        cpu_s: User and system time, seconds, from the start of the interpreter to its end.
        wall_s: Seconds.
        peak_bytes: Largest resident memory of any one of the processes, mapped files included.
        exit_code: 0 if all went well; negative: the signal that ended it.
    """

    cpu_s: float
    wall_s: float
    peak_bytes: int
    exit_code: int


class ProgramError(Exception):
    """A program failed; the message is the end of its log."""


def run(command: Sequence[str | Path], *, log: Path, limit_s: float, environment: Mapping[str, str]) -> Usage:
    """Run a command from the project folder and measure it.

    Args:
        command: Program and arguments.
        log: Takes its standard output and error.
        limit_s: Wall seconds after which it is killed.
        environment: Added to this process's own environment.
    """
    began = time.perf_counter()
    variables = {**os.environ, **environment, PARENT_VARIABLE: str(os.getpid())}
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=PROJECT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    timer = threading.Timer(limit_s, _kill_group, (process.pid,))
    timer.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    except BaseException:
        _kill_group(process.pid)
        process.wait()
        raise
    finally:
        timer.cancel()
    return Usage(
        usage.ru_utime + usage.ru_stime, time.perf_counter() - began, usage.ru_maxrss * 1024, process.returncode
    )


def call(
    program: str | Path,
    request: Mapping[str, Any],
    folder: Path,
    *,
    python: str | Path = sys.executable,
    one_thread: bool = True,
    limit_s: float = 3600.0,
    environment: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], Usage]:
    """Run a program that takes `REQUEST.json RESULT.json`.

    Args:
        program: A module's name, or the path of a script.
        request: What it is to do.
        folder: Takes the request, the result and the log.
        python: Interpreter.
        one_thread: Whether it computes on one thread.
        limit_s: Wall seconds after which it is killed.
        environment: Further variables.

    Returns:
        Its result and what it cost.

    Raises:
        ProgramError: If it failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked, answer, log = folder / "request.json", folder / "result.json", folder / "log.txt"
    asked.write_text(json.dumps(request, indent=1), encoding="utf-8")
    start = [program] if isinstance(program, Path) else ["-m", program]
    variables = {**(ONE_THREAD if one_thread else QUIET_THREADS), **(environment or {})}
    usage = run([python, *start, asked, answer], log=log, limit_s=limit_s, environment=variables)
    if usage.exit_code != 0 or not answer.is_file():
        raise ProgramError(_reason(usage, log, limit_s))
    return json.loads(answer.read_text(encoding="utf-8")), usage


def _reason(usage: Usage, log: Path, limit_s: float) -> str:
    if usage.exit_code == -signal.SIGKILL and usage.wall_s >= limit_s:
        return f"not finished after {limit_s:.0f} s"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"exit code {usage.exit_code}: {lines[-1][:200] if lines else 'no output'}"


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        os.killpg(pid, signal.SIGKILL)
