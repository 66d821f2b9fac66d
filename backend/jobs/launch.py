"""Starting the scheduler of a home and the runner of an attempt, as processes that belong to nobody.

The scheduler imports this, so it knows nothing of job files: their schema alone would delay each start by 0.15 s.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from backend.jobs.states import ACTIVE
from backend.jobs.store import JobStore
from backend.paths import HOME_VARIABLE, PROJECT, Home
from backend.process import JOB_VARIABLE, PARENT_VARIABLE, lock_is_held

OUT_BYTES = 1_000_000
RUNNER = "backend.jobs.runner"
SCHEDULER = "backend.jobs.scheduler"


def start_runner(home: Home, uid: str, attempt: int) -> subprocess.Popen[bytes]:
    """Start the runner of an attempt, in a session of its own so that it survives this process."""
    run_dir = home.run_dir(uid)
    run_dir.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", RUNNER, str(home.root), uid, str(attempt)]
    return _detached(home, argv, run_dir / "runner.out", {JOB_VARIABLE: f"{uid}:{attempt}"})


def scheduler_lock(home: Home) -> Path:
    """The lock that the scheduler of a home holds while it works."""
    return home.private / "scheduler.lock"


def ensure_scheduler(home: Home) -> bool:
    """Start the scheduler, in a session of its own, if none works; returns True if one was started.

    Two that are started at once do no harm: the second finds the lock taken and ends.
    """
    if lock_is_held(scheduler_lock(home)):
        return False
    home.private.mkdir(parents=True, exist_ok=True)
    _detached(home, [sys.executable, "-m", SCHEDULER, str(home.root)], home.private / "scheduler.out", {})
    return True


def watch(home: Home) -> bool:
    """Start the scheduler if there are active jobs and none works; returns True if one was started.

    Whoever looks at jobs calls this now and then: a scheduler that was killed is replaced so.
    """
    if lock_is_held(scheduler_lock(home)) or not JobStore(home).count(states=ACTIVE):
        return False
    return ensure_scheduler(home)


def _detached(home: Home, argv: list[str], out: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a process that belongs to nobody; what it prints goes to a file that does not grow for ever."""
    # The caller may be a job's runner at its end: what it starts here is no part of that job.
    inherited = {k: v for k, v in os.environ.items() if k not in (JOB_VARIABLE, PARENT_VARIABLE)}
    mode = "wb" if out.exists() and out.stat().st_size > OUT_BYTES else "ab"
    with open(out, mode) as file:
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=PROJECT, start_new_session=True,
            env={**inherited, HOME_VARIABLE: str(home.root), **variables},
        )  # fmt: skip
