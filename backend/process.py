"""Processes that end when they should: locks that tell life from death, and kills that reach every descendant."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PARENT_VARIABLE = "QUANTDECK_PARENT_PID"
QUIET_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment of every process with a model: idle OpenMP threads sleep. Spinning ones, the default, take the cores
from the other model and from whatever else runs (measured on two busy cores: a third of the wall time)."""


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies.

    Must be called from the process's main thread, before it starts others.

    Args:
        parent_pid: Pid of the process that started this one. If it is already gone, this process exits at once.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def die_with_starter() -> None:
    """`die_with_parent`, if the starter gave its pid in the environment (`PARENT_VARIABLE`)."""
    if parent := os.environ.get(PARENT_VARIABLE):
        die_with_parent(int(parent))


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent died, so that none escapes a cancel."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


@contextlib.contextmanager
def hold_lock(path: Path, *, wait_s: float = 3.0) -> Iterator[IO[str] | None]:
    """Hold an exclusive lock on a file for as long as the block runs.

    The kernel releases it when the process dies, however it dies, so a held lock proves a living holder.

    Args:
        path: Lock file; made if absent.
        wait_s: How long to wait for observers (`lock_is_held`) to let go, seconds.

    Yields:
        The open file, or None if another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    yield None
                    return
                time.sleep(0.05)
            else:
                yield file
                return


def lock_is_held(path: Path) -> bool:
    """True if some process holds the lock of `hold_lock` on this file."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def end_tree(process: subprocess.Popen[bytes], *, grace_s: float) -> None:
    """End a child and all its descendants: SIGTERM, then after a grace period SIGKILL.

    Args:
        process: Child that was started with `start_new_session=True`.
        grace_s: Time to finish after SIGTERM, seconds.
    """
    import psutil  # here, since programs in environments of their own use this module without it

    _signal_group(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)
    # Descendants may have left the group by setsid; as a subreaper we are still their ancestor.
    strays = psutil.Process().children(recursive=True)
    _signal_group(process.pid, signal.SIGKILL)
    for stray in strays:
        with contextlib.suppress(psutil.NoSuchProcess):
            stray.kill()
    process.wait()
    psutil.wait_procs(strays, timeout=5)


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)
