"""The scheduler and runners that die, stop or never come (faults 1, 5, 14); clocks that jump (fault 13)."""

import json
import os
import subprocess
import sys
import time
from datetime import timedelta

import psutil
import pytest

from backend.jobs import control, launch, scheduler
from backend.jobs import store as store_module
from backend.jobs.scheduler import Scheduler
from backend.jobs.store import JobStore
from backend.process import JOB_VARIABLE, hold_lock, process_facts
from tests.faults import standin
from tests.faults.ticks import Clock, died, held, played, scheduler_of, until
from tests.jobs.stored import make, start

# -- runners that die


def test_a_dead_runner_means_another_attempt_until_there_are_too_many(home):
    store = JobStore(home)
    job = make(store, MAX_ATTEMPTS=2)
    ticker, launched = scheduler_of(home)
    died(home, store, job)
    ticker.tick()
    again = store.get(job.uid)
    assert (again.state, again.attempt) == ("starting", 2) and launched == [(job.uid, 2)]
    assert held(store) == {"cpu:0": "one"} and store.leases()[0].attempt == 2
    steps = [(e["to_state"], e["attempt"]) for e in store.history(job.uid)]
    assert steps[-3:] == [("lost", 1), ("queued", 2), ("starting", 2)]
    assert "attempt 2 of 2" in store.history(job.uid)[-2]["reason"]
    store.move(job.uid, "running", actor="runner", attempt=2)
    ticker.tick()
    ended = store.get(job.uid)
    assert (ended.state, ended.outcome) == ("failed", "runner_died") and store.leases() == []
    assert "died 2 times" in ended.reason and "the runner process died" in ended.reason
    store.resume(job.uid, actor="user", attempt=2)  # a user's resume gives it as many attempts again
    for attempt in (3, 4):
        ticker.tick()
        assert store.get(job.uid).attempt == attempt and launched[-1] == (job.uid, attempt)
        store.move(job.uid, "running", actor="runner", attempt=attempt)
    assert store.check() == []


def test_a_restarted_machine_loses_all_active_jobs_at_once(home):
    """The boot id is made up; processes and locks of before are really not there."""
    store = JobStore(home)
    (home.root / "quantdeck.toml").write_text("[jobs]\ncpu_slots = 3\n")
    one, two, three = make(store, "one"), make(store, "two", MAX_ATTEMPTS=1), make(store, "three")
    for number, job in enumerate((one, two, three)):
        start(store, job, f"cpu:{number}")
        facts = {"pid": os.getpid(), "started": 1, "boot_id": "before", "attempt": 1}
        home.run_dir(job.uid).mkdir(parents=True)
        (home.run_dir(job.uid) / "runner.json").write_text(json.dumps(facts))
    store.move(three.uid, "cancelling", actor="user", attempt=1)
    ticker, launched = scheduler_of(home, boot=lambda: "after")
    ticker.tick()
    assert launched == [(one.uid, 2)]
    lost = next(e for e in store.history(one.uid) if e["to_state"] == "lost")
    assert "the machine was restarted" in lost["reason"]
    failed = store.get(two.uid)
    assert (failed.state, failed.outcome) == ("failed", "machine_restarted")
    assert store.get(three.uid).state == "cancelled"
    assert held(store) == {"cpu:0": "one"} and store.check() == []


def test_an_innocent_process_that_has_the_pid_now_is_never_signalled(home):
    """Its start time differs; so does its environment. The job's own leftover is ended."""
    store = JobStore(home)
    job = make(store)
    code = "import time; time.sleep(300)"
    innocent = subprocess.Popen([sys.executable, "-c", code])
    leftover = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, JOB_VARIABLE: f"{job.uid}:1"}, start_new_session=True
    )
    try:
        until(lambda: psutil.Process(innocent.pid).cmdline() and psutil.Process(leftover.pid).environ())
        facts = process_facts(innocent.pid)
        died(home, store, job, pid=innocent.pid, started=facts["started"] - 5)
        ticker, launched = scheduler_of(home)
        ticker.tick()
        assert launched == [(job.uid, 2)]
        leftover.wait(30)
        assert not psutil.pid_exists(leftover.pid)
        assert innocent.poll() is None and psutil.Process(innocent.pid).status() != psutil.STATUS_STOPPED
    finally:
        for process in (innocent, leftover):
            process.kill()
            process.wait()


def test_resources_stay_with_a_job_whose_processes_do_not_end(home, monkeypatch):
    store = JobStore(home)
    job = make(store)
    died(home, store, job)
    ticker, launched = scheduler_of(home)
    monkeypatch.setattr(scheduler, "end_leftovers", lambda uid: [4711])  # as one that waits for a dead disk
    ticker.tick()
    assert store.get(job.uid).state == "running" and held(store) == {"cpu:0": "one"} and launched == []
    monkeypatch.setattr(scheduler, "end_leftovers", lambda uid: [])
    ticker.tick()
    assert launched == [(job.uid, 2)]


def test_a_runner_that_never_comes_is_given_up_after_a_while(home):
    store, clock = JobStore(home), Clock()
    job = make(store, MAX_ATTEMPTS=1)
    ticker, launched = scheduler_of(home, clock=clock)
    ticker.tick()
    clock.at += scheduler.LAUNCH_GRACE_S - 1
    ticker.tick()
    assert store.get(job.uid).state == "starting"
    clock.at += 2
    ticker.tick()
    ended = store.get(job.uid)
    assert ended.state == "failed" and "did not start" in ended.reason and launched == [(job.uid, 1)]


