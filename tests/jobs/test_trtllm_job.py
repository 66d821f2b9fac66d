"""TensorRT-LLM jobs on the demo model through the real runner and the real nvidia-modelopt, and what runs afterwards.

Nothing here has a GPU: a job goes up to its honest boundary. What lies behind it is done by the job's own stages with
stand-ins for docker, TensorRT-LLM's programs and the GPU.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from backend.engines.configurations import configurations
from backend.engines.trtllm_handover import SCRIPT
from backend.formats.bits import measured_bits
from backend.formats.size import weight_bytes
from backend.jobs import control
from backend.jobs.preflight import check_job
from backend.jobs.publish import check_manifest
from backend.jobs.results import results_of
from backend.jobs.run import Run
from backend.jobs.stages import stages_of
from backend.jobs.store import JobStore
from backend.jobs.trtllm_metrics import guide_rows
from backend.jobs.trtllm_stages import RESULT_FOLDER
from backend.paths import PROJECT, Home
from backend.schema import parse_yaml
from tests.conftest import demo_text
from tests.jobs.test_job import cli, end_all, process_of, until
from tests.tensorrt_llm.fakes import IMAGE, Fakes

PATIENCE_S = 900.0
METHODS = ["int4_awq", "fp8", "smoothquant", "int8"]
SECTION = {
    "quant_method": METHODS, "calib_size": 6, "max_seq_length": 64, "AWQ_ALPHA_STEP": 0.5, "max_input_len": 512,
    "max_output_len": 64, "REQUESTS": 4, "CONCURRENCY": 2,
}  # fmt: skip
EVALUATION = {"PROTOCOLS": ["full_window"], "WINDOW": 128, "MAX_WINDOWS": 4, "TASKS": [], "FIDELITY_WINDOWS": 4}
LIMITS = {"int4_awq": 0.03, "fp8": 0.01, "smoothquant": 0.02, "int8": 0.001}
"""KL divergence from the base model, nats per token: some times what each method costs on the demo model."""

pytestmark = pytest.mark.timeout(2 * PATIENCE_S)


def trtllm_text(job_id: str, section=None, **changes) -> str:
    llm = {"AutoAWQ": None, "TensorRTLLM": {**SECTION, **(section or {})}}
    values = {"ALGORITHM": "TensorRTLLM", "CALIBRATION": None, "EVALUATION": EVALUATION, **changes}
    return demo_text(job_id, llm=llm, **values)


@pytest.fixture
def home(home):
    """An empty home; nothing of it works on after the test."""
    yield home
    end_all(home)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A job with all four methods of the guide, from the command line."""
    home = Home(tmp_path_factory.mktemp("home"))
    path = home.root / "job.yaml"
    path.write_text(trtllm_text("four"), encoding="utf-8")
    finished = cli(home, "run", str(path))
    job = JobStore(home).get("four")
    assert job.state == "succeeded", (job.reason, finished.stderr)
    yield home, job, finished
    end_all(home)


def test_every_method_is_quantized_exported_measured_and_says_what_was_not_possible(done):
    home, job, finished = done
    entries = {entry["name"]: entry for entry in results_of(job.result)}
    assert list(entries) == METHODS
    for name, entry in entries.items():
        folder = Path(entry["artefact"])
        assert check_manifest(folder) == []
        rows = {row["metric"]: row for row in entry["rows"]}
        assert 0 < rows["KL divergence"]["quantized"] < LIMITS[name], name
        assert rows["perplexity"]["quantized"] == pytest.approx(rows["perplexity"]["baseline"], rel=0.05)
        assert rows["size"]["quantized"] * 1e6 == pytest.approx(weight_bytes(folder))
        assert "tokens/s" not in rows  # none is invented
        assert "modelopt" in entry["decode_path"] or "int4 kernel" in entry["decode_path"]
        assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= set(entry["manifest"]["files"])
        assert "no NVIDIA GPU" in entry["ran"]["obstacles"][0]["reason"]
        assert len(entry["layers"]) == 3 and all(0 < layer["error"] < 0.3 for layer in entry["layers"])
        assert entry["skipped"] == {"lm_head": "modelopt's configuration leaves it out"}
        assert entry["check"]["linear_difference"] < 0.02
    assert "is not possible on this machine" in job.reason and "no NVIDIA GPU" in job.reason
    assert "no NVIDIA GPU" in finished.stdout and SCRIPT in finished.stdout


