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
from backend.jobs.listing import condition, order
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

    def query(self, query: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """The rows of a query that changes nothing."""
        with self._open() as db:
            return db.query(query, values)

    @staticmethod
    def _job(row: dict[str, Any]) -> Job:
        row["progress"] = json.loads(row["progress"])
        row["result"] = json.loads(row["result"]) if row.get("result") else None
        row["stalled"] = bool(row["stalled"])
        row["tags"] = tuple(row["tags"].split())
        row.setdefault("config_yaml", "")
        return Job(**row)

    def get(self, uid: str) -> Job:
        """The job with this uid, or with this JOB_ID (the newest of that name that is not deleted).

        Raises:
            JobError: If there is none.
        """
        with self._open() as db:
            rows = db.query(
                "SELECT * FROM jobs WHERE (uid = :id AND erased IS NULL) OR (job_id = :id AND deleted_at IS NULL) "
                "ORDER BY uid DESC LIMIT 1",
                {"id": uid},
            )
        if not rows:
            raise JobError(f"there is no job {uid!r}; `python -m backend jobs` lists them")
        return self._job(rows[0])

    def get_deleted(self, uid: str) -> Job:
        """The deleted job with this uid, or with this JOB_ID (of several, the one that was deleted last).

        Raises:
            JobError: If there is none, or nothing is left of it.
        """
        with self._open() as db:
            rows = db.query(
                "SELECT * FROM jobs WHERE :id IN (uid, job_id) AND deleted_at IS NOT NULL AND erased IS NOT 'done' "
                "ORDER BY deleted_at DESC, uid DESC LIMIT 1",
                {"id": uid},
            )
        if not rows:
            raise JobError(f"there is no deleted job {uid!r}; `python -m backend jobs --deleted` lists them")
        return self._job(rows[0])

    def jobs(
        self, *, states: Sequence[State] = (), limit: int = 1000, offset: int = 0, search: str = "", sort: str = "",
        deleted: bool = False,
    ) -> list[Job]:  # fmt: skip
        """Jobs, the newest first unless they are sorted.

        Args:
            states: Only jobs in one of these; all if empty.
            limit: At most so many.
            offset: So many of the first are left out.
            search: Only jobs with this text in name, model, algorithm, uid, tags or note, in capital or small
                letters, and with the tags that it names as `tag:sweep`.
            sort: One of `listing.SORTS`, with `-` before it for the other direction.
            deleted: The deleted jobs instead of the others.
        """
        return self._list("*", condition(states, search, deleted=deleted), order(sort), limit, offset)

    def summaries(
        self, *, states: Sequence[State] = (), limit: int = 1000, offset: int = 0, search: str = "", sort: str = "",
        deleted: bool = False,
    ) -> list[Job]:  # fmt: skip
        """`jobs` without their files and results (`config_yaml` is empty, `result` None), for long lists."""
        return self._list(LIGHT, condition(states, search, deleted=deleted), order(sort), limit, offset)

    def _list(self, columns: str, where: tuple[str, list[Any]], by: str, limit: int, offset: int) -> list[Job]:
        wanted, values = where
        # What is sorted are the ids alone: the rows of a page are read afterwards.
        query = f"SELECT {columns} FROM jobs WHERE uid IN (SELECT uid FROM jobs {wanted} {by} LIMIT ? OFFSET ?) {by}"
        with self._open() as db:
            rows = db.query(query, [*values, limit, offset])
        return [self._job(row) for row in rows]

    def count(self, states: Sequence[State] = (), search: str = "", *, deleted: bool = False) -> int:
        """How many jobs `jobs` would list without a limit."""
        where, values = condition(states, search, deleted=deleted)
        with self._open() as db:
            return int(db.execute(f"SELECT count(*) FROM jobs {where}", values).fetchone()[0])

    def counts(self) -> dict[str, int]:
        """How many jobs are in each state; states without any are left out, and so are deleted jobs."""
        with self._open() as db:
            query = "SELECT state, count(*) FROM jobs WHERE deleted_at IS NULL GROUP BY state"
            return dict(db.execute(query).fetchall())

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
