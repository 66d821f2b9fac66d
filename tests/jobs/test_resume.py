"""Several configurations, trouble in every place, and going on after it: the real runner with quick fake programs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from backend import cli
from backend.errors import JobError
from backend.jobs import control
from backend.jobs.publish import check_manifest
from backend.jobs.results import results_of
from backend.jobs.store import JobStore
from backend.paths import PROJECT
from backend.process import lock_is_held
from backend.schema import parse_yaml
from tests.conftest import demo_text


@pytest.fixture
def start(home, monkeypatch):
    """Creates a job of these configurations and starts its runner, which uses the fake programs."""

    def launch(home, uid):
        home.run_dir(uid).mkdir(parents=True, exist_ok=True)
        with open(home.run_dir(uid) / "runner.out", "ab") as out:
            command = [sys.executable, "-m", "tests.jobs.fake_runner", str(home.root), uid]
            subprocess.Popen(command, cwd=PROJECT, stdout=out, stderr=out, start_new_session=True)

    monkeypatch.setattr(control, "launch", launch)

    def start(*configurations, name="job", measure=False, **more):
        home.root.mkdir(parents=True, exist_ok=True)
        (home.root / "fake.json").write_text(json.dumps({"configurations": configurations, **more}))
        on = {"EVALUATION": {"TASKS": []}, "BENCHMARK": {}} if measure else {}
        off = {"EVALUATION": {"ENABLED": False}, "BENCHMARK": {"ENABLED": False}}
        text = demo_text(name, **(on or off))
        job = JobStore(home).create(text, parse_yaml(text).config, device="cpu")
        launch(home, job.uid)
        return job

    return start


def until(home, uid, condition=lambda job: not job.is_active, seconds=60.0):
    deadline = time.monotonic() + seconds
    while True:
        job = JobStore(home).get(uid)
        if condition(job):
            return job
        told = (home.run_dir(uid) / "runner.out").read_text()
        assert time.monotonic() < deadline, f"job is {job.state}, {job.progress}, {job.reason}\n{told}"
        time.sleep(0.1)


def resumed(home, uid):
    control.resume(home, uid)
    return until(home, uid)


def calls(home, uid):
    """With how many layers done the engine started, each time."""
    return json.loads((home.run_dir(uid) / "calls.json").read_text())


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def processes(*words):
    return [p for p in psutil.process_iter(["cmdline"]) if set(words) <= set(p.info["cmdline"] or [])]


def log_of(home, uid):
    return control.log_path(home, uid).read_text()


def test_each_configuration_is_saved_measured_and_reported(home, start):
    job = until(home, start({"name": "w4"}, {"name": "w3"}, measure=True).uid)
    assert job.state == "succeeded", job.reason
    folder = home.user_data / "jobs" / "Kompress" / "job"
    assert sorted(p.name for p in folder.iterdir()) == ["w3", "w4"]
    entries = results_of(job.result)
    assert [(e["name"], e["label"], e["artefact"]) for e in entries] == [
        ("w4", "W4", str(folder / "w4")),
        ("w3", "W3", str(folder / "w3")),
    ]
    for entry in entries:
        assert check_manifest(Path(entry["artefact"])) == []
        assert entry["manifest"]["configuration"]["name"] == entry["name"]
        assert [r["metric"] for r in entry["rows"]] == ["perplexity", "size", "tokens/s"]
        assert entry["table"].startswith("| Model") and len(entry["layers"]) == 4
        assert entry["skipped"] == {"lm_head": "is to be kept"} and entry["notes"] == [f"note of {entry['name']}"]
        assert entry["bytes"] == 128
    assert {k: job.result[k] for k in ("artefact", "rows", "layers")} == {
        k: entries[0][k] for k in ("artefact", "rows", "layers")
    }
    assert job.artefact == str(folder / "w4")
    timings = job.result["timings"]
    for stage in ("publish", "evaluate_quantized", "benchmark"):
        each = timings[stage]["configurations"]
        assert set(each) == {"w4", "w3"}
        assert timings[stage]["wall_s"] == pytest.approx(sum(one["wall_s"] for one in each.values()), abs=0.002)
    assert not (home.run_dir(job.uid) / "checkpoint").exists() and not (home.run_dir(job.uid) / "ballast").exists()


def test_a_single_configuration_looks_as_it_always_did(home, start):
    job = until(home, start({"name": "w4"}, measure=True).uid)
    folder = home.user_data / "jobs" / "Kompress" / "job"
    assert job.state == "succeeded" and job.artefact == str(folder) and (folder / "model.safetensors").exists()
    assert all(set(t) == {"wall_s", "cpu_s"} for t in job.result["timings"].values())
    assert len(job.result["results"]) == 1


@pytest.mark.parametrize("trouble", ["die_at", "full_at"])
def test_the_engine_goes_on_after_its_last_layer_and_makes_the_same_bytes(home, start, trouble):
    broken = start({"name": "w4", "settings": {trouble: 2}}, {"name": "w3"}, name="broken")
    ended = until(home, broken.uid)
    assert ended.state == "failed" and not Path(home.root / ended.folder).exists()
    if trouble == "full_at":
        assert "no space left" in ended.reason and "are free" in ended.reason and "resume" in ended.reason
        assert "out.tmp" in ended.reason and "more are needed" in ended.reason
    done = resumed(home, broken.uid)
    assert (done.state, done.attempt, done.job_id) == ("succeeded", 2, "broken"), done.reason
    assert calls(home, broken.uid) == [0, 2]
    assert "goes on after what engine" in log_of(home, broken.uid)
    whole = until(home, start({"name": "w4", "settings": {}}, {"name": "w3"}, name="whole").uid)
    for name in ("w4", "w3"):
        assert weights(home.root / done.folder / name) == weights(home.root / whole.folder / name)
    assert len(done.result["layers"]) == 4
    history = [(e["from_state"], e["to_state"], e["attempt"]) for e in JobStore(home).history(broken.uid)]
    assert history == [
        (None, "queued", 1), ("queued", "running", 1), ("running", "failed", 1),
        ("failed", "queued", 2), ("queued", "running", 2), ("running", "succeeded", 2),
    ]  # fmt: skip


def test_an_engine_that_keeps_nothing_starts_again(home, start):
    job = until(home, start({"name": "w4", "settings": {"die_at": 2, "keeps_layers": False}}).uid)
    assert job.state == "failed" and "signal 9" in job.reason
    assert resumed(home, job.uid).state == "succeeded"
    assert calls(home, job.uid) == [0, 0]
    assert "starts from the beginning" in log_of(home, job.uid)


def test_a_killed_runner_is_found_and_its_job_goes_on(home, start):
    job = start({"name": "w4", "settings": {"sleep_at": 3}})
    until(home, job.uid, lambda j: j.progress.get("step") == 3)
    with pytest.raises(JobError, match="is running; only a failed"):
        control.resume(home, job.uid)
    (runner,) = processes("tests.jobs.fake_runner", job.uid)
    children = runner.children(recursive=True)
    runner.kill()
    psutil.wait_procs([runner, *children], timeout=10)
    events = home.run_dir(job.uid) / "events.jsonl"
    with open(events, "ab") as file:
        file.write(b'{"stage": "quanti')  # as a killed program may leave it
    assert control.reconcile(home) == [job.uid]
    assert "died" in JobStore(home).get(job.uid).reason
    done = resumed(home, job.uid)
    assert done.state == "succeeded" and calls(home, job.uid) == [0, 3]
    rows = control.layer_errors(home, job.uid)
    assert [r["layer"] for r in rows] == [f"model.layers.{i}" for i in range(4)]


def test_a_cancelled_job_goes_on(home, start):
    job = start({"name": "w4", "settings": {"sleep_at": 1}})
    until(home, job.uid, lambda j: j.progress.get("step") == 1)
    control.cancel(home, job.uid)
    assert until(home, job.uid).state == "cancelled"
    assert resumed(home, job.uid).state == "succeeded" and calls(home, job.uid) == [0, 1]
    with pytest.raises(JobError, match="is succeeded"):
        control.resume(home, job.uid)


def test_one_failed_measurement_spares_the_others_and_is_all_that_is_made_up_for(home, start):
    job = start({"name": "w4"}, {"name": "w3"}, {"name": "w2"}, measure=True)
    home.run_dir(job.uid).mkdir(parents=True, exist_ok=True)
    (home.run_dir(job.uid) / "fail.json").write_text('["w3"]')
    ended = until(home, job.uid)
    assert ended.state == "failed" and "w3: stage 'Evaluate quantized': no luck with w3" in ended.reason
    entries = {e["name"]: e for e in results_of(ended.result)}
    assert [r["metric"] for r in entries["w3"]["rows"]] == ["size"] and "no luck" in entries["w3"]["reason"]
    for name in ("w4", "w2"):
        assert len(entries[name]["rows"]) == 3 and entries[name]["reason"] is None
    assert all(check_manifest(Path(e["artefact"])) == [] for e in entries.values())
    (home.run_dir(job.uid) / "fail.json").unlink()
    before = ended.result["timings"]["evaluate_quantized"]["configurations"]["w4"]
    done = resumed(home, job.uid)
    assert done.state == "succeeded", done.reason
    assert calls(home, job.uid) == [0]
    assert done.result["timings"]["evaluate_quantized"]["configurations"]["w4"] == before
    assert all(len(e["rows"]) == 3 and e["reason"] is None for e in results_of(done.result))
    told = log_of(home, job.uid)
    assert "stage Evaluate quantized (w4) was done by an earlier attempt" in told
    assert "stage Evaluate quantized (w3) was done by an earlier attempt" not in told


def test_other_inputs_are_never_mixed_with_earlier_layers(home, start, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"one")
    job = start({"name": "w4", "settings": {"die_at": 2}}, model_dir=str(model))
    assert until(home, job.uid).state == "failed"
    (model / "model.safetensors").write_bytes(b"two")
    assert resumed(home, job.uid).state == "succeeded"
    assert calls(home, job.uid) == [0, 0]
    assert "the model, the text or a package has changed" in log_of(home, job.uid)


def test_a_saved_model_is_not_overwritten_by_one_from_other_inputs(home, start, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"one")
    job = start({"name": "w4"}, {"name": "w3"}, measure=True, model_dir=str(model))
    home.run_dir(job.uid).mkdir(parents=True, exist_ok=True)
    (home.run_dir(job.uid) / "fail.json").write_text('["w3"]')
    ended = until(home, job.uid)
    saved = weights(Path(ended.artefact))
    (model / "model.safetensors").write_bytes(b"two")
    again = resumed(home, job.uid)
    assert again.state == "failed" and "made from other inputs" in again.reason and "Clone" in again.reason
    assert weights(Path(ended.artefact)) == saved


def test_a_model_that_was_removed_after_saving_is_made_again(home, start):
    job = start({"name": "w4"}, {"name": "w3"}, measure=True)
    home.run_dir(job.uid).mkdir(parents=True, exist_ok=True)
    (home.run_dir(job.uid) / "fail.json").write_text('["w3"]')
    folder = home.root / until(home, job.uid).folder
    before = weights(folder / "w4")
    for file in (folder / "w4").iterdir():
        file.unlink()
    (folder / "w4").rmdir()
    (home.run_dir(job.uid) / "fail.json").unlink()
    assert resumed(home, job.uid).state == "succeeded"
    assert weights(folder / "w4") == before and check_manifest(folder / "w3") == []


def test_the_command_resumes_and_prints_all_configurations(home, start, capsys):
    job = until(home, start({"name": "w4", "settings": {"die_at": 1}}, {"name": "w3"}, measure=True).uid)
    assert job.state == "failed"
    capsys.readouterr()
    assert cli.main(["resume", "job", "--home", str(home.root)]) == 0
    out, err = capsys.readouterr()
    assert "attempt 2" in err and "[w3]" in err
    assert "model.layers.1" in err and "model.layers.0" not in err  # that one was shown by the first attempt
    lines = out.splitlines()
    assert lines[0].startswith("| Configuration") and "Perplexity, gptq ↓" in lines[0]
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["Baseline, 16 bit", "W4", "W3"]
    assert "2.60 (+0.10)" in lines[3] and "20.0 (+100 %)" in lines[3]
    assert f"Quantized model w3: {home.root / job.folder / 'w3'}" in out
    assert cli.main(["resume", "job", "--home", str(home.root)]) == 1
    assert "only a failed or cancelled job can be resumed" in capsys.readouterr().err
    assert cli.main(["compare", "job", "--home", str(home.root)]) == 0
    assert "| job / w3 |" in capsys.readouterr().out


def test_of_two_resumes_at_once_one_counts(home, start):
    job = until(home, start({"name": "w4", "settings": {"die_at": 1}}).uid)
    store = JobStore(home)
    assert store.resume(job.uid, actor="user", attempt=1) and not store.resume(job.uid, actor="user", attempt=1)
    again = store.get(job.uid)
    assert (again.state, again.attempt, again.reason, again.finished_at) == ("queued", 2, None, None)


def test_a_disk_that_is_really_full_fails_the_job_with_that_reason_and_resume_works(home, start):
    home.root.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(home.root)], capture_output=True)
    if os.geteuid() or mounted.returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        job = start({"name": "w4", "settings": {"sleep_at": 2}})
        until(home, job.uid, lambda j: j.progress.get("step") == 2)
        filler = home.root / "filler"
        with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(b"x" * 4096)
        (engine,) = processes("tests.jobs.fake", str(home.run_dir(job.uid) / "requests" / "quantize.json"))
        engine.send_signal(signal.SIGKILL)
        ended = until(home, job.uid)
        assert ended.state == "failed" and "no space left" in ended.reason
        filler.unlink()
        assert resumed(home, job.uid).state == "succeeded"
        assert check_manifest(home.root / ended.folder) == []
        until(home, job.uid, lambda j: not lock_is_held(home.run_dir(job.uid) / "runner.lock"))
    finally:
        subprocess.run(["umount", "-l", str(home.root)], check=False)
