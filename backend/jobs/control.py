"""What pages and commands do with jobs: submit, cancel, resume, clone, follow, and see that the scheduler runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from backend.errors import JobError
from backend.jobs import logtail
from backend.jobs.events import read_events
from backend.jobs.preflight import check_job
from backend.jobs.states import ACTIVE
from backend.jobs.store import Job, JobStore
from backend.paths import HOME_VARIABLE, PROJECT, Home
from backend.process import JOB_VARIABLE, PARENT_VARIABLE, lock_is_held
from backend.schema import Document, parse_yaml

OUT_BYTES = 1_000_000
RUNNER = "backend.jobs.runner"
SCHEDULER = "backend.jobs.scheduler"


def submit(home: Home, text: str, *, confined: bool = False) -> Job:
    """Check a job file, queue the job and see that the scheduler runs.

    Args:
        home: The home.
        text: The YAML.
        confined: True for requests of the web page: local paths must lie inside the home.

    Raises:
        ConfigErrors: With every problem that can be known before work starts; nothing is stored then.
    """
    document = parse_yaml(text)
    checked = check_job(document.config, home, confined=confined)
    job = JobStore(home).create(document.dump(), document.config, device=checked.device)
    ensure_scheduler(home)
    return job


def launch(home: Home, uid: str, attempt: int) -> subprocess.Popen[bytes]:
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


def cancel(home: Home, uid: str, *, actor: str = "user") -> Job:
    """Ask for the end of a job; a waiting one ends at once, a running one within seconds.

    Args:
        home: The home.
        uid: The job.
        actor: Who asks, for the job's history.

    Raises:
        JobError: If it already has reached a final state.
    """
    store = JobStore(home)
    job = store.get(uid)
    while job.is_active and job.state != "cancelling":
        waits = job.state in ("queued", "lost")
        reason = "cancelled before it started" if job.state == "queued" else "cancel requested"
        if store.move(
            job.uid, "cancelled" if waits else "cancelling", actor=actor, attempt=job.attempt, reason=reason,
            outcome="cancelled" if waits else None, only_from=job.state,
        ):  # fmt: skip
            watch(home)  # it tells when the runner is gone, too
            return store.get(job.uid)
        job = store.get(job.uid)  # another change came first
    if not job.is_active:
        raise JobError(f"job {job.job_id} is already {job.state}; there is nothing to cancel")
    return job


def resume(home: Home, uid: str, redo: str = "", *, actor: str = "user") -> Job:
    """Queue a failed or cancelled job again; what is finished is not done twice.

    Args:
        home: The home.
        uid: The job.
        redo: `measure` to measure again what was measured; then a job that succeeded can be queued, too.
        actor: Who asks, for the job's history.

    Raises:
        JobError: If the job is active, or has succeeded and nothing is to be done again.
    """
    store = JobStore(home)
    job = store.get(uid)
    if not store.resume(job.uid, actor=actor, attempt=job.attempt, redo=redo):
        job = store.get(job.uid)
        raise JobError(f"job {job.job_id} is {job.state}; only a failed or cancelled job can be resumed")
    ensure_scheduler(home)
    return store.get(job.uid)


def clone_text(home: Home, uid: str) -> str:
    """The YAML of a job with a JOB_ID that is free, everything else untouched."""
    return with_free_name(home, parse_yaml(JobStore(home).get(uid).config_yaml)).dump()


def with_free_name(home: Home, document: Document) -> Document:
    """The document with its JOB_ID numbered (`-2`, `-3`, ...) if that name is taken."""
    document.set(("JOB_ID",), JobStore(home).free_name(document.config))
    return document


def log_path(home: Home, uid: str) -> Path:
    """The job's log file."""
    return home.log_file(parse_yaml(JobStore(home).get(uid).config_yaml).config)


def tail_log(home: Home, uid: str, cursor: str | None = None) -> tuple[list[str], str]:
    """Lines of the log after a cursor, over its rotated files; the last of them if there is none yet.

    Returns:
        The lines and the cursor for the next call.
    """
    return logtail.tail(log_path(home, uid), cursor)


def events(home: Home, uid: str, cursor: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The job's events after a cursor, and the next cursor."""
    return read_events(events_file(home, uid), cursor)


def events_file(home: Home, uid: str) -> Path:
    """The file of all attempts' events."""
    return home.run_dir(JobStore(home).get(uid).uid) / "events.jsonl"


def layer_errors(home: Home, uid: str) -> list[dict[str, Any]]:
    """What is known of each decoder layer done so far, of a resumed job the latest.

    Returns:
        `configuration` (its name, empty if there is only one), `layer`, `error`, `rtn_error` (relative output
        errors) and `notes`, in the order of the first attempt.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for event in events(home, uid)[0]:
        if event.get("stage") == "quantize" and event.get("error") is not None and event.get("layer"):
            name, layer = str(event.get("configuration") or ""), str(event["layer"])
            errors = {"error": event["error"], "rtn_error": event.get("rtn_error")}
            found[name, layer] = {"configuration": name, "layer": layer, **errors, "notes": event.get("notes") or []}
    return list(found.values())
