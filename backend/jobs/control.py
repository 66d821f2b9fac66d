"""What pages and commands do with jobs: submit, cancel, clone, follow, and find those whose runner died."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from backend.errors import JobError
from backend.jobs.events import read_events, read_lines
from backend.jobs.preflight import check_job
from backend.jobs.store import Job, JobStore
from backend.paths import HOME_VARIABLE, PROJECT, Home
from backend.process import lock_is_held
from backend.schema import Document, parse_yaml

LAUNCH_GRACE_S = 20.0
LOG_TAIL_BYTES = 200_000


def submit(home: Home, text: str, *, confined: bool = False) -> Job:
    """Check a job file, add the job and start its runner.

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
    launch(home, job.uid)
    return job


def launch(home: Home, uid: str) -> None:
    """Start the runner of a job, in a session of its own so that it survives this process."""
    run_dir = home.run_dir(uid)
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "runner.out", "ab") as out:
        subprocess.Popen(
            [sys.executable, "-m", "backend.jobs.runner", str(home.root), uid],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=PROJECT, start_new_session=True,
            env={**os.environ, HOME_VARIABLE: str(home.root)},
        )  # fmt: skip


def cancel(home: Home, uid: str) -> Job:
    """Ask for the end of a job; a queued one ends at once, a running one within seconds.

    Raises:
        JobError: If it already has reached a final state.
    """
    store = JobStore(home)
    job = store.get(uid)
    for target, reason in (("cancelled", "cancelled before it started"), ("cancelling", "cancel requested")):
        origin: Any = "queued" if target == "cancelled" else "running"
        if store.move(job.uid, target, actor="user", attempt=job.attempt, reason=reason, only_from=origin):  # type: ignore[arg-type]
            return store.get(job.uid)
    job = store.get(job.uid)
    if not job.is_active:
        raise JobError(f"job {job.job_id} is already {job.state}; there is nothing to cancel")
    return job


def resume(home: Home, uid: str) -> Job:
    """Queue a failed or cancelled job again and start its runner; what is finished is not done twice.

    Raises:
        JobError: If the job is active, or has succeeded.
    """
    store = JobStore(home)
    job = store.get(uid)
    if not store.resume(job.uid, actor="user", attempt=job.attempt):
        job = store.get(job.uid)
        raise JobError(f"job {job.job_id} is {job.state}; only a failed or cancelled job can be resumed")
    launch(home, job.uid)
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


def tail_log(home: Home, uid: str, cursor: int | None = None) -> tuple[list[str], int]:
    """Lines of the log after a cursor; the last 200 kB if there is none yet.

    Returns:
        The lines and the cursor for the next call.
    """
    return read_lines(log_path(home, uid), -LOG_TAIL_BYTES if cursor is None else cursor)


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


def reconcile(home: Home, *, besides: str | None = None) -> list[str]:
    """Find active jobs whose runner is gone. Running ones failed; queued ones get a new runner.

    Args:
        home: The home.
        besides: A job to leave alone (the caller's own).

    Returns:
        The uids of jobs that were changed.
    """
    store = JobStore(home)
    changed = []
    for job in store.jobs(states=("queued", "running", "cancelling")):
        if job.uid == besides or lock_is_held(home.run_dir(job.uid) / "runner.lock"):
            continue
        if job.state == "queued":
            age = (datetime.now(UTC) - datetime.fromisoformat(job.created_at)).total_seconds()
            if age > LAUNCH_GRACE_S:
                launch(home, job.uid)
                changed.append(job.uid)
            continue
        stage = job.progress.get("stage", "start")
        kept = f" The quantized model is saved in {job.artefact}." if job.artefact else ""
        reason = (
            f"the runner process died during stage '{stage}' (killed, or the machine was restarted).{kept} "
            "Resume the job to go on where it stopped"
        )
        if store.move(job.uid, "failed", actor="reconcile", attempt=job.attempt, reason=reason):
            changed.append(job.uid)
    return changed
