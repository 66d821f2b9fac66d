"""The run in TensorRT-LLM as a real program, against executables that record, fail, hang, die and lie."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backend.paths import PROJECT
from backend.tensorrt_llm.inputs import write_inputs
from tests.tensorrt_llm.fakes import IMAGE, Fakes, alive, gpus_file, plain_environment, plan_in

TOKENS = list(range(100, 160))
WINDOWS = [{"tokens": list(range(20)), "counted": list(range(1, 20))}, {"tokens": [3, 4, 5], "counted": [2]}]


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path)


class Run:
    """One run of the program."""

    def __init__(self, tmp_path: Path, fakes: Fakes, executor: str, *, limits: Any = None, **changes: Any) -> None:
        self.plan = plan_in(tmp_path, **changes)
        self.result_file, self.events_file = tmp_path / "result.json", tmp_path / "events.jsonl"
        self.log_file = tmp_path / "log.txt"
        written = tmp_path / "inputs"
        write_inputs(replace(self.plan, work=written), TOKENS, WINDOWS)
        request = {
            "job": "job-7", "inputs_dir": str(written), "plan": self.plan.to_json(),
            "executor": executor, "gpus": ["GPU-fake-0"],
            "environment": str(fakes.environment), "image": IMAGE, "docker": fakes.docker,
            "limits_s": limits or {},
        }  # fmt: skip
        (tmp_path / "request.json").write_text(json.dumps(request))
        self._argv = [
            sys.executable, "-m", "backend.engines.trtllm_run", str(tmp_path / "request.json"), str(self.result_file)
        ]  # fmt: skip
        self._environment = {**plain_environment(), "QUANTDECK_FAKE_GPUS": str(gpus_file(tmp_path))}

    def start(self) -> subprocess.Popen[bytes]:
        with open(self.events_file, "wb") as out, open(self.log_file, "wb") as log:
            return subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=out, stderr=log, cwd=PROJECT, env=self._environment,
                start_new_session=True,
            )  # fmt: skip

    def finish(self) -> int:
        return self.start().wait(120)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.events_file.read_text().splitlines()]

    @property
    def error(self) -> str:
        (found,) = [event["message"] for event in self.events if event.get("stage") == "error"]
        assert not self.result_file.exists()
        return found

    @property
    def result(self) -> dict[str, Any]:
        return json.loads(self.result_file.read_text())


def test_pytorch_in_docker_measures_both_models(tmp_path: Path, fakes: Fakes) -> None:
    fakes.behave(trtllm_bench="slow")
    run = Run(tmp_path, fakes, "docker")
    assert run.finish() == 0, run.log_file.read_text()
    result = run.result
    assert result["baseline"]["weight_bytes"] == 4000
    assert result["quantized"]["weight_bytes"] == 1000
    for which in ("baseline", "quantized"):
        single, load = result[which]["single"], result[which]["load"]
        assert (single["output_tokens_per_s"], load["output_tokens_per_s"]) == (100.0, 300.0)
        assert (single["requests"], load["requests"]) == (5, 5)
        assert single["decode_tokens_per_s"] == 120.0
        assert (single["idle_bytes"], single["peak_bytes"]) == (2_000_000_000, 5_000_000_000)
        assert result[which]["perplexity"]["perplexity"] == pytest.approx(7.389056098930650)
        assert result[which]["perplexity"]["tokens"] == 20
    assert result["versions"] == {"tensorrt_llm": "1.2.1", "image": IMAGE, "image_id": "sha256:0123"}
    runs = [["docker", *call[1:]] for call in fakes.calls("docker") if call[1] == "run"]
    assert runs == [["docker", *command[1:]] for command in result["commands"]]
    assert len(runs) == 6
    for call in runs:
        assert call[call.index("--network") + 1] == "none" and call[call.index("--pull") + 1] == "never"
        assert call[call.index("--gpus") + 1] == "device=GPU-fake-0"
        assert "-p" not in call
    assert len({call[call.index("--name") + 1] for call in runs}) == 6
    quantized = next(call for call in runs if "/checkpoint" in call)
    assert f"{run.plan.checkpoint}:/checkpoint:ro" in quantized and f"{run.plan.model}:/model:ro" not in quantized
    assert [e["stage"] for e in run.events].count("trtllm_bench") >= 8
    assert run.events[-1]["stage"] == "trtllm_perplexity" and run.events[-1]["step"] == run.events[-1]["total"] == 6


def test_an_engine_is_built_and_measured_in_an_environment(tmp_path: Path, fakes: Fakes) -> None:
    run = Run(tmp_path, fakes, "environment", method="smoothquant", mode="tensorrt", tp_size=1)
    assert run.finish() == 0, run.log_file.read_text()
    result = run.result
    assert result["baseline"] is None
    assert result["quantized"]["weight_bytes"] == 1234
    assert not fakes.calls("docker")
    measured, logits = fakes.calls("trtllm-build")
    assert measured[measured.index("--output_dir") + 1] == str(run.plan.engine)
    assert measured[measured.index("--max_seq_len") + 1] == "128"
    assert "--gather_context_logits" not in measured and "--gather_context_logits" in logits
    bench = fakes.calls("trtllm-bench")[0]
    assert bench[bench.index("--engine_dir") + 1] == str(run.plan.engine)
    assert bench[bench.index("--backend") + 1] == "tensorrt" and "--max_seq_len" not in bench
    assert {"build", "build_logits", "quantized_single"} < result["timings"].keys()
    assert [command[0] for command in result["commands"]][0] == str(fakes.environment / "bin" / "trtllm-build")


@pytest.mark.parametrize("executor", ["environment", "docker"])
def test_a_failure_gives_exit_code_last_lines_and_advice(tmp_path: Path, fakes: Fakes, executor: str) -> None:
    fakes.behave(trtllm_bench="fail")
    run = Run(tmp_path, fakes, executor)
    assert run.finish() == 1
    assert "baseline: one request at a time" in run.error
    assert "ended with exit code 3" in run.error
    assert "CUDA out of memory on this card" in run.error and "KV_CACHE_FRACTION" in run.error
    assert "CUDA out of memory on this card" in run.log_file.read_text()
    assert len(fakes.calls("trtllm-bench")) == 1


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("die", "signal 9"),
        ("no report", "ended without writing baseline_single.json"),
        ("truncated", "half-way"),
        ("sixteen bit", "reports no quantization"),
        ("not finite", "performance.system_output_throughput_tok_s nan"),
    ],
)
def test_what_a_program_does_not_leave_is_an_error(tmp_path: Path, fakes: Fakes, how: str, words: str) -> None:
    fakes.behave(trtllm_bench=how)
    run = Run(tmp_path, fakes, "environment")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "baseline_single.json").write_text("{}")  # of an earlier attempt
    assert run.finish() == 1
    assert words in run.error


def test_garbage_on_the_output_hurts_nobody(tmp_path: Path, fakes: Fakes) -> None:
    fakes.behave(trtllm_bench="garbage")
    run = Run(tmp_path, fakes, "environment", perplexity=False)
    assert run.finish() == 0, run.log_file.read_text()
    assert run.result["quantized"]["perplexity"] is None
    assert all(isinstance(event["t"], float) for event in run.events)


def test_a_build_that_leaves_no_engine_is_an_error(tmp_path: Path, fakes: Fakes) -> None:
    fakes.behave(trtllm_build="nothing")
    run = Run(tmp_path, fakes, "environment", method="int8", mode="tensorrt")
    assert run.finish() == 1
    assert "there is no engine" in run.error


def test_docker_without_a_gpu_runtime_is_told(tmp_path: Path, fakes: Fakes) -> None:
    fakes.behave(docker="no runtime")
    run = Run(tmp_path, fakes, "docker")
    assert run.finish() == 1
    assert "exit code 125" in run.error and "NVIDIA Container Toolkit" in run.error


def test_a_program_that_takes_too_long_is_ended(tmp_path: Path, fakes: Fakes) -> None:
    fakes.behave(trtllm_bench="hang")
    run = Run(tmp_path, fakes, "docker", limits={"trtllm_bench": 3.0})
    assert run.finish() == 1
    assert "did not end within 3 s" in run.error
    for pid in json.loads((fakes.folder / "hanging.json").read_text()):
        assert not alive(pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("executor", ["environment", "docker"])
def test_a_cancel_leaves_no_process_and_no_container(
    tmp_path: Path, fakes: Fakes, executor: str, number: signal.Signals
) -> None:
    fakes.behave(trtllm_bench="hang")
    run = Run(tmp_path, fakes, executor)
    process = run.start()
    hanging = fakes.folder / "hanging.json"
    deadline = time.monotonic() + 60
    while not hanging.exists():
        assert process.poll() is None and time.monotonic() < deadline, run.log_file.read_text()
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == 130
    for pid in json.loads(hanging.read_text()):
        assert not alive(pid)
    assert not list(fakes.folder.glob("container-*")) and not run.result_file.exists()
    if executor == "docker":
        assert ["docker", "kill", "job-7-baseline_single"] in fakes.calls("docker")


def test_what_a_killed_run_left_is_ended_by_the_next(tmp_path: Path, fakes: Fakes) -> None:
    fakes.behave(trtllm_bench="hang")
    run = Run(tmp_path, fakes, "docker", perplexity=False)
    process = run.start()
    hanging = fakes.folder / "hanging.json"
    deadline = time.monotonic() + 60
    while not hanging.exists():
        assert process.poll() is None and time.monotonic() < deadline, run.log_file.read_text()
        time.sleep(0.05)
    process.kill()
    process.wait()
    left = json.loads(hanging.read_text())
    assert alive(left[0])  # as a container outlives everything that asked for it
    fakes.behave()
    assert run.finish() == 0, run.log_file.read_text()
    assert not alive(left[0]) and not alive(left[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpus": []}, "found no GPU"),
        ({"job": "a b"}, "name a container"),
        ({"executor": "podman"}, "environment or docker"),
        ({"inputs_dir": "/nowhere"}, "no bench_dataset.jsonl in /nowhere"),
    ],
)
def test_a_wrong_request_starts_nothing(tmp_path: Path, fakes: Fakes, change: dict[str, Any], words: str) -> None:
    run = Run(tmp_path, fakes, "docker")
    path = tmp_path / "request.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert run.finish() == 2
    assert words in run.error and not fakes.calls()


def test_code_of_the_models_own_is_refused(tmp_path: Path, fakes: Fakes) -> None:
    run = Run(tmp_path, fakes, "docker")
    (run.plan.checkpoint / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.Y", null]}}')
    assert run.finish() == 2
    assert "auto_map" in run.error and not fakes.calls()
