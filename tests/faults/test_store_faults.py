"""The job store under power loss, damage, crowds, a busy lock and a change of version: real files, real processes."""

import json
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from random import Random

import pytest

from backend.errors import JobError
from backend.jobs import database, launch
from backend.jobs.migrations import migrations, schedule_jobs
from backend.jobs.states import FINAL
from backend.jobs.store import JobStore, StoreBusyError
from backend.paths import PROJECT, Home
from tests.jobs.stored import make, start, states

JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")


def python(code, *args, **more):
    """Another process with this code."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=PROJECT, text=True, **more)


# -- power loss

WRITER = """
import sys
from backend.jobs import database
if sys.argv[2] == "wal":
    database.journal_for = lambda folder: "wal"
from backend.jobs.store import JobStore
from backend.paths import Home
from tests.jobs.stored import make, start
store = JobStore(Home.at(sys.argv[1]))
with database.opened(store.home) as keeps_the_wal_open:
    for number in range(100_000):
        job = make(store, f"j{number}")
        start(store, job, "cpu:0")
        store.update(job.uid, 1, result={"rows": ["x" * 3000]})
        final = ("succeeded", "failed")[number % 2]
        store.move(job.uid, final, actor="runner", attempt=1)
        print(job.uid, final, flush=True)
"""


class Copies:
    """Copies of a database that a process is writing, each with what had been acknowledged by then.

    The writer is stopped for a copy, as a power loss stops it at an arbitrary point.
    """

    def __init__(self, home: Home, journal: str) -> None:
        self.home, self.acknowledged = home, []
        self.writer = python(WRITER, home.root, journal, stdout=subprocess.PIPE)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        deadline = time.monotonic() + 60
        while not self.acknowledged:
            assert time.monotonic() < deadline and self.writer.poll() is None
            time.sleep(0.01)

    def _read(self):
        for line in self.writer.stdout:
            self.acknowledged.append(tuple(line.split()))

    def take(self, number: int) -> tuple[Home, list[tuple[str, str]]]:
        acknowledged = list(self.acknowledged)  # before the stop: all of this is certainly on the disk
        self.writer.send_signal(signal.SIGSTOP)
        os.waitpid(self.writer.pid, os.WUNTRACED)
        copy = Home(self.home.root.parent / f"copy{number}")
        copy.private.mkdir(parents=True)
        for suffix in ("", "-journal", "-wal"):
            source = self.home.root / f"jobs.db{suffix}"
            if source.exists():
                shutil.copy(source, copy.root / source.name)
        (copy.private / "store.lock").write_text("made")
        self.writer.send_signal(signal.SIGCONT)
        return copy, acknowledged

    def end(self):
        self.writer.kill()
        self.writer.wait()


def garble(path, begin, random, most=4096):
    """Replace what stands from `begin` on: by noise, by nothing (cut off), or by noise that is longer."""
    size = path.stat().st_size
    if begin > size:
        return
    at = random.randint(begin, size)
    with open(path, "rb+") as file:
        if random.random() < 0.4:
            file.truncate(at)
        else:
            file.seek(at)
            file.write(random.randbytes(random.randint(1, most)))


def power_lost_with_a_journal(copy, random):
    """What a loss of power may leave: bytes that were never synced may be anything.

    A journal counts once its header has been synced with the number of pages that it holds; from then on the pages
    in the database that it holds may be torn. Before, the database is untouched and the journal may be noise.

    Returns:
        What was found: "none", "unsynced" or "hot".
    """
    journal, db = copy.root / "jobs.db-journal", copy.root / "jobs.db"
    if not journal.exists() or journal.stat().st_size < 512:
        return "none"
    raw = journal.read_bytes()
    magic, count, _, _, sector, page = struct.unpack(">8sIIIII", raw[:28])
    if magic != JOURNAL_MAGIC or count == 0:
        garble(journal, 12 if count == 0 and magic == JOURNAL_MAGIC else 0, random)
        return "unsynced"
    with open(db, "rb+") as file:
        for number in range(count):
            (page_number,) = struct.unpack_from(">I", raw, sector + number * (page + 8))
            if random.random() < 0.7:
                file.seek((page_number - 1) * page + random.choice((0, page // 2)))
                file.write(random.randbytes(page // 2))
    garble(journal, sector + count * (page + 8), random)
    return "hot"


def all_acknowledged_is_there(copy, acknowledged):
    store = JobStore(copy)
    assert store.check() == []
    found = {job.uid: job.state for job in store.summaries(limit=1_000_000)}
    for uid, state in acknowledged:
        assert found[uid] == state
    make(store, "afterwards")  # it can be written to
    assert store.check() == []


def test_power_loss_at_any_point_loses_no_acknowledged_end_of_a_job(home):
    random, found = Random(1), []
    copies = Copies(home, "delete")
    try:
        for number in range(150):
            time.sleep(random.random() * 0.02)
            copy, acknowledged = copies.take(number)
            found.append(power_lost_with_a_journal(copy, random))
            all_acknowledged_is_there(copy, acknowledged)
            shutil.rmtree(copy.root)
            if number > 60 and found.count("hot") > 5:
                break
    finally:
        copies.end()
    assert found.count("hot") > 5 and len(copies.acknowledged) > 10, found


def test_a_torn_wal_loses_no_acknowledged_end_of_a_job(home):
    """Where the SQLite allows a WAL: whatever came after the last acknowledged commit may be anything."""
    random = Random(2)
    copies = Copies(home, "wal")
    torn = 0
    try:
        for number in range(40):
            wal = home.root / "jobs.db-wal"
            acknowledged, synced = list(copies.acknowledged), committed_bytes(wal)
            time.sleep(random.random() * 0.05)
            copy, _ = copies.take(number)
            if (copy.root / wal.name).stat().st_size > synced:
                torn += 1
                garble(copy.root / wal.name, synced, random)
            all_acknowledged_is_there(copy, acknowledged)
            shutil.rmtree(copy.root)
            if wal.stat().st_size > 3_500_000:  # before it is written from its beginning again
                break
    finally:
        copies.end()
    assert torn > 5


def committed_bytes(wal):
    """The part of a WAL that holds whole commits, in bytes."""
    raw = wal.read_bytes()
    size = len(raw)
    page = struct.unpack_from(">I", raw, 8)[0]
    at, committed = 32, 32
    while at + 24 + page <= size:
        if struct.unpack_from(">I", raw, at + 4)[0]:  # a frame that ends a transaction
            committed = at + 24 + page
        at += 24 + page
    return committed


# -- a file that is not as it should be


def test_a_file_that_is_no_database_is_named_and_kept(home):
    home.root.mkdir(parents=True)
    home.jobs_db.write_text("not a database, " * 100)
    with pytest.raises(JobError, match=r"jobs\.db cannot be used: file is not a database"):
        JobStore(home)
    assert home.jobs_db.read_text() == "not a database, " * 100


def test_a_database_replaced_by_garbage_while_jobs_exist_is_kept_and_named(home):
    store = JobStore(home)
    make(store)
    home.jobs_db.write_bytes(b"\x00garbage" * 1000)
    for call in (store.jobs, lambda: make(store, "two"), lambda: JobStore(home), lambda: launch.watch(home)):
        with pytest.raises(JobError, match="file is not a database"):
            call()
    assert home.jobs_db.read_bytes() == b"\x00garbage" * 1000


@pytest.mark.parametrize("damage", ["deleted", "emptied"])
def test_a_database_that_vanished_is_not_replaced_by_an_empty_one(home, damage):
    store = JobStore(home)
    job = make(store)
    store.backup(home.root / "mine.db")
    home.jobs_db.unlink()
    if damage == "emptied":
        home.jobs_db.touch()
    for call in (store.jobs, lambda: make(store, "two"), lambda: JobStore(home)):
        with pytest.raises(JobError, match="gone|lost its tables|no such table"):
            call()
    with pytest.raises(JobError, match="no empty one was made.*Put a backup back"):
        JobStore(home)
    assert home.jobs_db.exists() == (damage == "emptied") and not (damage == "emptied" and home.jobs_db.stat().st_size)
    os.replace(home.root / "mine.db", home.jobs_db)
    assert JobStore(home).get(job.uid) == job


def test_a_home_is_begun_anew_when_the_user_says_so(home):
    make(JobStore(home))
    home.jobs_db.unlink()
    (home.private / "store.lock").unlink()  # as the message says
    assert JobStore(home).jobs() == []


def test_a_read_only_database_can_be_read_and_says_why_it_is_not_written(home):
    """Without the capabilities of root, to whom nothing is read-only."""
    store = JobStore(home)
    job = make(store)
    home.jobs_db.chmod(0o444)
    home.root.chmod(0o555)
    before = home.jobs_db.read_bytes()
    code = """