def test_a_resumed_job_waits_for_the_end_of_its_last_process(home):
    store = JobStore(home)
    job = make(store)
    start(store, job, "cpu:0")
    ticker, launched = scheduler_of(home)
    with hold_lock(home.run_dir(job.uid) / "runner.lock"):
        store.move(job.uid, "failed", actor="runner", attempt=1)
        store.resume(job.uid, actor="user", attempt=1)
        ticker.tick()
        assert launched == [] and "has not ended yet" in store.get(job.uid).reason
    ticker.tick()
    assert launched == [(job.uid, 2)]


def test_a_runner_that_fails_at_once_is_not_waited_for(home):
    store = JobStore(home)
    job = make(store, MAX_ATTEMPTS=1)
    ticker = Scheduler(home, launch=lambda *_: subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]))

    def ended():
        ticker.tick()
        return store.get(job.uid).state == "failed"

    until(ended, scheduler.LAUNCH_GRACE_S - 2)


def test_a_cancelled_job_without_a_runner_ends_whenever_it_is_cancelled(home, monkeypatch):
    monkeypatch.setattr(launch, "ensure_scheduler", lambda home: True)
    store = JobStore(home)
    ticker, launched = scheduler_of(home)
    job = make(store)
    ticker.tick()
    assert control.cancel(home, job.uid).state == "cancelling"
    assert control.cancel(home, job.uid).state == "cancelling"
    ticker.tick()
    assert store.get(job.uid).state == "cancelled" and store.leases() == []
    lost = make(store, "lost")
    start(store, lost, "cpu:0")
    store.move(lost.uid, "lost", actor="scheduler", attempt=1)
    assert control.cancel(home, lost.uid).state == "cancelled"
    ticker.tick()
    assert store.get(lost.uid).state == "cancelled" and launched == [(job.uid, 1)]


# -- runners that are silent, clocks that jump


def test_a_silent_runner_is_marked_but_left_alone(home):
    store, clock = JobStore(home), Clock()
    job = make(store)
    start(store, job, "cpu:0")
    ticker, launched = scheduler_of(home, clock=clock)
    with hold_lock(home.run_dir(job.uid) / "runner.lock"):
        for _ in range(13):
            assert not store.get(job.uid).stalled
            ticker.tick()
            clock.at += 5
        ticker.tick()
        assert store.get(job.uid).stalled and store.get(job.uid).state == "running"
        assert store.beat(job.uid, 1)
        ticker.tick()
        assert not store.get(job.uid).stalled
        clock.at += 3600  # the scheduler itself was stopped for an hour: that says nothing about the runner
        ticker.tick()
        assert not store.get(job.uid).stalled
    assert launched == [] and held(store) == {"cpu:0": "one"}


@pytest.mark.parametrize("jump", [timedelta(days=1), timedelta(days=-1)])
def test_a_jump_of_the_clock_changes_no_decision_and_no_duration_is_negative(home, monkeypatch, jump):
    store, clock = JobStore(home), Clock()
    job, next_one = make(store), make(store, "next")
    start(store, job, "cpu:0")
    ticker, launched = scheduler_of(home, clock=clock)
    real_now, real_ns = store_module.now, time.time_ns
    with hold_lock(home.run_dir(job.uid) / "runner.lock"):
        ticker.tick()
        at = (store_module.datetime.fromisoformat(real_now()) + jump).isoformat(timespec="milliseconds")
        monkeypatch.setattr(store_module, "now", lambda: at)
        monkeypatch.setattr(store_module.time, "time_ns", lambda: real_ns() + int(jump.total_seconds()) * 10**9)
        before = store.leases()
        for _ in range(3):
            clock.at += 5
            ticker.tick()
        assert store.leases() == before and not store.get(job.uid).stalled and launched == []
        store.move(job.uid, "succeeded", actor="runner", attempt=1)
    ticker.tick()
    assert launched == [(next_one.uid, 1)]
    done = store.get(job.uid)
    assert done.created_at <= done.started_at <= done.finished_at
    times = [event["at"] for event in store.history(job.uid)]
    assert times == sorted(times) and store.check() == []


def test_a_stopped_runner_is_not_started_twice_and_its_late_writes_are_refused(home, monkeypatch):
    played(home, seconds=600.0)
    monkeypatch.setattr(launch, "RUNNER", standin.MODULE)
    store = JobStore(home)
    job = make(store)
    ticker = Scheduler(home, stalled_s=1.0)
    starts = home.root / "starts.txt"

    def tick_until(condition):
        def ticked():
            ticker.tick()
            return condition()

        until(ticked)

    tick_until(lambda: standin.lines(starts))
    runner = psutil.Process(int(standin.lines(starts)[0][2]))
    try:
        runner.suspend()
        tick_until(lambda: store.get(job.uid).stalled)
        runner.resume()
        tick_until(lambda: not store.get(job.uid).stalled)
        runner.suspend()
        # Somebody decides that this attempt is over, e.g. an operator: from here on it has an old fence.
        assert store.move(job.uid, "lost", actor="operator", attempt=1)
        for _ in range(3):
            ticker.tick()
        assert store.get(job.uid).state == "lost"  # its lock is held: nothing is started beside it
        assert store.requeue(job.uid, 1, actor="operator", reason="test")
        runner.resume()
        until(lambda: standin.lines(home.root / "ends.txt"))
        assert standin.lines(home.root / "ends.txt") == [[job.uid, "1", "False", "False"]]
        assert store.get(job.uid).result is None and store.get(job.uid).attempt == 2
        assert len(standin.lines(starts)) == 1
    finally:
        runner.kill()
