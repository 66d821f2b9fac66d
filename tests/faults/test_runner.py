"""Jobs whose runner or engine is killed, stopped, starved or misbehaves: real processes, real signals."""

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from backend.errors import JobError
from backend.jobs import control, launch
from backend.jobs.logs.writer import LogWriter
from backend.jobs.outcomes import CODES, advice, classify, memory_kills, outcome_of, outcome_of_text
from backend.jobs.publish import check_manifest
from backend.jobs.run import Run
from backend.jobs.runner import Runner
from backend.process import hold_lock, is_that_process, process_facts, start_ticks
from backend.settings import Settings
from tests.jobs.harness import until, weights


def is_gone(process):
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def leaked(jobs, job):
    """The daemon that the engine has left behind."""
    note = jobs.home.run_dir(job.uid) / "leaked"
    until(lambda: note.exists() and note.read_text())
    return psutil.Process(int(note.read_text()))


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


# -- starved


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of its own, which can be filled without harm."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(path, leave=0):
    """Fill the disk of a file up to its last byte, or leave some."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    if leave:
        os.truncate(path, path.stat().st_size - leave)


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


# -- cancelled


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


# -- what is told


@pytest.mark.parametrize(
    ("code", "facts", "outcome"),
    [
        (-9, {"memory_kill": True}, "out_of_memory"),
        (137, {"memory_kill": True}, "out_of_memory"),
        (-9, {}, "engine_crashed"),
        (-11, {"memory_kill": True}, "engine_crashed"),
        (-6, {"tail": ["terminate called after throwing an instance of 'std::bad_alloc'"]}, "out_of_memory"),
        (1, {"kind": "MemoryError"}, "out_of_memory"),
        (1, {"kind": "RuntimeError", "message": "[enforce fail] DefaultCPUAllocator: can't allocate memory"},
         "out_of_memory"),
        (1, {"kind": "OutOfMemoryError", "message": "CUDA out of memory. Tried to allocate 1 GiB"},
         "gpu_out_of_memory"),
        (-6, {"tail": ["RuntimeError: CUDA error: out of memory"]}, "gpu_out_of_memory"),
        (1, {"kind": "RuntimeError", "message": "CUDA error: device-side assert triggered"}, "engine_failed"),
        (-6, {"tail": ["NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus."]}, "gpu_lost"),
        (1, {"kind": "NVMLError_GpuIsLost", "message": "GPU is lost"}, "gpu_lost"),
        (1, {"kind": "RuntimeError", "message": "CUDA error: uncorrectable ECC error encountered"}, "gpu_lost"),
        (2, {"kind": "ConfigError", "message": "no such key"}, "bad_input"),
        (1, {"kind": "CheckpointError", "message": "truncated"}, "bad_input"),
        (1, {"kind": "ValueError", "message": "shapes differ"}, "engine_failed"),
        (3, {}, "engine_crashed"),
    ],
)  # fmt: skip
def test_the_outcome_of_a_program(code, facts, outcome):
    assert classify(code, **facts) == outcome


def test_every_outcome_has_its_advice_and_errors_have_their_outcome():
    assert all(advice(code).endswith(".") for code in CODES) and advice("unheard of") == ""
    assert outcome_of(ValueError("x")) == "internal_error" and outcome_of(OSError(28, "No space")) == "disk_full"
    assert outcome_of_text("all went well") is None
    assert memory_kills() is None or memory_kills() >= 0
