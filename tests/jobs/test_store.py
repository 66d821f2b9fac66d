"""The store on a real SQLite file: guarded moves, resources for one job at a time, no lost or double starts."""

import json
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from backend.errors import ConfigErrors, JobError
from backend.jobs import store as store_module
from backend.jobs.states import ACTIVE, FINAL, MOVES
from backend.jobs.store import JobStore
from backend.paths import PROJECT
from backend.schema import parse_yaml
from tests.conftest import demo_text
from tests.jobs.stored import make, start


def test_a_new_job_is_queued_and_keeps_its_file(home):
    store = JobStore(home)
    job = make(store)
    again = store.get(job.uid)
    assert again == job
    assert again.state == "queued" and again.config_yaml == demo_text("one")
    assert again.folder == "user_data/jobs/Kompress/one"
    assert (again.priority, again.max_attempts, again.time_limit_s) == (0, 3, None)
    assert store.get("one").uid == job.uid
    assert [e["to_state"] for e in store.history(job.uid)] == ["queued"]


def test_priority_attempts_and_time_limit_come_from_the_file(home):
    job = make(JobStore(home), PRIORITY=-5, MAX_ATTEMPTS=1, TIME_LIMIT_HOURS=0.5)
    again = JobStore(home).get(job.uid)
    assert (again.priority, again.max_attempts, again.time_limit_s) == (-5, 1, 1800.0)


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
    assert not store.move(job.uid, "running", actor="runner", attempt=1)
    assert start(store, job, "cpu:0")
    assert not store.grant(job.uid, 1, ["cpu:1"])
    assert store.move(job.uid, "cancelling", actor="user", attempt=1)
    assert not store.move(job.uid, "succeeded", actor="runner", attempt=1)
    assert not store.move(job.uid, "succeeded", actor="runner", attempt=1, only_from="cancelling")
    assert store.move(job.uid, "cancelled", actor="runner", attempt=1, reason="asked", outcome="cancelled")
    assert not store.move(job.uid, "failed", actor="runner", attempt=1)
    final = store.get(job.uid)
    assert (final.state, final.reason, final.outcome) == ("cancelled", "asked", "cancelled") and final.finished_at
    states = ["queued", "starting", "running", "cancelling", "cancelled"]
    assert [e["to_state"] for e in store.history(job.uid)] == states


def test_every_move_of_the_table_works_and_no_other(home):
    """Each pair of states is tried on a row set to the first of them."""
    store = JobStore(home)
    job = make(store)
    for source in (*ACTIVE, *FINAL):
        for target in (*ACTIVE, *FINAL):
            if target in ("queued", "starting"):
                continue
            with sqlite3.connect(home.jobs_db) as db:
                db.execute("UPDATE jobs SET state = ?", [source])
            moved = store.move(job.uid, target, actor="runner", attempt=1)
            assert moved == (target in MOVES[source]), (source, target)
            assert store.get(job.uid).state == (target if moved else source)


def test_an_older_attempt_changes_nothing(home):
    store = JobStore(home)
    job = make(store)
    start(store, job)
    assert not store.move(job.uid, "succeeded", actor="runner", attempt=0)
    assert not store.update(job.uid, 0, progress={"stage": "quantize"}) and not store.beat(job.uid, 0)
    assert store.get(job.uid).progress == {} and store.get(job.uid).heartbeat == 0
    assert store.update(job.uid, 1, progress={"stage": "quantize", "step": 1}) and store.beat(job.uid, 1)
    assert store.get(job.uid).progress["step"] == 1 and store.get(job.uid).heartbeat == 1


def test_a_finished_job_is_no_longer_updated(home):
    store = JobStore(home)
    job = make(store)
    start(store, job)
    store.move(job.uid, "succeeded", actor="runner", attempt=1)
    assert not store.update(job.uid, 1, artefact="/elsewhere") and not store.beat(job.uid, 1)
    assert store.get(job.uid).artefact is None


def test_resources_are_granted_all_or_none_and_given_back_with_the_end(home):
    store = JobStore(home)
    first, second = make(store, "a", "cuda:0"), make(store, "b", "cuda:0,1")
    assert store.grant(first.uid, 1, ["gpu:GPU-0"])
    assert store.get(first.uid).state == "starting"
    assert not store.grant(second.uid, 1, ["gpu:GPU-1", "gpu:GPU-0"])
    assert [(lease.resource, lease.uid, lease.attempt) for lease in store.leases()] == [("gpu:GPU-0", first.uid, 1)]
    assert store.get(second.uid).state == "queued" and len(store.history(second.uid)) == 1
    store.move(first.uid, "running", actor="runner", attempt=1)
    assert store.check() == []
    store.move(first.uid, "succeeded", actor="runner", attempt=1)
    assert store.leases() == []
    assert store.grant(second.uid, 1, ["gpu:GPU-1", "gpu:GPU-0"])
    assert len(store.leases()) == 2
    store.move(second.uid, "lost", actor="scheduler", attempt=1)
    assert store.leases() == [] and store.check() == []


