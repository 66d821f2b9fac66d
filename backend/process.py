"""Processes that end when they should: locks that tell life from death, and kills that reach every descendant."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PARENT_VARIABLE = "QUANTDECK_PARENT_PID"
JOB_VARIABLE = "QUANTDECK_JOB"
"""`<uid>:<attempt>` in the environment of a job's runner and of everything below it."""
FAILPOINT_VARIABLE = "QUANTDECK_FAILPOINT"
OOM_SCORE_ADJ = 500
END_WAIT_S = 10.0
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


def end_tree(
    process: subprocess.Popen[bytes],
    *,
    grace_s: Sequence[float],
    on_step: Callable[[str], None] = lambda step: None,
) -> list[int]:
    """End a child and all its descendants: SIGINT, then SIGTERM, then SIGKILL.

    Args:
        process: Child that was started with `start_new_session=True`.
        grace_s: Time to finish after SIGINT and after SIGTERM, seconds; a step of 0 s is left out.
        on_step: Called with the name of each signal before it is sent.

    Returns:
        Pids that are still there: the kernel cannot end a process in the middle of some system calls.
    """
    for number, wait_s in zip((signal.SIGINT, signal.SIGTERM), grace_s, strict=False):
        if process.poll() is not None:
            break
        if wait_s > 0:
            on_step(number.name)
            _signal_group(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait_s)
    if process.poll() is None:
        on_step(signal.SIGKILL.name)
    _signal_group(process.pid, signal.SIGKILL)
    left = end_descendants()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.0)
    return left


def end_descendants(*, wait_s: float = END_WAIT_S) -> list[int]:
    """Kill every descendant of this process and wait for their end.

    Those that left the group by setsid are found too, if this process adopts orphans.

    Returns:
        Pids that would not end in time.
    """
    import psutil  # here, since programs in environments of their own use this module without it

    return _end_all(lambda: psutil.Process().children(recursive=True), wait_s)


def processes_of(uid: str) -> list[psutil.Process]:
    """The living processes of a job, whoever is their parent: its runner and everything below it.

    They are told by `JOB_VARIABLE` in the environment they were started with, so that no process is taken for
    one that had the same pid before. Other users' processes are not looked at.
    """
    import psutil

    mark, found = f"{JOB_VARIABLE}={uid}:".encode(), []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            if entry.stat().st_uid != os.geteuid():
                continue
            process = psutil.Process(int(entry.name))  # before reading, so that it is this very process
            variables = Path(entry.path, "environ").read_bytes()
        except (OSError, psutil.Error):
            continue  # it has ended meanwhile
        if (variables.startswith(mark) or b"\0" + mark in variables) and _is_alive(process):
            found.append(process)
    return found


def end_leftovers(uid: str, *, wait_s: float = END_WAIT_S) -> list[int]:
    """Kill all processes of a job but the caller, and wait for their end.

    Returns:
        Pids that would not end in time; what they hold (a GPU, say) is not free then.
    """
    return _end_all(lambda: [p for p in processes_of(uid) if p.pid != os.getpid()], wait_s)


def _end_all(find: Callable[[], list[psutil.Process]], wait_s: float) -> list[int]:
    """Kill what `find` finds until it finds nothing more: a process may start another while it is being killed."""
    import psutil

    deadline = time.monotonic() + wait_s
    while True:
        alive = []
        for process in find():
            with contextlib.suppress(psutil.Error):
                if _is_alive(process):
                    process.kill()
                    alive.append(process)
        if not alive:
            return []
        psutil.wait_procs(alive, timeout=0.5)
        if time.monotonic() >= deadline:
            return sorted(p.pid for p in alive if _is_alive(p))


def _is_alive(process: psutil.Process) -> bool:
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def boot_id() -> str:
    """An id that the kernel makes anew each time the machine starts."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_ticks(pid: int) -> int | None:
    """When a process was started, in clock ticks since the machine was; None if it is not there or has ended.

    Unlike the time of day, which follows every change of the clock, it tells two processes of one pid apart.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # from field 3 on; the name in brackets before may hold anything
    return int(fields[19]) if fields[0] not in "ZX" else None


def process_facts(pid: int | None = None) -> dict[str, Any]:
    """What names a process for good: `pid`, `started` (ticks) and `boot_id`; the caller's own by default."""
    pid = os.getpid() if pid is None else pid
    return {"pid": pid, "started": start_ticks(pid), "boot_id": boot_id()}


def is_that_process(facts: Mapping[str, Any]) -> bool:
    """Whether the process of these `process_facts` still lives; another one of its pid does not count."""
    started = facts.get("started")
    return started is not None and facts.get("boot_id") == boot_id() and start_ticks(int(facts["pid"])) == started


def die_first_of_all(pid: int) -> None:
    """Have the kernel choose this program first when memory runs out, before the dashboard and the runner."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(OOM_SCORE_ADJ))


def failpoint(name: str) -> None:
    """Die here as by `kill -9` if `QUANTDECK_FAILPOINT` says so: how tests crash a program at an exact step."""
    if os.environ.get(FAILPOINT_VARIABLE) == name:
        os.kill(os.getpid(), signal.SIGKILL)


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)
