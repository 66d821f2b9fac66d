"""Jobs whose runner or engine is killed or stopped (faults 1, 2, 14): real processes, real signals."""

import json
import os
import signal
import time

import pytest

from backend.jobs import control, launch
from backend.jobs.publish import check_manifest
from backend.process import hold_lock, is_that_process, process_facts
from tests.faults.troubles import is_gone, leaked
from tests.jobs.harness import until, weights

# -- killed


def test_a_killed_runner_takes_all_along_before_its_lease_is_free_and_the_weights_end_the_same(jobs):
    whole = jobs.until(jobs.start({"name": "w4"}, name="whole"))
    job = jobs.start({"name": "w4", "settings": {"sleep_at": 2, "leak": True}}, name="killed")
    jobs.at_layer(job, 2)
    processes = [jobs.engine(job), leaked(jobs, job)]
    assert len(jobs.store.leases()) == 1 and jobs.get(job).attempt == 1
    jobs.runner(job).kill()
    deadline = time.monotonic() + 30
    while [one for one in jobs.store.leases() if one.attempt == 1]:
        assert time.monotonic() < deadline
    assert all(is_gone(process) for process in processes)
    done = jobs.until(job)
    assert (done.state, done.attempt, done.outcome) == ("succeeded", 2, None), done.reason
    assert jobs.calls(job) == [0, 2]
    assert weights(jobs.folder(done)) == weights(jobs.folder(whole))
    lost = [e for e in jobs.store.history(job.uid) if e["to_state"] == "lost"]
    assert [(e["attempt"], e["actor"]) for e in lost] == [(1, "scheduler")]
    jobs.is_over(job)


def test_a_runner_that_always_dies_is_not_started_for_ever(jobs):
    settings = {"sleep_at": 1, "every_attempt": True, "keeps_layers": False}
    job = jobs.create({"name": "w4", "settings": settings}, changes={"MAX_ATTEMPTS": 2})
    launch.ensure_scheduler(jobs.home)
    for attempt in (1, 2):
        jobs.at_layer(job, 1, attempt=attempt)
        jobs.runner(job).kill()
    ended = jobs.until(job)
    assert (ended.state, ended.outcome, ended.attempt) == ("failed", "runner_died", 2)
    jobs.is_over(job)


@pytest.mark.parametrize(
    ("how", "outcome", "words"),
    [
        ("SIGKILL", "engine_crashed", "ended by signal 9 (SIGKILL); somebody killed it"),
        ("SIGSEGV", "engine_crashed", "ended by signal 11 (SIGSEGV)"),
        (7, "engine_crashed", "ended with exit code 7"),
        ("error: no such layer", "engine_failed", "no such layer"),
        ("error: CUDA out of memory. Tried to allocate 2.00 GiB", "gpu_out_of_memory", "Tried to allocate 2.00 GiB"),
        ("error: NVML_ERROR_GPU_IS_LOST: GPU is lost", "gpu_lost", "GPU is lost"),
    ],
)
def test_an_engine_that_dies_fails_the_job_once_with_the_reason(jobs, how, outcome, words):
    settings = {"die_at": 2, "die_by": how, "say": "layer done, all well"}
    job = jobs.create({"name": "w4", "settings": settings})
    assert jobs.launch(job).wait(60) == 0
    ended = jobs.get(job)
    assert (ended.state, ended.outcome, ended.attempt) == ("failed", outcome, 1)
    assert words in ended.reason and ended.reason.startswith("stage 'Quantize'")
    if not str(how).startswith("error"):
        assert "layer done, all well" in ended.reason
    assert jobs.log(job).splitlines().count("layer done, all well") == 2
    assert not jobs.folder(ended).exists()
    jobs.is_over(job)
    assert [e["to_state"] for e in jobs.store.history(job.uid)] == ["queued", "starting", "running", "failed"]


