"""Several configurations, trouble in every place, and going on after it: the real runner with quick fake programs."""

from pathlib import Path

import pytest

from backend import cli
from backend.errors import JobError
from backend.jobs import control
from backend.jobs.publish import check_manifest
from backend.jobs.results import results_of
from tests.jobs.harness import weights


def test_each_configuration_is_saved_measured_and_reported(jobs):
    job = jobs.until(jobs.start({"name": "w4"}, {"name": "w3"}, measure=True))
    assert job.state == "succeeded", job.reason
    folder = jobs.home.user_data / "jobs" / "Kompress" / "job"
    assert sorted(p.name for p in folder.iterdir()) == ["w3", "w4"]
    entries = results_of(job.result)
    assert [(e["name"], e["label"], e["artefact"]) for e in entries] == [
        ("w4", "W4", str(folder / "w4")),
        ("w3", "W3", str(folder / "w3")),
    ]
    for entry in entries:
        assert check_manifest(Path(entry["artefact"])) == []
        assert entry["manifest"]["configuration"]["name"] == entry["name"]
        assert [r["metric"] for r in entry["rows"]] == ["perplexity", "KL divergence", "size", "tokens/s"]
        assert entry["table"].startswith("| Model") and len(entry["layers"]) == 4
        assert entry["skipped"] == {"lm_head": "is to be kept"} and entry["notes"] == [f"note of {entry['name']}"]
        assert entry["bytes"] == 128
    assert {k: job.result[k] for k in ("artefact", "rows", "layers")} == {
        k: entries[0][k] for k in ("artefact", "rows", "layers")
    }
    assert job.artefact == str(folder / "w4")
    timings = job.result["timings"]
    for stage in ("publish", "evaluate_quantized", "evaluate_fidelity", "benchmark"):
        each = timings[stage]["configurations"]
        assert set(each) == {"w4", "w3"}
        assert timings[stage]["wall_s"] == pytest.approx(sum(one["wall_s"] for one in each.values()), abs=0.002)
    assert (
        not (jobs.home.run_dir(job.uid) / "checkpoint").exists()
        and not (jobs.home.run_dir(job.uid) / "ballast").exists()
    )


def test_a_single_configuration_looks_as_it_always_did(jobs):
    job = jobs.until(jobs.start({"name": "w4"}, measure=True))
    folder = jobs.home.user_data / "jobs" / "Kompress" / "job"
    assert job.state == "succeeded" and job.artefact == str(folder) and (folder / "model.safetensors").exists()
    assert all(set(t) == {"wall_s", "cpu_s"} for t in job.result["timings"].values())
    assert len(job.result["results"]) == 1


@pytest.mark.parametrize("trouble", ["die_at", "full_at"])
def test_the_engine_goes_on_after_its_last_layer_and_makes_the_same_bytes(jobs, trouble):
    broken = jobs.start({"name": "w4", "settings": {trouble: 2}}, {"name": "w3"}, name="broken")
    ended = jobs.until(broken)
    assert ended.outcome == {"die_at": "engine_crashed", "full_at": "disk_full"}[trouble]
    assert ended.state == "failed" and not Path(jobs.home.root / ended.folder).exists()
    if trouble == "full_at":
        assert "no space left" in ended.reason and "are free" in ended.reason and "resume" in ended.reason
        assert "out.tmp" in ended.reason and "more are needed" in ended.reason
    done = jobs.resume(broken)
    assert (done.state, done.attempt, done.job_id) == ("succeeded", 2, "broken"), done.reason
    assert jobs.calls(broken) == [0, 2]
    assert "goes on after what engine" in jobs.log(broken)
    whole = jobs.until(jobs.start({"name": "w4", "settings": {}}, {"name": "w3"}, name="whole"))
    for name in ("w4", "w3"):
        assert weights(jobs.home.root / done.folder / name) == weights(jobs.home.root / whole.folder / name)
    assert len(done.result["layers"]) == 4
    history = [(e["from_state"], e["to_state"], e["attempt"]) for e in jobs.store.history(broken.uid)]
    assert history == [
        (None, "queued", 1), ("queued", "starting", 1), ("starting", "running", 1), ("running", "failed", 1),
        ("failed", "queued", 2), ("queued", "starting", 2), ("starting", "running", 2), ("running", "succeeded", 2),
    ]  # fmt: skip


def test_an_engine_that_keeps_nothing_starts_again(jobs):
    job = jobs.until(jobs.start({"name": "w4", "settings": {"die_at": 2, "keeps_layers": False}}))
    assert job.state == "failed" and "signal 9" in job.reason
    assert jobs.resume(job).state == "succeeded"
    assert jobs.calls(job) == [0, 0]
    assert "starts from the beginning" in jobs.log(job)


