"""The job store over changes of its version (fault 28), and the journal that is safe."""

import json
import sqlite3
import subprocess
import sys

import pytest

from backend.errors import JobError
from backend.jobs import database
from backend.jobs.migrations import migrations, schedule_jobs
from backend.jobs.states import FINAL
from backend.jobs.store import JobStore
from backend.paths import PROJECT
from tests.jobs.stored import make


def python(code, *args, **more):
    """Another process with this code."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=PROJECT, text=True, **more)


# -- versions


FIRST_SCHEMA = """
CREATE TABLE _sqlite_migrations (id INTEGER PRIMARY KEY, migration_set TEXT, name TEXT, applied_at TEXT);
CREATE UNIQUE INDEX idx__sqlite_migrations_migration_set_name ON _sqlite_migrations (migration_set, name);
INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('jobs', 'create_jobs', '2026-01-01');
CREATE TABLE jobs (
    uid TEXT PRIMARY KEY, job_id TEXT NOT NULL, folder TEXT NOT NULL UNIQUE,
    model TEXT NOT NULL, algorithm TEXT NOT NULL, device TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'cancelling', 'succeeded', 'failed', 'cancelled')),
    reason TEXT, attempt INTEGER NOT NULL DEFAULT 1,
    config_yaml TEXT NOT NULL, progress TEXT NOT NULL DEFAULT '{}', result TEXT, artefact TEXT,
    created_at TEXT NOT NULL, started_at TEXT, finished_at TEXT
) STRICT;
CREATE INDEX jobs_by_state ON jobs (state, device, uid);
CREATE TABLE job_events (
    id INTEGER PRIMARY KEY, uid TEXT NOT NULL REFERENCES jobs (uid), attempt INTEGER NOT NULL,
    from_state TEXT, to_state TEXT NOT NULL, actor TEXT NOT NULL, reason TEXT, at TEXT NOT NULL
) STRICT;
"""
OLD_STATES = ("queued", "running", "cancelling", "succeeded", "failed", "cancelled")
MOMENTS = ("2026-01-02T03:04:05.000+00:00", "2026-01-02T03:04:06.000+00:00", "2026-01-02T04:00:00.000+00:00")


def first_version(home):
    """A database as the first version wrote it, with a job in every state."""
    home.private.mkdir(parents=True)
    (home.private / "store.lock").touch()  # that version left it empty
    created, started, finished = MOMENTS
    with sqlite3.connect(home.jobs_db) as db:
        db.executescript(FIRST_SCHEMA)
        for number, state in enumerate(OLD_STATES):
            uid = f"{0x19B7C000000 + number:012x}aaaaaaaaaa"
            result = json.dumps({"rows": [number]}) if state == "succeeded" else None
            values = [
                uid, state, f"user_data/jobs/Kompress/{state}", "m", "AutoAWQ", "cuda:0" if number == 1 else "cpu",
                state, f"why {state}", number + 1, "A: 1", '{"stage": "x"}', result, "/made" if result else None,
                created, None if state == "queued" else started, finished if state in FINAL else None,
            ]  # fmt: skip
            db.execute(f"INSERT INTO jobs VALUES ({', '.join('?' * len(values))})", values)
            for to in ("queued", state)[: 1 if state == "queued" else 2]:
                event = [uid, number + 1, to, created if to == "queued" else finished]
                db.execute(
                    "INSERT INTO job_events (uid, attempt, to_state, actor, at) VALUES (?, ?, ?, 'runner', ?)", event
                )
    db.close()


def test_a_database_of_the_first_version_is_brought_up_once_by_two_processes_at_once(home):
    first_version(home)
    before = home.jobs_db.read_bytes()
    code = (
        "import sys; from backend.jobs.store import JobStore; from backend.paths import Home; sys.stdin.read(1);"
        "print(JobStore(Home.at(sys.argv[1])).count())"
    )
    openers = [python(code, home.root, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    for opener in openers:  # both are ready by now, or nearly
        opener.stdin.write("x")
        opener.stdin.flush()
    assert [opener.communicate(timeout=60)[0] for opener in openers] == ["6\n", "6\n"]
    store = JobStore(home)
    assert store.check() == []
    for number, state in enumerate(OLD_STATES):
        job = store.get(state)
        assert (job.state, job.attempt, job.reason) == (state, number + 1, f"why {state}")
        assert (job.priority, job.max_attempts, job.outcome, job.stalled, job.redo) == (0, 3, None, False, "")
        assert job.progress == {"stage": "x"} and job.created_at == MOMENTS[0]
        assert len(store.history(job.uid)) == (1 if state == "queued" else 2)
    assert store.get("succeeded").result == {"rows": [3]} and store.get("running").device == "cuda:0"
    with sqlite3.connect(home.jobs_db) as db:
        applied = db.execute("SELECT name FROM _sqlite_migrations ORDER BY id").fetchall()
    assert applied == [("create_jobs",), ("schedule_jobs",), ("label_and_delete_jobs",)]
    copies = sorted(path.name for path in home.root.glob("jobs.db.before*"))
    assert copies == ["jobs.db.before-schedule_jobs"]
    with sqlite3.connect(home.root / copies[0]) as old, sqlite3.connect(":memory:") as fresh:
        fresh.deserialize(before)
        assert list(old.iterdump()) == list(fresh.iterdump())
    # what was active goes on: the states of before lead into those of now
    assert store.move(store.get("running").uid, "lost", actor="scheduler", attempt=2)
    assert store.move(store.get("cancelling").uid, "cancelled", actor="scheduler", attempt=3)
    assert store.grant(store.get("queued").uid, 1, ["cpu:0"])
    assert store.check() == []


def test_the_store_knows_every_migration_by_name():
    assert [migration.name for migration in migrations._migrations] == list(database.MIGRATIONS)


def test_a_migration_that_fails_leaves_the_database_as_it_was(home, monkeypatch):
    first_version(home)
    before = home.jobs_db.read_bytes()

    def breaks(db):
        schedule_jobs(db)
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(migrations._migrations[1], "fn", breaks)
    with pytest.raises(JobError, match="disk I/O error"):
        JobStore(home)
    assert home.jobs_db.read_bytes() == before
    monkeypatch.undo()
    assert JobStore(home).count() == 6


def test_a_database_of_a_newer_version_is_refused_untouched(home):
    store = JobStore(home)
    make(store)
    with sqlite3.connect(home.jobs_db) as db:
        db.execute(
            "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('jobs', 'of_the_future', '')"
        )
    before = home.jobs_db.read_bytes()
    with pytest.raises(JobError, match="newer Quantdeck.*of_the_future.*Nothing was changed"):
        JobStore(home)
    assert home.jobs_db.read_bytes() == before
    assert sorted(path.name for path in home.root.iterdir()) == ["jobs.db", "user_data"]


# -- the journal


@pytest.mark.parametrize(
    ("version", "kind", "wanted"),
    [((3, 40, 1), "ext4", "delete"), ((3, 51, 2), "ext4", "delete"), ((3, 51, 3), "ext4", "wal"),
     ((3, 54, 0), "xfs", "wal"), ((3, 54, 0), "nfs4", "delete"), ((3, 54, 0), "fuse.sshfs", "delete"),
     ((3, 54, 0), "", "delete")],
)  # fmt: skip
def test_a_wal_is_only_used_where_it_is_safe(home, monkeypatch, version, kind, wanted):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
    monkeypatch.setattr(database, "file_system", lambda path: kind)
    store = JobStore(home)
    assert store.journal() == wanted
    with store._open() as db:
        assert database.journal_mode(db) == wanted
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_wal_of_another_sqlite_is_left_where_it_is_not_safe(home, monkeypatch):
    monkeypatch.setattr(database, "journal_for", lambda folder: "wal")
    job = make(JobStore(home))
    monkeypatch.setattr(database, "journal_for", lambda folder: "delete")
    store = JobStore(home)
    with store._open() as db:
        assert database.journal_mode(db) == "delete"
    assert store.get(job.uid) == job


def test_the_type_of_a_file_system_is_known(tmp_path):
    assert database.file_system("/proc") == "proc"
    assert database.file_system(tmp_path) in database.LOCAL_FILE_SYSTEMS
