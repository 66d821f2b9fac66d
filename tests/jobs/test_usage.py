"""What is noted of a job's memory, processors and GPUs while it runs is right, stays small, and outlives crashes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from backend.jobs import devices, usage
from backend.jobs.gpu_meter import GpuMeter, GpuUse
from backend.jobs.processes import tree
from backend.jobs.usage import LATEST, MAX_BYTES, USAGE_FILE, Sample, Sampler, UsageFile, joined, read_usage
from tests.jobs.harness import until

MB = 1_000_000
BUSY_CHILD = """
import subprocess, sys, time
held = bytearray(120_000_000)
held[::4096] = b"x" * len(held[::4096])
child = subprocess.Popen([sys.executable, "-c", "print('on', flush=True)\\nwhile True: pass"])
child.wait()
"""


def sample(at, attempt=1, stage="quantize", memory=100, cores=1.0, seconds=1.0, gpus=(), configuration=""):
    return Sample(attempt, at, seconds, stage, configuration, memory, cores, gpus)


def spent(samples):
    """Seconds, and core seconds, of all samples."""
    return sum(one.seconds for one in samples), sum(one.seconds * one.cores for one in samples)


def test_memory_and_time_of_all_descendants_are_counted():
    process = subprocess.Popen([sys.executable, "-c", BUSY_CHILD], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout.readline() == b"on\n"  # of its child
        before = tree(process.pid)
        assert len(before) == 2 and 120 * MB < sum(one.resident_bytes for one in before.values()) < 200 * MB
        until(
            lambda: sum(one.cpu_s for one in tree(process.pid).values()) > sum(b.cpu_s for b in before.values()) + 0.3
        )
        assert before.keys() == tree(process.pid).keys() < tree(os.getpid()).keys()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert tree(process.pid) == {}


def test_the_list_of_all_processes_does_where_the_kernel_lists_no_children(monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", BUSY_CHILD], stdout=subprocess.PIPE, start_new_session=True)
    real = open

    def without_children(path, *arguments, **options):
        if str(path).endswith("/children"):
            raise FileNotFoundError(path)
        return real(path, *arguments, **options)

    try:
        assert process.stdout.readline() == b"on\n"
        expected = tree(process.pid).keys()
        monkeypatch.setattr("builtins.open", without_children)
        assert tree(process.pid).keys() == expected and len(expected) == 2
    finally:
        monkeypatch.undo()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_samples_survive_the_disk_and_a_torn_line(tmp_path):
    path = tmp_path / USAGE_FILE
    gpu = GpuUse(1, 5 * MB, 80 * MB, 42.5)
    written = [sample(1.0, gpus=(gpu,)), sample(2.0, configuration="w4", gpus=(GpuUse(1, 5, 9, None),))]
    file = UsageFile(path)
    for one in written:
        file.add(one)
    assert read_usage(path) == written
    with open(path, "a") as torn:
        torn.write('{"attempt": 1, "at": 3.0, "seco')
    assert read_usage(path) == written
    UsageFile(path).add(sample(1.0, attempt=2))
    assert read_usage(path) == [*written, sample(1.0, attempt=2)]
    with open(path, "a") as more:
        for junk in ("[]", "{}", '{"attempt": "x"}', '{"attempt": 1e999, "at": 1}', "\x00", '{"gpus": [[1]]}'):
            more.write(junk + "\n")
    assert len(read_usage(path)) == 3
    assert read_usage(tmp_path / "none.jsonl") == []


def test_a_long_job_keeps_a_small_file(tmp_path):
    path, file, most = tmp_path / USAGE_FILE, UsageFile(tmp_path / USAGE_FILE), 0
    written = [
        sample(float(i), memory=10**10 + i % 977, cores=i % 7 / 2, gpus=(GpuUse(0, 7 * 10**10, 8 * 10**10, i % 100),))
        for i in range(1, 12_001)
    ]
    for one in written:
        file.add(one)
        most = max(most, path.stat().st_size)
    assert MAX_BYTES / 2 < most < 1.05 * MAX_BYTES
    kept = read_usage(path)
    assert kept[-LATEST:] == written[-LATEST:]
    assert spent(kept) == pytest.approx(spent(written), rel=1e-3)
    assert max(one.memory for one in kept) == 10**10 + 976
    assert [one.at for one in kept] == sorted(one.at for one in kept)
    assert max(one.seconds for one in kept) < 24  # evenly spread, whatever its age
    again = UsageFile(path)
    again.add(sample(1.0, attempt=2))
    assert len(read_usage(path)) == len(kept) + 1


def test_days_fit_and_stages_and_attempts_stay_apart():
    days = [sample(float(i), stage="calibrate" if i < 9 else "quantize") for i in range(1, 100_000)]
    kept = joined(days, 1000)
    assert len(kept) <= 1000 and spent(kept) == pytest.approx(spent(days))
    assert {one.stage for one in kept} == {"calibrate", "quantize"}
    many = [sample(1.0, attempt=i) for i in range(5000)]
    assert joined(many, 1000) == many[-1000:]
    assert joined(days[:50], 1000) == days[:50]


def test_a_job_s_samples_name_its_stages_and_go_on_after_its_runner_was_killed(jobs):
    job = jobs.start({"name": "w4", "settings": {"sleep_s": 0.8}})
    path = jobs.home.run_dir(job.uid) / USAGE_FILE
    until(lambda: any(one.stage == "quantize" for one in read_usage(path)))
    jobs.runner(job).kill()
    assert jobs.until(job).state == "succeeded"
    samples = read_usage(path)
    assert [one.attempt for one in samples] == sorted(one.attempt for one in samples)
    assert {one.attempt for one in samples} == {1, 2}
    for attempt in (1, 2):
        own = [one for one in samples if one.attempt == attempt]
        assert [one.at for one in own] == sorted(one.at for one in own)
        assert all(10 * MB < one.memory < 2000 * MB and one.cores >= 0 and one.gpus == () for one in own)
    jobs.is_over(job)


def test_of_several_gpus_the_jobs_own_is_noted(jobs, tmp_path):
    rows = [{"uuid": "GPU-a"}, {"uuid": "GPU-b", "used_bytes": 3 * MB, "total_bytes": 9 * MB, "busy": 70}]
    (tmp_path / "gpus.json").write_text(json.dumps(rows))
    job = jobs.create({"name": "w4", "settings": {"sleep_s": 0.4}}, device="cuda:1")
    jobs.launch(job, resources=("gpu:GPU-b",), **{devices.FAKE_GPUS: str(tmp_path / "gpus.json")})
    assert jobs.until(job).state == "succeeded"
    assert {one.gpus for one in read_usage(jobs.home.run_dir(job.uid) / USAGE_FILE)} == {
        (GpuUse(1, 3 * MB, 9 * MB, 70),)
    }


def test_the_peak_of_a_program_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(usage, "EVERY_S", 0.05)
    path, code = tmp_path / USAGE_FILE, "held = b'x' * 150_000_000; print('on', flush=True); input()"
    with Sampler(path, 3, lambda: [], lambda: ("quantize", "w4")):
        until(lambda: len(read_usage(path)) >= 2)
        before = read_usage(path)[-1].memory
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            until(lambda: read_usage(path)[-1].memory > before + 150 * MB)
            child.communicate(b"\n")
        until(lambda: read_usage(path)[-1].memory < before + 100 * MB)
    last = read_usage(path)[-1]
    assert (last.attempt, last.stage, last.configuration) == (3, "quantize", "w4")
    time.sleep(0.2)
    assert read_usage(path)[-1] == last  # it has ended


def test_what_goes_wrong_with_it_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(usage, "EVERY_S", 0.01)

    def no_store():
        raise OSError("the disk is gone")

    for path, gpus in ((tmp_path / "no" / "such" / USAGE_FILE, list), (tmp_path / USAGE_FILE, no_store)):
        with Sampler(path, 1, gpus, lambda: ("", "")) as sampler:
            time.sleep(0.1)
        sampler.join(10)
        assert not sampler.is_alive() and not path.exists()
    taken = tmp_path / "later" / USAGE_FILE
    taken.parent.mkdir()
    with Sampler(taken, 1, lambda: [], lambda: ("", "")) as sampler:
        until(taken.exists)
        taken.unlink()
        taken.mkdir()  # what cannot be written for a while
        time.sleep(0.1)
        assert sampler.is_alive()
        taken.rmdir()
        until(lambda: len(read_usage(taken)) > 0)


def test_gpus_of_the_job_are_read_and_those_that_are_lost_left_out(tmp_path, monkeypatch):
    path = tmp_path / "gpus.json"
    rows = [{"uuid": "GPU-a", "used_bytes": 3, "total_bytes": 9, "busy": 55}, {"uuid": "GPU-b"}, {"uuid": "GPU-c"}]
    path.write_text(json.dumps(rows))
    monkeypatch.setenv(devices.FAKE_GPUS, str(path))
    with GpuMeter(["GPU-a", "GPU-c"]) as meter:
        assert meter.read() == [GpuUse(0, 3, 9, 55), GpuUse(2, 0, 80 << 30, None)]
        rows[2]["lost"] = True
        path.write_text(json.dumps(rows))
        assert [use.index for use in meter.read()] == [0]
        path.write_text(json.dumps({"error": "the driver has failed"}))
        assert meter.read() == []
    with GpuMeter([]) as meter:
        assert meter.read() == []


def test_without_a_driver_no_gpu_is_read(monkeypatch):
    monkeypatch.delenv(devices.FAKE_GPUS, raising=False)
    with GpuMeter(["GPU-00000000-0000-0000-0000-000000000000"]) as meter:
        assert meter.read() == []
