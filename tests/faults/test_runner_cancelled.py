"""Cancelling at every moment, and engines that do not want to end (faults 18, 19)."""

import contextlib
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from backend.errors import JobError
from backend.jobs import control, launch
from backend.jobs.logs.writer import LogWriter
from backend.jobs.publish import check_manifest
from backend.jobs.run import Run
from backend.jobs.runner import Runner
from backend.process import hold_lock, start_ticks
from backend.settings import Settings
from tests.faults.troubles import is_gone, leaked


def moves(jobs, job):
    return [e["to_state"] for e in jobs.store.history(job.uid)]


def test_cancel_of_a_job_that_waits_starts_or_is_lost(jobs):
    with hold_lock(launch.scheduler_lock(jobs.home)):
        queued = jobs.create({"name": "w4"}, name="queued")
        assert control.cancel(jobs.home, queued.uid).state == "cancelled"
        starting = jobs.create({"name": "w4"}, name="starting")
        assert jobs.store.grant(starting.uid, 1, ["cpu:0"])
        assert control.cancel(jobs.home, starting.uid).state == "cancelling"
        assert jobs.launch(starting).wait(60) == 0  # the runner comes after the cancel
        assert jobs.get(starting).state == "cancelled"
        lost = jobs.create({"name": "w4"}, name="lost")
        jobs.store.grant(lost.uid, 1, ["cpu:0"])
        jobs.store.move(lost.uid, "lost", actor="scheduler", attempt=1, reason="for the test")
        assert control.cancel(jobs.home, lost.uid).state == "cancelled"
        for job in (queued, starting, lost):
            assert jobs.get(job).outcome == "cancelled" and not (jobs.home.run_dir(job.uid) / "calls.json").exists()
            jobs.is_over(job)
            with pytest.raises(JobError, match="already cancelled"):
                control.cancel(jobs.home, job.uid)


def test_a_hundred_cancels_at_once_are_one(jobs):
    job = jobs.create({"name": "w4", "settings": {"sleep_at": 2, "ignore_signals": True}})
    jobs.launch(job)
    jobs.at_layer(job, 2)

    def click(_):
        with contextlib.suppress(JobError):  # it is over already
            return control.cancel(jobs.home, job.uid).state

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(click, range(100))) <= {"cancelling", "cancelled", None}
    assert jobs.until(job).state == "cancelled"
    assert moves(jobs, job) == ["queued", "starting", "running", "cancelling", "cancelled"]
    jobs.is_over(job)


def test_cancel_and_end_at_the_same_moment_leave_one_final_state(jobs, tmp_path):
    """The runner's own last step against the user's click, often enough that both orders happen."""
    seen = set()
    jobs.examined = False  # these jobs succeed without any work
    with hold_lock(launch.scheduler_lock(jobs.home)), LogWriter(tmp_path / "log", Settings().jobs) as output:
        for number in range(200):
            job = jobs.create({"name": "w4"}, name=f"race{number}")
            jobs.store.grant(job.uid, 1, ["cpu:0"])
            jobs.store.move(job.uid, "running", actor="runner", attempt=1)
            jobs.home.run_dir(job.uid).mkdir(parents=True, exist_ok=True)
            runner = Runner(jobs.home, jobs.get(job), Settings(), output)
            run = Run(jobs.home, job, runner.config, runner.run_dir, ())
            barrier = threading.Barrier(2)

            def click(uid=job.uid, barrier=barrier):
                barrier.wait()
                with contextlib.suppress(JobError):
                    control.cancel(jobs.home, uid)

            thread = threading.Thread(target=click)
            thread.start()
            barrier.wait()
            time.sleep(random.uniform(0, 0.02))
            runner._finish("succeeded", None, run)
            thread.join()
            ended = moves(jobs, job)
            assert ended[3:] in (["succeeded"], ["cancelling", "cancelled"]), ended
            assert jobs.get(job).state == ended[-1] and jobs.store.leases() == []
            seen.add(ended[-1])
    assert seen == {"succeeded", "cancelled"} and jobs.store.check() == []


def test_cancel_at_any_moment_of_a_short_job(jobs):
    for number in range(6):
        job = jobs.create({"name": "w4"}, name=f"job{number}")
        runner = jobs.launch(job)
        time.sleep(0.3 * number)
        with contextlib.suppress(JobError):
            control.cancel(jobs.home, job.uid)
        ended = jobs.until(job)
        assert ended.state in ("cancelled", "succeeded")
        assert runner.wait(60) in (0, -signal.SIGKILL)  # the scheduler ends one that comes after the cancel
        if ended.state == "succeeded":
            assert check_manifest(jobs.folder(job)) == []
        jobs.is_over(job)


@pytest.mark.parametrize("leak", [True, "bare"])
def test_an_engine_that_ignores_signals_and_leaks_a_daemon_is_gone_within_the_ladder(jobs, leak):
    settings = {"sleep_at": 2, "ignore_signals": True, "leak": leak}
    job = jobs.create({"name": "w4", "settings": settings})
    runner = jobs.launch(job)
    jobs.at_layer(job, 2)
    processes = [jobs.engine(job), leaked(jobs, job)]
    control.cancel(jobs.home, job.uid)
    told = []
    while jobs.get(job).is_active:
        message = jobs.get(job).progress.get("message", "")
        if not told or told[-1] != message:
            told.append(message)
    assert jobs.get(job).state == "cancelled" and all(is_gone(process) for process in processes)
    assert runner.wait(30) == 0
    jobs.is_over(job)
    steps = ["cancelling: asked to stop (SIGINT)", "cancelling: asked to stop (SIGTERM)"]
    assert [message for message in told if message in steps] == steps
    log = jobs.log(job)
    assert [log.index(f"ending the program: {name}") for name in ("SIGINT", "SIGTERM", "SIGKILL")]


def test_a_daemon_of_an_engine_that_ended_well_does_not_stay(jobs):
    job = jobs.create({"name": "w4", "settings": {"leak": True}})
    assert jobs.launch(job).wait(60) == 0
    pid = int((jobs.home.run_dir(job.uid) / "leaked").read_text())
    assert jobs.get(job).state == "succeeded" and start_ticks(pid) is None


def test_a_polite_engine_ends_at_the_first_signal_without_a_trace_in_the_log(jobs):
    job = jobs.create({"name": "w4", "settings": {"sleep_at": 2}})
    runner = jobs.launch(job)
    jobs.at_layer(job, 2)
    control.cancel(jobs.home, job.uid)
    assert runner.wait(60) == 0
    log = jobs.log(job)
    assert jobs.get(job).state == "cancelled" and "SIGINT" in log
    assert "SIGTERM" not in log and "Traceback" not in log