import ctypes, sys
from backend.errors import JobError
from backend.jobs.store import JobStore
from backend.paths import Home
from tests.jobs.stored import make
no_rights = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, twice 32 bits; layout version 3
assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), no_rights) == 0
store = JobStore(Home.at(sys.argv[1]))
print([job.job_id for job in store.jobs()])
for call in (lambda: make(store, "two"), lambda: store.grant(sys.argv[2], 1, ["cpu:0"])):
    try:
        call()
    except JobError as error:
        print(error)
"""
    try:
        told, _ = python(code, home.root, job.uid, stdout=subprocess.PIPE).communicate(timeout=60)
    finally:
        home.root.chmod(0o755)
    lines = told.splitlines()
    assert lines[0] == "['one']" and len(lines) == 3
    assert all("jobs.db cannot be used: attempt to write a readonly database" in line for line in lines[1:])
    assert home.jobs_db.read_bytes() == before


# -- many at once

CLAIMER = """
import sys
from backend.jobs.store import JobStore
from backend.paths import Home
store = JobStore(Home.at(sys.argv[1]))
while True:
    with store._open() as db:
        head = db.query("SELECT uid FROM jobs WHERE state = 'queued' ORDER BY priority DESC, uid LIMIT 1")
    if not head:
        break
    if store.grant(head[0]["uid"], 1, []):
        print(head[0]["uid"], flush=True)
