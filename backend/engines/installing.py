"""Installing an engine's environment in the background: `engines install NAME` as a process that belongs to nobody.

Its output goes to a log below the home. The process holds the lock of that log for as long as it lives, so a second
start finds it taken, whoever asks, and a lock that is free tells that the process has ended, however it did.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from backend.engines.environments import HUB_TOKENS, environment
from backend.jobs.redact import redact
from backend.paths import HOME_VARIABLE, PROJECT, Home
from backend.process import JOB_VARIABLE, PARENT_VARIABLE, lock_is_held

TAIL_BYTES = 64_000
TAIL_LINES = 300
ERROR_MARK = "error: "

State = Literal["absent", "running", "failed", "installed"]


@dataclass(frozen=True)
class Installation:
    """How far an environment is.

    Attributes:
        state: `absent`, `running`, `failed` or `installed`.
        lines: The end of the last installation's log, without secrets; empty if there was none.
        reason: Why it failed; empty otherwise.
    """

    state: State
    lines: tuple[str, ...]
    reason: str


def log_file(home: Home, name: str) -> Path:
    """Where the installation of an environment writes."""
    return home.private / "engines" / f"{name}.log"


def command(name: str) -> list[str]:
    """What is run."""
    return [sys.executable, "-m", "backend", "engines", "install", name]


def start(home: Home, name: str) -> bool:
    """Start installing an environment; False if that runs already, or it is installed.

    Args:
        home: Whose private folder takes the log.
        name: The environment.

    Raises:
        ConfigError: If no environment has that name.
        OSError: If the log cannot be written.
    """
    if environment(name).ready():
        return False
    log = log_file(home, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(_lock(log), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        hidden = (JOB_VARIABLE, PARENT_VARIABLE, *HUB_TOKENS)
        inherited = {k: v for k, v in os.environ.items() if k not in hidden}
        with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
            process = subprocess.Popen(
                command(name), stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=PROJECT, start_new_session=True,
                env={**inherited, HOME_VARIABLE: str(home.root), "PYTHONUNBUFFERED": "1"},
                pass_fds=(lock.fileno(),),  # the lock lives as long as the process has it open
            )  # fmt: skip
    threading.Thread(target=process.wait, daemon=True).start()  # so that no zombie stays
    return True


def look(home: Home, name: str) -> Installation:
    """How far an environment is.

    Raises:
        ConfigError: If no environment has that name.
    """
    env, log = environment(name), log_file(home, name)
    running = lock_is_held(_lock(log))  # before the log is read: what ends meanwhile is told at the next look
    lines = tuple(redact(_tail(log)).splitlines()[-TAIL_LINES:])
    if running:
        return Installation("running", lines, "")
    if env.ready():
        return Installation("installed", lines, "")
    if not log.exists():
        return Installation("absent", (), "")
    return Installation("failed", lines, _reason(lines))


def _reason(lines: tuple[str, ...]) -> str:
    """The command's own error, which is the last thing that it writes."""
    for number in range(len(lines) - 1, -1, -1):
        if lines[number].startswith(ERROR_MARK):
            return " ".join(line.strip() for line in lines[number:]).removeprefix(ERROR_MARK)
    return "it ended without an error of its own: it was killed, or the machine was restarted"


def _lock(log: Path) -> Path:
    return log.with_suffix(".lock")


def _tail(log: Path) -> str:
    try:
        with open(log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    return text if size <= TAIL_BYTES else text.partition("\n")[2]
