"""`jobs.db`: the one truth about all jobs.

Every change of state is one guarded `UPDATE` inside `BEGIN IMMEDIATE`, and its row in `job_events` is
written in the same transaction. A connection is opened per operation and never shared between threads.

Tables: `jobs` (one row per job), `job_events` (append-only history: which state, when, why, by whom), `leases`
(which job holds which GPU or CPU slot) and `instances` (dashboards and schedulers). Plain SQL reads them.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.errors import ConfigError, ConfigErrors, JobError
from backend.jobs import database
from backend.jobs.database import Connection, StoreBusyError
from backend.jobs.redact import redact
from backend.jobs.states import ACTIVE, FINAL, MOVES, STARTED, State, sources_of
from backend.paths import Home
from backend.process import boot_id, start_ticks

if TYPE_CHECKING:
    from backend.schema import JobConfig

__all__ = ["Instance", "Job", "JobStore", "Lease", "StoreBusyError"]

REDO = ("", "measure")


def now() -> str:
    """The present moment as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def new_uid(after: str = "") -> str:
    """An unguessable id that sorts by creation: 12 hex digits of milliseconds, 10 of randomness.

    Args:
        after: The greatest id so far. The new one is greater, even if the clock was set back since.
    """
    earliest = int(after[:12], 16) + 1 if after else 0
    return f"{max(time.time_ns() // 1_000_000, earliest):012x}{secrets.token_hex(5)}"


@dataclass(frozen=True)
class Job:
    """One row of `jobs`.

    Attributes:
        uid: Id made by the store; sorts by creation.
        job_id: The YAML's JOB_ID.
        folder: Where the artefact is published, relative to the home.
        device: `cpu`, `cuda:N` or `cuda:N,M`, decided when the job was created.
        state: One of `backend.jobs.states`.
        attempt: 1, and one more each time it was queued again.
        reason: Why it waits, failed or was cancelled; None otherwise.
        progress: `stage`, `step`, `total`, `eta_s`, `message`, `configuration` of the present stage.
        result: Rows, timings and the like once measured; see `backend.jobs.results`.
        artefact: Absolute path of the published model (of several: the first one's), None until it is.
        priority: Jobs of a higher one start first.
        max_attempts: How often it is started at most before somebody has to resume it.
        time_limit_s: Seconds an attempt may run, None without a limit.
        outcome: How the last attempt ended, one of the codes of `backend.jobs.outcomes`, or None.
        heartbeat: Counts up while the runner is well.
        stalled: True if the heartbeat stands still although the runner lives.
        redo: `measure` if what was measured before is to be measured again, else empty.
    """

    uid: str
    job_id: str
    folder: str
    model: str
    algorithm: str
    device: str
    state: State
    reason: str | None
    attempt: int
    config_yaml: str
    artefact: str | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    progress: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    priority: int = 0
    max_attempts: int = 3
    time_limit_s: float | None = None
    outcome: str | None = None
    heartbeat: int = 0
    stalled: bool = False
    redo: str = ""

    @property
    def is_active(self) -> bool:
        """True until the job has reached a final state."""
        return self.state in ACTIVE


@dataclass(frozen=True)
class Lease:
    """A resource in use: `cpu:<slot>` or `gpu:<UUID>`, and the attempt that holds it."""

    resource: str
    uid: str
    attempt: int
    at: str


@dataclass(frozen=True)
class Instance:
    """A dashboard or a scheduler that works on this home; `started` are the clock ticks of /proc/<pid>/stat."""

    id: int
    kind: str
    host: str
    pid: int
    started: int
    boot_id: str
    at: str


LIGHT = ", ".join(name for name in Job.__dataclass_fields__ if name not in ("config_yaml", "result"))


