"""The store on a real SQLite file: guarded moves, one job at a time per device, no lost or double starts."""

import json
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from backend.errors import ConfigErrors, JobError
from backend.jobs.store import JobStore
from backend.paths import PROJECT
from backend.schema import parse_yaml
from tests.conftest import demo_text


def make(store, job_id="one", device="cpu"):
    text = demo_text(job_id)
    return store.create(text, parse_yaml(text).config, device=device)


def test_a_new_job_is_queued_and_keeps_its_file(home):
    store = JobStore(home)
    job = make(store)
    again = store.get(job.uid)
    assert again.state == "queued" and again.config_yaml == demo_text("one")
    assert again.folder == "user_data/jobs/Kompress/one"
    assert store.get("one").uid == job.uid
    assert [e["to_state"] for e in store.history(job.uid)] == ["queued"]


def test_a_taken_name_is_refused_and_a_free_one_is_proposed(home):
    store = JobStore(home)
    make(store)
    with pytest.raises(ConfigErrors, match="one-2") as caught:
        make(store)
    assert caught.value.errors[0].key == "JOB_ID"
    assert len(store.jobs()) == 1
    assert store.free_name(parse_yaml(demo_text("one")).config) == "one-2"
    assert store.free_name(parse_yaml(demo_text("two")).config) == "two"


def test_a_folder_that_exists_without_a_job_is_not_overwritten(home):
    store = JobStore(home)
    (home.user_data / "jobs" / "Kompress" / "one").mkdir(parents=True)
    with pytest.raises(ConfigErrors, match="folder"):
        make(store)


def test_only_legal_moves_change_the_state(home):
    store = JobStore(home)
    job = make(store)
    assert not store.move(job.uid, "succeeded", actor="runner", attempt=1)
    assert store.claim(job.uid, 1)
    assert store.move(job.uid, "cancelling", actor="user", attempt=1)
    assert not store.move(job.uid, "succeeded", actor="runner", attempt=1)
    assert store.move(job.uid, "cancelled", actor="runner", attempt=1, reason="asked")
    assert not store.move(job.uid, "failed", actor="runner", attempt=1)
    final = store.get(job.uid)
    assert final.state == "cancelled" and final.reason == "asked" and final.finished_at
    assert [e["to_state"] for e in store.history(job.uid)] == ["queued", "running", "cancelling", "cancelled"]


def test_an_older_attempt_changes_nothing(home):
    store = JobStore(home)
    job = make(store)
    store.claim(job.uid, 1)
    assert not store.move(job.uid, "succeeded", actor="runner", attempt=0)
    store.update(job.uid, 0, progress={"stage": "quantize"})
    assert store.get(job.uid).progress == {}
    store.update(job.uid, 1, progress={"stage": "quantize", "step": 1})
    assert store.get(job.uid).progress["step"] == 1


def test_a_finished_job_is_no_longer_updated(home):
    store = JobStore(home)
    job = make(store)
    store.claim(job.uid, 1)
    store.move(job.uid, "succeeded", actor="runner", attempt=1)
    store.update(job.uid, 1, artefact="/elsewhere")
    assert store.get(job.uid).artefact is None


def test_jobs_of_one_device_run_one_after_the_other_in_order(home):
    store = JobStore(home)
    first, second, other = make(store, "a"), make(store, "b"), make(store, "c", device="cuda:0")
    assert not store.claim(second.uid, 1)
    assert "a" in store.get(second.uid).reason
    assert store.claim(first.uid, 1)
    assert not store.claim(second.uid, 1)
    assert "uses cpu" in store.get(second.uid).reason
    assert store.claim(other.uid, 1)
    store.move(first.uid, "succeeded", actor="runner", attempt=1)
    assert store.claim(second.uid, 1)
    assert store.get(second.uid).reason is None


def test_many_claimers_start_each_job_once(home):
    store = JobStore(home)
    jobs = [make(store, f"j{i}", device=f"cuda:{i}") for i in range(10)]
    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(lambda job: JobStore(home).claim(job.uid, 1), jobs * 4))
    assert sum(wins) == 10
    running = [e for job in jobs for e in store.history(job.uid) if e["to_state"] == "running"]
    assert len(running) == 10


def test_two_processes_may_create_the_store_at_once(home):
    code = (
        "import sys; from backend.jobs.store import JobStore; from backend.paths import Home;"
        "JobStore(Home.at(sys.argv[1]))"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(home.root)], cwd=PROJECT) for _ in range(4)]
    assert [p.wait(60) for p in started] == [0, 0, 0, 0]
    assert JobStore(home).jobs() == []


def test_the_database_reads_with_plain_sql_and_guards_its_states(home):
    store = JobStore(home)
    job = make(store)
    with sqlite3.connect(home.jobs_db) as db:
        row = db.execute("SELECT job_id, state, progress FROM jobs WHERE uid = ?", [job.uid]).fetchone()
        assert row[:2] == ("one", "queued") and json.loads(row[2]) == {}
        with pytest.raises(sqlite3.IntegrityError):
            db.execute("UPDATE jobs SET state = 'dancing'")


def test_a_database_of_a_newer_version_is_refused_untouched(home):
    JobStore(home)
    with sqlite3.connect(home.jobs_db) as db:
        db.execute(
            "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('jobs', 'of_the_future', '')"
        )
    before = home.jobs_db.read_bytes()
    with pytest.raises(JobError, match="newer"):
        JobStore(home)
    assert home.jobs_db.read_bytes() == before


def test_a_file_that_is_no_database_is_named_and_kept(home):
    home.root.mkdir(parents=True)
    home.jobs_db.write_text("not a database, " * 100)
    with pytest.raises(JobError, match="jobs.db"):
        JobStore(home)
    assert home.jobs_db.read_text().startswith("not a database")


def test_a_failed_job_is_queued_again_with_the_next_attempt(home):
    store = JobStore(home)
    job = make(store)
    assert not store.resume(job.uid, actor="user", attempt=1)  # it is queued
    store.claim(job.uid, 1)
    assert not store.resume(job.uid, actor="user", attempt=1)  # it is running
    store.update(job.uid, 1, artefact="/made", progress={"stage": "quantize"})
    store.move(job.uid, "failed", actor="runner", attempt=1, reason="no luck")
    assert not store.resume(job.uid, actor="user", attempt=0)
    assert store.resume(job.uid, actor="user", attempt=1)
    again = store.get(job.uid)
    assert (again.state, again.attempt, again.reason, again.progress) == ("queued", 2, None, {})
    assert again.artefact == "/made" and again.started_at is None and again.finished_at is None
    store.update(job.uid, 1, artefact="/late")  # somebody of the first attempt
    assert not store.claim(job.uid, 1) and store.claim(job.uid, 2)
    assert not store.move(job.uid, "succeeded", actor="runner", attempt=1)
    assert store.get(job.uid).artefact == "/made" and store.move(job.uid, "cancelling", actor="user", attempt=2)
    assert store.move(job.uid, "cancelled", actor="runner", attempt=2)
    assert store.resume(job.uid, actor="user", attempt=2)
    last = store.history(job.uid)[-1]
    assert (last["from_state"], last["to_state"], last["attempt"]) == ("cancelled", "queued", 3)


def test_a_job_cannot_be_queued_without_counting_the_attempt(home):
    store = JobStore(home)
    job = make(store)
    store.move(job.uid, "failed", actor="runner", attempt=1)
    with pytest.raises(ValueError, match="resume"):
        store.move(job.uid, "queued", actor="user", attempt=1)