def test_why_a_job_waits_is_stored_while_it_waits(home):
    store = JobStore(home)
    job = make(store)
    store.wait(job.uid, 1, "waiting: 1 of 1 CPU slots are busy")
    store.wait(job.uid, 0, "of an older attempt")
    assert store.get(job.uid).reason == "waiting: 1 of 1 CPU slots are busy"
    store.grant(job.uid, 1, [])
    store.wait(job.uid, 1, "too late")
    assert store.get(job.uid).reason is None


def test_many_starters_start_each_job_once(home):
    store = JobStore(home)
    jobs = [make(store, f"j{i}") for i in range(10)]
    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(lambda job: JobStore(home).grant(job.uid, 1, [f"cpu:{job.job_id}"]), jobs * 4))
    assert sum(wins) == 10
    starts = [e for job in jobs for e in store.history(job.uid) if e["to_state"] == "starting"]
    assert len(starts) == 10


def test_two_processes_may_create_the_store_at_once(home):
    code = (
        "import sys; from backend.jobs.store import JobStore; from backend.paths import Home;"
        "JobStore(Home.at(sys.argv[1]))"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(home.root)], cwd=PROJECT) for _ in range(4)]
    assert [p.wait(60) for p in started] == [0, 0, 0, 0]
    assert JobStore(home).jobs() == [] and JobStore(home).check() == []


def test_the_database_reads_with_plain_sql_and_guards_states_and_history(home):
    store = JobStore(home)
    job = make(store)
    with sqlite3.connect(home.jobs_db) as db:
        row = db.execute("SELECT job_id, state, progress FROM jobs WHERE uid = ?", [job.uid]).fetchone()
        assert row[:2] == ("one", "queued") and json.loads(row[2]) == {}
        with pytest.raises(sqlite3.IntegrityError):
            db.execute("UPDATE jobs SET state = 'dancing'")
        for change in ("DELETE FROM job_events", "UPDATE job_events SET actor = 'nobody'"):
            with pytest.raises(sqlite3.IntegrityError, match="only grows"):
                db.execute(change)


def test_a_failed_job_is_queued_again_with_the_next_attempt(home):
    store = JobStore(home)
    job = make(store)
    assert not store.resume(job.uid, actor="user", attempt=1)  # it is queued
    start(store, job)
    assert not store.resume(job.uid, actor="user", attempt=1)  # it is running
    store.beat(job.uid, 1)
    store.update(job.uid, 1, artefact="/made", progress={"stage": "quantize"})
    store.move(job.uid, "failed", actor="runner", attempt=1, reason="no luck", outcome="engine_failed")
    assert not store.resume(job.uid, actor="user", attempt=0)
    assert store.resume(job.uid, actor="user", attempt=1)
    again = store.get(job.uid)
    assert (again.state, again.attempt, again.reason, again.progress) == ("queued", 2, None, {})
    assert (again.outcome, again.heartbeat, again.stalled) == (None, 0, False)
    assert again.artefact == "/made" and again.started_at is None and again.finished_at is None
    assert not store.update(job.uid, 1, artefact="/late")  # somebody of the first attempt
    assert not store.grant(job.uid, 1, []) and start(store, job)
    assert not store.move(job.uid, "succeeded", actor="runner", attempt=1)
    assert store.get(job.uid).artefact == "/made" and store.move(job.uid, "cancelling", actor="user", attempt=2)
    assert store.move(job.uid, "cancelled", actor="runner", attempt=2)
    assert store.resume(job.uid, actor="user", attempt=2)
    last = store.history(job.uid)[-1]
    assert (last["from_state"], last["to_state"], last["attempt"]) == ("cancelled", "queued", 3)


def test_a_lost_job_is_queued_again_and_its_deaths_are_counted_until_a_user_resumes(home):
    store = JobStore(home)
    job = make(store)
    for attempt in (1, 2):
        start(store, job)
        assert not store.requeue(job.uid, attempt, actor="scheduler", reason="not lost")
        assert store.move(job.uid, "lost", actor="scheduler", attempt=attempt, outcome="runner_died")
        assert store.deaths(job.uid) == attempt
        assert not store.resume(job.uid, actor="user", attempt=attempt)
        assert store.requeue(job.uid, attempt, actor="scheduler", reason="it died")
        again = store.get(job.uid)
        assert (again.state, again.attempt, again.reason) == ("queued", attempt + 1, "it died")
    store.move(job.uid, "failed", actor="scheduler", attempt=3)
    store.resume(job.uid, actor="user", attempt=3)
    assert store.deaths(job.uid) == 0