def test_a_killed_runner_is_found_and_its_job_goes_on(jobs):
    job = jobs.start({"name": "w4", "settings": {"sleep_at": 3}})
    jobs.at_layer(job, 3)
    with pytest.raises(JobError, match="is running; only a failed"):
        control.resume(jobs.home, job.uid)
    jobs.runner(job).kill()
    with open(jobs.home.run_dir(job.uid) / "events.jsonl", "ab") as file:
        file.write(b'{"stage": "quanti')  # as a killed program may leave it
    done = jobs.until(job)
    assert (done.state, done.attempt) == ("succeeded", 2) and jobs.calls(job) == [0, 3]
    lost = [e for e in jobs.store.history(job.uid) if e["to_state"] == "lost"]
    assert len(lost) == 1 and "the runner process died" in lost[0]["reason"]
    rows = control.layer_errors(jobs.home, job.uid)
    assert [r["layer"] for r in rows] == [f"model.layers.{i}" for i in range(4)]


def test_a_cancelled_job_goes_on(jobs):
    job = jobs.start({"name": "w4", "settings": {"sleep_at": 1}})
    jobs.until(job, lambda j: j.progress.get("step") == 1)
    control.cancel(jobs.home, job.uid)
    assert jobs.until(job).state == "cancelled"
    assert jobs.resume(job).state == "succeeded" and jobs.calls(job) == [0, 1]
    with pytest.raises(JobError, match="is succeeded"):
        control.resume(jobs.home, job.uid)


def test_one_failed_measurement_spares_the_others_and_is_all_that_is_made_up_for(jobs):
    job = jobs.start({"name": "w4"}, {"name": "w3"}, {"name": "w2"}, measure=True)
    jobs.home.run_dir(job.uid).mkdir(parents=True, exist_ok=True)
    (jobs.home.run_dir(job.uid) / "fail.json").write_text('["w3"]')
    ended = jobs.until(job)
    assert ended.state == "failed" and "w3: stage 'Evaluate quantized': no luck with w3" in ended.reason
    entries = {e["name"]: e for e in results_of(ended.result)}
    assert [r["metric"] for r in entries["w3"]["rows"]] == ["size"] and "no luck" in entries["w3"]["reason"]
    for name in ("w4", "w2"):
        assert len(entries[name]["rows"]) == 4 and entries[name]["reason"] is None
    assert all(check_manifest(Path(e["artefact"])) == [] for e in entries.values())
    (jobs.home.run_dir(job.uid) / "fail.json").unlink()
    before = ended.result["timings"]["evaluate_quantized"]["configurations"]["w4"]
    done = jobs.resume(job)
    assert done.state == "succeeded", done.reason
    assert jobs.calls(job) == [0]
    assert done.result["timings"]["evaluate_quantized"]["configurations"]["w4"] == before
    assert all(len(e["rows"]) == 4 and e["reason"] is None for e in results_of(done.result))
    told = jobs.log(job)
    assert "stage Evaluate quantized (w4) was done by an earlier attempt" in told
    assert "stage Evaluate quantized (w3) was done by an earlier attempt" not in told


def test_a_comparison_of_outputs_that_was_killed_is_all_that_is_made_up_for(jobs):
    job = jobs.start({"name": "w4"}, {"name": "w3"}, measure=True)
    jobs.home.run_dir(job.uid).mkdir(parents=True, exist_ok=True)
    (jobs.home.run_dir(job.uid) / "deadly.json").write_text('["w3"]')
    ended = jobs.until(job)
    assert ended.state == "failed" and "w3: stage 'Compare outputs'" in ended.reason and "signal 9" in ended.reason
    w4, w3 = results_of(ended.result)
    assert [r["metric"] for r in w4["rows"]] == ["perplexity", "KL divergence", "size", "tokens/s"]
    assert [r["metric"] for r in w3["rows"]] == ["perplexity", "size"]
    (jobs.home.run_dir(job.uid) / "deadly.json").unlink()
    done = jobs.resume(job)
    assert done.state == "succeeded", done.reason
    assert [len(entry["rows"]) for entry in results_of(done.result)] == [4, 4]
    told = jobs.log(job)
    assert told.count("stage Compare outputs (w4): tests.jobs.fake") == 1
    assert told.count("stage Compare outputs (w3): tests.jobs.fake") == 2
    assert told.count("stage Evaluate quantized (w3): tests.jobs.fake") == 1


def test_other_inputs_are_never_mixed_with_earlier_layers(jobs, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"one")
    job = jobs.start({"name": "w4", "settings": {"die_at": 2}}, model_dir=str(model))
    assert jobs.until(job).state == "failed"
    (model / "model.safetensors").write_bytes(b"two")
    assert jobs.resume(job).state == "succeeded"
    assert jobs.calls(job) == [0, 0]
    assert "the model, the text or a package has changed" in jobs.log(job)


