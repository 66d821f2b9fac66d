"""The tables of jobs.db, and how each version's came from the one before; applied by sqlite-utils.

What was applied is kept in its table `_sqlite_migrations`. A migration is never changed once it was released.
"""

from __future__ import annotations

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

migrations = Migrations("jobs")

COLUMNS = """uid TEXT PRIMARY KEY, job_id TEXT NOT NULL, folder TEXT NOT NULL UNIQUE,
        model TEXT NOT NULL, algorithm TEXT NOT NULL, device TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ({states})), reason TEXT, attempt INTEGER NOT NULL DEFAULT 1,
        config_yaml TEXT NOT NULL, progress TEXT NOT NULL DEFAULT '{{}}', result TEXT, artefact TEXT,
        created_at TEXT NOT NULL, started_at TEXT, finished_at TEXT"""


@migrations()
def create_jobs(db: Database) -> None:
    """First layout."""
    states = "'queued', 'running', 'cancelling', 'succeeded', 'failed', 'cancelled'"
    db.execute(f"CREATE TABLE jobs ({COLUMNS.format(states=states)}) STRICT")
    db.execute("CREATE INDEX jobs_by_state ON jobs (state, device, uid)")
    db.execute(
        """CREATE TABLE job_events (
        id INTEGER PRIMARY KEY, uid TEXT NOT NULL REFERENCES jobs (uid), attempt INTEGER NOT NULL,
        from_state TEXT, to_state TEXT NOT NULL, actor TEXT NOT NULL, reason TEXT, at TEXT NOT NULL
        ) STRICT"""
    )


@migrations()
def schedule_jobs(db: Database) -> None:
    """States `starting` and `lost`, priorities, attempts, heartbeats, leases and instances."""
    states = "'queued', 'starting', 'running', 'cancelling', 'lost', 'succeeded', 'failed', 'cancelled'"
    # SQLite cannot change a CHECK: the table is made anew. Foreign keys are off while migrations run.
    db.execute(
        f"""CREATE TABLE jobs_new ({COLUMNS.format(states=states)},
        priority INTEGER NOT NULL DEFAULT 0, max_attempts INTEGER NOT NULL DEFAULT 3, time_limit_s REAL,
        outcome TEXT, heartbeat INTEGER NOT NULL DEFAULT 0, stalled INTEGER NOT NULL DEFAULT 0,
        redo TEXT NOT NULL DEFAULT ''
        ) STRICT"""
    )
    shared = (
        "uid, job_id, folder, model, algorithm, device, state, reason, attempt, config_yaml, progress, result, "
        "artefact, created_at, started_at, finished_at"
    )
    db.execute(f"INSERT INTO jobs_new ({shared}) SELECT {shared} FROM jobs")
    db.execute("DROP TABLE jobs")
    db.execute("ALTER TABLE jobs_new RENAME TO jobs")
    db.execute("CREATE INDEX jobs_by_state ON jobs (state, priority, uid)")
    db.execute("CREATE INDEX jobs_by_name ON jobs (job_id)")
    db.execute("CREATE INDEX job_events_by_job ON job_events (uid, id)")
    db.execute(
        "CREATE TABLE leases (resource TEXT PRIMARY KEY, uid TEXT NOT NULL REFERENCES jobs (uid), "
        "attempt INTEGER NOT NULL, at TEXT NOT NULL) STRICT"
    )
    db.execute(
        """CREATE TABLE instances (
        id INTEGER PRIMARY KEY, kind TEXT NOT NULL CHECK (kind IN ('dashboard', 'scheduler')), host TEXT NOT NULL,
        pid INTEGER NOT NULL, started INTEGER NOT NULL, boot_id TEXT NOT NULL, at TEXT NOT NULL
        ) STRICT"""
    )
    for change in ("UPDATE", "DELETE"):
        db.execute(
            f"CREATE TRIGGER job_events_no_{change.lower()} BEFORE {change} ON job_events "
            "BEGIN SELECT RAISE(ABORT, 'job_events only grows'); END"
        )


KEPT = """uid, job_id, folder, model, algorithm, device, state, attempt, priority, created_at, started_at, finished_at,
        max_attempts, time_limit_s, outcome, heartbeat, stalled, redo, reason, artefact, progress,
        config_yaml, result"""


@migrations()
def label_and_delete_jobs(db: Database) -> None:
    """Tags and a note per job; jobs that are deleted, and what is left of those that are deleted for good."""
    states = "'queued', 'starting', 'running', 'cancelling', 'lost', 'succeeded', 'failed', 'cancelled'"
    # Made anew for the order of its columns: what lists sort and search by comes before the large texts, so that it is
    # read without them.
    db.execute(
        f"""CREATE TABLE jobs_new (uid TEXT PRIMARY KEY, job_id TEXT NOT NULL, folder TEXT NOT NULL UNIQUE,
        model TEXT NOT NULL, algorithm TEXT NOT NULL, device TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ({states})), attempt INTEGER NOT NULL DEFAULT 1,
        priority INTEGER NOT NULL DEFAULT 0, created_at TEXT NOT NULL, started_at TEXT, finished_at TEXT,
        deleted_at TEXT, erased TEXT CHECK (erased IN ('begun', 'done')), tags TEXT NOT NULL DEFAULT '',
        max_attempts INTEGER NOT NULL DEFAULT 3, time_limit_s REAL,
        outcome TEXT, heartbeat INTEGER NOT NULL DEFAULT 0, stalled INTEGER NOT NULL DEFAULT 0,
        redo TEXT NOT NULL DEFAULT '', reason TEXT, artefact TEXT, note TEXT NOT NULL DEFAULT '',
        progress TEXT NOT NULL DEFAULT '{{}}', config_yaml TEXT NOT NULL, result TEXT,
        CHECK (erased IS NULL OR deleted_at IS NOT NULL)
        ) STRICT"""
    )
    db.execute(f"INSERT INTO jobs_new ({KEPT}) SELECT {KEPT} FROM jobs")
    db.execute("DROP TABLE jobs")
    db.execute("ALTER TABLE jobs_new RENAME TO jobs")
    db.execute("CREATE INDEX jobs_by_state ON jobs (state, priority, uid)")
    db.execute("CREATE INDEX jobs_by_name ON jobs (job_id)")
    db.execute("CREATE INDEX jobs_listed ON jobs (deleted_at, uid)")
    db.execute("CREATE INDEX jobs_counted ON jobs (deleted_at, state)")