def test_a_finished_job_is_only_queued_again_to_measure_again(home):
    store = JobStore(home)
    job = make(store)
    start(store, job)
    store.update(job.uid, 1, result={"rows": [1]}, artefact="/made")
    store.move(job.uid, "succeeded", actor="runner", attempt=1)
    assert not store.resume(job.uid, actor="user", attempt=1)
    with pytest.raises(ValueError, match="measure"):
        store.resume(job.uid, actor="user", attempt=1, redo="everything")
    assert store.resume(job.uid, actor="user", attempt=1, redo="measure")
    again = store.get(job.uid)
    assert (again.state, again.attempt, again.redo, again.artefact) == ("queued", 2, "measure", "/made")
    assert again.result == {"rows": [1]}
    start(store, job)
    store.move(job.uid, "lost", actor="scheduler", attempt=2)
    store.requeue(job.uid, 2, actor="scheduler", reason="died")
    assert store.get(job.uid).redo == "measure"  # the wish outlives a dead runner
    store.move(job.uid, "cancelled", actor="user", attempt=3)
    store.resume(job.uid, actor="user", attempt=3)
    assert store.get(job.uid).redo == ""


def test_a_job_cannot_be_queued_or_started_by_move(home):
    store = JobStore(home)
    job = make(store)
    store.move(job.uid, "failed", actor="runner", attempt=1)
    for state in ("queued", "starting"):
        with pytest.raises(ValueError, match="resume"):
            store.move(job.uid, state, actor="user", attempt=1)


def test_lists_come_in_pages_and_can_be_searched(home):
    store = JobStore(home)
    made = [make(store, f"run_{i}" if i % 2 else f"other-{i}") for i in range(7)]
    store.move(made[0].uid, "cancelled", actor="user", attempt=1)
    newest_first = [job.job_id for job in reversed(made)]
    assert [job.job_id for job in store.jobs(limit=3)] == newest_first[:3]
    assert [job.job_id for job in store.summaries(limit=3, offset=3)] == newest_first[3:6]
    assert [job.job_id for job in store.jobs(search="RUN_")] == ["run_5", "run_3", "run_1"]
    assert store.jobs(search="%") == [] and store.jobs(search="run_%") == []
    assert store.jobs(search=made[2].uid) == [made[2]] and len(store.jobs(search="quantdeck/demo")) == 7
    assert store.count() == 7 and store.count(states=("queued",)) == 6 and store.count(search="run_") == 3
    assert store.counts() == {"queued": 6, "cancelled": 1}
    light = store.summaries(search="run_5")[0]
    assert (light.config_yaml, light.result) == ("", None) and light.uid == made[5].uid


def test_ids_sort_by_creation_even_if_the_clock_is_set_back(home, monkeypatch):
    store = JobStore(home)
    first = make(store, "a")
    behind = store_module.time.time_ns() - 86_400 * 10**9
    monkeypatch.setattr(store_module.time, "time_ns", lambda: behind)
    later = [make(store, f"b{i}") for i in range(20)]
    assert [first.uid, *(job.uid for job in later)] == sorted([first.uid, *(job.uid for job in later)])


def test_a_backup_is_whole_and_overwrites_nothing(home, tmp_path):
    store = JobStore(home)
    job = make(store)
    target = tmp_path / "copy.db"
    store.backup(target)
    with sqlite3.connect(target) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("SELECT uid FROM jobs").fetchall() == [(job.uid,)]
    before = target.read_bytes()
    with pytest.raises(JobError, match="exists"):
        store.backup(target)
    assert target.read_bytes() == before


def test_check_finds_what_must_not_be(home):
    store = JobStore(home)
    job, other = make(store), make(store, "two")
    start(store, job, "cpu:0")
    assert store.check() == []
    with sqlite3.connect(home.jobs_db) as db:
        db.execute("UPDATE jobs SET attempt = 2 WHERE uid = ?", [job.uid])
        db.execute("UPDATE jobs SET state = 'succeeded' WHERE uid = ?", [other.uid])
        db.execute("INSERT INTO leases VALUES ('gpu:x', ?, 1, '')", [other.uid])
        db.execute("INSERT INTO leases VALUES ('gpu:y', 'nobody', 1, '')")
    problems = "\n".join(store.check())
    for words in ("attempt 1 of job one", "gpu:x is leased to job two", "without a time", "history", "names no job"):
        assert words in problems


def test_instances_are_noted_and_the_dead_removed(home):
    store = JobStore(home)
    code = (
        "import sys; from backend.jobs.store import JobStore; from backend.paths import Home;"
        "JobStore(Home.at(sys.argv[1])).register('scheduler')"
    )
    subprocess.run([sys.executable, "-c", code, str(home.root)], cwd=PROJECT, check=True, timeout=60)
    (ended,) = store.instances()
    number = store.register("dashboard")
    (here,) = store.instances()
    assert here.id == number and here.kind == "dashboard" and here.pid != ended.pid
    store.unregister(number)
    assert store.instances() == []
