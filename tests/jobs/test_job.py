"""Whole jobs through the real runner, store and stages, on the demo model."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from backend.demo import MODEL_DIR
from backend.errors import ConfigErrors, JobError
from backend.evaluate.cache import file_digest
from backend.formats.size import weight_bytes
from backend.jobs import control
from backend.jobs.estimate import estimate
from backend.jobs.publish import check_manifest
from backend.jobs.results import results_of
from backend.jobs.store import JobStore
from backend.paths import PROJECT, Home
from backend.process import end_leftovers, processes_of
from backend.schema import parse_yaml
from tests.conftest import demo_text

ENGINE = "backend.engines.native"
GUIDE_FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def cli(home, *args, **more):
    return subprocess.run(
        [sys.executable, "-m", "backend", *args, "--home", str(home.root)],
        cwd=PROJECT, capture_output=True, text=True, timeout=900, check=False, **more,
    )  # fmt: skip


def until(home, uid, condition, seconds=400.0):
    deadline = time.monotonic() + seconds
    while True:
        job = JobStore(home).get(uid)
        if condition(job):
            return job
        assert time.monotonic() < deadline, f"job is {job.state}, {job.progress}, {job.reason}"
        time.sleep(0.1)


def descendants(uid):
    return [p for p in psutil.process_iter(["cmdline"]) if uid in " ".join(p.info["cmdline"] or [])]


def process_of(home, uid, module):
    """The job's process that runs this module, once it does; its parent is of another module or not of the job."""

    def found():
        every = {p.pid: p for p in descendants(uid) if module in p.info["cmdline"]}
        with contextlib.suppress(psutil.NoSuchProcess):
            return [p for p in every.values() if p.ppid() not in every]

    until(home, uid, lambda job: not job.is_active or found())
    (one,) = found()
    return one


@pytest.fixture
def home(home):
    """An empty home; nothing of it works on after the test."""
    yield home
    end_all(home)


