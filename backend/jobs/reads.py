"""Reading jobs.db: jobs, their history, what is in use, and whether all of it fits together."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from backend.errors import JobError
from backend.jobs import database
from backend.jobs.database import Connection
from backend.jobs.job import Instance, Job, Lease
from backend.jobs.states import FINAL, STARTED, State
from backend.paths import Home

LIGHT = ", ".join(name for name in Job.__dataclass_fields__ if name not in ("config_yaml", "result"))


class JobReader:
    """Reads `jobs.db` of one home, with a connection per operation.

    Args:
        home: The home. Its database is made, or brought up to this version, if need be.

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

    @staticmethod
    def _job(row: dict[str, Any]) -> Job:
        row["progress"] = json.loads(row["progress"])
        row["result"] = json.loads(row["result"]) if row.get("result") else None
        row["stalled"] = bool(row["stalled"])
        row.setdefault("config_yaml", "")
        return Job(**row)

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

    def leases(self) -> list[Lease]:
        """The resources in use."""
        with self._open() as db:
            return [Lease(**row) for row in db.query("SELECT * FROM leases ORDER BY resource")]

    def instances(self) -> list[Instance]:
        """The dashboards and schedulers that were noted; one that was killed stays until the next comes."""
        with self._open() as db:
            return [Instance(**row) for row in db.query("SELECT * FROM instances ORDER BY id")]

    def journal(self) -> str:
        """The journal that this SQLite and this file system call for: `wal` or `delete`."""
        return database.journal_for(self.home.root)

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
