"""Deleting jobs: out of the list first, with a way back; for good only when somebody asks for that.

A deleted job is left out of every list, keeps its files and its name, and can be restored. Deleted for good, its model,
log and working folder are removed and its name is free again; its row stays behind, emptied, since the history of a
job is never removed. That it was begun is stored before anything is removed: whatever moment the program dies at, the
same call goes on from there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from backend.errors import JobError, QuantdeckError
from backend.jobs import removal
from backend.jobs.job import Job
from backend.jobs.logs import files as log_files
from backend.jobs.states import ACTIVE
from backend.jobs.store import JobStore, now
from backend.paths import Home
from backend.process import failpoint, hold_lock, lock_is_held
from backend.schema import parse_yaml

Used = Iterable[tuple[Path, str]]
"""What `removal.used_files` finds."""


def delete(home: Home, uid: str, *, actor: str = "user") -> Job:
    """Take a job that is over out of the list; nothing of it is removed.

    Args:
        home: The home.
        uid: The job, by uid or name.
        actor: Who asks, for the job's history.

    Raises:
        JobError: If it is active, or deleted already.
    """
    store = JobStore(home)
    job = store.get(uid)
    if job.is_active:
        raise JobError(f"job {job.job_id} is {job.state}; cancel it first, and delete it when it has ended")
    if job.deleted_at:
        raise JobError(f"job {job.job_id} is deleted already")
    with store.writing() as db:
        done = db.execute(
            "UPDATE jobs SET deleted_at = ? WHERE uid = ? AND state = ? AND attempt = ? AND deleted_at IS NULL",
            [now(), job.uid, job.state, job.attempt],
        )
        if done.rowcount != 1:
            raise JobError(f"job {job.job_id} was changed by somebody else just now; look at it and try again")
        store.record(db, job, job.state, actor, "deleted")
    return store.get(job.uid)


def restore(home: Home, uid: str, *, actor: str = "user") -> Job:
    """Put a deleted job back into the list.

    Args:
        home: The home.
        uid: The job, by uid or name.
        actor: Who asks, for the job's history.

    Raises:
        JobError: If it is not deleted, or its deletion for good has begun.
    """
    store = JobStore(home)
    job = store.get_deleted(uid)
    if job.erased:
        raise JobError(f"job {job.job_id} is being deleted for good; it cannot be restored any more")
    with store.writing() as db:
        done = db.execute(
            "UPDATE jobs SET deleted_at = NULL WHERE uid = ? AND deleted_at IS NOT NULL AND erased IS NULL", [job.uid]
        )
        if done.rowcount != 1:
            raise JobError(f"job {job.job_id} was changed by somebody else just now; look at it and try again")
        store.record(db, job, job.state, actor, "restored")
    return store.get(job.uid)


def places(home: Home, job: Job) -> list[Path]:
    """What lies on the disk for a job alone: its models, its log, its working folder.

    Raises:
        JobError: If the folder that the store names for its models cannot be one.
    """
    models, own = home.root / job.folder, (home.private, home.jobs_db)
    if ".." in models.parts or models == home.root or any(path.is_relative_to(models) for path in own):
        raise JobError(f"job {job.job_id} names the folder {job.folder!r}, which is none of a job; nothing was removed")
    return [models, *_logs(home, job), home.run_dir(job.uid)]


def _logs(home: Home, job: Job) -> list[Path]:
    """The files of the job's log; none if it cannot be told where it is, or another job writes to the same."""
    path = _log(home, job.config_yaml)
    if path is None:
        return []
    rows = JobStore(home).query(
        "SELECT job_id, config_yaml FROM jobs WHERE uid != ? AND erased IS NOT 'done' "
        "AND (job_id = ? OR instr(config_yaml, 'LOGGING_PATH'))",
        [job.uid, job.job_id],
    )
    # Reading a job file takes milliseconds, and there may be thousands: only those that can name this folder are read.
    written = re.compile(rf"LOGGING_PATH.*{re.escape(path.parent.name)}")
    for row in rows:
        near = row["job_id"] == job.job_id or written.search(row["config_yaml"])
        if near and _log(home, row["config_yaml"]) == path:
            return []
    return log_files.parts(path)


def _log(home: Home, config_yaml: str) -> Path | None:
    with suppress(QuantdeckError):  # a file of an older version
        return home.log_file(parse_yaml(config_yaml).config)
    return None


