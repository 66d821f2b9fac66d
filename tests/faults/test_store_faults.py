"""The job store under damage, crowds and a busy lock (faults 9, 11, 12): real files, real processes."""

import os
import subprocess
import sys
import threading
import time

import pytest

from backend.errors import JobError
from backend.jobs import database, launch
from backend.jobs.store import JobStore, StoreBusyError
from backend.paths import PROJECT
from tests.jobs.stored import make, start, states


def python(code, *args, **more):
    """Another process with this code."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=PROJECT, text=True, **more)


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
    with store.writing() as db:  # a thousand syncs for making them would prove nothing
        for number in range(1, jobs):
            uid = f"{int(first.uid[:12], 16) + number:012x}{number:010x}"
            more = {"uid": uid, "job_id": f"j{number}", "folder": f"f{number}", "priority": number % 3}
            db.insert("jobs", {**row, "progress": "{}", "stalled": 0, "tags": "", **more})
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
