"""Jobs without disk, memory, time or a store that answers (faults 8, 12, 15): each ends with its reason."""

import contextlib
import os
import sqlite3
import time
from pathlib import Path

import pytest

from backend.jobs.outcomes import advice
from backend.jobs.publish import check_manifest
from tests.faults.troubles import fill, small_disk


@pytest.fixture
def small_home(home, monkeypatch, request):
    """`jobs` in a home that has a small disk of its own."""
    with small_disk(home.root, "8m"):
        yield request.getfixturevalue("jobs")


@pytest.mark.parametrize("step", [1, 4])
def test_a_full_disk_fails_the_job_with_that_outcome_and_resume_goes_on(small_home, step):
    jobs = small_home
    job = jobs.create({"name": "w4", "settings": {"sleep_s": 1.0}})
    runner = jobs.launch(job)
    jobs.at_layer(job, step)  # 1: the checkpoint of the next layer does not fit; 4: the model's last file does not
    fill(jobs.home.root / "filler")
    assert runner.wait(60) == 0
    ended = jobs.get(job)
    assert (ended.state, ended.outcome) == ("failed", "disk_full"), ended.reason
    assert "no space left" in ended.reason and "resume the job" in ended.reason
    assert jobs.store.check() == [] and jobs.store.count() == 1
    (jobs.home.root / "filler").unlink()
    done = jobs.resume(job)
    assert done.state == "succeeded", done.reason
    assert check_manifest(jobs.folder(job)) == []
    jobs.is_over(job)


def test_an_engine_that_fills_the_disk_itself_is_told_from_one_that_crashes(small_home):
    jobs = small_home
    job = jobs.create({"name": "w4", "settings": {"fill_at": 2}})
    assert jobs.launch(job).wait(60) == 0
    ended = jobs.get(job)
    assert (ended.state, ended.outcome) == ("failed", "disk_full"), ended.reason
    for filler in jobs.home.root.rglob("filler"):
        filler.unlink()
    done = jobs.resume(job)
    assert done.state == "succeeded" and jobs.calls(job) == [0, 2], done.reason


def test_a_job_does_not_begin_where_not_even_its_end_could_be_stored(small_home):
    jobs = small_home
    job = jobs.create({"name": "w4"})
    fill(jobs.home.root / "filler", leave=400_000)
    assert jobs.launch(job).wait(60) == 0
    ended = jobs.get(job)
    assert (ended.state, ended.outcome) == ("failed", "disk_full"), ended.reason
    assert not (jobs.home.run_dir(job.uid) / "calls.json").exists()
    (jobs.home.root / "filler").unlink()
    assert jobs.resume(job).state == "succeeded"


def test_a_full_disk_under_the_log_alone_stops_nothing(jobs):
    logs = jobs.home.user_data / "logs"
    with small_disk(logs, "256k"):
        settings = {"say": "x" * 1000, "times": 400}
        job = jobs.create({"name": "w4", "settings": settings})
        assert jobs.launch(job).wait(60) == 0
        done = jobs.get(job)
        assert done.state == "succeeded", done.reason
        assert sum(p.stat().st_size for p in logs.rglob("*") if p.is_file()) <= 256 * 1024
    assert check_manifest(jobs.folder(job)) == []


def test_a_low_water_mark_stops_a_job_before_the_disk_is_full(jobs):
    (jobs.home.root / "quantdeck.toml").write_text(f"[jobs]\nmin_free_bytes = {1 << 60}\ncancel_grace_s = [1.0, 1.0]\n")
    job = jobs.create({"name": "w4", "settings": {"sleep_at": 1}})
    assert jobs.launch(job).wait(60) == 0
    ended = jobs.get(job)
    assert (ended.state, ended.outcome) == ("failed", "disk_full") and "min_free_bytes" in ended.reason
    jobs.examined = False  # the doctor is right to complain about the disk


def test_an_engine_without_memory_fails_with_that_outcome_and_advice(jobs):
    job = jobs.create({"name": "w4", "settings": {"allocate_at": 2, "limit_bytes": 1 << 30}})
    assert jobs.launch(job).wait(60) == 0
    ended = jobs.get(job)
    assert (ended.state, ended.outcome) == ("failed", "out_of_memory"), ended.reason
    assert "use a smaller model" in advice(ended.outcome)
    assert jobs.resume(job).state == "succeeded" and jobs.calls(job) == [0, 2]


def test_engines_are_the_first_to_go_when_memory_runs_out(jobs):
    job = jobs.create({"name": "w4", "settings": {"sleep_at": 1}})
    runner = jobs.launch(job)
    jobs.at_layer(job, 1)
    assert oom_score_adj(jobs.engine(job).pid) == 500
    assert oom_score_adj(runner.pid) == oom_score_adj(os.getpid())


def oom_score_adj(pid):
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def test_a_job_that_runs_too_long_is_stopped_and_has_the_whole_time_again(jobs):
    job = jobs.create({"name": "w4", "settings": {"sleep_at": 3}}, changes={"TIME_LIMIT_HOURS": 1})
    assert job.time_limit_s == 3600
    with contextlib.closing(sqlite3.connect(jobs.home.jobs_db)) as db, db:
        db.execute("UPDATE jobs SET time_limit_s = 3")
    began = time.monotonic()
    assert jobs.launch(job).wait(60) == 0
    ended = jobs.get(job)
    assert (ended.state, ended.outcome) == ("failed", "time_limit") and time.monotonic() - began >= 3
    assert "time limit of 3 seconds" in ended.reason and "resume" in ended.reason
    jobs.is_over(job)
    assert jobs.resume(job).state == "succeeded" and jobs.calls(job) == [0, 3]


def test_a_store_that_is_locked_for_a_while_stops_no_job(jobs):
    job = jobs.create({"name": "w4", "settings": {"sleep_s": 0.5}})
    runner = jobs.launch(job)
    jobs.at_layer(job, 1)
    with contextlib.closing(sqlite3.connect(jobs.home.jobs_db, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        time.sleep(5)
        assert runner.poll() is None
        other.execute("ROLLBACK")
    assert runner.wait(60) == 0
    assert jobs.get(job).state == "succeeded"