def size(home: Home, uid: str) -> int:
    """Bytes that become free if a deleted job is deleted for good.

    Raises:
        JobError: If it is not deleted, or something of it lies behind a symbolic link.
    """
    job = JobStore(home).get_deleted(uid)
    return sum(removal.bytes_of(home.root, path) for path in places(home, job))


def erase(home: Home, uid: str, *, actor: str = "user", used: Used | None = None) -> int:
    """Delete a deleted job for good: remove its files and free its name. There is no way back.

    Args:
        home: The home.
        uid: The job, by uid or name.
        actor: Who asks, for the job's history.
        used: What `removal.used_files` found a moment ago, for a caller that deletes many; looked up if None.

    Returns:
        Bytes that became free.

    Raises:
        JobError: If it is not deleted, something still uses its files, or they cannot be removed. What was begun is
            gone on with by the next call.
    """
    store = JobStore(home)
    with _alone(home):
        job = store.get_deleted(uid)
        found = places(home, job)
        for path in found:
            removal.check_way(home.root, path)
        _check_unused(home, store, job, removal.used_files(home.root) if used is None else used)
        freed = sum(removal.bytes_of(home.root, path) for path in found)
        with store.writing() as db:
            done = db.execute(
                "UPDATE jobs SET erased = 'begun' WHERE uid = ? AND deleted_at IS NOT NULL AND erased IS NOT 'done'",
                [job.uid],
            )
            if done.rowcount != 1:
                raise JobError(f"job {job.job_id} was restored by somebody else just now; nothing was removed")
            if not job.erased:
                store.record(db, job, job.state, actor, "deleted for good")
        failpoint("erase.begun")
        for path in found:
            removal.remove(home.root, path)
            failpoint("erase.removed")
        _drop_log_folder(home, job)
        failpoint("erase.empty")
        with store.writing() as db:
            # The name of the folder is free for another job from here on.
            db.execute(
                "UPDATE jobs SET erased = 'done', folder = 'erased/' || uid, tags = '', note = '', progress = '{}', "
                "result = NULL, artefact = NULL, config_yaml = '' WHERE uid = ?",
                [job.uid],
            )
    return freed


@contextmanager
def _alone(home: Home) -> Iterator[None]:
    with hold_lock(home.private / "erase.lock") as lock:
        if lock is None:
            raise JobError("another deletion is under way; try again when it has ended")
        yield


def _check_unused(home: Home, store: JobStore, job: Job, used: Used) -> None:
    """Refuse to remove what a process or another job works with."""
    if lock_is_held(home.run_dir(job.uid) / "runner.lock"):
        raise JobError(f"the process of job {job.job_id} has not ended yet; try again in a moment")
    models = home.root / job.folder
    users = sorted({who for path, who in used if path.is_relative_to(models)})
    if users:
        raise JobError(
            f"the files of job {job.job_id} are in use by {', '.join(users)}; wait until it has read them, or end "
            "that program, and delete the job for good again"
        )
    marks = ", ".join("?" * len(ACTIVE))
    inside = store.query(
        "SELECT job_id FROM jobs WHERE uid != ? AND erased IS NOT 'done' AND instr(folder, ?) = 1",
        [job.uid, f"{job.folder}/"],
    )
    readers = store.query(
        f"SELECT job_id, config_yaml FROM jobs WHERE uid != ? AND instr(config_yaml, ?) AND state IN ({marks})",
        [job.uid, job.folder, *ACTIVE],
    )
    if inside:
        other = inside[0]["job_id"]
        raise JobError(f"the folder of job {other} lies in that of job {job.job_id}; delete {other} for good first")
    named = re.compile(re.escape(job.folder) + r"(?![\w.-])")
    for row in readers:
        if named.search(row["config_yaml"]):
            raise JobError(
                f"job {row['job_id']} works with the model of job {job.job_id}; cancel it or let it end, and delete "
                "the job for good again"
            )


def _drop_log_folder(home: Home, job: Job) -> None:
    """Remove the folder that was made for this log alone, if nothing else is in it."""
    path = _log(home, job.config_yaml)
    if path is None or path.parent.name != job.job_id:
        return
    with removal.opened_folder(home.root, path.parent.parent) as above, suppress(OSError):
        if above is not None:
            os.rmdir(path.parent.name, dir_fd=above)