"""


def test_eight_processes_start_a_thousand_jobs_once_each_in_order(home):
    store, jobs = JobStore(home), 1000
    first = make(store, "j0")
    row = vars(first)
    with store._write() as db:  # a thousand syncs for making them would prove nothing
        for number in range(1, jobs):
            uid = f"{int(first.uid[:12], 16) + number:012x}{number:010x}"
            more = {"uid": uid, "job_id": f"j{number}", "folder": f"f{number}", "priority": number % 3}
            db.insert("jobs", {**row, "progress": "{}", "stalled": 0, **more})
            at = first.created_at
            db.insert("job_events", {"uid": uid, "attempt": 1, "to_state": "queued", "actor": "user", "at": at})
    claimers = [python(CLAIMER, home.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(8)]
    outputs = [claimer.communicate(timeout=400) for claimer in claimers]
    assert [errors for _, errors in outputs] == [""] * 8  # no busy database, nor any other error
    claimed = [uid for told, _ in outputs for uid in told.split()]
    assert len(claimed) == jobs and len(set(claimed)) == jobs
    with store._open() as db:
        order = [r["uid"] for r in db.query("SELECT uid FROM job_events WHERE to_state = 'starting' ORDER BY id")]
    ranked = sorted(store.summaries(limit=jobs), key=lambda job: (-job.priority, job.uid))
    assert order == [job.uid for job in ranked]
    assert store.check() == []


def lock_for(home, seconds):
    """Another program that holds the database for so long; returns when it does."""
    code = (
        "import sqlite3, sys, time; db = sqlite3.connect(sys.argv[1]); db.execute('BEGIN EXCLUSIVE'); "
        "print('held', flush=True); time.sleep(float(sys.argv[2]))"
    )
    holder = python(code, home.jobs_db, seconds, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_writer_that_holds_the_database_for_long_ends_nobody(home):
    """Everybody waits for it, each in a thread of its own; the store waits for more than twenty seconds."""
    assert database.BUSY_TIMEOUT_S > 20
    store, hold = JobStore(home), 7.0
    jobs = [make(store, f"j{number}") for number in range(3)]
    for number, job in enumerate(jobs):
        start(store, job, f"cpu:{number}")
    calls = [
        lambda: store.beat(jobs[0].uid, 1),
        lambda: store.update(jobs[1].uid, 1, progress={"stage": "quantize"}),
        lambda: store.move(jobs[2].uid, "succeeded", actor="runner", attempt=1),
        lambda: len(store.jobs()) >= 3,
        lambda: bool(make(store, "new")),
    ]
    holder = lock_for(home, hold)
    began, answers = time.monotonic(), []
    threads = [threading.Thread(target=lambda call=call: answers.append(call())) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [True] * len(calls) and time.monotonic() - began > hold / 2
    assert holder.wait(30) == 0
    assert states(store) == {"j0": "running", "j1": "running", "j2": "succeeded", "new": "queued"}


def test_a_database_that_is_busy_for_too_long_says_so(home):
    store = JobStore(home)
    job = make(store)
    holder = lock_for(home, 600)
    try:
        with database.at_most(0.3), pytest.raises(StoreBusyError, match="is busy: another program has locked it"):
            store.beat(job.uid, 1)
        with database.at_most(0.3), pytest.raises(StoreBusyError):
            JobStore(home).jobs()
    finally:
        holder.kill()
        holder.wait()
    assert store.grant(job.uid, 1, ["cpu:0"])


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
    assert applied == [("create_jobs",), ("schedule_jobs",)]
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