def test_sizes_and_bits_were_foretold_exactly(done):
    home, job, _ = done
    checked = check_job(parse_yaml(trtllm_text("again")).config, home)
    for entry in results_of(job.result):
        folder = Path(entry["artefact"])
        assert checked.predicted[entry["name"]] == weight_bytes(folder)
        assert checked.bits[entry["name"]] == pytest.approx(measured_bits(folder).quantized)


def test_methods_of_the_engine_bring_its_checkpoint_and_the_others_do_not(done):
    _, job, _ = done
    for entry in results_of(job.result):
        checkpoint = Path(entry["artefact"]) / "tensorrt_llm_checkpoint"
        assert checkpoint.is_dir() == (entry["name"] in ("smoothquant", "int8"))
        if checkpoint.is_dir():
            config = json.loads((checkpoint / "config.json").read_text())
            assert config["rotary_base"] == 10000.0 and config["mapping"]["tp_size"] == 1
            assert "tensorrt_llm_checkpoint/rank0.safetensors" in entry["manifest"]["files"]
        hf = json.loads((Path(entry["artefact"]) / "config.json").read_text())
        assert hf["rope_theta"] == 10000.0 and hf["quantization_config"]["quant_method"] == "modelopt"
        assert hf["dtype"] == "float16"


def test_the_script_runs_the_rest_where_docker_is(done, tmp_path, monkeypatch):
    _, job, _ = done
    entry = next(entry for entry in results_of(job.result) if entry["name"] == "smoothquant")
    folder = tmp_path / "elsewhere"
    subprocess.run(["cp", "-r", entry["artefact"], str(folder)], check=True)
    fakes = Fakes(tmp_path)
    script = folder / SCRIPT
    script.write_text(script.read_text().replace("nvcr.io/nvidia/tensorrt-llm/release:1.2.1", IMAGE))
    path = os.pathsep.join([str(Path(fakes.docker).parent), os.environ["PATH"]])
    ran = subprocess.run(["sh", str(script)], env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert [call[0] for call in fakes.calls() if call[0] != "docker"] == [
        "trtllm-build", "trtllm-bench", "trtllm-bench", "trtllm-build", "python3",
    ]  # fmt: skip
    assert (folder / "tensorrt_llm_engine/rank0.engine").is_file()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with a GPU and docker, both made for the test."""
    fakes = Fakes(tmp_path)
    gpus = tmp_path / "gpus.json"
    gpus.write_text(json.dumps([{"uuid": "GPU-1", "name": "H100", "used_bytes": 0, "capability": [9, 0]}]))
    monkeypatch.setenv("QUANTDECK_FAKE_GPUS", str(gpus))
    return fakes


def prepared(done, fakes: Fakes, name: str):
    """The stage that runs one result, in an attempt of the finished job that has the GPU."""
    home, job, _ = done
    (home.root / "quantdeck.toml").write_text(f'[tensorrt_llm]\nimage = "{IMAGE}"\ndocker = "{fakes.docker}"\n')
    config = parse_yaml(job.config_yaml).config
    run = Run(home, replace(job, device="cuda:0"), config, home.run_dir(job.uid), tuple(configurations(config)))
    run.result = json.loads(json.dumps(job.result))
    named = [one for one in stages_of(run) if one.name == "benchmark" and one.configuration.name == name]
    return run, named[0]


def test_a_machine_with_a_gpu_runs_the_result_and_saves_what_came_of_it(done, machine):
    run, stage = prepared(done, machine, "int4_awq")
    command = stage.command(run)
    assert command is not None
    subprocess.run(command.argv, cwd=PROJECT, check=True, capture_output=True)
    stage.finish(run)
    entry = run.entry(stage.configuration)
    folder = Path(entry["artefact"]) / RESULT_FOLDER
    assert check_manifest(folder) == [] and check_manifest(Path(entry["artefact"])) == []
    assert (folder / "quantized_single.json").is_file()
    assert stage.intact(run)
    report = next(one for one in stages_of(run) if one.name == "report")
    report.finish(run)
    entry = run.entry(stage.configuration)
    assert [row.which for row in guide_rows(entry["ran"])] == ["baseline", "quantized"]
    (row,) = [row for row in guide_rows(entry["ran"]) if row.which == "quantized"]
    assert (row.decode_tokens_s, row.load_tokens_s) == (120.0, 200.0)  # what the stand-in reports
    assert row.weight_bytes == weight_bytes(Path(entry["artefact"]))
    names = {row["name"] for row in entry["rows"] if row["metric"] in ("tokens/s", "perplexity")}
    assert {"Decode in TensorRT-LLM (8 tokens)", "2 requests at a time in TensorRT-LLM"} <= names
    measured = next(row for row in entry["rows"] if "gptq windows in TensorRT-LLM" in row["name"])
    assert measured["quantized"] == pytest.approx(2.718281828**2) and measured["interval"] is not None
    assert "incomplete" not in run.result or "int4_awq:" not in run.result["incomplete"]


def test_an_engine_is_built_measured_and_saved(done, machine):
    run, stage = prepared(done, machine, "int8")
    subprocess.run(stage.command(run).argv, cwd=PROJECT, check=True, capture_output=True)
    stage.finish(run)
    folder = Path(run.entry(stage.configuration)["artefact"]) / RESULT_FOLDER
    assert (folder / "tensorrt_llm_engine/rank0.engine").is_file() and check_manifest(folder) == []
    assert not (folder / "engine_logits").exists()
    next(one for one in stages_of(run) if one.name == "report").finish(run)
    entry = run.entry(stage.configuration)
    assert [row.which for row in guide_rows(entry["ran"])] == ["quantized"]
    assert not [row for row in entry["rows"] if row["metric"] == "tokens/s"]  # there is no 16-bit engine beside it
    assert entry["ran"]["commands"] and "trtllm-build" in entry["ran"]["commands"][0]


def test_a_missing_image_is_an_obstacle_with_the_command_that_fetches_it(done, machine):
    machine.behave(image="absent")
    run, stage = prepared(done, machine, "fp8")
    assert stage.command(run) is None
    stage.finish(run)
    assert f"pull {IMAGE}" in run.result["incomplete"]
    assert not stage.intact(run)  # another attempt looks again, and finds the image
    key = stage.key(run)
    machine.behave()
    assert stage.command(run) is not None and stage.key(run) == key


def test_cancelled_while_modelopt_works(home):
    section = {"quant_method": "int4_awq", "calib_size": 32, "max_seq_length": 512, "AWQ_ALPHA_STEP": 0.01}
    job = control.submit(home, trtllm_text("cancelled", section))
    until(home, job.uid, lambda j: j.progress.get("stage") == "quantize" and j.progress.get("step", 0) > 1, PATIENCE_S)
    process = process_of(home, job.uid, "backend.engines.modelopt_quantize")
    control.cancel(home, job.uid)
    job = until(home, job.uid, lambda j: not j.is_active, PATIENCE_S)
    assert job.state == "cancelled" and not process.is_running()
    assert not home.artefact_dir(parse_yaml(job.config_yaml).config).exists()


def test_without_quantizing_the_model_is_exported_in_the_type_asked_for(home):
    section = {"to_quantize": False, "quant_method": "int4_awq", "BACKEND": "tensorrt", "dtype": "bfloat16"}
    unmeasured = {"EVALUATION": {"ENABLED": False}, "BENCHMARK": {"ENABLED": False}}
    job = control.submit(home, trtllm_text("plain", section, **unmeasured))
    job = until(home, job.uid, lambda j: not j.is_active, PATIENCE_S)
    assert job.state == "succeeded", job.reason
    (entry,) = results_of(job.result)
    config = json.loads((Path(entry["artefact"]) / "config.json").read_text())
    engine = json.loads((Path(entry["artefact"]) / "tensorrt_llm_checkpoint/config.json").read_text())
    assert "quantization_config" not in config and engine["quantization"]["quant_algo"] is None
    assert engine["dtype"] == "bfloat16" and entry["check"]["linear_difference"] == 0
    assert job.reason is None  # nothing more was asked for
