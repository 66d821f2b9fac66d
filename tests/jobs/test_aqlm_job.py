"""AQLM jobs through the real runner: calibrated, checked, saved, tuned, checked, saved; killed in every stage."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from backend.formats.bits import true_bits
from backend.jobs import control
from backend.jobs.publish import check_manifest
from backend.jobs.results import results_of
from backend.jobs.store import JobStore
from backend.paths import PROJECT, Home
from tests.jobs.aqlm_jobs import UNMEASURED, aqlm_text, tiny_model
from tests.jobs.test_job import cli, end_all, process_of, until, weight_digests

CALIBRATE, CONVERT, TUNE = (f"backend.engines.aqlm_{name}" for name in ("calibrate", "convert", "tune"))
RUNNER = "backend.jobs.runner"
ON_THE_DEMO = {"DATASET_NAME": "quantdeck/demo", "PROTOCOLS": ["full_window"], "WINDOW": 64, "TASKS": []}
PATIENCE_S = 1500.0  # of a machine that does much else
FOLDERS = {"calibrated": "tmp/caliberation", "tuned": "tmp/converted"}


pytestmark = pytest.mark.timeout(2 * PATIENCE_S)


@pytest.fixture
def home(home):
    """An empty home; nothing of it works on after the test."""
    yield home
    end_all(home)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model):
    """A job that nobody interrupted."""
    home = Home(tmp_path_factory.mktemp("whole"))
    submitted = control.submit(home, aqlm_text("whole", model, **UNMEASURED))
    job = until(home, submitted.uid, lambda j: not j.is_active, PATIENCE_S)
    assert job.state == "succeeded", job.reason
    yield job
    end_all(home)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A job on the demo model by the command line, with everything measured."""
    home = Home(tmp_path_factory.mktemp("home"))
    path = home.root / "job.yaml"
    bits = {"num_codebooks": 2, "nbits_per_codebook": 8, "nsamples": 24, "model_seqlen": 128}
    path.write_text(
        aqlm_text("small", calibration_config=bits, finetune_config={"model_seqlen": 128, "lr": 0.0003}),
        encoding="utf-8",
    )
    finished = subprocess.run(
        [sys.executable, "-m", "backend", "run", str(path), "--json", "--home", str(home.root)],
        cwd=PROJECT, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    yield home, json.loads(finished.stdout.splitlines()[-1])
    end_all(home)


def entries_of(job):
    return {entry["name"]: entry for entry in results_of(job.result)}


def test_both_models_lie_in_the_guides_folders_and_are_whole(done):
    home, result = done
    folder = home.root / "user_data" / "jobs" / "Kompress" / "small"
    assert [entry["name"] for entry in result["results"]] == list(FOLDERS)
    for entry in result["results"]:
        assert Path(entry["artefact"]) == folder / FOLDERS[entry["name"]]
        assert check_manifest(Path(entry["artefact"])) == []
        stated = json.loads((Path(entry["artefact"]) / "config.json").read_text())["quantization_config"]
        assert (stated["quant_method"], stated["num_codebooks"], stated["nbits_per_codebook"]) == ("aqlm", 2, 8)
        assert entry["manifest"]["configuration"]["name"] == entry["name"]
    text = folder / "tmp" / "tokenized_dataset"
    assert check_manifest(text) == []
    tokens = load_file(text / "tokens.safetensors")
    assert (tuple(tokens["train"].shape), tuple(tokens["validation"].shape)) == ((20, 128), (4, 128))
    assert cli(home, "doctor", "--deep").returncode == 0


def test_the_result_has_base_calibrated_and_tuned_numbers(done):
    home, result = done
    calibrated, tuned = result["results"]
    for entry in (calibrated, tuned):
        rows = {row["metric"]: row for row in entry["rows"]}
        assert {"perplexity", "accuracy", "size", "KL divergence", "bits per weight", "tokens/s"} <= set(rows)
        bits = true_bits(entry["artefact"])
        assert rows["bits per weight"]["quantized"] == pytest.approx(bits) and 2 < bits < 2.6
        assert rows["bits per weight"]["baseline"] == 16
        assert rows["KL divergence"]["baseline"] == 0 < rows["KL divergence"]["quantized"]
    assert tuned["tuning"]["after"] < tuned["tuning"]["before"]
    assert [row["step"] for row in tuned["tuning"]["curve"] if "loss" in row] == list(range(1, 31))
    assert "lowered the divergence" in tuned["notes"][0]
    layers = calibrated["layers"]
    assert len(layers) == 3 and all(layer["error"] <= layer["before_error"] for layer in layers)
    assert any(layer["error"] < layer["before_error"] for layer in layers)
    assert cli(home, "jobs", "--json").returncode == 0
    table = cli(home, "compare", "small").stdout
    assert table.count("calibrated") and table.count("tuned")


def test_what_was_predicted_is_what_came_out(done):
    home, result = done
    shown = cli(home, "validate", str(home.root / "job.yaml")).stdout
    for entry in result["results"]:
        line = next(line for line in shown.splitlines() if line.strip().startswith(f"{entry['label']}:"))
        assert f"{true_bits(entry['artefact']):.2f} bits per weight" in line
        assert f"{entry['bytes'] / 1e6:.1f} MB" in line


def test_pages_and_commands_know_layers_and_steps(done):
    home, _ = done
    rows = control.layer_errors(home, "small")
    assert [row["layer"] for row in rows] == [f"model.layers.{i}" for i in range(3)]
    assert all(row["configuration"] == "calibrated" and row["before_error"] >= row["error"] for row in rows)
    steps = control.tuning_curve(home, "small")
    assert [row["step"] for row in steps] == list(range(31)) and steps[0]["validation"] is not None
    exported = cli(home, "export", "small", "--to", "nyuntam").stdout
    assert "EFFORT" not in exported and "nbits_per_codebook: 8" in exported
    assert cli(home, "export", "small", "--to", "llmcompressor").returncode == 2


def kill(home, uid, module, condition, cursor=0):
    """Wait for an event, then kill a process of the job as `kill -9` does; returns how long the events were then."""
    deadline = time.monotonic() + PATIENCE_S
    while not any(map(condition, control.events(home, uid, cursor)[0])):
        assert time.monotonic() < deadline and JobStore(home).get(uid).is_active, JobStore(home).get(uid).reason
        time.sleep(0.02)
    process_of(home, uid, module).kill()
    return control.events_file(home, uid).stat().st_size


def of(stage, **values):
    return lambda event: event.get("stage") == stage and all(event.get(key) == value for key, value in values.items())


KILLS = (
    (RUNNER, of("download")),
    (RUNNER, of("quantize", step=1)),
    (CALIBRATE, of("quantize", step=2)),
    (CONVERT, of("convert", configuration="calibrated")),
    (TUNE, of("tune", step=3)),
    (RUNNER, of("tune", step=6)),
    (TUNE, of("tune", message="writing the best model")),
    (CONVERT, of("convert", configuration="tuned")),
)


def test_a_job_killed_in_every_stage_ends_with_the_very_same_bytes(home, model, whole):
    job, cursor = control.submit(home, aqlm_text("killed", model, MAX_ATTEMPTS=10, **UNMEASURED)), 0
    for number, (victim, condition) in enumerate(KILLS, 1):
        cursor = kill(home, job.uid, victim, condition, cursor)
        if victim == RUNNER:  # found dead, and started again by itself
            until(home, job.uid, lambda j, n=number: j.attempt > n or not j.is_active, PATIENCE_S)
            continue
        ended = until(home, job.uid, lambda j: not j.is_active, PATIENCE_S)
        assert ended.state == "failed", f"kill {number} came when the program had ended"
        control.resume(home, job.uid)  # a program that crashed may crash again: somebody has to
    ended = until(home, job.uid, lambda j: not j.is_active, PATIENCE_S)
    assert (ended.state, ended.attempt) == ("succeeded", len(KILLS) + 1), ended.reason
    made, there = entries_of(ended), entries_of(whole)
    assert list(made) == list(there) == ["calibrated", "tuned"]
    for name, entry in made.items():
        assert weight_digests(entry["artefact"]) == weight_digests(there[name]["artefact"]) != {}
        assert entry["layers"] == there[name]["layers"]
    assert made["tuned"]["tuning"]["curve"] == there["tuned"]["tuning"]["curve"]
    log = control.log_path(home, job.uid).read_text()
    for stage in ("Calibrate", "Check the checkpoint (calibrated)", "Tune (tuned)"):
        assert f"stage {stage} was done by an earlier attempt" in log


def test_a_calibrated_model_outlives_a_failed_tuning(home, model):
    job = control.submit(home, aqlm_text("late", model, EVALUATION=ON_THE_DEMO, BENCHMARK={"ENABLED": False}))
    kill(home, job.uid, TUNE, of("tune", step=1))
    ended = until(home, job.uid, lambda j: not j.is_active, PATIENCE_S)
    assert ended.state == "failed" and ended.outcome == "engine_crashed"
    assert "1 of 2 configurations could not be made. tuned: stage 'Tune'" in ended.reason
    assert "signal 9" in ended.reason and "All models but tuned are saved" in ended.reason
    (entry,) = results_of(ended.result)
    assert entry["name"] == "calibrated" and check_manifest(Path(entry["artefact"])) == []
    assert {"perplexity", "KL divergence", "bits per weight"} <= {row["metric"] for row in entry["rows"]}


def test_without_tuning_there_is_one_model(home, model):
    job = control.submit(home, aqlm_text("one", model, finetune_config={"max_epochs": 0}, **UNMEASURED))
    ended = until(home, job.uid, lambda j: not j.is_active, PATIENCE_S)
    assert ended.state == "succeeded", ended.reason
    (entry,) = results_of(ended.result)
    folder = home.root / ended.folder / "tmp"
    assert entry["artefact"] == str(folder / "caliberation") == ended.artefact
    assert [path.name for path in folder.iterdir()] == ["caliberation"]