def end_all(home):
    for process in psutil.process_iter(["cmdline"]):
        if {"backend.jobs.scheduler", str(home.root)} <= set(process.info["cmdline"] or []):
            process.kill()
    for job in JobStore(home).jobs():
        end_leftovers(job.uid)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One finished job, run by the command line."""
    home = Home(tmp_path_factory.mktemp("home"))
    path = home.root / "job.yaml"
    path.write_text(demo_text("first"))
    finished = cli(home, "run", str(path), "--json")
    assert finished.returncode == 0, finished.stderr
    return home, json.loads(finished.stdout.splitlines()[-1]), finished.stderr


def test_the_result_object_has_every_number(done):
    home, result, progress = done
    assert result["state"] == "succeeded" and result["job_id"] == "first"
    metrics = {row["metric"] for row in result["rows"]}
    assert {"perplexity", "accuracy", "size", "tokens/s", "peak memory"} <= metrics
    assert {"KL divergence", "top-1 flips", "bits per weight"} <= metrics
    protocols = " ".join(row["protocol"] for row in result["rows"] if row["metric"] == "perplexity")
    assert "gptq_wikitext" in protocols and "full_window" in protocols
    for row in result["rows"]:
        assert row["impact"] == pytest.approx(row["quantized"] - row["baseline"])
        assert row["interval"] is None or row["interval"][0] <= row["impact"] <= row["interval"][1]
    stages = {"download", "calibrate", "quantize", "save", "evaluate_baseline", "evaluate_quantized", "benchmark"}
    assert stages | {"evaluate_fidelity"} <= set(result["timings"])
    assert all(t["wall_s"] >= 0 and t["cpu_s"] >= 0 for t in result["timings"].values())
    assert result["peak_rss_bytes"] > 50e6
    (only,) = result["results"]
    assert only["rows"] == result["rows"] and only["artefact"] == result["artefact"] and only["name"] == "awq-w4-g128"
    assert only["decode_path"] == "packed int4 kernel"
    assert "model.layers.0" in progress


def test_the_artefact_lies_in_the_guides_place_and_is_intact(done):
    home, result, _ = done
    folder = home.root / "user_data" / "jobs" / "Kompress" / "first"
    assert result["artefact"] == str(folder)
    assert {p.name for p in folder.iterdir()} >= GUIDE_FILES
    assert check_manifest(folder) == []
    assert (folder / "quantdeck.yaml").read_text() == demo_text("first")
    assert (home.root / "user_data" / "logs" / "first" / "log.log").stat().st_size > 0
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "awq" and quantization["bits"] == 4 and quantization["group_size"] == 128


def test_the_size_row_is_what_lies_on_disk_and_what_was_predicted(done):
    home, result, _ = done
    (row,) = [r for r in result["rows"] if r["metric"] == "size"]
    scale = {"MB": 1e6, "GB": 1e9}[row["unit"]]
    assert row["baseline"] * scale == pytest.approx(weight_bytes(MODEL_DIR))
    assert row["quantized"] * scale == pytest.approx(weight_bytes(Path(result["artefact"])))
    checked = cli(home, "validate", "examples/autoawq_demo.yaml")
    assert f"{weight_bytes(Path(result['artefact'])) / 1e6:.1f} MB" in checked.stdout


def test_a_job_with_twice_the_text_is_expected_to_take_twice_as_long(done):
    home, result, _ = done
    spent = sum(result["timings"][stage]["wall_s"] for stage in ("calibrate", "quantize", "save"))
    again = parse_yaml(demo_text("again")).config
    same = estimate(home, again, weight_bytes(MODEL_DIR), "cpu")
    assert (same.basis, same.seconds) == ("first", pytest.approx(spent))
    assert same.peak_bytes == result["peak_rss_bytes"]
    longer = parse_yaml(demo_text("longer", CALIBRATION={"SAMPLES": 16})).config
    more = estimate(home, longer, weight_bytes(MODEL_DIR), "cpu")
    assert (more.seconds, more.peak_bytes) == (pytest.approx(2 * spent), None)


def test_the_distance_from_the_base_model_and_the_stored_bits_are_told(done):
    home, result, _ = done
    rows = {row["metric"]: row for row in result["rows"]}
    divergence, flips, bits = (rows[metric] for metric in ("KL divergence", "top-1 flips", "bits per weight"))
    assert divergence["baseline"] == flips["baseline"] == 0
    assert 1e-4 < divergence["quantized"] < 0.1 and 0.1 < flips["quantized"] < 30
    assert "base quantdeck/demo" in divergence["protocol"] and "4 of 4 windows of 512" in divergence["protocol"]
    assert bits["baseline"] == 16 and bits["quantized"] == pytest.approx(4 + 16 / 128 + 4 / 128)
    assert (divergence["unit"], flips["unit"], bits["unit"]) == ("nats/token", "%", "bits")


def test_a_changed_file_is_noticed(done, tmp_path):
    home, result, _ = done
    copy = tmp_path / "copy"
    shutil.copytree(result["artefact"], copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    (copy / "tokenizer.json").unlink()
    assert len(check_manifest(copy)) == 2


def test_jobs_compare_and_export_know_the_job(done):
    home, result, _ = done
    listed = json.loads(cli(home, "jobs", "--json").stdout)
    assert [(j["job_id"], j["state"]) for j in listed] == [("first", "succeeded")]
    rows = json.loads(cli(home, "compare", "first", "--json").stdout)
    assert len(rows) == len(result["rows"])
    assert cli(home, "compare", "first").stdout.startswith("| Job |")
    assert cli(home, "compare", "first", "--csv").stdout.startswith("job,model,")
    assert cli(home, "export", "first").stdout == demo_text("first")
    nyuntam = cli(home, "export", "first", "--to", "nyuntam").stdout
    assert "CALIBRATION" not in nyuntam and 'CUDA_ID: "0"' in nyuntam
    assert "python -m backend run first.yaml" in cli(home, "export", "first", "--to", "command").stdout
    assert cli(home, "compare", "nothing").returncode == 1


def test_the_artefact_can_be_evaluated_on_its_own(done):
    home, result, _ = done
    finished = cli(home, "evaluate", result["artefact"], "--protocol", "full_window", "--split", "validation", "--json")
    assert finished.returncode == 0, finished.stderr
    (metric,) = json.loads(finished.stdout)["metrics"]
    assert 1 < metric["value"] < 1000


def test_the_same_name_is_refused_and_the_first_job_stays_as_it_was(done, tmp_path):
    home, result, _ = done
    before = JobStore(home).get("first")
    path = tmp_path / "again.yaml"
    path.write_text(demo_text("first"))
    finished = cli(home, "run", str(path))
    assert finished.returncode == 2 and "JOB_ID" in finished.stderr and "first-2" in finished.stderr
    with pytest.raises(ConfigErrors):
        control.submit(home, demo_text("first"))
    assert JobStore(home).get("first") == before and len(JobStore(home).jobs()) == 1


def test_a_second_job_reuses_the_baseline_and_gives_the_same_checkpoint(done):
    home, result, _ = done
    text = control.clone_text(home, "first")
    assert 'JOB_ID: "first-2"' in text
    job = control.submit(home, text)
    job = until(home, job.uid, lambda j: not j.is_active)
    assert job.state == "succeeded", job.reason
    assert any(row["cached_at"] for row in job.result["rows"] if row["metric"] == "perplexity")
    assert job.result["timings"]["evaluate_baseline"]["wall_s"] < result["timings"]["evaluate_baseline"]["wall_s"]
    first = json.loads((Path(result["artefact"]) / "quantdeck_manifest.json").read_text())
    second = job.result["manifest"]
    assert first["files"]["model.safetensors"] == second["files"]["model.safetensors"]


def test_gemv_and_group_32_run_too(home):
    text = demo_text("gemv", llm={"AutoAWQ": {"VERSION": "GEMV", "Q_GROUP_SIZE": 32}}, EVALUATION={"ENABLED": False})
    job = control.submit(home, text)
    job = until(home, job.uid, lambda j: not j.is_active)
    assert job.state == "succeeded", job.reason
    assert {r["metric"] for r in job.result["rows"]} == {"size", "bits per weight", "tokens/s", "peak memory"}


def slow_text(job_id, **more):
    """A job that is busy quantizing for a while."""
    calibration = {"SAMPLES": 200, "SEQUENCE_LENGTH": 512}
    return demo_text(job_id, CALIBRATION=calibration, EVALUATION={"ENABLED": False}, **more)


def test_killing_the_runner_leaves_no_process_and_a_job_without_attempts_left_fails(home):
    job = control.submit(home, slow_text("killed", MAX_ATTEMPTS=1))
    process_of(home, job.uid, ENGINE)
    runner = process_of(home, job.uid, "backend.jobs.runner")
    children = runner.children(recursive=True)
    assert children
    runner.kill()
    ended = until(home, job.uid, lambda j: not j.is_active)
    assert not [p for p in children if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert (ended.state, ended.outcome) == ("failed", "runner_died")
    assert "the runner process died" in ended.reason and "during stage" in ended.reason
    assert not (home.user_data / "jobs" / "Kompress" / "killed").exists()
    assert JobStore(home).leases() == [] and processes_of(job.uid) == []


def test_killing_the_stage_names_the_signal(home):
    job = control.submit(home, slow_text("stage"))
    process_of(home, job.uid, ENGINE).kill()
    ended = until(home, job.uid, lambda j: not j.is_active)
    assert (ended.state, ended.outcome) == ("failed", "engine_crashed")
    assert "signal 9" in ended.reason and "memory" in ended.reason


def weight_digests(folder):
    return {p.name: file_digest(p) for p in sorted(Path(folder).glob("*.safetensors"))}


TWO_METHODS = {
    "ALGORITHM": "Native",
    "llm": {"AutoAWQ": None, "Native": {"METHOD": ["AWQ", "GPTQ"], "W_BIT": 3, "Q_GROUP_SIZE": 64}},
    "CALIBRATION": {"SAMPLES": 48, "SEQUENCE_LENGTH": 256},
    "EVALUATION": {"ENABLED": False},
    "BENCHMARK": {"ENABLED": False},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A job of two configurations that nobody interrupted."""
    home = Home(tmp_path_factory.mktemp("whole"))
    job = until(home, control.submit(home, demo_text("whole", **TWO_METHODS)).uid, lambda j: not j.is_active)
    assert job.state == "succeeded", job.reason
    return job


