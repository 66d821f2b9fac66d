"""What a plan runs, and the files that its programs read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from backend.errors import ConfigError, DataError
from backend.tensorrt_llm.executors import DockerExecutor, container_command, inside, tool_command
from backend.tensorrt_llm.flags import SERVE
from backend.tensorrt_llm.inputs import dataset_rows, write_inputs
from backend.tensorrt_llm.methods import METHODS
from backend.tensorrt_llm.plan import DATASET, OPTIONS, SCRIPT, WINDOWS, RunPlan, serve_step, steps
from tests.tensorrt_llm.fakes import plan_in


def option(argv: list[str], name: str) -> str:
    return argv[argv.index(name) + 1]


def names(plan: RunPlan) -> list[str]:
    return [step.name for step in steps(plan)]


def test_a_plan_survives_json_and_nothing_else_passes_for_one(tmp_path):
    plan = plan_in(tmp_path, mode="tensorrt", max_num_tokens=8192)
    assert RunPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    for wrong in ({"extra": 1}, {"mode": "torch"}, {"trt_checkpoint": None}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            RunPlan.from_json({**plan.to_json(), **wrong})
    with pytest.raises(ConfigError, match="dtype"):
        RunPlan.from_json({k: v for k, v in plan.to_json().items() if k != "dtype"})


def test_both_models_on_the_pytorch_backend_and_the_engine_alone(tmp_path):
    assert names(plan_in(tmp_path)) == [
        "baseline_single", "baseline_load", "quantized_single", "quantized_load", "baseline_perplexity",
        "quantized_perplexity",
    ]  # fmt: skip
    assert names(plan_in(tmp_path, method=None, perplexity=False)) == ["quantized_single", "quantized_load"]
    assert names(plan_in(tmp_path, mode="tensorrt", method="smoothquant")) == [
        "build", "quantized_single", "quantized_load", "build_logits", "quantized_perplexity",
    ]  # fmt: skip


@pytest.mark.parametrize("method", [None, *METHODS])
def test_every_step_of_every_method_is_a_command_that_the_tables_allow(tmp_path, method):
    for mode in METHODS[method].modes if method else ("pytorch", "tensorrt"):
        plan = plan_in(tmp_path, method=method, mode=mode, max_num_tokens=4096, max_prompt_embedding_table_size=3)
        for step in (*steps(plan), serve_step(plan, 8123)):
            assert tool_command(step, lambda path: path)
            argv = container_command(plan, step)
            assert str(tmp_path) not in " ".join(argv)
            reached = [place for place in step.values.values() if isinstance(place, Path)]
            seen = {inside(plan, getattr(plan, name)) for name in (*step.reads, *step.writes)}
            assert all(any(inside(plan, place).is_relative_to(root) for root in seen) for place in reached)


def test_the_engine_holds_what_the_measurement_needs(tmp_path):
    plan = plan_in(
        tmp_path, mode="tensorrt", max_batch_size=2, max_input_len=6, max_output_len=2, max_num_tokens=4,
        prompt_tokens=8, new_tokens=4, concurrency=3,
    )  # fmt: skip
    build = tool_command(steps(plan)[0], lambda path: path)
    sizes = {name: option(build, f"--max_{name}") for name in ("batch_size", "input_len", "seq_len", "num_tokens")}
    assert sizes == {"batch_size": "3", "input_len": "8", "seq_len": "12", "num_tokens": "8"}
    roomy = dataclasses.replace(plan, max_batch_size=64, max_input_len=1024, max_output_len=512)
    build = tool_command(steps(roomy)[0], lambda path: path)
    assert (option(build, "--max_seq_len"), option(build, "--max_batch_size")) == ("1536", "64")


def test_fp8_is_built_without_the_plugin_for_16_bit_products(tmp_path):
    assert "--gemm_plugin" not in tool_command(steps(plan_in(tmp_path, mode="tensorrt", method="fp8"))[0], Path)
    assert "--gemm_plugin" in tool_command(steps(plan_in(tmp_path, mode="tensorrt", method="int8"))[0], Path)


def test_a_container_sees_a_step_s_own_folders_and_writes_only_where_it_must(tmp_path):
    plan = plan_in(tmp_path, mode="tensorrt")
    by_name = {step.name: step for step in steps(plan)}
    executor = DockerExecutor("image:1", ("GPU-a", "GPU-b"))
    build = executor.argv(plan, by_name["build"], "job-1-build")
    volumes = [build[i + 1] for i, word in enumerate(build) if word == "-v"]
    trt = f"{plan.checkpoint}/tensorrt_llm_checkpoint:/trt_checkpoint:ro"
    assert sorted(volumes) == sorted([trt, f"{plan.engine}:/engine", f"{plan.work}:/scratch"])
    assert option(build, "--gpus") == '"device=GPU-a,GPU-b"'  # docker reads CSV
    assert (option(build, "--name"), option(build, "--network")) == ("job-1-build", "none")
    bench = executor.argv(plan, by_name["quantized_load"], "job-1-load")
    volumes = [bench[i + 1] for i, word in enumerate(bench) if word == "-v"]
    assert f"{plan.engine}:/engine:ro" in volumes
    serve = executor.argv(plan, serve_step(plan, 8123), "job-1-serve")
    assert option(serve, "-p") == "127.0.0.1:8123:8000"
    assert "--network" not in serve
    inner = serve[serve.index("image:1") + 1 :]
    assert (inner[:2], option(inner, "--port")) == ([SERVE, "/engine"], "8000")


def test_a_container_finds_the_files_that_a_model_in_the_hub_s_cache_links_to(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    (snapshot / "original").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "c0ffee").write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/c0ffee")
    (snapshot / "original/params.json").symlink_to("../../../blobs/c0ffee")
    (snapshot / "config.json").write_text("{}")
    (snapshot / "same.json").symlink_to("config.json")
    plan = plan_in(tmp_path / "job", model=snapshot)
    argv = DockerExecutor("image:1", ("GPU-a",)).argv(plan, steps(plan)[0], "job-1")
    volumes = [argv[i + 1] for i, word in enumerate(argv) if word == "-v"]
    # /model/../../blobs is /blobs: nothing lies above the root
    assert sorted(volumes) == sorted([f"{snapshot}:/model:ro", f"{plan.work}:/scratch", f"{blobs}:/blobs:ro"])


def test_folders_in_one_another_are_seen_at_their_own_places(tmp_path):
    plan = plan_in(tmp_path)
    plan = dataclasses.replace(plan, work=plan.checkpoint / "run", engine=plan.checkpoint / "run/engine")
    assert inside(plan, plan.engine / "rank0.engine") == Path("/engine/rank0.engine")
    assert inside(plan, plan.work / DATASET) == Path("/scratch") / DATASET
    assert inside(plan, plan.checkpoint / "config.json") == Path("/checkpoint/config.json")
    with pytest.raises(ValueError, match="none of the folders"):
        inside(plan, tmp_path / "elsewhere")


def test_requests_are_different_pieces_of_the_text_of_exact_length():
    tokens = list(range(1000, 1100))
    rows = dataset_rows(tokens, prompt_tokens=40, new_tokens=7, requests=13)
    assert [row["task_id"] for row in rows] == list(range(13))
    assert {(len(row["input_ids"]), row["output_tokens"]) for row in rows} == {(40, 7)}
    assert len({tuple(row["input_ids"]) for row in rows}) == 13
    for row in rows:
        start = row["input_ids"][0] - 1000
        assert row["input_ids"] == tokens[start : start + 40]
    assert dataset_rows(tokens[:40], prompt_tokens=40, new_tokens=1, requests=1)[0]["input_ids"] == tokens[:40]


@pytest.mark.parametrize(("tokens", "requests"), [(39, 1), (51, 13), (0, 1)])
def test_a_text_that_is_too_short_is_refused(tokens, requests):
    with pytest.raises(DataError, match=f"the text has {tokens} tokens"):
        dataset_rows(range(tokens), prompt_tokens=40, new_tokens=7, requests=requests)


def test_the_files_of_a_plan(tmp_path):
    plan = plan_in(tmp_path)
    windows = [{"tokens": [1, 2, 3], "counted": [2]}]
    write_inputs(plan, range(50), windows)
    assert len((plan.work / DATASET).read_text().splitlines()) == plan.requests
    assert "enable_block_reuse: false" in (plan.work / OPTIONS).read_text()
    assert (plan.work / SCRIPT).read_text().startswith('"""Perplexity')
    assert json.loads((plan.work / WINDOWS).read_text()) == {"windows": windows}
    for wrong in ([], [{"tokens": [1, 2], "counted": [0]}], [{"tokens": [1, 2], "counted": [2]}]):
        with pytest.raises(DataError):
            write_inputs(plan, range(50), wrong)
