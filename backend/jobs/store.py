"""`jobs.db`: the one truth about all jobs.

Every change of state is one guarded `UPDATE` inside `BEGIN IMMEDIATE`, and its row in `job_events` is
written in the same transaction. A connection is opened per operation and never shared between threads.

Tables: `jobs` (one row per job) and `job_events` (append-only history: which state, when, why, by whom).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

from backend.errors import ConfigError, ConfigErrors, JobError
from backend.jobs.states import ACTIVE, FINAL, State, sources_of
from backend.paths import Home
from backend.schema import JobConfig

BUSY_TIMEOUT_S = 30.0

migrations = Migrations("jobs")


@migrations()
def create_jobs(db: Database) -> None:
    """First layout."""
    states = ", ".join(f"'{s}'" for s in (*ACTIVE, *FINAL))
    db.execute(
        f"""CREATE TABLE jobs (
        uid TEXT PRIMARY KEY, job_id TEXT NOT NULL, folder TEXT NOT NULL UNIQUE,
        model TEXT NOT NULL, algorithm TEXT NOT NULL, device TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ({states})), reason TEXT, attempt INTEGER NOT NULL DEFAULT 1,
        config_yaml TEXT NOT NULL, progress TEXT NOT NULL DEFAULT '{{}}', result TEXT, artefact TEXT,
        created_at TEXT NOT NULL, started_at TEXT, finished_at TEXT
        ) STRICT"""
    )
    db.execute("CREATE INDEX jobs_by_state ON jobs (state, device, uid)")
    db.execute(
        """CREATE TABLE job_events (
        id INTEGER PRIMARY KEY, uid TEXT NOT NULL REFERENCES jobs (uid), attempt INTEGER NOT NULL,
        from_state TEXT, to_state TEXT NOT NULL, actor TEXT NOT NULL, reason TEXT, at TEXT NOT NULL
        ) STRICT"""
    )


SCHEMA = {"create_jobs"}  # every migration of this version


def now() -> str:
    """The present moment as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def new_uid() -> str:
    """A sortable, unguessable id: 12 hex digits of milliseconds, 10 of randomness."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(5)}"


@dataclass(frozen=True)
class Job:
    """One row of `jobs`.

    Attributes:
        uid: Id made by the store; sorts by creation.
        job_id: The YAML's JOB_ID.
        folder: Where the artefact is published, relative to the home.
        device: `cpu` or `cuda:N`, decided when the job was created.
        state: One of `backend.jobs.states`.
        attempt: 1, and one more each time it was resumed.
        reason: Why it waits, failed or was cancelled; None otherwise.
        progress: `stage`, `step`, `total`, `eta_s`, `message`, `configuration` of the present stage.
        result: Rows, timings and the like once measured; see `backend.jobs.results`.
        artefact: Absolute path of the published model (of several: the first one's), None until it is.
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

    @property
    def is_active(self) -> bool:
        """True until the job has reached a final state."""
        return self.state in ACTIVE


class JobStore:
    """Reads and changes `jobs.db` of one home.

    Example:
        >>> store = JobStore(Home.at("/tmp/home"))
        >>> job = store.create(text, config, device="cpu")
        >>> store.move(job.uid, "running", actor="runner", attempt=job.attempt)
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        home.private.mkdir(parents=True, exist_ok=True)
        # Two processes may start at once on a new home: one of them makes the tables.
        with open(home.private / "store.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with self._open() as db:
                applied = {m.name for m in migrations.applied(db)}
                if newer := sorted(applied - SCHEMA):
                    raise JobError(
                        f"{home.jobs_db} was written by a newer Quantdeck (it has {newer}); "
                        "start that version, or choose another --home"
                    )
                if SCHEMA - applied:
                    migrations.apply(db)

    @contextlib.contextmanager
    def _open(self) -> Iterator[Database]:
        try:
            connection = sqlite3.connect(self.home.jobs_db, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        except sqlite3.Error as error:
            raise JobError(f"cannot open {self.home.jobs_db}: {error}") from None
        try:
            connection.execute("PRAGMA foreign_keys = ON")
            # The rollback journal with full syncs: SQLite before 3.51.3 can lose commits in WAL mode.
            connection.execute("PRAGMA synchronous = FULL")
            yield Database(connection)
        except sqlite3.DatabaseError as error:
            raise JobError(f"the job store {self.home.jobs_db} cannot be used: {error}") from error
        finally:
            connection.close()

    @contextlib.contextmanager
    def _write(self) -> Iterator[Database]:
        """One write transaction; it takes the lock at its start, so it never fails half-way on a busy database."""
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.conn.rollback()
                raise
            db.conn.commit()

    @staticmethod
    def _job(row: dict[str, Any]) -> Job:
        row["progress"] = json.loads(row["progress"])
        row["result"] = json.loads(row["result"]) if row["result"] else None
        return Job(**row)

    @staticmethod
    def _record(db: Database, job: Job, to: State, actor: str, reason: str | None, *, new: bool = False) -> None:
        db.table("job_events").insert(
            {
                "uid": job.uid, "attempt": job.attempt, "from_state": None if new else job.state, "to_state": to,
                "actor": actor, "reason": reason, "at": now(),
            }
        )  # fmt: skip

    def create(self, text: str, config: JobConfig, *, device: str) -> Job:
        """Add a queued job.

        Args:
            text: The YAML exactly as submitted.
            config: The same, validated.
            device: `cpu` or `cuda:N`.

        Raises:
            ConfigErrors: If a job of that name exists; nothing is changed then.
        """
        folder = str(self.home.artefact_dir(config).relative_to(self.home.root))
        with self._write() as db:
            taken = list(db.query("SELECT state, created_at FROM jobs WHERE folder = ?", [folder]))
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
            job = Job(
                uid=new_uid(), job_id=config.JOB_ID, folder=folder, model=config.CUSTOM_MODEL_PATH or config.MODEL,
                algorithm=config.ALGORITHM, device=device, state="queued", reason=None, attempt=1, config_yaml=text,
                artefact=None, created_at=now(), started_at=None, finished_at=None,
            )  # fmt: skip
            row = {k: v for k, v in vars(job).items() if k not in ("progress", "result")}
            db.table("jobs").insert({**row, "progress": "{}", "result": None})
            self._record(db, job, "queued", "user", None, new=True)
        return job

    def _free_name(self, db: Database, config: JobConfig) -> str:
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
            if not folder.exists() and not list(db.query("SELECT 1 FROM jobs WHERE folder = ?", [relative])):
                return config.JOB_ID
            return self._free_name(db, config)

    def get(self, uid: str) -> Job:
        """The job with this uid, or with this JOB_ID (the newest of that name).

        Raises:
            JobError: If there is none.
        """
        with self._open() as db:
            rows = list(
                db.query("SELECT * FROM jobs WHERE uid = :id OR job_id = :id ORDER BY uid DESC LIMIT 1", {"id": uid})
            )
        if not rows:
            raise JobError(f"there is no job {uid!r}; `python -m backend jobs` lists them")
        return self._job(rows[0])

    def jobs(self, *, states: tuple[State, ...] = (), limit: int = 1000) -> list[Job]:
        """The newest jobs first, of the given states or of all."""
        where = f"WHERE state IN ({','.join('?' * len(states))})" if states else ""
        with self._open() as db:
            rows = list(db.query(f"SELECT * FROM jobs {where} ORDER BY uid DESC LIMIT ?", [*states, limit]))
        return [self._job(row) for row in rows]

    def history(self, uid: str) -> list[dict[str, Any]]:
        """The job's changes of state, oldest first."""
        with self._open() as db:
            return list(db.query("SELECT * FROM job_events WHERE uid = ? ORDER BY id", [uid]))

    def move(
        self,
        uid: str,
        to: State,
        *,
        actor: str,
        attempt: int,
        reason: str | None = None,
        only_from: State | None = None,
    ) -> bool:
        """Change the state, if the job still is where that is allowed.

        Args:
            uid: The job.
            to: Its next state.
            actor: Who asks: `user`, `runner`, `reconcile`.
            attempt: The attempt that the caller acts for; a caller of an older attempt changes nothing.
            reason: Why, for people.
            only_from: Narrows the states it may come from.

        Returns:
            True if the state was changed, False if another change came first.
        """
        if to == "queued":
            raise ValueError("a job is queued by `create` and by `resume`, which counts the attempt")
        sources = (only_from,) if only_from else sources_of(to)
        stamp = {"running": "started_at"}.get(to, "finished_at" if to in FINAL else None)
        also = f", {stamp} = :now" if stamp else ""
        with self._write() as db:
            rows = list(db.query("SELECT * FROM jobs WHERE uid = ?", [uid]))
            if not rows:
                raise JobError(f"there is no job {uid!r}")
            before = self._job(rows[0])
            if before.state not in sources or before.attempt != attempt:
                return False
            db.execute(
                f"UPDATE jobs SET state = :to, reason = :reason{also} WHERE uid = :uid",
                {"to": to, "reason": reason, "uid": uid, "now": now()},
            )
            self._record(db, before, to, actor, reason)
        return True

    def resume(self, uid: str, *, actor: str, attempt: int) -> bool:
        """Queue a failed or cancelled job again under the next attempt number.

        What its earlier attempts stored stays; whatever is left of an earlier attempt can change nothing any more.

        Args:
            uid: The job.
            actor: Who asks.
            attempt: The attempt that is to be followed; of two callers at once the second changes nothing.

        Returns:
            True if the job is queued now, False if it is not in a state to resume or another change came first.
        """
        with self._write() as db:
            rows = list(db.query("SELECT * FROM jobs WHERE uid = ? AND attempt = ?", [uid, attempt]))
            if not rows or rows[0]["state"] not in sources_of("queued"):
                return False
            before = self._job(rows[0])
            db.execute(
                "UPDATE jobs SET state = 'queued', attempt = attempt + 1, reason = NULL, progress = '{}', "
                "started_at = NULL, finished_at = NULL WHERE uid = ?",
                [uid],
            )
            self._record(db, replace(before, attempt=attempt + 1), "queued", actor, "resumed")
        return True

    def claim(self, uid: str, attempt: int) -> bool:
        """Start a queued job if its device is free and no older job waits for it.

        Returns:
            True if the job is running now; False if it has to wait on (the reason is stored) or is no longer queued.
        """
        with self._write() as db:
            rows = list(
                db.query("SELECT * FROM jobs WHERE uid = ? AND state = 'queued' AND attempt = ?", [uid, attempt])
            )
            if not rows:
                return False
            job = self._job(rows[0])
            ahead = list(
                db.query(
                    "SELECT job_id, state FROM jobs WHERE device = ? AND uid != ? AND "
                    "(state IN ('running', 'cancelling') OR (state = 'queued' AND uid < ?)) ORDER BY state DESC, uid",
                    [job.device, uid, uid],
                )
            )
            if ahead:
                verb = "uses" if ahead[0]["state"] != "queued" else "is before it in the queue for"
                reason = f"waiting: job {ahead[0]['job_id']} {verb} {job.device}"
                if reason != job.reason:
                    db.execute("UPDATE jobs SET reason = ? WHERE uid = ?", [reason, uid])
                return False
            db.execute("UPDATE jobs SET state = 'running', reason = NULL, started_at = ? WHERE uid = ?", [now(), uid])
            self._record(db, job, "running", "runner", None)
        return True

    def update(self, uid: str, attempt: int, **columns: Any) -> None:
        """Store `progress` (dict), `result` (dict) or `artefact` (path) of a running attempt.

        A late write of an older attempt, or to a finished job, changes nothing.
        """
        allowed = {"progress", "result", "artefact"}
        if not columns or set(columns) - allowed:
            raise ValueError(f"only {sorted(allowed)} can be updated, not {sorted(columns)}")
        values = {k: json.dumps(v) if isinstance(v, dict) else v for k, v in columns.items()}
        sets = ", ".join(f"{name} = :{name}" for name in values)
        with self._write() as db:
            db.execute(
                f"UPDATE jobs SET {sets} "
                "WHERE uid = :uid AND attempt = :attempt AND state IN ('running', 'cancelling')",
                {**values, "uid": uid, "attempt": attempt},
            )
