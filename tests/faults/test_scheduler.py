"""The scheduler: who starts when and on what, and what becomes of jobs whose runner dies, stops or never comes.

Its ticks run inside the test on a clock that the test sets, with real stores, locks and processes.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest

from backend.errors import ConfigErrors
from backend.jobs import control, devices, launch, scheduler
from backend.jobs import store as store_module
from backend.jobs.complaints import Complaints
from backend.jobs.scheduler import Scheduler
from backend.jobs.store import JobStore, StoreBusyError
from backend.paths import PROJECT
from backend.process import JOB_VARIABLE, boot_id, hold_lock, lock_is_held, process_facts
from tests.faults import standin
from tests.jobs.stored import make, start, states

GB = 10**9


class Clock:
    """A monotonic clock that the test sets."""

    def __init__(self):
        self.at = 1000.0

    def __call__(self):
        return self.at


def scheduler_of(home, **more):
    """A scheduler whose launches are only noted, on a clock of its own."""
    launched = []
    made = Scheduler(home, launch=lambda home, uid, attempt: launched.append((uid, attempt)), **more)
    return made, launched


def gpus_are(tmp_path, monkeypatch, rows):
    path = tmp_path / "gpus.json"
    path.write_text(json.dumps(rows))
    monkeypatch.setenv(devices.FAKE_GPUS, str(path))


def until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def held(store):
    """Resource -> name of the job that holds it."""
    return {lease.resource: store.get(lease.uid).job_id for lease in store.leases()}


# -- who starts, and on what


def test_one_cpu_job_at_a_time_in_order_of_priority_then_age(home):
    store = JobStore(home)
    low, old, young = make(store, "low", PRIORITY=-1), make(store, "old"), make(store, "young")
    ticker, launched = scheduler_of(home)
    ticker.tick()
    assert launched == [(old.uid, 1)] and held(store) == {"cpu:0": "old"}
    assert store.get(young.uid).reason == "waiting: job old uses the CPU"
    urgent = make(store, "urgent", PRIORITY=5)
    for job in (old, urgent, young):
        assert store.move(job.uid, "running", actor="runner", attempt=1)
        with hold_lock(home.run_dir(job.uid) / "runner.lock"):
            ticker.tick()
        assert store.move(job.uid, "succeeded", actor="runner", attempt=1)
        ticker.tick()
    assert [uid for uid, _ in launched] == [old.uid, urgent.uid, young.uid, low.uid]


def test_cpu_slots_come_from_the_settings_and_can_change(home):
    store = JobStore(home)
    (home.root / "quantdeck.toml").write_text("[jobs]\ncpu_slots = 2\n")
    jobs = [make(store, f"j{i}") for i in range(4)]
    ticker, launched = scheduler_of(home)
    ticker.tick()
    assert launched == [(job.uid, 1) for job in jobs[:2]]
    assert store.get(jobs[2].uid).reason == "waiting: 2 of 2 CPU slots are busy"
    (home.root / "quantdeck.toml").write_text("[jobs]\ncpu_slots = 'many'\n")
    ticker.tick()  # a mistake in the file changes nothing
    assert len(launched) == 2
    (home.root / "quantdeck.toml").write_text("[jobs]\ncpu_slots = 3\n")
    ticker.tick()
    assert [uid for uid, _ in launched] == [job.uid for job in jobs[:3]]


def test_several_gpus_are_granted_all_or_none_and_nobody_overtakes_for_ever(home, tmp_path, monkeypatch):
    gpus_are(tmp_path, monkeypatch, [{"uuid": "A"}, {"uuid": "B"}, {"uuid": "C"}])
    store = JobStore(home)
    first = make(store, "first", "cuda:0")
    big = make(store, "big", "cuda:0,1")
    small, other = make(store, "small", "cuda:1"), make(store, "other", "cuda:2")
    ticker, launched = scheduler_of(home)
    ticker.tick()
    assert held(store) == {"gpu:A": "first", "gpu:C": "other"}
    assert store.get(big.uid).reason == "waiting: job first uses GPU 0"
    assert store.get(small.uid).reason == "waiting: job big is before it in the queue for GPU 1"
    store.move(first.uid, "cancelling", actor="user", attempt=1)
    store.move(first.uid, "cancelled", actor="runner", attempt=1)
    ticker.tick()
    assert held(store) == {"gpu:A": "big", "gpu:B": "big", "gpu:C": "other"}
    assert store.get(small.uid).reason == "waiting: job big uses GPU 1"
    assert [uid for uid, _ in launched] == [first.uid, other.uid, big.uid]


def test_a_foreign_program_on_a_gpu_is_waited_for_and_named(home, tmp_path, monkeypatch):
    python = {"pid": 123, "name": "python", "bytes": 12_300_000_000}
    gpus_are(tmp_path, monkeypatch, [{"uuid": "A", "processes": [python]}, {"uuid": "B", "used_bytes": 300_000_000}])
    store = JobStore(home)
    blocked, both, free = make(store, "one", "cuda:0"), make(store, "both", "cuda:0,1"), make(store, "two", "cuda:1")
    ticker, launched = scheduler_of(home)
    ticker.tick()
    reason = "waiting: another program (pid 123, python) holds 12.3 GB of GPU 0"
    assert store.get(blocked.uid).reason == store.get(both.uid).reason == reason
    assert launched == [(free.uid, 1)]  # what waits for a stranger keeps nothing from others
    gpus_are(tmp_path, monkeypatch, [{"uuid": "A"}, {"uuid": "B"}])
    ticker.tick()
    assert held(store) == {"gpu:A": "one", "gpu:B": "two"}


def test_a_gpu_that_is_gone_is_waited_for_and_the_others_go_on(home, tmp_path, monkeypatch):
    gpus_are(tmp_path, monkeypatch, [{"uuid": "A", "lost": True}, {"uuid": "B"}])
    store = JobStore(home)
    gone, here = make(store, "gone", "cuda:0"), make(store, "here", "cuda:1")
    ticker, launched = scheduler_of(home)
    ticker.tick()
    assert launched == [(here.uid, 1)] and held(store) == {"gpu:B": "here"}
    assert store.get(gone.uid).reason == "waiting: GPU 0 is not there (this machine has: 1)"
    gpus_are(tmp_path, monkeypatch, {"error": "the driver does not answer"})
    ticker.tick()
    assert "GPU 0 is not there" in store.get(gone.uid).reason


def test_cuda_id_names_all_gpus_of_a_job_and_only_those_that_are_there(tmp_path, monkeypatch):
    gpus_are(tmp_path, monkeypatch, [{"uuid": "A", "name": "H100"}, {"uuid": "B", "name": "L4"}])
    assert devices.choose_device("1,0") == "cuda:1,0"
    assert devices.device_environment("cuda:1,0")["CUDA_VISIBLE_DEVICES"] == "B,A"
    assert devices.device_environment("cuda:0", ["C"])["CUDA_VISIBLE_DEVICES"] == "C"
    assert devices.device_environment("cpu")["CUDA_VISIBLE_DEVICES"] == ""
    assert devices.describe_device("cuda:0,1") == "GPU 0, H100; GPU 1, L4"
    assert devices.torch_device("cuda:1,0") == "cuda:0"
    for wrong, words in (("2", r"found GPU 2; this machine has 0 \(H100\), 1 \(L4\)"), ("0,0", "once")):
        with pytest.raises(ConfigErrors, match=words):
            devices.choose_device(wrong)


class Driver:
    """What the NVIDIA driver answers: GPU 0 is well, GPU 1 has fallen off the bus, GPU 2 hides its programs."""

    def handle(self, index):
        if index == 1:
            raise devices.pynvml.NVMLError(devices.pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    def memory(self, handle):
        return SimpleNamespace(total=80 * GB, used=(13 if handle == 0 else 20) * GB)

    def processes(self, handle):
        if handle == 2:
            raise devices.pynvml.NVMLError(devices.pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [SimpleNamespace(pid=os.getpid(), usedGpuMemory=12 * GB), SimpleNamespace(pid=1, usedGpuMemory=None)]


def test_what_the_driver_tells_and_what_it_does_not(monkeypatch):
    driver, nvml = Driver(), devices.pynvml
    monkeypatch.delenv(devices.FAKE_GPUS, raising=False)
    for name, answer in {
        "nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "nvmlDeviceGetCount": lambda: 3,
        "nvmlDeviceGetHandleByIndex": driver.handle, "nvmlDeviceGetMemoryInfo": driver.memory,
        "nvmlDeviceGetComputeRunningProcesses": driver.processes,
        "nvmlDeviceGetGraphicsRunningProcesses": driver.processes,
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}", "nvmlDeviceGetName": lambda handle: "H100",
    }.items():  # fmt: skip
        monkeypatch.setattr(nvml, name, answer)
    first, last = devices.gpus()
    assert (first.index, first.uuid, last.index, last.uuid) == (0, "GPU-0", 2, "GPU-2")
    assert (first.processes[1].pid, first.processes[1].bytes) == (os.getpid(), 12 * GB)
    me = psutil.Process().name()
    assert devices.foreign_use(first) == f"another program (pid {os.getpid()}, {me}) and 1 more hold 12.0 GB of GPU 0"
    assert devices.foreign_use(last) == "another program holds 20.0 GB of GPU 2"
    with pytest.raises(ConfigErrors, match="found GPU 1"):
        devices.choose_device("0,1")

    def fails():
        raise nvml.NVMLError(nvml.NVML_ERROR_DRIVER_NOT_LOADED)

    monkeypatch.setattr(nvml, "nvmlInit", fails)
    assert devices.gpus() == [] and devices.choose_device("0") == "cpu"


def test_a_job_of_an_older_version_without_a_lease_still_has_its_device(home, tmp_path, monkeypatch):
    gpus_are(tmp_path, monkeypatch, [{"uuid": "A"}, {"uuid": "B"}])
    store = JobStore(home)
    old_cpu, old_gpu = make(store, "old_cpu"), make(store, "old_gpu", "cuda:0")
    for job in (old_cpu, old_gpu):
        start(store, job)  # no resources named
    make(store, "cpu"), make(store, "zero", "cuda:0"), make(store, "one", "cuda:1")
    ticker, launched = scheduler_of(home)
    with hold_lock(home.run_dir(old_cpu.uid) / "runner.lock"), hold_lock(home.run_dir(old_gpu.uid) / "runner.lock"):
        ticker.tick()
    assert states(store)["one"] == "starting" and len(launched) == 1
    assert store.get("zero").reason == "waiting: job old_gpu uses GPU 0"
    assert store.get("cpu").reason == "waiting: job old_cpu uses the CPU"


# -- runners that die


def died(home, store, job, **facts):
    """A job whose runner started and is gone."""
    start(store, job, "cpu:0")
    home.run_dir(job.uid).mkdir(parents=True, exist_ok=True)
    attempt = store.get(job.uid).attempt
    told = {"pid": 0, "started": 1, "boot_id": boot_id(), "attempt": attempt, **facts}
    (home.run_dir(job.uid) / "runner.json").write_text(json.dumps(told))


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


def played(home, **play):
    home.root.mkdir(parents=True, exist_ok=True)
    (home.root / "standin.json").write_text(json.dumps(play))


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


# -- schedulers that die


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


def test_one_job_whose_folder_cannot_be_used_holds_up_no_other(home):
    (home.root / "quantdeck.toml").parent.mkdir(parents=True, exist_ok=True)
    (home.root / "quantdeck.toml").write_text("[jobs]\ncpu_slots = 3\n")
    store = JobStore(home)
    active, waiting, sound = make(store, "active"), make(store, "waiting"), make(store, "sound")
    start(store, active, "cpu:0")
    (home.private / "runs").mkdir(parents=True, exist_ok=True)
    for job in (active, waiting):
        home.run_dir(job.uid).write_text("a file where a folder should be")
    ticker, launched = scheduler_of(home)
    ticker.tick()
    assert launched == [(sound.uid, 1)] and states(store)["active"] == "running"
    assert "its working folder cannot be used (Not a directory" in store.get(waiting.uid).reason
    home.run_dir(waiting.uid).unlink()
    ticker.tick()
    assert launched[1:] == [(waiting.uid, 1)]


def test_a_new_job_is_seen_before_the_next_tick_is_due(home, monkeypatch):
    played(home, seconds=0.0)
    monkeypatch.setattr(launch, "RUNNER", standin.MODULE)
    monkeypatch.setattr(scheduler, "IDLE_S", 3.0)
    monkeypatch.setattr(scheduler, "TICK_S", 600.0)
    store = JobStore(home)
    make(store, "first")
    serving = threading.Thread(target=scheduler.serve, args=(home,), daemon=True)
    serving.start()
    until(lambda: states(store) == {"first": "succeeded"})
    make(store, "second")
    until(lambda: states(store) == {"first": "succeeded", "second": "succeeded"})
    monkeypatch.setattr(scheduler, "TICK_S", 0.1)
    make(store, "last")  # ends the long rest
    serving.join(60)
    assert not serving.is_alive()


def test_an_error_that_stays_is_told_once(caplog):
    complaints = Complaints(logging.getLogger("quantdeck.test"))
    for text in ("full", "full", "other", "other"):
        with complaints.told("the disk"):
            raise OSError(text)
    with complaints.told("the disk"):
        pass
    with complaints.told("the disk"):
        raise ValueError("other")
    assert [record.getMessage() for record in caplog.records] == [
        "the disk: full", "the disk: other", "the disk: internal error, ValueError: other",
    ]  # fmt: skip
    with pytest.raises(StoreBusyError), complaints.told("the store", through=StoreBusyError):
        raise StoreBusyError("busy")
