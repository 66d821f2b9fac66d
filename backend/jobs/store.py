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
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.errors import ConfigError, ConfigErrors, JobError
from backend.jobs import database
from backend.jobs.database import Connection, StoreBusyError
from backend.jobs.job import Job
from backend.jobs.reads import JobReader
from backend.jobs.redact import redact
from backend.jobs.states import FINAL, MOVES, STARTED, State, sources_of
from backend.process import boot_id, start_ticks

if TYPE_CHECKING:
    from backend.schema import JobConfig

__all__ = ["Job", "JobStore", "StoreBusyError"]

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


class JobStore(JobReader):
    """Reads and changes `jobs.db` of one home.

    Example:
        >>> store = JobStore(Home.at("/tmp/home"))
        >>> job = store.create(text, config, device="cpu")
        >>> store.grant(job.uid, job.attempt, ["cpu:0"])
        >>> store.move(job.uid, "running", actor="runner", attempt=job.attempt)

    Raises:
        JobError: If the database cannot be used; `StoreBusyError` if only just now.
    """

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """One write transaction; it takes the lock at its start, so it never fails half-way on a busy database."""
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                db.roll_back()
                raise

    def _find(self, db: Connection, uid: str, attempt: int) -> Job | None:
        """The job if this still is its attempt, and it is not deleted."""
        rows = db.query("SELECT * FROM jobs WHERE uid = ? AND attempt = ? AND deleted_at IS NULL", [uid, attempt])
        return self._job(rows[0]) if rows else None

    @staticmethod
    def record(db: Connection, job: Job, to: State, actor: str, reason: str | None, *, new: bool = False) -> str:
        """Add a row to the history; returns its time, which is never before that of the row before it."""
        last = db.execute("SELECT at FROM job_events WHERE uid = ? ORDER BY id DESC LIMIT 1", [job.uid]).fetchone()
        at = max(now(), last[0]) if last else job.created_at
        db.insert("job_events", {
                "uid": job.uid, "attempt": job.attempt, "from_state": None if new else job.state, "to_state": to,
                "actor": actor, "reason": reason, "at": at,
            }
        )  # fmt: skip
        return at

    def create(self, text: str, config: JobConfig, *, device: str, actor: str = "user") -> Job:
        """Add a queued job.

        Args:
            text: The YAML exactly as submitted.
            config: The same, validated.
            device: `cpu`, `cuda:N` or `cuda:N,M`.
            actor: Who asks, for the job's history.

        Raises:
            ConfigErrors: If a job of that name exists; nothing is changed then.
        """
        folder = str(self.home.artefact_dir(config).relative_to(self.home.root))
        hours = config.TIME_LIMIT_HOURS
        with self.writing() as db:
            taken = db.query("SELECT state, created_at, deleted_at FROM jobs WHERE folder = ?", [folder])
            if taken or (self.home.root / folder).exists():
                what = f"the folder {folder}"
                if taken:
                    kind = "deleted" if taken[0]["deleted_at"] else taken[0]["state"]
                    what = f"a {kind} job of {taken[0]['created_at'][:19]}"
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
            db.insert("jobs", {**vars(job), "progress": "{}", "result": None, "stalled": 0, "tags": ""})
            self.record(db, job, "queued", actor, None, new=True)
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
        with self.writing() as db:
            before = self._find(db, uid, attempt)
            if before is None:
                if not db.execute("SELECT 1 FROM jobs WHERE uid = ?", [uid]).fetchone():
                    raise JobError(f"there is no job {uid!r}")
                return False
            if before.state not in sources or to not in MOVES[before.state]:
                return False
            at = self.record(db, before, to, actor, reason)
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
        with self.writing() as db:
            job = self._find(db, uid, attempt)
            if job is None or job.state != "queued":
                return False
            marks = ", ".join("?" * len(wanted))
            if db.execute(f"SELECT 1 FROM leases WHERE resource IN ({marks})", wanted).fetchone():
                return False
            at = self.record(db, job, "starting", "scheduler", None)
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
        with self.writing() as db:
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
        with self.writing() as db:
            before = self._find(db, uid, attempt)
            if before is None or before.state not in states:
                return False
            db.execute(
                "UPDATE jobs SET state = 'queued', attempt = attempt + 1, reason = :reason, progress = '{}', "
                "outcome = NULL, heartbeat = 0, stalled = 0, redo = coalesce(:redo, redo), started_at = NULL, "
                "finished_at = NULL WHERE uid = :uid",
                {"uid": uid, "redo": redo, "reason": reason if redo is None else None},
            )
            self.record(db, replace(before, attempt=attempt + 1), "queued", actor, reason)
        return True

    def beat(self, uid: str, attempt: int) -> bool:
        """Count the heartbeat of an attempt up.

        Returns:
            False if this attempt is no longer the job's, or has ended: its runner must stop and write nothing.
        """
        marks = ", ".join(f"'{state}'" for state in STARTED)
        with self.writing() as db:
            done = db.execute(
                f"UPDATE jobs SET heartbeat = heartbeat + 1 WHERE uid = ? AND attempt = ? AND state IN ({marks})",
                [uid, attempt],
            )
            return done.rowcount == 1

    def set_stalled(self, uid: str, attempt: int, stalled: bool) -> None:
        """Note that the heartbeat of an attempt stands still, or goes on again."""
        with self.writing() as db:
            db.execute("UPDATE jobs SET stalled = ? WHERE uid = ? AND attempt = ?", [int(stalled), uid, attempt])

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
        with self.writing() as db:
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
        with self.writing() as db:
            db.execute_all("DELETE FROM instances WHERE id = ?", ended)
            return db.insert("instances", row)

    def unregister(self, number: int) -> None:
        """Remove a note of `register`."""
        with self.writing() as db:
            db.execute("DELETE FROM instances WHERE id = ?", [number])

    def backup(self, target: Path) -> None:
        """Copy the database to a file that does not exist yet, while others go on writing."""
        database.back_up(self.home, target)
