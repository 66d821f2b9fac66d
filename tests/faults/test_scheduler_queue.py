"""The scheduler: who starts when and on what (fault 17), and that no job holds up the others."""

import logging
import os
import threading
from types import SimpleNamespace

import psutil
import pytest

from backend.errors import ConfigErrors
from backend.jobs import devices, launch, scheduler
from backend.jobs.complaints import Complaints
from backend.jobs.store import JobStore, StoreBusyError
from backend.process import hold_lock
from tests.faults import standin
from tests.faults.ticks import gpus_are, held, played, scheduler_of, until
from tests.jobs.stored import make, start, states

GB = 10**9


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


# -- rounds


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