def test_a_saved_model_is_not_overwritten_by_one_from_other_inputs(jobs, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"one")
    job = jobs.start({"name": "w4"}, {"name": "w3"}, measure=True, model_dir=str(model))
    jobs.home.run_dir(job.uid).mkdir(parents=True, exist_ok=True)
    (jobs.home.run_dir(job.uid) / "fail.json").write_text('["w3"]')
    ended = jobs.until(job)
    saved = weights(Path(ended.artefact))
    (model / "model.safetensors").write_bytes(b"two")
    again = jobs.resume(job)
    assert again.state == "failed" and "made from other inputs" in again.reason and "Clone" in again.reason
    assert weights(Path(ended.artefact)) == saved


def test_a_model_that_was_removed_after_saving_is_made_again(jobs):
    job = jobs.start({"name": "w4"}, {"name": "w3"}, measure=True)
    jobs.home.run_dir(job.uid).mkdir(parents=True, exist_ok=True)
    (jobs.home.run_dir(job.uid) / "fail.json").write_text('["w3"]')
    folder = jobs.home.root / jobs.until(job).folder
    before = weights(folder / "w4")
    for file in (folder / "w4").iterdir():
        file.unlink()
    (folder / "w4").rmdir()
    (jobs.home.run_dir(job.uid) / "fail.json").unlink()
    assert jobs.resume(job).state == "succeeded"
    assert weights(folder / "w4") == before and check_manifest(folder / "w3") == []


def test_the_command_resumes_and_prints_all_configurations(jobs, capsys):
    job = jobs.until(jobs.start({"name": "w4", "settings": {"die_at": 1}}, {"name": "w3"}, measure=True))
    assert job.state == "failed"
    capsys.readouterr()
    assert cli.main(["resume", "job", "--home", str(jobs.home.root)]) == 0
    out, err = capsys.readouterr()
    assert "attempt 2" in err and "[w3]" in err
    assert "model.layers.1" in err and "model.layers.0" not in err  # that one was shown by the first attempt
    lines = out.splitlines()
    assert lines[0].startswith("| Configuration") and "Perplexity, gptq ↓" in lines[0]
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["Baseline, 16 bit", "W4", "W3"]
    assert "2.60 (+0.10)" in lines[3] and "20.0 (+100 %)" in lines[3]
    assert f"Quantized model w3: {jobs.home.root / job.folder / 'w3'}" in out
    assert cli.main(["resume", "job", "--home", str(jobs.home.root)]) == 1
    assert "only a failed or cancelled job can be resumed" in capsys.readouterr().err
    assert cli.main(["compare", "job", "--home", str(jobs.home.root)]) == 0
    assert "| job / w3 |" in capsys.readouterr().out


def test_of_two_resumes_at_once_one_counts(jobs):
    job = jobs.until(jobs.start({"name": "w4", "settings": {"die_at": 1}}))
    store = jobs.store
    assert store.resume(job.uid, actor="user", attempt=1) and not store.resume(job.uid, actor="user", attempt=1)
    again = store.get(job.uid)
    assert (again.state, again.attempt, again.reason, again.finished_at) == ("queued", 2, None, None)


def test_measuring_again_measures_everything_and_keeps_the_model(jobs):
    done = jobs.until(jobs.start({"name": "w4"}, measure=True))
    assert done.state == "succeeded", done.reason
    before, manifest = weights(jobs.folder(done)), done.result["manifest"]
    with pytest.raises(JobError):
        control.resume(jobs.home, done.uid)
    again = jobs.resume(done, redo="measure")
    assert (again.state, again.attempt) == ("succeeded", 2), again.reason
    assert weights(jobs.folder(done)) == before and again.result["manifest"] == manifest and jobs.calls(done) == [0]
    told = jobs.log(done)
    for stage in ("Evaluate baseline", "Evaluate quantized", "Compare outputs", "Benchmark"):
        assert told.count(f"stage {stage}: tests.jobs.fake") == 2
    assert "stage Quantize was done by an earlier attempt" in told
    assert len(again.result["rows"]) == len(done.result["rows"]) == 4


def test_measuring_again_goes_on_where_it_died(jobs):
    job = jobs.until(jobs.start({"name": "w4"}, {"name": "w3"}, measure=True))
    (jobs.home.run_dir(job.uid) / "fail.json").write_text('["w3"]')
    again = jobs.resume(job, redo="measure")
    assert again.state == "failed" and again.outcome == "engine_failed" and "no luck with w3" in again.reason
    (jobs.home.run_dir(job.uid) / "fail.json").unlink()
    assert jobs.resume(job).state == "succeeded"
    assert jobs.log(job).count("stage Evaluate quantized (w4): tests.jobs.fake") == 2
    assert jobs.resume(job, redo="measure").state == "succeeded"
    assert jobs.log(job).count("stage Evaluate quantized (w4): tests.jobs.fake") == 3
