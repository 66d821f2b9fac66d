"""The doctor's look into jobs.db: the file itself, and whether states and history fit together."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from backend.errors import QuantdeckError
from backend.jobs.doctor_findings import MEND_COMMAND, Finding, Problem
from backend.jobs.states import ACTIVE, FINAL, MOVES
from backend.jobs.store import JobStore
from backend.paths import Home

AT_WORK = ("starting", "running", "cancelling")
LEGAL = {(source, target) for source, targets in MOVES.items() for target in targets}
LEGAL |= {(state, state) for state in FINAL}  # a job that is over was deleted or restored


@dataclass(frozen=True)
class Snapshot:
    """`jobs.db` at one moment."""

    jobs: dict[str, dict[str, Any]]
    events: list[dict[str, Any]]
    leases: list[dict[str, Any]]
    instances: list[dict[str, Any]]

    def at_work(self, uid: str, attempt: int) -> bool:
        """Whether this very attempt is one that has a runner."""
        job = self.jobs.get(uid)
        return job is not None and job["attempt"] == attempt and job["state"] in AT_WORK


def examine_store(home: Home) -> tuple[Finding, Snapshot | None]:
    """The file itself: readable, sound, of this version, with the journal that it should have."""
    if not home.jobs_db.exists():
        return Finding("job store", "there is none yet"), None
    restore = f"put back a backup of {home.jobs_db} (see docs/operations.md), and keep this file"
    try:
        store = JobStore(home)
        problems = [Problem(what, f"{MEND_COMMAND}; if that does not help, {restore}") for what in store.check()]
        wanted = store.journal()
        with connect(home) as db:
            mode = str(db.execute("PRAGMA journal_mode").fetchone()[0])
            for row in db.execute("PRAGMA foreign_key_check"):
                problems.append(Problem(f"a row of {row[0]} belongs to no job", restore))
        if mode == "wal" and wanted != "wal":
            why = f"journal mode is {mode}, which is not safe with this SQLite ({sqlite3.sqlite_version})"
            problems.append(
                Problem(why, f"stop everything, then: sqlite3 {home.jobs_db} 'PRAGMA journal_mode={wanted}'")
            )
        snapshot = read_tables(home)
    except QuantdeckError as error:
        return Finding("job store", "", (Problem(error.message, restore),)), None
    except sqlite3.Error as error:
        return Finding("job store", "", (Problem(f"{home.jobs_db} cannot be read: {error}", restore),)), None
    detail = f"{len(snapshot.jobs)} jobs, integrity_check passed, journal {mode}, SQLite {sqlite3.sqlite_version}"
    return Finding("job store", detail, tuple(problems)), snapshot


@contextlib.contextmanager
def connect(home: Home, mode: str = "ro") -> Iterator[sqlite3.Connection]:
    """A connection that makes no file and changes nothing, unless `mode` is `rw`."""
    connection = sqlite3.connect(f"{home.jobs_db.as_uri()}?mode={mode}", uri=True, timeout=30.0, isolation_level=None)
    connection.row_factory = sqlite3.Row
    try:
        yield connection
    finally:
        connection.close()


def read_tables(home: Home, *, results: bool = False) -> Snapshot:
    """All tables in one read transaction; the jobs' results only if they are asked for, since they are large."""
    columns = "uid, job_id, folder, device, state, attempt, artefact, stalled, deleted_at, erased"
    columns += ", result" if results else ""
    with connect(home) as db:
        db.execute("BEGIN")
        jobs = [dict(row) for row in db.execute(f"SELECT {columns} FROM jobs ORDER BY uid")]
        events, leases, instances = (
            [dict(row) for row in db.execute(f"SELECT * FROM {table}")]
            for table in ("job_events ORDER BY id", "leases", "instances")
        )
        db.execute("COMMIT")
    return Snapshot({job["uid"]: job for job in jobs}, events, leases, instances)


def examine_states(snapshot: Snapshot) -> Finding:
    """Every job is in a state that there is."""
    states = {*ACTIVE, *FINAL}
    counts: dict[str, int] = {}
    for job in snapshot.jobs.values():
        counts[job["state"]] = counts.get(job["state"], 0) + 1
    problems = tuple(
        Problem(f"job {name_of(job)} is in the unknown state {job['state']!r}", "put back a backup of jobs.db")
        for job in snapshot.jobs.values()
        if job["state"] not in states
    )
    return Finding("states", ", ".join(f"{n} {state}" for state, n in sorted(counts.items())), problems)


def examine_history(snapshot: Snapshot) -> Finding:
    """Every job's events lead, by legal moves, from its first `queued` to the state and attempt that it is in."""
    at: dict[str, tuple[str, int]] = {}
    problems = []
    for event in snapshot.events:
        job = snapshot.jobs.get(event["uid"])
        if job is None:
            problems.append(f"event {event['id']} is of the unknown job {event['uid']}")
            continue
        state, attempt = at.get(event["uid"], (None, 0))
        came, to = event["from_state"], event["to_state"]
        if came != state or (came is None and to != "queued") or (came is not None and (came, to) not in LEGAL):
            problems.append(f"job {name_of(job)} went from {came or 'nothing'} to {to}, but it was {state or 'new'}")
        elif event["attempt"] != attempt + (to == "queued"):
            problems.append(f"job {name_of(job)} became {to} in attempt {event['attempt']}, after attempt {attempt}")
        at[event["uid"]] = (to, event["attempt"])
    for uid, job in snapshot.jobs.items():
        if at.get(uid) != (job["state"], job["attempt"]):
            last = "{} in attempt {}".format(*at[uid]) if uid in at else "nothing"
            problems.append(
                f"job {name_of(job)} is {job['state']}, attempt {job['attempt']}; its history ends with {last}"
            )
    mend = "put back a backup of jobs.db, or cancel and clone the job"
    return Finding("history", f"{len(snapshot.events)} moves", tuple(Problem(what, mend) for what in problems))


def name_of(job: dict[str, Any]) -> str:
    """What a job is called in a report."""
    return f"{job['job_id']} ({job['uid']})"