@pytest.mark.parametrize("victim", [ENGINE, "backend.jobs.runner"])
def test_a_job_killed_after_its_first_layer_goes_on_and_ends_with_the_very_same_weights(home, whole, victim):
    job = control.submit(home, demo_text("killed", **TWO_METHODS))
    deadline = time.monotonic() + 400
    while not (first := control.layer_errors(home, job.uid)):
        assert time.monotonic() < deadline and JobStore(home).get(job.uid).is_active
        time.sleep(0.02)
    assert len({row["layer"] for row in first}) < 3  # the demo model has three
    process_of(home, job.uid, victim).kill()
    done = until(home, job.uid, lambda j: not j.is_active)
    if victim == ENGINE:  # an engine that crashed may crash again: somebody has to resume the job
        assert done.state == "failed" and not (home.root / done.folder).exists()
        control.resume(home, job.uid)
        done = until(home, job.uid, lambda j: not j.is_active)
    assert (done.state, done.attempt) == ("succeeded", 2), done.reason
    assert "goes on after what engine" in control.log_path(home, job.uid).read_text()
    made, expected = results_of(done.result), results_of(whole.result)
    assert [e["name"] for e in made] == [e["name"] for e in expected] and len(made) == 2
    for here, there in zip(made, expected, strict=True):
        assert weight_digests(here["artefact"]) == weight_digests(there["artefact"]) != {}
        assert here["layers"] == there["layers"] and len(here["layers"]) == 3


