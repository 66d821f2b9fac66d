"""Schedulers that die or meet a silent store (fault 10): one works at a time, no job is stranded."""

import signal
import subprocess
import sys

from backend.jobs import launch, scheduler
from backend.jobs.store import JobStore, StoreBusyError
from backend.paths import PROJECT
from backend.process import JOB_VARIABLE, lock_is_held
from tests.faults import standin
from tests.faults.ticks import played, until
from tests.jobs.stored import make, states


def serve(home):
    return subprocess.Popen([sys.executable, "-m", standin.MODULE, str(home.root)], cwd=PROJECT)


def test_two_schedulers_start_each_of_many_jobs_once_and_a_killed_one_is_replaced(home, monkeypatch):
    jobs, slots = 200, 6
    played(home, seconds=0.0, idle_s=3.0)
    (home.root / "quantdeck.toml").write_text(f"[jobs]\ncpu_slots = {slots}\n")
    monkeypatch.setattr(launch, "SCHEDULER", standin.MODULE)
    store = JobStore(home)
    made = [make(store, f"j{i}") for i in range(jobs)]
    processes = [serve(home), serve(home)]
    try:
        until(lambda: store.count(("succeeded",)) >= 10, 120)
        (works,) = store.instances()
        (leader,) = [process for process in processes if process.pid == works.pid]
        leader.send_signal(signal.SIGKILL)
        leader.wait(30)
        until(lambda: launch.watch(home) or lock_is_held(launch.scheduler_lock(home)), 30)
        until(lambda: store.count(("succeeded",)) == jobs, 300)
        starts = [(uid, attempt) for uid, attempt, _ in standin.lines(home.root / "starts.txt")]
        assert sorted(starts) == sorted((job.uid, "1") for job in made)
        grants = [e for job in made for e in store.history(job.uid) if e["to_state"] == "starting"]
        assert len(grants) == jobs and store.leases() == [] and store.check() == []
        until(lambda: not lock_is_held(launch.scheduler_lock(home)), 30)  # it ends when there is nothing to do
        until(lambda: store.instances() == [], 30)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_job_that_comes_just_when_the_scheduler_leaves_is_not_stranded(home, monkeypatch):
    """It comes after the last look and before the lock is free, so nobody else starts a scheduler for it."""
    played(home, seconds=0.0)
    monkeypatch.setattr(launch, "RUNNER", standin.MODULE)
    monkeypatch.setattr(scheduler, "IDLE_S", 0.3)
    monkeypatch.setattr(scheduler, "TICK_S", 0.1)
    monkeypatch.setattr(sys, "argv", ["scheduler", str(home.root)])
    came, real = [], JobStore.unregister

    def leave(store, number):
        real(store, number)
        if not came:
            came.append(make(store))
            assert not launch.ensure_scheduler(home) and not launch.watch(home)

    monkeypatch.setattr(JobStore, "unregister", leave)
    scheduler.main()
    assert states(JobStore(home)) == {"one": "succeeded"}
    assert not lock_is_held(launch.scheduler_lock(home))


def test_a_scheduler_outlives_a_store_that_does_not_answer(home, monkeypatch):
    played(home, seconds=0.0)
    monkeypatch.setattr(launch, "RUNNER", standin.MODULE)
    monkeypatch.setattr(scheduler, "IDLE_S", 1.0)
    monkeypatch.setattr(scheduler, "TICK_S", 0.1)
    store, failures = JobStore(home), []
    make(store)
    real = JobStore.summaries

    def sometimes(self, **more):
        if len(failures) < 3:
            failures.append(1)
            raise StoreBusyError("busy") if len(failures) < 3 else ValueError("a defect")
        return real(self, **more)

    monkeypatch.setattr(JobStore, "summaries", sometimes)
    assert scheduler.serve(home)
    assert len(failures) == 3 and store.get("one").state == "succeeded"


def test_what_a_runner_starts_at_its_end_is_not_taken_for_a_part_of_its_job(home, monkeypatch):
    played(home, seconds=0.0, idle_s=0.1)
    monkeypatch.setattr(launch, "SCHEDULER", standin.MODULE)
    monkeypatch.setenv(JOB_VARIABLE, "abc:1")
    seen = []
    real = subprocess.Popen
    monkeypatch.setattr(launch.subprocess, "Popen", lambda *a, **k: seen.append(k["env"]) or real(*a, **k))
    assert launch.ensure_scheduler(home)
    assert JOB_VARIABLE not in seen[0]
    assert not launch.watch(home)  # there is nothing to do
