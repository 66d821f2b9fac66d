"""The SQLite file below the job store: how it is opened, and how an older one is brought up.

A database that is not ours to change (no database, or of a newer version) is refused before anything is written.
An existing one is copied beside itself before a migration, and a home that has had a database never gets an empty
one in its place.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from backend.errors import JobError
from backend.paths import Home

BUSY_TIMEOUT_S = 30.0
_wait_s: ContextVar[float] = ContextVar("wait_s", default=BUSY_TIMEOUT_S)

SAFE_WAL = (3, 51, 3)
"""The first SQLite without the fault that loses commits when two connections checkpoint a WAL at once."""

LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay", "jfs", "bcachefs"}

MADE = (
    "jobs.db of this home was made. If it is missing, put a backup of it back; "
    "delete this file to begin without any jobs.\n"
)

Values = Sequence[Any] | Mapping[str, Any]


class StoreBusyError(JobError):
    """The database was locked by another program for longer than we wait; the same call may work later."""


class Connection:
    """A connection to SQLite, with rows as dictionaries where that helps."""

    def __init__(self, raw: sqlite3.Connection) -> None:
        self.raw = raw

    def execute(self, query: str, values: Values = ()) -> sqlite3.Cursor:
        """Run one statement."""
        return self.raw.execute(query, values)

    def execute_all(self, query: str, rows: Iterable[Values]) -> None:
        """Run one statement for each row of values."""
        self.raw.executemany(query, rows)

    def query(self, query: str, values: Values = ()) -> list[dict[str, Any]]:
        """The rows of a query, as dictionaries."""
        cursor = self.raw.execute(query, values)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    def insert(self, table: str, row: Mapping[str, Any]) -> int:
        """Add a row; returns its rowid."""
        names = ", ".join(row)
        done = self.raw.execute(f"INSERT INTO {table} ({names}) VALUES ({', '.join('?' * len(row))})", [*row.values()])
        return int(done.lastrowid or 0)

    def roll_back(self) -> None:
        """Undo the open transaction, if there is one."""
        if self.raw.in_transaction:
            self.raw.execute("ROLLBACK")


MIGRATIONS = ("create_jobs", "schedule_jobs", "label_and_delete_jobs")
"""Names of every migration of this version, in order; `backend.jobs.migrations` has them. They are named here, too, so
that it is imported only when one is pending: sqlite-utils imports pandas, and with it each runner would start 0.4 s
later."""


def file_system(path: Path) -> str:
    """Type of the file system that a path lies on, e.g. `ext4`; empty if it cannot be told."""
    target, best, kind = os.path.realpath(path), "", ""
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        for line in mounts:
            left, _, right = line.partition(" - ")
            point = left.split()[4].encode().decode("unicode_escape")
            inside = target == point or target.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):
                best, kind = point, right.split()[0]
    return kind


def journal_for(folder: Path) -> str:
    """The journal that is safe here: `wal` for a new enough SQLite on a local file system, else `delete`."""
    safe = sqlite3.sqlite_version_info >= SAFE_WAL and file_system(folder) in LOCAL_FILE_SYSTEMS
    return "wal" if safe else "delete"


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Within the block a busy database is waited for so long at most: for a page, which rather says so and asks again.

    Args:
        seconds: The longest wait for one operation.
    """
    token = _wait_s.set(seconds)
    try:
        yield
    finally:
        _wait_s.reset(token)


@contextlib.contextmanager
def opened(home: Home, *, create: bool = False, foreign_keys: bool = True) -> Iterator[Connection]:
    """A connection for one operation of one thread.

    Args:
        home: The home.
        create: Make the file if there is none; otherwise that is an error, and nothing is made.
        foreign_keys: Whether references between tables are checked.

    Raises:
        StoreBusyError: If another program held the database for too long.
        JobError: If it cannot be used.
    """
    path = home.jobs_db
    uri = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
    try:
        connection = sqlite3.connect(uri, uri=True, timeout=_wait_s.get(), isolation_level=None)
    except sqlite3.Error as error:
        raise _unusable(path, error) from None
    try:
        connection.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")
        connection.execute("PRAGMA synchronous = FULL")
        yield Connection(connection)
    except sqlite3.DatabaseError as error:
        raise _unusable(path, error) from error
    finally:
        connection.close()


def _unusable(path: Path, error: sqlite3.Error) -> JobError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreBusyError(
            f"the job store {path} is busy: another program has locked it for more than {_wait_s.get():.0f} s"
        )
    if not path.exists():
        return JobError(f"the job store {path} is gone; nothing was made in its place. Put the file or a backup back")
    return JobError(f"the job store {path} cannot be used: {error}")