def test_cancel_while_running_and_while_queued(home):
    running = control.submit(home, slow_text("running"))
    until(home, running.uid, lambda j: j.state == "running")
    queued = control.submit(home, slow_text("queued"))
    until(home, queued.uid, lambda j: j.reason and "waiting" in j.reason)
    assert control.cancel(home, queued.uid).state == "cancelled"
    control.cancel(home, running.uid)
    ended = until(home, running.uid, lambda j: not j.is_active, seconds=120)
    assert ended.state == "cancelled"
    # The runner stores the final state and then ends itself: nothing of the job may be left a moment later.
    _, alive = psutil.wait_procs(descendants(running.uid), timeout=10)
    assert alive == []
    with pytest.raises(JobError, match="already cancelled"):
        control.cancel(home, running.uid)


def test_the_job_goes_on_when_the_process_that_started_it_is_killed(home):
    path = home.root / "job.yaml"
    home.root.mkdir(parents=True)
    path.write_text(demo_text("orphan", EVALUATION={"ENABLED": False}, BENCHMARK={"ENABLED": False}))
    command = [sys.executable, "-m", "backend", "run", str(path), "--home", str(home.root)]
    starter = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not home.jobs_db.exists() or not JobStore(home).jobs(states=("running",)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(starter.pid, signal.SIGKILL)
    starter.wait()
    job = until(home, "orphan", lambda j: not j.is_active)
    assert job.state == "succeeded", job.reason


def test_a_stage_that_fails_after_saving_keeps_the_model(home):
    # The questions have to be fetched, and nobody answers: known only when they are asked for.
    measured = {"PROTOCOLS": [], "TASKS": ["arc_challenge:0:2"], "FIDELITY": False}
    job = control.submit(home, demo_text("late", EVALUATION=measured))
    ended = until(home, job.uid, lambda j: not j.is_active)
    assert ended.state == "failed" and "Evaluate baseline" in ended.reason and "arc_challenge" in ended.reason
    assert ended.artefact and check_manifest(Path(ended.artefact)) == []