def test_a_runner_that_is_asked_to_end_leaves_the_job_to_the_next(jobs):
    job = jobs.start({"name": "w4", "settings": {"sleep_at": 2}})
    jobs.at_layer(job, 2)
    jobs.runner(job).send_signal(signal.SIGTERM)
    done = jobs.until(job)
    assert (done.state, done.attempt) == ("succeeded", 2) and jobs.calls(job) == [0, 2]
    assert "the runner was asked to end during stage 'Quantize'" in jobs.log(job)


def test_a_second_runner_of_the_same_attempt_or_of_another_does_nothing(jobs):
    job = jobs.create({"name": "w4", "settings": {"sleep_at": 2}})
    jobs.launch(job)
    jobs.at_layer(job, 2)
    assert jobs.launch(job).wait(60) == 0
    assert len(jobs.calls(job)) == 1 and jobs.get(job).state == "running"
    assert control.cancel(jobs.home, job.uid)
    jobs.until(job)
    assert jobs.launch(job).wait(60) == 0  # it has ended meanwhile
    assert jobs.get(job).state == "cancelled" and len(jobs.calls(job)) == 1


def test_a_runner_says_who_it_is_and_shows_its_engine_what_was_granted_alone(jobs):
    job = jobs.create({"name": "w4", "settings": {"sleep_at": 1}}, device="cuda:0,1")
    ours = {"PYTHONPATH": "/ours", "VIRTUAL_ENV": "/ours", "AWS_SECRET_ACCESS_KEY": "/ours", "HF_TOKEN": "/ours"}
    runner = jobs.launch(job, resources=["gpu:GPU-a", "gpu:GPU-b"], **ours)
    jobs.at_layer(job, 1)
    facts = json.loads((jobs.home.run_dir(job.uid) / "runner.json").read_text())
    assert facts == {**process_facts(runner.pid), "attempt": 1} and is_that_process(facts)
    variables = jobs.engine(job).environ()
    assert variables["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b" and variables["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert variables["QUANTDECK_JOB"] == f"{job.uid}:1" and "/ours" not in variables.values()
    control.cancel(jobs.home, job.uid)
    assert runner.wait(60) == 0
    jobs.is_over(job)


# -- stopped


def test_a_stopped_runner_that_wakes_up_superseded_stores_and_saves_nothing(jobs):
    job = jobs.create({"name": "w4", "settings": {"sleep_s": 0.3}})
    with hold_lock(launch.scheduler_lock(jobs.home)):  # so that nobody starts the second attempt too early
        runner = jobs.launch(job)
        jobs.at_layer(job, 1)
        engine = jobs.engine(job)
        os.kill(runner.pid, signal.SIGSTOP)
        until(lambda: is_gone(engine))  # all four layers are done, only saving is left
        assert jobs.store.move(job.uid, "lost", actor="scheduler", attempt=1, reason="for the test")
        assert jobs.store.requeue(job.uid, 1, actor="scheduler", reason="for the test")
        before = jobs.get(job)
        os.kill(runner.pid, signal.SIGCONT)
        assert runner.wait(60) == 0
        assert jobs.get(job) == before and not jobs.folder(job).exists()
    launch.ensure_scheduler(jobs.home)
    done = jobs.until(job)
    assert (done.state, done.attempt) == ("succeeded", 2), done.reason
    assert check_manifest(jobs.folder(job)) == []


def test_a_superseded_runner_kills_its_engine(jobs):
    job = jobs.create({"name": "w4", "settings": {"sleep_at": 1, "ignore_signals": True}})
    with hold_lock(launch.scheduler_lock(jobs.home)):
        runner = jobs.launch(job)
        jobs.at_layer(job, 1)
        engine = jobs.engine(job)
        jobs.store.move(job.uid, "lost", actor="scheduler", attempt=1, reason="for the test")
        jobs.store.requeue(job.uid, 1, actor="scheduler", reason="for the test")
        assert runner.wait(60) == 0
        assert is_gone(engine) and jobs.get(job).state == "queued"