def prepare(home: Home) -> None:
    """Make the database of a new home, or bring an older one up to this version.

    Raises:
        JobError: If the database is of a newer version, is no database, or is missing though there was one; nothing
            is changed then.
    """
    if home.jobs_db.exists() and _is_marked(home) and _is_current(home):
        return
    try:
        home.private.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Two processes may start at once: one of them makes or migrates the tables, the other waits and finds them.
        with open(home.private / "store.lock", "a+", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            marked, pending = _is_marked(home), _pending(home) if home.jobs_db.exists() else list(MIGRATIONS)
            if marked and pending == list(MIGRATIONS):
                what = "has lost its tables" if home.jobs_db.exists() else "is gone"
                raise JobError(
                    f"the job store {home.jobs_db} {what}, and no empty one was made in its place. Put a backup back "
                    f"(jobs.db.before-... or your own), or delete it and {lock.name} to begin without any jobs"
                )
            if pending:
                _migrate(home, pending)
            elif not _is_current(home):
                _leave_wal(home)
            if not marked:
                lock.write(MADE)
                lock.flush()
                os.fsync(lock.fileno())
    except OSError as error:
        raise JobError(f"cannot write to the home {home.root}: {error.strerror} ({error.filename})") from None


def _is_marked(home: Home) -> bool:
    try:
        return (home.private / "store.lock").stat().st_size > 0
    except FileNotFoundError:
        return False


def _is_current(home: Home) -> bool:
    if _pending(home):
        return False
    with opened(home) as db:
        return journal_mode(db) == "delete" or journal_for(home.root) == "wal"


def journal_mode(db: Connection) -> str:
    """The journal that the database uses, in small letters."""
    return str(db.execute("PRAGMA journal_mode").fetchone()[0])


def _leave_wal(home: Home) -> None:
    """Go back to the journal that is safe with this SQLite; not possible while others have the database open."""
    with opened(home) as db, contextlib.suppress(sqlite3.OperationalError):
        db.execute("PRAGMA busy_timeout = 1000")
        db.execute("PRAGMA journal_mode = delete")


def _pending(home: Home) -> list[str]:
    """Migrations that the database still needs; an error if it has some that this version does not know."""
    with opened(home) as db:
        table = db.execute("SELECT 1 FROM sqlite_master WHERE name = '_sqlite_migrations'").fetchone()
        query = "SELECT name FROM _sqlite_migrations WHERE migration_set = 'jobs'"
        applied = {row[0] for row in db.execute(query)} if table else set()
    if newer := sorted(applied - set(MIGRATIONS)):
        raise JobError(
            f"{home.jobs_db} was written by a newer Quantdeck (it has {newer}); start that version, "
            "or choose another --home. Nothing was changed"
        )
    return [name for name in MIGRATIONS if name not in applied]


def _migrate(home: Home, pending: list[str]) -> None:
    from sqlite_utils import Database

    from backend.jobs.migrations import migrations

    if pending != list(MIGRATIONS):  # a new one needs no copy
        back_up(home, _unused(home.root / f"jobs.db.before-{pending[0]}"))
    with opened(home, create=True, foreign_keys=False) as db:
        wanted = journal_for(home.root)
        if journal_mode(db) != wanted:
            db.execute(f"PRAGMA journal_mode = {wanted}")
        db.execute("BEGIN IMMEDIATE")  # runners of the version before may be writing
        try:
            migrations.apply(Database(db.raw))  # in savepoints of this transaction: all of them or none
            if broken := db.execute("PRAGMA foreign_key_check").fetchall():
                raise JobError(f"{home.jobs_db} has rows without their job ({len(broken)}); nothing was changed")
            db.execute("COMMIT")
        except BaseException:
            db.roll_back()
            raise


def _unused(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def back_up(home: Home, target: Path) -> None:
    """Copy the database as it is at one moment, while others go on writing.

    Raises:
        JobError: If the target exists, or cannot be written.
    """
    if target.exists():
        raise JobError(f"{target} exists already; choose another file for the backup")
    part = target.with_name(f"{target.name}.part")
    try:
        part.unlink(missing_ok=True)
        with opened(home) as db, contextlib.closing(sqlite3.connect(part)) as copy:
            db.raw.backup(copy)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.rename(part, target)
    except OSError as error:
        raise JobError(f"cannot write the backup {target}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