class JobStore:
    """Reads and changes `jobs.db` of one home.

    Example:
        >>> store = JobStore(Home.at("/tmp/home"))
        >>> job = store.create(text, config, device="cpu")
        >>> store.grant(job.uid, job.attempt, ["cpu:0"])
        >>> store.move(job.uid, "running", actor="runner", attempt=job.attempt)

    Raises:
        JobError: If the database cannot be used; `StoreBusyError` if only just now.
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        database.prepare(home)

    @contextlib.contextmanager
    def _open(self) -> Iterator[Connection]:
        with database.opened(self.home) as db:
            yield db

    @contextlib.contextmanager
    def _write(self) -> Iterator[Connection]:
        """One write transaction; it takes the lock at its start, so it never fails half-way on a busy database."""
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                db.roll_back()
                raise

    @staticmethod
    def _job(row: dict[str, Any]) -> Job:
        row["progress"] = json.loads(row["progress"])
        row["result"] = json.loads(row["result"]) if row.get("result") else None
        row["stalled"] = bool(row["stalled"])
        row.setdefault("config_yaml", "")
        return Job(**row)

    def _find(self, db: Connection, uid: str, attempt: int) -> Job | None:
        """The job if this still is its attempt."""
        rows = db.query("SELECT * FROM jobs WHERE uid = ? AND attempt = ?", [uid, attempt])
        return self._job(rows[0]) if rows else None

    @staticmethod
    def _record(db: Connection, job: Job, to: State, actor: str, reason: str | None, *, new: bool = False) -> str:
        """Add a row to the history; returns its time, which is never before that of the row before it."""
        last = db.execute("SELECT at FROM job_events WHERE uid = ? ORDER BY id DESC LIMIT 1", [job.uid]).fetchone()
        at = max(now(), last[0]) if last else job.created_at
        db.insert("job_events", {
                "uid": job.uid, "attempt": job.attempt, "from_state": None if new else job.state, "to_state": to,
                "actor": actor, "reason": reason, "at": at,
            }
        )  # fmt: skip
        return at

    def create(self, text: str, config: JobConfig, *, device: str) -> Job:
        """Add a queued job.

        Args:
            text: The YAML exactly as submitted.
            config: The same, validated.
            device: `cpu`, `cuda:N` or `cuda:N,M`.

        Raises:
            ConfigErrors: If a job of that name exists; nothing is changed then.
        """
        folder = str(self.home.artefact_dir(config).relative_to(self.home.root))
        hours = config.TIME_LIMIT_HOURS
        with self._write() as db:
            taken = db.query("SELECT state, created_at FROM jobs WHERE folder = ?", [folder])
            if taken or (self.home.root / folder).exists():
                what = (
                    f"a {taken[0]['state']} job of {taken[0]['created_at'][:19]}" if taken else f"the folder {folder}"
                )
                raise ConfigErrors(
                    [
                        ConfigError(
                            f"found {config.JOB_ID!r}, which is taken by {what}; choose another name, "
                            f"e.g. {self._free_name(db, config)!r}",
                            key="JOB_ID",
                            value=config.JOB_ID,
                        )
                    ]
                )
            newest = db.execute("SELECT max(uid) FROM jobs").fetchone()[0] or ""
            job = Job(
                uid=new_uid(newest), job_id=config.JOB_ID, folder=folder,
                model=config.CUSTOM_MODEL_PATH or config.MODEL, algorithm=config.ALGORITHM, device=device,
                state="queued", reason=None, attempt=1, config_yaml=text, artefact=None, created_at=now(),
                started_at=None, finished_at=None, priority=config.PRIORITY, max_attempts=config.MAX_ATTEMPTS,
                time_limit_s=hours * 3600.0 if hours is not None else None,
            )  # fmt: skip
            db.insert("jobs", {**vars(job), "progress": "{}", "result": None, "stalled": 0})
            self._record(db, job, "queued", "user", None, new=True)
        return job

    def _free_name(self, db: Connection, config: JobConfig) -> str:
        taken = {row["folder"] for row in db.query("SELECT folder FROM jobs")}
        for number in range(2, 100_000):
            other = config.model_copy(update={"JOB_ID": f"{config.JOB_ID[:90]}-{number}"})
            folder = self.home.artefact_dir(other)
            if str(folder.relative_to(self.home.root)) not in taken and not folder.exists():
                return other.JOB_ID
        raise JobError(f"no free job name like {config.JOB_ID}-2 is left")

    def free_name(self, config: JobConfig) -> str:
        """The JOB_ID itself if it is free, else the first free `<JOB_ID>-2`, `-3`, ..."""
        folder = self.home.artefact_dir(config)
        with self._open() as db:
            relative = str(folder.relative_to(self.home.root))
            if not folder.exists() and not db.query("SELECT 1 FROM jobs WHERE folder = ?", [relative]):
                return config.JOB_ID
            return self._free_name(db, config)

    def get(self, uid: str) -> Job:
        """The job with this uid, or with this JOB_ID (the newest of that name).

        Raises:
            JobError: If there is none.
        """
        with self._open() as db:
            rows = db.query("SELECT * FROM jobs WHERE uid = :id OR job_id = :id ORDER BY uid DESC LIMIT 1", {"id": uid})
        if not rows:
            raise JobError(f"there is no job {uid!r}; `python -m backend jobs` lists them")
        return self._job(rows[0])

    def jobs(self, *, states: Sequence[State] = (), limit: int = 1000, offset: int = 0, search: str = "") -> list[Job]:
        """The newest jobs first.

        Args:
            states: Only jobs in one of these; all if empty.
            limit: At most so many.
            offset: So many of the newest are left out.
            search: Only jobs with this text in name, model, algorithm or uid, in capital or small letters.
        """
        return self._list("*", states, limit, offset, search)

    def summaries(
        self, *, states: Sequence[State] = (), limit: int = 1000, offset: int = 0, search: str = ""
    ) -> list[Job]:
        """`jobs` without their files and results (`config_yaml` is empty, `result` None), for long lists."""
        return self._list(LIGHT, states, limit, offset, search)

    def _list(self, columns: str, states: Sequence[State], limit: int, offset: int, search: str) -> list[Job]:
        where, values = _where(states, search)
        query = f"SELECT {columns} FROM jobs {where} ORDER BY uid DESC LIMIT ? OFFSET ?"
        with self._open() as db:
            rows = db.query(query, [*values, limit, offset])
        return [self._job(row) for row in rows]

    def count(self, states: Sequence[State] = (), search: str = "") -> int:
        """How many jobs `jobs` would list without a limit."""
        where, values = _where(states, search)
        with self._open() as db:
            return int(db.execute(f"SELECT count(*) FROM jobs {where}", values).fetchone()[0])

    def counts(self) -> dict[str, int]:
        """How many jobs are in each state; states without any are left out."""
        with self._open() as db:
            return dict(db.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())

    def history(self, uid: str) -> list[dict[str, Any]]:
        """The job's changes of state, oldest first."""
        with self._open() as db:
            return db.query("SELECT * FROM job_events WHERE uid = ? ORDER BY id", [uid])

    def deaths(self, uid: str) -> int:
        """How often the job was lost since a user last queued it."""
        with self._open() as db:
            return int(
                db.execute(
                    "SELECT count(*) FROM job_events WHERE uid = :uid AND to_state = 'lost' AND id > coalesce("
                    "(SELECT max(id) FROM job_events WHERE uid = :uid AND to_state = 'queued' "
                    "AND (from_state IS NULL OR from_state != 'lost')), 0)",
                    {"uid": uid},
                ).fetchone()[0]
            )

    def move(
        self,
        uid: str,
        to: State,
        *,
        actor: str,
        attempt: int,
        reason: str | None = None,
        outcome: str | None = None,
        only_from: State | None = None,
    ) -> bool:
        """Change the state, if the job still is where that is allowed.

        A job that reaches a final state or is lost gives its resources back in the same transaction.

        Args:
            uid: The job.
            to: Its next state.
            actor: Who asks: `user`, `runner`, `scheduler`.
            attempt: The attempt that the caller acts for; a caller of an older attempt changes nothing.
            reason: Why, for people.
            outcome: How the attempt ended, as a code.
            only_from: Narrows the states it may come from.

        Returns:
            True if the state was changed, False if another change came first.
        """
        if to in ("queued", "starting"):
            raise ValueError("a job is queued by `create`, `requeue` and `resume`, and starts by `grant`")
        sources = (only_from,) if only_from else sources_of(to)
        reason = redact(reason) if reason else reason
        with self._write() as db:
            before = self._find(db, uid, attempt)
            if before is None:
                if not db.execute("SELECT 1 FROM jobs WHERE uid = ?", [uid]).fetchone():
                    raise JobError(f"there is no job {uid!r}")
                return False
            if before.state not in sources or to not in MOVES[before.state]:
                return False
            at = self._record(db, before, to, actor, reason)
            stamp = {"running": ", started_at = :at"}.get(to, ", finished_at = :at" if to in FINAL else "")
            db.execute(
                f"UPDATE jobs SET state = :to, reason = :reason, outcome = :outcome, stalled = 0{stamp} "
                "WHERE uid = :uid",
                {"to": to, "reason": reason, "outcome": outcome, "uid": uid, "at": at},
            )
            if to in FINAL or to == "lost":
                db.execute("DELETE FROM leases WHERE uid = ?", [uid])
        return True

    def grant(self, uid: str, attempt: int, resources: Iterable[str]) -> bool:
        """Give a queued job all its resources and let it start, or change nothing.

        Returns:
            True if the job is `starting` now and holds every resource; False if it is no longer queued under this
            attempt, or somebody holds one of the resources.
        """
        wanted = list(resources)
        with self._write() as db:
            job = self._find(db, uid, attempt)
            if job is None or job.state != "queued":
                return False
            marks = ", ".join("?" * len(wanted))
            if db.execute(f"SELECT 1 FROM leases WHERE resource IN ({marks})", wanted).fetchone():
                return False
            at = self._record(db, job, "starting", "scheduler", None)
            db.execute_all("INSERT INTO leases VALUES (?, ?, ?, ?)", [(r, uid, attempt, at) for r in wanted])
            db.execute("UPDATE jobs SET state = 'starting', reason = NULL WHERE uid = ?", [uid])
        return True

    def wait(self, uid: str, attempt: int, reason: str) -> None:
        """Store why a queued job waits."""
        self.wait_all([(uid, attempt, reason)])

    def wait_all(self, waits: Sequence[tuple[str, int, str]]) -> None:
        """`wait` for several jobs (uid, attempt, reason) in one transaction; writes only what changed."""
        if not waits:
            return
        with self._write() as db:
            db.execute_all(
                "UPDATE jobs SET reason = :reason WHERE uid = :uid AND attempt = :attempt AND state = 'queued' "
                "AND reason IS NOT :reason",
                [{"uid": uid, "attempt": attempt, "reason": reason} for uid, attempt, reason in waits],
            )

    def requeue(self, uid: str, attempt: int, *, actor: str, reason: str) -> bool:
        """Queue a lost job again under the next attempt number; what its earlier attempts stored stays."""
        return self._queue_again(uid, attempt, actor, reason, ("lost",), redo=None)

    def resume(self, uid: str, *, actor: str, attempt: int, redo: str = "") -> bool:
        """Queue a failed or cancelled job again under the next attempt number.

        What its earlier attempts stored stays; whatever is left of an earlier attempt can change nothing any more.

        Args:
            uid: The job.
            actor: Who asks.
            attempt: The attempt that is to be followed; of two callers at once the second changes nothing.
            redo: `measure` to measure again what was measured; a job that succeeded can be queued with it too.

        Returns:
            True if the job is queued now, False if it is not in a state to resume or another change came first.
        """
        if redo not in REDO:
            raise ValueError(f"redo is one of {REDO}, not {redo!r}")
        states: tuple[State, ...] = FINAL if redo else ("failed", "cancelled")
        return self._queue_again(uid, attempt, actor, "measure again" if redo else "resumed", states, redo=redo)

    def _queue_again(
        self, uid: str, attempt: int, actor: str, reason: str, states: tuple[State, ...], *, redo: str | None
    ) -> bool:
        with self._write() as db:
            before = self._find(db, uid, attempt)
            if before is None or before.state not in states:
                return False
            db.execute(
                "UPDATE jobs SET state = 'queued', attempt = attempt + 1, reason = :reason, progress = '{}', "
                "outcome = NULL, heartbeat = 0, stalled = 0, redo = coalesce(:redo, redo), started_at = NULL, "
                "finished_at = NULL WHERE uid = :uid",
                {"uid": uid, "redo": redo, "reason": reason if redo is None else None},
            )
            self._record(db, replace(before, attempt=attempt + 1), "queued", actor, reason)
        return True

    def beat(self, uid: str, attempt: int) -> bool:
        """Count the heartbeat of an attempt up.

        Returns:
            False if this attempt is no longer the job's, or has ended: its runner must stop and write nothing.
        """
        marks = ", ".join(f"'{state}'" for state in STARTED)
        with self._write() as db:
            done = db.execute(
                f"UPDATE jobs SET heartbeat = heartbeat + 1 WHERE uid = ? AND attempt = ? AND state IN ({marks})",
                [uid, attempt],
            )
            return done.rowcount == 1

    def set_stalled(self, uid: str, attempt: int, stalled: bool) -> None:
        """Note that the heartbeat of an attempt stands still, or goes on again."""
        with self._write() as db:
            db.execute("UPDATE jobs SET stalled = ? WHERE uid = ? AND attempt = ?", [int(stalled), uid, attempt])

    def leases(self) -> list[Lease]:
        """The resources in use."""
        with self._open() as db:
            return [Lease(**row) for row in db.query("SELECT * FROM leases ORDER BY resource")]

    def update(self, uid: str, attempt: int, **columns: Any) -> bool:
        """Store `progress` (dict), `result` (dict) or `artefact` (path) of a running attempt.

        Returns:
            False for a late write of an older attempt, or to a finished job: it changed nothing.
        """
        allowed = {"progress", "result", "artefact"}
        if not columns or set(columns) - allowed:
            raise ValueError(f"only {sorted(allowed)} can be updated, not {sorted(columns)}")
        values = {k: json.dumps(v) if isinstance(v, dict) else v for k, v in columns.items()}
        sets = ", ".join(f"{name} = :{name}" for name in values)
        with self._write() as db:
            done = db.execute(
                f"UPDATE jobs SET {sets} "
                "WHERE uid = :uid AND attempt = :attempt AND state IN ('running', 'cancelling')",
                {**values, "uid": uid, "attempt": attempt},
            )
            return done.rowcount == 1

    def register(self, kind: str) -> int:
        """Note that this process works on the home as a `dashboard` or `scheduler`; returns the id of the note.

        Notes of processes of this machine that have ended are removed.
        """
        host, boot = socket.gethostname(), boot_id()
        row = {
            "kind": kind, "host": host, "pid": os.getpid(), "started": start_ticks(os.getpid()) or 0,
            "boot_id": boot, "at": now(),
        }  # fmt: skip
        ended = [
            [one.id]
            for one in self.instances()
            if one.host == host and (one.boot_id != boot or start_ticks(one.pid) != one.started)
        ]
        with self._write() as db:
            db.execute_all("DELETE FROM instances WHERE id = ?", ended)
            return db.insert("instances", row)

    def unregister(self, number: int) -> None:
        """Remove a note of `register`."""
        with self._write() as db:
            db.execute("DELETE FROM instances WHERE id = ?", [number])

    def instances(self) -> list[Instance]:
        """The dashboards and schedulers that were noted; one that was killed stays until the next comes."""
        with self._open() as db:
            return [Instance(**row) for row in db.query("SELECT * FROM instances ORDER BY id")]

    def journal(self) -> str:
        """The journal that this SQLite and this file system call for: `wal` or `delete`."""
        return database.journal_for(self.home.root)

    def backup(self, target: Path) -> None:
        """Copy the database to a file that does not exist yet, while others go on writing."""
        database.back_up(self.home, target)

    def check(self) -> list[str]:
        """What is wrong with the database, in words; empty if nothing is."""
        with self._open() as db:
            found = [str(row[0]) for row in db.execute("PRAGMA integrity_check") if row[0] != "ok"]
            found += [f"table {row[0]}: row {row[1]} names no job" for row in db.execute("PRAGMA foreign_key_check")]
            for query, words in CHECKS:
                found += [words.format(*row) for row in db.execute(query)]
        return found


