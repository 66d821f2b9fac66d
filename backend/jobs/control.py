"""What pages and commands do with jobs: submit, cancel, resume, clone, follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backend.errors import JobError
from backend.jobs import curves, launch
from backend.jobs.events import read_events
from backend.jobs.logs.tail import tail
from backend.jobs.preflight import check_job
from backend.jobs.store import Job, JobStore
from backend.paths import Home
from backend.schema import Document, parse_yaml


def submit(home: Home, text: str, *, confined: bool = False, actor: str = "user") -> Job:
    """Check a job file, queue the job and see that the scheduler runs.

    Args:
        home: The home.
        text: The YAML.
        confined: True for requests of the web page: local paths must lie inside the home.
        actor: Who asks, for the job's history.

    Raises:
        ConfigErrors: With every problem that can be known before work starts; nothing is stored then.
    """
    document = parse_yaml(text)
    checked = check_job(document.config, home, confined=confined)
    job = JobStore(home).create(document.dump(), document.config, device=checked.device, actor=actor)
    launch.ensure_scheduler(home)
    return job


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
            launch.watch(home)  # it tells when the runner is gone, too
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
        if job.deleted_at:
            raise JobError(f"job {job.job_id} is deleted; restore it first")
        raise JobError(f"job {job.job_id} is {job.state}; only a failed or cancelled job can be resumed")
    launch.ensure_scheduler(home)
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
    return tail(log_path(home, uid), cursor)


def events(home: Home, uid: str, cursor: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The job's events after a cursor, and the next cursor."""
    return read_events(events_file(home, uid), cursor)


def events_file(home: Home, uid: str) -> Path:
    """The file of all attempts' events."""
    return home.run_dir(JobStore(home).get(uid).uid) / "events.jsonl"


def layer_errors(home: Home, uid: str) -> list[dict[str, Any]]:
    """What is known of each decoder layer done so far: `curves.layers`."""
    return curves.layers(events(home, uid)[0])


def tuning_curve(home: Home, uid: str) -> list[dict[str, Any]]:
    """What is known of each step of tuning done so far: `curves.steps`."""
    return curves.steps(events(home, uid)[0])