def _where(states: Sequence[State], search: str) -> tuple[str, list[Any]]:
    """The condition of a list of jobs, and its values."""
    parts: list[str] = []
    values: list[Any] = []
    if states:
        parts.append(f"state IN ({', '.join('?' * len(states))})")
        values += list(states)
    if search.strip():
        parts.append("(job_id || ' ' || model || ' ' || algorithm || ' ' || uid) LIKE ? ESCAPE '\\'")
        escaped = search.strip().replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        values.append(f"%{escaped}%")
    return (f"WHERE {' AND '.join(parts)}" if parts else ""), values


_FINAL = ", ".join(f"'{state}'" for state in FINAL)
_STARTED = ", ".join(f"'{state}'" for state in STARTED)
CHECKS = (
    (
        f"SELECT l.resource, j.job_id, j.state FROM leases l JOIN jobs j USING (uid) WHERE j.state NOT IN ({_STARTED})",
        "{0} is leased to job {1}, which is {2}",
    ),
    (
        "SELECT l.resource, l.attempt, j.job_id, j.attempt FROM leases l JOIN jobs j USING (uid) "
        "WHERE l.attempt != j.attempt",
        "{0} is leased to attempt {1} of job {2}, which is at attempt {3}",
    ),
    (
        f"SELECT job_id, state FROM jobs WHERE state IN ({_FINAL}) AND finished_at IS NULL",
        "job {0} is {1} without a time when it ended",
    ),
    (
        "SELECT job_id, state, finished_at FROM jobs WHERE finished_at IS NOT NULL "
        f"AND (state NOT IN ({_FINAL}) OR finished_at < coalesce(started_at, created_at))",
        "job {0} is {1} and ended at {2}, which cannot be",
    ),
    (
        "SELECT job_id, state, coalesce((SELECT to_state FROM job_events e WHERE e.uid = j.uid ORDER BY id DESC "
        "LIMIT 1), 'nothing') AS last FROM jobs j WHERE last != state",
        "job {0} is {1}, but its history ends with {2}",
    ),
    ("SELECT job_id FROM jobs WHERE NOT json_valid(progress)", "job {0} has progress that cannot be read"),
)
